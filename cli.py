"""The command ``effvit``: picks the verb, and imports only what the verb needs."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from effvit.errors import ConfigError, EffvitError, close_matches

_HELP = """\
usage: effvit VERB [options]        effvit VERB --help

Train, evaluate and use efficient vision transformers on your own images.

  fit         train                     effvit fit -c detection/digits
  validate    evaluate on validation    effvit validate --checkpoint runs/digits/best.ckpt
  test        evaluate on test images   effvit test --checkpoint runs/digits/best.ckpt
  predict     apply to any images       effvit predict --checkpoint runs/digits/best.ckpt --images folder/

  benchmark   what it costs here        effvit benchmark efficientvit_m4 mobilevit_xxs@256
  export      write it for elsewhere    effvit export --checkpoint runs/digits/best.ckpt --format onnx

  backbones   list the networks         effvit backbones 'efficientvit_*'
  configs     list shipped configs      effvit configs
              or draw a learning rate   effvit configs --plot-lr classification/efficientvit_m4
  check-data  find faults in a data set effvit check-data my_data/
  tables      published against yours   effvit tables coco --results runs/

-c takes a path or the name of a shipped config, and may repeat: later ones win, and options win over all of them.
Every setting can be given on the command line, for example --model.backbone efficientvit_m0 --trainer.max_epochs 50.

  --version   print the version
"""

_INTERRUPTED = 128 + 2  # as a shell has it of SIGINT
_TERMINATED = 128 + 15
_TRAINERS = ("fit", "validate", "test", "predict")  # verbs that run Lightning's Trainer, which minds SIGTERM itself


def _train(verb: str) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        from effvit._cli.launch import launch

        return launch(verb, arguments)

    return run


def _predict(arguments: list[str]) -> int:
    from effvit._cli.predict import predict

    return predict(arguments)


def _backbones(arguments: list[str]) -> int:
    from effvit._cli.lists import print_backbones

    return print_backbones(arguments)


def _configs(arguments: list[str]) -> int:
    from effvit._cli.lists import print_configs

    return print_configs(arguments)


def _check_data(arguments: list[str]) -> int:
    from effvit._cli.check_data import check_data

    return check_data(arguments)


def _tables(arguments: list[str]) -> int:
    from effvit._cli.tables import tables

    return tables(arguments)


def _export(arguments: list[str]) -> int:
    from effvit._cli.export import export

    return export(arguments)


def _benchmark(arguments: list[str]) -> int:
    from effvit._cli.benchmark import benchmark

    return benchmark(arguments)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "fit": _train("fit"),
    "validate": _train("validate"),
    "test": _train("test"),
    "predict": _predict,
    "benchmark": _benchmark,
    "export": _export,
    "backbones": _backbones,
    "configs": _configs,
    "check-data": _check_data,
    "tables": _tables,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status.

    Args:
        arguments: What follows ``effvit`` on the command line; taken from there by default.

    Raises:
        SystemExit: Always: 0 if all went well, 1 if the command failed, 2 if it was not understood, 130
            after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_HELP, end="")
        raise SystemExit(0)
    if words[0] == "--version":
        from effvit import __version__

        print(f"effvit {__version__}")
        raise SystemExit(0)
    try:
        verb = _verb(words[0])
        with contextlib.nullcontext() if words[0] in _TRAINERS else _terminable():
            raise SystemExit(verb(words[1:]))
    except EffvitError as error:
        print(f"effvit: {_own_words(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt:
        print("effvit: interrupted", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what runs inside as an exit does, so that it removes its temporary folders."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _own_words(error: EffvitError) -> str:
    """The message without the traceback that a loading process puts before it."""
    name = f"{type(error).__module__}.{type(error).__name__}: "
    return str(error).rpartition(name)[2].strip() if "in DataLoader worker" in str(error) else str(error)


def _verb(name: str) -> Callable[[list[str]], int]:
    if name not in _VERBS:
        raise ConfigError(f"there is no verb {name!r}. {close_matches(name, _VERBS)} `effvit --help` explains them.")
    return _VERBS[name]


if __name__ == "__main__":
    main()
