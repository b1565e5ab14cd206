"""``effvit backbones`` and ``effvit configs``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from effvit._cli.shipped import shipped_configs, summary
from effvit.errors import ConfigError, close_matches


def print_configs(words: list[str]) -> int:
    """Prints every shipped configuration with what it is for."""
    argparse.ArgumentParser(prog="effvit configs", description="List the shipped configurations.").parse_args(words)
    configs = shipped_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name:{width}}  {summary(path)}")
    return 0


def print_backbones(words: list[str]) -> int:
    """Prints every backbone with what was published about it, and its feature maps."""
    parser = argparse.ArgumentParser(prog="effvit backbones", description="List the backbones.", allow_abbrev=False)
    parser.add_argument("pattern", nargs="?", default="*", help="wildcard, such as 'efficientvit_*'")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    own = parser.parse_args(words)
    import torch

    from effvit.backbones import backbone_info, create_backbone, list_backbones

    names = list_backbones(own.pattern)
    if not names:
        raise ConfigError(f"no backbone matches {own.pattern!r}. {close_matches(own.pattern, list_backbones())}")
    rows = []
    for name in names:
        with torch.device("meta"):  # shapes without weights
            maps = create_backbone(name).feature_maps
        rows.append({**asdict(backbone_info(name)), "feature_maps": [asdict(feature_map) for feature_map in maps]})
    if own.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'backbone':18} {'params':>8} {'MACs':>8} {'top-1':>6}  feature maps (channels at stride)   weights")
    for row in rows:
        levels = ", ".join(f"{level['channels']} at {level['stride']}" for level in row["feature_maps"])
        print(
            f"{row['name']:18} {row['params'] / 1e6:6.2f} M {row['macs'] / 1e9:6.3f} G {row['top1']:5.1f} %  "
            f"{levels:34}  {row['licence']}"
        )
    return 0
