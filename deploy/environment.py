"""What a figure depends on besides the code: machine, versions, threads, allocator, load."""

from __future__ import annotations

import ctypes
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_ALLOCATOR_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
_PACKAGES = ("torchvision", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "coremltools", "executorch")
_CPU = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # version 1 of cgroups writes a huge number where there is no limit


def environment(device: str, threads: int) -> dict[str, Any]:
    """Everything about this machine that a figure depends on, as plain values; what cannot be read is ``None``.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: Threads that the work is pinned to.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": {"physical": _physical_cores(), "logical": os.cpu_count(), "usable": usable_cores()},
        "cpu_quota": _cpu_quota(),
        "governor": _read(_CPU / "cpu0/cpufreq/scaling_governor"),
        "clock_mhz": _clock(),
        "memory": total_memory(),
        "memory_available": available_memory(),
        **_gpu(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "device": device,
        "threads": threads,
        "allocator": allocator(os.environ.get("EFFVIT_ALLOCATOR")),  # the command line's note
        "load_before": load(),
    }


def processor() -> str:
    """Name of the processor."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            return value.strip()
    return platform.processor() or platform.machine()


def allocator(in_force: str | None = None) -> str:
    """The C library, and what tunes its allocator.

    Args:
        in_force: What this process has set; ``None`` for what a fresh one gets from the environment.
    """
    settings = [f"{name}={os.environ[name]}" for name in _ALLOCATOR_SETTINGS if os.environ.get(name)]
    library = " ".join(platform.libc_ver()).strip() or platform.system()
    return f"{library}, " + (" ".join(settings) or in_force or "default settings")


def load() -> list[float] | None:
    """Processes that wanted a core, mean of the last 1, 5 and 15 minutes."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def usable_cores() -> int | None:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def total_memory() -> int | None:
    """Bytes of memory of this machine, or of this container where it has less."""
    return _least(_kibibytes(_MEMINFO, "MemTotal"), _cgroup_limit())


def available_memory() -> int | None:
    """Bytes that this process can still take before the system would end it; ``None`` where that cannot be read."""
    limit, used = _cgroup_limit(), _cgroup_used()
    left = limit - used if limit is not None and used is not None else None
    return _least(_kibibytes(_MEMINFO, "MemAvailable"), left)


def resident_memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell (it needs Linux's ``/proc``)."""
    return _kibibytes(_STATUS, "VmRSS") or 0


def peak_resident_memory() -> int:
    """The most that it ever held, or has since the mark was reset."""
    return _kibibytes(_STATUS, "VmHWM") or 0


def trim_memory() -> None:
    """Gives freed pages back to the system, where the C library can: what it keeps looks as if it were in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim is not None:
        trim(0)


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _kibibytes(path: Path, name: str) -> int | None:
    """Bytes of a line such as ``MemTotal: 24683120 kB``."""
    for line in (_read(path) or "").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        value = _read(_CGROUP / name)
        if value is not None and value.isdigit() and int(value) < _NO_LIMIT:
            return int(value)
    return None


def _cgroup_used() -> int | None:
    for name in ("memory.current", "memory/memory.usage_in_bytes"):
        value = _read(_CGROUP / name)
        if value is not None and value.isdigit():
            return int(value)
    return None


def _cpu_quota() -> float | None:
    """Cores that a container may use at most, on average; ``None`` without a limit."""
    words = (_read(_CGROUP / "cpu.max") or "").split()
    if not words:
        names = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
        words = [value for name in names if (value := _read(_CGROUP / name)) is not None]
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None  # "max 100000", or -1
    return int(words[0]) / int(words[1])


def _physical_cores() -> int | None:
    """Cores that do not share their arithmetic with another."""
    siblings = {_read(path) for path in _CPU.glob("cpu[0-9]*/topology/thread_siblings_list")}
    siblings.discard(None)
    return len(siblings) or None


def _clock() -> float | None:
    """MHz of the first core, now."""
    kilohertz = _read(_CPU / "cpu0/cpufreq/scaling_cur_freq")
    if kilohertz is not None and kilohertz.isdigit():
        return int(kilohertz) / 1000
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1])
    return None


def _gpu(device: str) -> dict[str, Any]:
    if device != "cuda" or not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "cuda": None, "cudnn": None, "tf32": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32},
    }


def _driver() -> str | None:
    text = _read(Path("/proc/driver/nvidia/version"))
    return None if text is None else text.splitlines()[0].removeprefix("NVRM version:").strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
