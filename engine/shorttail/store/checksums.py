"""Checksums of what LMDB keeps beside the pages of tables, which have their own: catalog, state and change log.

LMDB stores no checksums. `verify` compares these; nobody else reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shorttail._native.pages import crc32c

KEY = b"sums"  # next to `state`, so that a commit writes no page more for it
_SUMS = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Checksums:
    """CRC-32C of the catalog and of the state; of the log's entries, key and value each, all of them xored.

    Xored, so that entries can come and go one by one.
    """

    catalog: int
    state: int
    log: int

    @classmethod
    def of(cls, catalog: Any, state: Any, log: Iterable[tuple[bytes, Any]]) -> Checksums:
        """catalog, state: buffers, None when they are missing. log: key and value of each entry."""
        total = 0
        for key, value in log:
            total ^= entry_sum(key, value)
        return cls(crc32c(catalog or b""), crc32c(state or b""), total)

    @classmethod
    def unpack(cls, value: Any) -> Checksums | None:
        """None unless it is a value that pack() gave."""
        return cls(*_SUMS.unpack(value)) if value is not None and len(value) == _SUMS.size else None

    def pack(self) -> bytes:
        return _SUMS.pack(self.catalog, self.state, self.log)


def entry_sum(key: bytes, value: Any) -> int:
    return crc32c(key + bytes(value))
