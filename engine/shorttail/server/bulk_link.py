"""A worker's link to the bulk worker (bulk.py): it passes on large requests, and passes back the replies.

Each request has a connection of its own. The message goes out as its client sent it, and what comes back is the reply
as the client gets it, so neither is decoded here. The supervisor starts the bulk worker when the first connection
waits; until it accepts, the request waits too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, cast

from shorttail._native.wire import BulkReply, Connection
from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, ResourceExhausted, ShorttailError, Unavailable

PIECE_BYTES: Final = 128 << 10  # of a message or a reply, written at once
REST_TURNS: Final = 4  # after a part of a reply the loop does other work for so many times as long
REFUSED: Final = (
    "a request of this size would hold up all others, and the server was started with --no-bulk: send it in parts"
)


def refuse(connection: Connection | None, msgid: int, message: bytes | memoryview, deadline_ns: int) -> None:
    """Refuse a large request: the `bulk` of a Router whose server has no bulk worker. Raises ResourceExhausted."""
    raise ResourceExhausted(REFUSED)


class BulkLink:
    """The large requests of MessagePack-RPC of one worker that are in flight. path: of the bulk worker's socket."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop):
        self.path = path
        self.loop = loop
        self.calls: set[BulkCall] = set()
        self.bytes = 0  # of the requests, and of the replies as far as they have arrived

    def forward(self, connection: Connection | None, msgid: int, message: bytes | memoryview, deadline_ns: int) -> None:
        """Pass on a request: the `bulk` of a Router. Raises ResourceExhausted."""
        if len(self.calls) >= LIMITS.bulk_requests or self.bytes + len(message) > LIMITS.bulk_bytes:
            raise ResourceExhausted(f"{len(self.calls)} large requests are in flight; send it again later")
        self.calls.add(BulkCall(self, connection, msgid, message, deadline_ns))

    def close(self) -> None:
        """Cut all connections. Requests without an answer are answered with UNAVAILABLE."""
        for call in list(self.calls):
            call.fail(Unavailable("the server is stopping; send it again"))


class BulkCall(asyncio.Protocol):
    """A large request in flight. connection: None for a notification. deadline_ns: of CLOCK_MONOTONIC; 0: none."""

    def __init__(
        self, link: BulkLink, connection: Connection | None, msgid: int, message: bytes | memoryview, deadline_ns: int
    ):
        self.link = link
        self.connection = connection
        self.msgid = msgid
        self.message: bytes | memoryview = message
        self.reply = BulkReply()
        self._size = len(message)
        self._transport: asyncio.Transport | None = None
        self._has_ended = False
        self._is_full = False  # what was written has not left yet
        link.bytes += self._size
        left_s = (deadline_ns - time.monotonic_ns()) / 1e9 if deadline_ns else LIMITS.start_timeout_s
        self._timer = link.loop.call_later(max(0.0, left_s), self._expire)
        self._task = link.loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self.link.loop.create_unix_connection(lambda: self, self.link.path)
        except OSError as error:
            self.fail(Unavailable(f"the bulk worker cannot be reached: {error.strerror or error}"))

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("the deadline passed before the bulk worker answered"))

    def fail(self, error: ShorttailError) -> None:
        """Answer with an error, unless the request has its answer."""
        if not self._has_ended:
            self._end()
            if self.connection is not None:
                self.connection.fail_forwarded(self.msgid, error.code, error.message)

    def _end(self) -> None:
        self._has_ended = True
        self._timer.cancel()
        self._task.cancel()
        self.message = b""
        self.link.calls.discard(self)
        self.link.bytes -= self._size
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's classes
        if self._has_ended:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=PIECE_BYTES)
        self.message = memoryview(self.message)
        self._send_on()

    def _send_on(self) -> None:
        """Send the next piece of the message, and the others in later turns of the loop."""
        if self._transport is None or self._has_ended or self._is_full or not len(self.message):
            return
        began_s = time.perf_counter()
        self._transport.write(self.message[:PIECE_BYTES])
        self.message = self.message[PIECE_BYTES:]
        if len(self.message):
            self.link.loop.call_later(REST_TURNS * (time.perf_counter() - began_s), self._send_on)
        else:
            self._transport.write_eof()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        if len(self.message):
            self.link.loop.call_soon(self._send_on)

    def data_received(self, data: bytes) -> None:
        if self._has_ended:
            return
        self._size += len(data)
        self.link.bytes += len(data)
        began_s = time.perf_counter()
        try:
            whole = self.reply.feed(data)
        except ShorttailError as error:
            self.fail(error)
            return
        if whole:
            self._end()
            if self.connection is not None:
                self.connection.relay_reply(self.reply)
        elif self._transport is not None:  # the loop would read a socket up to 32 times before it looks at the next
            self._transport.pause_reading()
            self.link.loop.call_later(REST_TURNS * (time.perf_counter() - began_s), self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self._has_ended:
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self.connection is None and not self._has_ended:
            self._end()  # a notification has no reply
        self.fail(Unavailable("the bulk worker died before it answered; send it again"))
