"""Clients of a running server: Client blocks, AsyncClient pipelines. Both return what the embedded engine returns."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from shorttail import calls, credentials, protocol
from shorttail.credentials import TLS
from shorttail.errors import DeadlineExceeded, Internal, ShorttailError, Unavailable
from shorttail.protocol import Address
from shorttail.results import Features, Prediction

RECEIVE_BYTES = 256 << 10
WRITE_HIGH_WATER_BYTES = 1 << 20


class Client:
    """A blocking client with one connection, which threads may share: calls take turns.

    address: "host:port", ":port" or "unix:/path". Connects at the first call, and again at the next call after a
    failure. timeout_s bounds connecting and each call; a call may give less by deadline_ms. token: shown to the server
    at each connecting. tls: an ssl.SSLContext, the path of a CA's certificate, or True for the CAs of this machine; of
    a TCP address only.

        with st.Client("127.0.0.1:7711") as client:
            p = client.predict("fraud", {"user_id": [1, 2, 3], "amount": [9.5, 1.0, 700.0]})

    Errors: Unavailable (no server, connection lost), DeadlineExceeded, and whatever the server reports, all of
    shorttail.errors.
    """

    def __init__(self, address: str, *, timeout_s: float = 5.0, token: str | None = None, tls: TLS = None):
        self.address = protocol.parse_address(address)
        self.timeout_s = calls.check_timeout(timeout_s)
        self._token = token
        self._tls = credentials.client_context(tls)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._unpacker = protocol.new_unpacker()
        self._msgids = itertools.count()

    def predict(
        self,
        model: str,
        columns: Mapping[str, Any],
        *,
        version: int | None = None,
        deadline_ms: float | None = None,
        statuses: bool = False,
    ) -> Prediction:
        """Run a model. columns: keys and request columns, scalars or arrays of one length; a scalar is broadcast.

        version: a version other than the current one; statuses: also report, for each view and row, how the lookup
        went. Results are numpy arrays.
        """
        params = calls.predict_params(model, columns, version, deadline_ms, statuses)
        return calls.read_prediction(model, self._call("predict", params, deadline_ms))

    def get_online_features(
        self, features: Sequence[str], columns: Mapping[str, Any], *, deadline_ms: float | None = None
    ) -> Features:
        """Look features up. features: "view:feature" references; columns: the views' keys, as for predict."""
        params = calls.features_params(features, columns, deadline_ms)
        return calls.read_features(self._call("get_online_features", params, deadline_ms))

    def push(self, view: str, rows: Any, *, deadline_ms: float | None = None) -> int:
        """Upsert rows: a dict of columns, pandas, polars or pyarrow. Returns the rows taken, which are durable then.

        The view's timestamp column (or `event_time`) holds event times; without it they are now. A row older than the
        one stored is dropped. deadline_ms: when it passes first, nothing is written. All rows of a call are written or
        none; after Unavailable or DeadlineExceeded from the connection it may be either, and pushing again is safe.
        """
        return calls.read_rows("push", self._call("push", calls.write_params(view, rows, deadline_ms), deadline_ms))

    def delete(self, view: str, keys: Any, *, deadline_ms: float | None = None) -> int:
        """Delete the rows of these keys: columns, as for push. Returns how many there were; durable then."""
        return calls.read_rows("delete", self._call("delete", calls.write_params(view, keys, deadline_ms), deadline_ms))

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
        with self._lock:
            self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, params: list[Any], deadline_ms: float | None = None) -> Any:
        wait_s = calls.seconds_to_wait(self.timeout_s, deadline_ms)
        end = time.monotonic() + wait_s
        expected = next(self._msgids) % protocol.MSGID_LIMIT
        request = protocol.pack_request(expected, method, params)
        if not self._lock.acquire(timeout=wait_s):
            raise DeadlineExceeded(f"{method}: other calls held the connection to {self.address} for {wait_s:g} s")
        try:
            msgid, error, result = protocol.read_response(self._exchange(request, method, wait_s, end))
            if msgid != expected:
                raise Internal(f"{method}: {self.address} answered call {msgid} instead of {expected}")
        except BaseException:
            # Whatever happened (a KeyboardInterrupt too), this call's reply must not be taken for the next one's.
            self._disconnect()
            raise
        finally:
            self._lock.release()
        if error is not None:
            raise error
        return result

    def _exchange(self, request: bytes, method: str, wait_s: float, end: float) -> Any:
        """Send a request and return the first message that comes back."""
        connection = self._connected(end, method, wait_s)
        return self._send(connection, request, method, wait_s, end)

    def _send(self, connection: socket.socket, request: bytes, method: str, wait_s: float, end: float) -> Any:
        try:
            connection.settimeout(calls.left(end))
            connection.sendall(request)
            while True:
                try:
                    return self._unpacker.unpack()
                except protocol.OutOfData:
                    pass
                connection.settimeout(calls.left(end))
                data = connection.recv(RECEIVE_BYTES)
                if not data:
                    raise Unavailable(f"{self.address} closed the connection during {method}")
                self._unpacker.feed(data)
        except TimeoutError:
            raise DeadlineExceeded(f"{method}: no answer from {self.address} within {wait_s:g} s") from None
        except OSError as error:
            raise Unavailable(f"{method}: connection to {self.address} lost: {calls.reason(error)}") from None
        except protocol.UNPACK_ERRORS as error:
            raise Internal(f"{method}: {self.address} sent what is not MessagePack: {error}") from None

    def _connected(self, end: float, method: str, wait_s: float) -> socket.socket:
        if self._socket is not None and calls.is_idle(self._socket):
            return self._socket
        self._disconnect()
        path = self.address.path
        try:
            if path is None:
                connection = socket.create_connection((self.address.host, self.address.port), calls.left(end))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = credentials.secured(connection, self._tls, self.address, calls.left(end))
            else:
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.settimeout(calls.left(end))
                    connection.connect(path)
                except OSError:
                    connection.close()
                    raise
        except OSError as error:
            calls.raise_no_server(self.address, error)
        self._socket = connection
        if self._token is not None:
            msgid = next(self._msgids) % protocol.MSGID_LIMIT
            request = protocol.pack_request(msgid, "auth", [self._token])
            _, refusal, _ = protocol.read_response(self._send(connection, request, method, wait_s, end))
            if refusal is not None:
                raise refusal
        return connection

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._unpacker = protocol.new_unpacker()


class AsyncClient:
    """An asyncio client: calls share one connection and do not wait for each other.

        async with await st.AsyncClient.connect("127.0.0.1:7711") as client:
            predictions = await asyncio.gather(*(client.predict("fraud", row) for row in rows))

    Connects again at the next call after a failure. For use in the event loop that it was connected in. token, tls and
    errors are those of Client.
    """

    def __init__(self, address: str, *, timeout_s: float = 5.0, token: str | None = None, tls: TLS = None):
        self.address = protocol.parse_address(address)
        self.timeout_s = calls.check_timeout(timeout_s)
        self._token = token
        self._tls = credentials.client_context(tls)
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._msgids = itertools.count()
        self._closed = False

    @classmethod
    async def connect(cls, address: str, *, timeout_s: float = 5.0, token: str | None = None, tls: TLS = None) -> Self:
        """A connected client. Raises Unavailable when there is no server at `address`."""
        client = cls(address, timeout_s=timeout_s, token=token, tls=tls)
        await client._connected()
        return client

    async def predict(
        self,
        model: str,
        columns: Mapping[str, Any],
        *,
        version: int | None = None,
        deadline_ms: float | None = None,
        statuses: bool = False,
    ) -> Prediction:
        """As Client.predict."""
        params = calls.predict_params(model, columns, version, deadline_ms, statuses)
        return calls.read_prediction(model, await self._call("predict", params, deadline_ms))

    async def get_online_features(
        self, features: Sequence[str], columns: Mapping[str, Any], *, deadline_ms: float | None = None
    ) -> Features:
        """As Client.get_online_features."""
        params = calls.features_params(features, columns, deadline_ms)
        return calls.read_features(await self._call("get_online_features", params, deadline_ms))

    async def push(self, view: str, rows: Any, *, deadline_ms: float | None = None) -> int:
        """As Client.push. Calls that wait together share a commit."""
        params = calls.write_params(view, rows, deadline_ms)
        return calls.read_rows("push", await self._call("push", params, deadline_ms))

    async def delete(self, view: str, keys: Any, *, deadline_ms: float | None = None) -> int:
        """As Client.delete."""
        params = calls.write_params(view, keys, deadline_ms)
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
        """Close the connection; calls in flight raise Unavailable."""
        self._closed = True
        if self._connection is not None:
            self._connection.lose("the client was closed")
            await self._connection.gone.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, params: list[Any], deadline_ms: float | None = None) -> Any:
        wait_s = calls.seconds_to_wait(self.timeout_s, deadline_ms)
        connection = self._connection
        if connection is None or connection.is_lost:
            connection = await self._connected()
        msgid = next(self._msgids) % protocol.MSGID_LIMIT
        request = protocol.pack_request(msgid, method, params)
        return await connection.call(msgid, method, request, wait_s)

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._closed:
                raise Unavailable(f"this client of {self.address} is closed")
            if self._connection is not None and not self._connection.is_lost:
                return self._connection
            loop = asyncio.get_running_loop()
            new = lambda: _Connection(self.address, loop)  # noqa: E731
            try:
                async with asyncio.timeout(self.timeout_s):
                    if self.address.path is None:
                        host, port = self.address.host, self.address.port
                        _, connection = await loop.create_connection(new, host, port, ssl=self._tls)
                    else:
                        _, connection = await loop.create_unix_connection(new, self.address.path)
            except OSError as error:
                calls.raise_no_server(self.address, error)
            await self._authenticate(connection)
            self._connection = connection
            return connection

    async def _authenticate(self, connection: _Connection) -> None:
        if self._token is None:
            return
        msgid = next(self._msgids) % protocol.MSGID_LIMIT
        request = protocol.pack_request(msgid, "auth", [self._token])
        try:
            await connection.call(msgid, "auth", request, self.timeout_s)
        except BaseException:
            connection.lose("the server did not take the token")
            raise


class _Connection(asyncio.Protocol):
    """One connection of an AsyncClient: requests out, replies to the calls that wait for them."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop):
        self.address = address
        self.loop = loop
        self.is_lost = False
        self.gone = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._unpacker = protocol.new_unpacker()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._unsent: dict[int, bytes] = {}
        self._paused = False

    async def call(self, msgid: int, method: str, request: bytes, wait_s: float) -> Any:
        if self.is_lost:
            raise Unavailable(f"{method}: connection to {self.address} lost")
        reply: asyncio.Future[Any] = self.loop.create_future()
        self._waiting[msgid] = reply
        # One write for all the calls of a loop turn; a call alone is written as soon as its caller waits.
        if not self._unsent:
            self.loop.call_soon(self._flush)
        self._unsent[msgid] = request
        timer = self.loop.call_later(wait_s, self._expire, reply, method, wait_s)
        try:
            return await reply
        finally:
            timer.cancel()
            self._waiting.pop(msgid, None)
            self._unsent.pop(msgid, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's classes
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES, low=WRITE_HIGH_WATER_BYTES // 4)

    def data_received(self, data: bytes) -> None:
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._take(message)
        except protocol.UNPACK_ERRORS as error:
            self.lose(f"{self.address} sent what is not MessagePack: {error}", Internal)
        except ShorttailError as error:
            self.lose(error.message, type(error))

    def _take(self, message: Any) -> None:
        msgid, error, result = protocol.read_response(message)
        reply = self._waiting.get(msgid)
        if reply is None or reply.done():
            return  # its caller has stopped waiting
        if error is not None:
            reply.set_exception(error)
        else:
            reply.set_result(result)

    def connection_lost(self, error: Exception | None) -> None:
        reason = calls.reason(error) if isinstance(error, OSError) else "the server closed it"
        self.lose(f"connection to {self.address} lost: {reason}")
        self.gone.set()

    def lose(self, message: str, kind: type[ShorttailError] = Unavailable) -> None:
        """Close, and fail every call in flight. Does nothing the second time."""
        if self.is_lost:
            return
        self.is_lost = True
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(kind(message))
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def _flush(self) -> None:
        if self._unsent and not self._paused and self._transport is not None:
            self._transport.write(b"".join(self._unsent.values()))
            self._unsent.clear()

    def _expire(self, reply: asyncio.Future[Any], method: str, wait_s: float) -> None:
        if not reply.done():
            reply.set_exception(DeadlineExceeded(f"{method}: no answer from {self.address} within {wait_s:g} s"))
