"""Whether MMDetection is there, in versions that go together."""

from __future__ import annotations

import importlib
import importlib.util

from effvit.errors import ConfigError

_INSTALL = 'pip install "effvit[mmdet]"'
#: Importable names with the packages that bring them.
_PACKAGES = {"mmengine": "mmengine", "mmcv": "mmcv-lite", "mmdet": "mmdet"}


def require() -> None:
    """Raises a ConfigError that says what to install, unless MMDetection can be imported."""
    missing = [package for name, package in _PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"MMDetection's engine needs {' and '.join(missing)}, not installed here: {_INSTALL}")
    try:
        importlib.import_module("mmdet")
    except AssertionError as error:  # how mmdet refuses other versions of mmcv and mmengine
        raise ConfigError(f"the installed packages do not go together: {error} Or run: {_INSTALL}") from error
