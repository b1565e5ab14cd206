"""``effvit export``: a trained network as a file that runs elsewhere, checked against its checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effvit.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
    from torch import Tensor

    from effvit._cli.exported_inputs import Canvas
    from effvit._cli.rebuild import RebuiltRun
    from effvit.deploy.export import Export
    from effvit.deploy.formats import Format
    from effvit.tasks.deployed import Deployed

#: What ``--image_size`` says for no size in particular.
_ANY = "any"
_DESCRIPTION = """\
Write the network of a run to a file, with normalisation before and post-processing behind it, and with its classes.
The file is compared with the checkpoint on images of the run's validation data, and kept only if it agrees.
"""


def export(words: Sequence[str]) -> int:
    """Runs ``effvit export``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.

    Raises:
        ConfigError: An unknown format or one that is not installed, an option out of its range, or no images to compare
            on.
        CheckpointError: The checkpoint is missing, damaged, or not of a run.
        ExportError: The format cannot hold the network, or the file disagrees with it.
    """
    own = _parser().parse_args(list(words))
    if own.list:
        _print_formats()
        return 0
    if own.checkpoint is None:
        raise ConfigError("effvit export needs --checkpoint FILE, or --list for a table of formats")
    from effvit._cli.rebuild import rebuild
    from effvit.deploy.formats import check_writable, format_of

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    entry = format_of(own.format)
    check_writable(entry)  # before the checkpoint is opened, which takes seconds
    run = rebuild(own.checkpoint, "export")
    output = Path(own.output) if own.output else run.path.with_suffix(entry.suffix)
    done = _export(run, output, own)
    _print_result(done)
    return 0


def _export(run: RebuiltRun, output: Path, own: argparse.Namespace) -> Export:
    from effvit._cli.exported_inputs import preprocessing_of
    from effvit.deploy.export import check_export, export

    module = run.task.deployable()
    if own.batch_size is not None and own.batch_size < 1:
        raise ConfigError(f"--batch_size must be 1 or more, not {own.batch_size}")
    entry = check_export(module.task, own.format, output, batch=own.batch_size)
    canvas = _canvas(module, entry, run.inputs, own.image_size)
    preprocessing = preprocessing_of(module.task, run.inputs, canvas)
    samples: list[tuple[Tensor, ...]] = []
    if entry.runs_here():
        samples = _samples(run, module.task, preprocessing, canvas, own)
        if not samples:
            raise ConfigError("there is no image to compare the file with the checkpoint on: name some with --images")
    print(f"writing {output}: of {entry.name} this takes from seconds to some minutes", file=sys.stderr)
    return export(
        module,
        entry.name,
        output,
        size=None if isinstance(canvas, range) else canvas,
        batch=own.batch_size,
        metadata={"checkpoint": run.path.name, "preprocessing": preprocessing},
        samples=samples,
    )


def _canvas(module: Deployed, entry: Format, inputs: Mapping[str, Any], asked: Sequence[str]) -> Canvas:
    """Height and width of the file's images, or the sides that they may have."""
    from effvit._cli.exported_inputs import canvas_of, open_canvas
    from effvit._cli.subjects import image_size
    from effvit.deploy.export import check_any_size

    if list(asked) == [_ANY]:
        return open_canvas(module.task, inputs, check_any_size(module, entry))
    if not all(word.isdigit() for word in asked):
        raise ConfigError(
            f"--image_size needs a side, or height and width, in pixels, or {_ANY}, not {' '.join(asked)}"
        )
    size = image_size([int(word) for word in asked], "--image_size") if asked else None
    return canvas_of(module.task, inputs, size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effvit export",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="checkpoint of a run, or the run's folder")
    parser.add_argument("--format", default="onnx", metavar="NAME", help="one of those that --list shows (onnx)")
    parser.add_argument("--list", action="store_true", help="show the formats, and what each needs and can do")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: beside the checkpoint)")
    parser.add_argument(
        "--image_size",
        nargs="+",
        default=[],
        metavar="N",
        help="side, or height and width, of the images that the file takes, in pixels, or any, where format and "
        "network can (default: as in the run)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="images that the file takes at a time (default: any number where the format can, otherwise 1)",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="an image, or a folder of images, to compare on (default: validation images of the run)",
    )
    parser.add_argument("--parity_images", type=int, default=8, metavar="N", help="how many images to compare on (8)")
    return parser


def _samples(
    run: RebuiltRun, task: str, preprocessing: Mapping[str, Any], canvas: Canvas, own: argparse.Namespace
) -> list[tuple[Tensor, ...]]:
    """Real images to compare on."""
    from effvit._cli.exported_inputs import files_for, samples_of

    if own.parity_images < 1:
        raise ConfigError(f"--parity_images must be 1 or more, not {own.parity_images}")
    if own.images is not None:
        data = files_for(task, preprocessing, canvas, own.images)
        data.setup("predict")
        return list(samples_of(task, data.predict_dataloader(), canvas, own.parity_images))
    try:
        data = _validation_data(run, preprocessing)
        return list(samples_of(task, data.val_dataloader(), canvas, own.parity_images))
    except (ConfigError, DatasetError, OSError) as error:
        raise ConfigError(
            "the file is to be compared with the checkpoint on validation images of the run, which cannot be opened "
            f"here: name a folder of other images with --images. {error}"
        ) from error


def _validation_data(run: RebuiltRun, preprocessing: Mapping[str, Any]) -> LightningDataModule:
    """The data of the run, ready for validation, at the size of the exported network."""
    from lightning.pytorch import LightningDataModule

    from effvit import datamodules
    from effvit._cli.lightning import first_cause
    from effvit._cli.parser import Parser

    for name in datamodules.__all__:  # so that a configuration may name them without their module
        getattr(datamodules, name)
    parser = Parser(prog="effvit export")
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = run.config["data"]
    stored = given.get("init_args", {})
    known = {name: value for name, value in preprocessing.items() if name in stored or name == "published"}
    options = {**stored, **known, "num_workers": 0}
    config = parser.parse_object({"data": {**given, "init_args": options}})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name since jsonargparse 4.49
    try:
        data: LightningDataModule = instantiate(config)["data"]
    except (ValueError, RuntimeError, OSError) as error:  # jsonargparse words what a constructor raises in its own way
        raise first_cause(error) from None
    data.setup("validate")
    return data


def _print_formats() -> None:
    from rich import box, get_console
    from rich.table import Table

    from effvit.deploy.formats import FORMATS

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("format", "what it is", "needs", "networks for", "any\nbatch", "any\nsize"):
        table.add_column(head, no_wrap=head != "what it is")
    for entry in FORMATS.values():
        needs = f"effvit[{entry.extra}]" if entry.extra else "torch alone"
        which = (_which(entry, tasks) for tasks in (entry.dynamic_batch, entry.dynamic_size))
        table.add_row(entry.name, entry.description, needs.replace("[", r"\["), "\n".join(entry.tasks), *which)
    get_console().print(table)
    for entry in FORMATS.values():
        if "partly" in (_which(entry, entry.dynamic_batch), _which(entry, entry.dynamic_size)):
            batch, size = (" and ".join(tasks) or "none" for tasks in (entry.dynamic_batch, entry.dynamic_size))
            print(f"{entry.name}: any batch for {batch}, any size for {size}")


def _which(entry: Format, tasks: Sequence[str]) -> str:
    if not tasks:
        return "no"
    return "yes" if set(tasks) == set(entry.tasks) else "partly"


def _print_result(done: Export) -> None:
    from rich import get_console

    console = get_console()
    if done.parity is None:
        console.print(f"not compared with the checkpoint: {done.format} does not run on this machine")
    else:
        _print_parity(done)
    batch = done.metadata["batch"]
    images = "any number of images" if batch is None else f"{batch} image{'s' * (batch > 1)} at a time"
    size = sum(file.stat().st_size for file in _files(done.path)) / 1e6
    console.print(
        f"{done.path}: {done.format}, {size:.1f} MB, {images}, {_sizes(done.metadata)}",
        highlight=False,
        soft_wrap=True,
    )
    note = _padding(done.metadata)
    if note:
        console.print(note, highlight=False, soft_wrap=True)


def _padding(metadata: Mapping[str, Any]) -> str:
    """Where images are padded further than in the run, which shows."""
    made = metadata.get("preprocessing", {})
    divisor, step = made.get("pad_divisor"), (metadata.get("sides") or {}).get("step")
    if divisor is None or made.get("resize") == "squash":
        return ""
    if step is None:
        height, width = metadata["size"]
        return (
            f"images that do not fill {height} x {width} pixels are padded further than in the run, and their results "
            "differ from the checkpoint's: --image_size close to the shape of yours avoids that"
        )
    if not divisor % step:
        return ""
    return (
        f"the run pads images to multiples of {divisor} pixels and the file to multiples of {step}: where that is more "
        "padding, its results differ from the checkpoint's"
    )


def _sizes(metadata: Mapping[str, Any]) -> str:
    if metadata["size"] is not None:
        return "{} x {} pixels".format(*metadata["size"])
    return "heights and widths of {least} to {most} pixels in steps of {step}".format(**metadata["sides"])


def _print_parity(done: Export) -> None:
    from rich import box, get_console
    from rich.table import Table

    from effvit.deploy.parity import OTHER_LABELS

    found = done.parity
    assert found is not None
    title = f"Against the checkpoint on {found.images} images"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, min_width=len(title))
    for head in ("output", "largest difference", "of its largest value", "allowed"):
        table.add_column(head, justify="left" if head == "output" else "right")
    if found.labels is not None:
        table.add_row("labels", f"{_percent(1 - found.labels)} of the pixels", "-", _percent(OTHER_LABELS))
    for name, error in found.errors.items():
        table.add_row(name, f"{found.differences[name]:.2g}", f"{error:.1e}", f"{found.tolerance:.0e}")
    get_console().print(table)
    if found.detections == 0:
        print("the network finds nothing on these images: name others with --images for a comparison of detections")
    elif found.detections is not None:
        print(f"{found.detections} detections, {found.unmatched} of either side without a partner")
    elif found.top1 is not None:
        print(f"the same first class for {100 * found.top1:.1f} % of the images")
    elif found.labels is not None:
        print(f"the same label for {_percent(found.labels)} of the pixels")


def _percent(share: float) -> str:
    return f"{100 * share:.6g} %"


def _files(path: Path) -> list[Path]:
    """The file with what lies beside it or in it."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    beside = path.with_suffix(".bin")
    return [path, beside] if path.suffix == ".xml" and beside.is_file() else [path]
