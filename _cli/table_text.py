"""Tables of ``effvit tables`` as Markdown, CSV and JSON, whatever their columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from effvit._cli.table_runs import LeftOut

DASH = "-"


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: Iterable[str]) -> Iterator[str]:
    """Lines of a Markdown table whose columns line up.

    Args:
        head: Names of the columns.
        body: Cells of the rows.
        left: Columns that are set to the left; the others are numbers.
    """
    ragged = {head.index(name) for name in left}
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * width if i in ragged else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    for cells in (head, rule, *body):
        padded = [
            f"{cell:<{width}}" if i in ragged else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield "| " + " | ".join(padded) + " |"


def notes(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A list of facts, each once with the names that it is about.

    Args:
        facts: Pairs of a name and what is known of it.
    """
    about: dict[str, list[str]] = {}
    for name, fact in facts:
        about.setdefault(fact, []).append(name)
    yield from (f"- {', '.join(names)}: {fact}" for fact, names in about.items())


def not_shown(left_out: Sequence[LeftOut]) -> list[str]:
    """Lines about evaluations that are not in the table."""
    if not left_out:
        return []
    return ["", "Evaluations that are not in the table:", "", *(f"- {one.folder}: {one.reason}" for one in left_out)]


def numbers(values: Iterable[float | None], columns: int, form: Callable[[float], str]) -> list[str]:
    """Cells of some values, and of those that are missing up to a number of columns."""
    given = [DASH if value is None else form(value) for value in values]
    return given + [DASH] * (columns - len(given))


def as_printed(value: float) -> str:
    """With the decimals that it was published with, one or two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def billions(count: int) -> str:
    """A count in billions, to three digits or so."""
    value = count / 1e9
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def checkpoint_cell(address: str | None) -> str:
    """Whether an address of trained weights is of a file or of a folder."""
    if address is None:
        return "none"
    return "file" if address.endswith((".pt", ".pth")) else "folder"


def differences(measured: Sequence[float | None], published: Sequence[float | None]) -> list[float | None]:
    """Measured less published; ``None`` where one of them is missing."""
    pairs = zip(measured, published, strict=False)
    return [None if ours is None or theirs is None else ours - theirs for ours, theirs in pairs]


def json_text(records: Sequence[Mapping[str, Any]], left_out: Sequence[LeftOut], units: str) -> str:
    """All that is known, unrounded, and what was left out."""
    content = {
        "rows": list(records),
        "left_out": [{"folder": str(entry.folder), "reason": entry.reason} for entry in left_out],
        "units": units,
    }
    return json.dumps(content, indent=1) + "\n"


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """The rows as in JSON, a column for each name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
