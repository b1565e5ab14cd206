"""A training step with the shipped defaults against plain eager float32: ``python benchmarks/training_step.py --help``.

A step is forward, cross-entropy, backward and AdamW at 224x224 on a fixed batch, through ``Classification`` (memory
format, objective, parameter groups). The peer is timm's network of the same name in float32 and default memory format
with torch's AdamW. Each form also trains for some steps on photographs, and the script stops where its losses leave
those of float32 by more than a tolerance. bfloat16 pays on CPUs with AMX or AVX512-BF16 and on GPUs, nowhere else: the
last line says what the machine has.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import torch.nn.functional as F
from _ruler import Measurement, environment, in_own_process, measure, to_markdown
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.optim import AdamW
from torchvision.transforms import v2

from effvit.tasks import Classification

if TYPE_CHECKING:
    from collections.abc import Callable

#: Network and images in a batch, as ``performance.md`` of the project's references measured them.
SUBJECTS = {"efficientvit_m4": 32, "mobilevit_s": 16, "efficientformer_l1": 32}
CLASSES = 10
#: Greatest difference of a step's loss from that of float32, as a share of the first loss.
TOLERANCE = 0.05


def photographs(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Crops of scikit-learn's two photographs: uint8 ``(N, 3, 224, 224)``, and labels by photograph and quarter."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pictures = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    labels = torch.randint(0, CLASSES, (number,), generator=generator)
    crop = v2.RandomResizedCrop(224, scale=(0.1, 0.3), antialias=True)
    return torch.stack([crop(torch.roll(pictures[int(label) % 2], int(label) * 40, 2)) for label in labels]), labels


def ours(task: Classification, images: Tensor, labels: Tensor, *, bf16: bool) -> Callable[[], Tensor]:
    """A step of the task, which returns its loss."""
    task.setup("fit")
    task.train()
    task.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    (optimizer,), _ = task.configure_optimizers()
    batch: Any = (images, {"labels": labels})

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task.training_step(batch, 0)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def peer(name: str, task: Classification, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of timm's network in float32."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, num_classes=CLASSES).train()
    optimizer = AdamW(network.parameters(), lr=1e-3, weight_decay=0.025)
    spec = task.input_spec
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))

    def step() -> Tensor:
        logits = network((images / 255 - mean) / std)
        logits = sum(logits) / len(logits) if isinstance(logits, tuple) else logits
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def forms(name: str, batch: int) -> dict[str, Callable[[], Tensor]]:
    """A step of each form on the same images; ours start from the same weights."""
    images, labels = photographs(batch)
    torch.manual_seed(0)
    categories = {label: str(label) for label in range(CLASSES)}
    plain, last, half = (
        Classification(name, categories, channels_last=channels_last) for channels_last in (False, True, True)
    )
    for task in (last, half):
        task.load_state_dict(copy.deepcopy(plain.state_dict()))
    return {
        "timm eager float32": peer(name, plain, images, labels),
        "ours eager float32": ours(plain, images, labels, bf16=False),
        "channels_last": ours(last, images, labels, bf16=False),
        "channels_last, bfloat16": ours(half, images, labels, bf16=True),
    }


def check_losses(name: str, batch: int, steps: int) -> None:
    """Prints how far the losses of each form are from those of float32; stops where they are too far."""
    curves = {form: torch.stack([step() for _ in range(steps)]) for form, step in forms(name, batch).items()}
    base = curves["ours eager float32"]
    for form in ("channels_last", "channels_last, bfloat16"):
        apart = float((curves[form] - base).abs().max() / base[0])
        print(f"- {name}, {form}: losses of {steps} steps at most {apart:.2%} of the first from float32's")
        if apart > TOLERANCE:
            raise SystemExit(f"the losses of {name} in {form} leave those of float32 by {apart:.1%}")


def time_steps(name: str, batch: int, rounds: int) -> Measurement:
    """Images per CPU second of each form."""
    torch.set_num_threads(1)
    return measure(f"{name}, batch {batch}", forms(name, batch), items=batch, rounds=rounds)


def main() -> None:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="training steps of the comparison of losses")
    parser.add_argument("--json", type=Path, help="also write the measurements there, one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measurements = [in_own_process(time_steps, name, SUBJECTS[name], arguments.rounds) for name in arguments.subjects]
    print(to_markdown(measurements), end="\n\n")
    for name in arguments.subjects:
        check_losses(name, SUBJECTS[name] // 2, arguments.steps)
    fast = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    print(environment(), "bfloat16 in hardware:", ", ".join(fast) or "no")
    if arguments.json:
        arguments.json.write_text("".join(f"{m.to_json()}\n" for m in measurements), encoding="utf-8")


if __name__ == "__main__":
    main()
