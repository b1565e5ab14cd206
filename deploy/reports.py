"""Reports as JSON, CSV and Markdown, and a protocol's published figures beside the measured ones."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from effvit.deploy.profiling import MEMORY_BOUND, WORK, Profile
from effvit.deploy.protocols import Claim, Protocol
from effvit.deploy.records import Ratio, Record, Report, Statistics
from effvit.deploy.statistics import ratio

_DASH = "-"
_MILLI, _MEGA, _GIGA = 1e-3, 1e6, 1e9

#: Columns of the CSV that are attributes of a record.
_PLAIN = (
    "model", "runtime", "precision", "device", "threads", "batch", "asked_batch", "throughput", "peak_memory", "params",
    "macs", "error", "agreement", "prepare_seconds", "accuracy", "accuracy_name", "note",
)  # fmt: skip


def as_json(report: Report) -> str:
    """Everything, all samples included."""
    return json.dumps(asdict(report), indent=1) + "\n"


def as_csv(report: Report) -> str:
    """One line a record, without the samples: seconds, bytes, images a second."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    latency = ("median", "mean", "p95", "p99", "ci_low", "ci_high")
    surroundings = {name: _csv_cell(report.environment.get(name)) for name in _ENVIRONMENT}
    head = [*_PLAIN, "height", "width", *(f"latency_{name}" for name in latency), *_SPEEDUP_COLUMNS]
    writer.writerow([*head, "parts", *surroundings, "command"])
    for record in report.records:
        speedup = record.speedup
        writer.writerow(
            [
                *(getattr(record, name) for name in _PLAIN),
                *record.size,
                *_latency_cells(record.latency),
                *((speedup.value, *speedup.ci95) if speedup else ("", "", "")),
                " ".join(f"{name}={seconds:.6g}" for name, seconds in record.parts.items()),
                *surroundings.values(),
                report.command,
            ]
        )
    return out.getvalue()


#: What of the environment stands in each line.
_ENVIRONMENT = ("processor", "gpu", "driver", "torch", "allocator", "load_before", "time")
_SPEEDUP_COLUMNS = ("speedup", "speedup_ci_low", "speedup_ci_high")


def _csv_cell(value: Any) -> Any:
    return " ".join(f"{one:g}" for one in value) if isinstance(value, list | tuple) else value


def _latency_cells(latency: Statistics | None) -> list[Any]:
    if latency is None:
        return [""] * 6
    return [latency.median, latency.mean, latency.p95, latency.p99, *latency.ci95]


def as_markdown(report: Report) -> str:
    """The environment in a few lines, and a table with one row a record."""
    first = next(iter(report.records), None)
    baseline = "first" if first is None else first.runtime
    head = [
        "model", "size", "runtime", "batch", "latency ms", "95 % interval", "p95", "p99", "img/s",
        f"times as fast as {baseline}", "memory MB", "params M", "MACs G", "accuracy", "differs by",
    ]  # fmt: skip
    rows = [_row(record) for record in report.records]
    lines = [environment_line(report.environment), "", *table(head, rows), ""]
    lines += [f"- {_title(record)}: {record.note}" for record in report.records if record.note]
    lines += list(_part_lines(report.records))
    accuracies = sorted({record.accuracy_name for record in report.records if record.accuracy is not None})
    lines += [f"- accuracy: {name}" for name in accuracies]
    return "\n".join(lines).rstrip() + "\n"


def environment_line(environment: Mapping[str, Any]) -> str:
    """What the figures depend on besides the networks, for people; `environment` of a JSON report has all of it."""
    versions = environment.get("packages", {})
    facts = {
        "": environment.get("processor") if environment.get("device") == "cpu" else environment.get("gpu"),
        "cores": environment.get("cores", {}).get("usable"),
        "threads": environment.get("threads"),
        "governor": environment.get("governor"),
        "load before": " ".join(f"{load:.1f}" for load in environment.get("load_before") or ()),
        "allocator": environment.get("allocator"),
        "driver": environment.get("driver"),
        "torch": environment.get("torch"),
        **{name: versions.get(name) for name in ("onnxruntime", "openvino")},
    }
    return "; ".join(f"{name} {value}".strip() for name, value in facts.items() if value not in (None, ""))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 3) -> list[str]:
    """Lines of a Markdown table, columns aligned.

    Args:
        head: Titles.
        rows: Cells.
        text_columns: The first so many columns are aligned on the left, the others on the right.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [
        "| "
        + " | ".join(f"{cell:<{w}}" if i < text_columns else f"{cell:>{w}}" for i, (cell, w) in enumerate(cells))
        + " |"
        for cells in (list(zip(row, widths, strict=True)) for row in (head, rule, *rows))
    ]


def _row(record: Record) -> list[str]:
    latency = record.latency
    times = [_DASH] * 4
    if latency is not None:
        low, high = latency.ci95
        times = [_ms(latency.median), f"{_ms(low)} to {_ms(high)}", _ms(latency.p95), _ms(latency.p99)]
    precision = "" if record.precision == "fp32" else f" {record.precision}"
    return [
        record.model,
        "x".join(map(str, record.size)),
        record.runtime + precision,
        str(record.batch),
        *times,
        _number(record.throughput),
        _ratio(record.speedup),
        _number(None if record.peak_memory is None else record.peak_memory / _MEGA),
        f"{record.params / _MEGA:.2f}",
        f"{record.macs / _GIGA:.3g}",
        _DASH if record.accuracy is None else f"{record.accuracy:.1f}",
        _difference(record),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds / _MILLI:.3g}" if seconds < 1 else f"{seconds / _MILLI:.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _ratio(value: Ratio | None) -> str:
    return _DASH if value is None else f"{value.value:.2f} ({value.ci95[0]:.2f} to {value.ci95[1]:.2f})"


def _difference(record: Record) -> str:
    if record.error is None:
        return _DASH
    first = "" if record.agreement is None or record.precision == "fp32" else f", top-1 {record.agreement:.0%} equal"
    return f"{record.error:.0e}{first}"


def _title(record: Record) -> str:
    return f"{record.model} {record.runtime} {record.precision}, batch {record.asked_batch}"


def _part_lines(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        if record.parts:
            whole = sum(record.parts.values())
            shares = (f"{name} {_ms(seconds)} ms ({seconds / whole:.0%})" for name, seconds in record.parts.items())
            yield f"- {_title(record)}: {', '.join(shares)}"


def protocol_markdown(protocol: Protocol, report: Report, departures: Sequence[str] = ()) -> str:
    """The published figures of a protocol beside the measured ones, and below them the ratios between networks.

    Only the ratios can be compared with the authors': theirs is another device.

    Args:
        protocol: How the authors measured.
        report: What was measured, at one batch size and in one precision.
        departures: In what the measurement is another than the protocol's.
    """
    runtimes = list(dict.fromkeys(record.runtime for record in report.records))
    per_image = protocol.unit == "img/s"
    head = ["model", f"published {protocol.unit}", *(f"{name} {protocol.unit}" for name in runtimes)]
    found = {(record.model, record.runtime): record for record in report.records}
    rows = []
    for model in dict.fromkeys(record.model for record in report.records):
        published = next((entry.published for entry in protocol.entries if entry.model == model), None)
        cells = [_measured(found.get((model, runtime)), per_image=per_image) for runtime in runtimes]
        rows.append([model, _number(published), *cells])
    how = f"batch {protocol.batch}, {protocol.runtime} {protocol.precision}"
    title = f"Protocol {protocol.name}, published on {protocol.hardware}, {how}. Source: {protocol.source}."
    lines = [title, *(f"- departs from it: {departure}" for departure in departures), ""]
    lines += table(head, rows, text_columns=1)
    claims = [claim for claim in protocol.claims if _both(claim, found)]
    if claims:
        head = ["ratio of throughputs", "published", *runtimes]
        rows = [
            [f"{claim.model} / {claim.baseline}", f"{claim.published:.2f}", *_claim_cells(claim, runtimes, found)]
            for claim in claims
        ]
        lines += ["", *table(head, rows, text_columns=1), ""]
        lines += [f"- {claim.published:.2f}: {claim.source}" for claim in claims]
    return "\n".join(lines) + "\n"


def _measured(record: Record | None, *, per_image: bool) -> str:
    if record is None or record.latency is None:
        return _DASH
    figure = _number(record.throughput) if per_image else _ms(record.latency.median)
    return figure if record.batch == record.asked_batch else f"{figure} (batch {record.batch})"


def _both(claim: Claim, found: Mapping[tuple[str, str], Record]) -> bool:
    models = {model for model, _ in found}
    return {claim.model, claim.baseline} <= models


def _claim_cells(claim: Claim, runtimes: Sequence[str], found: Mapping[tuple[str, str], Record]) -> list[str]:
    cells = []
    for runtime in runtimes:
        fast, slow = found.get((claim.model, runtime)), found.get((claim.baseline, runtime))
        comparable = fast and slow and fast.latency and slow.latency and fast.batch == slow.batch
        cells.append(_ratio(ratio(slow.latency.rounds, fast.latency.rounds)) if comparable else _DASH)  # type: ignore[union-attr]
    return cells


def profile_json(profile: Profile) -> str:
    """Everything that a profile has found."""
    return json.dumps(asdict(profile), indent=1) + "\n"


def profile_markdown(profile: Profile) -> str:
    """Shares of the kinds of work by type of block, and the latency of the stages."""
    size = "x".join(map(str, profile.size))
    kinds = [kind for kind in WORK if profile.work.get(kind, 0) > 0]
    rows = [["all", "", "100 %", *(_share(profile.work[kind]) for kind in kinds)]]
    for name, work in profile.blocks.items():
        cells = [_share(work.get(kind, 0)) for kind in kinds]
        rows.append([name, str(profile.counts.get(name, "")), _share(sum(work.values())), *cells])
    whole = sum(profile.stages.values())
    stages = [[name, _ms(seconds), _share(seconds / whole)] for name, seconds in profile.stages.items()]
    lines = [
        f"## {profile.model}, {size}, batch {profile.batch}, {profile.device}: {_ms(profile.seconds)} ms",
        "",
        f"Memory-bound work ({', '.join(MEMORY_BOUND)}): {_share(profile.memory_bound)} of the time in operators.",
        "",
        *table(["block", "number", "share", *kinds], rows, text_columns=1),
        "",
        *table(["stage", "ms", "share"], stages, text_columns=1),
    ]
    lines += [f"- not sorted, in other: {name} {_share(share)}" for name, share in profile.unknown.items()]
    return "\n".join(lines) + "\n"


def _share(value: float) -> str:
    return f"{value:.1%}"
