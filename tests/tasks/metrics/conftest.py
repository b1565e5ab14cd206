"""Two processes for the tests of metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def play_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """``play_on_two_ranks(file)``: runs a test file as a script, once for each of two ranks.

    The script gets its rank and a folder to meet in, and leaves ``<rank>.json`` there; the contents come back.
    """

    def play(file: str) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen([sys.executable, file, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        try:
            for worker in workers:
                _, errors = worker.communicate(timeout=120)
                assert worker.returncode == 0, errors.decode()
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]

    return play
