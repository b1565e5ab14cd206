"""Label maps of images: whole or in windows, mirrored and at several sizes, without large maps of all classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.errors import ConfigError, did_you_mean

Size = tuple[int, int]

#: Logits ``(B, K, h, w)`` of normalised images ``(B, 3, H, W)``.
Network = Callable[[Tensor], Tensor]

#: Where the network gave no finite number.
NO_CLASS = -1

_MODES = ("whole", "slide")
_DIVISOR = 32  # of images at other sizes, as the data pads those at its own
_CHUNK = 2**24  # pixels times classes that are enlarged at once: 64 MiB


class _Part(NamedTuple):
    """Logits of one window.

    Attributes:
        top: Position of the window, in pixels.
        left: Likewise.
        size: Height and width of the window, in pixels.
        padded: The same with the padding that the network has seen.
        logits: ``(K, h, w)``, coarser than the window, of all of it.
    """

    top: int
    left: int
    size: Size
    padded: Size
    logits: Tensor


@dataclass(frozen=True)
class _View:
    """What the network says of one image, seen in one way, at its own coarse resolution.

    Attributes:
        size: Height and width of the image as it was seen, in pixels, without padding.
        parts: Windows that cover it, padding included.
        mirrored: Whether it was seen mirrored.
        align_corners: How logits are enlarged.
    """

    size: Size
    parts: list[_Part]
    mirrored: bool
    align_corners: bool

    @property
    def num_classes(self) -> int:
        return len(self.parts[0].logits)

    def is_finite(self) -> bool:
        return all(bool(part.logits.isfinite().all()) for part in self.parts)

    def logits(self, classes: slice, size: Size) -> Tensor:
        """Logits of some classes at a given size, float32 ``(c, *size)``: enlarged to the pixels, cut, then resized.

        These are mmsegmentation's two steps (``EncoderDecoder.whole_inference`` and ``slide_inference``); where
        windows overlap the mean of their logits is taken.
        """
        height, width = self.size
        if len(self.parts) == 1:
            pixels = self._enlarge(self.parts[0].logits[classes], self.parts[0].padded)[:, :height, :width]
        else:
            pixels = self._mean(classes)
        if self.mirrored:
            pixels = pixels.flip(-1)
        return pixels if size == self.size else self._enlarge(pixels, size)

    def _mean(self, classes: slice) -> Tensor:
        some = self.parts[0].logits[classes]
        total = torch.zeros(len(some), *self.size, dtype=torch.float32, device=some.device)
        count = torch.zeros(self.size, dtype=torch.float32, device=some.device)
        for top, left, (height, width), padded, logits in self.parts:
            rows, columns = slice(top, top + height), slice(left, left + width)
            total[:, rows, columns] += self._enlarge(logits[classes], padded)[:, :height, :width]
            count[rows, columns] += 1
        return total.div_(count)

    def _enlarge(self, logits: Tensor, size: Size) -> Tensor:
        return F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=self.align_corners)[0]


@dataclass(frozen=True)
class Inference:
    """How label maps are made from a segmenter.

    Several views of an image, mirrored or at other sizes, are averaged over their probabilities at the original size,
    as mmsegmentation's ``aug_test``. It resizes the file for each size; here the image that the data has resized is
    resized once more.

    Args:
        mode: ``whole`` images at once, or windows that ``slide`` over each.
        window: Height and width of a window, in pixels.
        stride: Distance of two windows, down and across. The last window is moved back into the image.
        flip: Also the mirrored image.
        scales: Sizes at which an image is seen, as factors.

    Raises:
        ConfigError: A value out of its range.
    """

    mode: str = "whole"
    window: Size = (512, 512)
    stride: Size = (341, 341)
    flip: bool = False
    scales: Sequence[float] = field(default=(1.0,))

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"inference must be whole or slide, not {self.mode!r}. {did_you_mean(self.mode, _MODES)}")
        if self.mode == "slide":
            self._check_windows()
        if not self.scales or not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise ConfigError(f"test_scales must be one or more positive factors, not {list(self.scales)}")

    def _check_windows(self) -> None:
        if min(self.window) < 32:
            raise ConfigError(f"window must be 32 pixels or more in height and width, not {tuple(self.window)}")
        if not all(1 <= step <= side for step, side in zip(self.stride, self.window, strict=True)):
            raise ConfigError(
                f"window_stride must be 1 or more and at most the window {tuple(self.window)}, or pixels between two "
                f"windows get no label, not {tuple(self.stride)}"
            )

    def label(
        self,
        network: Network,
        images: Tensor,
        sizes: Sequence[Size],
        original_sizes: Sequence[Size],
        *,
        align_corners: bool,
    ) -> list[Tensor]:
        """Label maps of a batch.

        Args:
            network: Logits ``(B, K, h, w)`` of normalised images ``(B, 3, H, W)``.
            images: Normalised images ``(B, 3, H, W)``, padded with zeros at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            original_sizes: ``(height, width)`` of each file, which the label maps get.
            align_corners: How logits are enlarged, see ``torch.nn.functional.interpolate``.

        Returns:
            int16 ``(h0, w0)`` of each image on the device of the logits; -1 where no number was finite.
        """
        views: list[list[_View]] = [[] for _ in sizes]
        for scaled, scaled_sizes, mirrored in self._seen(images, sizes):
            parts = self._parts(network, scaled, scaled_sizes)
            for mine, size, of_image in zip(views, scaled_sizes, parts, strict=True):
                mine.append(_View(size, of_image, mirrored, align_corners))
        return [best_labels(mine, size) for mine, size in zip(views, original_sizes, strict=True)]

    def _seen(self, images: Tensor, sizes: Sequence[Size]) -> Iterator[tuple[Tensor, list[Size], bool]]:
        """The batch in each of its views: images, their sizes, and whether they are mirrored."""
        for scale in self.scales:
            scaled, scaled_sizes = (images, list(sizes)) if scale == 1 else _rescaled(images, sizes, scale)
            yield scaled, scaled_sizes, False
            if self.flip:
                yield _mirrored(scaled, scaled_sizes), scaled_sizes, True

    def _parts(self, network: Network, images: Tensor, sizes: Sequence[Size]) -> list[list[_Part]]:
        """Logits of each image, in one window or in many."""
        if self.mode == "whole":
            padded = (images.shape[-2], images.shape[-1])
            return [[_Part(0, 0, padded, padded, logits)] for logits in network(images)]
        found = []
        for image, (height, width) in zip(images, sizes, strict=True):
            parts = []
            for top, left in self.windows((height, width)):
                size = (min(self.window[0], height), min(self.window[1], width))
                crop = image[:, top : top + size[0], left : left + size[1]].unsqueeze(0)
                height_padded, width_padded = padded = _padded(size)
                # Cells of a map are as far apart as the network's stride: without padding they would be squeezed.
                crop = F.pad(crop, (0, width_padded - size[1], 0, height_padded - size[0]))
                parts.append(_Part(top, left, size, padded, network(crop)[0]))
            found.append(parts)
        return found

    def windows(self, size: Size) -> list[tuple[int, int]]:
        """Top left corners of the windows over an image of a size, row by row, as mmsegmentation lays them."""
        tops, lefts = (
            [min(index * step, max(side - window, 0)) for index in range(math.ceil(max(side - window, 0) / step) + 1)]
            for side, window, step in zip(size, self.window, self.stride, strict=True)
        )
        return [(top, left) for top in tops for left in lefts]


def _padded(size: Size) -> Size:
    return -(-size[0] // _DIVISOR) * _DIVISOR, -(-size[1] // _DIVISOR) * _DIVISOR


def _rescaled(images: Tensor, sizes: Sequence[Size], scale: float) -> tuple[Tensor, list[Size]]:
    """Each image resized without its padding, then padded anew to a multiple of 32."""
    scaled_sizes = [(max(1, round(height * scale)), max(1, round(width * scale))) for height, width in sizes]
    padded = _padded((max(height for height, _ in scaled_sizes), max(width for _, width in scaled_sizes)))
    scaled = images.new_zeros(*images.shape[:2], *padded).contiguous(memory_format=_format_of(images))
    for image, (height, width), new, size in zip(images, sizes, scaled, scaled_sizes, strict=True):
        valid = image[None, :, :height, :width]
        new[:, : size[0], : size[1]] = F.interpolate(valid, size, mode="bilinear", align_corners=False)[0]
    return scaled, scaled_sizes


def _mirrored(images: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Each image mirrored, its padding still at the right."""
    mirrored = images.clone()
    for image, (_, width) in zip(mirrored, sizes, strict=True):
        image[:, :, :width] = image[:, :, :width].flip(-1)
    return mirrored


def _format_of(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def label_logits(
    logits: Tensor, padded: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *, align_corners: bool
) -> list[Tensor]:
    """Label maps of images that were seen once and whole, as `Inference.label` gives them.

    Args:
        logits: ``(B, K, h, w)``.
        padded: Height and width of the images, padding included, in pixels.
        sizes: ``(height, width)`` of each image before padding, in pixels.
        original_sizes: ``(height, width)`` of each file, which the label maps get.
        align_corners: How logits are enlarged, see ``torch.nn.functional.interpolate``.
    """
    return [
        best_labels(
            [_View(size, [_Part(0, 0, padded, padded, own)], mirrored=False, align_corners=align_corners)], original
        )
        for own, size, original in zip(logits, sizes, original_sizes, strict=True)
    ]


def best_labels(views: Sequence[_View], size: Size) -> Tensor:
    """The most probable class of each pixel, over all views, int16 of the given size.

    Only a few classes are enlarged at a time: of 150 classes at 2048x1024 all would be 1.2 GB, and of several views as
    often. The running maximum gives the digits of one ``argmax`` over all.
    """
    number = views[0].num_classes
    step = max(1, _CHUNK // (size[0] * size[1]))
    chunks = [slice(start, min(start + step, number)) for start in range(0, number, step)]
    totals = [_log_sum(view, chunks, size) for view in views] if len(views) > 1 else [None]
    sound = all(view.is_finite() for view in views)
    best = label = broken = None
    for chunk in chunks:
        scores = _scores(views, totals, chunk, size)
        if not sound:
            odd = ~scores.isfinite().all(0)
            broken = odd if broken is None else broken | odd
        value, index = scores.max(0)
        index = (index + chunk.start).to(torch.int16)
        if best is None or label is None:
            best, label = value, index
        else:
            label = torch.where(value > best, index, label)
            best = torch.maximum(best, value)
    assert label is not None
    return label if broken is None else label.masked_fill(broken, NO_CLASS)


def _scores(views: Sequence[_View], totals: Sequence[Tensor | None], chunk: slice, size: Size) -> Tensor:
    """What is compared between classes: the logits of one view, or the sum of the probabilities of several."""
    scores = None
    for view, total in zip(views, totals, strict=True):
        logits = view.logits(chunk, size)
        one = logits if total is None else (logits - total).exp_()
        scores = one if scores is None else scores + one
    assert scores is not None
    return scores


def _log_sum(view: _View, chunks: Sequence[slice], size: Size) -> Tensor:
    """Logarithm of the denominator of the softmax, of the given size."""
    total = view.logits(chunks[0], size).logsumexp(0)
    for chunk in chunks[1:]:
        total = torch.logaddexp(total, view.logits(chunk, size).logsumexp(0))
    return total
