"""Remembers who sent rows that make models fail, so that good requests need not share runs with theirs.

A sender is a token and an address, or a single connection where neither is known. A sender of several bad rows is a
suspect for a while: its requests are batched among those of suspects.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Final

from shorttail.config import LIMITS

HALF_LIFE_S: Final = 10.0  # after this time a bad row counts half


class Senders:
    """The senders of bad rows.

    suspects: sender -> until when, in ns of CLOCK_MONOTONIC. The native router reads this dict for every request.
    """

    def __init__(self, suspects: dict[Hashable, int]):
        self.suspects = suspects
        self._scores: dict[Hashable, tuple[float, int]] = {}  # sender -> (bad rows lately, ns of the last)

    def blame(self, sender: Hashable) -> None:
        """Note a request that made a model fail. None: nobody knows who sent it."""
        if sender is None:
            return
        now_ns = time.monotonic_ns()
        score, last_ns = self._scores.pop(sender, (0.0, now_ns))
        score = 1.0 + score * 0.5 ** ((now_ns - last_ns) / (1e9 * HALF_LIFE_S))
        while len(self._scores) >= LIMITS.senders_blamed:
            del self._scores[next(iter(self._scores))]
        self._scores[sender] = score, now_ns
        if score > LIMITS.suspect_requests - 0.5:
            self.suspects.pop(sender, None)
            self.suspects[sender] = now_ns + int(1e9 * LIMITS.suspect_s)
            self.forgive(now_ns)

    def forgive(self, now_ns: int) -> None:
        """Forget the suspects whose time is over, and the oldest if there are too many."""
        while self.suspects:
            oldest = next(iter(self.suspects))
            if self.suspects[oldest] > now_ns and len(self.suspects) <= LIMITS.senders_blamed:
                return
            del self.suspects[oldest]
