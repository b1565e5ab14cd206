"""What the segmentation task asks of every segmenter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from effvit.errors import ConfigError
from effvit.tasks.segmenters.auxiliary import FCNHead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from effvit.backbones import Backbone, FeatureMap


class Segmenter(nn.Module, ABC):
    """A network that gives each pixel a class.

    Its parts are ``backbone``, ``neck`` (not in every segmenter), ``head`` and, where there is one, ``auxiliary``.

    Args:
        backbone: The network below, in its dense form.
        num_classes: Number of classes; the background is one only where the data say so.

    Attributes:
        stride: Pixels of the image per cell of the logits.
        class_parameters: Prefixes of the names of the parameters whose shape depends on the number of classes.
        align_corners: How logits are enlarged to the size of the image, bilinearly: as ``align_corners`` of
            ``torch.nn.functional.interpolate``.
        auxiliary: Head on a map of the backbone that only learns, ``None`` without.

    Raises:
        ConfigError: `num_classes` is below 1.
    """

    stride: int
    class_parameters: ClassVar[tuple[str, ...]] = ("head.conv_seg.", "auxiliary.conv_seg.")
    align_corners: bool = False
    auxiliary: FCNHead | None

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, not {num_classes}")
        self.backbone = backbone
        self.num_classes = num_classes
        self.auxiliary = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Class scores of the cells of images.

        Args:
            images: Normalised images ``(B, 3, H, W)``.

        Returns:
            ``logits`` ``(B, num_classes, ceil(H / stride), ceil(W / stride))`` and, in training mode where there is an
            auxiliary head, ``auxiliary`` ``(B, num_classes, h, w)`` of its map.
        """
        maps: dict[str, Tensor] = self.backbone(images)
        logits = self.decode(maps)
        # Levels that transposed convolutions double reach beyond the image, which would shift what is enlarged.
        outputs = {
            "logits": logits[..., : _cells(images.shape[-2], self.stride), : _cells(images.shape[-1], self.stride)]
        }
        if self.auxiliary is not None and self.training:
            outputs["auxiliary"] = self.auxiliary(maps[self.auxiliary_map.level])
        return outputs

    @abstractmethod
    def decode(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Logits ``(B, num_classes, h, w)`` of the backbone's maps, at least as large as `forward` says."""

    @property
    def auxiliary_map(self) -> FeatureMap:
        """The map that an auxiliary head reads: that of the last stage but one, or a plain network's only map."""
        return self.backbone.feature_maps[-2:][0]


def _cells(side: int, stride: int) -> int:
    return -(-side // stride)
