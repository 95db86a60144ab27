"""What signals do: events of the supervisor's selector, and nothing that ends a process by surprise."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import selectors
import signal
import socket
import sys
from types import TracebackType
from typing import Final

STOP: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
RELOAD: Final = frozenset({signal.SIGHUP})


def keep_running() -> None:
    """Let SIGUSR1 write the stacks of all threads to stderr, and ignore SIGUSR2, in a command or a server."""
    with contextlib.suppress(io.UnsupportedOperation, AttributeError, RuntimeError):  # there may be no stderr
        faulthandler.register(signal.SIGUSR1, sys.__stderr__ or 2, all_threads=True)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def only_sigterm() -> None:
    """Do the same in a child of the supervisor, and ignore the signals by which the supervisor is told what to do."""
    keep_running()
    for number in (STOP | RELOAD) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """A context manager for the main thread: inside it, STOP and RELOAD signals only become events.

    So they never interrupt code between two lines. Enter it before anything is created that the default action of a
    signal would leave behind.
    """

    def __enter__(self) -> Signals:
        self._wakeup, self._wakeup_end = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_end.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._wakeup_end.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in STOP | RELOAD}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._wakeup.close()
        self._wakeup_end.close()

    def register(self, selector: selectors.BaseSelector) -> None:
        """Register the signals with a selector. Their events have no data."""
        selector.register(self._wakeup, selectors.EVENT_READ, None)

    def take(self) -> set[int]:
        """Return the signals that were received since the last call."""
        try:
            return set(self._wakeup.recv(4096))
        except BlockingIOError:
            return set()
