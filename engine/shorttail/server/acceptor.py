"""The acceptor: the supervisor's side of handover.py, which decides which worker gets which connection.

Each message in a worker's channel is read by one process only, so a connection has one owner at each moment. The
supervisor keeps a copy of the worker's end of each channel, and takes back the connections that the worker does not
read. So no client waits for a worker that hangs, has died, or is busy, while another worker is free.
"""

from __future__ import annotations

import fcntl
import math
import selectors
import socket
import termios
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from shorttail.server import handover
from shorttail.server.accepting import RAISE, SpareFile
from shorttail.server.listen import start_listening

ACCEPT: Final = "accept"  # the selector's data for a listening socket
NO_FILES: Final = f"the process that accepts may open no more files; {RAISE}"
NO_ROOM_REST_S: Final = 0.01
PATIENCE_S: Final = 0.02  # a connection that a worker has not read after this time is given to another worker
WAITING_MAX: Final = 256  # connections that are kept while no worker is ready

# A message of handover.py. None: the system has closed the socket, because this process could open no file for it.
Given = tuple[bytes, socket.socket | None]


class WorkerShare:
    """The connections that one worker was given. `channel` is the supervisor's end, `worker_end` the worker's."""

    def __init__(self) -> None:
        self.channel, self.worker_end = handover.pair()
        self.heard_s = time.monotonic()  # when the worker was ready, or last reported
        self.is_late = False  # the worker left a connection unread, and has not reported since
        self._connections = 0
        self._given = 0
        self._received = 0
        self._given_bytes = 0
        self._unread: deque[tuple[float, int]] = deque()  # for each connection given: when, and _given_bytes after it

    @property
    def load(self) -> int:
        """Connections that the worker has, and those that are on their way to it."""
        return self._connections + self._given - self._received

    def give(self, data: bytes, sock: socket.socket) -> bool:
        try:
            socket.send_fds(self.channel, [data], [sock.fileno()])
        except OSError:
            return False
        self._given += 1
        self._given_bytes += len(data)
        self._unread.append((time.monotonic(), self._given_bytes))
        return True

    def unread_s(self) -> float:
        """Seconds since the oldest connection was given that the worker has not read; 0 if it has read all."""
        if self._unread:
            lying = fcntl.ioctl(self.worker_end, termios.FIONREAD, bytes(4))
            read_bytes = self._given_bytes - int.from_bytes(lying, "little")
            while self._unread and self._unread[0][1] <= read_bytes:
                self._unread.popleft()
        return time.monotonic() - self._unread[0][0] if self._unread else 0.0

    def take_back(self) -> list[Given]:
        """Read the connections that the worker has not read from its end."""
        taken = list(_receive(self.worker_end))
        self._given -= len(taken)
        self._given_bytes -= sum(len(data) for data, _ in taken)
        self._unread.clear()
        return taken

    def hear(self, pass_on: Callable[[bytes, socket.socket | None], None]) -> None:
        """Read the worker's messages. pass_on: called with each connection that the worker gives away."""
        for data, sock in _receive(self.channel):
            if sock is None and len(data) == handover.REPORT.size:
                self._connections, self._received = handover.REPORT.unpack(data)
                self.heard_s = time.monotonic()
                self.is_late = False
            else:
                pass_on(data, sock)

    def close(self) -> None:
        self.channel.close()
        self.worker_end.close()


def _receive(end: socket.socket) -> Iterable[Given]:
    """Read all messages that wait at one end of a channel."""
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(end, handover.MESSAGE_BYTES, 1)
        except OSError:  # none is left
            return
        if not data:
            return
        yield data, socket.socket(fileno=fds[0]) if fds else None


class Acceptor:
    """Gives each connection to the ready worker that has the fewest.

    listeners: the bound sockets to accept from; empty if the worker accepts itself. refused: called with the reason
    when connections are closed because no process can take them, and with their number.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        listeners: list[socket.socket],
        refused: Callable[[str, int], object],
    ):
        self.selector = selector
        self.listeners = listeners
        self.refused = refused
        self.spare = SpareFile()
        self.ready: list[WorkerShare] = []
        self.due_s = math.inf  # when to look for connections that a worker has not read
        self._accepts = False
        self._waiting: list[Given] = []  # while no worker is ready

    def add(self, share: WorkerShare) -> None:
        """A worker is ready. Called once for each worker."""
        self.ready.append(share)
        waiting, self._waiting = self._waiting, []
        for data, connection in waiting:
            self.give(data, connection)
        self._accept_while(True)

    def remove(self, share: WorkerShare) -> None:
        """A worker retires or has ended: the connections that it has not read go to other workers."""
        if share in self.ready:
            self.ready.remove(share)
        for data, connection in share.take_back():
            self.give(data, connection)
        self._accept_while(bool(self.ready))

    def accept(self, listener: socket.socket) -> None:
        before = self.spare.turned_away
        goes_on = self.spare.accept(listener, lambda connection: self.give(bytes([handover.FRESH]), connection))
        if turned_away := self.spare.turned_away - before:
            self.refused(NO_FILES, turned_away)
        if not goes_on:
            time.sleep(NO_ROOM_REST_S)  # the selector would report the listener again at once

    def give(self, data: bytes, connection: socket.socket | None) -> None:
        if connection is None:
            self.refused(NO_FILES, 1)
            return
        if not self.ready and len(self._waiting) < WAITING_MAX:
            self._waiting.append((data, connection))
            return
        with connection:
            for share in sorted(self.ready, key=lambda share: (share.is_late, share.load)):
                if share.give(data, connection):
                    self.due_s = min(self.due_s, time.monotonic() + PATIENCE_S)
                    return
        # The connection is closed, which its client sees at once.
        self.refused("no worker takes connections: all are far behind", 1)

    def look(self) -> None:
        """Give connections that a worker leaves unread to a worker that reads. Called when `due_s` has come."""
        now_s, self.due_s = time.monotonic(), math.inf
        for share in self.ready:
            unread_s = share.unread_s()
            share.is_late |= unread_s >= PATIENCE_S
            if unread_s:
                self.due_s = min(self.due_s, now_s + PATIENCE_S - (0.0 if share.is_late else unread_s))
        if not all(share.is_late for share in self.ready):
            for late in [share for share in self.ready if share.is_late]:
                for data, connection in late.take_back():
                    self.give(data, connection)

    def accept_no_more(self) -> None:
        self._accept_while(False)
        self.listeners = []

    def close(self) -> None:
        for _, connection in self._waiting:
            if connection is not None:
                connection.close()
        self._waiting = []

    def _accept_while(self, wanted: bool) -> None:
        if wanted == self._accepts:
            return
        self._accepts = wanted
        for listener in self.listeners:
            if wanted:
                start_listening(listener)
                self.selector.register(listener, selectors.EVENT_READ, ACCEPT)
            else:
                self.selector.unregister(listener)
