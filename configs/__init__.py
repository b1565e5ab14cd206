"""Shipped configurations, one folder a task."""
