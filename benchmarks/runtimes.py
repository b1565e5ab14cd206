"""Our networks in each runtime against timm eager, same weights, equal outputs: ``python benchmarks/runtimes.py``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _ruler import Measurement, environment, in_own_process, measure, to_markdown

from backbones import OURS, PEER, images_for, networks
from effvit.deploy.runtimes import RUNTIMES, Setting, check, compare, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = [*(f"efficientvit_m{size}" for size in range(5)), "efficientformer_l1"]
# Compilation takes one to three minutes for each network and batch size: --runtimes compile pt2
DEFAULT = ["fused", "torchscript", "onnx", "openvino"]


def classify(name: str, batch: int, runtimes: tuple[str, ...], rounds: int) -> Measurement:
    """Logits of 224x224 images, each runtime's compared with timm's before its time counts."""
    torch.set_num_threads(1)
    models = networks(name, (PEER, OURS))
    inputs = (images_for(PEER, batch, (224, 224)),)
    peer = prepare(models[PEER], inputs, "eager", Setting())
    expected = peer.outputs()
    calls: dict[str, Callable[[], Any]] = {PEER: peer.run}
    for runtime in runtimes:
        ready = prepare(models[OURS], inputs, runtime, Setting())
        check(compare(ready.outputs(), expected, peer.names), runtime, "fp32")
        calls[runtime] = ready.run
        print(f"{name}, batch {batch}, {runtime}: ready in {ready.seconds:.0f} s", file=sys.stderr, flush=True)
    return measure(f"{name}, batch {batch}", calls, items=batch, rounds=rounds)


def main() -> None:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--runtimes", nargs="*", default=DEFAULT, choices=list(RUNTIMES))
    parser.add_argument("--batch", nargs="*", type=int, default=[16, 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the measurements there, one JSON object a line")
    arguments = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    measurements: list[Measurement] = []
    for batch in arguments.batch:
        for name in arguments.models:
            row = in_own_process(classify, name, batch, tuple(arguments.runtimes), arguments.rounds)
            print("\n".join(to_markdown([row]).splitlines()[2 if measurements else 0 :]), flush=True)
            measurements.append(row)
    if arguments.json:
        arguments.json.write_text("".join(f"{m.to_json()}\n" for m in measurements), encoding="utf-8")


if __name__ == "__main__":
    main()
