"""Networks that turn images into feature maps, and the pyramid on top; pure torch."""

from effvit.backbones import dynamicvit as _dynamicvit  # noqa: F401 - registers its variants
from effvit.backbones import efficientformer as _efficientformer  # noqa: F401 - registers its variants
from effvit.backbones import efficientformerv2 as _efficientformerv2  # noqa: F401 - registers its variants
from effvit.backbones import efficientvit as _efficientvit  # noqa: F401 - registers its variants
from effvit.backbones import mobilevit as _mobilevit  # noqa: F401 - registers its variants
from effvit.backbones import mobilevitv2 as _mobilevitv2  # noqa: F401 - registers its variants
from effvit.backbones._checkpoint import LoadReport, load_checkpoint, load_state, open_checkpoint, read_checkpoint
from effvit.backbones._contract import Backbone, Classifier, FeatureMap, InputSpec, VariantInfo
from effvit.backbones._factory import create_backbone, create_classifier
from effvit.backbones._pyramid import FeaturePyramid, PyramidNeck
from effvit.backbones._registry import backbone_info, can_dilate, list_backbones, outline, without_memory
from effvit.backbones._unread import freeze_unread

__all__ = [
    "Backbone",
    "Classifier",
    "FeatureMap",
    "FeaturePyramid",
    "InputSpec",
    "LoadReport",
    "PyramidNeck",
    "VariantInfo",
    "backbone_info",
    "can_dilate",
    "create_backbone",
    "create_classifier",
    "freeze_unread",
    "list_backbones",
    "load_checkpoint",
    "load_state",
    "open_checkpoint",
    "outline",
    "read_checkpoint",
    "without_memory",
]
