"""A worker's connection to the writer: it forwards pushes, deletes and steps of commands, which it does not read.

A request is `[0, id, method, params, deadline_ns]`. It is MessagePack-RPC, except that params travel as the client sent
them, inside a bin, so that params that cannot be decoded harm no other request. deadline_ns is when the caller stops
waiting, by CLOCK_MONOTONIC; 0 is never. The writer answers `[1, id, error, result]`. It sends READY first, because the
socket accepts connections even while no writer runs.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import msgpack

from shorttail._native.wire import Connection
from shorttail.config import LIMITS
from shorttail.errors import ResourceExhausted, ShorttailError, Unavailable

READY: Final = [2, "ready", []]
RETRY_S: Final = 0.1
REQUEST_BYTES: Final = 512  # the memory that a request takes beside its params

NIL: Final = msgpack.packb(None)
DIED: Final = Unavailable(
    "the writer died before it answered; the rows may or may not be stored: push again, which is safe"
)

COMMAND_DIED: Final = Unavailable("the writer died, and the command with it; `shorttail history` shows what was done")

Told = Callable[[str, str, str, int, int, bytes | None], object]  # Telemetry.wrote


class Caller(NamedTuple):
    """Who waits for the answer to a forwarded request. connection: None for a notification; size: counted bytes."""

    connection: Connection | None
    msgid: int
    size: int
    method: str
    sent_ns: int
    trace: bytes | None


def failed(error: ShorttailError) -> bytes:
    """The last two items of the writer's response with an error: error and result."""
    return bytes(msgpack.packb({"code": error.code, "message": error.message}, unicode_errors="replace") + NIL)


class WriterLink(asyncio.Protocol):
    """Keeps a connection to the writer at `path` while `run` runs. told: called with every outcome."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop, told: Told):
        self.path = path
        self.loop = loop
        self.ready = asyncio.Event()  # the writer takes requests
        self.outstanding: dict[int, Caller] = {}
        self.outstanding_bytes = 0
        self.told = told
        self._refusal = ""
        self._ids = itertools.count()
        self._transport: asyncio.Transport | None = None
        self._unpacker = msgpack.Unpacker()
        self._lost: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until the task is cancelled."""
        while True:
            self._lost = self.loop.create_future()
            try:
                await self.loop.create_unix_connection(lambda: self, self.path)
                await self._lost
            except OSError:
                await asyncio.sleep(RETRY_S)

    def refuse(self, reason: str) -> None:
        """Answer requests with UNAVAILABLE and this reason, instead of forwarding them; "" forwards them again."""
        self._refusal = reason

    def forward(
        self,
        connection: Connection | None,
        msgid: int,
        method: str,
        params: bytes,
        deadline_ns: int,
        trace: bytes | None = None,
    ) -> None:
        """Send a request to the writer: the `forward` of a Router. Raises Unavailable, ResourceExhausted."""
        if self._refusal:
            raise Unavailable(self._refusal)
        if not self.ready.is_set() or self._transport is None:
            raise Unavailable("the writer is starting again; send it again")
        size = len(params) + REQUEST_BYTES
        if self.outstanding_bytes + size > LIMITS.forwarded_bytes:
            raise ResourceExhausted(
                f"{self.outstanding_bytes} bytes of pushes and deletes wait for the writer; send it again later"
            )
        number = next(self._ids)
        self.outstanding[number] = Caller(connection, msgid, size, method, time.monotonic_ns(), trace)
        self.outstanding_bytes += size
        head = b"\x95\x00" + msgpack.packb(number) + msgpack.packb(method) + b"\xc6" + len(params).to_bytes(4)
        self._transport.writelines([head, params, msgpack.packb(deadline_ns)])

    def close(self) -> None:
        """Cut the connection. Requests without an answer are answered with UNAVAILABLE."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's classes
        self._unpacker = msgpack.Unpacker()

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        for message in self._unpacker:
            if message == READY:
                self.ready.set()
            else:
                self._relay(message)

    def _relay(self, message: Any) -> None:
        _, number, error, result = message
        if error is None:
            self._answer(number, "OK", "", NIL + msgpack.packb(result))
        else:
            self._answer(number, str(error["code"]), str(error["message"]))

    def _answer(self, number: int, code: str, message: str, outcome: bytes | None = None) -> None:
        """Answer a request. outcome: the last two items of the response, error and result; None for an error."""
        caller = self.outstanding.pop(number)
        self.outstanding_bytes -= caller.size
        msgid = caller.msgid if caller.connection is not None else -1
        self.told(caller.method, code, message, msgid, time.monotonic_ns() - caller.sent_ns, caller.trace)
        if caller.connection is None:
            return
        if outcome is None:
            caller.connection.relay_error(caller.msgid, code, message)
        else:
            caller.connection.relay(caller.msgid, outcome)

    def connection_lost(self, error: Exception | None) -> None:
        self.ready.clear()
        self._transport = None
        for number, caller in list(self.outstanding.items()):
            died = COMMAND_DIED if caller.method == "command" else DIED
            self._answer(number, died.code, died.message)
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)
