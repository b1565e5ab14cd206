"""Opening an exported file, and running it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effvit.deploy._formats_source import Run
from effvit.deploy.formats import FORMATS, Format, check_installed
from effvit.errors import ConfigError, ExportError

_HOW = "make one with `effvit export --checkpoint best.ckpt --format onnx`"


@dataclass(frozen=True)
class Exported:
    """An exported file that can be run.

    Attributes:
        path: Where it lies.
        format: Name of its format.
        metadata: All that was stored with it: task, categories, thresholds, versions, how close to its source it is.
    """

    path: Path
    format: str
    metadata: Mapping[str, Any]
    _run: Run

    @property
    def tolerance(self) -> float:
        """Largest error that counts as rounding, see `Format`."""
        return FORMATS[self.format].tolerance

    @property
    def input_names(self) -> tuple[str, ...]:
        """What it takes, images first."""
        return tuple(entry["name"] for entry in self.metadata["inputs"])

    @property
    def output_names(self) -> tuple[str, ...]:
        """What it returns, in that order."""
        return tuple(self.metadata["output_names"])

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images in pixels; ``None`` for any that `sides` has."""
        size = self.metadata["size"]
        return None if size is None else (size[0], size[1])

    @property
    def sides(self) -> range | None:
        """Heights and widths that its images may have; ``None`` where they have one `size`."""
        sides = self.metadata.get("sides")
        return None if sides is None else range(sides["least"], sides["most"] + 1, sides["step"])

    @property
    def batch(self) -> int | None:
        """Images that it takes at a time; ``None`` for any number."""
        batch: int | None = self.metadata["batch"]
        return batch

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """One forward pass.

        Args:
            *tensors: What `input_names` names, images first: ``(B, 3, H, W)`` uint8, RGB.

        Returns:
            What `output_names` names, on the CPU.

        Raises:
            ConfigError: Other inputs than the file takes.
        """
        entries = self.metadata["inputs"]
        if len(tensors) != len(entries):
            raise ConfigError(f"{self.path} takes {len(entries)} inputs {self.input_names}, not {len(tensors)}")
        for entry, tensor in zip(entries, tensors, strict=True):
            self._check_input(entry, tensor)
        self._check_sides(tensors[0])
        return self._run([tensor.detach().cpu().contiguous() for tensor in tensors])

    def _check_input(self, entry: Mapping[str, Any], tensor: Tensor) -> None:
        wanted, shape = entry["shape"], tuple(tensor.shape)
        fits = len(wanted) == len(shape) and all(
            side in (None, given) for side, given in zip(wanted, shape, strict=True)
        )
        if not fits:
            words = ", ".join("any" if side is None else str(side) for side in wanted)
            raise ConfigError(f"{self.path}: {entry['name']} must have the shape ({words}), not {shape}")
        if str(tensor.dtype) != f"torch.{entry['dtype']}":
            raise ConfigError(f"{self.path}: {entry['name']} must be {entry['dtype']}, not {tensor.dtype}")

    def _check_sides(self, images: Tensor) -> None:
        sides = self.sides
        if sides is not None and not all(side in sides for side in images.shape[2:]):
            height, width = images.shape[2:]
            raise ConfigError(
                f"{self.path} takes images whose height and width are multiples of {sides.step} from {sides[0]} to "
                f"{sides[-1]} pixels, not {height} x {width}: pad them at the bottom and at the right, or resize them"
            )


def open_exported(path: str | Path, threads: int | None = None) -> Exported:
    """Opens a file that `export` wrote.

    Trust: files of ONNX, OpenVINO, CoreML and ExecuTorch are data for their runtimes, and those of TorchScript are
    programs of torch's own operators: nothing in them is unpickled. A ``.pt2`` package is machine code, which runs with
    all your rights as soon as it is loaded: open only those that you trust as you would a program.

    Args:
        path: The file (or folder, of CoreML). Its format is told by its suffix, otherwise by its content.
        threads: Threads that it is to use; ``None`` for the runtime's own choice. For TorchScript and pt2 this sets the
            threads of torch in the whole process. ExecuTorch and CoreML decide themselves.

    Returns:
        The opened file.

    Raises:
        ConfigError: There is no such file, or its runtime is not installed or not of this operating system.
        ExportError: It is damaged, or not written by effvit.
    """
    path = Path(path)
    entry, metadata = _read(path)
    if not entry.runs_here():
        raise ConfigError(f"{path}: {entry.name} runs on macOS only; it can be written, but not run here")
    try:
        run = entry.open(path, threads)
    except Exception as error:  # whatever a runtime raises on a damaged file
        raise _damaged(path, entry, error) from error
    return Exported(path, entry.name, metadata, run)


def metadata_of(path: str | Path) -> dict[str, Any]:
    """The metadata of an exported file, without running anything of it; also of a format that does not run here.

    Raises:
        ConfigError: As `open_exported`.
        ExportError: As `open_exported`.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[Format, dict[str, Any]]:
    if not path.exists():
        raise ConfigError(f"there is no exported model at {path}: {_HOW}")
    entry = _format_by_content(path)
    check_installed(entry, entry.readers)
    try:
        text = entry.metadata(path)
        metadata = None if text is None else json.loads(text)
    except Exception as error:  # whatever a runtime raises on a damaged file
        raise _damaged(path, entry, error) from error
    if not isinstance(metadata, dict) or not {"inputs", "output_names", "size", "batch"} <= metadata.keys():
        raise ExportError(
            f"{path} is a file of {entry.name} but not one of effvit's: it does not say its inputs and classes; {_HOW}"
        )
    return entry, metadata


def _damaged(path: Path, entry: Format, error: Exception) -> ExportError:
    weights = path.with_suffix(".bin")
    if entry.name == "openvino" and not weights.is_file():
        return ExportError(f"{path} has its weights in {weights.name}, which is not beside it: copy both files")
    words = " ".join(str(error).split())[:300]
    return ExportError(f"{path} cannot be opened as {entry.name}, it is damaged or cut off ({words}): export it again")


def _format_by_content(path: Path) -> Format:
    for entry in FORMATS.values():
        if path.suffix == entry.suffix:
            return entry
    name = _sniff(path)
    if name is not None:
        return FORMATS[name]
    suffixes = ", ".join(entry.suffix for entry in FORMATS.values())
    raise ExportError(f"{path} is not an exported model: expected {suffixes}. {_HOW.capitalize()}")


def _sniff(path: Path) -> str | None:
    """The format of a file with a foreign suffix, such as TorchScript's usual ``.pt``."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    folders: dict[str, Sequence[str]] = {"torchscript": ("code",), "pt2": ("data", "aotinductor")}
    for name, parts in folders.items():
        if any(tuple(entry.split("/")[1 : 1 + len(parts)]) == tuple(parts) for entry in names):
            return name
    return None
