"""Reads and answers requests of the model platforms: SageMaker's containers (JSON, CSV) and Vertex AI's (instances).

See https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.dtypes import DType, Float64
from shorttail.define.text import csv_rows, parse_field
from shorttail.errors import InvalidArgument
from shorttail.server.http.json import JSON, parse_json, write_json
from shorttail.server.http.parsed import Answer, FindModel, ResponseBody

CSV: Final = "text/csv"


@dataclass(frozen=True, slots=True)
class Invocation:
    """A request for predictions. model, version: as ModelColumns has them. columns: the request columns.

    outputs: the names of the outputs that the answer must hold; None: all.
    """

    model: str
    version: int | None
    columns: dict[str, list[Any]]
    outputs: Any = None


def parse_instances(body: bytes, find_model: FindModel) -> Invocation:
    """Parse {"instances": [...], "parameters": {...}}, or only the list of instances. Raises InvalidArgument."""
    document = parse_json(body)
    if isinstance(document, list):
        document = {"instances": document}
    if not isinstance(document, dict) or not isinstance(document.get("instances"), list):
        raise InvalidArgument('the body must be {"instances": [{column: value, ...}, ...]}')
    rows = document["instances"]
    if not rows:
        raise InvalidArgument("instances is empty: send at least one")
    if len(rows) > LIMITS.rows_per_request:
        n = len(rows)
        raise InvalidArgument(f"{n} instances in one request; at most {LIMITS.rows_per_request} are taken")
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidArgument("parameters must be an object")
    model = find_model(_option(parameters, "model", str) or None, _option(parameters, "version", int))
    columns = instance_columns(rows, model.names)
    return Invocation(model.model, model.version, columns, parameters.get("outputs"))


def _option(parameters: dict[str, Any], name: str, kind: type) -> Any:
    """Return a parameter, or None if it is not given. Raises InvalidArgument if it is not of type `kind`."""
    value = parameters.get(name)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise InvalidArgument(f"the parameter {name} must be {'a string' if kind is str else 'a whole number'}")


def parse_csv(body: bytes, find_model: FindModel) -> Invocation:
    """Parse a CSV body. Raises InvalidArgument."""
    model = find_model(None, None)
    return Invocation(model.model, model.version, csv_columns(body, model.names, model.dtypes))


def instance_columns(rows: list[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of the instances; None is a missing value. Raises InvalidArgument for a missing column."""
    if isinstance(rows[0], dict):
        columns: dict[str, list[Any]] = {name: [] for name in rows[0]}
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or row.keys() != columns.keys():
                raise InvalidArgument(f"instance {number} has other columns than instance 0: {', '.join(columns)}")
            for name, value in row.items():
                columns[name].append(value)
        return columns
    if len(names) == 1 and not isinstance(rows[0], list):
        return {names[0]: rows}
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise InvalidArgument(f"instance {number} must be a map of columns, or a list: [{', '.join(names)}]")
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def csv_columns(body: bytes, names: Sequence[str], dtypes: Sequence[DType]) -> dict[str, list[Any]]:
    """Return the columns of a CSV body. Raises InvalidArgument.

    The first line is a header if it names all columns, in any order; else the fields are in the order of `names`.
    Without a header, each number of a vector is a field of its own; with a header, vectors are refused. An empty field
    is a missing value, two quotes are the empty text, and an empty line is a row with one empty field.
    """
    if len(body) > LIMITS.http_json_bytes:
        raise InvalidArgument(f"{len(body)} bytes of CSV; at most {LIMITS.http_json_bytes} are taken: send it in parts")
    try:
        lines = list(islice(csv_rows(body.decode("utf-8-sig")), LIMITS.rows_per_request + 2))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the body is not CSV in UTF-8: {error}") from None
    except ValueError as error:
        raise InvalidArgument(f"the body is not CSV: {error}") from None
    order = list(zip(names, dtypes, strict=True))
    if lines and len(lines[0]) == len(names) and set(lines[0]) == set(names):
        by_name = dict(order)
        order = [(str(name), by_name[str(name)]) for name in lines[0]]
        if vectors := [name for name, dtype in order if dtype.is_vector]:
            raise InvalidArgument(f"column '{vectors[0]}' is a vector: send CSV without a header, or JSON")
        del lines[0]
    if len(lines) > LIMITS.rows_per_request:
        raise InvalidArgument(f"more than {LIMITS.rows_per_request} rows in one request: send them in parts")
    width = sum(dtype.width for _, dtype in order)
    columns: dict[str, list[Any]] = {name: [] for name, _ in order}
    for number, line in enumerate(lines):
        if len(line) != width:
            raise InvalidArgument(
                f"row {number} of the CSV has {len(line)} fields; the columns take {width}: {', '.join(names)}"
            )
        at = 0
        for name, dtype in order:
            kind = Float64 if dtype.is_vector else dtype
            fields = [parse_field(name, text, kind, number) for text in line[at : at + dtype.width]]
            columns[name].append(fields if dtype.is_vector else fields[0])
            at += dtype.width
    if not lines:
        raise InvalidArgument("the CSV has no rows")
    return columns


def predictions(answer: Answer, outputs: Any = None) -> list[Any]:
    """Return a prediction per row: a value, or a map of values if there are several outputs. Raises InvalidArgument."""
    found = dict(zip(answer.names, answer.values, strict=True))
    if outputs is not None:
        if not isinstance(outputs, list) or not outputs or not all(name in found for name in outputs):
            raise InvalidArgument(f"the parameter outputs must be a list of names among: {', '.join(found)}")
        found = {name: found[name] for name in outputs}
    if len(found) == 1:
        (only,) = found.values()
        return list(_plain(only))
    columns = [_plain(array) for array in found.values()]
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(array: Any) -> list[Any]:
    plain: list[Any] = np.asarray(array).tolist()
    return plain


def write_predictions(outputs: Any, answer: Answer) -> ResponseBody:
    """Write the JSON of a response. outputs: as Invocation has them. Raises InvalidArgument for an unknown output."""
    document = {"predictions": predictions(answer, outputs), "version": answer.version}
    return ResponseBody(write_json(document), JSON)


def write_csv(outputs: Any, answer: Answer) -> ResponseBody:
    """Write CSV with a line per row: the values of all outputs, in order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [_plain(np.asarray(array).reshape(len(array), -1)) for array in answer.values]
    for parts in zip(*columns, strict=True):
        writer.writerow([value for part in parts for value in part])
    return ResponseBody(text.getvalue().encode(), f"{CSV}; charset=utf-8")
