"""The connection pool of a blocking client: calls that run at the same time use a connection each."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from shorttail import protocol
from shorttail.client import calls, credentials, forks
from shorttail.client.calls import Call
from shorttail.errors import DeadlineExceeded, Internal, ShorttailError, Unavailable
from shorttail.protocol import Address

# Each recv() allocates this much. For more than 128 KiB malloc may map new memory, which takes 15 us per call.
RECEIVE_BYTES = 64 << 10


class Connection:
    """A connection that takes one call at a time. After a call that raised, close it: a late reply could still come."""

    def __init__(self, connected: socket.socket, address: Address):
        self.socket = connected
        self.address = address
        self.generation = 0  # of the pool when the connection was made: how often the pool had been closed
        self._unpacker = protocol.new_unpacker()
        self._poll = select.poll()  # select.select refuses file descriptors above 1023
        self._poll.register(connected, select.POLLIN)
        forks.watch(self)

    @classmethod
    def open(cls, address: Address, tls: ssl.SSLContext | None, call: Call) -> Connection:
        """Connect to a server. Raises Unavailable."""
        try:
            if address.path is None:
                connected = socket.create_connection((address.host, address.port), call.left_s())
            else:
                connected = socket.socket(socket.AF_UNIX)
            try:
                if address.path is None:
                    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connected = credentials.secured(connected, tls, address, call.left_s())
                else:
                    connected.settimeout(call.left_s())
                    connected.connect(address.path)
            except BaseException:
                connected.close()
                raise
        except OSError as error:
            calls.raise_no_server(address, error)
        return cls(connected, address)

    def ask(self, call: Call) -> tuple[ShorttailError | None, Any]:
        """Send a call and return (error, result) of the reply: the error is None if the call succeeded.

        Raises Unavailable, DeadlineExceeded, and Internal for a reply that breaks the protocol.
        """
        try:
            self.socket.settimeout(call.left_s())
            self.socket.sendall(call.message())
            call.mark_sent()
            self.socket.settimeout(call.left_s())
            answered, error, result = protocol.read_response(self._receive(call))
        except TimeoutError:
            raise call.no_answer() from None
        except OSError as error:
            raise Unavailable(f"{call.method}: connection to {self.address} lost: {calls.reason(error)}") from None
        except protocol.UNPACK_ERRORS as error:
            raise Internal(f"{call.method}: {self.address} sent bytes that are not MessagePack: {error}") from None
        if answered != call.msgid:
            raise Internal(f"{call.method}: {self.address} answered call {answered} instead of {call.msgid}")
        return error, result

    def _receive(self, call: Call) -> Any:
        while True:
            data = self.socket.recv(RECEIVE_BYTES)
            if not data:
                raise Unavailable(f"{self.address} closed the connection during {call.method}")
            self._unpacker.feed(data)
            try:
                return self._unpacker.unpack()
            except protocol.OutOfData:
                self.socket.settimeout(call.left_s())

    def is_idle(self) -> bool:
        """Whether the connection can take a call: the server has not closed it, and has sent nothing since the last."""
        if not isinstance(self.socket, ssl.SSLSocket):
            return not self._poll.poll(0)
        # A TLS peer may have sent protocol messages such as session tickets. Only a read tells them from data.
        self.socket.setblocking(False)
        try:
            self.socket.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        self.socket.close()

    def disown(self) -> list[int]:
        """For forks.Owner."""
        descriptor = self.socket.fileno()
        return [] if descriptor < 0 else [descriptor]


class Pool:
    """A pool of at most `limit` connections. The connection used last is taken next, so that surplus ones stay idle.

    A caller that takes a connection either gives it back or drops it.
    """

    def __init__(self, limit: int, open_one: Callable[[Call], Connection]):
        self.limit = limit
        self._open_one = open_one
        self._generation = 0
        self.disown()
        forks.watch(self)

    def disown(self) -> list[int]:
        """Begin with no connections. Also for forks.Owner."""
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._n_waiting = 0
        self._n_open = 0
        self._idle: list[Connection] = []
        self._generation += 1  # a call that forked, in a signal handler, gives its connection back: it is dropped
        return []

    def take(self, call: Call) -> Connection:
        """Return an idle connection or a new one, and wait for one if `limit` are in use.

        Raises Unavailable, and DeadlineExceeded if none is free in time.
        """
        with self._lock:
            if not self._has_room():
                self._wait(call)
            connection = self._idle.pop() if self._idle else None
            if connection is None:
                self._n_open += 1
            generation = self._generation
        try:
            if connection is not None:
                if connection.is_idle():
                    return connection
                connection.close()
            connection = self._open_one(call)
        except BaseException:
            self._count_closed()
            raise
        connection.generation = generation
        return connection

    def give(self, connection: Connection) -> None:
        """Give back a connection that can take another call."""
        with self._lock:
            if connection.generation == self._generation:
                self._idle.append(connection)
                if self._n_waiting:
                    self._freed.notify()
                return
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection that cannot take another call."""
        connection.close()
        self._count_closed()

    def _count_closed(self) -> None:
        with self._lock:
            self._n_open -= 1
            if self._n_waiting:
                self._freed.notify()

    def close(self) -> None:
        """Close idle connections now, and connections in use when they are given back. The pool can still be used."""
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, []
        for connection in idle:
            self.drop(connection)

    def _has_room(self) -> bool:
        return bool(self._idle) or self._n_open < self.limit

    def _wait(self, call: Call) -> None:
        self._n_waiting += 1
        try:
            freed = self._freed.wait_for(self._has_room, call.left_s())
        finally:
            self._n_waiting -= 1
        if not freed:
            raise DeadlineExceeded(
                f"{call.method}: other calls held all {self.limit} connections to {call.address} "
                f"for {call.deadline.wait_s:g} s; give a larger max_connections"
            )
