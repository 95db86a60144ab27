"""Reads requests for predictions in the formats of model platforms and model servers.

SageMaker sends JSON, CSV and JSON Lines; Vertex AI and version 1 of KServe's protocol send instances; MLflow's scoring
protocol sends data frames and inputs. The formats share one grammar, so each of them is taken wherever one of them is.
predictions.py writes the answers.

See https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
https://docs.aws.amazon.com/sagemaker/latest/dg/cdf-inference.html
https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
https://mlflow.org/docs/latest/deployment/deploy-model-locally.html
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from shorttail.config import LIMITS
from shorttail.define.dtypes import DType, Float64
from shorttail.define.text import csv_rows, parse_field
from shorttail.errors import InvalidArgument
from shorttail.server.http.literals import parse_document, read_numbers
from shorttail.server.http.parsed import FindModel, ModelColumns, parse_moment

FEATURES: Final = "features"  # SageMaker's own algorithms write an instance as {"features": [...]}


@dataclass(frozen=True, slots=True)
class Invocation:
    """A request for predictions. model, version: as ModelColumns has them. columns: the request columns.

    outputs: the names of the outputs that the answer must hold; None: all. moment_us: as parse_moment returns it.
    """

    model: str
    version: int | None
    columns: dict[str, Any]
    outputs: Any = None
    moment_us: int | None = None


# -- JSON --------------------------------------------------------------------------------------------------------------


def parse_json_body(body: bytes, find_model: FindModel) -> Invocation:
    """Parse JSON: a list of instances, or an object with one of the keys of FORMS. Raises InvalidArgument."""
    document = parse_document(body)
    if isinstance(document, list):
        document = {"instances": document}
    if not isinstance(document, dict):
        raise InvalidArgument(f"the body must be {WANTED}")
    forms = [name for name in FORMS if name in document]
    if len(forms) != 1:
        raise InvalidArgument(f"the body must be {WANTED}; it has {' and '.join(forms) or 'none of these keys'}")
    parameters = _parameters(document)
    model = find_model(_option(parameters, "model", str) or None, _option(parameters, "version", int))
    columns = FORMS[forms[0]](document[forms[0]], model)
    outputs, moment_us = parameters.get("outputs"), parse_moment(parameters)
    return Invocation(model.model, model.version, _with_numbers(columns, model), outputs, moment_us)


def _parameters(document: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a request: Vertex AI calls them parameters, MLflow params."""
    parameters = document.get("parameters") or document.get("params") or {}
    if not isinstance(parameters, dict):
        raise InvalidArgument("parameters must be an object")
    return parameters


def _option(parameters: dict[str, Any], name: str, kind: type) -> Any:
    """Return a parameter, or None if it is not given. Raises InvalidArgument if it is not of type `kind`."""
    value = parameters.get(name)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise InvalidArgument(f"the parameter {name} must be {'a string' if kind is str else 'a whole number'}")


def _instances(rows: Any, model: ModelColumns) -> dict[str, list[Any]]:
    """Return the columns of a list of instances; None is a missing value.

    An instance is a map of columns, a list in the order of the columns, or the value of the only column.
    """
    rows = _checked_rows("instances", rows, model)
    names = model.names
    if FEATURES not in names:
        rows = [_without_features(row) for row in rows]
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
    return _transposed(names, rows)


def _without_features(row: Any) -> Any:
    return row[FEATURES] if isinstance(row, dict) and row.keys() == {FEATURES} else row


def _records(rows: Any, model: ModelColumns) -> dict[str, list[Any]]:
    """Return the columns of dataframe_records. A column that a record lacks is missing there, as in pandas."""
    rows = _checked_rows("dataframe_records", rows, model)
    if not all(isinstance(row, dict) for row in rows):
        raise InvalidArgument("dataframe_records must be a list of maps of columns")
    names = dict.fromkeys(name for row in rows for name in row)
    if len(names) > len(model.names):  # before the columns are made, whose size is the product of rows and names
        unknown = next(name for name in names if name not in model.names)
        raise InvalidArgument(f"dataframe_records: unknown column {unknown!r:.60}; columns: {', '.join(model.names)}")
    return {name: [row.get(name) for row in rows] for name in names}


def _split(frame: Any, model: ModelColumns) -> dict[str, list[Any]]:
    """Return the columns of dataframe_split: {"columns": [name, ...], "data": [[value, ...], ...]}."""
    names = frame.get("columns") if isinstance(frame, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument('dataframe_split must be {"columns": [name, ...], "data": [[value, ...], ...]}')
    if len(set(names)) != len(names):
        raise InvalidArgument(f"dataframe_split names a column twice: {', '.join(names)}")
    rows = _checked_rows("dataframe_split: data", frame.get("data"), model)
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(names):
            raise InvalidArgument(f"dataframe_split: row {number} of data must be a list: [{', '.join(names)}]")
    return _transposed(names, rows)


def _inputs(inputs: Any, model: ModelColumns) -> dict[str, Any]:
    """Return the columns of inputs: a map of whole columns, or a list of instances."""
    if not isinstance(inputs, dict):
        return _instances(inputs, model)
    for name, values in inputs.items():
        if isinstance(values, list) and name not in _vectors(model):
            _check_count(f"inputs: {name}", len(values))
    return dict(inputs)


FORMS: Final[dict[str, Callable[[Any, ModelColumns], dict[str, Any]]]] = {
    "instances": _instances,
    "dataframe_split": _split,
    "dataframe_records": _records,
    "inputs": _inputs,
}
WANTED: Final = f'{{"instances": [{{column: value, ...}}, ...]}}, or have one of the keys {", ".join(FORMS)}'


def _checked_rows(what: str, rows: Any, model: ModelColumns) -> list[Any]:
    if not isinstance(rows, list):
        raise InvalidArgument(f"{what} must be a list of rows")
    if not rows:
        raise InvalidArgument(f"{what} is empty: send at least one")
    _check_count(what, len(rows))
    if len(rows) > 1 and not (model.names or model.takes_tensors):
        raise InvalidArgument(
            f"{what}: model '{model.model}' takes no columns, so a request has one row; got {len(rows)}"
        )
    return rows


def _check_count(what: str, rows: int) -> None:
    if rows > LIMITS.rows_per_request:
        most = LIMITS.rows_per_request
        raise InvalidArgument(f"{what}: {rows} rows in one request; at most {most} are taken: send it in parts")


def _transposed(names: Sequence[str], rows: list[list[Any]]) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _vectors(model: ModelColumns) -> set[str]:
    return {name for name, dtype in zip(model.names, model.dtypes, strict=True) if dtype.is_vector}


def _with_numbers(columns: dict[str, Any], model: ModelColumns) -> dict[str, Any]:
    """Return the columns with numbers for the names of infinities in columns of floats and vectors."""
    dtypes = dict(zip(model.names, model.dtypes, strict=True))
    return {name: _numbers(values, dtypes.get(name)) for name, values in columns.items()}


def _numbers(values: Any, dtype: DType | None) -> Any:
    if dtype is None or not (dtype.is_float or dtype.is_vector):
        return values
    if not isinstance(values, list):
        return read_numbers([values])[0]
    if dtype.is_vector:
        values = [read_numbers(value) if isinstance(value, list) else value for value in values]
    return read_numbers(values)


# -- JSON Lines --------------------------------------------------------------------------------------------------------


def parse_json_lines(body: bytes, find_model: FindModel) -> Invocation:
    """Parse an instance a line. Empty lines count for nothing. Raises InvalidArgument."""
    model = find_model(None, None)
    rows: list[Any] = []
    for number, line in enumerate(_lines(body), 1):
        if not line.strip():
            continue
        if len(rows) == LIMITS.rows_per_request:
            most = LIMITS.rows_per_request
            raise InvalidArgument(f"more than {most} lines in one request: send them in parts")
        try:
            rows.append(parse_document(line))
        except InvalidArgument as error:
            raise InvalidArgument(f"line {number}: {error.message}") from None
    if not rows:
        raise InvalidArgument("the body has no lines: send an instance a line")
    columns = _with_numbers(_instances(rows, model), model)
    return Invocation(model.model, model.version, columns)


def _lines(body: bytes) -> Iterator[bytes]:
    """Yield the lines of a body one by one."""
    at = 0
    while at < len(body):
        end = body.find(b"\n", at)
        end = len(body) if end < 0 else end
        yield body[at:end]
        at = end + 1


# -- CSV ---------------------------------------------------------------------------------------------------------------


def parse_csv(body: bytes, find_model: FindModel) -> Invocation:
    """Parse a CSV body. Raises InvalidArgument."""
    model = find_model(None, None)
    return Invocation(model.model, model.version, csv_columns(body, model.names, model.dtypes))


def csv_columns(body: bytes, names: Sequence[str], dtypes: Sequence[DType]) -> dict[str, list[Any]]:
    """Return the columns of a CSV body. Raises InvalidArgument.

    The first line is a header if it names all columns, in any order; else the fields are in the order of `names`.
    Without a header, each number of a vector is a field of its own; with a header, vectors are refused. An empty field
    is a missing value, two quotes are the empty text, and an empty line is a row with one empty field.
    """
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
