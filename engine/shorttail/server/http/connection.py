"""The HTTP connections of a worker: how many there may be, how long they may be silent, and how they are read."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from shorttail.config import LIMITS
from shorttail.server.http.json import json_response

# Received bytes are parsed in slices. A slice that took longer than SLICE_S makes the next ones smaller, because some
# bytes cost much more than others: a chunk of one byte costs as much as one of 64 KiB. The loop then does other work
# for REST_TURNS times as long.
SLICE_S: Final = 0.0002
REST_TURNS: Final = 4
SLICE_BYTES: Final = 2 << 10
SLICE_BYTES_MIN: Final = 512
SLICE_BYTES_MAX: Final = 64 << 10
LARGE_BYTES: Final = 64 << 10
# What a reply says about bytes that are not HTTP. The parser's own text also quotes them, and they may hold a token.
QUOTE_MARKS: Final = (": b'", ': b"', ": bytearray(", ":\n")


class ConnectionOwner(Protocol):
    """The part of HttpServer that a connection uses."""

    connections: Connections
    received_bytes: int

    def fault(self, error: Exception) -> None:
        """Report an exception that is no fault of the client."""

    def note_garbage(self, error: str) -> None:
        """Log bytes that are not HTTP."""


class HttpConnection(web.RequestHandler):  # type: ignore[misc,unused-ignore]
    """A connection of aiohttp that is counted and limited.

    aiohttp itself waits without limit for the first request, takes any number of connections, and parses all that has
    arrived in one piece. in_reserve: the worker has as many connections as it may have, and this one may only ask for
    probes and metrics.
    """

    __slots__ = (
        "_first_request_timer",
        "_has_asked",
        "_held",
        "_owner",
        "_rests",
        "_slice_bytes",
        "address",
        "in_reserve",
    )

    def __init__(self, owner: ConnectionOwner, manager: web.Server, loop: asyncio.AbstractEventLoop):
        super().__init__(
            manager,
            loop=loop,
            access_log=None,  # type: ignore[arg-type,unused-ignore]
            keepalive_timeout=LIMITS.http_idle_s,
            lingering_time=LIMITS.http_linger_s,
            auto_decompress=False,
        )
        self._owner = owner
        self._first_request_timer: asyncio.TimerHandle | None = None
        self._has_asked = False  # a request has arrived
        self._held = b""  # bytes that have arrived and are not parsed
        self._rests = False  # is not read for a moment
        self._slice_bytes = SLICE_BYTES
        self.address = ""
        self.in_reserve = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = transport.get_extra_info("peername")
        self.address = str(address[0]) if isinstance(address, tuple) else ""
        if not self._owner.connections.add(self):
            self.cut()
            return
        self._first_request_timer = asyncio.get_running_loop().call_later(LIMITS.http_header_s, self._cut_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._held = b""
        self._owner.connections.remove(self)
        if self._first_request_timer is not None:
            self._first_request_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._owner.received_bytes += len(data)
        if not data:
            super().data_received(data)  # aiohttp itself goes on with what it has
        elif self._rests or self._held:  # more may arrive although reading is paused
            self._held += data
        elif len(data) <= SLICE_BYTES_MIN:
            super().data_received(data)
        else:
            self._held = data
            self._parse_slice()

    def _parse_slice(self) -> None:
        """Parse a part of what has arrived, and the rest in later turns of the loop."""
        data = self._held
        part, self._held = data[: self._slice_bytes], data[self._slice_bytes :]
        start_s = time.perf_counter()
        super().data_received(part)
        took_s = time.perf_counter() - start_s
        if took_s > SLICE_S:
            self._slice_bytes = max(SLICE_BYTES_MIN, self._slice_bytes // 2)
        elif took_s < SLICE_S / 4:
            self._slice_bytes = min(SLICE_BYTES_MAX, self._slice_bytes * 2)
        # Also if all is parsed: the loop would read a socket up to 32 times before it looks at the next.
        if (self._held or len(data) >= LARGE_BYTES) and self.transport is not None:
            self._rests = True
            self.transport.pause_reading()
            rest_s = REST_TURNS * took_s if took_s > SLICE_S else 0.0
            asyncio.get_running_loop().call_later(rest_s, self._go_on)

    def _go_on(self) -> None:
        """After a rest, parse the next slice or read on, unless aiohttp wants no more for now."""
        self._rests = False
        if self._reading_paused or self._buffer_paused or self.transport is None:
            return
        if self._held:
            self._parse_slice()
        if not (self._rests or self._reading_paused or self._buffer_paused):
            super()._resume_transport_reading()

    def _resume_transport_reading(self) -> None:
        """Called by aiohttp when it wants more: first what has arrived already."""
        if self._rests:
            return
        if self._held:
            self._rests = True
            asyncio.get_running_loop().call_soon(self._go_on)
        else:
            super()._resume_transport_reading()

    def begin_request(self) -> None:
        """Note that a request has arrived, which ends the wait for the first one."""
        self._has_asked = True
        self._owner.connections.is_busy(self)

    def end_request(self) -> None:
        """Note that the request was answered."""
        if self.transport is not None:
            self._owner.connections.is_idle(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer bytes that are not HTTP, or a fault outside of the handlers, and close the connection."""
        if isinstance(exc, HttpProcessingError):
            text = unquoted(exc.message)
            self._owner.note_garbage(text)
        else:
            text = "internal error"
            if isinstance(exc, Exception):
                self._owner.fault(exc)
        if request.writer is not None and request.writer.output_size > 0:
            raise ConnectionResetError("a part of another response was sent")
        response = json_response({"error": text}, status=status)
        response.force_close()
        return response

    def log_exception(self, *args: Any, exc_info: Any = None, **more: Any) -> None:
        """Log an error outside of the handlers in one line. aiohttp itself would write a traceback for each."""
        if isinstance(exc_info, HttpProcessingError):
            self._owner.note_garbage(unquoted(exc_info.message))
        elif isinstance(exc_info, Exception):
            self._owner.fault(exc_info)

    def _cut_if_silent(self) -> None:
        if not self._has_asked:
            self._owner.connections.end(self)

    def cut(self) -> None:
        """Close the connection at once."""
        transport = self.transport
        if transport is not None:
            transport.abort()  # type: ignore[attr-defined,unused-ignore]


def unquoted(message: str) -> str:
    """Return what the parser says about bytes that are not HTTP, without these bytes."""
    for mark in QUOTE_MARKS:
        message = message.partition(mark)[0]
    return " ".join(message.split()) or "not HTTP"


class Connections:
    """The connections of a worker.

    most: how many there may be, with a reserve of LIMITS.http_reserve, or of a quarter if they are few. When the others
    are taken, a new connection takes the place of one that is idle: the one that is idle for longest, of the address
    that has the most. So one client that opens thousands does not keep others out. If none is idle, the new connection
    comes into the reserve, for probes and metrics alone; beyond the reserve it is closed. note: called with a line
    about connections that are refused. opened: connections so far. refused: those of them that were closed at once, or
    came into the reserve. cut: those that were closed to make room, or because no request came in time.
    """

    def __init__(self, note: Callable[[str], object], most: int):
        self.all: set[HttpConnection] = set()
        self.most = most
        self.reserve = LIMITS.http_reserve if most > LIMITS.http_connections else min(LIMITS.http_reserve, most // 4)
        self.opened = self.refused = self.cut = 0
        self._by_address: Counter[str] = Counter()
        # Address -> its connections without a request in flight, the one that is idle for longest first.
        self._idle: dict[str, dict[HttpConnection, None]] = {}
        self._note = note

    def __len__(self) -> int:
        return len(self.all)

    def add(self, connection: HttpConnection) -> bool:
        """Count a new connection. Returns False if it has to be closed."""
        self.opened += 1
        self.all.add(connection)
        self._by_address[connection.address] += 1
        self.is_idle(connection)
        usual = self.most - self.reserve
        while len(self.all) > usual and self._make_room(connection):
            pass
        over = len(self.all) - usual
        if over <= 0:
            return True
        self.refused += 1
        self._note(f"{len(self.all)} HTTP connections, none of them idle: only probes and metrics are answered on more")
        connection.in_reserve = True
        return over <= self.reserve

    def is_idle(self, connection: HttpConnection) -> None:
        """No request of the connection is in flight."""
        self._idle.setdefault(connection.address, {})[connection] = None

    def is_busy(self, connection: HttpConnection) -> None:
        """A request of the connection is in flight."""
        idle = self._idle.get(connection.address, {})
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(connection.address, None)

    def remove(self, connection: HttpConnection) -> None:
        self.is_busy(connection)
        if connection in self.all:
            self.all.remove(connection)
            self._by_address[connection.address] -= 1
            if not self._by_address[connection.address]:
                del self._by_address[connection.address]

    def _make_room(self, newcomer: HttpConnection) -> bool:
        """Close an idle connection for a new one. Returns False if no other connection is idle."""
        address = max(self._idle, key=self._by_address.__getitem__)
        oldest = next(iter(self._idle[address]))
        if oldest is newcomer:
            return False
        self.remove(oldest)
        self.end(oldest)
        return True

    def end(self, connection: HttpConnection) -> None:
        """Close a connection at once, and count it."""
        self.cut += 1
        connection.cut()
