"""DynamicViT against its own dense network: ``python benchmarks/dynamicvit.py --help``.

What pruning gains, and what choosing the tokens costs: the bound keeps the first tokens of the same network without
scoring any. Eager, timm's DeiT stands beside; its weights are in the dense network, with equal logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from _ruler import Measurement, environment, measure, to_markdown
from torch import Tensor, nn

from effvit.backbones import Classifier, create_classifier
from effvit.backbones.dynamicvit import PRUNE_BEFORE, DynamicViT

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-4
DENSE, PRUNED, BOUND, PEER = "dense", "pruned", "sliced, no scores", "timm dense"


class Sliced(nn.Module):
    """The pruned classifier, keeping the first tokens instead of the best."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        assert isinstance(classifier.backbone, DynamicViT)
        self.trunk = classifier.backbone
        self.head = classifier.head

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, 1000)``."""
        x, _ = self.trunk._enter(images)  # noqa: SLF001 - the same steps as the network's own, less the choice
        counts = self.trunk.tokens_kept(x.shape[1] - 1)
        for depth, block in enumerate(self.trunk.blocks):
            if depth in PRUNE_BEFORE:
                x = x[:, : 1 + counts[PRUNE_BEFORE.index(depth)]].contiguous()
            x = block(x)
        logits: Tensor = self.head(self.trunk.norm(x[:, 0]))
        return logits


def networks(size: str, keep_ratio: float, *, fuse: bool) -> dict[str, nn.Module]:
    """The named forms of one network, all with the same trunk."""
    torch.manual_seed(0)
    peer = timm.create_model(f"deit_{size}_patch16_224").eval()
    dense = create_classifier(f"dynamicvit_{size}", keep_ratio=1.0).eval()
    pruned = create_classifier(f"dynamicvit_{size}", keep_ratio=keep_ratio).eval()
    trunk = {name: value for name, value in peer.state_dict().items() if not name.startswith("head.")}
    for network in (dense, pruned):
        network.backbone.load_state_dict(trunk, strict=False)
        network.head.load_state_dict(peer.head.state_dict())
        if fuse:
            network.fuse()
    images = torch.randn(2, 3, 224, 224)
    error = ((dense(images) - peer(images)).abs().max() / peer(images).abs().max()).item()
    if error > TOLERANCE:
        raise SystemExit(f"the dense network differs from timm by {error:.1e} of the largest logit")
    return {DENSE: dense, PRUNED: pruned, BOUND: Sliced(pruned), PEER: peer}


def classify(size: str, keep_ratio: float, batch: int, rounds: int, *, fuse: bool) -> Measurement:
    """Logits of 224x224 images."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calls = {name: _call(model, images) for name, model in networks(size, keep_ratio, fuse=fuse).items()}
    title = f"dynamicvit_{size}, batch {batch}, {'fused' if fuse else 'eager'}"
    return measure(title, calls, items=batch, rounds=rounds)


def _call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images)


def scoring_cost(measurement: Measurement) -> float:
    """Time of the pruned network over the bound's, less 1."""
    ratios = {result.name: result.ratio for result in measurement.results}
    return ratios[BOUND] / ratios[PRUNED] - 1


def macs_ratio(size: str, keep_ratio: float) -> float:
    """Multiplications of the dense network over those of the pruned one, at 224x224."""
    dense, pruned = (create_classifier(f"dynamicvit_{size}", keep_ratio=ratio).backbone for ratio in (1.0, keep_ratio))
    return dense.info.macs / pruned.info.macs


def main() -> None:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "small"], choices=["tiny", "small", "base"])
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--batch", nargs="*", type=int, default=[16, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the measurements there, one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    measurements = [
        classify(size, arguments.keep_ratio, batch, arguments.rounds, fuse=fuse)
        for fuse in (True, False)
        for batch in arguments.batch
        for size in arguments.sizes
    ]
    print(to_markdown(measurements))
    for size in arguments.sizes:
        print(f"- dynamicvit_{size}: {macs_ratio(size, arguments.keep_ratio):.2f} times fewer multiplications")
    for measurement in measurements:
        print(f"- {measurement.title}: choosing the tokens costs {scoring_cost(measurement):.1%} over the bound")
    if arguments.json:
        arguments.json.write_text("".join(f"{m.to_json()}\n" for m in measurements), encoding="utf-8")


if __name__ == "__main__":
    main()
