"""``effvit backbones`` and ``effvit configs``."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from effvit._cli.shipped import shipped_configs, summary
from effvit.errors import ConfigError, close_matches, did_you_mean

#: Networks of timm that are measured for a list; each takes about a second.
_MEASURED = 30


def print_configs(words: list[str]) -> int:
    """Prints every shipped configuration with what it is for, or draws the learning rate of one."""
    parser = argparse.ArgumentParser(
        prog="effvit configs",
        description="List the shipped configurations, or draw the learning rate of one over its whole training.",
        allow_abbrev=False,
    )
    parser.add_argument("--plot-lr", metavar="NAME", help="a shipped configuration, or a file")
    parser.add_argument(
        "--global_batch",
        type=int,
        metavar="N",
        help="images of an optimizer step, all processes together; default: what the learning rate is given for",
    )
    parser.add_argument("--output", type=Path, default=Path("lr.png"), help="where to draw (default: %(default)s)")
    own = parser.parse_args(words)
    if own.plot_lr is not None:
        from effvit._cli.plot_lr import plot_lr

        plot_lr(own.plot_lr, own.global_batch, own.output)
        return 0
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name:{width}}  {summary(path)}")
    return 0


def print_backbones(words: list[str]) -> int:
    """Prints every backbone with what was published about it, and its feature maps."""
    parser = argparse.ArgumentParser(
        prog="effvit backbones",
        description="List the backbones: size, cost, published ImageNet-1k accuracy, feature maps, and whose weights.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "pattern", nargs="?", default="*", help="part of a name, or a wildcard: mobilevit, '*_m4', 'timm/resnet10*'"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    own = parser.parse_args(words)

    names = _find_backbones(own.pattern)
    if len(names) > _MEASURED and names[0].startswith("timm/"):
        rows = [{"name": name} for name in names]
        print(
            f"{len(names)} networks; for their figures, which are counted, ask for {_MEASURED} at most.",
            file=sys.stderr,
        )
    else:
        rows = [_describe(name) for name in names]
        rows.sort(key=lambda row: ("problem" in row, _group(row), row.get("params", 0)))
    print(json.dumps(rows, indent=1) if own.json else "\n".join(_table(rows)))
    return 0


def _find_backbones(pattern: str) -> list[str]:
    """Names that match a wildcard; without one, the name itself, or else the names that it is a part of."""
    from effvit.backbones import list_backbones

    names = list_backbones(pattern)
    if not names and not set(pattern) & set("*?["):
        prefix = "timm/" if pattern.startswith("timm/") else ""
        names = list_backbones(f"{prefix}*{pattern.removeprefix(prefix).lower()}*")
    if not names:
        known = list_backbones("timm/*" if pattern.startswith("timm/") else "*")
        hint = close_matches(pattern, known) if len(known) < _MEASURED * 2 else did_you_mean(pattern, known)
        raise ConfigError(f"no backbone matches {pattern!r}. {hint}")
    return names


def _describe(name: str) -> dict[str, Any]:
    """All that is known of a network; for one of timm's that is no backbone, why."""
    from effvit.backbones import VariantInfo, outline

    try:
        network = outline(name)
    except ConfigError as error:
        if name.startswith("timm/"):
            return {"name": name, "problem": str(error).removeprefix(f"{name} ")}
        raise
    return {
        **{field.name: getattr(network.info, field.name) for field in fields(VariantInfo)},
        "feature_maps": [asdict(feature_map) for feature_map in network.feature_maps],
        "input": asdict(network.input_spec),
    }


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a network, under one line for all those whose paper and weights are alike."""
    width = max(len(row["name"]) for row in rows)
    if not any("params" in row for row in rows):
        yield from (row["name"] + ("  " + row["problem"] if "problem" in row else "") for row in rows)
        return
    yield f"{'':{width}}   params      MACs  input     top-1   channels of the maps, at their strides"
    for head, group in itertools.groupby(rows, _group):
        yield ""
        yield head
        yield from (_line(row, width) for row in group)


def _group(row: dict[str, Any]) -> str:
    if "problem" in row:
        return "no backbones"
    paper = f", arXiv:{row['paper']}" if row["paper"] else ""
    return f"{row['family']}{paper}. Weights: {row['licence']}; {row['origin']}"


def _line(row: dict[str, Any], width: int) -> str:
    if "problem" in row:
        return f"{row['name']:{width}}  {row['problem']}"
    height, breadth = row["input"]["size"]
    size = f"{height}" if height == breadth else f"{height}x{breadth}"
    top1 = f"{row['top1']!s:>6} %" if row["top1"] is not None else f"{'-':>8}"
    channels = ", ".join(str(level["channels"]) for level in row["feature_maps"])
    strides = ", ".join(str(level["stride"]) for level in row["feature_maps"])
    params, macs = f"{row['params'] / 1e6:.2f} M", f"{row['macs'] / 1e9:.3f} G"
    return f"{row['name']:{width}} {params:>8} {macs:>9}  {size:7} {top1}   {channels} at {strides}"
