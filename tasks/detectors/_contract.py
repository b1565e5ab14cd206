"""What the detection task asks of every detector, the built-in ones and MMDetection's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn


class Detector(nn.Module, ABC):
    """A network that finds objects.

    Attributes:
        iou_types: What its detections are judged by: ``bbox`` for boxes, ``segm`` for masks too.
        class_parameters: Prefixes of the names of the parameters whose shape depends on the number of classes.
        num_classes: Object classes, the background not counted.
    """

    iou_types: ClassVar[tuple[str, ...]] = ("bbox",)
    class_parameters: tuple[str, ...]
    num_classes: int

    @abstractmethod
    def forward(self, images: Tensor) -> Any:
        """Raw outputs of all layers for images ``(B, 3, H, W)``, with counts that do not depend on what is seen."""

    @abstractmethod
    def loss(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Losses by name; their sum is minimised.

        Args:
            images: Normalised images ``(B, 3, H, W)``, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            targets: ``boxes`` ``(N, 4)`` xyxy in pixels, ``labels`` ``(N,)`` and, for masks, ``masks`` ``(N, h, w)``
                of 0 and 1 at the size of the original image, for each image; N may be 0.
        """

    @abstractmethod
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detects objects.

        Args:
            images: Normalised images ``(B, 3, H, W)``, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            original_sizes: ``(height, width)`` of each image before it was resized; ``sizes`` by default.

        Returns:
            One dictionary an image: ``boxes`` ``(N, 4)``, xyxy in pixels of the original image, ``scores`` ``(N,)``,
            best first, ``labels`` ``(N,)``, and for masks ``rles``, N compressed COCO masks at the original size.
        """
