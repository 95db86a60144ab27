"""Memory that a process has freed and gives back to the system. glibc would keep tens of megabytes of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from typing import Final

# Options of glibc's mallopt, with their values in bytes. malloc returns free memory at the end of the heap above
# M_TRIM_THRESHOLD to the system. Blocks above M_MMAP_THRESHOLD get a mapping of their own; they are rare, so it costs
# nothing.
M_TRIM_THRESHOLD: Final = (-1, 4 << 20)
M_MMAP_THRESHOLD: Final = (-3, 4 << 20)
REST_S: Final = 1.0  # a process that did nothing for so long gives back memory


def return_memory() -> None:
    """Let malloc return the memory of a few large answers. By default glibc may keep up to 64 MiB free."""
    with contextlib.suppress(AttributeError):  # another libc
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(*option)


def give_back_memory() -> None:
    """Return free memory to the system now, also from the middle of the heap."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


class SpareMemory:
    """Gives back memory when a process rests that has worked on `least_bytes` or more.

    forget: called before, to free what is only kept for the next request.
    """

    def __init__(self, least_bytes: int, forget: Callable[[], object] | None = None):
        self.least_bytes = least_bytes
        self._forget = forget
        self._worked_bytes = self._given_at_bytes = 0
        self._busy_s = time.monotonic()

    def look(self, worked_bytes: int) -> None:
        """Call it some times a second. worked_bytes: read and written so far."""
        now_s = time.monotonic()
        if worked_bytes != self._worked_bytes:
            self._worked_bytes, self._busy_s = worked_bytes, now_s
        elif worked_bytes - self._given_at_bytes >= self.least_bytes and now_s - self._busy_s > REST_S:
            self._given_at_bytes = worked_bytes
            if self._forget is not None:
                self._forget()
            give_back_memory()
