"""The stages and the blocks of any network, found by the names that networks give them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_STAGES = ("stages", "blocks", "layers", "features")
_NUMBERED = re.compile(r"(stage|layer|block|s)_?\d+")  # ResNet's layer1, HRNet's stage1, RegNet's s1


def stages_of(module: nn.Module, called: set[nn.Module]) -> dict[str, list[nn.Module]]:
    """The modules of each stage, in the order of the network, and of what it has around its stages.

    Stages are the children of the backbone, those of its lists one by one: ``stem``, ``stages.0``, ... ``norm``. After
    them come the modules that hold the backbone, which answer for what is left of them, and those beside it:
    ``backbone``, ``pyramid``, ``head``. A network whose backbone shows no stages gives its direct children.

    Args:
        module: The network.
        called: What a forward pass calls as modules; of a stage that it does not call, the highest inside that it does.
    """
    found: dict[str, list[nn.Module]] = {}
    path = _trunk(module)
    for name, child in module.get_submodule(path).named_children():
        within = child.named_children() if _holds_stages(name, child) else [("", child)]
        found.update({f"{name}.{inner}".rstrip("."): list(topmost_called(stage, called)) for inner, stage in within})
    for holder, name, child in _around(module, path):
        if f"{name}." in f"{path}.":
            modules = [child] if child in called else []
        elif all(map(_is_plain, child.modules())) and holder in called and holder is not module:
            modules = []  # layers of its own: that is its time
        else:
            modules = list(topmost_called(child, called))
        found[_short(name, found)] = modules
    return {name: modules for name, modules in found.items() if modules}


def blocks_of(module: nn.Module, called: set[nn.Module]) -> dict[nn.Module, str]:
    """The type of each block, its class's name, and of the modules that hold blocks, which answer for the rest.

    A block is the topmost module below the stages, or beside the backbone, that is of a class of its own, no layer or
    container of torch's.

    Args:
        module: The network.
        called: What a forward pass calls as modules.
    """
    path = _trunk(module)
    holders = {module, *(holder for holder in _ancestors(module, path))}
    blocks = {module: type(module).__name__}
    for child in module.children():
        _add_blocks(child, holders, called, blocks)
    return blocks


def _add_blocks(
    module: nn.Module, holders: set[nn.Module], called: set[nn.Module], blocks: dict[nn.Module, str]
) -> None:
    plain = _is_plain(module)
    if not plain and module in called:
        blocks[module] = type(module).__name__
    if plain or module in holders or module not in called or _has_stages(module):
        for child in module.children():
            _add_blocks(child, holders, called, blocks)


def _trunk(module: nn.Module) -> str:
    """Path of the module whose children are the stages: the outermost in something called backbone, or at all."""
    found = [name for name, submodule in module.named_modules() if _has_stages(submodule)]
    return min(found, key=lambda name: ("backbone" not in name.split("."), name.count(".") + bool(name)), default="")


def _has_stages(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return any(_holds_stages(name, child) for name, child in children.items()) or _numbered(children) > 1


def _holds_stages(name: str, child: nn.Module) -> bool:
    return name in _STAGES and isinstance(child, _CONTAINERS) and len(child) > 0


def _numbered(children: Mapping[str, nn.Module]) -> int:
    return sum(_NUMBERED.fullmatch(name) is not None for name in children)


def _ancestors(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way to `path`, that one included."""
    for name in filter(None, path.split(".")):
        module = module.get_submodule(name)
        yield module


def _around(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Holder, path and module of what holds the trunk and of what lies beside it, the innermost first."""
    steps = path.split(".") if path else []
    for depth in reversed(range(len(steps))):
        prefix = ".".join(steps[:depth])
        holder = module.get_submodule(prefix)
        for name, child in sorted(holder.named_children(), key=lambda pair: pair[0] != steps[depth]):
            yield holder, f"{prefix}.{name}".lstrip("."), child


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a layer or a container of torch's."""
    return type(module).__module__.startswith("torch.nn.")


def topmost_called(module: nn.Module, called: set[nn.Module]) -> Iterator[nn.Module]:
    """The module itself where it is called, or else the highest inside that are."""
    if module in called:
        yield module
    else:
        for child in module.children():
            yield from topmost_called(child, called)


def _short(path: str, taken: Mapping[str, object]) -> str:
    last = path.rpartition(".")[2]
    return path if last in taken else last
