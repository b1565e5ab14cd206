"""What files of others have in common: necks of OpenMMLab, the trunk below, and how to say what does not fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from effvit.backbones import FeaturePyramid, LoadReport, PyramidNeck, load_state
from effvit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.backbones import Backbone

Neck = FeaturePyramid | PyramidNeck
#: How a name of ours is turned into the file's: a pattern for its beginning, and what stands there instead.
Rule = tuple[str, str]

_NAMED = 3


def neck_rules(neck: Neck, own: str, entries: Iterable[str]) -> list[Rule]:
    """The rules for a pyramid: those of ``FPN``, the official ``EfficientViTFPN``, or ``effvit.FeaturePyramid``.

    Args:
        neck: Ours.
        own: The prefix of its parameters.
        entries: Names of the file, any prefix removed.
    """
    ours = re.escape(own)
    same = next((found for name in entries if (found := re.match(r"neck\.(.*?)(laterals|simple)\.p\d", name))), None)
    if same is not None:
        extra = [(rf"^{ours}downsamplers\.{p}\.", f"neck.extra.{i}.") for i, p in enumerate(neck.downsamplers)]
        return [*extra, (rf"^{ours}", f"neck.{same[1]}")]
    laterals, finer = list(neck.laterals), list(neck.upsamplers)
    parts = {f"laterals.{level}": f"lateral_convs.{i}" for i, level in enumerate(laterals)}
    parts |= {f"outputs.{level}": f"fpn_convs.{i}" for i, level in enumerate(laterals)}
    parts |= {f"downsamplers.{p}": f"fpn_convs.{i}" for i, p in enumerate(neck.downsamplers, len(laterals))}
    # The official code counts the transposed convolutions in the order of the computation, from coarse to fine, and the
    # convolutions on their outputs in the order of the levels, from fine to coarse.
    parts |= {f"upsamplers.{level}": f"extra_trans_convs.{i}" for i, level in enumerate(finer)}
    parts |= {f"outputs.{level}": f"extra_fpn_convs.{i}" for i, level in enumerate(reversed(finer))}
    return [(rf"^{ours}{re.escape(part)}\.", f"neck.{theirs}.conv.") for part, theirs in parts.items()]


def renamed(names: Iterable[str], rules: Iterable[Rule]) -> dict[str, str]:
    """For each name of ours the file's, by the first rule that fits; our own where none does."""
    rules = list(rules)
    return {name: next((re.sub(old, new, name) for old, new in rules if re.match(old, name)), name) for name in names}


def reads_other_maps(neck: Neck, own: str, theirs: Mapping[str, str], entries: Mapping[str, Tensor]) -> bool:
    """Whether the file's pyramid is on maps of other widths than ours, whose parameters begin with `own`."""
    widths = {
        theirs[f"{own}laterals.{level}.weight"]: neck.get_parameter(f"laterals.{level}.weight").shape[1]
        for level in neck.laterals
    }
    return any(key in entries and entries[key].shape[1] != width for key, width in widths.items())


def differences(own: Mapping[str, Tensor], theirs: Mapping[str, str], entries: Mapping[str, Tensor]) -> str:
    """What a file lacks, has beyond ours, or has in another shape; empty where it fits.

    Args:
        own: Our entries.
        theirs: The file's name for each of ours that it is to have.
        entries: The file's, without those that need not fit.
    """
    keys = list(theirs.values())
    known = {*keys}
    odd = [
        f"{key} {tuple(entries[key].shape)} for {tuple(own[name].shape)}"
        for name, key in theirs.items()
        if key in entries and entries[key].shape != own[name].shape
    ]
    titles = {
        # Counters of seen batches only matter to cumulative averages; old files lack them.
        "it lacks": [key for key in keys if key not in entries and not key.endswith("num_batches_tracked")],
        "it also has": [name for name in entries if name not in known],
        "of another shape are": odd,
    }
    return "; ".join(f"{title} {some(names)}" for title, names in titles.items() if names)


def load_trunk(backbone: Backbone, trunk: Mapping[str, Tensor], source: str | Path, kind: str) -> LoadReport:
    """Loads all weights that maps of a backbone depend on.

    Args:
        backbone: Ours.
        trunk: Its entries in the file, under any prefix.
        source: The file, for messages.
        kind: What the file is of, for messages, such as ``a detector``.

    Raises:
        CheckpointError: The weights are of another network, or not all are there.
    """
    report = load_state(backbone, trunk, source)
    lost = [name for name in report.missing if not name.startswith(backbone.embed_only)]
    if lost:
        raise CheckpointError(
            f"{source} has no weights for {some(lost)} of {backbone.info.name}, which {kind}'s file does have: it was "
            "trained with other options of the backbone"
        )
    return report


def whole_report(trunk: LoadReport, own: str, matched: Iterable[str], prefix: str = "") -> LoadReport:
    """The report on a whole network.

    Args:
        trunk: On its backbone.
        own: The prefix of the backbone's parameters in the network.
        matched: What was loaded beside the backbone.
        prefix: What was removed from the file's names.
    """

    def within(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(own + name for name in names)

    return LoadReport(
        matched=(*within(trunk.matched), *matched),
        missing=within(trunk.missing),
        unexpected=tuple(prefix + name for name in trunk.unexpected),
        resized=within(trunk.resized),
        mismatched=within(trunk.mismatched),
    )


def some(names: list[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
