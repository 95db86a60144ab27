"""The clock that event times are compared with, and made from. Everything else measures time by monotonic clocks."""

from __future__ import annotations

import time


def now_us() -> int:
    """Return the present time in microseconds since 1970 UTC. It may go back: the system's time can be set."""
    return time.time_ns() // 1000
