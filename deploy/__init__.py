"""Measuring and exporting any network: what a model costs on the user's own hardware, and files that run elsewhere."""
