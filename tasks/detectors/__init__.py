"""Detectors: networks with a loss and a prediction, on top of a feature pyramid."""
