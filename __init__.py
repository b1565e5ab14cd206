"""effvit: the downstream-task suite for efficient vision transformers.

The names below load on first use, so that ``import effvit`` costs nothing: ``effvit --help`` must answer without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Backbone", "FeaturePyramid", "__version__", "create_backbone", "create_classifier", "list_backbones"]

if TYPE_CHECKING:
    from effvit.backbones import Backbone, FeaturePyramid, create_backbone, create_classifier, list_backbones


def __getattr__(name: str) -> Any:
    if name in __all__:
        from effvit import backbones

        return getattr(backbones, name)
    raise AttributeError(f"module 'effvit' has no attribute {name!r}")
