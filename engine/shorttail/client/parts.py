"""Calls of more rows than one request may have: they are sent in parts, and the answers are joined.

The functions are generators, which both clients run: they yield the requests that come next, get their results in the
same order, and return what the call returns. All parts are encoded, and known to fit into a message, before the first
is sent. They are sent one after the other: rows of equal keys are pushed in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgpack

from shorttail import protocol
from shorttail.client import calls
from shorttail.client.columns import pack_request
from shorttail.config import LIMITS
from shorttail.define.scalar import can_be_vector
from shorttail.errors import InvalidArgument, ResourceExhausted, ShorttailError
from shorttail.results import Features, Prediction, RowCount

ROWS = LIMITS.rows_per_request

_WRITTEN = {"push": "; the rows before it are pushed", "delete": "; the rows before it are deleted"}


class CallPart(NamedTuple):
    """A request of a part. start: its first row in the call."""

    method: str
    params: list[Any]
    start: int = 0


T = TypeVar("T")
Steps = Generator[list[CallPart], list[Any], T]


def is_long(columns: Mapping[str, Any]) -> bool:
    """Return whether a column has more items than a request may have rows. columns: as encode_columns returns them."""
    for value in columns.values():
        kind = type(value)
        if (kind is list and len(value) > ROWS) or (kind is msgpack.ExtType and protocol.tensor_rows(value) > ROWS):
            return True
    return False


def predict(model: str, params: list[Any]) -> Steps[Prediction]:
    """Predict in parts. params: of the whole call. Parts that another version answered are asked again.

    Raises InvalidArgument if the model takes the rows of a request together: in parts they would have other answers.
    """
    _, columns, options = params
    entry = _named(model, calls.read_list("models", (yield [CallPart("models", [])])[0]))
    if entry.get("batching") == "request":
        raise InvalidArgument(
            f"model '{model}' answers the rows of a request together, and a request has at most {ROWS:,}; send fewer"
        )
    requests = list(_requests("predict", model, columns, options, entry.get("columns", {})))
    results = yield requests
    versions = [calls.read_prediction(model, result).version for result in results]
    others = [i for i, version in enumerate(versions) if version != versions[0]]
    if others:
        pinned = {**options, "version": versions[0]}
        again = yield [requests[i]._replace(params=[model, requests[i].params[1], dict(pinned)]) for i in others]
        for i, result in zip(others, again, strict=True):
            results[i] = result
    return calls.read_prediction(model, *results)


def features(params: list[Any]) -> Steps[Features]:
    """Look features up in parts, each as of the moment in which it is answered."""
    references, columns, options = params
    return calls.read_features(*(yield list(_requests("get_online_features", references, columns, options))))


def push(params: list[Any]) -> Steps[RowCount]:
    """Push in parts. Each is written completely or not at all."""
    view, columns, options = params
    entry = _named(view, calls.read_list("views", (yield [CallPart("views", [])])[0]))
    named = entry.get("columns", {})  # feature -> the column that it is pushed in
    types = {named.get(name, name): dtype for name, dtype in entry.get("features", {}).items()}
    return calls.read_pushed(*(yield list(_requests("push", view, columns, options, types))))


def delete(params: list[Any]) -> Steps[int]:
    """Delete in parts. Each is deleted completely or not at all."""
    view, columns, options = params
    return calls.read_rows("delete", *(yield list(_requests("delete", view, columns, options))))


def in_part(part: CallPart, error: ShorttailError) -> ShorttailError:
    """Return the error of a part, which says where in the call it begins, and what is written."""
    if not part.start:
        return error
    return type(error)(f"{error.message} ({_place(part.start)}{_WRITTEN.get(part.method, '')})")


def _place(start: int) -> str:
    return f"in a part of the call: its row 0 is row {start}"


def _named(name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry of a model or a view; an empty one if there is none, which the server then says."""
    return next((entry for entry in entries if entry["name"] == name), {})


def _requests(
    method: str, target: Any, columns: dict[str, Any], options: dict[str, Any], types: Mapping[str, str] | None = None
) -> Iterator[CallPart]:
    """Yield the requests of a call. target: a model, a view, or references. types: column -> type of its values.

    Raises InvalidArgument for columns of different lengths and for values that cannot be sent.
    """
    vectors = [name for name, dtype in (types or {}).items() if dtype.startswith("Vector(")]
    lengths = {name: _rows(value, name in vectors) for name, value in columns.items()}
    rows = max(lengths.values())
    for name, length in lengths.items():
        if length not in (0, rows) and (length != 1 or method in _WRITTEN):
            raise InvalidArgument(
                f"column '{name}' has {length} values where others have {rows}: "
                "send one value, or as many as the others"
            )

    if rows <= ROWS:  # the long column is a single vector
        yield CallPart(method, [target, columns, options])
        return

    def request(start: int, stop: int) -> CallPart:
        part = {name: _cut(value, start, stop) if lengths[name] == rows else value for name, value in columns.items()}
        return CallPart(method, [target, part, dict(options)], start)

    for start in range(0, rows, ROWS):
        yield from _fitting(request, start, min(start + ROWS, rows))


def _fitting(request: Callable[[int, int], CallPart], start: int, stop: int) -> Iterator[CallPart]:
    """Yield the request of these rows, or those of its halves if it does not fit into a message."""
    made = request(start, stop)
    try:
        calls.check_message(made.method, pack_request(0, made.method, made.params))
    except ResourceExhausted:
        if stop - start == 1:
            raise
        middle = (start + stop) // 2
        yield from _fitting(request, start, middle)
        yield from _fitting(request, middle, stop)
        return
    except InvalidArgument as error:
        raise (InvalidArgument(f"{error.message} ({_place(start)})") if start else error) from None
    yield made


def _rows(value: Any, is_vector: bool) -> int:
    """Return the number of rows in a column, 0 for a single value. is_vector: the values are vectors."""
    if type(value) is list:
        first = next((item for item in value if item is not None), None) if is_vector else None
        return 0 if is_vector and not can_be_vector(first) else len(value)
    if type(value) is msgpack.ExtType and protocol.tensor_dims(value) > is_vector:
        return protocol.tensor_rows(value)
    return 0


def _cut(value: Any, start: int, stop: int) -> Any:
    return value[start:stop] if type(value) is list else protocol.cut_tensor(value, start, stop)
