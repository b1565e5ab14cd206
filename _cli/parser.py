"""LightningCLI's parser with messages a person can act on: what was not understood, and what comes close."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from effvit.errors import ConfigError, did_you_mean

# What jsonargparse prints around the reason: the types it tried, and the value once more.
_NOISE = re.compile(
    r"^\s*(-?\s*Expected a <class 'NoneType'>|Does not validate against any|- Does not validate against any|Subtypes:|"
    r"Errors:|Given value type|Given value: (NestedArg|.{60})|- Expected a path but .* not accessible or invalid)"
)

# What jsonargparse calls things, and what a person does.
_WORDS = (
    (re.compile(r"Expected a typing\.Literal\[(.+?)\]"), r"Expected one of \1"),
    (re.compile(r"Expected a (?:<class 'tuple'>|tuple with \d+ elements)"), r"Expected a list, such as [512,512]"),
    (re.compile(r"<class '(\w+)'>"), r"\1"),
)

_NUMBERS_BY_NUMBER = re.compile(r"(--[\w.]+=)?\{[\d\s:,]*\}")

# Where jsonargparse names a class that it could not find, the most telling first.
_CLASS_MENTIONS = (r"Expected a dot import path string: (\S+)", r"Unable to import (\S+)", r"given class_path (\S+)")


def spaced(word: str) -> str:
    """``{8:7}`` as ``{8: 7}``: YAML wants the space, for which a shell would want quotes. Any other word as it is."""
    return re.sub(r":\s*", ": ", word) if _NUMBERS_BY_NUMBER.fullmatch(word) else word


class Parser(LightningArgumentParser):
    """Raises a `ConfigError` with close matches where LightningCLI prints its usage over a hundred lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explains one mistake on the command line or in a configuration.

        Raises:
            ConfigError: Always.
        """
        if not self.prog.startswith("effvit"):  # a parser inside the parser, for one class: the outer one explains
            super().error(message, ex)
        lines = [line.strip(" -") for line in message.splitlines() if line.strip() and not _NOISE.match(line)]
        command = self.prog.replace(" [options]", "")
        hints = [hint for hint in (self._hint(message),) if hint]
        text = "\n".join([*lines, *hints, f"`{command} --help` lists every option."])
        for pattern, words in _WORDS:
            text = pattern.sub(words, text)
        raise ConfigError(text) from ex

    def _hint(self, message: str) -> str:
        """``Did you mean ...?`` where a name in the message is close to one that exists."""
        if unknown := re.search(r"unrecognized arguments: (--[^\s=]+)", message, re.IGNORECASE):
            return did_you_mean(unknown[1], self._option_strings())
        if option := re.search(r"Option '([^']+)' is not accepted", message):
            owner = re.findall(r"class_path '([^']+)'", message)
            choices = _init_arguments(owner[-1]) if owner else self._destinations()
            return did_you_mean(option[1], choices)
        if choice := re.search(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (\S+)", message):
            return did_you_mean(choice[2], re.findall(r"'([^']+)'", choice[1]))
        for pattern in _CLASS_MENTIONS:
            if name := re.search(pattern, message):
                given = name[1].strip("'\":")
                # A class that exists has another mistake in its arguments.
                return "" if given.rpartition(".")[2] in _class_names() else did_you_mean(given, _class_names())
        return ""

    def _option_strings(self) -> set[str]:
        """Every option of this parser, and those of the classes behind ``--model`` and ``--data``."""
        options = {option for action in self._actions for option in action.option_strings}
        for prefix, base in (("--model.", LightningModule), ("--data.", LightningDataModule)):
            for kind in _ours(base):
                options |= {prefix + name for name in inspect.signature(kind).parameters}
        return options

    def _destinations(self) -> set[str]:
        return {option.removeprefix("--").split(".")[0] for option in self._option_strings()} | {
            option.removeprefix("--") for option in self._option_strings()
        }


def _init_arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _ours(base: type) -> Iterator[type]:
    """Subclasses of ``base`` that effvit brings."""
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        if kind.__module__.startswith("effvit."):
            yield kind
        yield from _ours(kind)


def _class_names() -> set[str]:
    """Names that a ``class_path`` may give without its module: ours, and torch's optimizers and schedules."""
    ours = {kind.__name__ for base in (LightningModule, LightningDataModule, Callback) for kind in _ours(base)}
    optimizers = {kind.__name__ for kind in torch.optim.Optimizer.__subclasses__()}
    schedules = {kind.__name__ for kind in torch.optim.lr_scheduler.LRScheduler.__subclasses__()}
    return ours | optimizers | schedules
