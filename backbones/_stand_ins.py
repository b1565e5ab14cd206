"""Opening checkpoints that hold harmless objects of other packages beside their tensors, without any of their code.

MMDetection's ``Runner`` writes its log buffers and numpy scalars into each file. They are of no use here, and making
them would run code of those packages; torch's own restricted unpickler cannot pass over them. So every such object
becomes a `_StandIn`, which does nothing, and only tensors and plain containers become what they are.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # by pickle's protocol 2, which torch.save uses
#: Packages and names whose objects files are known to hold. Any other name makes a file suspicious: it is refused.
_PACKAGES = {"addict", "argparse", "datetime", "mmcv", "mmdet", "mmengine", "numpy", "pathlib"}
_NAMES = {
    ("_codecs", "encode"),  # bytes of numpy
    ("builtins", "frozenset"),
    ("builtins", "getattr"),  # methods of a log buffer
    ("builtins", "set"),
    ("builtins", "slice"),
    ("collections", "Counter"),
    ("collections", "defaultdict"),
    ("collections", "deque"),
    ("copyreg", "_reconstructor"),
}


class _Maker:
    """Calls a function or class without showing it.

    An unpickler may set the attributes of whatever it is given, such as the defaults of a function of torch, for the
    rest of the process. Here there is nothing to set.
    """

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: object) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the file sets {name} of what it is read with")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the file changes what it is read with")


_REAL = {
    ("collections", "OrderedDict"): _Maker(OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(torch._utils._rebuild_tensor_v2),  # noqa: SLF001 - of torch.save
    ("torch._utils", "_rebuild_parameter"): _Maker(torch._utils._rebuild_parameter),  # noqa: SLF001
    ("torch", "Size"): _Maker(torch.Size),
    ("torch", "device"): _Maker(torch.device),
}


class _StandIn:
    """Takes whatever an unpickler does to an object or calls as a function, and does nothing."""

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def __call__(self, *_args: object, **_options: object) -> _StandIn:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """Ignores an element."""

    def extend(self, values: object) -> None:
        """Ignores elements."""

    def add(self, value: object) -> None:
        """Ignores an element."""


class _Unpickler(pickle.Unpickler):
    """Finds nothing but the parts of tensors, plain containers, and stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of that name, or what stands for it.

        Raises:
            pickle.UnpicklingError: The name has no place in a checkpoint.
        """
        module = _RENAMED.get(module, module)
        if (module, name) in _REAL:
            return _REAL[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] in _PACKAGES or (module, name) in _NAMES:
            return _StandIn
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")


def load_without_objects(path: Path) -> Any:
    """All that a zip file of ``torch.save`` holds, tensors on the CPU, with stand-ins for other packages' objects.

    Raises:
        pickle.UnpicklingError: It asks for objects that no training program is known to store, changes what it is read
            with, or is a program of TorchScript.
    """
    # torch's own reader of the archive, which decides in the same way: such a file would go to torch.jit.load.
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():  # noqa: SLF001
        raise pickle.UnpicklingError("Unsupported: a program of TorchScript")
    module = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler)  # all that torch reads of pickle's
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module, mmap=True)
