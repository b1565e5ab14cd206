"""Which patches of an image the network of a task keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import Tensor


def drops_patches(pl_module: LightningModule) -> bool:
    """Whether the network of a task leaves patches out on its way, as DynamicViT with a keep ratio below 1 does."""
    backbone = getattr(getattr(pl_module, "network", None), "backbone", None)
    return hasattr(backbone, "forward_tokens") and getattr(backbone, "keep_ratio", 1.0) < 1


def kept_patches(pl_module: LightningModule, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[int, int]]:
    """Which patches of some images the network of a task keeps.

    Args:
        pl_module: A task for which `drops_patches` holds, in eval mode; its ``prepare((images, targets))`` normalises.
        images: uint8 ``(B, 3, H, W)``.

    Returns:
        The images, for each stage the decisions ``(B, N)``, and rows and columns of the grid; all on the CPU.
    """
    module = cast("Any", pl_module)
    with torch.no_grad():
        found = module.network.backbone.forward_tokens(module.prepare((images, {})))
    return images.cpu(), tuple(kept.cpu() for kept in found.decisions), found.grid
