"""Transforms of images and boxes, as torchvision v2 transforms on tv_tensors, and the collation of a batch.

A sample is a dictionary with ``image`` (``tv_tensors.Image``, uint8), ``boxes`` (``tv_tensors.BoundingBoxes``, XYXY)
with their ``labels`` and, where asked for, ``masks`` (``tv_tensors.Mask``). Images stay uint8 up to the device, which
normalises batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

Sample = dict[str, Any]
Target = dict[str, Any]


def keep_ratio_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Size of an image that is resized as large as it can be within ``scale``, keeping its ratio.

    The rule and its rounding are MMDetection's (``mmcv.rescale_size``).

    Args:
        height: Height in pixels.
        width: Width in pixels.
        scale: Limits of the long and the short side in pixels, in either order.

    Returns:
        New height and width.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


class _Resize(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """Resizes image and boxes, and clips the boxes to the image; subclasses say to which size.

    Bilinear without antialiasing on uint8, which is OpenCV's ``INTER_LINEAR`` bit for bit: the published recipes were
    trained with it. Masks keep the size of their file: a detector that needs them crops a small window around each
    object, so that enlarging whole masks would be waste (measured in ``benchmarks/README.md``).

    Args:
        scale: Limits of the long and the short side in pixels, or width and height.
        jitter: Range of a random factor on the size; ``(1, 1)`` for none.
    """

    def __init__(self, scale: tuple[int, int], jitter: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.scale = scale
        self.jitter = jitter

    def new_size(self, height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
        """Height and width to which an image of `height` and `width` is resized."""
        raise NotImplementedError

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the new size of the image among ``flat_inputs``."""
        height, width = next(tuple(x.shape[-2:]) for x in flat_inputs if isinstance(x, tv_tensors.Image))
        low, high = self.jitter
        factor = low if low == high else float(torch.empty(()).uniform_(low, high))
        scale = (max(round(self.scale[0] * factor), 1), max(round(self.scale[1] * factor), 1))
        return {"size": self.new_size(height, width, scale)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes an image or boxes; leaves everything else alone."""
        height, width = params["size"]
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return F.clamp_bounding_boxes(F.resize(inpt, [height, width]))
        if not isinstance(inpt, tv_tensors.Image) or inpt.shape[-2:] == (height, width):
            return inpt
        pixels = inpt.as_subclass(torch.Tensor).permute(1, 2, 0).contiguous().numpy()
        resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        return tv_tensors.wrap(torch.from_numpy(resized).permute(2, 0, 1), like=inpt)


class KeepRatioResize(_Resize):
    """Resizes as large as ``scale`` allows, the limits of the long and the short side; see `_Resize`."""

    def new_size(self, height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
        """As `keep_ratio_size`."""
        return keep_ratio_size(height, width, scale)


class SquashResize(_Resize):
    """Resizes to exactly ``scale``, width and height, whatever the ratio; see `_Resize`."""

    def new_size(self, height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
        """`scale` itself, as height and width."""
        del height, width
        return scale[1], scale[0]


class IoUCrop(v2.RandomIoUCrop):  # type: ignore[misc]
    """SSD's crop: in five cases of six, a part of the image that overlaps an object by 0.1, 0.3, 0.5, 0.7 or 0.9.

    Sides are 0.3 to 1 of the image's, and the ratio of the two shares is 0.5 to 2. Objects with their centre outside
    go, and so do those of which less than a pixel is left; the others are cut at the border. Images without objects
    stay whole. apple/ml-cvnets also offers 0.0, which is its name for the whole image, and 1.0, which no crop reaches.
    """

    _SMALLEST = 4  # pixels, of which a crop of 0.3 has at least one

    def __init__(self) -> None:
        super().__init__(sampler_options=[0.1, 0.3, 0.5, 0.7, 0.9, 1.0])  # 1.0 is torchvision's name for the whole
        self._clamp = v2.ClampBoundingBoxes()
        self._sanitize = v2.SanitizeBoundingBoxes()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the crop; an empty dictionary leaves the image whole."""
        boxes = next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes))
        if not len(boxes) or min(boxes.canvas_size) < self._SMALLEST:
            return {}
        params: dict[str, Any] = super().make_params(flat_inputs)
        return params

    def forward(self, *inputs: Any) -> Any:
        """A sample with ``labels`` to the same, of another size."""
        return self._sanitize(super().forward(self._clamp(*inputs)))


#: How images are brought to the size of the network, and how training images are augmented, by name.
RESIZES: dict[str, type[_Resize]] = {"keep_ratio": KeepRatioResize, "squash": SquashResize}
AUGMENTATIONS = ("flip", "ssd")


def train_transform(
    scale: tuple[int, int],
    flip: float,
    jitter: tuple[float, float],
    resize: str = "keep_ratio",
    augmentation: str = "flip",
) -> v2.Transform:
    """The augmentation of a published recipe.

    "flip" is MMDetection's for EfficientViT and EfficientFormer: resize and horizontal flip. "ssd" is that of MobileViT
    (apple/ml-cvnets ``data/datasets/detection/coco_ssd.py``): crop, photometric distortion, horizontal flip, resize.

    Args:
        scale: What `resize` takes.
        flip: Probability of a horizontal flip.
        jitter: Range of a random factor on the size.
        resize: A name of ``RESIZES``.
        augmentation: One of ``AUGMENTATIONS``.
    """
    resized, flipped = RESIZES[resize](scale, jitter), v2.RandomHorizontalFlip(flip)
    if augmentation == "ssd":
        return v2.Compose([IoUCrop(), v2.RandomPhotometricDistort(), flipped, resized])
    return v2.Compose([resized, flipped])


def eval_transform(scale: tuple[int, int], resize: str = "keep_ratio") -> v2.Transform:
    """Resize alone.

    Args:
        scale: What `resize` takes.
        resize: A name of ``RESIZES``.
    """
    return RESIZES[resize](scale)


class Collate:
    """Puts samples into one uint8 batch.

    Images go to the top left of a common size, the largest height and width rounded up to ``divisor``; the rest is 0.
    The batch has the shape ``(B, 3, H, W)`` in channels_last memory: decoders and resizers give ``(H, W, 3)``, so that
    rows are copied whole, and channels_last is what convolutions want.

    Args:
        divisor: Height and width of the batch are multiples of this.
    """

    def __init__(self, divisor: int = 32) -> None:
        self.divisor = divisor

    def __call__(self, samples: Sequence[tuple[torch.Tensor, Target]]) -> tuple[torch.Tensor, list[Target]]:
        """Batches ``(image, target)`` pairs into images ``(B, 3, H, W)`` and the list of targets."""
        images = [image.as_subclass(torch.Tensor).permute(1, 2, 0) for image, _ in samples]
        height, width = (
            -(-max(image.shape[axis] for image in images) // self.divisor) * self.divisor for axis in (0, 1)
        )
        batch = torch.zeros((len(images), height, width, 3), dtype=torch.uint8)
        for row, image in zip(batch, images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image
        return batch.permute(0, 3, 1, 2), [target for _, target in samples]
