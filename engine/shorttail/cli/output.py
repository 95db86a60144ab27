"""Prints results of the commands as tables and JSON."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from shorttail.cli.caller import caller
from shorttail.errors import printable

if TYPE_CHECKING:
    from shorttail.results import RowCount


def status_notes(by_view: Mapping[str, Any], by_feature: Mapping[str, Any] | None = None) -> list[str]:
    """Return for each row the views and features that are not PRESENT: "plane NOT_FOUND, weather:wind NULL"."""
    from shorttail.results import Status

    count = max((len(codes) for codes in by_view.values()), default=0)
    notes: list[list[str]] = [[] for _ in range(count)]
    for view, codes in by_view.items():
        for row, code in enumerate(codes):
            if code != Status.PRESENT:
                notes[row].append(f"{view} {Status(code).name}")
    for feature, codes in (by_feature or {}).items():
        for row, code in enumerate(codes):
            if code == Status.NULL:
                notes[row].append(f"{feature} NULL")
    return [", ".join(note) for note in notes]


def echo_line(text: str) -> None:
    """Print one line. Names in files and texts in rows may hold line breaks and terminal codes, which are escaped."""
    click.echo(printable(text).rstrip())


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with aligned columns. Columns of numbers are aligned to the right.

    A table that is wider than the terminal becomes records: a block of lines per row, one line per column.
    """
    header, cells = [printable(name) for name in header], [[show(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    room = terminal_columns()
    if room is not None and cells and sum(widths) + 2 * (len(widths) - 1) > room:
        return print_records(header, cells)
    right = [all(is_number(row[c]) for row in rows) and bool(rows) for c in range(len(header))]
    for line in (header, *cells):
        padded = [f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(line, widths, right, strict=True)]
        echo_line("  ".join(padded))


def print_records(header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    width = max(map(len, header))
    for row, line in enumerate(cells):
        if row:
            click.echo("")
        for name, cell in zip(header, line, strict=True):
            echo_line(f"{name:<{width}}  {cell}")


def terminal_columns() -> int | None:
    """Return the width of the terminal that stdout is, or that of the client; None if it is a file or a pipe."""
    client = caller()
    if client is not None:
        return client.columns
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def show(value: Any) -> str:
    """Return a value as text: "-" for None, six digits of a float, and at most eight items of a list."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = [show(item) for item in value[:8]] + ["..."] * (len(value) > 8)
        return f"[{', '.join(shown)}]"
    return printable(str(value))


def print_json(document: Any) -> None:
    click.echo(json.dumps(plain(document), indent=2))


def plain(value: Any) -> Any:
    """Return a document that JSON can hold: NaN becomes null, and infinities their names, as over HTTP."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def rate(rows: int, seconds: float) -> str:
    """Return "3,322 rows in 0.02 s (166,000 rows/s)", with three digits of the rate."""
    per_s = rows / max(seconds, 1e-9)
    rounded = round(per_s, 3 - len(str(int(per_s))))
    return f"{rows:,} row{'' if rows == 1 else 's'} in {seconds:.2f} s ({rounded:,.0f} rows/s)"


def count_line(view: str, count: RowCount, seconds: float) -> str:
    """Return the rate of a load or a push, and what became of all its rows."""
    given, loaded, older, duplicate = (f"{n:,}" for n in (count.given, count.loaded, count.older, count.duplicate))
    return f"{view}: {rate(count, seconds)}; given {given}, loaded {loaded}, older {older}, duplicate {duplicate}"


def count_document(view: str, count: RowCount, seconds: float) -> dict[str, Any]:
    """Return what `count_line` says, for --json."""
    return {
        "view": view,
        "rows": int(count),
        "given": count.given,
        "loaded": count.loaded,
        "older": count.older,
        "duplicate": count.duplicate,
        "seconds": round(seconds, 6),
    }
