"""The native lookup compared with a simple oracle in Python, and the page format."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_tables import layout_of, stored

from shorttail._native.columns import Columns
from shorttail._native.pages import (
    Directory,
    Gate,
    GenerationWord,
    Layout,
    Lookup,
    Map,
    SortedRows,
    Tree,
    crc32c,
    lookup,
)
from shorttail.define import dtypes
from shorttail.define.catalog import PAGE_FORMAT
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.store.environment import page_key
from shorttail.store.table import ColumnBatch, encode_rows

PRESENT, NULL, NOT_FOUND, STALE = 0, 1, 2, 3
ALL_TYPES = [*dtypes.SCALARS.values(), dtypes.Vector(5), dtypes.Vector(3, dtypes.Float64)]
INT64 = np.iinfo(np.int64)
PAGE_FORMATS = [2, PAGE_FORMAT]
COMMIT = 2**64 - 5  # of the pages of a Table


class Pages:
    """The pages of one table (bucket key -> image) in an LMDB of their own, where a reader of a store finds them."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory(prefix="pages-") as folder:  # the file lives on as long as it is open
            self.environment = lmdb.open(folder, map_size=1 << 28, sync=False, lock=False)
            self.file = os.open(Path(folder) / "data.mdb", os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self.reader: lmdb.Transaction | None = None

    def write(self, pages: Mapping[bytes, Any], table_id: int = 1, keep: bool = False) -> None:
        """These pages. keep: and those that are there under other keys, where they lie."""
        self.close()
        with self.environment.begin(write=True) as txn:
            if not keep:
                txn.drop(self.environment.open_db(None, txn), delete=False)
            for key, image in pages.items():
                txn.put(page_key(table_id, key), bytes(image))

    def tree(self) -> Tree:
        """As of now. It and its pages last until the next write()."""
        self.close()
        self.reader = self.environment.begin(buffers=True)
        self.map = Map(mmap.mmap(self.file, 0, prot=mmap.PROT_READ))
        return Tree(self.map, self.reader.id())

    def close(self) -> None:
        if self.reader is not None:
            self.reader.abort()
            self.reader = None


class Table:
    """A table: rows, their pages, and a directory."""

    def __init__(
        self,
        view: FeatureView,
        rows: dict[tuple[Any, ...], tuple[int, list[Any]]],
        seed: int = 7,
        page_format: int = PAGE_FORMAT,
    ) -> None:
        self.view, self.rows, self.seed = view, rows, seed
        self.layout = layout_of(view, seed, page_format=page_format)
        parts = [encode_rows(self.layout, stored(view), to_batch(view, rows))] if rows else []
        sorted_rows = SortedRows(self.layout, parts, commit=COMMIT)
        self.pages = sorted_rows.merge(0, bytes(8), None, 1, 40)[1] if rows else []
        self.directory = Directory(self.layout, 1)
        self.stored = Pages()
        self.store(dict(self.pages))

    def store(self, pages: dict[bytes, bytes]) -> int:
        """Have these pages and no others; returns the number of buckets."""
        self.stored.write(pages)
        return self.directory.build(self.stored.tree())

    def move(self, layout: Layout, table_id: int, pages: dict[bytes, bytes]) -> None:
        """Have the same rows in these pages of another table."""
        self.layout, self.directory = layout, Directory(layout, table_id)
        self.stored.write(pages, table_id)
        self.directory.build(self.stored.tree())

    def look(self, keys: list[tuple[Any, ...]], dtype: Any, now_us: int = 0) -> tuple[Any, ...]:
        """Look up all features that fit outputs of one type. Return (columns, view status, feature statuses)."""
        names = list(self.view.keys)
        # A request column that is no key, because a request of no columns has a single row.
        columns = Columns([*names, "x"], [*self.view.keys.values(), dtypes.Int64])
        columns.append({name: [key[k] for key in keys] for k, name in enumerate(names)} | {"x": range(len(keys))})
        ops, at = [], 0
        for f, feature in enumerate(self.view.features):
            if (feature.dtype == dtypes.String) == (dtype is object):
                ops.append((f, 0, at, feature.default))
                at += feature.dtype.width
        out = np.empty((len(keys), at), dtype)
        status = np.full((1, len(keys)), 99, np.uint8)
        statuses = np.full((len(ops), len(keys)), 99, np.uint8)
        plan = Lookup(self.layout, range(len(names)), ops, self.view.ttl_us)
        lookup([self.directory if self.rows else None], [plan], columns, [out], status, now_us, statuses)
        return out, status[0], statuses

    def oracle(self, keys: list[tuple[Any, ...]], dtype: Any, now_us: int = 0) -> tuple[Any, ...]:
        """Return what look_up() must return, computed in plain Python."""
        features = [
            (f, feature)
            for f, feature in enumerate(self.view.features)
            if (feature.dtype == dtypes.String) == (dtype is object)
        ]
        out, view_status, statuses = [], [], []
        for key in keys:
            event_time, values = self.rows.get(key, (0, []))
            if key not in self.rows or None in key:
                status = NOT_FOUND
            else:
                status = STALE if self.view.ttl_us and event_time < now_us - self.view.ttl_us else PRESENT
            cells: list[Any] = []
            statuses.append([])
            for f, feature in features:
                value = values[f] if status == PRESENT else None
                if feature.dtype.is_float and value is not None and math.isnan(value):
                    value = None  # NaN in a float column is null
                statuses[-1].append(NULL if status == PRESENT and value is None else status)
                value = feature.default if value is None else value
                value = converted(value, dtype, feature.dtype.width)
                cells += value if feature.dtype.is_vector else [value]
            out.append(cells)
            view_status.append(status)
        shape = (len(keys), sum(feature.dtype.width for _, feature in features))
        return np.array(out, dtype).reshape(shape), np.array(view_status), np.array(statuses).T


def converted(value: Any, dtype: Any, width: int) -> Any:
    if isinstance(value, list | tuple):
        return [converted(v, dtype, 1) for v in value]
    if dtype is object:
        return value
    if value is None:
        value = math.nan if np.dtype(dtype).kind == "f" else 0
        return [value] * width if width > 1 else value
    if np.dtype(dtype).kind == "i":
        limits = np.iinfo(dtype)
        if isinstance(value, float):
            if math.isnan(value):
                return 0
            value = limits.max if value >= 2.0**63 else limits.min if value < -(2.0**63) else int(value)
        return min(max(int(value), limits.min), limits.max)
    with np.errstate(over="ignore"):
        return np.dtype(dtype).type(value)


def to_batch(view: FeatureView, rows: dict[tuple[Any, ...], tuple[int, list[Any]]]) -> ColumnBatch:
    keys = []
    for k, dtype in enumerate(view.keys.values()):
        keys.append(np.array([key[k] for key in rows], object if dtype == dtypes.String else np.int64))
    features = []
    for f, feature in enumerate(view.features):
        column = [values[f] for _, values in rows.values()]
        mask = np.array([v is None for v in column])
        zero: Any = None if feature.dtype == dtypes.String else [0.0] * feature.dtype.width
        if feature.dtype != dtypes.String and not feature.dtype.is_vector:
            zero = 0
        filled = np.empty(len(column), object) if feature.dtype == dtypes.String else None
        cells = [zero if v is None else v for v in column]
        if filled is None:
            filled = np.array(cells, feature.dtype.numpy)
        else:
            filled[:] = cells
        features.append((filled, mask if mask.any() else None))
    return ColumnBatch(keys, np.array([t for t, _ in rows.values()], np.int64), features)


def make_view(key_types: list[Any], features: list[Feature], ttl: str | None = None) -> FeatureView:
    keys = {f"k{k}": dtype for k, dtype in enumerate(key_types)}
    return FeatureView("v", entity=Entity("e", keys=keys), features=features, ttl=ttl)


def assert_same(table: Table, keys: list[tuple[Any, ...]], dtype: Any, now_us: int = 0) -> None:
    got, want = table.look(keys, dtype, now_us), table.oracle(keys, dtype, now_us)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[2], want[2])
    np.testing.assert_array_equal(got[0], want[0])


float32s = st.floats(width=32)
VALUES: dict[int, Any] = {
    1: st.booleans(),
    2: st.integers(-(2**31), 2**31 - 1),
    3: st.integers(INT64.min, INT64.max),
    4: float32s,
    5: st.floats(),
    6: st.text(st.characters(codec="utf-8"), max_size=20),
    7: st.integers(INT64.min, INT64.max),
    8: st.lists(float32s, min_size=5, max_size=5),
    9: st.lists(st.floats(), min_size=3, max_size=3),
}
# Few distinct keys, so that batches contain duplicates and hits. Some keys are edge cases.
KEYS: dict[int, Any] = {
    3: st.sampled_from([0, 1, -1, 2, 3, 100, INT64.min, INT64.max, 0x9E3779B9]),
    6: st.sampled_from(["", "a", "b", "\0", "\0\0", "é", "x" * 15, "x" * 16, "x" * 17, "x" * 40]),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, list[tuple[Any, ...]]]:
    key_types = draw(st.lists(st.sampled_from([dtypes.Int64, dtypes.String]), max_size=3))
    types = draw(st.lists(st.sampled_from(ALL_TYPES), min_size=1, max_size=12))
    features = [
        Feature(f"f{i}", dtype, default=draw(st.none() | VALUES[dtype.code].filter(lambda v: v == v and v is not None)))
        if not dtype.is_vector
        else Feature(f"f{i}", dtype)
        for i, dtype in enumerate(types)
    ]
    view = make_view(key_types, features, ttl=draw(st.sampled_from([None, "45s"])))
    key = st.tuples(*[KEYS[dtype.code] for dtype in key_types])
    values = st.tuples(*[st.none() | VALUES[dtype.code] for dtype in types]).map(list)
    rows = draw(st.dictionaries(key, st.tuples(st.integers(0, 100_000_000), values), max_size=30))
    wanted = draw(st.lists(st.tuples(*[st.none() | KEYS[dtype.code] for dtype in key_types]), min_size=1, max_size=40))
    seed, page_format = draw(st.integers(0, 2**64 - 1)), draw(st.sampled_from(PAGE_FORMATS))
    return Table(view, rows, seed, page_format), wanted


@settings(max_examples=150, deadline=None)
@given(tables(), st.sampled_from([np.float32, np.float64, np.int64, np.int32, np.bool_, object]))
def test_lookup_equals_oracle(table_and_keys: tuple[Table, list[tuple[Any, ...]]], dtype: Any) -> None:
    table, keys = table_and_keys
    assert_same(table, keys, dtype, now_us=100_000_000)


def test_many_rows_with_misses_in_chunks() -> None:
    seed = 20240607
    rng = np.random.default_rng(seed)
    view = make_view([dtypes.Int64], [Feature(f"f{i}", dtypes.Float32) for i in range(32)])
    data = rng.random((20_000, 32), np.float32)
    rows = {(int(k),): (0, row.tolist()) for k, row in zip(rng.permutation(40_000)[:20_000], data, strict=True)}
    table = Table(view, rows)
    assert table.directory.count_rows() == len(rows), seed
    assert table.directory.n_buckets == len(table.pages) > 500
    assert_same(table, [(int(k),) for k in rng.integers(0, 40_000, 3_001)], np.float32)


def test_runs_are_split_by_gaps_order_and_type() -> None:
    """Features are taken out of order, twice, and with gaps."""
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Float32), Feature("b", dtypes.Float32, default=7.0),
                                      Feature("c", dtypes.Int64), Feature("d", dtypes.Float32)])  # fmt: skip
    table = Table(view, {(1,): (0, [1.0, 2.0, 3, 4.0]), (2,): (0, [1.0, None, None, 4.0])})
    columns = Columns(["k0"], [dtypes.Int64])
    columns.append({"k0": [1, 2, 3]})
    ops = [(1, 0, 1, 7.0), (0, 0, 0, None), (3, 0, 3, None), (2, 0, 2, None), (3, 1, 0, None), (0, 1, 1, -1.0)]
    first, second = np.empty((3, 4), np.float32), np.empty((3, 2), np.float64)
    plan = Lookup(table.layout, [0], ops, 0)
    status, statuses = np.empty((1, 3), np.uint8), np.empty((6, 3), np.uint8)
    nan = math.nan
    for _ in range(2):
        lookup([table.directory], [plan], columns, [first, second], status, 0, statuses)
        np.testing.assert_array_equal(first, [[1, 2, 3, 4], [1, 7, nan, 4], [nan, 7, nan, nan]])
        np.testing.assert_array_equal(second, [[4, 1], [4, 1], [nan, -1]])
        np.testing.assert_array_equal(statuses[:, 1], [NULL, 0, 0, NULL, 0, 0])
    # The same lookup with outputs of other types.
    integers = np.empty((3, 4), np.int32)
    lookup([table.directory], [plan], columns, [integers, second.astype(np.float32)], status, 0)
    np.testing.assert_array_equal(integers, [[1, 2, 3, 4], [1, 7, 0, 4], [0, 7, 0, 0]])


@pytest.mark.parametrize("n_views", [1, 3, 70])
def test_many_views_in_one_call(n_views: int) -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64), Feature("s", dtypes.String)])
    made = [Table(view, {(k,): (0, [k + v, f"{k}-{v}"]) for k in range(0, 300, v + 1)}, v) for v in range(n_views)]
    columns = Columns(["k0"], [dtypes.Int64])
    columns.append({"k0": np.arange(300)})
    numbers, texts = np.empty((300, n_views), np.int64), np.empty((300, n_views), object)
    plans = [Lookup(t.layout, [0], [(0, 0, v, -1), (1, 1, v, None)], 0) for v, t in enumerate(made)]
    status = np.empty((n_views, 300), np.uint8)
    lookup([None if v == 1 else t.directory for v, t in enumerate(made)], plans, columns, [numbers, texts], status, 0)
    for v in range(n_views):
        for k in range(300):
            there = k % (v + 1) == 0 and v != 1
            assert (numbers[k, v], texts[k, v], status[v, k]) == ((k + v, f"{k}-{v}", 0) if there else (-1, None, 2))


def test_ttl_boundary_and_extremes() -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64)], ttl="45s")
    now = 10_000_000_000
    times = [now - 45_000_000, now - 45_000_001, now + 5, INT64.min, INT64.max]
    table = Table(view, {(k,): (t, [k]) for k, t in enumerate(times)})
    assert table.look([(k,) for k in range(5)], np.int64, now)[1].tolist() == [PRESENT, STALE, PRESENT, STALE, PRESENT]
    assert table.look([(3,)], np.int64, INT64.min)[1].tolist() == [PRESENT]


def test_wrong_outputs_are_refused() -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64), Feature("s", dtypes.String)])
    table = Table(view, {(1,): (0, [1, "x"])})
    columns = Columns(["k0", "t"], [dtypes.Int64, dtypes.String])
    columns.append({"k0": [1, 2], "t": ["a", "b"]})
    status = np.empty((1, 2), np.uint8)
    number, text = [(0, 0, 0, None)], [(1, 0, 0, None)]

    def attempt(
        ops: Any, out: Any, key: int = 0, statuses: Any = status, directories: Any = (table.directory,)
    ) -> None:
        lookup(directories, [Lookup(table.layout, [key], ops, 0)], columns, [out], statuses, 0)

    attempt(number, np.empty(2, np.int64))
    for error, arguments in [
        (ValueError, (number, np.empty(3, np.int64))),
        (ValueError, (number, np.empty((2, 2), np.int64)[:, :1])),
        (ValueError, (number, np.empty((2, 0), np.int64))),
        (ValueError, ([(0, 1, 0, None)], np.empty(2))),
        (ValueError, ([(0, 0, -1, None)], np.empty(2))),
        (TypeError, (number, np.empty(2, np.uint64))),
        (TypeError, (number, np.empty(2, object))),
        (TypeError, (text, np.empty(2, np.float32))),
        (TypeError, (number, [0, 0])),
        (TypeError, (number, np.empty(2), 1)),
        (ValueError, (number, np.empty(2), 2)),
        (ValueError, (number, np.empty(2), 0, np.empty((2, 2), np.uint8))),
        (ValueError, (number, np.empty(2), 0, np.empty((1, 2), np.int8))),
        (ValueError, (number, np.empty(2), 0, status, ())),
    ]:
        with pytest.raises(error):
            attempt(*arguments)
    readonly = np.empty(2)
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        attempt(number, readonly)
    other = Table(make_view([dtypes.Int64], [Feature("a", dtypes.Float64)]), {(1,): (0, [1.0])})
    with pytest.raises(ValueError, match="other columns"):
        attempt(number, np.empty(2), 0, status, (other.directory,))
    with pytest.raises(ValueError, match="feature number"):
        Lookup(table.layout, [0], [(2, 0, 0, None)], 0)


# -- pages ---------------------------------------------------------------------------------------------------------


def test_without_keys_every_row_has_the_same_key() -> None:
    view = make_view([], [Feature(f"f{i}", dtypes.Float32) for i in range(70)] + [Feature("s", dtypes.String)])
    table = Table(view, {(): (5, [*map(float, range(70)), "first"])})
    ((bucket, page),) = table.pages
    table.layout.check(page, bucket, 1)
    assert table.layout.time_offset == 0
    parts = [
        encode_rows(table.layout, stored(view), to_batch(view, {(): (time, [None] * 70 + [text])}))
        for time, text in ((5, "x" * 5000), (4, "older"))
    ]
    _, merged = SortedRows(table.layout, parts).merge(0, bucket, page, 1, 40)
    table.rows = {(): (5, [None] * 70 + ["x" * 5000])}
    assert table.store(dict(merged)) == 1
    assert table.directory.count_rows() == 1
    for dtype in (np.float32, object):
        assert_same(table, [()] * 100, dtype)
    ((_, image),) = merged
    stop, removed, image = SortedRows(table.layout, parts[:1]).remove(0, bucket, image, 1)
    assert (stop, removed) == (1, 1)
    table.rows = {}
    table.store({bucket: image})
    assert_same(table, [()] * 3, np.float32)


def test_layout_sizes() -> None:
    layout = Layout(bytes([3]), [(4, 1)] * 32, 1)
    assert (layout.row_bytes, layout.page_bytes, layout.rows_per_page) == (8 + 8 + 4 + 128, 4080, 27)
    wide = Layout(bytes([3, 6]), [(8, 1000)], 1)
    assert wide.rows_per_page >= 8
    assert (wide.page_bytes + 16) % 4096 == 0
    with pytest.raises(ValueError, match="too large"):
        Layout(bytes([3]), [(8, 65536)] * 300, 1)
    with pytest.raises(ValueError, match="key columns"):
        Layout(bytes([3]) * 9, [(4, 1)], 1)


@pytest.mark.parametrize("page_format", PAGE_FORMATS)
def test_long_rows_get_longer_pages(page_format: int) -> None:
    view = make_view([dtypes.String], [Feature("s", dtypes.String)])
    rows = {(f"key {i}",): (0, [chr(97 + i % 26) * (i * 700)]) for i in range(60)}
    table = Table(view, rows, page_format=page_format)
    assert max(len(page) for _, page in table.pages) > 40_000
    assert all((len(page) + 16) % 4096 == 0 for _, page in table.pages)
    assert_same(table, [*rows, ("none",)], object)


@pytest.mark.parametrize("page_format", PAGE_FORMATS)
def test_merge_and_remove_leave_other_rows_unchanged(page_format: int) -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64), Feature("s", dtypes.String)])
    old = {(k,): (10, [k, f"old {k}"]) for k in range(40)}
    new = {(k,): (9 if k % 2 else 10, [-k, f"new {k}"]) for k in range(20, 300)}
    table = Table(view, old, page_format=page_format)
    rows = SortedRows(table.layout, [encode_rows(table.layout, stored(view), to_batch(view, new))], commit=COMMIT + 1)
    pages, at, splits = dict(table.pages), 0, 0
    while at < len(rows):
        key = max(k for k in pages if k <= rows.hash(at))
        at, images = rows.merge(at, key, pages[key], 1, 40)
        splits += len(images) > 1
        pages.update(images)
        assert {table.layout.commit(image) for _, image in images} == {COMMIT + 1 if page_format > 2 else 0}
    assert splits
    want = new | {k: row for k, row in old.items() if k not in new or new[k][0] < 10}
    assert table.store(pages) == len(pages)
    table.rows = want
    assert_same(table, [(k,) for k in range(310)], np.int64)
    assert_same(table, [(k,) for k in range(310)], object)

    gone = {(k,): (0, [0, ""]) for k in range(0, 400, 3)}
    rows = SortedRows(table.layout, [encode_rows(table.layout, stored(view), to_batch(view, gone))], commit=COMMIT + 2)
    at, count = 0, 0
    changed = {}
    while at < len(rows):
        key = max(k for k in pages if k <= rows.hash(at))
        at, removed, image = rows.remove(at, key, pages[key], 1)
        assert (image is None) == (removed == 0)
        count += removed
        if image is not None:
            pages[key] = changed[key] = image
            assert table.layout.commit(image) == (COMMIT + 2 if page_format > 2 else 0)
    table.stored.write(changed, keep=True)
    changes = b"".join(page_key(1, key)[1:] for key in changed)
    assert table.directory.update(table.stored.tree(), changes) == len(changed)
    assert count == sum(k in want for k in gone)
    table.rows = {k: row for k, row in want.items() if k not in gone}
    assert_same(table, [(k,) for k in range(310)], np.int64)


@pytest.mark.parametrize("page_format", PAGE_FORMATS)
def test_check_detects_every_changed_byte(page_format: int) -> None:
    view = make_view([dtypes.String], [Feature("a", dtypes.Int64), Feature("s", dtypes.String)])
    table = Table(view, {(f"k{i}",): (i, [i, f"value {i}"]) for i in range(5)}, page_format=page_format)
    (key, page), *others = table.pages
    assert not others
    table.layout.check(page, key, 1)
    for at in range(len(page)):
        damaged = bytearray(page)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(ValueError, match=r"\w"):
            table.layout.check(damaged, key, 1)
    for cut in (0, 1, 7, 23, 24, 100, len(page) - 1):
        with pytest.raises(ValueError, match="length"):
            table.layout.check(page[:cut], key, 1)


def test_a_page_of_format_3_ends_with_the_commit_and_the_footer_of_format_2() -> None:
    view = make_view([dtypes.Int64], [Feature("s", dtypes.String)])
    pages = {}
    for page_format in PAGE_FORMATS:
        table = Table(view, {(1,): (5, ["abc"])}, page_format=page_format)
        ((_, pages[page_format]),) = table.pages
        assert table.layout.page_format == page_format
    old, new = pages[2], pages[3]
    assert (old[5], new[5]) == (0, 3)
    assert int.from_bytes(new[-24:-16], "little") == COMMIT
    assert new[-16:-8] == old[-16:-8]  # the table's id and the bytes of a row
    assert (old[-19:-16], new[-27:-24]) == (b"abc", b"abc")
    for page, end in ((old, 16), (new, 24)):
        assert int.from_bytes(page[-8:-4], "little") == len(page) - end - 3
        assert int.from_bytes(page[-4:], "little") == crc32c(page[:-4])


def test_a_page_of_the_other_format_is_refused() -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64)])
    for page_format, other in ((2, 3), (3, 2)):
        table = Table(view, {(k,): (0, [k]) for k in range(9)}, page_format=page_format)
        ((key, page),) = table.pages
        wrong = layout_of(view, 7, page_format=other)
        with pytest.raises(ValueError, match="another page format"):
            wrong.check(page, key, 1)
        with pytest.raises(ValueError, match="another page format"):
            Directory(wrong, 1).build(table.stored.tree())
    for unknown in (1, 4):
        with pytest.raises(ValueError, match=f"format 2 or 3, not {unknown}"):
            Layout(bytes([3]), [(3, 1)], 1, page_format=unknown)


def test_lookup_of_damaged_strings_stays_inside_the_page() -> None:
    view = make_view([dtypes.String], [Feature("s", dtypes.String, default="none")])
    table = Table(view, {("k",): (0, ["value"])})
    (key, page), *_ = table.pages
    row = 8 + int.from_bytes(page[2:4], "little")
    for offset, length in [(2**32 - 1, 5), (4000, 81), (0, 2**32 - 1)]:
        damaged = bytearray(page)
        damaged[row + 17 : row + 25] = offset.to_bytes(4, "little") + length.to_bytes(4, "little")
        table.store({key: damaged})
        out, status, statuses = table.look([("k",)], object)
        assert (out.tolist(), status.tolist(), statuses.tolist()) == ([["none"]], [PRESENT], [[NULL]])


def test_directory_refuses_gaps_and_overlaps() -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64)])
    table = Table(view, {(k,): (0, [k]) for k in range(2000)})
    pages = table.pages
    beside = (int.from_bytes(pages[1][0]) + 1).to_bytes(8)
    for wrong in (pages[1:], pages[:-1], [*pages[:1], *pages[2:]], [*pages, (beside, pages[1][1])]):
        with pytest.raises(ValueError, match="bucket"):
            table.store(dict(wrong))
    table.stored.write(dict(pages), table_id=2)
    with pytest.raises(ValueError, match="another table"):
        Directory(table.layout, 2).build(table.stored.tree())
    assert table.store({}) == 0
    assert table.directory.count_rows() == table.directory.n_buckets == 0


def test_sorted_rows_refuse_strings_outside_the_arena() -> None:
    view = make_view([dtypes.String], [Feature("a", dtypes.Int64)])
    layout = layout_of(view, 7)
    rows, arena = encode_rows(layout, stored(view), to_batch(view, {("abc",): (0, [1])}))
    with pytest.raises(ValueError, match="arena"):
        SortedRows(layout, [(rows, arena[:-1])])


def test_generation_word() -> None:
    memory = bytearray(8)
    word = GenerationWord(memory)
    assert (word.load(), word.bump(), word.load()) == (0, 1, 1)
    word.release()
    for generation in range(-10, 10):  # none is that of a snapshot, nor one of the values for "no snapshot"
        assert not Gate(word, generation).try_enter()
    memory.append(0)  # possible only if release() has released the buffer
    with pytest.raises(ValueError, match="8 bytes"):
        GenerationWord(bytearray(7))
