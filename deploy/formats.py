"""The formats that a trained network can be exported to, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effvit.deploy import _formats_mobile as mobile
from effvit.deploy import _formats_onnx as onnx
from effvit.deploy import _formats_torch as own
from effvit.deploy._formats_source import Run, Source
from effvit.deploy._installed import check_compiler, missing
from effvit.errors import ConfigError, close_matches

_ALL_TASKS = ("classification", "detection", "segmentation")
#: Those without a suppression of duplicates.
_PLAIN_TASKS = ("classification", "segmentation")


def _everywhere() -> bool:
    return True


@dataclass(frozen=True)
class Format:
    """One kind of file, and what it can do.

    Attributes:
        name: What the command line calls it.
        description: One line for tables.
        suffix: Of its files.
        extra: The extra of our package that brings what it needs; ``None`` where torch is enough.
        modules: What has to be importable to write it.
        readers: What has to be importable to run it.
        tasks: Tasks whose networks it can hold.
        dynamic_batch: Tasks of which a file can take any number of images.
        dynamic_size: Tasks of which a file can take images of any size; the network has to as well.
        tolerance: Largest difference from the source that counts as rounding, relative to the largest value of an
            output.
        write: ``(source, path, metadata)`` writes the file or files.
        attach: ``(path, metadata)`` replaces the metadata; ``None`` where a finished file cannot be changed.
        metadata: ``(path)`` reads the metadata; ``None`` where the file has none of ours.
        open: ``(path, threads)`` loads it, see `Run`.
        runs_here: Whether this machine's operating system can run it.
    """

    name: str
    description: str
    suffix: str
    extra: str | None
    modules: tuple[str, ...]
    readers: tuple[str, ...]
    tasks: tuple[str, ...]
    dynamic_batch: tuple[str, ...]
    dynamic_size: tuple[str, ...]
    tolerance: float
    write: Callable[[Source, Path, str], None]
    attach: Callable[[Path, str], None] | None
    metadata: Callable[[Path], str | None]
    open: Callable[[Path, int | None], Run]
    runs_here: Callable[[], bool] = _everywhere


_TABLE = (
    Format(
        name="onnx",
        description="ONNX, for ONNX Runtime and most other runtimes",
        suffix=".onnx",
        extra="onnx",
        modules=("onnx", "onnxscript", "onnxruntime"),
        readers=("onnxruntime",),
        tasks=_ALL_TASKS,
        dynamic_batch=_ALL_TASKS,
        dynamic_size=_ALL_TASKS,
        tolerance=1e-4,
        write=onnx.write_onnx,
        attach=onnx.attach_onnx,
        metadata=onnx.metadata_of_onnx,
        open=onnx.open_onnx,
    ),
    Format(
        name="openvino",
        description="OpenVINO IR: NAME.xml and, beside it, NAME.bin",
        suffix=".xml",
        extra="openvino",
        modules=("openvino", "onnx", "onnxscript"),
        readers=("openvino",),
        tasks=_ALL_TASKS,
        dynamic_batch=_ALL_TASKS,
        dynamic_size=_ALL_TASKS,
        tolerance=1e-4,
        write=onnx.write_openvino,
        attach=onnx.attach_openvino,
        metadata=onnx.metadata_of_openvino,
        open=onnx.open_openvino,
    ),
    Format(
        name="torchscript",
        description="fused and traced by torch.jit, for C++ and older deployments of torch",
        suffix=".torchscript",
        extra=None,
        modules=(),
        readers=(),
        tasks=_ALL_TASKS,
        dynamic_batch=(),
        dynamic_size=(),
        tolerance=1e-4,
        write=own.write_torchscript,
        attach=own.attach_torchscript,
        metadata=own.metadata_in_zip,
        open=own.open_torchscript,
    ),
    Format(
        name="pt2",
        description="AOTInductor package: machine code for this processor, needs a C++ compiler to write",
        suffix=".pt2",
        extra=None,
        modules=(),
        readers=(),
        tasks=_ALL_TASKS,
        dynamic_batch=_PLAIN_TASKS,  # of a detector it would need effvit to run
        dynamic_size=_PLAIN_TASKS,
        tolerance=1e-4,
        write=own.write_pt2,
        attach=own.attach_pt2,
        metadata=own.metadata_in_zip,
        open=own.open_pt2,
    ),
    Format(
        name="coreml",
        description="CoreML ML Program for iOS 16 and later: written anywhere, run on macOS only",
        suffix=".mlpackage",
        extra="coreml",
        modules=("coremltools",),
        readers=("coremltools",),
        tasks=_PLAIN_TASKS,
        dynamic_batch=(),
        dynamic_size=(),
        tolerance=1e-3,
        write=mobile.write_coreml,
        attach=mobile.attach_coreml,
        metadata=mobile.metadata_of_coreml,
        open=mobile.open_coreml,
        runs_here=mobile.on_macos,
    ),
    Format(
        name="executorch",
        description="ExecuTorch program with XNNPACK kernels, for Android and iOS",
        suffix=".pte",
        extra="executorch",
        modules=("executorch",),
        readers=("executorch",),
        tasks=_PLAIN_TASKS,
        dynamic_batch=(),
        dynamic_size=(),
        tolerance=1e-4,
        write=mobile.write_executorch,
        attach=None,
        metadata=mobile.metadata_of_executorch,
        open=mobile.open_executorch,
    ),
)

#: All formats, by name.
FORMATS: dict[str, Format] = {entry.name: entry for entry in _TABLE}


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in FORMATS:
        raise ConfigError(f"no export format is called {name!r}. {close_matches(name, FORMATS)}")
    return FORMATS[name]


def check_installed(entry: Format, modules: tuple[str, ...]) -> None:
    """Refuses a format whose packages are not there.

    Args:
        entry: The format.
        modules: Its `modules` to write, its `readers` to run.

    Raises:
        ConfigError: A package is missing.
    """
    lacking = missing(modules)
    if lacking:
        raise ConfigError(
            f"the format {entry.name} needs {' and '.join(lacking)}, not installed here: "
            f'pip install "effvit[{entry.extra}]"'
        )


def check_writable(entry: Format) -> None:
    """Refuses a format that cannot be written here.

    Raises:
        ConfigError: A package is missing, or the C++ compiler that AOTInductor needs.
    """
    check_installed(entry, entry.modules)
    if entry.name == "pt2":
        check_compiler()
