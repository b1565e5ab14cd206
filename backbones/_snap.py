"""What the checkpoints of Snap's two families have in common."""

from __future__ import annotations

from torch import Tensor

from effvit.errors import CheckpointError

#: Bias tables of Snap's detectors and segmenters, beside which their files keep the classifier's, unused.
DENSE_TABLE = "attention_biases_seg"


def check_dense_table(network: str, key: str, table: Tensor, official_grid: int | None) -> None:
    """Refuses a table of a dense file that is not the network's own.

    Args:
        network: Its name.
        key: Name of an entry; any that is not a `DENSE_TABLE` passes.
        table: ``(heads, R * R)``.
        official_grid: What the network was built with.

    Raises:
        CheckpointError: With the grid that the file was made for.
    """
    if not key.endswith(DENSE_TABLE):
        return
    # The attention of a downsampling reads the finer map.
    side = round(table.shape[-1] ** 0.5) // (2 if ".attn." in key else 1)
    built = "without official_grid" if official_grid is None else f"with official_grid={official_grid}"
    raise CheckpointError(
        f"{network}: these weights are of a dense network with attention biases for a nominal grid of {side}x{side} "
        f"cells ({key}), and this one was built {built}; build it with official_grid={side}"
    )
