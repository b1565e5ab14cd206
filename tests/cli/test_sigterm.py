"""SIGTERM, as `timeout`, SLURM and containers send it, leaves no temporary folder behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effvit import cli

_LONG_VERB = """
import tempfile, time
from effvit import cli

def long(words):
    with tempfile.TemporaryDirectory(prefix="effvit_") as folder:
        print(folder, flush=True)
        time.sleep(60)

cli._VERBS["benchmark"] = long
cli.main(["benchmark"])
"""


def test_temporary_folders_are_removed():
    with subprocess.Popen([sys.executable, "-c", _LONG_VERB], stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.terminate()
        assert process.wait(30) == 143
    assert not folder.exists()


@pytest.mark.parametrize(("verb", "ours"), [("benchmark", True), ("export", True), ("fit", False), ("predict", False)])
def test_the_trainer_has_its_own_way_with_it(verb, ours, monkeypatch):
    before, seen = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setitem(cli._VERBS, verb, lambda _: seen.append(signal.getsignal(signal.SIGTERM)) or 0)
    with pytest.raises(SystemExit):
        cli.main([verb])
    assert (seen[0] is not before) == ours
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--rounds 2000 --no_memory", "--rounds 1 --seconds 0.01"])
def test_a_benchmark_is_ended(words, tmp_path):
    """While it times, and while the process that measures memory runs."""
    command = [sys.executable, "-m", "effvit", "benchmark", "efficientvit_m0@64", "--runtimes", "eager", *words.split()]
    wanted = "effvit_*" if "no_memory" in words else "effvit_memory_*"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "results")], env={**os.environ, "TMPDIR": str(temporary)}
    )
    for _ in range(1200):
        if list(temporary.glob(wanted)):
            break
        time.sleep(0.1)
    else:
        process.kill()
        pytest.fail("it has made no folder")
    time.sleep(1)
    process.terminate()
    assert process.wait(30) == 143
    assert not list(temporary.glob("effvit_*"))
