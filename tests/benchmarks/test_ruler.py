"""The ruler measures what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ruler():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "_ruler.py"
    spec = importlib.util.spec_from_file_location("_ruler", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_ruler"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["_ruler"]


def spin(count):
    return lambda: sum(range(count))


def test_ratio_is_the_work_done(ruler):
    found = ruler.measure("sums", {"base": spin(40_000), "double": spin(80_000)}, items=4, rounds=5, slot=0.02)
    base, double = found.results
    assert (base.ratio, base.ratio_range) == (1.0, (1.0, 1.0))
    assert double.ratio == pytest.approx(0.5, abs=0.15)
    assert double.ratio_range[0] <= double.ratio <= double.ratio_range[1]
    assert base.cpu_rate > 0
    assert json.loads(found.to_json())["results"][1]["name"] == "double"
    table = ruler.to_markdown([found], unit="sums").splitlines()
    assert table[0] == "|  | base (sums per CPU second) | double |"
    assert table[2].startswith("| sums | ")


def test_environment_states_the_allocator(ruler, monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")
    found = ruler.environment()
    assert "MALLOC_TOP_PAD_=268435456" in found["allocator"]
    assert {"cpu", "torch", "threads"} <= set(found)


def test_peak_memory_is_what_the_calls_add(ruler):
    megabytes = ruler._peak_here(allocate, (50_000_000,))
    assert 45 < megabytes < 80


def allocate(size):
    kept = bytearray(100_000_000)  # exists before the calls, and is not counted
    return lambda: bytearray(size).count(1) + len(kept)
