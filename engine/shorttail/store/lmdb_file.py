"""LMDB's data file looked at by ordinary reads, never through a map: a page that a damaged file lacks then is an error,
where touching it in a map would kill the process.

The structure is checked by py-lmdb's verifier. What that leaves out is here: the fields that this store fixes, whether
both metas follow each other, and whether the file holds the end of each value. All of it is of one commit, also while
others write, if the caller holds a read transaction meanwhile: no page of that commit or a later one is written again.

`python -m shorttail.store.lmdb_file STORE` prints the problems as JSON. In a process of its own, as one that has LMDB
open should not open LMDB's files in another way: to close them gives up its locks.
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
HEADER_TRIES = 5  # the page of a meta, or the length of the file, may be read while they are written
TRY_WAIT_S = 0.02

# Offsets in a meta page, and what stands there in a store (struct MDB_meta of LMDB 0.9, data format 1, behind a page
# header of 16 bytes). Page size and flags: mdb.c keeps them in the record of the free list's database.
_META = struct.Struct("<QHH4x II16x IHH40x IHHQQQQQ QQ")
_MAGIC, _VERSION, _META_FLAG, _INTEGER_KEYS = 0xBEEFC0DE, 1, 8, 8
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF, _BIG = 1, 2, 1
_STATE_KEY = b"state"


@dataclass(frozen=True, slots=True)
class Meta:
    """What a meta page says of a commit."""

    number: int
    depth: int
    root: int
    n_pages: int
    txn_id: int


class Damaged(Exception):
    """The file cannot be LMDB's. The message says why."""


def read_metas(file: BinaryIO) -> tuple[Meta, Meta]:
    """Both metas, the newer one first. Raises Damaged unless they say what LMDB writes for a store."""
    file.seek(0)
    head = file.read(2 * PAGE_BYTES)
    if len(head) < 2 * PAGE_BYTES:
        raise Damaged(f"data.mdb has {len(head)} bytes")
    metas = [_parse_meta(head[number * PAGE_BYTES :], number) for number in (0, 1)]
    newer, older = sorted(metas, key=lambda meta: -meta.txn_id)
    if newer.txn_id - older.txn_id > 1 or (newer.txn_id and newer.txn_id & 1 != newer.number):
        raise Damaged(
            f"the meta pages are of commits {older.txn_id} and {newer.txn_id}, which do not follow each other"
        )
    return newer, older


def _parse_meta(page: bytes, number: int) -> Meta:
    own, _, flags, magic, version, page_bytes, free_flags, _, pad, db_flags, depth, *rest = _META.unpack_from(page)
    _, _, _, _, root, last_page, txn_id = rest
    if (own, flags & _META_FLAG, magic, version) != (number, _META_FLAG, _MAGIC, _VERSION):
        raise Damaged(f"meta page {number} is not one of LMDB 0.9")
    if (page_bytes, free_flags, pad, db_flags) != (PAGE_BYTES, _INTEGER_KEYS, 0, 0):
        raise Damaged(f"meta page {number} is not that of a store with pages of {PAGE_BYTES} bytes")
    return Meta(number, depth, root, last_page + 1, txn_id)


def header_problems(path: Path) -> list[str]:
    """Whether LMDB may map that file at all. Quick; also while others write. Raises OSError."""
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
    """What is wrong with the file as of its last commit: metas, both trees, the free list, the length. Raises OSError.

    Reads each page but what follows the first one of a value. Not while this process has LMDB open on it.
    """
    if problems := header_problems(path):
        return problems
    try:
        problems = verify(str(path))  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    return problems or _missing_ends(path) or _lost_commit(path)


def _missing_ends(path: Path) -> list[str]:
    """Values whose end the file lacks. Only for a file whose structure is sound, as this trusts it."""
    with (path / "data.mdb").open("rb") as file:
        size = file.seek(0, 2)
        newer, _ = read_metas(file)
        if size >= newer.n_pages * PAGE_BYTES:
            return []
        end = max((first + n for first, n in _extents(file, newer)), default=0)
    return [f"data.mdb has {size} bytes of {end * PAGE_BYTES}"] if size < end * PAGE_BYTES else []


def _extents(file: BinaryIO, meta: Meta) -> Iterator[tuple[int, int]]:
    """(first page, pages) of each value that has pages of its own."""
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
    """Whether the meta page that is not in use is the newer one: a damaged number makes an older commit the last."""
    with (path / "data.mdb").open("rb") as file:
        newer, older = read_metas(file)
        counted = [_commits_counted(file, meta) for meta in (newer, older)]
    if None in counted or counted[0] >= counted[1]:  # type: ignore[operator]
        return []
    return [f"meta page {newer.number} has the number of the last commit, but not its content"]


def _commits_counted(file: BinaryIO, meta: Meta) -> int | None:
    """The first number of `state` as of that meta; None if it is not found, its pages being used otherwise by now."""
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
    return struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16)


if __name__ == "__main__":
    print(json.dumps(structure_problems(Path(sys.argv[1]))))
