"""What one network costs here and now: latency, throughput, peak memory, parameters, multiply-accumulates."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from effvit.deploy._fit import PeakOfTensors, is_out_of_memory, kept_tensors
from effvit.deploy.flops import count_macs
from effvit.deploy.records import Record, Subject
from effvit.deploy.statistics import summarise
from effvit.deploy.timing import time_in_rounds, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_log = logging.getLogger(__name__)

#: What ``peak_memory`` of the records is, by type of device; `effvit benchmark` measures a process on a CPU.
MEMORY_COUNTED = {
    "cpu": "tensors alive at once that a forward pass makes or keeps, without what operators use inside",
    "cuda": "what torch's allocator hands out at most during a forward pass, above weights and inputs",
}


def measure(
    subject: Subject,
    batches: Sequence[int],
    device: torch.device,
    precision: str,
    place: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> list[Record]:
    """Measures a network as it is, on the device where it is, all batch sizes in the same rounds.

    Args:
        subject: The network, in eval mode.
        batches: Batch sizes.
        device: Where it is.
        precision: What the records say of it.
        place: Puts inputs on that device.

    Returns:
        One record for each batch size; without figures where memory ran out.
    """
    calls = {batch: _Call(subject, batch, place) for batch in sorted(set(batches))}
    passes = {batch: _first_pass(call, device) for batch, call in calls.items()}
    fitting = {batch: call for batch, call in calls.items() if passes[batch].peak is not None}
    found = time_in_rounds(fitting, device.type)
    macs = next((count_macs(subject.module, *call.inputs) // batch for batch, call in fitting.items()), 0)
    params = sum(parameter.numel() for parameter in subject.module.parameters())
    records = []
    for batch in dict.fromkeys(batches):
        latency = summarise(found[batch]) if batch in found else None
        records.append(
            Record(
                model=subject.name,
                runtime="eager",
                precision=precision,
                device=device.type,
                threads=torch.get_num_threads(),
                batch=batch,
                asked_batch=batch,
                size=subject.size,
                latency=latency,
                throughput=batch / latency.median if latency else None,
                peak_memory=passes[batch].peak,
                params=params,
                macs=macs,
                error=None,
                agreement=None,
                prepare_seconds=None,
                speedup=None,
                note=passes[batch].note,
            )
        )
    return records


class _FirstPass(NamedTuple):
    """What is known before the clock runs.

    Attributes:
        peak: Bytes; ``None`` where memory ran out.
        note: What the record says of it.
    """

    peak: int | None
    note: str


def _first_pass(call: _Call, device: torch.device) -> _FirstPass:
    """Measures the memory of a pass, and warms up."""
    try:
        peak = _peak_memory(call, device)
        warm = warm_up(call, device.type)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("the hardware benchmark skips batches of %d images: memory ran out", call.batch)
        call.inputs = ()
        return _FirstPass(None, "memory ran out")
    settled = "" if warm.stable else f"its time had not settled after {warm.seconds:.0f} s of warming up"
    return _FirstPass(peak, settled)


class _Call:
    """One forward pass on inputs of its own.

    Attributes:
        batch: Images.
        inputs: What the network takes; empty until `make_inputs`.
    """

    def __init__(self, subject: Subject, batch: int, place: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> None:
        self.batch = batch
        self.inputs: tuple[Tensor, ...] = ()
        self._subject = subject
        self._place = place

    def make_inputs(self) -> None:
        """Also lets the network forget the tables that it keeps: each batch size is measured with its own."""
        self.inputs = self._place(self._subject.make_inputs(self.batch))
        self._subject.module.eval()

    def __call__(self) -> Any:
        return self._subject.module(*self.inputs)


def _peak_memory(call: _Call, device: torch.device) -> int:
    """Bytes that a forward pass adds to weights and inputs.

    Which bytes these are, `MEMORY_COUNTED` says.
    """
    call.make_inputs()
    kept = kept_tensors(call)  # on a GPU this also makes the workspaces of the libraries
    if device.type != "cuda":
        with PeakOfTensors() as live:
            call()
        return kept + int(live.peak)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return kept + torch.cuda.max_memory_allocated(device) - before
