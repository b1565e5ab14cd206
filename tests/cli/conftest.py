"""Runs of the command line that several tests look at."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from effvit.cli import main

#: A detector and scenes small enough to train in seconds; what it learns is not the point here.
TINY = (
    "--model.pyramid_channels 16 --model.head_convs 1 --data.num_train 24 --data.num_val 6 --data.scene_size 64 "
    "--data.batch_size 4 --data.num_workers 0"
).split()


def run(*words: str) -> SimpleNamespace:
    """One command in this process: ``code``, ``out`` and ``err``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return SimpleNamespace(code=ended.value.code, out=out.getvalue(), err=err.getvalue())


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """One command in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "effvit", *map(str, words)]
    return subprocess.Popen(
        command, cwd=cwd, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished two-epoch run with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run("fit", "-c", "detection/digits", *TINY, "--trainer.max_epochs", "2", "--run_dir", folder)
    assert done.code == 0, done.err
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Training loss at each step, from the CSV logs of a run and of its continuations, oldest first."""
    import csv

    found: dict[int, float] = {}
    for path in [folder / "logs" / "metrics.csv", *sorted((folder / "logs").glob("*/metrics.csv"))]:
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get("train/loss"):
                    found[int(row["step"])] = float(row["train/loss"])
    return found


@pytest.fixture(scope="session")
def cli() -> SimpleNamespace:
    """``run``, ``start``, ``losses`` and the options ``tiny``."""
    return SimpleNamespace(run=run, start=start, losses=losses, tiny=TINY)
