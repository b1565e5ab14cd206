"""These tests need MMDetection: the extra ``mmdet``. Without it each file of the folder is skipped.

``EFFVIT_REQUIRE_MMDET=1`` makes the lack of it an error, so that tests in a place that has it cannot vanish unnoticed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_MISSING = [name for name in ("mmengine", "mmcv", "mmdet") if importlib.util.find_spec(name) is None]
_REQUIRED = os.environ.get("EFFVIT_REQUIRE_MMDET") == "1"

if _MISSING and _REQUIRED:
    raise pytest.UsageError(
        f"EFFVIT_REQUIRE_MMDET=1, and {', '.join(_MISSING)} is missing: pip install 'effvit[mmdet]'"
    )
if not _MISSING:
    with warnings.catch_warnings():  # of packages that will not change any more
        warnings.simplefilter("ignore")
        importlib.import_module("effvit.tasks.mmdetection")  # the operators that `import mmdet.models` needs
        importlib.import_module("mmdet.models")  # here, where its warnings are silent
    from mmengine.logging import MMLogger

    # Otherwise each model that is built writes a paragraph for each of its parameters.
    MMLogger.get_instance("mmengine", logger_name="mmengine", log_level=logging.ERROR)


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"needs {', '.join(_MISSING)}: pip install 'effvit[mmdet]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """A file of this folder, skipped before it is imported where MMDetection is missing."""
    return _Skipped.from_parent(parent, path=module_path) if _MISSING else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Warnings that MMDetection and what it stands on cause in their own files are theirs."""
    for package in ("mmdet", "mmengine", "mmcv"):
        item.add_marker(pytest.mark.filterwarnings(f"ignore:::{package}"))
