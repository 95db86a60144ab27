"""The part that both clients share: parameters, results and time limits of a call, and the messages of errors."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from shorttail import protocol
from shorttail._native.wire import scan
from shorttail.client.columns import encode_columns, pack_request
from shorttail.define.event_times import AsOf, as_of_us
from shorttail.define.times import time_text
from shorttail.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, Unavailable
from shorttail.protocol import Address
from shorttail.results import Features, Prediction, RowCount

# After a deadline the server answers DEADLINE_EXCEEDED. The client waits this much longer, for that answer to arrive.
DEADLINE_GRACE_S = 0.1

_pack_float64 = struct.Struct(">d").pack


def predict_params(
    model: str,
    columns: Mapping[str, Any],
    version: int | None,
    statuses: bool,
    traceparent: str | None = None,
    as_of: AsOf = None,
) -> list[Any]:
    options = _lookup_options(as_of, traceparent)
    if version is not None:
        options["version"] = version
    if statuses:
        options["statuses"] = True
    return [model, encode_columns(columns), options]


def features_params(
    features: Sequence[str], columns: Mapping[str, Any], traceparent: str | None = None, as_of: AsOf = None
) -> list[Any]:
    if isinstance(features, str):
        raise InvalidArgument(f"features: give a list of references, such as [{features!r}]")
    return [list(features), encode_columns(columns), _lookup_options(as_of, traceparent)]


def _lookup_options(as_of: AsOf, traceparent: str | None) -> dict[str, Any]:
    """Return the options of predict and get_online_features. Raises InvalidArgument for a moment that cannot be right.

    A moment is sent as text: a number in January 1970 would look as if it had another unit.
    """
    options: dict[str, Any] = {"encoding": "tensor"}
    if as_of is not None:
        options["as_of"] = time_text(as_of_us(as_of))
    return traced(options, traceparent)


def write_params(view: str, columns: Any, traceparent: str | None = None, partial: bool = False) -> list[Any]:
    """Return the params of push and delete."""
    return [view, encode_columns(columns), traced({"partial": True} if partial else {}, traceparent)]


def traced(options: dict[str, Any], traceparent: str | None) -> dict[str, Any]:
    """Return the options of a request, with its traceparent if there is one."""
    if traceparent is not None:
        options["traceparent"] = traceparent
    return options


def read_rows(method: str, *results: Any) -> int:
    """Return the number of rows of a push or delete. results: of its parts."""
    try:
        return sum(int(result["rows"]) for result in results)
    except (KeyError, TypeError, ValueError) as error:
        raise Internal(f"{method}: the server's result is not understood: {error!r}") from None


def read_pushed(*results: Any) -> RowCount:
    """Return the rows of a push. results: of its parts, whose server may be older and answer `rows` alone."""
    rows = read_rows("push", *results)
    try:
        older, duplicate = (sum(int(result.get(name, 0)) for result in results) for name in ("older", "duplicate"))
    except (TypeError, ValueError) as error:
        raise Internal(f"push: the server's result is not understood: {error!r}") from None
    return RowCount.pushed(rows + older, older, duplicate)


def read_prediction(model: str, *results: Any) -> Prediction:
    """Return the prediction in the results of all parts, which one version answered."""
    try:
        first = results[0]
        outputs = {name: _joined([result["outputs"][name] for result in results]) for name in first["outputs"]}
        views = first.get("statuses", {})
        statuses = {view: _joined_codes([result["statuses"][view] for result in results]) for view in views}
        return Prediction(model, int(first["version"]), outputs, statuses)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Internal(f"predict: the server's result is not understood: {error!r}") from None


def read_features(*results: Any) -> Features:
    """Return the features in the results of all parts."""
    try:
        first = results[0]
        values = [_joined(columns) for columns in zip(*(result["values"] for result in results), strict=True)]
        statuses = [_joined_codes(codes) for codes in zip(*(result["statuses"] for result in results), strict=True)]
        types = first.get("types")  # older servers do not send types
        if types is not None and len(types) != len(values):
            raise ValueError(f"{len(types)} types for {len(values)} columns")
        return Features(first["feature_names"], values, statuses, first.get("has_default"), types)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Internal(f"get_online_features: the server's result is not understood: {error!r}") from None


def read_list(method: str, result: Any) -> list[dict[str, Any]]:
    if not isinstance(result, list):
        raise Internal(f"{method}: the server's result is not a list")
    return result


def _joined(parts: Sequence[Any]) -> protocol.Array:
    """Return an output or a feature column as an array. parts: its rows in each result."""
    return _to_array(parts[0]) if len(parts) == 1 else np.concatenate([_to_array(part) for part in parts])


def _joined_codes(parts: Sequence[Any]) -> protocol.Array:
    arrays = [np.asarray(part, np.uint8) for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _to_array(values: Any) -> protocol.Array:
    """Return an output or a feature column as an array. A tensor is decoded already; a list holds strings."""
    if isinstance(values, np.ndarray):
        return values
    array = np.array(values, object)  # NumPy's fixed-width strings would lose zero bytes at the end
    return array if array.size and isinstance(array.flat[0], str | None) else np.asarray(values)


# Time and failures


def check_timeout(timeout_s: float) -> float:
    if not 0 < timeout_s < float("inf"):
        raise InvalidArgument(f"timeout_s={timeout_s!r}: give a number of seconds above 0")
    return float(timeout_s)


def check_message(method: str, request: bytes) -> None:
    """Raise ResourceExhausted for a message of too many bytes or elements, or one that is nested too deep.

    The server closes the connection after such a message, and the other calls on it would fail too.
    """
    try:
        scan(request)
    except ResourceExhausted as error:
        raise ResourceExhausted(f"{method}: {error.message}") from None


class Deadline:
    """The time that a caller gives a call, for all its parts and attempts.

    wait_s: how long it waits for answers. timeout_s: of the client. deadline_ms: of the call, or None. Raises
    DeadlineExceeded if deadline_ms is not above 0.
    """

    __slots__ = ("budget_end_s", "end_s", "wait_s")

    def __init__(self, timeout_s: float, deadline_ms: float | None = None):
        start_s = time.monotonic()
        if deadline_ms is None:
            self.wait_s = budget_s = timeout_s
        elif deadline_ms > 0:
            budget_s = min(timeout_s, deadline_ms / 1000)
            self.wait_s = min(timeout_s, deadline_ms / 1000 + DEADLINE_GRACE_S)
        else:
            raise DeadlineExceeded(f"deadline_ms {deadline_ms:g}: the deadline has passed already")
        self.end_s = start_s + self.wait_s
        self.budget_end_s = start_s + budget_s


class Call:
    """A request of a client, encoded. All its attempts end at the deadline.

    address: of the server, for error messages. Raises InvalidArgument for params that cannot be encoded, and
    ResourceExhausted for a message that the server would refuse together with its connection.
    """

    __slots__ = ("_has_options", "_request", "address", "deadline", "method", "msgid", "retries", "sent")

    def __init__(self, address: Address, msgid: int, method: str, params: list[Any], deadline: Deadline):
        self._has_options = bool(params) and type(params[-1]) is dict
        if self._has_options:
            params[-1]["deadline_ms"] = 0.0  # a float64: the last eight bytes of the request, which message() replaces
        self._request = pack_request(msgid, method, params)
        check_message(method, self._request)
        self.address = address
        self.deadline = deadline
        self.method = method
        self.msgid = msgid
        self.retries = 0
        self.sent = False  # whether the server may have the complete request

    def mark_sent(self) -> None:
        """Note that the server may have the complete request from now on."""
        self.sent = True

    def count_retry(self) -> None:
        """Note that the call is sent once more."""
        self.retries += 1

    @property
    def is_read(self) -> bool:
        """Whether the method only reads, so that it is safe to run it twice."""
        return self.method not in ("push", "delete")

    def message(self) -> bytes:
        """Return the encoded request, with the time that is left now as its deadline_ms.

        Raises DeadlineExceeded if no time is left.
        """
        left_s = self.deadline.budget_end_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"{self.method}: the deadline passed before the request was sent")
        return self._request[:-8] + _pack_float64(left_s * 1000) if self._has_options else self._request

    def budget_s(self) -> float:
        """Return the seconds until the deadline; 0 or less if it has passed."""
        return self.deadline.budget_end_s - time.monotonic()

    def left_s(self) -> float:
        """Return for how many seconds the call still waits for an answer. Raises DeadlineExceeded if there are none."""
        seconds = self.deadline.end_s - time.monotonic()
        if seconds <= 0:
            raise self.no_answer()
        return seconds

    def no_answer(self) -> DeadlineExceeded:
        """Make the error for a call that got no answer in time."""
        return DeadlineExceeded(f"{self.method}: no answer from {self.address} within {self.deadline.wait_s:g} s")


def reason(error: OSError) -> str:
    """Return the system's text for an error, without its number: "connection refused"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'failed').lower().replace('_', ' ')}"
    if isinstance(error, TimeoutError):
        return "timed out"
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return (error.strerror or str(error)).lower()


def raise_no_server(address: Address, error: OSError) -> NoReturn:
    """Raise Unavailable for a connection that could not be made."""
    if isinstance(error, socket.gaierror):
        raise Unavailable(f"no server at {address}: cannot resolve {address.host!r}: {reason(error)}") from None
    if isinstance(error, ssl.SSLError):
        raise Unavailable(f"no secure connection to {address}: {reason(error)}") from None
    raise Unavailable(
        f"no server at {address}: {reason(error)}; start one with `shorttail serve --store STORE`"
    ) from None
