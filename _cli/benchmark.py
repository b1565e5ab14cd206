"""``effvit benchmark``: what networks cost on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from effvit._cli.allocator import tune_allocator
from effvit._cli.launch import make_folder, unused
from effvit._cli.subjects import KINDS, checkpoint_subject, image_size, named_subject, parse_spec
from effvit.deploy.protocols import ROUNDS, SECONDS
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from effvit.deploy.protocols import Protocol
    from effvit.deploy.records import Report, Subject

_DESCRIPTION = """\
Measure networks on this machine: latency with its interval, throughput, memory, parameters and multiply-accumulates, in
several runtimes. All of them take turns in the same rounds, so that a ratio holds on a busy machine too, and the output
of each is compared with that of plain torch before its time counts. Networks by name have random weights: what they
cost does not depend on the weights.

  effvit benchmark efficientvit_m4 mobilevit_xxs@256 --runtimes eager fused onnx
  effvit benchmark --checkpoint runs/finetune/best.ckpt --batch_sizes 1 8
  effvit benchmark --protocol efficientvit-cpu
  effvit benchmark efficientformer_l1 --profile
"""
#: Runtimes where none are asked for: these, and of the others those that are installed and take seconds to prepare.
_ALWAYS = ("eager", "fused")
_WHERE_INSTALLED = ("onnx", "openvino")
#: Options that say how a time is measured, which a profile does in its own way, and those that telephones' files fix.
_OF_TIMES = ("protocol", "runtimes", "precisions", "rounds", "seconds", "no_memory")
_NOT_MOBILE = ("checkpoint", "runtimes", "precisions", "batch_sizes", "image_size", "device", "threads", "no_memory")


def benchmark(words: Sequence[str]) -> int:
    """Runs ``effvit benchmark``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.

    Raises:
        ConfigError: A network, runtime, precision, device or protocol that there is not, or a value out of its range.
        ExportError: A runtime whose output differs from that of plain torch.
    """
    own = _parser().parse_args(list(words))
    if own.list:
        return _print_lists()
    tune_allocator(own.allocator)
    _refuse_contradictions(own)
    if own.protocol is not None:
        return _run_protocol(own, words)
    subjects = _subjects(own, own.models)
    output = _output(own.output, "benchmark")
    if own.profile:
        return _profile(own, subjects, output)
    runtimes = own.runtimes or _usual_runtimes()
    report = _measure(own, subjects, runtimes, own.precisions or ["fp32"], own.batch_sizes or [1], words)
    _write(report, output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effvit benchmark",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="NAME, NAME@SIZE or NAME:option=value")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="what runs have trained")
    parser.add_argument("--list", action="store_true", help="list the runtimes and the protocols")
    parser.add_argument("--kind", default="classifier", help=f"what names are measured as: {', '.join(KINDS)}")
    parser.add_argument("--runtimes", nargs="+", metavar="NAME", help="default: eager, fused, and what is installed")
    parser.add_argument("--precisions", nargs="+", metavar="NAME", help="fp32, bf16, fp16, int8 (fp32)")
    parser.add_argument("--batch_sizes", nargs="+", type=_positive, metavar="N", help="images in a batch (1)")
    parser.add_argument(
        "--image_size", nargs="+", type=_positive, metavar="N", help="side, or height and width; default: as published"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, or the protocol's")
    parser.add_argument("--threads", type=_positive, help="threads on the CPU (1)")
    parser.add_argument("--protocol", metavar="NAME", help="measure as a paper did, beside its figures")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by kind of work and by block")
    parser.add_argument("--rounds", type=_positive, help=f"visits of each network and runtime ({ROUNDS})")
    parser.add_argument("--seconds", type=_seconds, help=f"seconds of a visit, one batch at least ({SECONDS})")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory, which takes a process each")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (runs/benchmark)")
    parser.add_argument("--allocator", choices=("tuned", "default"), default="default", help="see effvit fit --help")
    return parser


def _output(asked: Path | None, name: str) -> Path:
    """The folder of the results; one that was asked for is made at once, so that no work is lost on it."""
    if asked is None:
        return unused(Path("runs") / name)  # made when there is something to write: a typo leaves no empty folder
    make_folder(asked)
    return asked


def _refuse_contradictions(own: argparse.Namespace) -> None:
    """Refuses options that would be ignored."""
    if own.profile:
        _refuse(own, _OF_TIMES, "--profile")
    elif own.protocol == "mobile":
        _refuse(own, _NOT_MOBILE, "--protocol mobile, which writes files for one image of the published size")
    for name in ("batch_sizes", "precisions"):
        if own.protocol is not None and len(getattr(own, name) or []) > 1:
            raise ConfigError(f"a protocol is measured at one of --{name}: run the command once for each")
    if own.protocol is not None and own.kind != "classifier":
        raise ConfigError(f"the papers' protocols are of classifiers: leave --kind {own.kind} out")


def _refuse(own: argparse.Namespace, names: Sequence[str], what: str) -> None:
    given = [name for name in names if getattr(own, name)]
    if given:
        raise ConfigError(f"--{given[0]} says nothing to {what}: leave it out")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return value


def _subjects(own: argparse.Namespace, models: Sequence[str]) -> list[Subject]:
    """Networks by name, then those of checkpoints."""
    specs = [parse_spec(text) for text in models]
    if not specs and not own.checkpoint:
        raise ConfigError(
            "name networks to measure, or give --checkpoint FILE or --protocol NAME; `effvit backbones` lists networks"
        )
    size = None if own.image_size is None else image_size(own.image_size, "--image_size")
    found = [named_subject(spec, own.kind, size) for spec in specs]
    found += [checkpoint_subject(path, size) for path in own.checkpoint]
    names = [subject.name for subject in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is asked for twice")
    return found


def _usual_runtimes() -> list[str]:
    from effvit.deploy.runtimes import RUNTIMES, is_installed

    chosen = list(_ALWAYS)
    for name in _WHERE_INSTALLED:
        if not is_installed(name):
            print(f'not measured: {name} (pip install "effvit[{RUNTIMES[name].extra}]")', file=sys.stderr)
        else:
            chosen.append(name)
    return chosen


def _measure(
    own: argparse.Namespace,
    subjects: Sequence[Subject],
    runtimes: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    words: Sequence[str],
) -> Report:
    from effvit.deploy.benchmark import benchmark as measure

    report = measure(
        subjects,
        runtimes=runtimes,
        batches=batches,
        precisions=precisions,
        device=own.device or "cpu",
        threads=own.threads or 1,
        rounds=own.rounds or ROUNDS,
        seconds=own.seconds or SECONDS,
        memory=not own.no_memory,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return replace(report, command=_command(words))


def _command(words: Sequence[str]) -> str:
    return shlex.join(["effvit", "benchmark", *words])


def _write(report: Report, output: Path, extra: str = "") -> None:
    """The table in the terminal, and the files."""
    from effvit.deploy.pictures import draw_pareto
    from effvit.deploy.reports import as_csv, as_json, as_markdown

    text = as_markdown(report) + (f"\n{extra}" if extra else "")
    print(text)
    _write_text(output / "benchmark.json", as_json(report))
    _write_text(output / "benchmark.csv", as_csv(report))
    _write_text(output / "benchmark.md", f"`{report.command}`\n\n{text}")
    written = "benchmark.md, benchmark.csv, benchmark.json with all samples"
    if any(record.latency is not None for record in report.records):
        draw_pareto(report.records, output / "pareto.png")
        written += ", pareto.png"
    print(f"{written}: {output}")


def _write_text(path: Path, text: str) -> None:
    from effvit.deploy._files import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _run_protocol(own: argparse.Namespace, words: Sequence[str]) -> int:
    """Measures as a paper did; explicit options win over the protocol's."""
    from effvit.deploy.protocols import find_protocol
    from effvit.deploy.reports import protocol_markdown

    protocol = find_protocol(own.protocol)
    output = _output(own.output, protocol.name)
    departures: list[str] = []
    if protocol.name == "mobile":
        from effvit._cli.mobile import measure_mobile

        specs = [parse_spec(text) for text in own.models or _models(protocol)]
        report = measure_mobile(specs, output, rounds=own.rounds or ROUNDS, seconds=own.seconds or SECONDS)
        report = replace(report, command=_command(words))
    else:
        departures = _departures(own, protocol)
        for departure in departures:
            print(f"departs from the protocol: {departure}", file=sys.stderr)
        own.device = own.device or protocol.device
        own.threads = own.threads or protocol.threads
        report = _measure(
            own,
            _subjects(own, own.models or _models(protocol)),
            own.runtimes or [protocol.runtime, *protocol.beside],
            own.precisions or [protocol.precision],
            own.batch_sizes or [protocol.batch],
            words,
        )
    _write(report, output, protocol_markdown(protocol, report, departures))
    return 0


def _models(protocol: Protocol) -> list[str]:
    """The networks of a protocol, without those of timm where that is not installed."""
    from importlib.util import find_spec

    names = [entry.model for entry in protocol.entries]
    if find_spec("timm") is not None:
        return names
    for name in names:
        if name.startswith("timm/"):
            print(f'not measured: {name} (pip install "effvit[timm]")', file=sys.stderr)
    return [name for name in names if not name.startswith("timm/")]


def _departures(own: argparse.Namespace, protocol: Protocol) -> list[str]:
    """In what the command line overrides the protocol."""
    wanted: dict[str, tuple[Sequence[object], Sequence[object]]] = {
        "device": ([own.device] if own.device else [], [protocol.device]),
        "threads": ([own.threads] if own.threads else [], [protocol.threads]),
        "precisions": (own.precisions or [], [protocol.precision]),
        "batch_sizes": (own.batch_sizes or [], [protocol.batch]),
        "image_size": (own.image_size or [], ["the published sizes"]),
    }
    return [
        f"--{name} {' '.join(map(str, given))} for {published[0]}"
        for name, (given, published) in wanted.items()
        if given and given != published
    ]


def _profile(own: argparse.Namespace, subjects: Sequence[Subject], output: Path) -> int:
    from effvit.deploy._files import file_name
    from effvit.deploy.pictures import draw_profile
    from effvit.deploy.profiling import profile
    from effvit.deploy.reports import profile_json, profile_markdown

    texts = []
    for subject in subjects:
        for batch in own.batch_sizes or [1]:
            print(f"profiling {subject.name}, batch {batch}", file=sys.stderr, flush=True)
            found = profile(subject, batch, device=own.device or "cpu", threads=own.threads or 1)
            stem = f"profile_{file_name(subject.name)}_b{batch}"
            draw_profile(found, output / f"{stem}.png")
            _write_text(output / f"{stem}.json", profile_json(found))
            texts.append(profile_markdown(found))
    text = "\n".join(texts)
    _write_text(output / "profile.md", text)
    print(text)
    print(f"profile.md, and a picture and a JSON of each network: {output}")
    return 0


def _print_lists() -> int:
    from effvit.deploy.protocols import PROTOCOLS
    from effvit.deploy.runtimes import RUNTIMES, is_installed

    for name, runtime in RUNTIMES.items():
        missing = f'  [pip install "effvit[{runtime.extra}]"]' if not is_installed(name) else ""
        precisions = ", ".join(sorted({one for several in runtime.precisions.values() for one in several}))
        print(f"{name:14}{runtime.description} ({precisions}){missing}")
    print()
    for name, protocol in PROTOCOLS.items():
        print(
            f"{name:22}{protocol.device}, batch {protocol.batch}, {protocol.runtime} {protocol.precision}; "
            f"published on {protocol.hardware}"
        )
    return 0
