"""``effvit predict``: what a trained detector finds in any images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from effvit._cli.allocator import tune_allocator
from effvit._cli.launch import Run, TemporaryConfig, open_run, start, stored_config

_DESCRIPTION = """\
Detects objects in images: annotated pictures and a COCO results JSON in the output folder.
Further options go to the Trainer, for example --trainer.accelerator gpu.
"""


def predict(words: Sequence[str]) -> int:
    """Runs ``effvit predict``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.
    """
    own, rest = _parser().parse_known_args(list(words))
    allocator = tune_allocator(own.allocator)
    from effvit.callbacks.predictions import PredictionWriter

    path, checkpoint = open_run(own.checkpoint, "predict")
    output = Path(own.output) if own.output else path.parent / "predictions"
    writer = PredictionWriter(output, own.score_threshold)
    settings = _settings(checkpoint, stored_config(checkpoint, path, "predict"), own)
    with TemporaryConfig(settings) as [config]:
        arguments = ["--config", str(config), *rest]
        run = Run("predict", arguments, output, allocator, checkpoint, path, [writer])
        status = start(run)
    print(f"{writer.images} images, {writer.drawn} objects with a score of at least {own.score_threshold:g}: {output}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effvit predict", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="checkpoint of a run, or the run's folder")
    parser.add_argument("--images", required=True, help="an image, or a folder of images (searched in depth)")
    parser.add_argument("--output", help="folder for the results (default: predictions/ beside the checkpoint)")
    parser.add_argument("--score_threshold", type=_share, default=0.4, help="objects below it are not drawn (0.4)")
    parser.add_argument("--batch_size", type=int, default=1, help="images at a time (1)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images (0)")
    parser.add_argument("--allocator", choices=("tuned", "default"), default="tuned", help="see effvit fit --help")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], not {text}")
    return value


def _settings(checkpoint: dict[str, Any], stored: str, own: argparse.Namespace) -> str:
    """The stored configuration with the images to predict on in place of the training data."""
    config = yaml.safe_load(stored)
    inputs = {name: _plain(value) for name, value in checkpoint["effvit"]["inputs"].items()}
    init_args = {"images": own.images, "batch_size": own.batch_size, "num_workers": own.num_workers, **inputs}
    config["trainer"]["devices"] = 1  # one process writes the results
    config["data"] = {"class_path": "effvit.datamodules.ImageFiles", "init_args": init_args}
    return str(yaml.safe_dump(config))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
