"""Parses numbers of bytes as users write them in settings: "64GB", "512MiB"."""

from __future__ import annotations

import re
from typing import Final

from shorttail.errors import InvalidArgument

SIZE: Final = re.compile(r"(\d{1,20})\s*(B|[KMGT]i?B)")
UNIT_BYTES: Final = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def parse_size(given: str, what: str, least: int, most: int) -> int:
    """Return a number of bytes. what: the beginning of the message. Raises InvalidArgument."""
    match = SIZE.fullmatch(given.strip())
    n_bytes = int(match[1]) * UNIT_BYTES[match[2]] if match else -1
    if not least <= n_bytes <= most:
        raise InvalidArgument(
            f"{what} {given!r} is not a size from {exact_size(least)} to {exact_size(most)}; write '64GB' or '512MiB'"
        )
    return n_bytes


def exact_size(n_bytes: int) -> str:
    """Return a number of bytes in the unit that gives the smallest whole number: "64GB", "512MiB", "1001B"."""
    whole = [(n_bytes // size, unit) for unit, size in UNIT_BYTES.items() if n_bytes % size == 0 and n_bytes >= size]
    number, unit = min(whole, default=(n_bytes, "B"))
    return f"{number}{unit}"
