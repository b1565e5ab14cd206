"""What `effvit benchmark` measures: networks by name, and what runs have trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from effvit._cli.rebuild import rebuild
from effvit.errors import ConfigError, close_matches

if TYPE_CHECKING:
    import torch
    from torch import nn

    from effvit.deploy.records import Subject
    from effvit.tasks import Detection, Task

#: Heads of segmentation, each with the number of classes of the data set that it is published on: ADE20K, PASCAL VOC.
_SEGMENTERS = {"semantic_fpn": 150, "deeplabv3": 21}
#: What a name can be measured as: a classifier of ImageNet, the feature maps alone, a detector of COCO, or a segmenter.
KINDS = ("classifier", "backbone", "retinanet", "faster_rcnn", "mask_rcnn", "ssdlite", *_SEGMENTERS)
_COCO_CLASSES = 80
_LEAST_SIDE = 32
_MEAN_LOGIT, _LOGIT_DEVIATION = -4.0, 2.0
#: Input of a detector where no size is given: what the published tables count, and SSDLite's own.
_DETECTOR_SIZES = {"ssdlite": (320, 320)}
_DETECTOR_SIZE = (800, 1280)
_SEGMENTER_SIZE = (512, 512)


@dataclass(frozen=True)
class Spec:
    """A network as it is written on the command line: ``name``, ``name@size``, ``name:option=value,…``.

    Attributes:
        text: As it was written.
        name: The backbone.
        size: Height and width in pixels; ``None`` for the published ones.
        options: Options of the backbone's family.
    """

    text: str
    name: str
    size: tuple[int, int] | None
    options: dict[str, Any]


def parse_spec(text: str) -> Spec:
    """Understands one network of the command line.

    Raises:
        ConfigError: The size is no number, or an option has no value.
    """
    rest, _, words = text.partition(":")
    name, at, size = rest.partition("@")
    options = dict(_option(word, text) for word in words.split(",") if word)
    return Spec(text, name, _parse_size(size, text) if at else None, options)


def image_size(numbers: Sequence[int], where: str) -> tuple[int, int]:
    """Height and width in pixels out of a side, or of both.

    Args:
        numbers: One or two.
        where: By what they were given, for the message.

    Raises:
        ConfigError: They are more, or below 32.
    """
    if len(numbers) not in (1, 2) or min(numbers) < _LEAST_SIDE:
        raise ConfigError(
            f"{where}: an image size is a side, or height and width, in pixels, at least {_LEAST_SIDE}, not "
            f"{' '.join(map(str, numbers))}"
        )
    return numbers[0], numbers[-1]


def _parse_size(text: str, whole: str) -> tuple[int, int]:
    sides = text.split("x")
    if not all(side.isdigit() for side in sides):
        raise ConfigError(f"{whole}: the size after @ is a side or HEIGHTxWIDTH in pixels, such as 256 or 800x1216")
    return image_size([int(side) for side in sides], whole)


def _option(word: str, whole: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"{whole}: options are written name=value, such as dynamicvit_small:keep_ratio=0.5")
    return name, yaml.safe_load(value)


def named_subject(spec: Spec, kind: str, size: tuple[int, int] | None) -> Subject:
    """A network with random weights. What it costs does not depend on them, but for a detector's post-processing.

    Args:
        spec: Which one.
        kind: One of `KINDS`.
        size: Height and width in pixels where the spec has none; ``None`` for the published ones.

    Raises:
        ConfigError: There is no such network or option.
    """
    if kind not in KINDS:
        raise ConfigError(f"a network cannot be measured as {kind!r}. {close_matches(kind, KINDS)}")
    size = spec.size or size
    if kind in ("classifier", "backbone"):
        return _plain_subject(spec, kind, size)
    if kind in _SEGMENTERS:
        return _segmenter_subject(spec, kind, size or _SEGMENTER_SIZE)
    return _detector_subject(spec, kind, size or _DETECTOR_SIZES.get(kind, _DETECTOR_SIZE))


def _plain_subject(spec: Spec, kind: str, size: tuple[int, int] | None) -> Subject:
    import torch

    from effvit.backbones import backbone_info, create_backbone, create_classifier
    from effvit.deploy.records import Subject

    torch.manual_seed(0)
    module: nn.Module
    if kind == "classifier":
        classifier = create_classifier(spec.name, **spec.options)
        module, published = classifier, classifier.backbone.input_spec.size
    else:
        module = backbone = create_backbone(spec.name, **spec.options)
        published = backbone.input_spec.size
    as_published = not spec.options and size in (None, published) and kind == "classifier"
    size = size or published
    return Subject(
        name=spec.text,
        module=module.eval(),
        size=size,
        make_inputs=lambda batch: (_noise(batch, size),),
        accuracy=backbone_info(spec.name).top1 if as_published else None,
        accuracy_name="published ImageNet top-1 in percent",
    )


def _noise(batch: int, size: tuple[int, int]) -> torch.Tensor:
    import torch

    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def _detector_subject(spec: Spec, kind: str, size: tuple[int, int]) -> Subject:
    import torch

    from effvit.tasks import Detection

    torch.manual_seed(0)
    classes = _classes(_COCO_CLASSES)
    task = Detection(backbone=spec.name, categories=classes, backbone_options=spec.options or None, detector=kind)
    see_things(task, _noise(1, size))
    return task_subject(f"{kind} {spec.text}", task, size)


def _segmenter_subject(spec: Spec, kind: str, size: tuple[int, int]) -> Subject:
    import torch

    from effvit.tasks import Segmentation

    torch.manual_seed(0)
    classes = _classes(_SEGMENTERS[kind])
    task = Segmentation(backbone=spec.name, categories=classes, backbone_options=spec.options or None, head=kind)
    return task_subject(f"{kind} {spec.text}", task, size)


def _classes(number: int) -> dict[int, str]:
    return {label: f"class {label}" for label in range(1, number + 1)}


def see_things(task: Detection, images: torch.Tensor) -> None:
    """Makes a detector of random weights so sure of some classes that it finds objects.

    As it starts it finds none: there would be nothing to suppress, to paste or to compare. Its class logits are brought
    to a standard deviation of 2 about a mean of -4, with which most places show nothing and some a class.

    Args:
        task: The detector, changed in place.
        images: Normalised images ``(B, 3, H, W)`` like those it shall see: a random network may answer noise and
            photographs with logits of another size, and scores that saturate are equal, in an order of chance.
    """
    import torch

    detector = task.detector.eval()
    with torch.no_grad():
        logits = detector(images)["cls_logits"]
        for name, parameter in detector.named_parameters():
            if not name.startswith(detector.class_parameters) or "bbox" in name or "mask" in name:
                continue
            if name.endswith("bias"):
                parameter.fill_(_MEAN_LOGIT)
            else:
                parameter.mul_(_LOGIT_DEVIATION / logits.std())


def checkpoint_subject(source: str, size: tuple[int, int] | None) -> Subject:
    """What a run has trained, at the size that `effvit export` gives a file, named by its folder and its file.

    Args:
        source: A checkpoint of a run, or the run's folder.
        size: Height and width of its images in pixels; ``None`` for those that its data gave it.

    Raises:
        CheckpointError: It cannot be opened.
    """
    from effvit._cli.exported_inputs import canvas_of

    run = rebuild(source, "benchmark")
    canvas = canvas_of(run.task.deployable().task, run.inputs, size)
    return replace(
        task_subject(_run_name(run.path), run.task, canvas),
        accuracy=None if run.score is None else 100 * run.score,
        accuracy_name=f"{run.task.monitor} of the run in percent",
    )


def _run_name(path: Path) -> str:
    """``finetune/best`` of ``runs/finetune/best.ckpt``."""
    return f"{path.resolve().parent.name}/{path.stem}"


def task_subject(name: str, task: Task, size: tuple[int, int]) -> Subject:
    """A task's network with all that a file of it would hold: normalisation before, post-processing behind it.

    Args:
        name: What tables call it.
        task: A task of any kind.
        size: Height and width of its images in pixels.
    """
    from effvit.deploy.records import Subject

    module = task.deployable().eval()
    return Subject(
        name=name,
        module=module,
        size=size,
        make_inputs=lambda batch: module.example_inputs(batch, size),
        parts=module.parts,
    )
