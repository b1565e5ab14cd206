"""The one folder below which everything lies that is fetched or made once and used again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloaded files and made data are kept: ``$EFFVIT_CACHE``, or ``~/.cache/effvit``."""
    return Path(os.environ.get("EFFVIT_CACHE") or Path.home() / ".cache" / "effvit")
