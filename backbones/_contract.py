"""What every backbone answers, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effvit.backbones._recompute import recompute_later

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class FeatureMap:
    """One output of a backbone.

    Attributes:
        level: Key in the output dictionary; ``"c4"`` is the map of stride 2**4. In a network that is dilated
            (``output_stride``), the last stages keep their keys and have the stride of the one before.
        channels: Channels of the map.
        stride: Pixels of the image per cell of the map.
    """

    level: str
    channels: int
    stride: int


@dataclass(frozen=True)
class InputSpec:
    """How the published weights expect their images.

    Attributes:
        size: Height and width in pixels.
        crop: Side of the centre crop divided by the side that the image is resized to.
        interpolation: Name of the resize filter, as torchvision and Pillow name it.
        mean: Subtracted from each RGB channel, images in [0, 1].
        std: Divides each RGB channel after the mean is gone.
    """

    size: tuple[int, int] = (224, 224)
    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class VariantInfo:
    """A row of a family's variant table: what was published about one network, with its source.

    Attributes:
        name: What ``create_backbone`` takes.
        family: Name of the family, as its paper spells it.
        params: Parameters of the published 1000-class network, both heads of a distilled one included.
        macs: Multiply-accumulates of one image of the published size through that network: convolutions, linear layers
            and attention products.
        top1: ImageNet-1k top-1 accuracy in percent of the weights at `url` or `page`; ``None`` where unpublished.
        top5: The same for top-5.
        paper: arXiv id.
        source: Where the figures were published.
        licence: Licence of the published weights, its SPDX id where it has one.
        origin: Who publishes the weights where, in a few words.
        url: The published weights, or ``None`` where they lie on a drive that no program can fetch them from.
        page: Where a person finds the weights; given where `url` is not.
        instead: What else can be done where `url` is not given, a sentence.
        sha256: The file's hash, or its first digits, where the source publishes it.
    """

    name: str
    family: str
    params: int
    macs: int
    top1: float | None
    top5: float | None
    paper: str
    source: str
    licence: str
    origin: str
    url: str | None
    page: str | None = None
    instead: str | None = None
    sha256: str | None = None


class Backbone(nn.Module, ABC):
    """A network that turns images into feature maps.

    Subclasses set the attributes below in ``__init__``.

    Attributes:
        info: The row of the variant table that this network was built from.
        feature_maps: One spec for each output, finest first.
        num_features: Length of ``embed``'s vectors.
        num_layers: Steps of layer-wise learning-rate decay, the stem being step 0.
        input_spec: What the published weights expect.
        distilled: Whether the published classifier has a second head, which learned from a teacher.
        embed_only: Prefixes of the parameters that `embed` reads and `forward` does not.
        fresh_allowed: Prefixes of parameters that a checkpoint may lack: they then start fresh, with a warning.
        open_sides: Sides in pixels of the images that a graph of no fixed size takes; ``None`` where each graph is
            made for one size.
        grad_checkpointing: Whether blocks forget their activations and compute them again in the backward pass.
    """

    info: VariantInfo
    feature_maps: tuple[FeatureMap, ...]
    num_features: int
    num_layers: int
    input_spec: InputSpec = InputSpec()
    distilled: bool = False
    embed_only: tuple[str, ...] = ()
    fresh_allowed: tuple[str, ...] = ()
    open_sides: range | None = None
    grad_checkpointing: bool = False

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps, finest first, keyed by level.

        Args:
            images: Normalised floats ``(B, 3, H, W)``; H and W at least 32, odd and non-square sizes included.

        Returns:
            ``{level: (B, channels, ceil(H / stride), ceil(W / stride))}``, in the order of ``feature_maps``.
        """

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """The vectors ``(B, num_features)`` that the family's published classifier reads, from ``(B, 3, H, W)``."""

    @abstractmethod
    def make_classifier(self, num_classes: int) -> nn.Module:
        """The family's published head, untrained: ``(B, num_features)`` to logits ``(B, num_classes)``."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the authors leave without weight decay, norms and biases aside."""

    @abstractmethod
    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter for layer-wise learning-rate decay.

        Args:
            parameter_name: A name from ``named_parameters()``.

        Returns:
            0 for the stem up to ``num_layers - 1`` for the last block; ``num_layers`` for any name that is no part of
            the trunk, such as a head's.
        """

    @abstractmethod
    def fuse(self) -> Backbone:
        """Turns the network, in place, into its faster deploy form with equal outputs.

        BatchNorm is folded into convolutions and linears, attention-bias tables are expanded. For inference only, and
        final: the parameters are frozen and have other names, so save a checkpoint before, not after.

        Returns:
            The network itself.
        """

    @classmethod
    @abstractmethod
    def convert_key(cls, key: str) -> str | None:
        """Our name for a key of a published checkpoint, any prefix removed.

        Names of a head come out as they are in a ``Classifier``. A key that is already ours is returned as it is.

        Returns:
            The name, or ``None`` for an entry that is derived from the others and not loaded.
        """

    @classmethod
    def options_in(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that a checkpoint shows the network to have been built with, such as ``{"official_grid": 25}``.

        Args:
            state: The checkpoint's entries, under any prefix.
        """
        del state
        return {}

    def resize_table(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """A checkpoint's position table brought to this network's shape, where the family has such tables.

        Args:
            name: Our name of the parameter.
            table: What the checkpoint holds.
            shape: What the network has.

        Returns:
            The resized table, or ``None`` where `name` is no table and a different shape is an error.
        """
        del name, table, shape
        return None

    def convert_value(self, key: str, value: Tensor) -> Tensor:
        """A checkpoint's entry with the meaning that this network gives it.

        Args:
            key: The published name, any prefix removed.
            value: What the checkpoint holds.

        Returns:
            `value` itself but for entries that mean something else there, such as a stem that reads BGR.
        """
        del key
        return value

    def check_unexpected(self, key: str, value: Tensor) -> None:
        """Refuses an entry that shows that a checkpoint, though it fits, is of this network built with another option.

        Args:
            key: A name that the network does not have, any prefix kept.
            value: What the checkpoint holds.

        Raises:
            CheckpointError: With the option to build the network with.
        """
        del key, value

    def prepare_for_dense(self) -> None:
        """Brings the network to the form in which the authors train detectors.

        ``FeaturePyramid`` calls it. It may replace parameters, so it comes before the optimizer is made.
        """

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades a third more computation in training for the memory of the activations inside each block.

        Gradients and BatchNorm statistics stay the same.
        """
        self.grad_checkpointing = enable

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """One block of the trunk; `forward` calls its blocks through this, so that checkpointing is in one place."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return recompute_later(block, *inputs)
        out: Tensor = block(*inputs)
        return out


class Classifier(nn.Module):
    """A backbone under its published head.

    Args:
        backbone: The trunk.
        head: From ``backbone.make_classifier``.
        head_dist: A second one, which learned from a teacher; the logits are then the mean of both heads.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, head_dist: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_dist = head_dist

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of normalised images ``(B, 3, H, W)``; the mean where there are two heads."""
        logits, distilled = self.forward_heads(images)
        return logits if distilled is None else (logits + distilled) / 2

    def forward_heads(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What each head says of normalised images ``(B, 3, H, W)``: hard distillation trains each on its own.

        Returns:
            Logits ``(B, num_classes)`` of the head, and of the one that learns from a teacher, or ``None``.
        """
        features = self.backbone.embed(images)
        return self.head(features), None if self.head_dist is None else self.head_dist(features)

    def fuse(self) -> Classifier:
        """Fuses trunk and heads in place for inference; see ``Backbone.fuse``."""
        self.backbone.fuse()
        for head in (self.head, self.head_dist):
            fuse_head = getattr(head, "fuse", None)
            if fuse_head is not None:
                fuse_head()
        return self.requires_grad_(requires_grad=False)
