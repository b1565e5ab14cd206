"""Writing a checkpoint so that no reader ever sees half of it, and reading it without running what it holds."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from effvit.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files on a local or mounted file system.

    Lightning 2.6 builds the whole file in memory, writes it to ``/tmp`` and moves it, which is a copy where ``/tmp`` is
    another file system: a kill in that moment leaves half a file, and a small ``/tmp`` fills up. Here the file is
    written beside its target, flushed to the disk and renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes ``path`` whole or not at all.

        Raises:
            TypeError: ``storage_options`` is given, which this class has no use for.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,  # noqa: ARG002 - never anything but True
    ) -> dict[str, Any]:
        """Opens ``path`` with ``weights_only=True``, whatever the caller asks for.

        Raises:
            CheckpointError: The file is missing or damaged, or would run code.
        """
        try:
            content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"cannot resume from {path}: {reason} The file is missing, damaged, or not a plain checkpoint; use "
                "the best.ckpt or last.ckpt of a run."
            ) from error
        return content
