"""MMDetection as a second engine of detection, and effvit's backbones in its registry.

Importing this package makes MMDetection work with mmcv-lite (`_mmcv_ext`) and registers ``effvit.Backbone`` and
``effvit.FeaturePyramid`` (`_registry`). A configuration for MMDetection's own ``Runner`` does so by
``custom_imports = dict(imports=["effvit.tasks.mmdetection"])``.

Raises:
    ConfigError: MMDetection is not installed, or in versions that do not go together.
"""

from effvit.tasks.mmdetection._mmcv_ext import install
from effvit.tasks.mmdetection._requirements import require

require()
install()

from effvit.tasks.mmdetection._engine import MMDetector, has_masks  # noqa: E402 - mmdet.models needs the operators
from effvit.tasks.mmdetection._registry import RegisteredBackbone, RegisteredPyramid  # noqa: E402 - as above

__all__ = ["MMDetector", "RegisteredBackbone", "RegisteredPyramid", "has_masks"]
