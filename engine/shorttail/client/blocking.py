"""The blocking client."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from shorttail import protocol
from shorttail.client import calls, credentials
from shorttail.client.calls import Call
from shorttail.client.credentials import TLS
from shorttail.client.pool import Connection, Pool
from shorttail.client.retries import Retries
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, Unavailable
from shorttail.results import Features, Prediction


class Client:
    """A blocking client, which threads may share: calls made at the same time have a connection each.

    address: "host:port", ":port" or "unix:/path". Connects at the first call, and again after a failure. timeout_s
    bounds each call with all that it waits for; a call may give less by deadline_ms. What is left of it is sent with
    each request, so that the server does not work for a caller that has gone. token: shown to the server at each
    connecting. tls: an ssl.SSLContext, the path of a CA's certificate, or True for the CAs of this machine; of a TCP
    address only. max_connections: more calls than that at the same time wait for each other. retries: how often a call
    that was lost is sent again (client/retries.py says which); 0 never.

        with st.Client("127.0.0.1:7711") as client:
            p = client.predict("fraud", {"user_id": [1, 2, 3], "amount": [9.5, 1.0, 700.0]})

    Errors: Unavailable (no server, connection lost), DeadlineExceeded, and whatever the server reports, all of
    shorttail.errors.
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
        deadline_ms: float | None = None,
        statuses: bool = False,
        traceparent: str | None = None,
    ) -> Prediction:
        """Run a model. columns: keys and request columns, scalars or arrays of one length; a scalar is broadcast.

        version: a version other than the current one; statuses: also report, for each view and row, how the lookup
        went; traceparent: W3C trace context, which the server's log names. Results are numpy arrays.
        """
        params = calls.predict_params(model, columns, version, statuses, traceparent)
        return calls.read_prediction(model, self._call("predict", params, deadline_ms))

    def get_online_features(
        self,
        features: Sequence[str],
        columns: Mapping[str, Any],
        *,
        deadline_ms: float | None = None,
        traceparent: str | None = None,
    ) -> Features:
        """Look features up. features: "view:feature" references; columns: the views' keys, as for predict."""
        params = calls.features_params(features, columns, traceparent)
        return calls.read_features(self._call("get_online_features", params, deadline_ms))

    def push(self, view: str, rows: Any, *, deadline_ms: float | None = None, traceparent: str | None = None) -> int:
        """Upsert rows: a dict of columns, pandas, polars or pyarrow. Returns the rows taken, which are durable then.

        The view's timestamp column (or `event_time`) holds event times; without it they are now. A row older than the
        one stored is dropped. deadline_ms: when it passes first, nothing is written. All rows of a call are written or
        none; after Unavailable or DeadlineExceeded from the connection it may be either. The client pushes again by
        itself only what was certainly not written; pushing again is safe unless others wrote the same rows meanwhile.
        """
        params = calls.write_params(view, rows, traceparent)
        return calls.read_rows("push", self._call("push", params, deadline_ms))

    def delete(self, view: str, keys: Any, *, deadline_ms: float | None = None, traceparent: str | None = None) -> int:
        """Delete the rows of these keys: columns, as for push. Returns how many there were; durable then."""
        params = calls.write_params(view, keys, traceparent)
        return calls.read_rows("delete", self._call("delete", params, deadline_ms))

    def models(self) -> list[dict[str, Any]]:
        """The models served: name, version, columns {name: type name} and outputs [name] of each."""
        return calls.read_list("models", self._call("models", []))

    def views(self) -> list[dict[str, Any]]:
        """The feature views served: name, keys {name: type name}, features {name: type name} and timestamp of each."""
        return calls.read_list("views", self._call("views", []))

    def ping(self) -> None:
        """Return when the server answers; raise Unavailable or DeadlineExceeded when it does not."""
        self._call("ping", [])

    def close(self) -> None:
        """Close the connections; those of calls in flight when these end. A later call connects again."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, params: list[Any], deadline_ms: float | None = None) -> Any:
        call = Call(self.address, self._msgid(), method, params, self.timeout_s, deadline_ms)
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
            # Whatever happened (a KeyboardInterrupt too), this call's reply must not be taken for the next one's.
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
                auth = Call(self.address, self._msgid(), "auth", [self._token], call.left_s())
                refusal, _ = connection.ask(auth)
                if refusal is not None:
                    raise refusal
            except BaseException:
                connection.close()
                raise
        return connection

    def _msgid(self) -> int:
        return next(self._msgids) % protocol.MSGID_LIMIT
