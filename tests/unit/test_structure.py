"""Numbers in LMDB's file that lead astray: each is found before LMDB, or our own reader, follows it.

tests/faults/test_flips.py flips all bits. These tests name the fields that LMDB trusts, one by one.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_care import in_child
from test_store import make_store, rows, scanned, scores

from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.store import Delete, Store, Upsert, checks, lmdb_file
from shorttail.store.backup import backup
from shorttail.store.environment import page_key, table_pages

DAMAGED = r"' is truncated or damaged \(.*\); restore it from a backup$"
PAGE = 4096
BRANCH, LEAF = 1, 2


class Data:
    """The bytes of a store's data file, and where its newest commit has its pages."""

    def __init__(self, path: Path) -> None:
        self.path = path / "data.mdb"
        self.bytes = bytearray(self.path.read_bytes())
        self.meta = max((0, PAGE), key=lambda at: self.u64(at + 144))
        self.free_root, self.root = self.u64(self.meta + 80) * PAGE, self.u64(self.meta + 128) * PAGE

    def u16(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 2], "little")

    def u64(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 8], "little")

    def put(self, form: str, at: int, value: int) -> None:
        struct.pack_into("<" + form, self.bytes, at, value)

    def nodes(self, page: int) -> list[int]:
        """Return the places of the nodes of a tree's page."""
        return [page + self.u16(page + 16 + 2 * i) for i in range((self.u16(page + 12) - 16) // 2)]

    def leaves(self, page: int) -> list[int]:
        if self.u16(page + 10) == LEAF:
            return [page]
        return [leaf for node in self.nodes(page) for leaf in self.leaves((self.u64(node) & ((1 << 48) - 1)) * PAGE)]

    def node(self, key: bytes) -> int:
        """Return the place of the node of the first key with this prefix."""
        for leaf in self.leaves(self.root):
            for node in self.nodes(leaf):
                if self.bytes[node + 8 : node + 8 + len(key)] == key:
                    return node
        raise KeyError(key)

    def value(self, key: bytes) -> int:
        """Return the place of the value's page number, or of the value, of that key."""
        node = self.node(key)
        return node + 8 + self.u16(node + 6)

    def write(self) -> None:
        self.path.write_bytes(self.bytes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with free pages, a change log, and several pages of LMDB's tree."""
    with make_store(tmp_path / "store") as store:
        store.load("stats", [rows(range(9000))])
        for number in range(8):
            store.upsert("stats", rows(range(number, 9000, 50), 1, 1))
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other writers, no try of a check is better than the first."""
    monkeypatch.setattr(lmdb_file, "TRY_WAIT_S", 0)


def verified(path: Path) -> list[str]:
    """Return what `verify` finds, without starting an interpreter for it."""
    found: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "emit", lambda kind, value: found.append((kind, value)))
        checks.check(path)
    return [value for kind, value in found if kind == "problem"]


def leaf_of(key: bytes, data: Data) -> int:
    return data.node(key) // PAGE * PAGE


def first_free(data: Data) -> int:
    """Return the place of the first page number in the list of free pages."""
    node = data.nodes(data.leaves(data.free_root)[0])[0]
    return node + 16 + 8


OPENED: dict[str, Callable[[Data], None]] = {
    "the page number of the leaf with the format": lambda d: d.put("Q", leaf_of(b"format", d), 1 << 40),
    "one bit of the page number of that leaf": lambda d: d.put(
        "B", leaf_of(b"format", d), d.bytes[leaf_of(b"format", d)] ^ 1
    ),
    "the kind of that leaf": lambda d: d.put("H", leaf_of(b"format", d) + 10, BRANCH),
    "a leaf that is dirty": lambda d: d.put("H", leaf_of(b"format", d) + 10, LEAF | 0x10),
    "the end of the list of entries": lambda d: d.put("H", leaf_of(b"format", d) + 12, 4000),
    "the end of the free space": lambda d: d.put("H", leaf_of(b"format", d) + 14, 17),
    "the place of an entry": lambda d: d.put("H", leaf_of(b"format", d) + 16, 4095),
    "the length of a key": lambda d: d.put("H", d.node(b"format") + 6, 60000),
    "the length of a value": lambda d: d.put("I", d.node(b"format"), 1 << 30),
    "an entry that claims to be a database": lambda d: d.put("H", d.node(b"state") + 4, 2),
    "an entry that claims to be a list": lambda d: d.put("H", d.node(b"sums") + 4, 4),
    "the length of the checksums": lambda d: d.put("I", d.node(b"sums"), 11),
    "the checksum of the catalog": lambda d: d.put("B", d.value(b"sums"), d.bytes[d.value(b"sums")] ^ 1),
    "the format": lambda d: d.put("B", d.value(b"format"), 0x42),
    "the name of the format": lambda d: d.put("B", d.node(b"format") + 8, 0x65),
    "the child of the root": lambda d: d.put("I", d.nodes(d.root)[0], 1 << 31),
    "a child that is the root": lambda d: d.put("I", d.nodes(d.root)[0], d.root // PAGE),
    "the depth: 0": lambda d: d.put("H", d.meta + 94, 0),
    "the depth: one too many": lambda d: d.put("H", d.meta + 94, d.u16(d.meta + 94) + 1),
    "the depth: 30,000": lambda d: d.put("H", d.meta + 94, 30000),
    "the root": lambda d: d.put("Q", d.meta + 128, 1 << 50),
    "the root is a meta page": lambda d: d.put("Q", d.meta + 128, 0),
    "the root of the free list": lambda d: d.put("Q", d.meta + 80, 1 << 50),
    "the flags of the entries": lambda d: d.put("H", d.meta + 92, 4),
    "the flags of the free list": lambda d: d.put("H", d.meta + 44, 0),
    "the page size": lambda d: d.put("I", d.meta + 40, 8192),
    "the address of the map": lambda d: d.put("Q", d.meta + 24, 1 << 44),
    "the flags of a meta page": lambda d: d.put("H", d.meta + 10, 24),
    "the last page": lambda d: d.put("Q", d.meta + 136, 1 << 60),
    "the last page: of a file that is longer": lambda d: d.put("Q", d.meta + 136, d.u64(d.meta + 136) + 1000),
    "the commit number": lambda d: d.put("Q", d.meta + 144, d.u64(d.meta + 144) + 8),
}

# Opening does not read these. LMDB must not either, before they are checked.
FOLLOWED: dict[str, Callable[[Data], None]] = {
    "the page number of a leaf of tables": lambda d: d.put("Q", d.leaves(d.root)[-1], 1 << 40),
    "the place of an entry": lambda d: d.put("H", d.leaves(d.root)[-1] + 18, 4095),
    "two entries in one place": lambda d: d.put("H", d.leaves(d.root)[-1] + 18, d.u16(d.leaves(d.root)[-1] + 16)),
    "the page of a value": lambda d: d.put("Q", d.nodes(d.leaves(d.root)[-1])[3] + 8 + 13, 1 << 45),
    "two values in one page": lambda d: d.put(
        "Q", d.nodes(d.leaves(d.root)[-1])[3] + 8 + 13, d.u64(d.nodes(d.leaves(d.root)[-1])[4] + 8 + 13)
    ),
    "the length of a value": lambda d: d.put("I", d.nodes(d.leaves(d.root)[-1])[3], 1 << 31),
    "the order of keys": lambda d: d.put("B", d.nodes(d.leaves(d.root)[-1])[3] + 8, 0x80),
    "a page number of the free list's page": lambda d: d.put("Q", d.leaves(d.free_root)[0], 1 << 40),
    "a free page that is in use": lambda d: d.put("Q", first_free(d), d.root // PAGE),
    "a free page behind the file": lambda d: d.put("Q", first_free(d), 1 << 40),
    "the number of free pages": lambda d: d.put("Q", first_free(d) - 8, 1 << 30),
    "the commit that freed pages": lambda d: d.put("Q", first_free(d) - 16, 1 << 30),
    "the count of entries": lambda d: d.put("Q", d.meta + 120, 1 << 40),
    "the count of pages": lambda d: d.put("Q", d.meta + 96, d.u64(d.meta + 96) ^ 1 << 50),
    "the last page: a free one": lambda d: d.put("Q", d.meta + 136, d.u64(d.meta + 136) - 1),
}


@pytest.mark.parametrize("what", OPENED)
def test_opening_finds(path: Path, what: str) -> None:
    data = Data(path)
    OPENED[what](data)
    data.write()
    for use in (Store.open, lambda p: Store.open(p, create=True), lambda p: backup(p, p.with_name("copy"))):
        with pytest.raises(InvalidArgument, match=DAMAGED):
            use(path)
    assert verified(path)


@pytest.mark.parametrize("what", FOLLOWED)
def test_nothing_is_written_to_a_store_whose_structure_is_damaged(path: Path, what: str) -> None:
    data = Data(path)
    FOLLOWED[what](data)
    data.write()
    uses: list[Callable[[Store], Any]] = [
        lambda store: store.upsert("stats", rows([1], 9, 9)),
        lambda store: store.delete("stats", [np.arange(3)]),
        lambda store: store.load("stats", [rows(range(9000))]),
        scanned,
        lambda store: backup(store, path.with_name("copy")),
    ]
    for use in uses:  # opening may read one of these pages, too: it depends on where LMDB put them
        with pytest.raises(InvalidArgument, match=DAMAGED), Store.open(path) as store:
            use(store)
    assert verified(path)
    assert data.path.read_bytes() == data.bytes


def test_a_commit_number_that_hides_the_last_commit_is_found(path: Path) -> None:
    data = Data(path)
    data.put("Q", PAGE - data.meta + 144, data.u64(data.meta + 144) + 1)
    data.write()
    (problem,) = verified(path)
    assert "has the number of the last commit, but the content of an older one" in problem


@pytest.mark.parametrize(
    ("offset", "changes"),
    [(0, [1, 2, 4]), (10, [4, 8, 64]), (12, [1, 2, 4])],
    ids=["page number", "kind", "page count"],
)
def test_pages_of_a_damaged_value_are_not_freed(path: Path, offset: int, changes: list[int]) -> None:
    """LMDB frees as many pages as the value's first page says, from the number on that it says."""
    before = Data(path)
    start = before.u64(before.value(b"t")) * PAGE
    with Store.open(path) as store:
        wanted = scanned(store)
    for change in changes:
        data = Data(path)
        data.put("H", start + offset, data.u16(start + offset) ^ change)
        data.write()
        with Store.open(path) as store:
            for use in (
                lambda store: store.upsert("stats", rows(range(9000), 9, 9)),
                lambda store: store.delete("stats", [np.arange(9000)]),
            ):
                with pytest.raises(ShorttailError, match="damaged"):
                    use(store)
            assert store.load("stats", [rows(range(9000), 9, 9)]) == 9000  # into pages of its own
            assert scores(store, [0, 8999]) == [0.9, 8999.9]
        assert verified(path)
        with Store.open(path) as store:
            assert store.load("stats", [rows(range(9000), 9, 8)]) == 9000
            assert scores(store, [0, 8999]) == [0.8, 8999.8]
        data.path.write_bytes(before.bytes)
    with Store.open(path) as store:
        assert scanned(store) == wanted


def test_a_value_that_shrinks_within_a_commit_keeps_no_page_that_it_does_not_need(tmp_path: Path) -> None:
    path = tmp_path / "store"
    long = rows([1])
    long.features[1][0][0] = "x" * 30_000  # its bucket has several pages
    with make_store(path) as store:
        assert store.commit([Upsert("stats", long), Delete("stats", [np.array([1])])]) == [1, 1]
    assert verified(path) == []


def test_a_value_with_pages_that_it_does_not_need_is_sound(tmp_path: Path) -> None:
    """LMDB leaves a value its pages if it shrinks within a commit. Only the headers of values tell where they are."""
    path = tmp_path / "store"
    with make_store(path) as store:
        store.load("stats", [rows(range(40))])
        store.refresh()
        table = store.catalog.tables["stats"].id
        with store.environment.write() as writer:
            ((bucket, image),) = [(key, bytes(page)) for key, page in table_pages(writer.txn, table)]
            for value in (bytes(30_000), image):
                writer.txn.put(page_key(table, bucket), value)
    assert verified(path) == []
    with Store.open(path) as store:
        assert store.upsert("stats", rows([3], 1, version=1)) == 1
        assert scores(store, [3, 4]) == [3.1, 4.0]
    assert verified(path) == []
    data = Data(path)
    data.put("I", data.u64(data.value(b"t")) * PAGE + 12, 7)
    data.write()
    assert verified(path)


@pytest.mark.parametrize("length", [0, 1, 100, 192, 4096])
def test_the_lock_file_of_a_store_at_rest_is_made_again(path: Path, length: int) -> None:
    lock = path / "lock.mdb"
    for content in (lock.read_bytes()[:length], os.urandom(length), os.urandom(8192)):
        lock.write_bytes(content)
        with Store.open(path) as store:
            assert scores(store, [30]) == [30.0]
            store.upsert("stats", rows([30], 2, version=2))
            assert scores(store, [30]) == [30.2]
        with Store.open(path) as store:
            store.load("stats", [rows(range(9000))])


def test_a_damaged_lock_file_that_others_use_is_refused(path: Path, tmp_path: Path) -> None:
    """LMDB maps as much of it as there is. The process that truncated it, here none, would have to be stopped."""
    lock = tmp_path / "lock"
    code = "import sys\nfrom shorttail.store import Store\nStore.open(sys.argv[1])\n"
    good = (path / "lock.mdb").read_bytes()
    for content in (b"", good[:100], good[:4096], bytes(8192), b"\x01" * 8192):
        lock.write_bytes(content)
        lock.replace(path / "lock.mdb")
        with (path / "lock.mdb").open("rb+") as held:
            fcntl.lockf(held, fcntl.LOCK_SH, 1)  # as each process with an open store does
            done = in_child(code, path)
        assert done.returncode == 1, done.stderr
        assert "lock.mdb is truncated or damaged, and other processes use it; stop all processes" in done.stderr
