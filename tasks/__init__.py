"""What is trained: Lightning modules with their losses, detectors, metrics and optimizer groups."""

from effvit.tasks._checkpoint import read_run
from effvit.tasks._task import Task
from effvit.tasks.classification import Classification
from effvit.tasks.detection import Detection
from effvit.tasks.segmentation import Segmentation

__all__ = ["Classification", "Detection", "Segmentation", "Task", "read_run"]
