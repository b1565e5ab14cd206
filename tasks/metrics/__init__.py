"""Metrics of whole data sets."""
