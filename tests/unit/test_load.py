"""Bulk loads compared with a dict: every type, equal keys, and rows that do not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_tables import layout_of

from shorttail._native.pages import PageImages, RowPartitions, first_bad_string
from shorttail.config import LIMITS
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import Internal, InvalidArgument
from shorttail.store import ColumnBatch, Store
from shorttail.store import load as load_module
from shorttail.store.environment import table_ids
from shorttail.store.table import Texts, source_columns

USER = Entity("user", keys={"user_id": dtypes.Int64, "site": dtypes.String})
ALL = FeatureView(
    "all",
    entity=USER,
    features=[Feature(dtype.name.lower(), dtype) for dtype in dtypes.SCALARS.values()]
    + [Feature("vector", dtypes.Vector(5)), Feature("text", dtypes.String)],
)
SMALL = FeatureView("small", entity=Entity("item", keys={"id": dtypes.Int64}), features=[Feature("x", dtypes.Float64)])

Row = tuple[int, tuple[Any, ...]]  # event time and features
Rows = list[tuple[tuple[Any, ...], Row]]


def make_store(path: Path, *views: FeatureView) -> Store:
    store = Store.open(path, create=True)
    with store.edit_catalog() as catalog:
        for view in views or (ALL, SMALL):
            catalog.add(view)
    store.refresh()
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with make_store(tmp_path / "store") as store:
        yield store


class Seen:
    """The number of times that rows went to the file, and the hash bits by which they were partitioned."""

    def __init__(self) -> None:
        self.spills = self.bits_max = 0


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """small_memory(kib, bits) limits the memory of all later loads to kib KiB."""

    def limit(kib: int, bits: int = load_module.PARTITION_BITS) -> Seen:
        seen = Seen()
        limits = replace(LIMITS, load_memory_bytes=kib << 10, load_memory_bytes_min=kib << 10)
        monkeypatch.setattr(load_module, "LIMITS", limits)
        monkeypatch.setattr(load_module, "PARTITION_BITS", bits)
        spill = load_module.Partitions.spill

        def counted(parts: load_module.Partitions) -> None:
            seen.spills += 1
            seen.bits_max = max(seen.bits_max, parts.skip_bits + parts.bits)
            spill(parts)

        monkeypatch.setattr(load_module.Partitions, "spill", counted)
        return seen

    return limit


# -- rows and their oracle -----------------------------------------------------------------------------------------


def random_rows(random: np.random.Generator, n: int, n_keys: int) -> Rows:
    """Return rows of ALL with few distinct keys and event times, so that many are equal."""
    texts = ["", "a", "é", "日本語" * 9, "x" * 300, "\x00", "🙂" * 40, "y" * 15, "z" * 16, "ü" * 17]

    def values() -> tuple[Any, ...]:
        vector = tuple(np.round(random.normal(size=5), 2).astype(np.float32).tolist())
        cells: list[Any] = [
            bool(random.integers(2)),
            int(random.integers(-(1 << 31), 1 << 31)),
            int(random.integers(-(1 << 63), 1 << 63, dtype=np.int64)),
            float(np.float32(random.normal())),
            float(random.normal()),
            texts[random.integers(len(texts))],
            int(random.integers(1 << 50)),
            vector,
            texts[random.integers(len(texts))],
        ]
        return tuple(None if random.random() < 0.2 else cell for cell in cells)

    return [
        ((int(key) - n_keys // 2, texts[int(key) % len(texts)]), (int(random.integers(4)), values()))
        for key in random.integers(n_keys, size=n)
    ]


def batch_of(view: FeatureView, rows: Rows) -> ColumnBatch:
    def objects(values: list[Any]) -> Any:
        column = np.empty(len(values), object)
        column[:] = values
        return column

    keys = []
    for k, dtype in enumerate(view.keys.values()):
        column = [key[k] for key, _ in rows]
        keys.append(objects(column) if dtype == dtypes.String else np.array(column, np.int64))
    features: list[Any] = []
    for f, feature in enumerate(view.features):
        cells = [values[f] for _, (_, values) in rows]
        if feature.dtype == dtypes.String:
            features.append((objects(cells), None))
            continue
        zero = (0.0,) * feature.dtype.width if feature.dtype.is_vector else 0
        values = np.array([zero if cell is None else cell for cell in cells], feature.dtype.numpy)
        features.append((values, np.array([cell is None for cell in cells])))
    return ColumnBatch(keys, np.array([time_us for _, (time_us, _) in rows], np.int64), features)


def batches_of(view: FeatureView, rows: Rows, size: int) -> Iterator[ColumnBatch]:
    return (batch_of(view, rows[start : start + size]) for start in range(0, len(rows), size))


def latest(rows: Rows) -> dict[tuple[Any, ...], Row]:
    """Return the rows that the table must hold: per key the latest event time; of equal times, the last row."""
    kept: dict[tuple[Any, ...], Row] = {}
    for key, row in rows:
        if key not in kept or row[0] >= kept[key][0]:
            kept[key] = row
    return kept


def scanned(store: Store, view: FeatureView) -> dict[tuple[Any, ...], Row]:
    """Return the rows that the table holds. A scan also checks every page in full."""
    found: dict[tuple[Any, ...], Row] = {}
    for batch in store.scan(view.name):
        columns: list[list[Any]] = []
        for values, mask in batch.features:
            cells = [tuple(cell) if isinstance(cell, list) else cell for cell in values.tolist()]
            columns.append(cells if mask is None else [None if m else c for m, c in zip(mask, cells, strict=True)])
        for i, key in enumerate(zip(*(column.tolist() for column in batch.keys), strict=True)):
            assert key not in found
            found[key] = (int(batch.event_time_us[i]), tuple(column[i] for column in columns))
    return found


def small(ids: Any, value: float = 0.0) -> ColumnBatch:
    ids = np.asarray(ids, np.int64)
    return ColumnBatch([ids], np.zeros(len(ids), np.int64), [(np.full(len(ids), value), None)])


def held(store: Store) -> dict[int, float]:
    return {key[0]: values[0] for key, (_, values) in scanned(store, SMALL).items()}


def tables(store: Store) -> tuple[set[int], set[int]]:
    """Return the ids of tables that have pages, and the ids of tables that the catalog names."""
    store.refresh(force=True)
    with store.environment.read() as txn:
        return set(table_ids(txn)), {table.id for _, table in store.catalog.all_tables()}


def check(store: Store, rows: Rows, stored: int) -> None:
    expected = latest(rows)
    assert scanned(store, ALL) == expected
    assert store.count("all") == stored == len(expected)


# -- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_keys"), [(1, 1), (10, 10), (3000, 500), (3000, 100_000)])
def test_rows_of_every_type(store: Store, n: int, n_keys: int) -> None:
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    rows = random_rows(np.random.default_rng(seed), n, n_keys)
    check(store, rows, store.load("all", batches_of(ALL, rows, 700)))


@pytest.mark.parametrize(("kib", "bits", "bits_min"), [(512, 8, 3), (64, 1, 3), (48, 2, 5)])
def test_rows_that_do_not_fit_in_memory(
    store: Store, small_memory: Callable[..., Seen], kib: int, bits: int, bits_min: int
) -> None:
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    seen = small_memory(kib, bits)
    rows = random_rows(np.random.default_rng(seed), 8000, 5000)
    check(store, rows, store.load("all", batches_of(ALL, rows, 3000)))
    assert seen.spills > 3
    assert seen.bits_max >= bits_min, "a partition was too large and had to be parted again"
    assert sorted(entry.name for entry in Path(store.path).iterdir()) == [
        "data.mdb",
        "generation",
        "load.lock",
        "lock.mdb",
    ]


def test_many_rows_with_one_key(store: Store, small_memory: Callable[..., Seen]) -> None:
    """No number of hash bits separates rows with equal keys."""
    seen = small_memory(64, 2)
    ids = np.arange(60_000) % 31
    ids[::2] = 7
    batches = [
        ColumnBatch([part], part * 0 + at // 20, [(part + at / 100, None)]) for at, part in enumerate(np.split(ids, 60))
    ]
    assert store.load("small", batches) == 31
    assert held(store) == {i: i + 0.59 for i in range(31)}
    assert seen.spills > 1


@pytest.mark.parametrize("memory_kib", [None, 2048])
def test_rows_longer_than_a_page(tmp_path: Path, small_memory: Callable[..., Seen], memory_kib: int | None) -> None:
    view = FeatureView(
        "wide",
        entity=USER,
        features=[Feature("v", dtypes.Vector(3000)), *(Feature(f"s{i}", dtypes.String) for i in "ab")],
    )
    random = np.random.default_rng(3)
    if memory_kib:
        small_memory(memory_kib)
    rows: Rows = []
    for i in range(120):
        vector = tuple(float(i + j) for j in range(3000))
        long = "w" * (65_535 if i == 50 else int(random.integers(20_000)))
        rows.append(((i, long[: i * 10]), (0, (None if i % 3 == 0 else vector, long, None if i % 5 == 0 else "é" * i))))
    with make_store(tmp_path / "wide", view) as store:
        assert store.load("wide", batches_of(view, rows, 50)) == 120
        assert scanned(store, view) == latest(rows)


def test_small_tables_stay_small(store: Store) -> None:
    for n in (0, 1, 10, 100):
        assert store.load("small", [small(range(n))]) == n
        assert held(store) == dict.fromkeys(range(n), 0.0)
        assert len(tables(store)[0]) == (n > 0) + (n > 1), "this one, and the one before"
        store.refresh()
        directory = store.directory("small")
        assert (0 if directory is None else directory.n_buckets) == (n > 0)


@pytest.mark.parametrize("memory_kib", [None, 512])
def test_pages_are_as_full_as_splitting_makes_them(
    store: Store, small_memory: Callable[..., Seen], memory_kib: int | None
) -> None:
    """Loading by ranges of hashes must not give emptier buckets than splitting does."""
    if memory_kib:
        small_memory(memory_kib)
    n = 60_000
    store.load("small", [small(range(n))])
    store.refresh()
    directory = store.directory("small")
    assert directory is not None
    per_page = store.layout("small").rows_per_page
    assert n / per_page < directory.n_buckets <= 2.1 * n / per_page


def test_strings_in_arrow_layout(store: Store) -> None:
    data = "abcéß".encode()
    one = Texts(np.array([0, 1, 1, 5], np.int32), data)
    other = Texts(np.array([2, 3, 5, 7], np.int64), data)
    assert one.tolist() == ["a", "", "bcé"]
    assert one[1:3].tolist() == ["", "bcé"]
    assert other[0:0].tolist() == []
    n = ALL.feature_index["text"]
    batch = batch_of(ALL, random_rows(np.random.default_rng(0), 3, 1))
    batch.keys = [np.arange(3), one]
    batch.features = [*batch.features[:n], (other, np.array([False, True, False]))]
    for put in (lambda: store.load("all", [batch]), lambda: store.upsert("all", batch)):
        put()
        found = scanned(store, ALL)
        assert {key: values[n] for key, (_, values) in found.items()} == {(0, "a"): "c", (1, ""): None, (2, "bcé"): "ß"}


@pytest.mark.parametrize(
    ("offsets", "data", "message"),
    [
        ([0, 1, 2], b"a\xff", "row 1 is not valid UTF-8"),
        ([0, 2, 4], b"a\xed\xa0\x80", "row 0 is not valid UTF-8"),
        ([0, 1, 3], "aé".encode() + b"b", None),
        ([0, 2, 3], "aé".encode(), "row 0 is not valid UTF-8"),
        ([0, 3, 5], b"abc", "row 1 lie outside"),
        ([2, 1, 1], b"abc", "row 0 lie outside"),
        ([0, 1, 65_537 + 1], b"a" * 70_000, "a string of 65537 bytes"),
    ],
)
def test_strings_are_checked(store: Store, offsets: list[int], data: bytes, message: str | None) -> None:
    batch = batch_of(ALL, random_rows(np.random.default_rng(0), 2, 1))
    batch.keys = [np.arange(2), Texts(np.array(offsets, np.int64), data)]
    if message is None:
        assert store.load("all", [batch]) == 2
        return
    for put in (lambda: store.load("all", [batch]), lambda: store.upsert("all", batch)):
        with pytest.raises(InvalidArgument, match=f"'all': key 'site'.*{message}"):
            put()
    assert store.count("all") == 0


def test_nan_is_null(store: Store) -> None:
    values = np.array([1.0, np.nan, np.nan, 4.0])
    batch = ColumnBatch([np.arange(4)], np.zeros(4, np.int64), [(values, np.array([True, False, True, False]))])
    for put in (store.load, store.upsert):
        put("small", [batch] if put == store.load else batch)
        assert held(store) == {0: None, 1: None, 2: None, 3: 4.0}


def test_wrong_buffers_are_refused() -> None:
    rows = RowPartitions(layout_of(SMALL, 5), 2, 0, 4096, 1 << 20)
    column = np.zeros(4)
    good = [(column, None, None)] * 3
    assert rows.add(good, 0, 4) == 4
    for wrong, n in [
        (good[:2], 4),
        (good, 5),
        (good, 0),
        ([(column, column, None), *good[1:]], 4),
        ([*good[:2], (column, None, bytes(3))], 4),
        ([(column, None, bytes(4)), *good[1:]], 4),
    ]:
        with pytest.raises(ValueError, match=r"column|rows"):
            rows.add(wrong, 0, n)
    with pytest.raises(ValueError, match="offsets"):
        first_bad_string(b"abc", bytes(12), None, 3, 10)
    for call in (lambda: rows.partition_bytes(4), lambda: rows.take(1, 1, -1), lambda: rows.take(0, 5, -1)):
        with pytest.raises(IndexError):
            call()
    other = PageImages(layout_of(SMALL, 6), 1, 4096)
    with pytest.raises(ValueError, match="another seed"):
        other.fill(rows.take(0, 4, -1), 0, 0, 3)


def test_wrong_columns_change_nothing(store: Store) -> None:
    store.load("small", [small([1])])
    good = small([1, 2])
    for wrong, message in [
        (ColumnBatch(good.keys, good.event_time_us, []), "0"),
        (ColumnBatch([np.array([1.5, 2])], good.event_time_us, good.features), "'id'.*float64"),
        (ColumnBatch(good.keys, good.event_time_us, [(np.zeros((2, 2)), None)]), r"'x'.*shape \(2, 2\)"),
        (ColumnBatch(good.keys, good.event_time_us, [(np.zeros(2), np.zeros(3, bool))]), "'x'.*mask"),
        (ColumnBatch(good.keys, good.event_time_us + 0.5, good.features), "event times.*float64"),
        (ColumnBatch([Texts(np.arange(3), b"ab")], good.event_time_us, good.features), "'id'.*strings"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            store.load("small", [small([5]), wrong])
    assert held(store) == {1: 0.0}
    assert tables(store)[0] <= tables(store)[1]


def test_sources_are_not_copied() -> None:
    batch = small(range(5))
    columns = source_columns(SMALL, batch)
    assert [
        np.shares_memory(column[0], given)
        for column, given in zip(columns, [batch.keys[0], batch.event_time_us, batch.features[0][0]], strict=True)
    ] == [True] * 3


def test_a_load_counts_the_rows_that_it_does_not_store(store: Store, small_memory: Callable[..., Seen]) -> None:
    """Also the rows that wait in the file: each key has three rows with two times, and one row twice."""
    for memory_kib in (64 << 10, 512):
        seen = small_memory(memory_kib)
        parts = [small(range(10_000), float(i)) for i in range(4)]
        for part, time_us in zip(parts, (3, 1, 3, 2), strict=True):
            part.event_time_us = np.full(10_000, time_us)
        count = store.load("small", [*parts, small([-1]), small([-1])])
        assert (seen.spills > 0) == (memory_kib == 512)
        assert (count, count.given, count.loaded) == (10_001, 40_002, 10_001)
        assert (count.older, count.duplicate) == (20_000, 10_001)
        assert held(store) == dict.fromkeys(range(10_000), 2.0) | {-1: 0.0}


@pytest.mark.parametrize(
    ("served", "rows", "refused"),
    [
        (1000, 500, False),
        (1000, 499, True),
        (1001, 500, True),
        (2000, 1000, False),
        (999, 1, False),
        (999, 0, True),
        (1, 0, True),
        (0, 0, False),
        (5, 5000, False),
    ],
)
def test_a_load_of_much_fewer_rows_is_refused(store: Store, served: int, rows: int, refused: bool) -> None:
    """Half of 1,000 rows or more, or any row at all; the rows are counted before and after equal keys are found."""
    many = [small([i % rows for i in range(3 * rows)])] if rows else []
    for batches in ([small(range(rows))], many):
        if served:
            store.load("small", [small(range(served), 1.0)], allow_shrink=True)
        if not refused:
            assert store.load("small", batches) == rows
            continue
        number = f"{rows:,} row{'' if rows == 1 else 's'}"
        with pytest.raises(InvalidArgument) as caught:
            store.load("small", batches)
        assert caught.value.message == (
            f"view 'small': the load has {number}, and {served:,} are served; nothing was changed; "
            "if so few are right, give allow_shrink=True (--allow-shrink)"
        )
        assert held(store) == dict.fromkeys(range(served), 1.0)
        assert store.load("small", batches, allow_shrink=True) == rows
        assert store.count("small") == rows


def test_a_damaged_table_is_replaced_by_any_load(store: Store) -> None:
    store.load("small", [small(range(2000))])
    store.refresh()
    with store.environment.write() as writer:
        table = store.catalog.tables["small"].id
        key, page = writer.find_bucket(table, bytes(8))
        assert page is not None
        writer.put_page(table, key, bytes(len(page)))
    with pytest.raises(Internal, match="is damaged"):
        store.count("small")
    assert store.load("small", [small([7])]) == 1
