"""Which models workers died in: a model in whose runs two workers died is banned, so that the others go on serving.

A worker notes each run and each load of a model in a page of memory that the supervisor maps too (native/runs.pyx).
When the worker has died, the page still says which models it was running or loading, and which of them a deadly signal
hit. One death in a load is enough: the worker that is started again would die in it too.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from shorttail._native.runs import BANNED, BANNED_AT, LOADS, LOADS_AT, SLOTS, SLOTS_AT, WORDS
from shorttail.config import LIMITS

PAGE_BYTES: Final = 8 * WORDS


class DiedIn(NamedTuple):
    """The keys of the models in whose runs, and during whose loads, a worker died."""

    runs: set[int]
    loads: set[int]


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

    def died_in(self, hung_s: float = 0.0) -> DiedIn:
        """Return in which models the worker died.

        That is the run or load that a deadly signal hit, if the page has it, else each of them. hung_s: the worker was
        killed because it hung so long; only those that took as long are meant.
        """
        hit = self._words[0]
        slots = [hit - 1] if 0 < hit <= SLOTS else range(SLOTS) if hit == 0 else ()
        places = [hit - 1 - SLOTS] if SLOTS < hit <= SLOTS + LOADS else range(LOADS) if hit == 0 else ()
        latest_ns = time.monotonic_ns() - int(1e9 * hung_s)
        runs = self._begun(SLOTS_AT, slots, latest_ns)
        loads = self._begun(LOADS_AT, places, latest_ns)
        return DiedIn(runs, loads | (runs & self.loading(hung_s)))  # a load ends with runs of the model

    def loading(self, since_s: float) -> set[int]:
        """Return the keys of the models that the worker has been loading for so long."""
        return self._begun(LOADS_AT, range(LOADS), time.monotonic_ns() - int(1e9 * since_s))

    def _begun(self, at: int, places: Iterable[int], latest_ns: int) -> set[int]:
        """Return the keys of the pairs (key, start) at these places that began at latest_ns or before."""
        pairs = [self._words[at + 2 * place : at + 2 * place + 2] for place in places]
        return {key for key, start_ns in pairs if key and 0 < start_ns <= latest_ns}

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

    def note(self, died: DiedIn) -> bool:
        """Note that a worker died in these models. Returns True if one of them is banned now for it."""
        found = [self._ban(key) for key in died.loads]
        found += [self._ban(key) for key in died.runs if self._often(key, LIMITS.model_deaths)]
        return any(found)

    def note_killed(self, loads: set[int]) -> bool:
        """Note that somebody killed a worker that was loading these models before it was ready: perhaps the system, for
        the memory that a model takes. Returns True if one of them is banned now because that came again and again.
        """
        found = [self._ban(key) for key in loads if self._often(key, LIMITS.load_kills)]
        return any(found)

    def _often(self, key: int, deaths: int) -> bool:
        """Note a death, and return whether so many came within LIMITS.model_deaths_s."""
        now_s = time.monotonic()
        times_s = self._times_s.setdefault(key, deque(maxlen=max(LIMITS.model_deaths, LIMITS.load_kills)))
        times_s.append(now_s)
        return len(times_s) >= deaths and now_s - times_s[-deaths] < LIMITS.model_deaths_s

    def _ban(self, key: int) -> bool:
        """Ban a model. Returns False if it is banned already."""
        if key in self.banned:
            return False
        self.banned.append(key)
        return True

    def forget(self) -> None:
        """Forget all deaths and lift every ban."""
        self.banned.clear()
        self._times_s.clear()
