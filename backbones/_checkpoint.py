"""Checkpoints of any origin, told apart by what they hold, and the report of what was loaded."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from effvit.backbones._contract import Backbone, Classifier
from effvit.backbones._registry import list_backbones, outline
from effvit.backbones._stand_ins import load_without_objects
from effvit.errors import CheckpointError

# Where the weights are inside a file, in this order: Lightning and MMDetection; the official repositories; averages;
# CVNets, whose averages are what it publishes.
_WRAPPERS = ("state_dict", "model", "module", "state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_NAMED = 5
#: All that an unpickler can run into where stand-ins are put to a use that they cannot take, or the file is hostile.
_BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class LoadReport:
    """What became of each entry of a checkpoint; names are the network's, those of `unexpected` the file's.

    Attributes:
        matched: Loaded, tables that were resized included.
        missing: In the network, not in the checkpoint.
        unexpected: In the checkpoint, not in the network.
        resized: Position tables that were made for another window or image size.
        mismatched: In both with another shape, and not loaded.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        """One line with the counts, and one more with the first names of each list that needs a look."""
        counts = f"{len(self.matched)} matched ({len(self.resized)} of them resized)"
        lines = []
        for title in ("missing", "mismatched", "unexpected"):
            names: tuple[str, ...] = getattr(self, title)
            counts += f", {len(names)} {title}"
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                lines.append(f"  {title}: {', '.join(names[:_NAMED])}{more}")
        return "\n".join([counts, *lines])


def load_checkpoint(network: Backbone | Classifier, path: str | Path, *, strict: bool = True) -> LoadReport:
    """Loads weights into a network.

    The file may be the family's official one, timm's, MMDetection's or ours: wrappers and prefixes are found by
    content. Position tables of another size are resized. A classifier's head is loaded where it fits and starts fresh
    otherwise.

    Args:
        network: A backbone, or a classifier on one; not fused.
        path: A safetensors file, or one of ``torch.save``.
        strict: Fail unless every entry of the trunk is loaded, and from a file for this network as it was built.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe to open or no checkpoint, or the trunk is not filled.
    """
    return load_state(network, read_checkpoint(path), path, strict=strict)


def load_state(
    network: Backbone | Classifier, state: Mapping[str, Tensor], source: str | Path, *, strict: bool = True
) -> LoadReport:
    """Loads what `read_checkpoint` gave, see `load_checkpoint`; `source` is named in messages."""
    backbone = network.backbone if isinstance(network, Classifier) else network
    report, values = _match(state, backbone, _targets(network))
    wrong = _required(network, backbone) & {*report.missing, *report.mismatched}
    # What may be absent may not be there in another shape.
    wrong |= {name for name in report.mismatched if name.startswith(backbone.fresh_allowed)}
    if strict and wrong:
        raise CheckpointError(f"{source} does not fill {backbone.info.name}: {_verdict(state, backbone)}.\n{report}")
    for key in report.unexpected if strict else ():
        backbone.check_unexpected(key, state[key])
    for prefix, part in _parts(network).items():
        own = part.state_dict().keys()
        part.load_state_dict({name: values[prefix + name] for name in own if prefix + name in values}, strict=False)
    return report


def has_distillation_head(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint holds a second head, which learned from a teacher."""
    return any(re.search(r"(^|\.)(head_dist|dist_head)\.", key) for key in state)


def open_checkpoint(path: str | Path) -> Any:
    """All that a checkpoint file holds, tensors on the CPU.

    Whether the file is a safetensors file or one of ``torch.save`` is read from its first bytes. Nothing in it is ever
    executed: a file that asks for more than tensors and plain containers is refused, but for what training programs are
    known to store beside them, such as MMDetection's logs, which come out as objects that can do nothing.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe to open, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(entry.name for entry in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        hint = f"; in {path.parent} there is: {', '.join(there[:_NAMED])}" if path.suffix and there else ""
        raise CheckpointError(f"there is no checkpoint file {path}{hint}")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if not start.startswith((_ZIP, _PICKLE)):
        raise CheckpointError(f"{path} is no checkpoint: neither a safetensors file nor one of torch.save")
    return _read_pickle(path, mmap=start.startswith(_ZIP))


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, out of their wrappers, prefixes kept.

    Raises:
        CheckpointError: The file cannot be opened, see `open_checkpoint`, or holds no weights.
    """
    content = open_checkpoint(path)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)} if _is_dict(content) else {}
    )
    if not state:
        raise CheckpointError(
            f"{path} holds no weights: a dictionary of tensors is expected, found {_describe(content)}"
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}); download or copy it again") from error


def _read_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        # The official training script stores its command line; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if _is_refusal(reason):
            return _read_beside_objects(path, reason, zipped=mmap)
        raise CheckpointError(
            f"{path} is damaged or incomplete, or no checkpoint ({reason.splitlines()[0]})"
        ) from error
    except Exception as error:  # cut off in mid-opcode, a pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or incomplete ({reason}); download or copy it again") from error


def _is_refusal(reason: str) -> bool:
    return "Unsupported" in reason or "GLOBAL" in reason or "was not an allowed global" in reason


def _read_beside_objects(path: Path, reason: str, *, zipped: bool) -> Any:
    """What a training program stored beside its logs, such as MMDetection's ``Runner``.

    A run of ours is refused even so: the hyperparameters that it is rebuilt from would not be what was stored.
    """
    content = None
    try:
        content = load_without_objects(path) if zipped else None
    except pickle.UnpicklingError as error:
        reason = str(error)
    except _BROKEN as error:
        reason = f"{reason} ({type(error).__name__})"
    if isinstance(content, Mapping) and "hyper_parameters" not in content:
        return content
    found = re.search(r"(?:GLOBAL|global:? ?)\s*([\w.]+)", reason)
    what = f" ({found[1]})" if found else ""
    raise CheckpointError(
        f"{path} holds Python objects{what} beside tensors. Opening them could run code, so the file is "
        "refused and nothing of it was executed. Save its state_dict alone, or as safetensors."
    ) from None


def _is_dict(content: Any) -> bool:
    return isinstance(content, Mapping)


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary with the keys {sorted(map(str, content))[:_NAMED]}"
    return f"an object of type {type(content).__name__}"


def _parts(network: Backbone | Classifier) -> dict[str, Module]:
    """The parts of a network by the prefix of their entries: trunk names are bare."""
    if not isinstance(network, Classifier):
        return {"": network}
    parts = {"": network.backbone, "head.": network.head, "head_dist.": network.head_dist}
    return {prefix: part for prefix, part in parts.items() if part is not None}


def _required(network: Backbone | Classifier, backbone: Backbone) -> set[str]:
    """The entries that a checkpoint must have: those of the trunk that the network reads."""
    optional = backbone.fresh_allowed + (() if isinstance(network, Classifier) else backbone.embed_only)
    return {name for name in backbone.state_dict() if not name.startswith(optional)}


def _targets(network: Backbone | Classifier) -> dict[str, Tensor]:
    """What a checkpoint can fill."""
    return {
        prefix + name: value for prefix, part in _parts(network).items() for name, value in part.state_dict().items()
    }


def _match(
    state: Mapping[str, Tensor], backbone: Backbone, targets: Mapping[str, Tensor]
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Sorts a file's entries, and the values to load by our name."""
    values: dict[str, Tensor] = {}
    unexpected, resized, mismatched = [], [], []
    prefix = _prefix(state, backbone, targets)
    for key, name in _names(state, backbone, prefix):
        if name is None:
            continue
        if name not in targets:
            unexpected.append(key)
            continue
        value, shape = state[key], targets[name].shape
        value = backbone.convert_value(key.removeprefix(prefix), value)
        if value.shape != shape:
            fitted = _fit(backbone, name, value, shape)
            if fitted is None:
                mismatched.append(name)
                continue
            if value.ndim == fitted.ndim:
                resized.append(name)
            value = fitted
        values[name] = value
    # Counters of seen batches only matter to cumulative averages, which no family uses; old files lack them.
    lost = {name for name in targets if not name.endswith("num_batches_tracked")} - values.keys() - {*mismatched}
    missing = [name for name in targets if name in lost]
    return LoadReport(tuple(values), tuple(missing), tuple(unexpected), tuple(resized), tuple(mismatched)), values


def _fit(backbone: Backbone, name: str, value: Tensor, shape: torch.Size) -> Tensor | None:
    """The value in the network's shape: one that only lacks or has sides of length 1, or a position table."""
    if [side for side in value.shape if side > 1] == [side for side in shape if side > 1]:
        return value.reshape(shape)
    return backbone.resize_table(name, value, shape)


def _prefix(state: Mapping[str, Tensor], backbone: Backbone, targets: Mapping[str, Tensor]) -> str:
    """The prefix under which most of the network is found.

    Raises:
        CheckpointError: It is there twice, as a student and its teacher are.
    """
    votes: Counter[str] = Counter()
    for key in state:
        for start in _starts(key):
            if backbone.convert_key(key[start:]) in targets:
                votes[key[:start]] += 1
    best = votes.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1] > len(targets) // 2:
        raise CheckpointError(
            f"the file holds two networks, under {best[0][0]!r} and under {best[1][0]!r}; save one of them alone"
        )
    return best[0][0] if best else ""


def _names(state: Mapping[str, Tensor], backbone: Backbone, prefix: str) -> list[tuple[str, str | None]]:
    """Each key with our name for it, after the prefix of the network."""
    # In a file of a whole classifier, the heads stand beside the trunk's prefix and not under it.
    around = prefix.removesuffix("backbone.")
    named: list[tuple[str, str | None]] = []
    for key in state:
        if key.startswith(prefix):
            named.append((key, backbone.convert_key(key.removeprefix(prefix))))
        elif key.startswith(around + "head"):
            named.append((key, backbone.convert_key(key.removeprefix(around))))
        else:
            named.append((key, key))
    return named


def _starts(key: str) -> list[int]:
    """Where a name could begin inside a key: at its start and after each dot."""
    return [0] + [position + 1 for position, letter in enumerate(key) if letter == "."]


def _verdict(state: Mapping[str, Tensor], backbone: Backbone) -> str:
    """Says which network the weights are of, where that can be told."""
    for name in list_backbones():
        other = outline(name)
        report, _ = _match(state, other, other.state_dict())
        if name != backbone.info.name and not _required(other, other) & {*report.missing, *report.mismatched}:
            return f"these look like the weights of {name}"
    return "these are not (all of) its weights"
