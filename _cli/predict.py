"""``effvit predict``: what a trained network says about any images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from effvit._cli.allocator import tune_allocator
from effvit._cli.launch import Run, TemporaryConfig, open_run, start, stored_config
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from effvit.callbacks import ClassificationWriter, PredictionWriter, SegmentationWriter

    Writer = ClassificationWriter | PredictionWriter | SegmentationWriter

_DESCRIPTION = """\
Of a detector: annotated pictures and a COCO results JSON in the output folder. Of a classifier: class names and scores,
in the terminal and as a file in the output folder. Of a segmenter: pictures with a legend, masks, and a JSON with the
share of each class.
Further options beside a checkpoint go to the Trainer, for example --trainer.accelerator gpu.
"""
#: By task: its class, the data module that feeds it, and the options that only it takes with their defaults.
_TASKS = {"Detection": "detection", "Classification": "classification", "Segmentation": "segmentation"}
_DATA = {
    "detection": "effvit.datamodules.ImageFiles",
    "classification": "effvit.datamodules.ClassifiedFiles",
    "segmentation": "effvit.datamodules.ImageFiles",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "detection": {"score_threshold": 0.4},
    "classification": {"top": 5, "format": "table", "patches": False},
    "segmentation": {},
}


def predict(words: Sequence[str]) -> int:
    """Runs ``effvit predict``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.

    Raises:
        ConfigError: An option that the task of the checkpoint does not take.
    """
    own, rest = _parser().parse_known_args(list(words))
    allocator = tune_allocator(own.allocator)
    if (own.checkpoint is None) == (own.model is None):
        given = "neither was given" if own.model is None else "both were given"
        raise ConfigError(
            "effvit predict needs either --checkpoint FILE, of a run, or --model FILE, which effvit export wrote: "
            f"{given}"
        )
    if own.model is not None:
        return _predict_exported(own, rest)
    _refuse_exported(own.checkpoint)
    path, checkpoint = open_run(own.checkpoint, "predict")
    output = Path(own.output) if own.output else path.parent / "predictions"
    config = yaml.safe_load(stored_config(checkpoint, path, "predict"))
    task = _task_of(config)
    writer = _writer(task, output, _own_options(own, task, path))
    inputs = checkpoint["effvit"]["inputs"]
    with TemporaryConfig(_settings(config, _DATA[task], inputs, own)) as [settings]:
        arguments = ["--config", str(settings), *rest]
        run = Run("predict", arguments, output, allocator, checkpoint, path, [writer])
        status = start(run)
    print(f"{writer.summary()}: {output}")
    return status


def _refuse_exported(checkpoint: str) -> None:
    from effvit.deploy.formats import FORMATS

    if Path(checkpoint).suffix in {entry.suffix for entry in FORMATS.values()}:
        raise ConfigError(f"{checkpoint} is an exported file, not a checkpoint: pass --model {checkpoint}")


def _predict_exported(own: argparse.Namespace, rest: list[str]) -> int:
    """Runs ``effvit predict --model``."""
    if rest:
        raise ConfigError(
            f"{rest[0]} is not understood with --model: options of the Trainer go with --checkpoint. `effvit predict "
            "--help` lists the others"
        )
    from effvit.deploy.exported import open_exported

    path = Path(own.model)
    if path.suffix == ".ckpt":
        raise ConfigError(f"{path} is a checkpoint, not a file that effvit export wrote: pass --checkpoint {path}")
    exported = open_exported(path)
    task = str(exported.metadata["task"])
    options = _own_options(own, task, path)
    if options.get("patches"):
        raise ConfigError("--patches looks into the network, which an exported file does not let: pass --checkpoint")
    from effvit._cli.exported_inputs import files_for
    from effvit._cli.exported_task import ExportedTask
    from effvit._cli.lightning import run_prediction

    module = ExportedTask(exported)
    data = files_for(
        task,
        exported.metadata["preprocessing"],
        module.canvas,
        own.images,
        batch_size=own.batch_size,
        num_workers=own.num_workers,
        unreadable=own.unreadable,
    )
    output = Path(own.output) if own.output else path.parent / "predictions"
    writer = _writer(task, output, options)
    run_prediction(module, data, output, writer)
    print(f"{writer.summary()}: {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effvit predict",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", help="checkpoint of a run, or the run's folder")
    parser.add_argument("--model", help="instead of a checkpoint: a file that effvit export wrote; runs on the CPU")
    parser.add_argument("--images", required=True, help="an image, or a folder of images (searched in depth)")
    parser.add_argument("--output", help="folder for the results (default: predictions/ beside the checkpoint or file)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time (1)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images (0)")
    parser.add_argument(
        "--unreadable",
        choices=("error", "skip"),
        default="error",
        help="what to do about a file that cannot be read: stop (error), or name it and leave it out (skip)",
    )
    parser.add_argument("--allocator", choices=("tuned", "default"), default="tuned", help="see effvit fit --help")
    # No defaults here: what was not given cannot be refused.
    detection = parser.add_argument_group("detection")
    detection.add_argument("--score_threshold", type=_share, help="objects below it are not drawn (0.4)")
    classification = parser.add_argument_group("classification")
    classification.add_argument("--top", type=int, help="classes for each image (5)")
    classification.add_argument(
        "--format", choices=("table", "csv", "json"), help="the file: predictions.txt (table), .csv or .json (table)"
    )
    classification.add_argument(
        "--patches", action="store_true", default=None, help="also draw which patches DynamicViT keeps, in patches/"
    )
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], not {text}")
    return value


def _task_of(config: dict[str, Any]) -> str:
    """The task of a stored configuration, by the name of its class."""
    return _TASKS[str(config["model"]["class_path"]).rpartition(".")[2]]


def _own_options(own: argparse.Namespace, task: str, path: Path) -> dict[str, Any]:
    """The options of a task, with their defaults where they were not given."""
    for other, names in _OPTIONS.items():
        odd = [f"--{name}" for name in names if other != task and getattr(own, name) is not None]
        if odd:
            raise ConfigError(
                f"{path} is of {task}, and {odd[0]} is an option of {other}. Leave it out; "
                "`effvit predict --help` lists the options of each."
            )
    given = {name: getattr(own, name) for name in _OPTIONS[task]}
    return {name: _OPTIONS[task][name] if value is None else value for name, value in given.items()}


def _writer(task: str, output: Path, options: dict[str, Any]) -> Writer:
    from effvit.callbacks import ClassificationWriter, PredictionWriter, SegmentationWriter

    if task == "segmentation":
        return SegmentationWriter(output)
    if task == "detection":
        return PredictionWriter(output, options["score_threshold"])
    return ClassificationWriter(output, options["top"], options["format"], patches=options["patches"])


def _settings(config: dict[str, Any], data: str, inputs: dict[str, Any], own: argparse.Namespace) -> str:
    """The stored configuration with the images to predict on in place of the training data, as YAML text."""
    init_args = {
        "images": own.images,
        "batch_size": own.batch_size,
        "num_workers": own.num_workers,
        "unreadable": own.unreadable,
        **{name: _plain(value) for name, value in inputs.items()},
    }
    config["trainer"]["devices"] = 1  # one process writes the results
    config["data"] = {"class_path": data, "init_args": init_args}
    return str(yaml.safe_dump(config))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
