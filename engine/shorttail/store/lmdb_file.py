"""Checks of LMDB's data file, before LMDB itself follows what the file says.

LMDB trusts the file: a wrong number in a page makes it read outside its map, overwrite pages that are in use, or abort.
So three checks come first, in a map of the file of our own: opening checks what opening reads, the first transaction in
which LMDB walks through pages checks all of them (native/structure.c), and `verify` also the header of each value.

While others write, a check is consistent if the caller holds a read transaction: no page of that commit or of a later
one is reused. Without one, a check that fails is repeated, because a page may have been reused meanwhile.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shorttail._native.pages import Map, Tree
from shorttail.store.checksums import KEY as CHECKSUMS_KEY
from shorttail.store.checksums import Checksums

PAGE_BYTES = 4096
HEADER_TRIES = 5  # a meta page, or the length of the file, may be read while a writer changes it
BUSY_TRIES = 100  # tries during which others commit
TRY_WAIT_S = 0.02
FORMAT_KEY, CATALOG_KEY, STATE_KEY, SETTINGS_KEY = b"format", b"catalog", b"state", b"settings"

# The fields of a meta page and their values in a store: struct MDB_meta of LMDB 0.9, data format 1, after a page header
# of 16 bytes. LMDB keeps the page size and the flags in the record of the free list's database.
_META = struct.Struct("<QHH4x IIQ8x IHH40x IHH32xQQ Q")
_MAGIC, _VERSION, _META_FLAG, _INTEGER_KEYS = 0xBEEFC0DE, 1, 8, 8


@dataclass(frozen=True, slots=True)
class Meta:
    """The fields of a meta page, which describe one commit. depth: of the tree; 0 for an empty database."""

    number: int
    depth: int
    n_pages: int
    txn_id: int


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file in memory, and its two meta pages."""

    map: Map
    n_pages: int  # that the file has
    newer: Meta
    older: Meta


class Damaged(Exception):
    """Raised when the file is not a valid LMDB file. The message says why."""


@contextmanager
def mapped(path: Path) -> Iterator[tuple[Map, mmap.mmap]]:
    """Map the data file of the store at path for the `with` block. Raises OSError and Damaged."""
    with (path / "data.mdb").open("rb") as file:
        size = file.seek(0, 2)
        if size < 2 * PAGE_BYTES:
            raise Damaged(f"data.mdb has {size} bytes")
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as memory:
            found = Map(memory)
            try:
                yield found, memory
            finally:
                found.release()


def read_metas(head: bytes) -> tuple[Meta, Meta]:
    """Return both meta pages, the newer one first. Raises Damaged unless they hold what LMDB writes for a store.

    head: the first two pages of the file.
    """
    metas = [_parse_meta(head[number * PAGE_BYTES :], number) for number in (0, 1)]
    newer, older = sorted(metas, key=lambda meta: -meta.txn_id)
    # LMDB writes commit n into meta page n & 1. Two pages of one commit would be that of an older one, taken for newer.
    if newer.txn_id and (newer.txn_id - older.txn_id != 1 or newer.txn_id & 1 != newer.number):
        raise Damaged(f"the meta pages belong to commits {older.txn_id} and {newer.txn_id}, which are not consecutive")
    return newer, older


def _parse_meta(page: bytes, number: int) -> Meta:
    own, _, flags, magic, version, address, page_bytes, free_flags, _, *rest = _META.unpack_from(page)
    pad, db_flags, depth, _, last_page, txn_id = rest
    if (own, flags, magic, version, address) != (number, _META_FLAG, _MAGIC, _VERSION, 0):
        raise Damaged(f"meta page {number} is not a meta page of LMDB 0.9")
    if (page_bytes, free_flags, pad, db_flags) != (PAGE_BYTES, _INTEGER_KEYS, 0, 0):
        raise Damaged(f"meta page {number} does not belong to a store with pages of {PAGE_BYTES} bytes")
    return Meta(number, depth, last_page + 1, txn_id)


def header_problems(path: Path) -> list[str]:
    """Return why LMDB must not map the file; an empty list if it may. Raises OSError.

    Reads only the meta pages. Works while others write.
    """
    return _problems(path, lambda file: None)


def opening_problems(path: Path) -> list[str]:
    """Return why LMDB must not open the file, or what opening a store reads is damaged. Raises OSError.

    Reads a few pages: the meta pages and those on the way to the catalog, the state, their checksums and the settings.
    Only if the file lacks unused pages at its end, all pages of the trees are read. Works while others write.
    """
    return _problems(path, _check_opening)


def structure_problems(path: Path) -> list[str]:
    """Return the problems of the file as of its last commit: meta pages, both trees, free list, length. Raises OSError.

    Reads every page except the second and later pages of a value.
    """
    return _problems(path, _check_all)


def _problems(path: Path, check: Callable[[DataFile], None]) -> list[str]:
    """Return the message of Damaged or ValueError that a check of the file raises at every try."""
    problem, tries = "", 0
    for _ in range(BUSY_TRIES):
        head = b""
        try:
            with mapped(path) as (found, memory):
                head = memory[: 2 * PAGE_BYTES]
                newer, older = read_metas(head)
                n_pages = len(memory) // PAGE_BYTES
                if newer.n_pages > max(2 * n_pages, 1 << 20):
                    raise Damaged(f"meta page {newer.number} claims {newer.n_pages} pages in a file of {n_pages}")
                check(DataFile(found, n_pages, newer, older))
                return []
        except (Damaged, ValueError) as error:
            problem = str(error)
        with (path / "data.mdb").open("rb") as file:
            busy = bool(head) and file.read(2 * PAGE_BYTES) != head  # a commit: a page may have been reused meanwhile
        tries += not busy
        if tries == HEADER_TRIES:
            break
        time.sleep(0 if busy else TRY_WAIT_S)
    return [problem]


def _check_all(file: DataFile) -> None:
    """Check all that LMDB follows, and the header of each value."""
    _tree(file, file.newer).check(values=True)
    _check_order(file)


def _check_opening(file: DataFile) -> None:
    tree = _tree(file, file.newer)
    if file.n_pages < file.newer.n_pages:
        # Pages that were allocated and freed in one commit are never written. Are all missing pages of that kind?
        try:
            tree.check(values=True)
        except ValueError as error:
            raise Damaged(f"data.mdb has {file.n_pages} of {file.newer.n_pages} pages; {error}") from None
    for key in (FORMAT_KEY, CATALOG_KEY, STATE_KEY, CHECKSUMS_KEY, SETTINGS_KEY):
        tree.check_path(key)
    value = tree.get(CHECKSUMS_KEY)
    sums = Checksums.unpack(value)
    if sums is None:
        if value is not None:
            raise Damaged("its checksums have a wrong length")
        return
    now = Checksums.of(tree.get(CATALOG_KEY), tree.get(STATE_KEY), ())
    if (sums.catalog, sums.state) != (now.catalog, now.state):
        raise Damaged("the catalog or the state of the change log has a wrong checksum")


def _tree(file: DataFile, meta: Meta) -> Tree:
    tree = Tree(file.map, meta.txn_id)
    if tree.gone:
        raise Damaged("the meta page was written meanwhile")
    return tree


def _check_order(file: DataFile) -> None:
    """Raise Damaged if a damaged commit number makes the older meta page look like the newer one.

    Not for opening: when its disk fails, LMDB leaves a meta page like that, and the store must be opened again.
    """
    newer, older = _commits_counted(file, file.newer), _commits_counted(file, file.older)
    if newer is not None and older is not None and newer < older:
        number = file.newer.number
        raise Damaged(f"meta page {number} has the number of the last commit, but the content of an older one")


def _commits_counted(file: DataFile, meta: Meta) -> int | None:
    """Return the commit number in `state` as of a meta page; None if its pages have been reused meanwhile."""
    try:
        state = _tree(file, meta).get(STATE_KEY)
    except (Damaged, ValueError):
        return None
    return None if state is None else int.from_bytes(state[:8], "little")


def find_map(path: Path, txn: Any, map_bytes: int) -> Map | None:
    """Return LMDB's own map of the file, by an entry whose place in the file is known. None: try a newer transaction.

    txn: an open read transaction with buffers. map_bytes: the size of the map. Raises Damaged and ValueError.
    """
    with mapped(path) as (found, _):
        tree = Tree(found, txn.id())
        if tree.gone:
            return None
        offset = tree.offset(FORMAT_KEY)
    if offset is None:
        raise Damaged("it has no format")
    return Map.around(txn.get(FORMAT_KEY), offset, map_bytes)
