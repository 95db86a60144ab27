"""Signals as events of the supervisor's selector, so that a signal never interrupts code between two lines."""

from __future__ import annotations

import selectors
import signal
import socket
from types import TracebackType
from typing import Final

STOP: Final = frozenset({signal.SIGTERM, signal.SIGINT})
RELOAD: Final = frozenset({signal.SIGHUP})


class Signals:
    """A context manager for the main thread: inside it, STOP and RELOAD signals only become events.

    Enter it before anything is created that the default action of a signal would leave behind.
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
