"""MMDetection as a second engine of detection, and effvit's backbones in its registry.

Importing this module makes MMDetection work with mmcv-lite (`_mmcv_ext`).

Raises:
    ConfigError: MMDetection is not installed, or in versions that do not go together.
"""

from effvit.tasks.mmdetection._mmcv_ext import install
from effvit.tasks.mmdetection._requirements import require

require()
install()
