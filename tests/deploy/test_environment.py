"""What is read off the machine, and that nothing has to be there."""

from __future__ import annotations

import json
import os

import pytest
import torch

from effvit.deploy import environment as room
from effvit.deploy.environment import (
    available_memory,
    environment,
    peak_resident_memory,
    resident_memory,
    total_memory,
    trim_memory,
)


def test_everything_is_plain():
    found = json.loads(json.dumps(environment("cpu", 3)))
    assert found["threads"] == 3
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert found["processor"]
    assert 1 <= found["cores"]["usable"] <= found["cores"]["logical"] == os.cpu_count()
    assert found["packages"]["torchvision"]
    assert found["gpu"] is None
    assert found["time"].endswith("+00:00")


def test_the_allocators_settings_are_stated(monkeypatch):
    monkeypatch.delenv("EFFVIT_ALLOCATOR", raising=False)
    assert environment("cpu", 1)["allocator"].endswith("default settings")
    monkeypatch.setenv("EFFVIT_ALLOCATOR", "tuned")
    assert environment("cpu", 1)["allocator"].endswith(", tuned")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")
    assert "MALLOC_TOP_PAD_=268435456" in environment("cpu", 1)["allocator"]


def test_a_system_without_these_files_is_described_too(monkeypatch):
    """As macOS, which has neither /proc nor /sys."""
    monkeypatch.setattr(room, "_read", lambda path: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    monkeypatch.setattr(room, "_CPU", room.Path("/nowhere"))
    found = environment("cpu", 1)
    for name in ("governor", "clock_mhz", "memory", "memory_available", "cpu_quota", "load_before"):
        assert found[name] is None
    assert found["cores"] == {"physical": None, "logical": os.cpu_count(), "usable": os.cpu_count()}
    assert resident_memory() == 0


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files below a folder that stands for /sys/fs/cgroup, /sys/devices/system/cpu and /proc."""
    for name, folder in (("_CGROUP", "cgroup"), ("_CPU", "cpu"), ("_MEMINFO", "meminfo")):
        monkeypatch.setattr(room, name, tmp_path / folder)

    def write(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def test_memory_of_a_container(system):
    system(meminfo="MemTotal: 1000 kB\nMemAvailable: 600 kB\n")
    assert (total_memory(), available_memory()) == (1_024_000, 614_400)
    for name in ("memory.max", "memory.current"):
        (room._CGROUP / name).parent.mkdir(exist_ok=True)
    (room._CGROUP / "memory.max").write_text("500000\n")
    (room._CGROUP / "memory.current").write_text("100000\n")
    assert (total_memory(), available_memory()) == (500_000, 400_000)
    (room._CGROUP / "memory.max").write_text("max\n")
    assert (total_memory(), available_memory()) == (1_024_000, 614_400)


def test_memory_of_an_older_container(system):
    system(
        meminfo="MemTotal: 1000 kB\nMemAvailable: 600 kB\n",
        cgroup__memory__placeholder="",
    )
    (room._CGROUP / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")  # no limit
    (room._CGROUP / "memory" / "memory.usage_in_bytes").write_text("5")
    assert total_memory() == 1_024_000
    (room._CGROUP / "memory" / "memory.limit_in_bytes").write_text("300")
    assert (total_memory(), available_memory()) == (300, 295)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_share_of_the_processor_of_a_container(system, files, quota):
    for name, content in files.items():
        path = room._CGROUP / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert environment("cpu", 1)["cpu_quota"] == quota


def test_governor_clock_and_cores(system):
    system(cpu__cpu0__cpufreq__scaling_governor="powersave\n", cpu__cpu0__cpufreq__scaling_cur_freq="2900000\n")
    for core, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        system(**{f"cpu__cpu{core}__topology__thread_siblings_list": siblings})
    found = environment("cpu", 1)
    assert (found["governor"], found["clock_mhz"], found["cores"]["physical"]) == ("powersave", 2900.0, 2)


@pytest.mark.skipif(not room.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_resident_memory_grows_with_what_is_held():
    trim_memory()  # or what tests before have freed, and an allocator that was tuned has kept, is filled first
    before = resident_memory()
    held = bytearray(b"x") * 100_000_000
    assert 80_000_000 < resident_memory() - before < 140_000_000
    assert peak_resident_memory() >= resident_memory() - 1_000_000
    assert len(held) == 100_000_000


@pytest.mark.gpu
def test_the_gpu_is_described():
    found = environment("cuda", 1)
    assert "GiB" in found["gpu"]
    assert found["cuda"]
