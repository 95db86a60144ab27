"""Writes predictions as JSON, JSON Lines and CSV. invocations.py reads the requests."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from shorttail.errors import InvalidArgument
from shorttail.server.http.json import write_json
from shorttail.server.http.literals import plain
from shorttail.server.http.media import CSV, JSON, JSON_LINES
from shorttail.server.http.parsed import Answer, ResponseBody


def predictions(answer: Answer, outputs: Any = None) -> list[Any]:
    """Return a prediction per row: a value, or a map of values if there are several outputs.

    outputs: the names of the outputs that are wanted; None: all. Raises InvalidArgument for another name.
    """
    found = _chosen(answer, outputs)
    columns = [plain(np.asarray(array)) for array in found.values()]
    if len(columns) == 1:
        return columns[0]
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def _chosen(answer: Answer, outputs: Any) -> dict[str, Any]:
    found = dict(zip(answer.names, answer.values, strict=True))
    if outputs is None:
        return found
    known = isinstance(outputs, list) and outputs and all(isinstance(name, str) and name in found for name in outputs)
    if not known:
        raise InvalidArgument(f"the parameter outputs must be a list of names among: {', '.join(found)}")
    return {name: found[name] for name in outputs}


def write_predictions(outputs: Any, answer: Answer) -> ResponseBody:
    """Write {"predictions": [...], "version": n}. outputs: as for `predictions`. Raises InvalidArgument."""
    document = {"predictions": predictions(answer, outputs), "version": answer.version}
    return ResponseBody(write_json(document), JSON)


def write_json_lines(outputs: Any, answer: Answer) -> ResponseBody:
    """Write a prediction a line. outputs: as for `predictions`. Raises InvalidArgument."""
    lines = [write_json(row) for row in predictions(answer, outputs)]
    return ResponseBody(b"\n".join([*lines, b""]), JSON_LINES[0])


def write_csv(outputs: Any, answer: Answer) -> ResponseBody:
    """Write CSV with a line per row: the values of the outputs, in order. Raises as `predictions`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [np.asarray(array).reshape(len(array), -1).tolist() for array in _chosen(answer, outputs).values()]
    for parts in zip(*columns, strict=True):
        writer.writerow([value for part in parts for value in part])
    return ResponseBody(text.getvalue().encode(), f"{CSV}; charset=utf-8")
