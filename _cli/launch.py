"""From the words of a command line to a run: which configs, which checkpoint, which folder."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from effvit._cli.allocator import tune_allocator
from effvit._cli.shipped import find_config, with_bases
from effvit.errors import ConfigError

#: Where the first process of a distributed run tells the others its run folder.
_RUN_DIR_VARIABLE = "EFFVIT_RUN_DIR"
_SIGTERM_STATUS = 128 + 15
#: How a data module turns files into network inputs; a checkpoint keeps them, prediction on other images needs them.
INPUT_SETTINGS = ("image_size", "resize", "pad_divisor", "published")

OWN_OPTIONS = """\
effvit's own options, beside those below:
  -c NAME            a config file, or the name of a shipped one; may repeat, later ones win
  --run_dir DIR      folder of the run (default: runs/NAME, numbered if it exists)
  --allocator CHOICE tuned (default): keep freed memory in the process (Linux); or default
  --resume FILE      fit: go on from runs/NAME/last.ckpt, with the settings saved in it
  --checkpoint FILE  validate, test: rebuild data and network from a checkpoint
"""


@dataclass
class Run:
    """One command of the Trainer, understood.

    Attributes:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: What LightningCLI is to parse, configs first.
        directory: Folder of the run.
        allocator: What the memory allocator was set to.
        checkpoint: Content of the checkpoint to rebuild from or to resume.
        checkpoint_path: Its file.
        callbacks: Further callbacks of the verb.
        numbered: Whether the folder must be a new one.
    """

    verb: str
    arguments: list[str]
    directory: Path
    allocator: str
    checkpoint: dict[str, Any] | None = None
    checkpoint_path: Path | None = None
    callbacks: list[Any] = field(default_factory=list)
    numbered: bool = False

    def claim_directory(self) -> None:
        """Makes the folder of the run; a numbered one is made by nobody else, however many runs start at once."""
        while True:
            try:
                self.directory.mkdir(parents=True, exist_ok=not self.numbered)
            except FileExistsError:
                self.directory = unused(self.directory)
                continue
            break
        self.numbered = False
        os.environ[_RUN_DIR_VARIABLE] = str(self.directory)


def launch(verb: str, words: Sequence[str]) -> int:
    """Runs ``effvit fit``, ``validate`` or ``test``.

    Args:
        verb: The Trainer's method.
        words: What follows the verb on the command line.

    Returns:
        Exit status.
    """
    own, rest = _own_options(verb).parse_known_args(list(words))
    allocator = tune_allocator(own.allocator)
    source: str | None = getattr(own, "checkpoint", None) or getattr(own, "resume", None)
    if own.base is not None:
        raise ConfigError(f"base belongs into a configuration file; on the command line write -c {own.base}")
    if any(word.partition("=")[0] in {"--data.masks", "--data.init_args.masks"} for word in rest):
        raise ConfigError("masks are loaded where --model.detector learns them: leave --data.masks out")
    configs = [find_config(name) for name in own.config]
    if not configs and source is None and not {"-h", "--help"} & set(rest):
        flag = "--resume" if verb == "fit" else "--checkpoint"
        raise ConfigError(f"`effvit {verb}` needs -c NAME or {flag} FILE; `effvit configs` lists the shipped configs.")
    run = Run(verb, rest, Path(), allocator)
    with _stored_settings(run, source) as stored:
        files = [*stored, *(file for path in configs for file in with_bases(path))]
        given = [word for file in files for word in ("--config", str(file))]
        run.arguments = [*given, *rest]
        run.directory, run.numbered = _run_directory(verb, own.run_dir, configs, run.checkpoint_path)
        return start(run)


def start(run: Run) -> int:
    """Builds everything and runs the Trainer.

    Returns:
        Exit status: 143 after SIGTERM, as a shell would give it.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from effvit._cli.lightning import EffvitCLI

    try:
        EffvitCLI(run)
    except SIGTERMException:
        logging.getLogger("effvit").warning(
            "stopped by SIGTERM; go on with: effvit fit --resume %s", run.directory / "last.ckpt"
        )
        return _SIGTERM_STATUS
    except MisconfigurationException as error:  # such as an accelerator that this machine does not have
        raise ConfigError(str(error)) from error
    return 0


def _own_options(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"effvit {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--base")
    parser.add_argument("--run_dir")
    parser.add_argument("--allocator", choices=("tuned", "default"), default="tuned")
    parser.add_argument("--resume" if verb == "fit" else "--checkpoint")
    return parser


def _stored_settings(run: Run, source: str | None) -> AbstractContextManager[list[Path]]:
    """The configuration inside a checkpoint, as a file for the parser."""
    if source is None:
        return nullcontext([])
    path, content = open_run(source, run.verb)
    run.checkpoint_path = path
    config = stored_config(content, path, run.verb)
    # For a resumed run the Trainer reads the weights: they are not kept twice.
    kept = ("hyper_parameters", "global_step") if run.verb == "fit" else ("hyper_parameters", "state_dict")
    run.checkpoint = {name: content[name] for name in kept}
    return TemporaryConfig(config)


def open_run(source: str, verb: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path means: a file, or in the folder of a run the one to resume or to evaluate.

    Returns:
        Its file and its content.
    """
    from effvit.tasks import read_run

    path = Path(source)
    if path.is_dir():
        path = path / ("last.ckpt" if verb == "fit" else "best.ckpt")
    return path, read_run(path)


#: Settings of the Trainer that belong to the training machine or to its length, and not to what is evaluated.
_TRAINING_ONLY = (
    "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "max_time", "overfit_batches",
    "fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
)  # fmt: skip


def stored_config(checkpoint: dict[str, Any], path: Path, verb: str) -> str:
    """The configuration that a checkpoint carries, as YAML text.

    Args:
        checkpoint: Its content.
        path: Its file, for the message.
        verb: What it is wanted for: ``fit`` goes on with all of it, evaluation leaves the training machine out.

    Raises:
        ConfigError: It carries none.
    """
    from effvit.tasks._task import MEANING  # here, since it imports torch, which opening the checkpoint has

    text = checkpoint.get("effvit", {}).get("config")
    if not isinstance(text, str):
        raise ConfigError(
            f"{path} was not written by an effvit command: it carries no configuration. "
            "Give one with -c and pass the weights as --model.checkpoint."
        )
    config = yaml.safe_load(text)
    # The weights inside supersede any starting point, and neither that nor a file of MMDetection need exist on this
    # machine. What they decided about the network (as many heads as they had, say) stays.
    options, stored = config["model"]["init_args"], checkpoint.get("hyper_parameters", {})
    options |= {"pretrained": False, "checkpoint": None}
    options |= {name: stored[name] for name in ("distilled", "mmdet_config", *MEANING) if name in stored}
    if verb != "fit":
        config["trainer"] = {name: value for name, value in config["trainer"].items() if name not in _TRAINING_ONLY}
    return str(yaml.safe_dump(config))


class TemporaryConfig:
    """A YAML file that lives as long as the run."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> list[Path]:
        self._folder = tempfile.TemporaryDirectory(prefix="effvit-")
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(self._text, encoding="utf-8")
        return [path]

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _run_directory(verb: str, asked: str | None, configs: list[Path], checkpoint: Path | None) -> tuple[Path, bool]:
    """Where a run writes, and whether that must be a new folder.

    The processes that a distributed run starts are told by the first one.
    """
    told = os.environ.get(_RUN_DIR_VARIABLE)
    if told and "LOCAL_RANK" in os.environ:
        return Path(told), False
    if asked:
        return Path(asked), False
    if checkpoint is not None:
        return (checkpoint.parent if verb == "fit" else checkpoint.parent / verb), False
    if _started_from_outside():
        raise ConfigError(
            "several processes were started from outside (torchrun, srun): name their folder with --run_dir"
        )
    return unused(Path("runs") / (configs[-1].stem if configs else verb)), True


def _started_from_outside() -> bool:
    """Whether a launcher started several of us, each of which would number the run folder for itself."""
    return any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))


def make_folder(folder: Path) -> None:
    """Makes the folder that results go to, before the work.

    Raises:
        ConfigError: That is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: the folder {folder} cannot be made: {error.strerror}") from error


def unused(directory: Path) -> Path:
    """``directory``, or the first of ``directory-2``, ``directory-3``, … that does not exist."""
    number, candidate = 1, directory
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate
