"""The bulk worker: a worker that answers the large requests of all other workers.

To read, run and answer a request of megabytes takes tens of milliseconds, which all other requests of a worker would
wait. So a worker passes such a request on as it came, and passes back the reply (bulk_link.py, http/bulk.py). The bulk
worker is a worker as the others are, with the same code, at a low priority. It listens only on two sockets in a folder
of the server's user. The supervisor holds these sockets, starts the bulk worker when a connection waits on one, and
forgets it when it ends, which it does after LIMITS.bulk_idle_s without a request. So a server without large requests
does not pay for it.

This module is the supervisor's part, and what distinguishes a bulk worker from the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING, Final

from shorttail.config import LIMITS
from shorttail.server.settings import ServerSettings
from shorttail.server.spare_memory import SpareMemory

if TYPE_CHECKING:
    from shorttail._native.wire import Router
    from shorttail.server.http.app import HttpServer

BULK: Final = -1  # the bulk worker's number; workers count from 1
WANTED: Final = "bulk"  # the selector's data for its sockets
NICE: Final = 10
P99_BUDGET_MS: Final = 2000.0  # of large requests


def settings_of(settings: ServerSettings) -> ServerSettings:
    """Return the settings of the bulk worker. Its callers have checked the token, and no other machine reaches it."""
    return dataclasses.replace(
        settings,
        token_file=None,
        tls_cert=None,
        tls_key=None,
        tls_client_ca=None,
        p99_budget_ms=max(P99_BUDGET_MS, settings.p99_budget_ms),
        busy_poll_us=0,
    )


def lower_priority() -> None:
    """Let the other workers go first. On a busy machine a tenth of a CPU is left for large requests."""
    with contextlib.suppress(OSError):
        os.nice(NICE)


class Idle:
    """Gives back memory after requests, and stops a bulk worker that had none for LIMITS.bulk_idle_s."""

    def __init__(self, stop: asyncio.Event, router: Router):
        self.stop = stop
        self.router = router
        self._busy_s = time.monotonic()
        self._memory = SpareMemory(1, router.forget_plans)  # a route keeps the columns of its last batch

    def look(self, http: HttpServer | None) -> None:
        now_s, router = time.monotonic(), self.router
        worked_bytes = router.received_bytes + router.sent_bytes
        if http is not None:
            worked_bytes += http.received_bytes + http.sent_bytes
        self._memory.look(worked_bytes)
        if router.connections or (http is not None and http.in_flight):
            self._busy_s = now_s
        elif now_s - self._busy_s > LIMITS.bulk_idle_s:
            self.stop.set()


class BulkSockets:
    """The supervisor's side: watches the sockets while no bulk worker runs."""

    def __init__(self, selector: selectors.BaseSelector, sockets: list[socket.socket]):
        self.selector = selector
        self.sockets = sockets
        self._watched = False

    def watch(self) -> None:
        """From now on the selector reports WANTED when a large request waits."""
        if not self._watched:
            for listener in self.sockets:
                self.selector.register(listener, selectors.EVENT_READ, WANTED)
        self._watched = True

    def unwatch(self) -> None:
        if self._watched:
            for listener in self.sockets:
                self.selector.unregister(listener)
        self._watched = False

    def refuse(self) -> None:
        """Close the connections that wait. Their requests fail at once, and not one after the other for ever."""
        for listener in self.sockets:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()
