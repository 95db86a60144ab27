"""What both clients share: the parameters of a call, its result, its timeouts and how its failures read."""

from __future__ import annotations

import os
import select
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from shorttail import protocol
from shorttail.errors import DeadlineExceeded, Internal, InvalidArgument, Unavailable
from shorttail.protocol import Address
from shorttail.results import Features, Prediction

# With a deadline the server answers DEADLINE_EXCEEDED by itself; wait this much longer for that answer to arrive.
DEADLINE_GRACE_S = 0.1


def predict_params(
    model: str, columns: Mapping[str, Any], version: int | None, deadline_ms: float | None, statuses: bool
) -> list[Any]:
    options = _options(deadline_ms)
    if version is not None:
        options["version"] = version
    if statuses:
        options["statuses"] = True
    return [model, protocol.encode_columns(columns), options]


def features_params(features: Sequence[str], columns: Mapping[str, Any], deadline_ms: float | None) -> list[Any]:
    if isinstance(features, str):
        raise InvalidArgument(f"features: give a list of references, such as [{features!r}]")
    return [list(features), protocol.encode_columns(columns), _options(deadline_ms)]


def _options(deadline_ms: float | None) -> dict[str, Any]:
    return {"encoding": "tensor"} if deadline_ms is None else {"encoding": "tensor", "deadline_ms": deadline_ms}


def write_params(view: str, columns: Any, deadline_ms: float | None) -> list[Any]:
    """Of push and delete."""
    params = [view, protocol.encode_columns(columns)]
    return params if deadline_ms is None else [*params, {"deadline_ms": deadline_ms}]


def read_rows(method: str, result: Any) -> int:
    try:
        return int(result["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise Internal(f"{method}: the server's result is not understood: {error!r}") from None


def read_prediction(model: str, result: Any) -> Prediction:
    try:
        outputs = {name: _to_array(values) for name, values in result["outputs"].items()}
        statuses = {view: np.asarray(codes, np.uint8) for view, codes in result.get("statuses", {}).items()}
        return Prediction(model, int(result["version"]), outputs, statuses)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Internal(f"predict: the server's result is not understood: {error!r}") from None


def read_features(result: Any) -> Features:
    try:
        values = [_to_array(column) for column in result["values"]]
        statuses = [np.asarray(codes, np.uint8) for codes in result["statuses"]]
        return Features(result["feature_names"], values, statuses, result.get("has_default"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Internal(f"get_online_features: the server's result is not understood: {error!r}") from None


def read_list(method: str, result: Any) -> list[dict[str, Any]]:
    if not isinstance(result, list):
        raise Internal(f"{method}: the server's result is not a list")
    return result


def _to_array(values: Any) -> protocol.Array:
    """An output or a column: a tensor is an array already; what comes as a list is strings."""
    if isinstance(values, np.ndarray):
        return values
    array = np.asarray(values)
    return array.astype(object) if array.dtype.kind == "U" else array


# Time and failures


def check_timeout(timeout_s: float) -> float:
    if not 0 < timeout_s < float("inf"):
        raise InvalidArgument(f"timeout_s={timeout_s!r}: give seconds above 0")
    return float(timeout_s)


def seconds_to_wait(timeout_s: float, deadline_ms: float | None) -> float:
    if deadline_ms is None:
        return timeout_s
    if deadline_ms <= 0:
        raise DeadlineExceeded(f"deadline_ms {deadline_ms:g}: the deadline has passed already")
    return min(timeout_s, deadline_ms / 1000 + DEADLINE_GRACE_S)


def left(end: float) -> float:
    """Seconds until `end`, a time.monotonic(). Raises TimeoutError when there are none."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def is_idle(connection: socket.socket) -> bool:
    """False when the server closed it since the last call, or sent what nobody asked for: do not use it again."""
    if isinstance(connection, ssl.SSLSocket):
        # TLS has messages of its own, such as session tickets: only reading tells them from data.
        connection.setblocking(False)
        try:
            connection.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False
    poll = select.poll()  # select.select refuses file descriptors above 1023
    poll.register(connection, select.POLLIN)
    return not poll.poll(0)


def reason(error: OSError) -> str:
    """What the system says, without numbers: "connection refused"."""
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
    if isinstance(error, socket.gaierror):
        raise Unavailable(f"no server at {address}: cannot resolve {address.host!r}: {reason(error)}") from None
    if isinstance(error, ssl.SSLError):
        raise Unavailable(f"no secure connection to {address}: {reason(error)}") from None
    raise Unavailable(
        f"no server at {address}: {reason(error)}; start one with `shorttail serve --store STORE`"
    ) from None
