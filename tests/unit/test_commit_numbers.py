"""Each page holds the number of the commit that wrote it, so that what changed since a commit can be told by page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from test_store import make_store, rows, scores

from shorttail._native.pages import crc32c
from shorttail.store import Delete, Store, Upsert
from shorttail.store.environment import page_key, table_pages
from shorttail.store.table import make_layout
from shorttail.store.verify import verify

Numbers = dict[bytes, int]  # of the pages of a table, by bucket key


def numbers(store: Store, view: str = "stats") -> tuple[int, Numbers]:
    """Return the number of the last commit, and those of the pages of a view's table."""
    store.refresh()
    table = store.catalog.tables[view]
    layout = make_layout(store.catalog.stored(view))
    with store.environment.read() as txn:
        pages = {key: layout.commit(page) for key, page in table_pages(txn, table.id)}
        return store.environment.sequence(txn), pages


def changed_by_last_commit(store: Store, view: str = "stats") -> set[bytes]:
    """Return the buckets of a view's table that the change log says the last commit changed."""
    table_id = store.catalog.tables[view].id.to_bytes(4, "big")
    with store.environment.read() as txn:
        log = store.environment.changes_since(txn, store.environment.sequence(txn) - 1)
    assert log is not None
    entries = [log[at : at + 12] for at in range(0, len(log), 12)]
    return {entry[4:] for entry in entries if entry[:4] == table_id}


def check(store: Store, before: Numbers) -> Numbers:
    """Check the numbers after one commit, by the change log. Return them."""
    last, after = numbers(store)
    changed = changed_by_last_commit(store)
    assert changed & after.keys()
    for key, number in after.items():
        assert number == (last if key in changed else before[key])
    return after


def test_pages_that_a_commit_writes_have_its_number(tmp_path: Path) -> None:
    with make_store(tmp_path / "store") as store:
        store.upsert("stats", rows(range(1)))
        _, known = numbers(store)
        assert len(known) == 1
        known = check(store, {})
        store.upsert("stats", rows(range(5000)))  # splits
        known = check(store, known)
        assert len(known) > 8
        store.upsert("stats", rows([7, 8], time_us=5))
        known = check(store, known)
        assert len(set(known.values())) == 2
        store.delete("stats", [np.array([7])])
        known = check(store, known)
        n = len(known)
        store.delete("stats", [np.arange(100, 5000)])  # joins
        known = check(store, known)
        assert len(known) < n
        later = Upsert("stats", rows(range(6000, 6600)))  # its step reads what the commit itself has written
        store.commit([Upsert("stats", rows([1], time_us=9)), Delete("stats", [np.array([2])]), later])
        check(store, known)
        assert [score is not None for score in scores(store, range(7000))] == [
            i not in (2, 7) and (i < 100 or 6000 <= i < 6600) for i in range(7000)
        ]


def test_pages_of_a_load_have_a_number_before_the_commit_that_gives_them_to_the_view(tmp_path: Path) -> None:
    with make_store(tmp_path / "store") as store:
        before, _ = numbers(store)
        store.load("stats", [rows(range(5000))])
        given, pages = numbers(store)
        assert all(before < number < given for number in pages.values())
        assert len(pages) > 8
        store.upsert("stats", rows([7], time_us=5))
        last, after = numbers(store)
        assert [key for key, number in after.items() if number > given] == list(changed_by_last_commit(store))
        assert last in after.values()


def test_verify_finds_a_page_of_a_commit_that_is_not_there(tmp_path: Path) -> None:
    with make_store(tmp_path / "store") as store:
        store.upsert("stats", rows([7]))
        last, known = numbers(store)
        (bucket,) = known
        assert verify(store.path).problems == []
        with store.environment.write() as writer:
            page = bytearray(writer.get_page(1, bucket) or b"")
            page[-24:-16] = (last + 1).to_bytes(8, "little")
            page[-4:] = crc32c(page[:-4]).to_bytes(4, "little")
            writer.txn.put(page_key(1, bucket), bytes(page))
        (problem,) = verify(store.path).problems
        assert problem == (
            f"view 'stats' (table 1), bucket {bucket.hex()}: its commit number is greater than that of the last commit"
        )
