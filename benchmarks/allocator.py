"""What tuning glibc's allocator gains: the same work in processes with and without it, in turn.

The setting belongs to a process, so variants cannot be interleaved within one as `_ruler.py` does; processes alternate
instead, and each ratio is of two that ran one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

WORKLOADS = ("backbone, 800x1216", "training step, 640x480")


def work(name: str, allocator: str) -> None:
    """Times one workload in this process and prints CPU seconds and page faults of one call."""
    from effvit._cli.allocator import tune_allocator

    said = tune_allocator(allocator)
    import resource

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = _backbone() if name == WORKLOADS[0] else _training_step()
    for _ in range(2):
        call()
    seconds, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // 5
    print(json.dumps({"seconds": statistics.median(seconds), "faults": faults, "allocator": said}))


def _backbone():  # noqa: ANN202 - a closure
    import torch

    from effvit.backbones import create_backbone

    network = create_backbone("efficientvit_m4", dense=True).eval()
    image = torch.rand(1, 3, 800, 1216)

    def call() -> None:
        with torch.inference_mode():
            network(image)

    return call


def _training_step():  # noqa: ANN202 - a closure
    import torch

    from effvit.tasks import Detection

    task = Detection("efficientvit_m0", {0: "object"}, pyramid_channels=64, head_convs=2, norm_eval=False).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-6)
    images = torch.randint(0, 256, (4, 3, 480, 640), dtype=torch.uint8)
    target = {"size": (480, 640), "boxes": torch.tensor([[50.0, 50.0, 300.0, 300.0]]), "labels": torch.tensor([0])}

    def call() -> None:
        prepared, sizes = task.prepare((images, [target] * 4))
        loss = torch.stack(list(task.detector.loss(prepared, sizes, [target] * 4).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def main() -> None:
    """Runs all workloads and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.child:
        work(*own.child)
        return
    print("| workload | default: CPU s, page faults | tuned: CPU s, page faults | default / tuned |")
    print("| --- | --- | --- | --- |")
    for name in WORKLOADS:
        results: dict[str, list[dict[str, float]]] = {"default": [], "tuned": []}
        for _ in range(own.rounds):
            for allocator, found in results.items():
                command = [sys.executable, __file__, "--child", name, allocator]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        pairs = zip(results["default"], results["tuned"], strict=True)
        ratios = [default["seconds"] / tuned["seconds"] for default, tuned in pairs]
        cells = [
            f"{statistics.median(r['seconds'] for r in found):.3f}, {statistics.median(r['faults'] for r in found):.0f}"
            for found in results.values()
        ]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {cells[0]} | {cells[1]} | {spread} |")


if __name__ == "__main__":
    main()
