"""What one forward pass needs: multiply-accumulates, memory; and whether a batch fits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effvit.deploy.environment import available_memory

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # torch on a CPU
    "out of memory",
    "not enough memory",
    "Failed to allocate memory",  # ONNX Runtime
    "bad_alloc",
)
_MORE = 1.5  # kernels take memory of their own, and allocators keep pieces
_TRIES = 3  # between a batch that fits and one that does not: each makes everything ready once more


class PeakOfTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made inside take at one time.

    Attributes:
        peak: In bytes.
        now: Bytes of those that are alive.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self.now: int = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls `func` and notes what memory is new."""
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), given)
        return found

    def _note(self, storage: Any, given: set[int]) -> None:
        if id(storage) in given or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def kept_tensors(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that a call makes and somebody keeps, such as tables for the shape of a map.

    Args:
        call: A network's first forward pass; what it returns is let go of.
    """
    with PeakOfTensors() as live:
        call()
    return int(live.now)


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bytes_at(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with torch.no_grad(), PeakOfTensors() as mode:
        module(*inputs)
    return int(mode.peak) + tensor_bytes(inputs)


def fitting_batch(module: nn.Module, make_inputs: Callable[[int], tuple[Tensor, ...]], asked: int, copies: int) -> int:
    """The largest batch up to what was asked for that this machine's memory seems to hold.

    The system ends a process that takes more than there is (Linux) without an error that could be caught, so this is
    told before, from batches of one and two images.

    Args:
        module: The network on the CPU.
        make_inputs: Batch size to what its ``forward`` takes.
        asked: Images that were asked for.
        copies: How many runtimes hold what they need at the same time.
    """
    available = available_memory()
    if asked <= 2 or available is None:
        return asked
    one, two = (_bytes_at(module, make_inputs(batch)) for batch in (1, 2))
    more = (available / (_MORE * copies) - one) / max(two - one, 1)
    return max(1, min(asked, 1 + int(more)))


def largest_fitting(asked: int, fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, as found by trying: by halves until one does, then between it and the last failure.

    Args:
        asked: Images that were asked for.
        fits: Tries a batch; its last call, which succeeded, was with the result. A batch of 1 that does not fit is for
            it to raise.

    Returns:
        `asked`, or at most an eighth less than could be.
    """
    batch, failed = asked, asked
    while not fits(batch):
        failed, batch = batch, batch // 2
    last = batch
    for _ in range(_TRIES):
        if failed - batch <= 1:
            break
        last = (batch + failed) // 2
        if fits(last):
            batch = last
        else:
            failed = last
    return batch if last == batch or fits(batch) else largest_fitting(batch // 2, fits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that there was not enough memory."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _OUT_OF_MEMORY):
            return True
        seen = seen.__cause__
    return False
