"""Images as an exported network takes them, resized as the data of its run does: all on one canvas, or on any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from effvit.datamodules import ClassifiedFiles, ImageFiles
from effvit.datamodules._image_samples import NetworkInput
from effvit.datamodules._samples import PlainImages
from effvit.datamodules.transforms import AlignResize, Collate, KeepRatioResize
from effvit.errors import ConfigError

Size = tuple[int, int]
#: Height and width of a network's images, or the sides that they may have.
Canvas = Size | range
#: What a network takes beside images, by task: entries of their targets.
_SIZES = {"detection": ("size", "original_size"), "segmentation": ("size",)}
#: The least side that every network takes.
_LEAST = 32


def canvas_of(task: str, inputs: Mapping[str, Any], asked: Size | None) -> Size:
    """Height and width of the images that an exported network takes.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        inputs: How the data of the run makes images, see `launch.INPUT_SETTINGS`.
        asked: What the user wants; ``None`` for what follows from the data: the size of a classifier's images, the
            ``image_size`` where images are squashed, otherwise a square that holds images of either orientation; of
            segmentation at most twice the short side, as recipes write (2048, 512) for a long side of any length.

    Raises:
        ConfigError: The size is too small, no multiple of what images are padded to, or of a classifier not square.
    """
    if task == "classification":
        side = NetworkInput.of(inputs.get("image_size"), inputs.get("published")).size
        canvas = asked or (side, side)
        if canvas[0] != canvas[1]:
            raise ConfigError(f"a classifier looks at square images: --image_size {canvas[0]} {canvas[0]}, for example")
        divisor = 1
    else:
        divisor = int(inputs["pad_divisor"])
        canvas = asked or _own_canvas(task, inputs, divisor)
    if min(canvas) < _LEAST or any(side % divisor for side in canvas):
        raise ConfigError(
            f"--image_size needs a height and a width of at least {_LEAST}"
            + (f", multiples of {divisor}, as in the run" if divisor > 1 else "")
            + f", not {canvas[0]} {canvas[1]}"
        )
    return canvas


def open_canvas(task: str, inputs: Mapping[str, Any], sides: range) -> range:
    """The sides that images of an exported network may have.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        inputs: How the data of the run makes images.
        sides: What the network takes, in pixels.

    Raises:
        ConfigError: A classifier's own images have another side, so that it could not be used as its checkpoint is.
    """
    if task == "classification":
        side = NetworkInput.of(inputs.get("image_size"), inputs.get("published")).size
        if side not in sides:
            raise ConfigError(
                f"the run has images of {side} pixels, and a file for images of any size takes multiples of "
                f"{sides.step} from {sides[0]} to {sides[-1]}: leave --image_size any out"
            )
    return sides


def _own_canvas(task: str, inputs: Mapping[str, Any], divisor: int) -> Size:
    """What follows from the data."""
    first, second = inputs["image_size"]
    if inputs.get("resize") == "squash":
        sides = second, first
    else:
        long, short = max(first, second), min(first, second)
        sides = (min(long, 2 * short) if task == "segmentation" else long,) * 2
    height, width = (-(-side // divisor) * divisor for side in sides)
    return height, width


def preprocessing_of(task: str, inputs: Mapping[str, Any], canvas: Canvas) -> dict[str, Any]:
    """How files become images on a canvas, as the options of a data module: it travels with the exported network.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        inputs: How the data of the run makes images.
        canvas: See `canvas_of` and `open_canvas`.
    """
    if task == "classification":
        side = NetworkInput.of(inputs.get("image_size"), inputs.get("published")).size
        return {"image_size": side if isinstance(canvas, range) else canvas[0], "published": inputs.get("published")}
    resize = inputs.get("resize", "keep_ratio")
    size = list(inputs["image_size"])
    if isinstance(canvas, range):
        return {"image_size": size, "resize": resize, "pad_divisor": int(inputs["pad_divisor"])}
    if resize == "squash" and canvas != _own_canvas(task, inputs, int(inputs["pad_divisor"])):
        size = [canvas[1], canvas[0]]
    return {"image_size": size, "resize": resize, "pad_divisor": int(inputs["pad_divisor"])}


def files_for(
    task: str,
    preprocessing: Mapping[str, Any],
    canvas: Canvas,
    images: str,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    unreadable: Literal["error", "skip"] = "error",
) -> LightningDataModule:
    """Data to predict on with an exported network.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        preprocessing: See `preprocessing_of`.
        canvas: Height and width of the network's images, or the sides that they may have.
        images: A file or a folder.
        batch_size: Images in a batch.
        num_workers: Processes that load images.
        unreadable: What to do about a file that cannot be read, see ``ImageFiles``.
    """
    if task == "classification":
        return ClassifiedFiles(
            images,
            batch_size=batch_size,
            num_workers=num_workers,
            image_size=preprocessing["image_size"],
            published=preprocessing["published"],
            unreadable=unreadable,
        )
    first, second = preprocessing["image_size"]
    data = CanvasFiles(
        images,
        batch_size=batch_size,
        num_workers=num_workers,
        image_size=(first, second),
        resize=preprocessing["resize"],
        pad_divisor=preprocessing["pad_divisor"],
        unreadable=unreadable,
    )
    data.canvas = _largest(canvas)
    return data


class CanvasFiles(ImageFiles):
    """As ``ImageFiles``, but no image is larger than a canvas: one that would be is made smaller, keeping its ratio.

    Attributes:
        canvas: Height and width in pixels; ``None`` for no limit.
    """

    canvas: Size | None = None

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches ``(images, targets)``."""
        if self.canvas is None or self.resize == "squash":
            return super().predict_dataloader()
        if self.resize == "align":
            resize: KeepRatioResize = _FitAlign(self.image_size, self.canvas, self.pad_divisor)
        else:
            resize = _FitResize(self.image_size, self.canvas)
        dataset = PlainImages(self.files, self.names, resize)
        return self._loader(dataset, Collate(self.pad_divisor))


class _FitResize(KeepRatioResize):
    def __init__(self, scale: Size, canvas: Size) -> None:
        super().__init__(scale)
        self.canvas = canvas

    def new_size(self, height: int, width: int, scale: Size) -> Size:
        return fitted(*super().new_size(height, width, scale), self.canvas)


class _FitAlign(AlignResize):
    """Sides are brought up to a multiple of the divisor last; those of a canvas are such multiples."""

    def __init__(self, scale: Size, canvas: Size, divisor: int) -> None:
        super().__init__(scale, divisor=divisor)
        self.canvas = canvas

    def new_size(self, height: int, width: int, scale: Size) -> Size:
        return fitted(*super().new_size(height, width, scale), self.canvas)


def fitted(height: int, width: int, canvas: Size) -> Size:
    """The size of an image, or that of the largest of its ratio that a canvas holds."""
    factor = min(canvas[0] / height, canvas[1] / width, 1.0)
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _largest(canvas: Canvas) -> Size:
    return (canvas[-1], canvas[-1]) if isinstance(canvas, range) else canvas


def _holding(height: int, width: int, canvas: Canvas) -> Size:
    """The smallest height and width of a network's images that hold an image."""
    if not isinstance(canvas, range):
        return canvas
    rows, columns = (max(-(-(side - canvas.start) // canvas.step), 0) for side in (height, width))
    return canvas[rows], canvas[columns]


def network_inputs(task: str, batch: Any, canvas: Canvas) -> tuple[Tensor, ...]:
    """What an exported network takes for a batch of a data module.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        batch: Images ``(B, 3, H, W)``, uint8, no larger than the canvas, and their targets.
        canvas: Height and width of the network's images, or the sides that they may have.

    Returns:
        The images; of detection and segmentation padded with 0 at the bottom and at the right, with their sizes before
        padding, and of detection those before resizing.
    """
    images, targets = batch
    if task == "classification":
        return (images.contiguous(),)
    height, width = _holding(images.shape[2], images.shape[3], canvas)
    images = functional.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
    sizes = [torch.tensor([list(target[name]) for target in targets]) for name in _SIZES[task]]
    return images.contiguous(), *sizes


def samples_of(task: str, batches: Iterable[Any], canvas: Canvas, most: int) -> Iterator[tuple[Tensor, ...]]:
    """Single images of a loader as an exported network takes them, the first ones.

    Args:
        task: ``classification``, ``detection`` or ``segmentation``.
        batches: Of a data module.
        canvas: Height and width of the network's images, or the sides that they may have; larger ones are made smaller.
        most: How many.
    """
    taken = 0
    for images, targets in batches:
        for index in range(min(len(images), most - taken)):
            image = images[index : index + 1]
            own = (image, targets)
            if task != "classification":
                own = _one(image, targets[index], _largest(canvas))
            yield network_inputs(task, own, canvas)
            taken += 1
        if taken >= most:
            return


def _one(image: Tensor, target: Mapping[str, Any], canvas: Size) -> tuple[Tensor, list[dict[str, Any]]]:
    """One image without its padding, no larger than the canvas."""
    height, width = target["size"]
    size = fitted(height, width, canvas)
    image = image[..., :height, :width]
    if size != (height, width):
        image = F.resize(image, list(size), antialias=True)
    return image, [{"size": size, "original_size": target["original_size"]}]
