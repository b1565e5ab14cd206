"""The program that `effvit.deploy.memory` runs: a fork for each variant, of a process that has only imported torch."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from effvit.deploy.memory import measure_here


def main(folder: Path) -> None:
    """Measures each variant of a folder in a process of its own.

    Args:
        folder: What ``effvit.deploy.memory.peak_memories`` has written.
    """
    # Forking is safe here: nothing has run yet that would have started threads.
    for number in range(len(torch.load(folder / "variants.pt", weights_only=False))):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                measure_here(folder, number)
                status = 0
            except Exception:  # noqa: BLE001 - the last line is what the parent tells
                traceback.print_exc()
            finally:
                os._exit(status)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
