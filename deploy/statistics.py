"""What samples of time say, and how sure it is.

A computer has moods: for a while another process, a neighbour on the same machine or a lower clock slows everything
down, so that samples taken together resemble each other. The unit of chance is hence the round, not the sample: the
bootstrap draws whole rounds (the cluster bootstrap of Davison and Hinkley, "Bootstrap Methods and their Application",
1997, §3.8). Two corrections keep few rounds from looking more certain than they are:

* The percentiles are taken further out, as far as Student's t is beyond the normal distribution (the expanded
  percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 2015,
  §5.3; arXiv:1411.5279).
* Where neighbouring rounds resemble each other too, as when the machine drifts, the interval grows about the estimate
  by the square root of (1 + r) / (1 - r), r being the correlation of neighbours: so much less do they know together.

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

Rounds = Sequence[Sequence[float]]
_Array = NDArray[np.float64]


def summarise(rounds: Rounds) -> Statistics:
    """Statistics of one variant's samples.

    Args:
        rounds: Seconds of single forward passes, round by round; at least one round, and none empty.
    """
    samples = np.concatenate([np.asarray(own, dtype=np.float64) for own in rounds])
    median = float(np.median(samples))
    centres = np.array([np.median(own) for own in rounds])
    return Statistics(
        median=median,
        mean=float(samples.mean()),
        p95=float(np.percentile(samples, 95)),
        p99=float(np.percentile(samples, 99)),
        ci95=_interval(centres, median),
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
    value = float(np.median(ratios))
    return Ratio(value, _interval(ratios, value))


def _interval(centres: _Array, estimate: float) -> tuple[float, float]:
    """The interval of `estimate`, from one figure of each round; in logarithms, as no time or ratio is below zero."""
    count = len(centres)
    if count < 2:
        return (estimate, estimate)  # one round says nothing about others
    centres, middle = np.log(centres), math.log(estimate)
    draws = np.random.default_rng(_SEED).integers(0, count, (_DRAWS, count))
    medians = np.median(centres[draws], axis=1)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student((1 + _LEVEL) / 2, count - 1))
    low, high = (float(np.quantile(medians, share)) for share in (tail, 1 - tail))
    widen = _widening(centres)
    below, above = widen * max(middle - low, 0.0), widen * max(high - middle, 0.0)
    return (math.exp(middle - below), math.exp(middle + above))


def _widening(centres: _Array) -> float:
    """How much wider the interval is than that of independent rounds."""
    count = len(centres)
    if count <= 4:
        return 1.0  # too few to tell
    away = centres - np.median(centres)
    total = float((away**2).sum())
    if total == 0:
        return 1.0
    found = float((away[1:] * away[:-1]).sum()) / total
    # What n rounds show of a correlation r is r - (1 + 4 r) / n in the mean (Marriott and Pope, Biometrika 1954).
    correlation = min(max((found + 1 / count) / (1 - 4 / count), 0.0), _MOST_CORRELATION)
    return math.sqrt((1 + correlation) / (1 - correlation))


def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t: the expansion in Abramowitz and Stegun, 26.7.5; within 1 % from 3 degrees of freedom."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
