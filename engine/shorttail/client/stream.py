"""The connections of an AsyncClient: many calls share a connection, and a reply finds its call by the msgid."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from dataclasses import dataclass
from typing import Any, cast

from shorttail import protocol
from shorttail.client import calls, forks
from shorttail.client.calls import Call, Deadline
from shorttail.client.retries import backoff_s
from shorttail.errors import Internal, ShorttailError, Unavailable
from shorttail.protocol import Address

WRITE_HIGH_WATER_BYTES = 1 << 20


class PipelinedConnection(asyncio.Protocol):
    """One connection, from connecting until it is lost. waiting: msgid -> future of each call in flight."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop):
        self.address = address
        self.loop = loop
        self.is_lost = False
        self.gone = asyncio.Event()
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self._transport: asyncio.Transport | None = None
        self._unpacker = protocol.new_unpacker()
        self._unsent: dict[int, bytes] = {}
        self._paused = False

    async def ask(self, call: Call) -> Any:
        """Send a call and return its result. Raises the error of the reply, Unavailable, DeadlineExceeded, Internal."""
        if self.is_lost:
            raise Unavailable(f"{call.method}: connection to {self.address} lost")
        message, wait_s = call.message(), call.left_s()
        reply: asyncio.Future[Any] = self.loop.create_future()
        self.waiting[call.msgid] = reply
        # The calls of a turn of the event loop share one write, at the end of that turn.
        if not self._unsent:
            self.loop.call_soon(self._flush)
        self._unsent[call.msgid] = message
        timer = self.loop.call_later(wait_s, self._expire, reply, call)
        try:
            return await reply
        finally:
            timer.cancel()
            self.waiting.pop(call.msgid, None)
            if self._unsent.pop(call.msgid, None) is None:
                call.mark_sent()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses of asyncio's
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES, low=WRITE_HIGH_WATER_BYTES // 4)
        forks.watch(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._take(message)
        except protocol.UNPACK_ERRORS as error:
            self.lose(f"{self.address} sent bytes that are not MessagePack: {error}", Internal)
        except ShorttailError as error:
            self.lose(error.message, type(error))

    def _take(self, message: Any) -> None:
        msgid, error, result = protocol.read_response(message)
        reply = self.waiting.get(msgid)
        if reply is None or reply.done():
            return  # the caller has given up
        if error is not None:
            reply.set_exception(error)
        else:
            reply.set_result(result)

    def connection_lost(self, error: Exception | None) -> None:
        reason = calls.reason(error) if isinstance(error, OSError) else "the server closed it"
        self.lose(f"connection to {self.address} lost: {reason}")
        self.gone.set()

    def lose(self, message: str, kind: type[ShorttailError] = Unavailable) -> None:
        """Close the connection and fail every call in flight with this error. A second call does nothing."""
        if self.is_lost:
            return
        self.is_lost = True
        for reply in self.waiting.values():
            if not reply.done():
                reply.set_exception(kind(message))
        if self._transport is not None:
            self._transport.abort()

    def disown(self) -> list[int]:
        """For forks.Owner."""
        if self._transport is None or self.is_lost:
            return []  # the number of a closed descriptor may be that of another file by now
        return [self._transport.get_extra_info("socket").fileno()]

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def _flush(self) -> None:
        # Unsent requests stay here when the connection is lost: so `ask` knows that they were not sent.
        if self._unsent and not self._paused and not self.is_lost and self._transport is not None:
            self._transport.write(b"".join(self._unsent.values()))
            self._unsent.clear()

    def _expire(self, reply: asyncio.Future[Any], call: Call) -> None:
        if not reply.done():
            reply.set_exception(call.no_answer())


@dataclass(slots=True)
class Dialer:
    """Makes the connections of an AsyncClient."""

    address: Address
    timeout_s: float
    token: str | None
    tls: ssl.SSLContext | None
    msgids: itertools.count[int]

    async def dial(self) -> PipelinedConnection:
        """Connect and send the token. Raises Unavailable, and Unauthenticated if the server refuses the token."""
        loop = asyncio.get_running_loop()
        new = lambda: PipelinedConnection(self.address, loop)  # noqa: E731
        try:
            async with asyncio.timeout(self.timeout_s):
                if self.address.path is None:
                    host, port = self.address.host, self.address.port
                    _, stream = await loop.create_connection(new, host, port, ssl=self.tls)
                else:
                    _, stream = await loop.create_unix_connection(new, self.address.path)
        except OSError as error:
            calls.raise_no_server(self.address, error)
        if self.token is not None:
            msgid = next(self.msgids) % protocol.MSGID_LIMIT
            try:
                await stream.ask(Call(self.address, msgid, "auth", [self.token], Deadline(self.timeout_s)))
            except BaseException:
                stream.lose("the server did not accept the token")
                raise
        return stream


class Line:
    """A connection that is made again after it was lost. One attempt to connect serves all calls that wait for it."""

    def __init__(self, dialer: Dialer):
        self.stream: PipelinedConnection | None = None
        self._dialer = dialer
        self._dialing: asyncio.Task[PipelinedConnection] | None = None
        self._failures = 0
        self._again_s = 0.0  # when redial() may connect again, by the clock of the loop

    async def connected(self, call: Call) -> PipelinedConnection:
        """Return the connection when it is made. Raises DeadlineExceeded and the errors of Dialer.dial."""
        task = self._dial()
        await asyncio.wait({task}, timeout=call.left_s())
        if not task.done():
            raise call.no_answer()
        if task.cancelled():
            raise Unavailable(f"{call.method}: the client was closed")
        if isinstance(error := task.exception(), ShorttailError):
            raise type(error)(error.message)  # a new exception for each call that waited
        return task.result()

    def redial(self) -> None:
        """Connect in the background, after a pause if the last attempt failed: calls use other lines meanwhile."""
        if self._dialing is None and asyncio.get_running_loop().time() >= self._again_s:
            self._dial()

    def _dial(self) -> asyncio.Task[PipelinedConnection]:
        if self._dialing is None:
            self._dialing = asyncio.get_running_loop().create_task(self._dialer.dial())
            self._dialing.add_done_callback(self._dialed)
        return self._dialing

    def _dialed(self, task: asyncio.Task[PipelinedConnection]) -> None:
        self._dialing = None
        if not task.cancelled() and task.exception() is None:
            self.stream = task.result()
            self._failures = 0
        else:
            self._again_s = task.get_loop().time() + backoff_s(self._failures)
            self._failures += 1

    async def close(self) -> None:
        """Close the connection. Calls in flight raise Unavailable."""
        if self._dialing is not None:
            self._dialing.cancel()
            await asyncio.wait({self._dialing})
        if self.stream is not None:
            self.stream.lose("the client was closed")
            await self.stream.gone.wait()
