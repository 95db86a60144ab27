"""Handover: connections move between processes while their clients notice nothing.

The supervisor gives the connections that it accepts to workers, and a worker that is replaced gives its connections to
the others. The socket stays open and no byte is lost. This module is the workers' side; acceptor.py is the
supervisor's.

A channel is a pair of SOCK_SEQPACKET sockets between the supervisor and a worker. A message with a socket holds one
byte, the access of the connection (FRESH: it has not authenticated), and then the bytes that were already read of an
unfinished request. A message without a socket is a worker's report: how many connections it has, and how many sockets
it was given in all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from typing import Final

from shorttail._native.wire import Connection, Router
from shorttail.server.accepting import Room, serve_socket

FRESH: Final = 255
# A connection moves with at most this much of an unfinished request. If more was read, the worker waits for its end.
HELD_BYTES: Final = 64 << 10
MESSAGE_BYTES: Final = HELD_BYTES + 1
REPORT: Final = struct.Struct("<QQ")
POLL_S: Final = 0.002
REPORT_S: Final = 0.25  # a worker reports at least this often


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


class Channel:
    """A worker's end of its channel."""

    def __init__(
        self,
        end: socket.socket,
        loop: asyncio.AbstractEventLoop,
        router: Router,
        tls: ssl.SSLContext | None,
        room: Room,
    ):
        self.end = end
        self.room = room
        self.loop = loop
        self.router = router
        self.tls = tls
        self.given = 0
        self.lost = 0  # of those given: this process could open no file for them, so the system has closed them
        self.failed_handshakes = 0
        self._reported = (-1, -1)
        self._reported_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        loop.add_reader(end, self._receive)

    def report(self) -> None:
        """Report the number of connections when it has changed, and at least every REPORT_S as a sign of life."""
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
        for _ in range(64):  # then other events are handled
            try:
                data, fds, _, _ = socket.recv_fds(self.end, MESSAGE_BYTES, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, fds = b"", []
            if not data:  # the supervisor has ended; the control socket closes too
                self.loop.remove_reader(self.end)
                return
            if not fds:
                self.given += 1
                self.lost += 1
            for fd in fds:
                self.given += 1
                self._take(socket.socket(fileno=fd), data[0], data[1:])

    def _take(self, sock: socket.socket, access: int, held: bytes) -> None:
        tls = None if sock.family == socket.AF_UNIX or access != FRESH else self.tls
        connection = Connection(self.router, tls is not None)
        if access != FRESH:
            connection.carry(held, access)
        elif not self.room.takes(connection):
            sock.close()
            return
        task = self.loop.create_task(self._adopt(sock, connection, tls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _adopt(self, sock: socket.socket, connection: Connection, tls: ssl.SSLContext | None) -> None:
        try:
            await serve_socket(self.loop, sock, connection, tls)
        except OSError:
            self.failed_handshakes += 1
        finally:
            self.room.settled(connection)

    async def hand_over_all(self, until_s: float) -> None:
        """Give each connection away as soon as all its requests are answered. until_s: limit by the loop's clock."""
        turns = 0  # a few turns, so that connections that were on their way have arrived
        while (self.router.connections or self._tasks or turns < 3) and self.loop.time() < until_s:
            turns += 1
            for connection in list(self.router.connections):
                if connection.park(HELD_BYTES):
                    self._hand_over(connection)
            if turns > 3 and all(connection.cannot_move for connection in self.router.connections) and not self._tasks:
                return
            await asyncio.sleep(POLL_S)

    def _hand_over(self, connection: Connection) -> None:
        held = connection.partial_if_idle(HELD_BYTES)
        if held is None:
            return
        try:
            fd = os.dup(connection.fileno())
        except OSError:
            return
        try:
            socket.send_fds(self.end, [bytes([connection.access]) + held], [fd])
        except OSError:
            return  # the channel is full; the next turn tries again
        finally:
            os.close(fd)
        connection.abort()  # closes this process's copy of the socket alone
