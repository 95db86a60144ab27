"""Checksums of the catalog, the state and the change log. (Each page image of a table holds its own checksum.)

LMDB stores no checksums. Writers keep these up to date. Opening a store compares the first two, and `verify` all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shorttail._native.pages import crc32c

KEY = b"sums"  # sorts next to `state`, so a commit usually writes no extra page for it
_PACKED = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Checksums:
    """The CRC-32C of the catalog, of the state, and of the change log.

    log: the checksums of all log entries (key and value), combined by xor, so that adding or removing one entry needs
    only that entry.
    """

    catalog: int
    state: int
    log: int

    @classmethod
    def of(cls, catalog: Any, state: Any, log: Iterable[tuple[bytes, Any]]) -> Checksums:
        """Compute the checksums. catalog, state: buffers, or None if missing. log: (key, value) of each entry."""
        total = 0
        for key, value in log:
            total ^= entry_checksum(key, value)
        return cls(crc32c(catalog or b""), crc32c(state or b""), total)

    @classmethod
    def unpack(cls, value: Any) -> Checksums | None:
        """Return the checksums in a value written by pack(), or None if the value is missing or has another length."""
        return cls(*_PACKED.unpack(value)) if value is not None and len(value) == _PACKED.size else None

    def pack(self) -> bytes:
        """Return the value that LMDB stores under KEY."""
        return _PACKED.pack(self.catalog, self.state, self.log)


def entry_checksum(key: bytes, value: Any) -> int:
    """Return the CRC-32C of one entry of the change log."""
    return crc32c(key + bytes(value))
