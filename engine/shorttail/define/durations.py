"""Parses lengths of time as users write them in definitions: "2d", "30m", "200ms"."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from shorttail.errors import InvalidArgument

DURATION: Final = re.compile(r"(\d+)\s*(ms|s|m|h|d|w)")
UNIT_US: Final = {
    "ms": 1_000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}


def parse_duration(given: object, what: str, examples: str) -> int:
    """Return a length of time in microseconds. It is text such as "30m", or a timedelta.

    what: the beginning of the message; examples: what the message proposes. Raises InvalidArgument.
    """
    length_us = 0
    if isinstance(given, timedelta):
        length_us = given // timedelta(microseconds=1)
    elif isinstance(given, str) and (match := DURATION.fullmatch(given.strip())):
        length_us = int(match[1]) * UNIT_US[match[2]]
    if not 0 < length_us < 1 << 62:
        raise InvalidArgument(f"{what} {given!r} is not a positive time; write {examples}")
    return length_us


def duration_text(length_us: int) -> str:
    """Return a length of time in the largest unit that gives a whole number: "1h", "90m"; "1500 us" if none does."""
    for unit, unit_us in reversed(UNIT_US.items()):
        if length_us and unit != "w" and length_us % unit_us == 0:
            return f"{length_us // unit_us}{unit}"
    return f"{length_us} us"
