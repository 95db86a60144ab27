"""Client: the blocking client, one call at a time per connection."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from shorttail import protocol
from shorttail.client import calls, credentials, parts
from shorttail.client.calls import Call, Deadline
from shorttail.client.credentials import TLS
from shorttail.client.parts import Steps, T
from shorttail.client.pool import Connection, Pool
from shorttail.client.retries import Retries
from shorttail.config import LIMITS
from shorttail.define.event_times import AsOf
from shorttail.errors import Internal, InvalidArgument, ShorttailError, Unavailable
from shorttail.results import Features, Prediction, RowCount


class Client:
    """A blocking client. Threads may share it: calls that run at the same time use a connection each. A forked child
    may use it too, and has connections of its own.

    address: "host:port", ":port" or "unix:/path". The client connects at the first call, and again after a failure.
    timeout_s: the time limit of each call in seconds, with connecting, retries and waiting for a connection. The
    deadline_ms of a call can shorten it. A request carries the time that is left until deadline_ms, so that the server
    does not work for a caller that has given up.
    token: sent to the server with `auth` on each new connection.
    tls: an ssl.SSLContext, the path of a CA certificate, or True for the CAs of this machine; only for a TCP address.
    max_connections: further calls at the same time wait for a free connection.
    retries: how often a call that failed with Unavailable is sent again, if that is safe (client/retries.py); 0: never.

        with st.Client("127.0.0.1:7711") as client:
            p = client.predict("fraud", {"user_id": [1, 2, 3], "amount": [9.5, 1.0, 700.0]})

    Calls raise Unavailable (no server, or the connection is lost), DeadlineExceeded, and every error that the server
    reports; all are in shorttail.errors.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 5.0,
        token: str | None = None,
        tls: TLS = None,
        max_connections: int = 64,
        retries: int = 4,
    ):
        self.address = protocol.parse_address(address)
        self.timeout_s = calls.check_timeout(timeout_s)
        self._token = token
        self._tls = credentials.client_context(tls)
        if not 1 <= max_connections <= LIMITS.client_connections:
            raise InvalidArgument(f"max_connections={max_connections!r}: give 1 to {LIMITS.client_connections}")
        self._retries = Retries(retries)
        self._pool = Pool(max_connections, self._open)
        self._msgids = itertools.count()

    def predict(
        self,
        model: str,
        columns: Mapping[str, Any],
        *,
        version: int | None = None,
        as_of: AsOf = None,
        deadline_ms: float | None = None,
        statuses: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """Run a model and return its outputs as NumPy arrays.

        columns: the key columns of the views and the request columns, each a scalar or an array. All arrays have the
        same length, the number of rows; a scalar is the same for all rows. version: None runs the current version.
        as_of: as for get_online_features.
        deadline_ms: the time limit of this call in milliseconds. statuses: also return a `Status` for each view and
        row. traceparent: W3C trace context, written to the server's log if the request fails or is slow.

        More than 16,384 rows are sent in parts, which one version answers. Raises InvalidArgument if the model takes
        the rows of a request together, because in parts they would have other answers.
        """
        params = calls.predict_params(model, columns, version, statuses, traceparent, as_of)
        if parts.is_long(params[1]):
            return self._in_parts(parts.predict(model, params), deadline_ms)
        return calls.read_prediction(model, self._call("predict", params, deadline_ms))

    def get_online_features(
        self,
        features: Sequence[str],
        columns: Mapping[str, Any],
        *,
        as_of: AsOf = None,
        deadline_ms: float | None = None,
        traceparent: str | None = None,
    ) -> Features:
        """Look up features. features: "view:feature" references; columns: the keys of their views, as for predict.

        as_of: the moment at which TTLs are judged (a datetime, ISO 8601 text, or microseconds since 1970; UTC); a row
        that is newer is NOT_FOUND, and the row that it replaced is gone. None: when the server looks up.

        More than 16,384 rows are looked up in parts, each of which is answered from the rows that are stored then.
        """
        params = calls.features_params(features, columns, traceparent, as_of)
        if parts.is_long(params[1]):
            return self._in_parts(parts.features(params), deadline_ms)
        return calls.read_features(self._call("get_online_features", params, deadline_ms))

    def push(
        self,
        view: str,
        rows: Any,
        *,
        partial: bool = False,
        deadline_ms: float | None = None,
        traceparent: str | None = None,
    ) -> RowCount:
        """Insert or replace rows. Returns the number of rows that were not older, when they are durable.

        rows: a dict of columns, or a pandas, polars or pyarrow table. A feature with a `column` of its own is given
        under that name. The view's timestamp column (or `event_time`) holds the event times; without that column the
        server makes them. One that cannot be right is refused (docs/types.md). Other columns are ignored. A row that is
        older than the stored row of its key is dropped. Up to 16,384 rows are written all, or none. More rows are sent
        in parts of which each is written completely or not at all: if one fails, those before it are written, and its
        error says where it begins.

        partial: the rows have only some features, and no other columns. Of a row that is stored, the other features
        stay; in a new row they are null.
        deadline_ms: if it passes before the rows are committed, the server writes nothing. After Unavailable, or after
        a DeadlineExceeded that did not come from the server, the rows may or may not be written. The client itself
        sends a push again only if the server certainly did not get it. A caller may push again, unless another writer
        may have written the same rows in between.
        """
        params = calls.write_params(view, rows, traceparent, partial)
        if parts.is_long(params[1]):
            return self._in_parts(parts.push(params), deadline_ms)
        return calls.read_pushed(self._call("push", params, deadline_ms))

    def delete(self, view: str, keys: Any, *, deadline_ms: float | None = None, traceparent: str | None = None) -> int:
        """Delete the rows of keys, given as columns. Returns how many rows existed, when the deletion is durable.

        More than 16,384 keys are sent in parts, as those of a push.
        """
        params = calls.write_params(view, keys, traceparent)
        if parts.is_long(params[1]):
            return self._in_parts(parts.delete(params), deadline_ms)
        return calls.read_rows("delete", self._call("delete", params, deadline_ms))

    def models(self) -> list[dict[str, Any]]:
        """Return name, version, columns {name: type name} and outputs [name] of each model."""
        return calls.read_list("models", self._call("models", []))

    def views(self) -> list[dict[str, Any]]:
        """Return name, keys {name: type name}, features {name: type name} and timestamp of each feature view."""
        return calls.read_list("views", self._call("views", []))

    def ping(self) -> None:
        """Return when the server has answered. Raises Unavailable or DeadlineExceeded if it does not answer."""
        self._call("ping", [])

    def command(self, step: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take a step of a command that the server runs, as docs/protocol.md describes. It may be sent again.

        `shorttail` commands with --server use this. Raises PermissionDenied without an admin token.
        """
        result = self._call("command", [step, dict(given), {}])
        if not isinstance(result, dict):
            raise Internal("command: the server's result is not a map")
        return result

    def close(self) -> None:
        """Close the connections; a connection in use is closed when its call ends. A later call connects again."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, params: list[Any], deadline_ms: float | None = None) -> Any:
        return self._send(Call(self.address, self._msgid(), method, params, Deadline(self.timeout_s, deadline_ms)))

    def _in_parts(self, steps: Steps[T], deadline_ms: float | None) -> T:
        """Run a call that has several requests: see client/parts.py."""
        deadline, results = Deadline(self.timeout_s, deadline_ms), None
        while True:
            try:
                requests = next(steps) if results is None else steps.send(results)
            except StopIteration as end:
                result: T = end.value
                return result
            made = [Call(self.address, self._msgid(), part.method, part.params, deadline) for part in requests]
            results = []
            for part, call in zip(requests, made, strict=True):
                try:
                    results.append(self._send(call))
                except ShorttailError as error:
                    raise parts.in_part(part, error) from None

    def _send(self, call: Call) -> Any:
        self._retries.earn()
        while True:
            try:
                return self._attempt(call)
            except Unavailable as error:
                pause_s = self._retries.pause_s(call, error)
            time.sleep(pause_s)

    def _attempt(self, call: Call) -> Any:
        connection = self._pool.take(call)
        try:
            error, result = connection.ask(call)
        except BaseException:
            # After any failure, a KeyboardInterrupt too, this call's reply could be read as that of the next call.
            self._pool.drop(connection)
            raise
        self._pool.give(connection)
        if error is not None:
            raise error
        return result

    def _open(self, call: Call) -> Connection:
        connection = Connection.open(self.address, self._tls, call)
        if self._token is not None:
            try:
                auth = Call(self.address, self._msgid(), "auth", [self._token], Deadline(call.left_s()))
                refusal, _ = connection.ask(auth)
                if refusal is not None:
                    raise refusal
            except BaseException:
                connection.close()
                raise
        return connection

    def _msgid(self) -> int:
        return next(self._msgids) % protocol.MSGID_LIMIT
