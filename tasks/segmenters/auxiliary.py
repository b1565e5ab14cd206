"""The head that helps a backbone learn, and is left out afterwards."""

from __future__ import annotations

from torch import Tensor, nn

from effvit.tasks.segmenters._layers import ConvNormReLU


class FCNHead(nn.Module):
    """A 3x3 convolution with BatchNorm and ReLU, dropout of whole channels, and a 1x1 classifier.

    Sources: mmsegmentation's ``FCNHead`` with ``num_convs=1, concat_input=False``; ``aux_head`` of apple/ml-cvnets
    ``cvnets/models/segmentation/heads/base_seg_head.py``. They are the same but for their width and their start.

    Args:
        in_channels: Channels of the map.
        channels: Width of the head.
        num_classes: Number of classes.
        dropout: Share of the channels that are zero in training.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = ConvNormReLU(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to logits ``(B, num_classes, H, W)``."""
        logits: Tensor = self.conv_seg(self.dropout(self.conv(x)))
        return logits
