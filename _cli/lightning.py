"""LightningCLI with our parts in it: the run folder, what a run leaves, and checkpoints that rebuild a run."""

from __future__ import annotations

import json
import logging
import platform
import re
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from effvit import __version__, datamodules
from effvit._cli.launch import INPUT_SETTINGS, OWN_OPTIONS, Run, make_folder
from effvit._cli.parser import Parser, spaced
from effvit.callbacks import (
    EMA,
    ClassificationReport,
    HardwareBenchmark,
    Progress,
    RunCheckpoint,
    RunReport,
    SegmentationReport,
)
from effvit.categories import Categories
from effvit.errors import CheckpointError, ConfigError, EffvitError
from effvit.tasks import Classification, Detection, Segmentation, Task
from effvit.tasks.schedules import Poly, WarmupCosine

log = logging.getLogger("effvit")

# What these say is meant: fixed BatchNorm statistics are the recipe, and few batches are a small data set.
_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",
    r"The number of training batches .* is smaller than the logging interval",
    r".*does not have many workers",
    r".*recommended to use `self\.log\(.*sync_dist=True",  # every process holds the same AP
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)

#: What torch says where the memory of the machine, not of a GPU, is not enough.
_CPU_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory")

# A configuration may name these without their module, since jsonargparse looks through the classes imported so far.
_NAMED = (
    Classification,
    Detection,
    Segmentation,
    WarmupCosine,
    Poly,
    HardwareBenchmark,
    *(getattr(datamodules, name) for name in datamodules.__all__),
)


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration into the run folder, and into every checkpoint so that it rebuilds the run."""

    def __init__(self, parser: LightningArgumentParser, config: Any) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Writes ``config.yaml``."""
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(self._text(), encoding="utf-8")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002 - Lightning's signature
        """Adds the configuration as text."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["effvit"] = {
            "version": __version__,
            "config": self._text(),
            "inputs": {name: getattr(data, name) for name in INPUT_SETTINGS if hasattr(data, name)},
        }

    def _text(self) -> str:
        return str(self.parser.dump(self.config, skip_none=False, format="yaml"))


class EffvitCLI(LightningCLI):
    """Parses, builds and runs one verb of the Trainer.

    Args:
        run: The command, understood.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        # What is said before there is a run folder: network and data may still be refused, and then there is none.
        self._early = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
        _quieten()
        super().__init__(
            Task,
            LightningDataModule,
            save_config_callback=RunConfig,
            trainer_defaults={
                "max_epochs": 12,
                "log_every_n_steps": 10,
                "use_distributed_sampler": False,  # our samplers know their rank, and resume within an epoch
                "enable_model_summary": False,
                "num_sanity_val_steps": 1,
            },
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, "prog": "effvit"}
            | {verb: {"allow_abbrev": False, "description": OWN_OPTIONS} for verb in self.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=[run.verb, *run.arguments],
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs, and the arguments of the Trainer's methods that effvit fills in itself."""
        own = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": {*own, "train_dataloaders", "val_dataloaders"},
            "validate": {*own, "dataloaders", "verbose"},
            "test": {*own, "dataloaders", "verbose"},
            "predict": {*own, "dataloaders", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a run has beside trainer, model and data, and lets the classes follow from the data."""
        parser.add_argument(
            "--ema_decay",
            type=float | None,
            default=None,
            help="Average the weights with this decay, in (0, 1), and evaluate the average; null for none.",
        )
        parser.add_argument(
            "--base",
            type=str | list[str] | None,
            default=None,
            help="In a configuration file: those that it builds on, parsed before it; see _cli/shipped.py. Names of "
            "shipped ones, or files beside it.",
        )
        parser.add_argument(
            "--save_every_n_steps", type=int, default=200, help="Write last.ckpt every so many optimizer steps."
        )
        parser.link_arguments("data", "model.init_args.categories", compute_fn=self._categories, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.pad_divisor", compute_fn=_pad_divisor, apply_on="instantiate")
        parser.link_arguments("model.init_args.backbone", "data.init_args.published", compute_fn=self._published)
        parser.link_arguments(
            ("model.init_args.detector", "model.init_args.mmdet_config"),
            "data.init_args.masks",
            compute_fn=_wants_masks,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses without LightningCLI's warning about ``sys.argv``, from which ``args`` was made."""
        self.config = parser.parse_args([spaced(word) for word in args])

    def instantiate_classes(self) -> None:
        """Builds data, model and Trainer; an error of ours keeps its own words.

        jsonargparse turns whatever a constructor raises into "does not validate against any of the union subtypes".
        """
        log.setLevel(logging.INFO)
        log.addHandler(self._early)
        try:
            super().instantiate_classes()
        except Exception as error:
            original = first_cause(error)
            if original is error:
                raise
            raise original from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the run folder, the loggers and the callbacks of effvit."""
        self.run.claim_directory()
        _log_to(self.run.directory)
        log.removeHandler(self._early)  # or it would take again what it gives, where a process writes no log of its own
        self._report_environment()
        self._repeat_early()
        self.trainer_defaults["callbacks"] = [*self._callbacks(), *self.run.callbacks]
        chosen = self._get(self.config_init, "trainer")["logger"]
        logger = self._loggers() if chosen in (None, True) else chosen
        if logger and self.subcommand == "fit":
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        return super().instantiate_trainer(default_root_dir=str(self.run.directory), logger=logger, **kwargs)

    def after_fit(self) -> None:
        """Evaluates the final weights where training stopped between two validations (``max_steps``, ``max_time``)."""
        dry_run = self._get(self.config_init, "trainer")["fast_dev_run"]
        evaluated = self.model.evaluated_step == self.trainer.global_step
        if not evaluated and not dry_run and self.trainer.limit_val_batches:
            self.trainer.validate(self.model, self.datamodule, verbose=False)

    def after_validate(self) -> None:
        """Writes the metrics with all their digits, for programs."""
        self._write_metrics()

    def after_test(self) -> None:
        """Writes the metrics with all their digits, for programs."""
        self._write_metrics()

    @rank_zero_only
    def _write_metrics(self) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        (self.run.directory / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")

    def after_instantiate_classes(self) -> None:
        """Loads the weights to evaluate; `fit` leaves that to the Trainer, which restores the optimizer too."""
        if self.subcommand == "fit":
            return
        if self.run.checkpoint is not None:
            stored = self.run.checkpoint["hyper_parameters"]
            self.model.load_weights(self.run.checkpoint["state_dict"], str(self.run.checkpoint_path), stored)
        elif not self.model.hparams["checkpoint"]:
            log.warning("these weights were never trained: pass --checkpoint, or --model.checkpoint beside -c")

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the verb; where memory ran out, says on what and what to do."""
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not _CPU_MEMORY.search(str(error)):
                raise
            raise ConfigError(_explain_memory(subcommand, self.model.batch_shape, str(error))) from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and self.run.checkpoint_path is not None:
            arguments |= {"ckpt_path": str(self.run.checkpoint_path), "weights_only": True}
        if subcommand in {"validate", "test"}:
            arguments["verbose"] = False  # RunReport prints the table
        if subcommand == "predict":
            arguments["return_predictions"] = False
        return dict(arguments)

    def _callbacks(self) -> list[Callback]:
        """What every run brings; `fit` also saves checkpoints and averages weights."""
        callbacks: list[Callback] = [Progress()]
        if self.subcommand == "fit":
            decay = self._get(self.config_init, "ema_decay")
            callbacks += [EMA(decay)] if decay else []
            callbacks += [RunCheckpoint(self._get(self.config_init, "save_every_n_steps"))]
        if self.subcommand != "predict":
            callbacks += [RunReport(), ClassificationReport(), SegmentationReport()]
        return callbacks

    def _loggers(self) -> list[Logger] | bool:
        """CSV and TensorBoard under ``logs/``; a resumed run gets a folder of its own there and deletes nothing."""
        if self.subcommand != "fit":
            return False
        version = f"resumed_at_step_{self.run.checkpoint['global_step']}" if self.run.checkpoint else ""
        root = self.run.directory
        return [CSVLogger(root, "logs", version), TensorBoardLogger(root, "logs", version)]

    def _published(self, backbone: str | None) -> dict[str, Any] | None:
        """The network's published input; to predict, as the run has validated: its data may not crop, as the digits."""
        stored: dict[str, Any] | None = (self.run.checkpoint or {}).get("effvit", {}).get("inputs", {}).get("published")
        return stored or _published_input(backbone)

    def _categories(self, data: LightningDataModule) -> dict[int, str]:
        """Classes of the run: those of the checkpoint where there is one, otherwise those of the data."""
        stored = (self.run.checkpoint or {}).get("hyper_parameters", {}).get("categories")
        declared: dict[int, str] | None = getattr(data, "categories", None)
        if stored is None:
            return declared or {}
        if declared is not None and declared != stored:
            raise CheckpointError(_explain_classes(str(self.run.checkpoint_path), stored, declared))
        return dict(stored)

    @rank_zero_only
    def _repeat_early(self) -> None:
        """Says what was said before there was a run folder."""
        for record in self._early.buffer:
            log.handle(record)

    @rank_zero_only
    def _report_environment(self) -> None:
        log.info(
            "effvit %s, torch %s, lightning %s, Python %s",
            __version__,
            torch.__version__,
            lightning.__version__,
            platform.python_version(),
        )
        log.info("allocator: %s", self.run.allocator)
        log.info("run folder: %s", self.run.directory)


def run_prediction(module: LightningModule, data: LightningDataModule, directory: Path, callback: Callback) -> None:
    """Predicts with a module that is no task of a run, on the CPU, with the log and the progress of one.

    Args:
        module: Anything with ``predict_step``.
        data: What it predicts on.
        directory: Folder of the results.
        callback: What writes them.
    """
    _quieten()
    make_folder(directory)
    _log_to(directory)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=str(directory),
        callbacks=[Progress(), callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.predict(module, data, return_predictions=False)


def _explain_memory(verb: str, shape: tuple[int, ...], detail: str) -> str:
    """What to do where memory ran out at a batch of images of this shape."""
    batch = f" at a batch of {shape[0]} images of {shape[-2]} x {shape[-1]} pixels" if len(shape) == 4 else ""
    if verb == "fit":
        less = (
            "Take fewer images at a time (--data.batch_size, with --trainer.accumulate_grad_batches for the same "
            "step), smaller ones (--data.image_size), --model.gradient_checkpointing true, or --trainer.precision "
            "bf16-mixed; `effvit fit --resume` goes on from last.ckpt"
        )
    else:
        less = "Take fewer images at a time (--data.val_batch_size, or --batch_size of predict) or smaller ones"
    return f"memory ran out{batch}. {less}. torch says: {detail.strip().splitlines()[0]}"


def first_cause(error: BaseException) -> BaseException:
    """The error of ours behind ``error``, or ``error`` itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EffvitError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _quieten() -> None:
    """Keeps Lightning's advertisements, and its warnings about what is meant, out of the log."""
    for pattern in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "💡" not in record.getMessage())


def _wants_masks(detector: str, mmdet_config: str | None) -> bool:
    """Whether a detector learns masks, which the data has to load for it; the task explains a bad configuration."""
    if detector != "mmdet" or mmdet_config is None:
        return detector == "mask_rcnn"
    try:
        from effvit.tasks.mmdetection import has_masks

        return has_masks(mmdet_config)
    except ConfigError:
        return False


def _published_input(backbone: str | None) -> dict[str, Any] | None:
    """Size, crop and resize filter that the published weights of a backbone expect; the network explains a bad name."""
    from effvit.backbones import outline

    if backbone is None:
        return None
    try:
        spec = outline(backbone).input_spec
    except ConfigError:
        return None
    return {"size": spec.size[0], "crop": spec.crop, "interpolation": spec.interpolation}


def _pad_divisor(data: LightningDataModule) -> int:
    return int(getattr(data, "pad_divisor", 32))


def _explain_classes(path: str, stored: dict[int, str], declared: dict[int, str]) -> str:
    odd = [f"{number}: {name}" for number, name in declared.items() if stored.get(number) != name]
    odd += [f"{number}: {name} (missing)" for number, name in stored.items() if number not in declared]
    more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
    return (
        f"{path} was trained on {len(stored)} classes, {Categories(stored).to_dict()}; the data declares "
        f"{len(declared)}. These differ: {', '.join(odd[:10])}{more}. Use data that declares the same categories, used "
        "or not; or train on this data, starting from a backbone with --model.pretrained."
    )


@rank_zero_only
def _log_to(directory: Path) -> None:
    """Sends effvit's log to the terminal and to ``log.txt`` in the run folder."""
    logger = logging.getLogger("effvit")
    logger.setLevel(logging.INFO)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    to_file = logging.FileHandler(directory / "log.txt", encoding="utf-8")
    to_file.setFormatter(form)
    logger.addHandler(to_file)
    to_terminal = logging.StreamHandler()
    to_terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(to_terminal)
