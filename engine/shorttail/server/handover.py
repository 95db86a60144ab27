"""Connections travel between processes: from the supervisor, which accepts them, to workers; and from a worker that is
replaced to the others. The peer sees nothing of it: its socket stays open, and no byte is lost. This is the workers'
side; the supervisor's is acceptor.py.

A channel is a pair of SOCK_SEQPACKET sockets between the supervisor and a worker. A message that carries a socket is
the access the connection has (FRESH: none was asked for yet) and then what had been read of a message. One without a
socket is a worker's report: how many connections it has, and how many sockets it has been given in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from typing import Any, Final

from shorttail._native.wire import Connection, Router

FRESH: Final = 255
# What may have been read of a message when its connection moves; a longer one is waited for.
HELD_BYTES: Final = 64 << 10
MESSAGE_BYTES: Final = HELD_BYTES + 1
REPORT: Final = struct.Struct("<QQ")
HANDSHAKE_S: Final = 10.0
POLL_S: Final = 0.002
REPORT_S: Final = 0.25  # a worker is heard at least so often


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


class Channel:
    """A worker's end."""

    def __init__(self, end: socket.socket, loop: asyncio.AbstractEventLoop, router: Router, tls: ssl.SSLContext | None):
        self.end = end
        self.loop = loop
        self.router = router
        self.tls = tls
        self.given = 0
        self._reported = (-1, -1)
        self._reported_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        loop.add_reader(end, self._receive)

    def report(self) -> None:
        """Tell the supervisor how many connections there are: when that has changed, and now and then to be heard."""
        figures = (len(self.router.connections) + len(self._tasks), self.given)
        now_s = self.loop.time()
        if figures != self._reported or now_s - self._reported_s > REPORT_S:
            self._reported_s = now_s
            with contextlib.suppress(OSError):
                self.end.send(REPORT.pack(*figures))
                self._reported = figures

    def close(self) -> None:
        self.loop.remove_reader(self.end)
        self.end.close()

    def _receive(self) -> None:
        for _ in range(64):  # then others have their turn
            try:
                data, fds, _, _ = socket.recv_fds(self.end, MESSAGE_BYTES, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, fds = b"", []
            if not data:  # the supervisor is gone, which the control socket says too
                self.loop.remove_reader(self.end)
                return
            for fd in fds:
                self.given += 1
                task = self.loop.create_task(self._adopt(socket.socket(fileno=fd), data[0], data[1:]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _adopt(self, sock: socket.socket, access: int, held: bytes) -> None:
        tls = None if sock.family == socket.AF_UNIX or access != FRESH else self.tls
        connection = Connection(self.router, tls is not None)
        if access != FRESH:
            connection.carry(held, access)
        options: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_S}
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected: Any = self.loop.connect_accepted_socket  # a Connection has all of asyncio.Protocol but its name
            await connected(lambda: connection, sock, **options)
        except OSError:  # it has gone, or does not speak TLS
            sock.close()

    async def hand_over_all(self, until_s: float) -> None:
        """Give every connection away that can be, as soon as it owes nothing. until_s: by the loop's clock."""
        turns = 0  # what was on its way here when this began has arrived after a few
        while (self.router.connections or self._tasks or turns < 3) and self.loop.time() < until_s:
            turns += 1
            for connection in list(self.router.connections):
                if connection.park(HELD_BYTES):
                    self._hand_over(connection)
            if turns > 3 and all(connection.stays for connection in self.router.connections) and not self._tasks:
                return
            await asyncio.sleep(POLL_S)

    def _hand_over(self, connection: Connection) -> None:
        held = connection.quiet(HELD_BYTES)
        if held is None:
            return
        try:
            fd = os.dup(connection.fileno())
        except OSError:
            return
        try:
            socket.send_fds(self.end, [bytes([connection.access]) + held], [fd])
        except OSError:
            return  # the supervisor is behind; again in a moment
        finally:
            os.close(fd)
        connection.abort()  # closes this end of it only
