"""Our backbones against timm's, with the same weights and equal outputs: ``python benchmarks/backbones.py --help``."""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from _official_efficientformer import OfficialEfficientFormer
from _official_efficientformer import check_equal as check_equal_to_official
from _ruler import Measurement, environment, in_own_process, measure, peak_memory, to_markdown
from torch import Tensor, nn

from effvit.backbones import Classifier, create_backbone, create_classifier, list_backbones

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-4
PEER, OURS, PEER_FUSED, FUSED = "timm eager", "ours", "timm fused cl", "ours fused cl"
VARIANTS = (PEER, OURS, PEER_FUSED, FUSED)
# timm's EfficientFormer takes 224x224 alone; at other sizes the authors' own detection backbone is the peer.
OFFICIAL = "official eager"
OFFICIAL_VARIANTS = (OFFICIAL, OURS, FUSED)
MODELS = [
    *list_backbones("efficientvit_*"),
    "efficientformer_l1",
    "efficientformer_l3",
    "efficientformerv2_s0",
    "efficientformerv2_s1",
    *list_backbones("mobilevit_*"),
    "mobilevitv2_050",
    "mobilevitv2_100",
]
DETECTION = ["efficientvit_m4", "efficientformer_l1", "efficientformerv2_s0", "mobilevit_s", "mobilevitv2_100"]


def networks(
    name: str, variants: tuple[str, ...] = VARIANTS, size: tuple[int, int] = (224, 224)
) -> dict[str, nn.Module]:
    """The named forms of one network, same random weights in all.

    Args:
        name: What timm and we both call it.
        variants: The forms wanted.
        size: Height and width of the images, which some of timm's networks must be built for.
    """
    torch.manual_seed(0)
    source = peer = randomised(timm.create_model(name)).eval()
    if options := timm_options(name, size):
        # Its bias tables are of that size then. All else is the same, or one would meet more denormal numbers.
        peer = timm.create_model(name, **options).eval()
        shapes = {key: value.shape for key, value in peer.state_dict().items()}
        same = {key: value for key, value in source.state_dict().items() if value.shape == shapes[key]}
        peer.load_state_dict(same, strict=False)
    make: dict[str, Callable[[], nn.Module]] = {
        PEER: lambda: peer,
        OURS: lambda: with_weights_of(source, name),
        PEER_FUSED: lambda: timm.utils.reparameterize_model(copy.deepcopy(peer)).to(memory_format=torch.channels_last),
        FUSED: lambda: with_weights_of(source, name).fuse(),
    }
    return {variant: make[variant]() for variant in variants}


def timm_options(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """What timm needs to be told for images of another size than the published one."""
    return {"img_size": size} if name.startswith("efficientformerv2") and size != (224, 224) else {}


def randomised(network: nn.Module) -> nn.Module:
    """The network with BatchNorm and LayerScale away from their neutral start: folding then has something to fold."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.2, 0.7)
    return network


def with_weights_of(peer: nn.Module, name: str) -> Classifier:
    """Our network with timm's weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(peer.state_dict(), path)
        return create_classifier(name, pretrained=path).eval()


def maps(model: nn.Module) -> nn.Module:
    """The part of a classifier that a detector runs."""
    return model.backbone if hasattr(model, "backbone") else _Trunk(model)


class _Trunk(nn.Module):
    """timm's feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.model.forward_intermediates(images, intermediates_only=True)
        return features


def images_for(variant: str, batch: int, size: tuple[int, int]) -> Tensor:
    """Random images in the memory format that the variant is meant to be fed."""
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last) if variant.endswith("cl") else images


def check_equal(models: dict[str, nn.Module]) -> None:
    """Stops the benchmark unless all forms give the same logits."""
    images = images_for(PEER, 2, (224, 224))
    expected = models[PEER](images)
    for variant, model in models.items():
        error = ((model(images) - expected).abs().max() / expected.abs().max()).item()
        if error > TOLERANCE:
            raise SystemExit(f"{variant} differs from timm by {error:.1e} of the largest logit")


def classify(name: str, batch: int, rounds: int) -> Measurement:
    """Logits of 224x224 images."""
    _settle()
    models = networks(name)
    check_equal(models)
    calls = {variant: _call(model, images_for(variant, batch, (224, 224))) for variant, model in models.items()}
    return measure(f"{name}, batch {batch}", calls, items=batch, rounds=rounds)


def dense_variants(name: str) -> tuple[str, ...]:
    """The forms of a backbone that are compared at detection size."""
    return OFFICIAL_VARIANTS if name.startswith("efficientformer_") else VARIANTS


def dense_networks(name: str, variants: tuple[str, ...], size: tuple[int, int]) -> dict[str, nn.Module]:
    """The named forms of a backbone that gives feature maps."""
    if OFFICIAL not in dense_variants(name):
        return {variant: maps(model) for variant, model in networks(name, variants, size).items()}
    torch.manual_seed(0)
    ours = randomised(create_backbone(name, official_grid=25)).eval()
    for parameter_name, parameter in ours.named_parameters():
        if "attention_bias" in parameter_name:
            nn.init.normal_(parameter)
    make: dict[str, Callable[[], nn.Module]] = {
        OFFICIAL: lambda: OfficialEfficientFormer(ours),
        OURS: lambda: ours,
        FUSED: lambda: copy.deepcopy(ours).fuse(),
    }
    return {variant: make[variant]() for variant in variants}


def detect(name: str, size: tuple[int, int], rounds: int) -> Measurement:
    """Feature maps of one image of detection size."""
    _settle()
    models = dense_networks(name, dense_variants(name), size)
    if OFFICIAL in models:
        check_equal_to_official(models[OURS], images_for(OURS, 1, size))
    calls = {variant: _call(model, images_for(variant, 1, size)) for variant, model in models.items()}
    return measure(f"{name}, {size[0]}x{size[1]}", calls, rounds=rounds)


def _settle() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def _call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images)


def make_detect(name: str, variant: str, size: tuple[int, int]) -> Callable[[], object]:
    """For ``peak_memory``: builds only what the variant needs."""
    _settle()
    model = dense_networks(name, (variant,), size)[variant]
    images = images_for(variant, 1, size)
    gc.collect()
    return _call(model, images)


def main() -> None:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--batch", nargs="*", type=int, default=[16, 1])
    parser.add_argument("--detection", nargs="*", default=DETECTION, help="measured at --size too")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1216), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--memory", action="store_true", help="also the peak memory at --size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the measurements there, one JSON object a line")
    arguments = parser.parse_args()
    _settle()
    size = (arguments.size[0], arguments.size[1])
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    rows: list[tuple[Callable[..., Measurement], str, Any]] = [
        (classify, name, batch) for batch in arguments.batch for name in arguments.models
    ]
    rows += [(detect, name, size) for name in arguments.detection]
    measurements: list[Measurement] = []
    for row in rows:
        measurements.append(in_own_process(*row, arguments.rounds))
        print(f"{len(measurements)} of {len(rows)}: {measurements[-1].title}", file=sys.stderr, flush=True)
    for baseline in (PEER, OFFICIAL):
        table = [measurement for measurement in measurements if measurement.results[0].name == baseline]
        if table:
            print(to_markdown(table), end="\n\n")
    for name in arguments.detection if arguments.memory else []:
        for variant in dense_variants(name):
            peak = peak_memory(make_detect, name, variant, size)
            print(f"peak memory, {name} at {size[0]}x{size[1]}, {variant}: {peak:.0f} MB", flush=True)
    if arguments.json:
        arguments.json.write_text("".join(f"{m.to_json()}\n" for m in measurements), encoding="utf-8")


if __name__ == "__main__":
    main()
