"""What this machine has: packages, a C++ compiler, instructions of its processor."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from effvit.errors import ConfigError

_CPUINFO = Path("/proc/cpuinfo")
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's
_COMPILERS = {"win32": "cl", "darwin": "clang++"}


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in modules if find_spec(name) is None]


def check_compiler() -> None:
    """Refuses where torch's compiler has no C++ compiler, by the rule that it finds one by itself.

    Raises:
        ConfigError: None is found.
    """
    compiler = os.environ.get("CXX") or _COMPILERS.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"torch's compiler needs a C++ compiler, and there is no {compiler!r} here. Install one (on Debian: apt "
            "install g++), or name yours in the environment variable CXX."
        )


def has_bf16() -> bool:
    """Whether this processor has bf16 instructions; true where the system does not tell."""
    try:
        words = _CPUINFO.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return True
    return not _BF16.isdisjoint(words)
