"""Lightning callbacks, each usable without the others."""

from effvit.callbacks._palette import class_colour
from effvit.callbacks.checkpoints import RunCheckpoint
from effvit.callbacks.classification import ClassificationReport
from effvit.callbacks.drawing import captioned, draw_detections, draw_kept_patches, panel_grid
from effvit.callbacks.ema import EMA, select_weights
from effvit.callbacks.hardware_benchmark import HardwareBenchmark
from effvit.callbacks.overlays import draw_segmentation, draw_segmentation_pair
from effvit.callbacks.predictions import ClassificationWriter, PredictionWriter
from effvit.callbacks.progress import Progress
from effvit.callbacks.report import RunReport
from effvit.callbacks.segmentation import SegmentationReport
from effvit.callbacks.segmentation_predictions import SegmentationWriter

__all__ = [
    "EMA",
    "ClassificationReport",
    "ClassificationWriter",
    "HardwareBenchmark",
    "PredictionWriter",
    "Progress",
    "RunCheckpoint",
    "RunReport",
    "SegmentationReport",
    "SegmentationWriter",
    "captioned",
    "class_colour",
    "draw_detections",
    "draw_kept_patches",
    "draw_segmentation",
    "draw_segmentation_pair",
    "panel_grid",
    "select_weights",
]
