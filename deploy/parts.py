"""What the parts of a network take of one forward pass, measured where they are: inside the whole."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from effvit.deploy._structure import topmost_called
from effvit.deploy.timing import warm_up
from effvit.errors import ConfigError, close_matches

_LEAST = 3  # passes: the median of two is their mean

#: What comes before the first part and after it, see `time_parts`.
BEFORE, REST = "pre-processing", "post-processing"


def time_parts(
    module: nn.Module,
    inputs: Sequence[Tensor],
    parts: Mapping[str, Sequence[str]],
    *,
    device: str = "cpu",
    seconds: float = 1.0,
) -> dict[str, float]:
    """Median seconds that each part of a network takes of its forward pass.

    Times are exclusive: of a part inside another, the outer one counts what is left. What runs in no part is
    ``pre-processing`` before the first part starts and ``post-processing`` after that, so that all entries together are
    the whole pass. On a GPU borders are events in its own queue, which nothing waits for.

    Args:
        module: The network in eval mode, on `device`.
        inputs: What its ``forward`` takes, on `device`.
        parts: Names of submodules by part, such as ``{"backbone": ("pyramid.backbone",), "pyramid": ("pyramid",)}``. A
            submodule that is never called itself, such as a ``ModuleDict``, stands for those inside that are.
        device: ``cpu`` or ``cuda``.
        seconds: How long to measure, after a warm-up; there are at least three passes.

    Returns:
        Seconds of ``pre-processing``, of each part in the order of `parts`, and of ``post-processing``.

    Raises:
        ConfigError: A submodule that does not exist or that the pass never calls, one that is in two parts, or a part
            with the name of what is left.
    """
    with torch.no_grad():
        owners = _owners(module, parts, called_in(module, inputs))
        rows = timed_passes(module, inputs, owners, device=device, seconds=seconds)
    return {name: statistics.median(row[name] for row in rows) for name in (BEFORE, *parts, REST)}


def called_in(module: nn.Module, inputs: Sequence[Tensor]) -> set[nn.Module]:
    """The submodules, itself included, that one forward pass calls as modules, by a pass that sees to it."""
    called: set[nn.Module] = set()
    handles = [
        submodule.register_forward_pre_hook(lambda own, _: called.add(own))  # returns None: the inputs stay
        for submodule in module.modules()
    ]
    with _removed(handles), torch.no_grad():
        module(*inputs)
    return called


def timed_passes(
    module: nn.Module,
    inputs: Sequence[Tensor],
    owners: Mapping[nn.Module, str],
    *,
    device: str,
    seconds: float,
) -> list[dict[str, float]]:
    """Exclusive seconds of each pass by part, `BEFORE` and `REST` included.

    Args:
        module: The network, on `device`.
        inputs: What its ``forward`` takes.
        owners: The part that each submodule belongs to.
        device: ``cpu`` or ``cuda``.
        seconds: How long to measure, after a warm-up; there are at least three passes.
    """
    clock = _Clock(device)
    rows: list[dict[str, float]] = []
    with clock.watching(owners), torch.no_grad():
        warm_up(lambda: clock.time(lambda: module(*inputs)), device)
        end = time.perf_counter() + seconds
        while len(rows) < _LEAST or time.perf_counter() < end:
            rows.append(clock.time(lambda: module(*inputs)))
    return rows


class _Clock:
    """Borders between the parts of a pass: when each was crossed, and whose time begins there."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._borders: list[tuple[Any, str]] = []
        self._open: list[str] = []

    @contextmanager
    def watching(self, owners: Mapping[nn.Module, str]) -> Iterator[None]:
        """Hooks on the submodules while the context lasts, removed also after an error."""
        handles: list[RemovableHandle] = []
        with _removed(handles):
            for submodule, owner in owners.items():
                # After the pre-hooks and before the hooks that others may have put there: those are not the part.
                handles.append(submodule.register_forward_pre_hook(self._enter(owner)))
                handles.append(submodule.register_forward_hook(self._leave, prepend=True))
            yield

    def time(self, run: Callable[[], object]) -> dict[str, float]:
        """Exclusive seconds of one pass by part."""
        self._borders, self._open = [], [REST]
        self._cross(BEFORE)
        run()
        self._cross(REST)
        return self._seconds()

    def _enter(self, owner: str) -> Callable[[nn.Module, Any], None]:
        def enter(_: nn.Module, __: Any) -> None:
            self._open.append(owner)
            self._cross(owner)

        return enter

    def _leave(self, *_: object) -> None:
        self._open.pop()
        self._cross(self._open[-1])

    def _cross(self, owner: str) -> None:
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        else:
            now = time.perf_counter()
        self._borders.append((now, owner))

    def _seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (start, owner), (end, _) in zip(self._borders, self._borders[1:], strict=False):
            seconds[owner] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        return seconds


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(module: nn.Module, parts: Mapping[str, Sequence[str]], called: set[nn.Module]) -> dict[nn.Module, str]:
    """The part of each submodule that is to be watched."""
    owners: dict[nn.Module, str] = {}
    known = dict(module.named_modules())
    for part, names in parts.items():
        if part in (BEFORE, REST):
            raise ConfigError(
                f"{part!r} is what time_parts calls the time outside all parts: give the part another name"
            )
        for name in names:
            for submodule in _watched(known, name, part, called):
                if owners.setdefault(submodule, part) != part:
                    raise ConfigError(f"the submodule {name!r} is in two parts, {owners[submodule]!r} and {part!r}")
    return owners


def _watched(known: Mapping[str, nn.Module], name: str, part: str, called: set[nn.Module]) -> list[nn.Module]:
    if name not in known:
        raise ConfigError(
            f"part {part!r}: {type(known['']).__name__} has no submodule {name!r}. "
            + close_matches(name, list(known)[1:])
        )
    watched = list(topmost_called(known[name], called))
    if not watched:
        raise ConfigError(
            f"part {part!r}: the forward pass never calls the submodule {name!r} or one inside it as a module, so that "
            "its time cannot be told from the rest"
        )
    return watched
