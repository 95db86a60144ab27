"""Which models workers died in: a model in whose runs two workers died is banned, so that the others go on serving.

A worker notes each run in a page of memory that the supervisor maps too (native/runs.pyx). When the worker has died,
the page still says which models it was running, and which of these runs a deadly signal hit.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from typing import Final

from shorttail._native.runs import BANNED, BANNED_AT, SLOTS, SLOTS_AT, WORDS
from shorttail.config import LIMITS

PAGE_BYTES: Final = 8 * WORDS


class RunsPage:
    """The page of one worker. fd: the file, which the worker inherits and maps."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("shorttail-runs")
        os.posix_fallocate(self.fd, 0, PAGE_BYTES)
        self._map = mmap.mmap(self.fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("q")

    def ban(self, keys: list[int]) -> None:
        """Tell the worker which models it must not run."""
        keys = keys[-BANNED:]
        self._words[BANNED_AT : BANNED_AT + len(keys)] = memoryview(bytearray(8 * len(keys))).cast("q")
        for i, key in enumerate(keys):
            self._words[BANNED_AT + i] = key
        self._words[1] = len(keys)

    def died_in(self, hung_s: float = 0.0) -> set[int]:
        """Return the keys of the models in whose runs the worker died.

        That is the run that a deadly signal hit, if the page has it, else every run. hung_s: the worker was killed
        because it hung so long; only runs that took as long are meant.
        """
        hit = self._words[0]
        slots = [hit - 1] if 0 < hit <= SLOTS else range(SLOTS)
        latest_ns = time.monotonic_ns() - int(1e9 * hung_s)
        found = set()
        for slot in slots:
            key, start_ns = self._words[SLOTS_AT + 2 * slot], self._words[SLOTS_AT + 2 * slot + 1]
            if key and 0 < start_ns <= latest_ns:
                found.add(key)
        return found

    def close(self) -> None:
        """Unmap and close the file. A second call does nothing."""
        if self.fd >= 0:
            self._words.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class Deaths:
    """Counts the deaths of workers by the model that they were running."""

    def __init__(self) -> None:
        self.banned: list[int] = []
        self._times_s: dict[int, deque[float]] = {}

    def note(self, keys: set[int]) -> bool:
        """Note that a worker died in a run of these models. Returns True if one of them is banned now for it."""
        now_s, found = time.monotonic(), False
        for key in keys:
            times_s = self._times_s.setdefault(key, deque(maxlen=LIMITS.model_deaths))
            times_s.append(now_s)
            often = len(times_s) == LIMITS.model_deaths and now_s - times_s[0] < LIMITS.model_deaths_s
            if often and key not in self.banned:
                self.banned.append(key)
                found = True
        return found

    def forget(self) -> None:
        """Forget all deaths and lift every ban."""
        self.banned.clear()
        self._times_s.clear()
