"""glibc's allocator, set up for tensors.

By default glibc hands every large block back to the kernel and faults it in again at the next step. Keeping freed
memory is set through ``mallopt``, in this process, before torch allocates; forked workers inherit it. What it gains
depends on the machine: `benchmarks/README.md`.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
_TOP_PAD = 64 * 2**20


#: Where records of measurements find what is in force.
_VARIABLE = "EFFVIT_ALLOCATOR"


def tune_allocator(choice: str) -> str:
    """Applies ``tuned`` or leaves ``default``, and notes it for the records of measurements in this process.

    Args:
        choice: ``tuned`` or ``default``.

    Returns:
        What is in force and why, one line for the run's log.
    """
    os.environ[_VARIABLE] = in_force = _apply(choice)
    return in_force


def _apply(choice: str) -> str:
    if choice == "default":
        return "default (asked for)"
    if not sys.platform.startswith("linux"):
        return f"default ({sys.platform} does not use glibc)"
    if os.environ.get("LD_PRELOAD") or any(name.startswith("MALLOC_") for name in os.environ):
        return "left as the environment sets it (LD_PRELOAD or MALLOC_*)"
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return "default (this C library has no mallopt)"
    settings = {_M_MMAP_THRESHOLD: _LARGEST_INT, _M_TRIM_THRESHOLD: _LARGEST_INT, _M_TOP_PAD: _TOP_PAD}
    refused = [parameter for parameter, value in settings.items() if mallopt(parameter, value) != 1]
    if refused:
        return f"default (mallopt refused parameters {refused})"
    return "tuned (mallopt: freed memory is kept, large blocks included)"
