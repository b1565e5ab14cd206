"""What samples of time say, and how sure it is.

A computer has moods: for a while another process, a neighbour on the same machine or a lower clock slows everything
down, so that samples taken together resemble each other. The unit of chance is hence the round, not the sample. Each
round gives one figure, its median; the median of these is what is reported, and the interval is of that very statistic.

From six rounds on it is a bootstrap that draws whole rounds (the cluster bootstrap of Davison and Hinkley, "Bootstrap
Methods and their Application", 1997, §3.8), with two corrections:

* The percentiles are taken further out, as far as Student's t is beyond the normal distribution (the expanded
  percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 2015,
  §5.3; arXiv:1411.5279).
* Where neighbouring rounds resemble each other too, as when the machine drifts, the interval grows about the estimate
  by the square root of (1 + r) / (1 - r), r being the correlation of neighbours: so much less do they know together.

Fewer rounds cannot show how they spread by being drawn again: a bootstrap of two covers the truth half of the time.
There the interval is Student's t of the logarithms, and never narrower than what was seen. Whether the machine drifts,
so few do not tell.

The numbers are drawn from a fixed seed: the same samples always have the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from effvit.deploy.records import Ratio, Statistics

_LEVEL = 0.95
_DRAWS = 2000
_SEED = 0
_MOST_CORRELATION = 0.7
_BOOTSTRAP_FROM = 6  # rounds

Rounds = Sequence[Sequence[float]]
_Array = NDArray[np.float64]


def summarise(rounds: Rounds) -> Statistics:
    """Statistics of one variant's samples.

    Args:
        rounds: Seconds of single forward passes, round by round; at least one round, and none empty.
    """
    samples = np.concatenate([np.asarray(own, dtype=np.float64) for own in rounds])
    centres = np.array([np.median(own) for own in rounds])
    return Statistics(
        median=float(np.median(centres)),
        mean=float(samples.mean()),
        p95=float(np.percentile(samples, 95)),
        p99=float(np.percentile(samples, 99)),
        ci95=_interval(centres),
        rounds=tuple(tuple(float(sample) for sample in own) for own in rounds),
    )


def ratio(baseline_rounds: Rounds, rounds: Rounds) -> Ratio:
    """How many times as fast a variant is as its baseline, both timed in the same rounds.

    Args:
        baseline_rounds: The baseline's seconds, round by round.
        rounds: The variant's; as many rounds.

    Returns:
        The median over rounds of baseline's median divided by the variant's.
    """
    pairs = zip(baseline_rounds, rounds, strict=True)
    ratios = np.array([float(np.median(base)) / float(np.median(own)) for base, own in pairs])
    return Ratio(float(np.median(ratios)), _interval(ratios))


def _interval(centres: _Array) -> tuple[float, float]:
    """The interval of the median of one figure of each round; in logarithms, as no time or ratio is below zero."""
    if len(centres) == 1:
        return (float(centres[0]), float(centres[0]))  # one round says nothing about others
    logs = np.log(centres)
    low, high = _of_few(logs) if len(logs) < _BOOTSTRAP_FROM else _of_many(logs)
    return (math.exp(low), math.exp(high))


def _of_few(logs: _Array) -> tuple[float, float]:
    count, middle = len(logs), float(logs.mean())
    reach = _student((1 + _LEVEL) / 2, count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    return min(middle - reach, float(logs.min())), max(middle + reach, float(logs.max()))


def _of_many(logs: _Array) -> tuple[float, float]:
    count, middle = len(logs), float(np.median(logs))
    draws = np.random.default_rng(_SEED).integers(0, count, (_DRAWS, count))
    medians = np.median(logs[draws], axis=1)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student((1 + _LEVEL) / 2, count - 1))
    low, high = (float(np.quantile(medians, share)) for share in (tail, 1 - tail))
    widen = _widening(logs)
    return middle - widen * (middle - low), middle + widen * (high - middle)


def _widening(logs: _Array) -> float:
    """How much wider the interval is than that of independent rounds."""
    count = len(logs)
    away = logs - np.median(logs)
    total = float((away**2).sum())
    if total == 0:
        return 1.0
    found = float((away[1:] * away[:-1]).sum()) / total
    # What n rounds show of a correlation r is r - (1 + 4 r) / n in the mean (Marriott and Pope, Biometrika 1954).
    correlation = min(max((found + 1 / count) / (1 - 4 / count), 0.0), _MOST_CORRELATION)
    return math.sqrt((1 + correlation) / (1 - correlation))


def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t.

    In closed form for 1 and 2 degrees of freedom; beyond, the expansion in Abramowitz and Stegun, 26.7.5, within 1 %.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
