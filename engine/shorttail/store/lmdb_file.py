"""Checks of LMDB's data file by ordinary reads, without a map.

Reading past the end of a damaged file is then an error, whereas touching a missing page in a map kills the process.

py-lmdb's verifier checks the structure. This module adds checks of the fields that a store fixes, of the order of the
two meta pages, and of whether the file holds the end of each value. While others write, the result is consistent if the
caller holds a read transaction: no page of that commit or of a later one is reused.

`python -m shorttail.store.lmdb_file STORE` prints the problems as JSON. Use a process of its own: when a process that
has LMDB open opens and closes LMDB's files in another way, closing them releases LMDB's file locks.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lmdb.verify import VerifyError, verify

PAGE_BYTES = 4096
HEADER_TRIES = 5  # a meta page, or the length of the file, may be read while a writer changes it
TRY_WAIT_S = 0.02

# The fields of a meta page and their values in a store: struct MDB_meta of LMDB 0.9, data format 1, after a page header
# of 16 bytes. LMDB keeps the page size and the flags in the record of the free list's database.
_META = struct.Struct("<QHH4x II16x IHH40x IHHQQQQQ QQ")
_MAGIC, _VERSION, _META_FLAG, _INTEGER_KEYS = 0xBEEFC0DE, 1, 8, 8
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF, _BIG = 1, 2, 1
_STATE_KEY = b"state"


@dataclass(frozen=True, slots=True)
class Meta:
    """The fields of a meta page, which describe one commit."""

    number: int
    depth: int
    root: int
    n_pages: int
    txn_id: int


class Damaged(Exception):
    """Raised when the file is not a valid LMDB file. The message says why."""


def read_metas(file: BinaryIO) -> tuple[Meta, Meta]:
    """Return both meta pages, the newer one first. Raises Damaged unless they hold what LMDB writes for a store."""
    file.seek(0)
    head = file.read(2 * PAGE_BYTES)
    if len(head) < 2 * PAGE_BYTES:
        raise Damaged(f"data.mdb has {len(head)} bytes")
    metas = [_parse_meta(head[number * PAGE_BYTES :], number) for number in (0, 1)]
    newer, older = sorted(metas, key=lambda meta: -meta.txn_id)
    if newer.txn_id - older.txn_id > 1 or (newer.txn_id and newer.txn_id & 1 != newer.number):
        raise Damaged(f"the meta pages belong to commits {older.txn_id} and {newer.txn_id}, which are not consecutive")
    return newer, older


def _parse_meta(page: bytes, number: int) -> Meta:
    own, _, flags, magic, version, page_bytes, free_flags, _, pad, db_flags, depth, *rest = _META.unpack_from(page)
    _, _, _, _, root, last_page, txn_id = rest
    if (own, flags & _META_FLAG, magic, version) != (number, _META_FLAG, _MAGIC, _VERSION):
        raise Damaged(f"meta page {number} is not a meta page of LMDB 0.9")
    if (page_bytes, free_flags, pad, db_flags) != (PAGE_BYTES, _INTEGER_KEYS, 0, 0):
        raise Damaged(f"meta page {number} does not belong to a store with pages of {PAGE_BYTES} bytes")
    return Meta(number, depth, root, last_page + 1, txn_id)


def header_problems(path: Path) -> list[str]:
    """Return why LMDB must not map the file; an empty list if it may. Raises OSError.

    Reads only the meta pages. Works while others write.
    """
    for _ in range(HEADER_TRIES):
        try:
            with (path / "data.mdb").open("rb") as file:
                size = file.seek(0, 2)
                newer, _ = read_metas(file)
            if newer.n_pages <= max(2 * (size // PAGE_BYTES), 1 << 20):
                return []
            problem = f"meta page {newer.number} claims {newer.n_pages} pages in a file of {size} bytes"
        except Damaged as error:
            problem = str(error)
        time.sleep(TRY_WAIT_S)
    return [problem]


def structure_problems(path: Path) -> list[str]:
    """Return the problems of the file as of its last commit: meta pages, both trees, free list, length. Raises OSError.

    Reads every page except the second and later pages of a value. Must not be called while this process has LMDB open
    on the file.
    """
    if problems := header_problems(path):
        return problems
    try:
        problems = verify(str(path))  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    return problems or _missing_ends(path) or _lost_commit(path)


def _missing_ends(path: Path) -> list[str]:
    """Return a problem if the file lacks the end of a value. Trusts the structure, which must have been checked."""
    with (path / "data.mdb").open("rb") as file:
        size = file.seek(0, 2)
        newer, _ = read_metas(file)
        if size >= newer.n_pages * PAGE_BYTES:
            return []
        end = max((first + n for first, n in _extents(file, newer)), default=0)
    return [f"data.mdb has {size} bytes of {end * PAGE_BYTES}"] if size < end * PAGE_BYTES else []


def _extents(file: BinaryIO, meta: Meta) -> Iterator[tuple[int, int]]:
    """Yield (first page, number of pages) of each value in overflow pages."""
    pending = [meta.root] if meta.root != _NO_PAGE else []
    while pending:
        file.seek(pending.pop() * PAGE_BYTES)
        page = file.read(PAGE_BYTES)
        flags, lower = struct.unpack_from("<HH", page, 10)
        for offset in _offsets(page, lower):
            low, high, key_bytes = struct.unpack_from("<IHH", page, offset)
            if flags & _BRANCH:
                pending.append(low | high << 32)
            elif flags & _LEAF and high & _BIG:
                (first,) = struct.unpack_from("<Q", page, offset + 8 + key_bytes)
                yield first, (16 + low + PAGE_BYTES - 1) // PAGE_BYTES


def _lost_commit(path: Path) -> list[str]:
    """Return a problem if a damaged commit number makes the older meta page look like the newer one."""
    with (path / "data.mdb").open("rb") as file:
        newer, older = read_metas(file)
        counted = [_commits_counted(file, meta) for meta in (newer, older)]
    if None in counted or counted[0] >= counted[1]:  # type: ignore[operator]
        return []
    return [f"meta page {newer.number} has the number of the last commit, but the content of an older one"]


def _commits_counted(file: BinaryIO, meta: Meta) -> int | None:
    """Return the commit number in `state` as of a meta page; None if its pages have been reused meanwhile."""
    number = meta.root
    try:
        for _ in range(meta.depth):
            file.seek(number * PAGE_BYTES)
            page = file.read(PAGE_BYTES)
            flags, lower = struct.unpack_from("<HH", page, 10)
            nodes = [(offset, *struct.unpack_from("<IHH", page, offset)) for offset in _offsets(page, lower)]
            keys = [page[offset + 8 : offset + 8 + n] for offset, _, _, n in nodes]
            if flags & _LEAF:
                at = nodes[keys.index(_STATE_KEY)][0] + 8 + len(_STATE_KEY)
                return int.from_bytes(page[at : at + 8], "little")
            child = max(i for i, key in enumerate(keys) if i == 0 or key <= _STATE_KEY)
            number = nodes[child][1] | nodes[child][2] << 32
    except (ValueError, OverflowError, OSError, struct.error):
        pass
    return None


def _offsets(page: bytes, lower: int) -> tuple[int, ...]:
    """Return the offsets of the nodes in a page. lower: the end of the array of offsets."""
    return struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16)


if __name__ == "__main__":
    print(json.dumps(structure_problems(Path(sys.argv[1]))))
