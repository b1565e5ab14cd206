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
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from effvit.datamodules._augment_ops import brightness, color, contrast, hue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from effvit.datamodules._augment_ops import Pixels

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


class AlignResize(KeepRatioResize):
    """Resizes as large as ``scale`` allows, and then both sides up to a multiple of a divisor; see `_Resize`.

    What the published Semantic FPN of EfficientFormer is tested with (``AlignResize`` of snap-research/EfficientFormer,
    ``segmentation/``): instead of padding, the image is resized a second time, by less than the divisor.

    Args:
        scale: Limits of the long and the short side in pixels.
        jitter: Range of a random factor on the size; ``(1, 1)`` for none.
        divisor: Height and width become multiples of this.
    """

    def __init__(self, scale: tuple[int, int], jitter: tuple[float, float] = (1.0, 1.0), divisor: int = 32) -> None:
        super().__init__(scale, jitter)
        self.divisor = divisor

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the size that keeps the ratio, and rounds it up."""
        kept = super().make_params(flat_inputs)["size"]
        return {"kept": kept, "size": tuple(-(-side // self.divisor) * self.divisor for side in kept)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes an image twice, as published, and boxes once."""
        if isinstance(inpt, tv_tensors.Image):
            inpt = super().transform(inpt, {"size": params["kept"]})
        return super().transform(inpt, params)


class IoUCrop(v2.RandomIoUCrop):  # type: ignore[misc]
    """SSD's crop: in five cases of six, a part of the image that overlaps an object by 0.1, 0.3, 0.5, 0.7 or 0.9.

    Each side is 0.3 to 1 of the image's, and neither more than twice the other. Of 40 such windows, the first is taken
    in which an object has its centre, and whose IoU with any object is high enough; if none is, the draw is repeated,
    the overlap too. Objects with their centre outside go, and so do those of which less than a pixel is left; the
    others are cut at the border. Images without objects stay whole.

    apple/ml-cvnets has two more overlaps: 0.0, its name for the whole image, here 1.0 as in torchvision, and 1.0, which
    no window reaches. The 40 windows are drawn at once, which takes a tenth of the time of torchvision's loop.
    """

    _SMALLEST = 4  # pixels, of which a share of 0.3 has at least one

    def __init__(self) -> None:
        super().__init__(sampler_options=[0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
        self._clamp = v2.ClampBoundingBoxes()
        self._sanitize = v2.SanitizeBoundingBoxes()

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the crop; an empty dictionary leaves the image whole."""
        boxes = next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes))
        height, width = boxes.canvas_size
        corners = boxes.as_subclass(torch.Tensor)
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        while len(boxes) and min(height, width) >= self._SMALLEST:
            least = self.options[int(torch.randint(len(self.options), ()))]
            if least >= 1:
                break
            windows = self._draw_windows(height, width)
            inside = ((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:])).all(dim=-1)
            good = inside.any(dim=1) & (box_iou(windows, corners).amax(dim=1) >= least)
            for first in good.nonzero()[:1, 0].tolist():
                left, top, right, bottom = map(int, windows[first].tolist())
                size = {"height": bottom - top, "width": right - left}
                return {"top": top, "left": left, **size, "is_within_crop_area": inside[first]}
        return {}

    def _draw_windows(self, height: int, width: int) -> torch.Tensor:
        """Windows ``(N, 4)``, xyxy in whole pixels, of those drawn that are neither too long nor too tall."""
        shares, places = torch.rand(2, self.trials, 2)
        canvas = torch.tensor([width, height])
        sides = (canvas * (self.min_scale + (self.max_scale - self.min_scale) * shares)).floor()
        corners = ((canvas - sides) * places).floor()
        ratios = sides[:, 1] / sides[:, 0]
        allowed = (ratios >= self.min_aspect_ratio) & (ratios <= self.max_aspect_ratio)
        return torch.cat([corners, corners + sides], dim=1)[allowed]

    def forward(self, *inputs: Any) -> Any:
        """A sample with ``labels`` to the same, of another size."""
        return self._sanitize(super().forward(self._clamp(*inputs)))


class PhotometricDistort(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """SSD's distortion of colours: brightness, contrast, saturation, hue and order of the channels, each in one of two.

    torchvision's ranges, which are ml-cvnets' too, with Pillow's arithmetic, which ml-cvnets uses as well, at OpenCV's
    speed: a ninth of the time of torchvision's kernels on an image of COCO.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Distorts an image; leaves everything else alone."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = inpt.as_subclass(torch.Tensor).permute(1, 2, 0).contiguous().numpy()
        for operation, name in self._operations(params["contrast_before"]):
            if params[name] is not None:
                pixels = operation(pixels, params[name])
        order = params["channel_permutation"]
        if order is not None:
            pixels = pixels[..., order.numpy()]
        return tv_tensors.wrap(torch.from_numpy(pixels).permute(2, 0, 1), like=inpt)

    @staticmethod
    def _operations(contrast_before: bool) -> list[tuple[Callable[[Pixels, float], Pixels], str]]:
        """What is done in which order, and the parameter of each."""
        steps: list[tuple[Callable[[Pixels, float], Pixels], str]] = [
            (brightness, "brightness_factor"),
            (color, "saturation_factor"),
            (hue, "hue_factor"),
        ]
        steps.insert(1 if contrast_before else len(steps), (contrast, "contrast_factor"))
        return steps


#: How images are brought to the size of the network, and how training images are augmented, by name.
RESIZES: dict[str, type[_Resize]] = {"keep_ratio": KeepRatioResize, "align": AlignResize, "squash": SquashResize}
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
        return v2.Compose([IoUCrop(), PhotometricDistort(), flipped, resized])
    return v2.Compose([resized, flipped])


def eval_transform(scale: tuple[int, int], resize: str = "keep_ratio", divisor: int = 32) -> v2.Transform:
    """Resize alone.

    Args:
        scale: What `resize` takes.
        resize: A name of ``RESIZES``.
        divisor: What "align" rounds both sides up to.
    """
    return AlignResize(scale, divisor=divisor) if resize == "align" else RESIZES[resize](scale)


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
