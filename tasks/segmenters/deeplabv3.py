"""DeepLabv3: atrous spatial pyramid pooling on one map.

Papers: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation (arXiv 1706.05587); Mehta and
Rastegari, MobileViT (arXiv 2110.02178), section 4.2.2, whose settings are the defaults. The layers are those of
apple/ml-cvnets (``cvnets/modules/aspp_block.py``, ``cvnets/models/segmentation/heads/deeplabv3.py``): version 0.1
(commit d38a116), which the paper's files are of, and the current one have the same. What differs between the two: the
old one drops single values after the projection and whole channels before the classifier, the new one whole channels,
once, and so does this; the old one enlarges logits with ``align_corners=False``, the new one with ``True``. This is
as the old one, as torchvision and as mmsegmentation, until it takes weights of the new one (`load_published`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effvit.backbones import Backbone, PyramidNeck, freeze_unread
from effvit.errors import ConfigError
from effvit.tasks.segmenters._contract import Segmenter
from effvit.tasks.segmenters._layers import ConvNormReLU, check_channels, check_dropout
from effvit.tasks.segmenters.auxiliary import FCNHead

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OUTPUT_STRIDES = (8, 16, 32)
#: Rates of the atrous convolutions that go with an output stride (arXiv 1706.05587, section 4).
RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (6, 12, 18)}
_AUXILIARY_CHANNELS = 128


class DeepLabV3(Segmenter):
    """Segmenter on one map of stride `output_stride`, which is the stride of its logits.

    A backbone whose coarsest map has that stride, as a plain ViT or one that was built with ``output_stride``, is read
    there. Of any other, the map is that level of a feature pyramid (``FeaturePyramid``) into which the coarser maps
    are merged. The backbone is brought to its dense form, and those of its parameters that the segmenter does not
    depend on are frozen.

    Args:
        backbone: Any backbone.
        num_classes: Number of classes.
        head_channels: Channels of each branch and of their projection.
        rates: Of the atrous convolutions; ``None`` for 6, 12 and 18, of stride 8 twice as much.
        dropout: Share of the channels that are zero in training before the classifier.
        output_stride: 8, 16 or 32.
        auxiliary: Whether there is an auxiliary head on the map of the last stage but one, with a quarter of that
            map's channels and at least 128.
        pyramid_channels: Channels of the level, where there is a pyramid.

    Raises:
        ConfigError: A value is out of its range, or the backbone is dilated to another output stride.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        head_channels: int = 256,
        rates: Sequence[int] | None = None,
        dropout: float = 0.1,
        output_stride: int = 16,
        auxiliary: bool = False,
        pyramid_channels: int = 256,
    ) -> None:
        super().__init__(backbone, num_classes)
        check_output_stride(output_stride)
        check_channels("head_channels", head_channels)
        check_dropout(dropout)
        rates = RATES[output_stride] if rates is None else tuple(rates)
        if not rates or min(rates) < 1:
            raise ConfigError(f"rates must be whole numbers of at least 1, such as [6, 12, 18], not {list(rates)}")
        backbone.prepare_for_dense()
        self.stride = output_stride
        self.neck: PyramidNeck | None = None
        last = backbone.feature_maps[-1]
        read, channels = {last.level}, last.channels
        if last.stride != output_stride:
            self.neck, channels = _merging(backbone, output_stride, pyramid_channels), pyramid_channels
            read = {"c" + level[1:] for level in self.neck.levels}
        if auxiliary:
            own = self.auxiliary_map
            self.auxiliary = FCNHead(own.channels, max(own.channels // 4, _AUXILIARY_CHANNELS), num_classes, dropout)
            read.add(own.level)
        freeze_unread(backbone, [spec.level for spec in backbone.feature_maps if spec.level in read])
        self.head = ASPPHead(channels, head_channels, rates, num_classes, dropout)

    def decode(self, maps: Mapping[str, Tensor]) -> Tensor:
        """See ``Segmenter.decode``."""
        if self.neck is None:
            x = maps[self.backbone.feature_maps[-1].level]
        else:
            (x,) = self.neck(maps).values()
        logits: Tensor = self.head(x)
        return logits


def check_output_stride(value: int) -> None:
    """Raises `ConfigError` where `value` is none of `OUTPUT_STRIDES`."""
    if value not in OUTPUT_STRIDES:
        raise ConfigError(f"output_stride must be one of {', '.join(map(str, OUTPUT_STRIDES))}, not {value}")


def _merging(backbone: Backbone, stride: int, channels: int) -> PyramidNeck:
    """The level of a stride, with what is coarser merged into it; of a plain network's one map, that map's pyramid."""
    wanted = stride.bit_length() - 1
    own = [int(spec.level[1:]) for spec in backbone.feature_maps]
    first, last = (min(wanted, own[0]), max(wanted, own[0])) if len(own) == 1 else (wanted, max(wanted, own[-1]))
    levels = tuple(f"p{number}" for number in range(first, last + 1))
    return PyramidNeck(backbone.feature_maps, levels, channels, returned=(f"p{wanted}",))


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling and a 1x1 classifier.

    Args:
        in_channels: Channels of the map.
        channels: Of each branch and of their projection.
        rates: Of the atrous 3x3 convolutions, beside which there are a 1x1 convolution and the mean of the map.
        num_classes: Number of classes.
        dropout: Share of the channels that are zero in training before the classifier.
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], num_classes: int, dropout: float) -> None:
        super().__init__()
        atrous = (ConvNormReLU(in_channels, channels, 3, rate) for rate in rates)
        self.branches = nn.ModuleList([ConvNormReLU(in_channels, channels), *atrous])
        self.pool = ConvNormReLU(in_channels, channels)
        self.project = ConvNormReLU((len(rates) + 2) * channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.kaiming_normal_(self.conv_seg.weight, mode="fan_out")
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to logits ``(B, num_classes, H, W)``.

        Raises:
            ConfigError: BatchNorm is to learn from the mean of a single image, which is one value a channel.
        """
        bn = self.pool.bn
        if bn.training and x.shape[0] == 1 and not isinstance(bn, nn.SyncBatchNorm):
            raise ConfigError(
                "deeplabv3 normalises the mean of each image over the batch, which a batch of one image does not "
                "allow in training: pass --data.batch_size 2 or more (and leave no last batch of one image)"
            )
        mean = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        joined = torch.cat([*(branch(x) for branch in self.branches), mean], dim=1)
        logits: Tensor = self.conv_seg(self.dropout(self.project(joined)))
        return logits
