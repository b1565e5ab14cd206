"""Lightning callbacks, each usable without the others."""

from effvit.callbacks.checkpoints import RunCheckpoint
from effvit.callbacks.drawing import class_colour, draw_detections, panel_grid
from effvit.callbacks.ema import EMA, select_weights
from effvit.callbacks.predictions import PredictionWriter
from effvit.callbacks.progress import Progress
from effvit.callbacks.report import RunReport

__all__ = [
    "EMA",
    "PredictionWriter",
    "Progress",
    "RunCheckpoint",
    "RunReport",
    "class_colour",
    "draw_detections",
    "panel_grid",
    "select_weights",
]
