"""What Snap's two families have in common, networks and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effvit.backbones._contract import Backbone
from effvit.backbones._layers import depth_of, make_head
from effvit.backbones._windows import AttentionBias, fit_bias_table, side_of
from effvit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEADS = 8
ORIGIN = "timm's copy on the Hugging Face hub; the authors publish on Google Drive"
PAGE = "https://github.com/snap-research/EfficientFormer#readme"

#: Bias tables of Snap's detectors and segmenters, beside which their files keep the classifier's, unused.
DENSE_TABLE = "attention_biases_seg"


class BiasTable(nn.Module):
    """A table of attention biases under one of two names, which tells how it is brought to other maps.

    Args:
        side: The map that the table is made for, whose absolute offsets it holds.
        stride: Which cells of that map are queries, see ``AttentionBias``.
        official: Stretch the expanded matrix, as Snap's dense files do.
    """

    attention_biases: Tensor
    attention_biases_seg: Tensor

    def __init__(self, side: int, stride: int = 1, *, official: bool = False) -> None:
        super().__init__()
        self.register_parameter(
            DENSE_TABLE if official else "attention_biases", nn.Parameter(torch.zeros(HEADS, side**2))
        )
        self.official = official
        self.bias = AttentionBias(stride, stretched=official)

    @property
    def table(self) -> Tensor:
        """The table ``(heads, side * side)``: the parameter, or what torch put in its place for a call."""
        return self.attention_biases_seg if self.official else self.attention_biases

    def biases(self, height: int, width: int) -> Tensor:
        """One bias for each pair of a query and a cell of a map, ``(heads, queries, height * width)``."""
        expanded: Tensor = self.bias(self.table, height, width)
        return expanded


class SnapNetwork(Backbone):
    """The trunk of both families; subclasses make ``stem``, ``stages`` and ``norm``.

    Args:
        official_grid: Side of the map for which the bias tables of Snap's dense networks are made; ``None`` for the
            classifier's.

    Attributes:
        layers: For each step of layer-wise decay, what its parameters' names start with.

    Raises:
        ConfigError: `official_grid` is no int of at least 1.
    """

    distilled = True
    embed_only = ("norm.",)
    open_sides = range(64, 4097, 32)
    stem: nn.Module
    stages: nn.ModuleList
    layers: Sequence[str]

    def __init__(self, official_grid: int | None) -> None:
        super().__init__()
        _check_grid(official_grid)
        self.official_grid = official_grid

    def stage_outputs(self, images: Tensor) -> list[Tensor]:
        """What each stage hands on, of normalised images ``(B, 3, H, W)``."""
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            x = self.run(stage.get_submodule("downsample"), x)
            for block in stage.get_submodule("blocks").children():
                x = self.run(block, x)
            outputs.append(x)
        return outputs

    def make_classifier(self, num_classes: int) -> nn.Linear:
        """One linear layer; the published network has two of them."""
        return make_head(self.num_features, num_classes)

    def no_weight_decay(self) -> set[str]:
        """None: the official optimizer decays the bias tables too (timm's would not)."""
        return set()

    def layer_of(self, parameter_name: str) -> int:
        """Stem 0, then each downsampling and each block one more; see ``Backbone.layer_of``."""
        return depth_of(parameter_name, self.layers, self.embed_only)

    def resize_table(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """Bicubic, see ``Backbone.resize_table``.

        Raises:
            CheckpointError: The tables are Snap's for another nominal grid, to which they belong.
        """
        self.check_unexpected(name, table)
        return fit_bias_table(table, shape) if name.endswith("attention_biases") else None

    @classmethod
    def options_in(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The nominal grid of a dense network; see ``Backbone.options_in``."""
        grids = (_grid_of(key, value) for key, value in state.items())
        grid = next((grid for grid in grids if grid is not None), None)
        return {} if grid is None else {"official_grid": grid}

    def check_unexpected(self, key: str, value: Tensor) -> None:
        """Refuses the tables of Snap's dense files where they are not the network's; see ``Backbone``."""
        side = _grid_of(key, value)
        if side is None:
            return
        grid = self.official_grid
        built = "without official_grid" if grid is None else f"with official_grid={grid}"
        raise CheckpointError(
            f"{self.info.name}: these weights are of a dense network with attention biases for a nominal grid of "
            f"{side}x{side} cells ({key}), and this one was built {built}; build it with official_grid={side}"
        )


def _grid_of(key: str, value: Tensor) -> int | None:
    """Side of the nominal grid that an entry of a dense network's file is made for; of no other entry."""
    if not key.endswith(DENSE_TABLE) or value.ndim != 2:
        return None
    # The attention of a downsampling reads the finer map.
    return side_of(value) // (2 if ".attn." in key else 1)


def _check_grid(value: object) -> None:
    """Refuses what is not the side of a grid; a bool or a float would only fail deep in torch, or not at all."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise ConfigError(f"official_grid must be an int of at least 1 (Snap's are 25 and 16), got {value!r}")
