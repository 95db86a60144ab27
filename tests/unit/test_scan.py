"""Scans: equal to a plain decoder of pages, and undisturbed by writers; damage, idle readers and closed stores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_load import Rows, batch_of, batches_of, make_store, random_rows

from shorttail._native.pages import Layout, Scan, crc32c
from shorttail.config import LIMITS
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import DeadlineExceeded, Internal, InvalidArgument, NotFound
from shorttail.store import Store
from shorttail.store import scan as scan_module
from shorttail.store.environment import page_key, table_pages
from shorttail.store.scan import BATCH_BYTES, TableScan
from shorttail.store.table import make_layout, row_dtype

TIMEOUT_S = 60.0
# The types of test_load.ALL, and one of Float64 vectors, in a table with a bitmap of nulls of two bytes.
ALL = FeatureView(
    "all",
    entity=Entity("user", keys={"user_id": dtypes.Int64, "site": dtypes.String}),
    features=[Feature(dtype.name.lower(), dtype) for dtype in dtypes.SCALARS.values()]
    + [
        Feature("vector", dtypes.Vector(5)),
        Feature("text", dtypes.String),
        Feature("wide", dtypes.Vector(2, dtypes.Float64)),
    ],
)
SMALL = FeatureView("small", entity=Entity("item", keys={"id": dtypes.Int64}), features=[Feature("x", dtypes.Float64)])

Row = tuple[Any, ...]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with make_store(tmp_path / "store", ALL, SMALL) as store:
        yield store


def rows_of_every_type(random: np.random.Generator, n: int) -> Rows:
    """Return rows with few equal keys, many nulls, and a few strings of the greatest length."""
    rows = random_rows(random, n, 4 * n)
    longest = "é" * (LIMITS.string_bytes // 2)
    made: Rows = []
    for key, (time_us, values) in rows:
        text = longest if random.random() < 0.002 else values[-1]
        wide = None if random.random() < 0.2 else tuple(random.normal(size=2).tolist())
        made.append((key, (time_us, (*values[:-1], text, wide))))
    return made


def decoded(layout: Layout, page: memoryview) -> Iterator[Row]:
    """Yield the rows of a page, as docs/format.md describes them, by NumPy's records."""
    n, tag_bytes = (int.from_bytes(page[at : at + 2], "little") for at in (0, 2))
    records = np.frombuffer(page, row_dtype(layout), n, 8 + tag_bytes)

    def value(code: int, cell: Any) -> Any:
        if code == dtypes.String.code:
            return str(page[cell[0] : cell[0] + cell[1]], "utf-8")
        return bool(cell) if code == dtypes.Bool.code else tuple(cell.tolist()) if cell.ndim else cell.item()

    for record in records:
        keys = [value(code, record[f"k{k}"]) for k, code in enumerate(layout.key_codes)]
        nulls = [bool(record["nulls"][f // 8] >> (f % 8) & 1) for f in range(len(layout.features))]
        features = [value(code, record[f"f{f}"]) for f, (code, _) in enumerate(layout.features)]
        yield (*keys, int(record["time"]), *(None if null else v for null, v in zip(nulls, features, strict=True)))


def expected(store: Store, view: FeatureView) -> list[Row]:
    store.refresh()
    table = store.catalog.tables[view.name]
    layout = make_layout(store.catalog.stored(view.name))
    with store.environment.read() as txn:
        return [row for _, page in table_pages(txn, table.id) for row in decoded(layout, page)]


def rows_in(batch: list[Any]) -> list[Row]:
    """Return the rows of a batch of a TableScan."""
    columns = []
    for column in batch:
        values = [tuple(value) if isinstance(value, list) else value for value in column.array().tolist()]
        nulls = column.nulls()
        columns.append(
            values if nulls is None else [None if null else v for v, null in zip(values, nulls, strict=True)]
        )
    return list(zip(*columns, strict=True))


def scanned(store: Store, view: str, **options: Any) -> list[Row]:
    with store.open_scan(view, **options) as scan:
        return [row for batch in scan for row in rows_in(batch)]


@pytest.mark.parametrize("n", [0, 1, 7, 3000, 20_000])
def test_a_scan_gives_what_the_pages_hold(store: Store, n: int) -> None:
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    rows = rows_of_every_type(np.random.default_rng(seed), n)
    store.load("all", batches_of(ALL, rows, 700))
    wanted = expected(store, ALL)
    assert scanned(store, "all") == wanted  # the rows of the same pages, in the same order
    assert scanned(store, "all", batch_rows=50) == wanted
    for chosen in ([2], [0, 1], [12, 3, 9, 1], [5, 5], [1, 11, 11, 1], [10, 11, 12]):
        assert scanned(store, "all", choose=lambda view, chosen=chosen: chosen) == [
            tuple(row[c] for c in chosen) for row in wanted
        ]
    batches = list(store.scan("all", batch_rows=1000))
    assert sum(map(len, batches)) == len(wanted) == store.count("all")
    assert all(0 < len(batch) <= 1000 for batch in batches)
    assert [time_us for batch in batches for time_us in batch.event_time_us.tolist()] == [row[2] for row in wanted]
    for f, feature in enumerate(ALL.features):
        for batch in batches:
            values, nulls = batch.features[f]
            assert nulls is None or nulls.any()
            if feature.dtype == dtypes.String:
                missing = np.zeros(len(batch), np.bool_) if nulls is None else nulls
                assert [value is None for value in values.tolist()] == missing.tolist()


def test_rows_that_were_pushed_and_deleted(store: Store) -> None:
    random = np.random.default_rng(1)
    for n in (1, 300, 2000):
        rows = rows_of_every_type(random, n)
        store.upsert("all", batch_of(ALL, rows))
        gone = [key for key, _ in rows[: n // 2]]
        store.delete("all", [np.array([key[0] for key in gone], np.int64), np.array([key[1] for key in gone], object)])
        assert scanned(store, "all") == expected(store, ALL)


def test_numbers_and_bits_have_arrows_layout(store: Store) -> None:
    rows = rows_of_every_type(np.random.default_rng(2), 999)
    store.load("all", [batch_of(ALL, rows)])
    with store.open_scan("all") as scan:
        (batch,) = scan
        assert scan.rows == len(expected(store, ALL)) == batch[0].n
        assert scan.file_bytes == sum(view["bytes"] for view in stats(store) if view["view"] == "all")
    for column, dtype in zip(batch[3:], (feature.dtype for feature in ALL.features), strict=True):
        bits = np.unpackbits(column.valid, bitorder="little")[: column.n]
        assert 0 < bits.sum() < column.n
        assert column.dtype == dtype
        if dtype == dtypes.String:
            assert column.values.dtype == np.uint8
            assert (column.ends[0], column.ends[-1]) == (0, len(column.values))
        else:
            assert column.values.dtype == dtype.numpy
            assert column.values.shape == ((column.n, dtype.width) if dtype.is_vector else (column.n,))
    assert [column.valid for column in batch[:3]] == [None] * 3


def stats(store: Store) -> list[dict[str, Any]]:
    from shorttail.store.stat import view_stats

    return view_stats(store)


def test_a_batch_has_at_least_one_page_and_few_bytes(store: Store) -> None:
    """Rows of long strings fill pages of any size, so rows alone do not limit a batch."""
    text = "x" * LIMITS.string_bytes
    rows: Rows = [((key, "a"), (0, (None,) * 8 + (text, None))) for key in range(1500)]
    store.load("all", batches_of(ALL, rows, 100))
    with store.open_scan("all") as scan:
        sizes = [len(batch[11].values) for batch in scan]
    assert sum(sizes) == 1500 * LIMITS.string_bytes
    assert max(sizes) <= BATCH_BYTES
    assert len(sizes) > 5


def test_unknown_views_and_columns(store: Store) -> None:
    with pytest.raises(NotFound, match="no feature view 'al'; did you mean 'all'"):
        store.open_scan("al")
    for number in (-1, 13):
        with pytest.raises(IndexError):
            store.open_scan("all", lambda view, number=number: [number])
    assert readers(store) == 1


def readers(store: Store) -> int:
    """Return how many read transactions this process has open."""
    return sum(line.split()[2].isdigit() for line in store.environment.handle.env.readers().splitlines())


# -- writers ---------------------------------------------------------------------------------------------------------


def small_batch(ids: Any, value: float) -> Any:
    ids = np.asarray(ids, np.int64)
    rows: Rows = [((key,), (0, (value,))) for key in ids.tolist()]
    return batch_of(SMALL, rows)


def test_a_scan_sees_one_commit_while_others_write(store: Store) -> None:
    store.load("small", [small_batch(range(30_000), 1.0)])
    with store.open_scan("small", batch_rows=1000) as scan:
        found = rows_in(next(scan))
        store.upsert("small", small_batch(range(20_000), 2.0))
        store.delete("small", [np.arange(25_000, dtype=np.int64)])
        found += rows_in(next(scan))
        store.load("small", [small_batch(range(50_000, 80_000), 3.0)])
        found += [row for batch in scan for row in rows_in(batch)]
    assert sorted(found) == [(key, 0, 1.0) for key in range(30_000)]
    assert sorted(scanned(store, "small")) == [(key, 0, 3.0) for key in range(50_000, 80_000)]


def test_scans_while_threads_push_and_load(store: Store) -> None:
    """Each scan finds all rows, all of one value per key of a commit: pushes and loads write all keys at once."""
    n, failed, done = 5000, list[BaseException](), threading.Event()
    store.load("small", [small_batch(range(n), 0.0)])

    def write() -> None:
        try:
            for step in range(1, 60):
                if step % 20 == 0:
                    store.load("small", [small_batch(range(n), float(step))])
                else:
                    store.upsert("small", small_batch(range(n), float(step)))
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        rows = scanned(store, "small", batch_rows=500)
        values = {row[2] for row in rows}
        assert (len(rows), len(values)) == (n, 1)
        seen |= values
    writer.join(TIMEOUT_S)
    assert failed == []
    assert len(seen) > 1
    assert {row[2] for row in scanned(store, "small")} == {59.0}


# -- damage ------------------------------------------------------------------------------------------------------------


def pages_of(store: Store, view: str) -> list[tuple[bytes, bytes]]:
    store.refresh()
    with store.environment.read() as txn:
        return [(key, bytes(page)) for key, page in table_pages(txn, store.catalog.tables[view].id)]


def put(store: Store, view: str, key: bytes, page: bytes | None) -> None:
    with store.environment.write() as writer:
        name = page_key(store.catalog.tables[view].id, key)
        if page is None:
            writer.txn.delete(name)
        else:
            writer.txn.put(name, page)
        writer.changed(name)


def with_checksum(page: bytearray) -> bytes:
    page[-4:] = crc32c(bytes(page[:-4])).to_bytes(4, "little")
    return bytes(page)


def test_a_damaged_page_ends_a_scan_with_its_name(store: Store) -> None:
    store.load("small", [small_batch(range(20_000), 1.0)])
    pages = pages_of(store, "small")
    random = np.random.default_rng(3)
    for nth in (0, len(pages) // 2, len(pages) - 1):
        key, page = pages[nth]
        for at in (0, 2, 4, 6, len(page) - 16, len(page) - 1, *random.integers(len(page), size=5).tolist()):
            damaged = bytearray(page)
            damaged[at] ^= 1 << int(random.integers(8))
            put(store, "small", key, bytes(damaged))
            before = readers(store)
            with pytest.raises(
                Internal, match=rf"table of view 'small' is damaged \(bucket {key.hex()}: .*load it again"
            ):
                scanned(store, "small")
            assert readers(store) <= before
        put(store, "small", key, page)
    assert len(scanned(store, "small")) == 20_000


def test_an_error_stays_the_error(store: Store) -> None:
    store.load("small", [small_batch(range(20_000), 1.0)])
    key, page = pages_of(store, "small")[0]
    put(store, "small", key, page[:-1] + bytes([page[-1] ^ 1]))
    with store.open_scan("small") as scan:
        for _ in range(2):
            with pytest.raises(Internal, match="its checksum is wrong"):
                next(scan)


def test_a_missing_page_is_no_end(store: Store) -> None:
    store.load("small", [small_batch(range(20_000), 1.0)])
    pages = pages_of(store, "small")
    for key, page in (pages[0], pages[len(pages) // 2], pages[-1]):
        put(store, "small", key, None)
        with pytest.raises(Internal, match=r"\(bucket [0-9a-f]{16}: it is missing\)"):
            scanned(store, "small")
        put(store, "small", key, page)


def test_strings_that_share_their_bytes_are_refused(store: Store) -> None:
    """Such a page has a right checksum, and could make a batch larger than any memory."""
    n, length = 5, 3500
    rows: Rows = [((key, ""), (0, (None,) * 8 + ("x" * length, None))) for key in range(n)]
    store.load("all", [batch_of(ALL, rows)])
    ((key, page),) = pages_of(store, "all")
    layout = make_layout(store.catalog.stored("all"))
    heap, first = page.index(b"x" * length * n), 8 + int.from_bytes(page[2:4], "little")

    def refer(n_bytes: int) -> None:
        changed = bytearray(page)
        for row in range(n):
            at = first + row * layout.row_bytes + layout.feature_offsets[8]
            changed[at : at + 8] = heap.to_bytes(4, "little") + n_bytes.to_bytes(4, "little")
        put(store, "all", key, with_checksum(changed))

    refer(length)
    assert [row[11] for row in scanned(store, "all")] == ["x" * length] * n
    refer(length * n)
    with pytest.raises(Internal, match="its strings overlap"):
        scanned(store, "all")


# -- readers that do not read ------------------------------------------------------------------------------------------


def wait_until_ended(scan: TableScan) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while scan.is_open:
        assert time.monotonic() < end_s, "the idle scan was not ended"
        time.sleep(0.01)


def test_a_scan_that_nobody_reads_is_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.load("small", [small_batch(range(20_000), 1.0)])
    left = store.scan("small", batch_rows=100)
    with store.open_scan("small", batch_rows=100) as idle:
        next(left)
        assert len(rows_in(next(idle))) > 0
        monkeypatch.setattr(scan_module, "LIMITS", replace(LIMITS, scan_idle_s=0.2))
        for scan in (*store._scans, idle):
            wait_until_ended(scan)
        for ended in (idle, idle, left):
            with pytest.raises(DeadlineExceeded, match="scan of feature view 'small' was ended, because no rows were"):
                next(ended)
    assert readers(store) <= 1  # that of the store's own snapshot


def test_a_scan_that_is_read_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.load("small", [small_batch(range(3000), 1.0)])
    now_s = [0.0]
    monkeypatch.setattr(scan_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    with store.open_scan("small", batch_rows=500) as scan:
        found = 0
        for batch in scan:
            found += batch[0].n
            now_s[0] += LIMITS.scan_idle_s - 1
            assert scan.end_if_idle() is False
    assert (found, now_s[0] > 3 * LIMITS.scan_idle_s) == (3000, True)
    with store.open_scan("small", batch_rows=500) as scan:
        now_s[0] += LIMITS.scan_idle_s
        assert scan.end_if_idle() is True
        with pytest.raises(DeadlineExceeded, match="for 30 s and its snapshot kept the store's old pages"):
            next(scan)


def test_a_closed_store_ends_its_scans(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", SMALL)
    store.load("small", [small_batch(range(20_000), 1.0)])
    scan, left = store.open_scan("small", batch_rows=100), store.scan("small", batch_rows=100)
    next(scan)
    next(left)
    store.close()
    for ended in (scan, left):
        with pytest.raises(InvalidArgument, match="is closed; open it again"):
            next(ended)
    with pytest.raises(InvalidArgument, match="is closed; open it again"):
        store.open_scan("small")


def test_a_scan_of_a_tree_needs_columns_of_the_table(store: Store) -> None:
    layout = make_layout(store.catalog.stored("small"))
    txn, tree = store.environment.read_tree()
    try:
        assert Scan(layout, tree, 1, [0]).read(10, 10) is None  # no table has this id's pages
        with pytest.raises(IndexError, match="no column number 3"):
            Scan(layout, tree, 1, [0, 3])
    finally:
        store.environment.handle.end_read(txn)
