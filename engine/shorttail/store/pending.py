"""The edits of a view that wait for a table that is being filled: a list in LMDB, which the load applies in order.

A commit of edits appends one entry. Its key is `p`, the table's id and the number of the entry, big-endian; its value
is a CRC-32C, little-endian, and MessagePack: the time of the commit, and the encoded rows of each step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgpack
import numpy as np

from shorttail._native.pages import Layout, crc32c
from shorttail.define.tables import Stored
from shorttail.errors import Internal
from shorttail.store.edits import EditRun, TableEdits
from shorttail.store.environment import WriteTransaction
from shorttail.store.erased import Erased
from shorttail.store.lmdb_handle import Transaction
from shorttail.store.table import row_dtype

PREFIX: Final = b"p"
_KEY: Final = struct.Struct(">cIQ")
_SUM: Final = struct.Struct("<I")
KEY_BYTES: Final = _KEY.size


def append(writer: WriteTransaction, edits: TableEdits, now_us: int) -> None:
    """Append edits to the list of their table. now_us: for rows without event times."""
    steps = [
        (step.upsert, step.sizes, step.given, [(rows.tobytes(), arena) for rows, arena in step.parts])
        for step in edits.steps
    ]
    content = msgpack.packb((now_us, steps))
    number = _last_number(writer.txn, edits.table.id) + 1
    writer.put_value(_KEY.pack(PREFIX, edits.table.id, number), _SUM.pack(crc32c(content)) + content)


def take(writer: WriteTransaction, stored: Stored, layout: Layout, entries: int, size_bytes: int) -> int:
    """Apply the first entries to the table, and remove them from the list. Return how many.

    entries, size_bytes: at least one entry is taken, and no more after so many entries or bytes. Raises Internal for a
    damaged entry, TableDamaged.
    """
    taken = taken_bytes = 0
    for key, value in list(_first(writer.txn, stored.table.id, entries, size_bytes)):
        now_us, steps = _decode(value, stored.view.name)
        edits = TableEdits(stored, layout, Erased(stored.view.entity.name))  # what was erased is not in the list
        dtype = row_dtype(layout)
        for upsert, sizes, given, parts in steps:
            read = [(np.frombuffer(bytearray(rows), dtype), arena) for rows, arena in parts]
            edits.steps.append(EditRun(upsert, list(range(len(sizes))), sizes, [0] * len(sizes), given, read))
        edits.apply(writer, now_us, first=taken == 0)
        writer.delete_value(key)
        taken, taken_bytes = taken + 1, taken_bytes + len(value)
    return taken


def drop(writer: WriteTransaction, table_id: int, entries: int) -> int:
    """Remove at most so many entries from the list of a table. Return how many."""
    keys = [key for key, _ in _first(writer.txn, table_id, entries, 1 << 62)]
    for key in keys:
        writer.delete_value(key)
    return len(keys)


def count(txn: Transaction, table_id: int) -> int:
    """Return the number of entries that wait for a table."""
    return sum(1 for _ in _entries(txn, _KEY.pack(PREFIX, table_id, 0)[:5]))


def is_empty(txn: Transaction, table_id: int) -> bool:
    """Return whether no edits wait for a table."""
    return next(_entries(txn, _KEY.pack(PREFIX, table_id, 0)[:5]), None) is None


def tables(txn: Transaction) -> list[int]:
    """Return the ids of the tables for which entries wait, in ascending order."""
    found: list[int] = []
    cursor = txn.cursor()
    while cursor.set_range(_KEY.pack(PREFIX, found[-1] + 1 if found else 0, 0)):
        key = bytes(cursor.key())
        if key[:1] != PREFIX or len(key) != _KEY.size:
            break
        found.append(_KEY.unpack(key)[1])
    return found


def check(txn: Transaction) -> Iterator[str]:
    """Yield what is wrong with each damaged entry."""
    for key, value in _entries(txn, PREFIX):
        if len(key) != KEY_BYTES or _damaged(value):
            yield f"an edit that waits for table {int.from_bytes(key[1:5], 'big')} is damaged"


def _last_number(txn: Transaction, table_id: int) -> int:
    cursor = txn.cursor()
    found = cursor.prev() if cursor.set_range(_KEY.pack(PREFIX, table_id, 2**64 - 1)) else cursor.last()
    key = bytes(cursor.key()) if found else b""
    if key[:1] != PREFIX or len(key) != _KEY.size:
        return 0
    _, of, number = _KEY.unpack(key)
    return number if of == table_id else 0


def _entries(txn: Transaction, prefix: bytes) -> Iterator[tuple[bytes, memoryview]]:
    cursor = txn.cursor()
    if cursor.set_range(prefix):
        for key, value in cursor:
            if not bytes(key).startswith(prefix):
                return
            yield bytes(key), value


def _first(txn: Transaction, table_id: int, entries: int, size_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, copy of the value) of the first entries of a table, at most `entries`, until they have size_bytes."""
    for key, value in _entries(txn, _KEY.pack(PREFIX, table_id, 0)[:5]):
        if entries <= 0 or size_bytes <= 0:
            return
        entries, size_bytes = entries - 1, size_bytes - len(value)
        yield key, bytes(value)


def _damaged(value: bytes | memoryview) -> bool:
    return len(value) < _SUM.size or _SUM.unpack(value[: _SUM.size])[0] != crc32c(bytes(value[_SUM.size :]))


def _decode(value: bytes, view_name: str) -> Any:
    if _damaged(value):
        raise Internal(f"feature view '{view_name}': an edit that waits for its new table is damaged; load it again")
    return msgpack.unpackb(value[_SUM.size :])
