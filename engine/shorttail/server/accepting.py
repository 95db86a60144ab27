"""Accepts connections, also when the process may open no more files.

Without a free file descriptor, accept() fails and the connection waits in the system's queue: its client hangs, and the
event loop is woken for it again and again. So a process keeps a file open that it needs for nothing else, and closes it
to accept such a connection and to close it, which its client sees at once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable, Collection
from typing import Any, Final

ACCEPTED_AT_ONCE: Final = 64  # then other events are handled
NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
REST_S: Final = 0.1  # without a file to close: how long no connection is accepted
HANDSHAKE_S: Final = 10.0
RAISE: Final = "raise the limit (ulimit -n, or LimitNOFILE= of systemd)"


class SpareFile:
    """The file that is kept open. turned_away: connections that were closed, because no other file could be opened."""

    def __init__(self) -> None:
        self.turned_away = 0
        self._fd = _open_any()

    def accept(self, listener: socket.socket, take: Callable[[socket.socket], object]) -> bool:
        """Accept the connections that wait, at most ACCEPTED_AT_ONCE, and call `take` with each.

        Returns False if the listener should be left alone for a while, because not even closing the spare file helped.
        """
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno not in NO_ROOM:
                    return True  # no connection waits, or its client has gone
                if not self._turn_away(listener):
                    return False
            else:
                take(connection)
        return True

    def _turn_away(self, listener: socket.socket) -> bool:
        """Accept a connection and close it. Returns False if that was not possible either."""
        if self._fd < 0:
            self._fd = _open_any()
        if self._fd < 0:
            return False
        os.close(self._fd)
        try:
            listener.accept()[0].close()
            self.turned_away += 1
        except OSError as error:
            return error.errno not in NO_ROOM
        finally:
            self._fd = _open_any()
        return True


def _open_any() -> int:
    """Open a file that is always there. Returns -1 if no file can be opened."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


async def serve_socket(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: Any, tls: ssl.SSLContext | None
) -> None:
    """Let a protocol serve an accepted connection. protocol: an asyncio.Protocol, or a Connection, which has all of it.

    A Unix socket never uses TLS: its file mode says who may connect. Raises OSError if the client has gone, or does not
    speak TLS; the socket is closed then.
    """
    options: dict[str, Any] = {}
    if sock.family != socket.AF_UNIX and tls is not None:
        options = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_S}
    try:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.connect_accepted_socket(lambda: protocol, sock, **options)
    except OSError:
        sock.close()
        raise


class Room:
    """How many connections a process may have at a moment, those included that it refuses and has not closed yet.

    A connection that is refused gets an error, and is closed when its client has read it, or after a second. A client
    that connects again and again must not use up the files meanwhile. connections: the protocols of those that there
    are. refused: connections that were closed at once.
    """

    def __init__(self, connections: Collection[Any], most: int):
        self.connections = connections
        self.most = most
        self.refused = 0
        self._coming: set[Any] = set()  # protocols that may not be among the connections yet

    def takes(self, protocol: Any) -> bool:
        """Whether there is room for one more. Then it counts, until `settled`, also before it is a connection."""
        if len(self.connections) + len(self._coming) >= self.most:
            self._coming = {coming for coming in self._coming if coming not in self.connections}
        if len(self.connections) + len(self._coming) >= self.most:
            self.refused += 1
            return False
        self._coming.add(protocol)
        return True

    def settled(self, protocol: Any) -> None:
        """Note that a protocol is among the connections, or will never be."""
        self._coming.discard(protocol)


class Entrance:
    """Accepts the connections of a listening socket on the event loop, until `close`.

    protocol: makes the protocol of a connection. spare: of this process. room: for its connections. failed_handshakes:
    connections whose client went before they were served, or does not speak TLS.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        protocol: Callable[[], Any],
        tls: ssl.SSLContext | None,
        spare: SpareFile,
        room: Room,
    ):
        self.loop = loop
        self.listener = listener
        self.protocol = protocol
        self.tls = tls
        self.spare = spare
        self.room = room
        self.failed_handshakes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        if not self.spare.accept(self.listener, self._take):
            self.loop.remove_reader(self.listener)
            self.loop.call_later(REST_S, self._resume)

    def _take(self, sock: socket.socket) -> None:
        protocol = self.protocol()
        if not self.room.takes(protocol):
            sock.close()
            return
        task = self.loop.create_task(self._serve(sock, protocol))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _resume(self) -> None:
        if self.listener.fileno() >= 0:
            self.loop.add_reader(self.listener, self._accept)

    async def _serve(self, sock: socket.socket, protocol: Any) -> None:
        try:
            await serve_socket(self.loop, sock, protocol, self.tls)
        except OSError:
            self.failed_handshakes += 1
        finally:
            self.room.settled(protocol)

    def close(self) -> None:
        """Accept no more connections. Those that were accepted are served."""
        if self.listener.fileno() >= 0:
            self.loop.remove_reader(self.listener)
            self.listener.close()
