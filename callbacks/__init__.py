"""Lightning callbacks, each usable without the others."""

from effvit.callbacks.drawing import class_colour, draw_detections, panel_grid
from effvit.callbacks.ema import EMA, select_weights
from effvit.callbacks.progress import Progress
from effvit.callbacks.report import RunReport

__all__ = ["EMA", "Progress", "RunReport", "class_colour", "draw_detections", "panel_grid", "select_weights"]
