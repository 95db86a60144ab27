"""AsyncClient: the asyncio client, whose calls share connections."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from shorttail import protocol
from shorttail.client import calls, credentials, forks, parts
from shorttail.client.calls import Call, Deadline
from shorttail.client.credentials import TLS
from shorttail.client.parts import Steps, T
from shorttail.client.retries import Retries
from shorttail.client.stream import Dialer, Line, PipelinedConnection
from shorttail.config import LIMITS
from shorttail.define.event_times import AsOf
from shorttail.errors import InvalidArgument, ShorttailError, Unavailable
from shorttail.results import Features, Prediction, RowCount


class AsyncClient:
    """An asyncio client. Its calls share connections and do not wait for each other.

        async with await st.AsyncClient.connect("127.0.0.1:7711") as client:
            predictions = await asyncio.gather(*(client.predict("fraud", row) for row in rows))

    connections: the number of connections. A call uses the connection with the fewest calls in flight. A server with
    several workers spreads the connections over its workers. A lost connection is made again at the next call. Use the
    client only in the event loop in which it was connected; a forked child uses it in a loop of its own, in which it
    connects again. timeout_s, token, tls, retries and errors are as for Client.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 5.0,
        token: str | None = None,
        tls: TLS = None,
        connections: int = 1,
        retries: int = 4,
    ):
        self.address = protocol.parse_address(address)
        self.timeout_s = calls.check_timeout(timeout_s)
        if not 1 <= connections <= LIMITS.client_connections:
            raise InvalidArgument(f"connections={connections!r}: give a number from 1 to {LIMITS.client_connections}")
        self._msgids = itertools.count()
        self._dialer = Dialer(self.address, self.timeout_s, token, credentials.client_context(tls), self._msgids)
        self._connections = connections
        self._retries = Retries(retries)
        self._closed = False
        self.disown()
        forks.watch(self)

    def disown(self) -> list[int]:
        """Begin without connections and calls. Also for forks.Owner."""
        self._lines = [Line(self._dialer) for _ in range(self._connections)]
        self._in_flight = 0
        return []

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        timeout_s: float = 5.0,
        token: str | None = None,
        tls: TLS = None,
        connections: int = 1,
        retries: int = 4,
    ) -> Self:
        """Return a connected client. Raises Unavailable if there is no server at `address`."""
        client = cls(address, timeout_s=timeout_s, token=token, tls=tls, connections=connections, retries=retries)
        await client._connect_all()
        return client

    async def predict(
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
        """As Client.predict."""
        params = calls.predict_params(model, columns, version, statuses, traceparent, as_of)
        if parts.is_long(params[1]):
            return await self._in_parts(parts.predict(model, params), deadline_ms)
        return calls.read_prediction(model, await self._call("predict", params, deadline_ms))

    async def get_online_features(
        self,
        features: Sequence[str],
        columns: Mapping[str, Any],
        *,
        as_of: AsOf = None,
        deadline_ms: float | None = None,
        traceparent: str | None = None,
    ) -> Features:
        """As Client.get_online_features."""
        params = calls.features_params(features, columns, traceparent, as_of)
        if parts.is_long(params[1]):
            return await self._in_parts(parts.features(params), deadline_ms)
        return calls.read_features(await self._call("get_online_features", params, deadline_ms))

    async def push(
        self,
        view: str,
        rows: Any,
        *,
        partial: bool = False,
        deadline_ms: float | None = None,
        traceparent: str | None = None,
    ) -> RowCount:
        """As Client.push. Pushes that run at the same time share a commit."""
        params = calls.write_params(view, rows, traceparent, partial)
        if parts.is_long(params[1]):
            return await self._in_parts(parts.push(params), deadline_ms)
        return calls.read_pushed(await self._call("push", params, deadline_ms))

    async def delete(
        self, view: str, keys: Any, *, deadline_ms: float | None = None, traceparent: str | None = None
    ) -> int:
        """As Client.delete."""
        params = calls.write_params(view, keys, traceparent)
        if parts.is_long(params[1]):
            return await self._in_parts(parts.delete(params), deadline_ms)
        return calls.read_rows("delete", await self._call("delete", params, deadline_ms))

    async def models(self) -> list[dict[str, Any]]:
        """As Client.models."""
        return calls.read_list("models", await self._call("models", []))

    async def views(self) -> list[dict[str, Any]]:
        """As Client.views."""
        return calls.read_list("views", await self._call("views", []))

    async def ping(self) -> None:
        """As Client.ping."""
        await self._call("ping", [])

    async def close(self) -> None:
        """Close the connections; calls in flight raise Unavailable."""
        self._closed = True
        await asyncio.gather(*(line.close() for line in self._lines))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, params: list[Any], deadline_ms: float | None = None) -> Any:
        return await self._send(
            Call(self.address, self._msgid(), method, params, Deadline(self.timeout_s, deadline_ms))
        )

    async def _in_parts(self, steps: Steps[T], deadline_ms: float | None) -> T:
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
                    results.append(await self._send(call))
                except ShorttailError as error:
                    raise parts.in_part(part, error) from None

    def _msgid(self) -> int:
        return next(self._msgids) % protocol.MSGID_LIMIT

    async def _send(self, call: Call) -> Any:
        self._retries.earn()
        self._in_flight += 1
        try:
            while True:
                try:
                    stream = self._live() or await self._connected(call)
                    return await stream.ask(call)
                except Unavailable as error:
                    await self._pause(call, error)
        finally:
            self._in_flight -= 1

    async def _pause(self, call: Call, error: Unavailable) -> None:
        """Wait until `call` may be sent again. Raises `error` if it may not."""
        if self._closed:
            raise error
        await asyncio.sleep(self._retries.pause_s(call, error, self._in_flight))

    def _live(self) -> PipelinedConnection | None:
        """Return the connection with the fewest calls in flight, or None if all are lost. Lost ones are made again."""
        best = None
        lost = []
        for line in self._lines:
            stream = line.stream
            if stream is None or stream.is_lost:
                lost.append(line)
            elif best is None or len(stream.waiting) < len(best.waiting):
                best = stream
        if lost and best is not None:
            for line in lost:
                line.redial()
        return best

    async def _connected(self, call: Call) -> PipelinedConnection:
        """Wait until a lost connection is made again, and return it. Raises Unavailable, DeadlineExceeded."""
        if self._closed:
            raise Unavailable(f"this client of {self.address} is closed")
        stream = await self._lines[0].connected(call)
        return self._live() or stream

    async def _connect_all(self) -> None:
        """Connect all connections, and succeed if one succeeds. Raises Unavailable, and the errors of Dialer.dial."""
        call = Call(self.address, 0, "connect", [], Deadline(self.timeout_s))
        try:
            while True:
                tried = await asyncio.gather(*(line.connected(call) for line in self._lines), return_exceptions=True)
                failed = [error for error in tried if isinstance(error, BaseException)]
                if len(failed) < len(tried):
                    return
                if not isinstance(failed[0], Unavailable):
                    raise failed[0]
                await self._pause(call, failed[0])
        except BaseException:
            await self.close()
            raise
