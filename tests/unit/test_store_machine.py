"""A store compared with dicts: Hypothesis draws loads, upserts, deletes, lookups, reopenings and catalog changes.

Every run draws new steps. A failure prints the shortest failing sequence of steps that Hypothesis found, and a line
that repeats it: everything, including the seeds of the tables, follows from the arguments of the steps.
SHORTTAIL_MACHINE_STEPS sets the number of steps (`make soak`: 100,000).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from row_tables import layout_of

from shorttail._native.columns import Columns
from shorttail._native.pages import Lookup, SortedRows, lookup
from shorttail.config import LIMITS
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import InvalidArgument, NotFound
from shorttail.results import RowCount, Status
from shorttail.store import ColumnBatch, Delete, Store, Upsert, environment
from shorttail.store import load as load_module
from shorttail.store.table import encode_keys

STEPS = int(os.environ.get("SHORTTAIL_MACHINE_STEPS", "3000"))
STEPS_PER_EXAMPLE = 50
WIDTH = 80  # of the vector: a page of 4 KiB then holds nine rows, so a few dozen rows split and merge buckets often
SEEDS = (0, 0x1234_5678_9ABC_DEF0)  # table seeds; each example uses one of them
PREFIX_BITS = 10
ALIKE = 24  # number of keys whose hashes share PREFIX_BITS bits: more than two pages of rows

FEATURES = [
    Feature("b", dtypes.Bool, default=True),
    Feature("i", dtypes.Int32, default=-7),
    Feature("l", dtypes.Int64),
    Feature("f", dtypes.Float32),
    Feature("d", dtypes.Float64, default=0.5),
    Feature("t", dtypes.Timestamp),
    Feature("v", dtypes.Vector(WIDTH)),
    Feature("s", dtypes.String, default="none"),
]
OPS = [
    (0, 0, 0, True),
    (1, 0, 1, -7),
    (2, 0, 2, None),
    (3, 0, 3, None),
    (4, 0, 4, 0.5),
    (5, 0, 5, None),
    (6, 0, 6, None),
]
KEYS: dict[str, dict[str, dtypes.DType]] = {
    "by_int": {"a": dtypes.Int64},
    "by_text": {"k": dtypes.String},
    "by_pair": {"a": dtypes.Int64, "k": dtypes.String},
    "by_texts": {"k": dtypes.String, "z": dtypes.String},
}
VIEWS = {
    name: FeatureView(name, entity=Entity(name, keys=keys), features=FEATURES, ttl="1s") for name, keys in KEYS.items()
}
TTL_US = 1_000_000
NAMES = sorted(VIEWS)

Counts = tuple[int, ...]  # (the number itself, given, older, duplicate)
Key = tuple[int | str, ...]
Row = tuple[int, int, int]  # event time, a number from which the values are computed, nulls (bit f: feature f)

INTS = [0, -1, 1, 2**63 - 1, -(2**63), *range(1000, 1020)]
TEXTS = ["", "\0", "x", "x" * 16, "x" * 17, "x" * 300, "é" * 9, "日本", *(f"user-{n}" for n in range(16))]


def ordinary_keys(name: str) -> list[Key]:
    if name == "by_int":
        return [(n,) for n in INTS]
    if name == "by_text":
        return [(text,) for text in TEXTS]
    first = INTS if name == "by_pair" else TEXTS
    return [(first[i % len(first)], text) for i, text in enumerate(TEXTS)]


def candidate_keys(name: str, n: int) -> list[Key]:
    if name == "by_int":
        return [(i,) for i in range(n)]
    if name == "by_text":
        return [(f"k{i}",) for i in range(n)]
    return [(i, "y") for i in range(n)] if name == "by_pair" else [(f"k{i}", "y") for i in range(n)]


def key_columns(name: str, keys: list[Key]) -> list[Any]:
    columns: list[Any] = []
    for k, dtype in enumerate(KEYS[name].values()):
        column = np.empty(len(keys), object if dtype == dtypes.String else np.int64)
        column[:] = [key[k] for key in keys]
        columns.append(column)
    return columns


def fold(a: int, b: int) -> int:
    product = a * b
    return (product ^ product >> 64) & (1 << 64) - 1


def key_hash(key: Key, seed: int) -> int:
    """Compute the key hash as docs/format.md describes it."""
    mask = (1 << 64) - 1
    second = fold(seed ^ 0x2545F4914F6CDD1D, 0xD6E8FEB86659FD93) | 1
    h = seed
    for part in key:
        if isinstance(part, int):
            h = fold(part & mask ^ h, second ^ 0x9E3779B97F4A7C15)
            continue
        text = part.encode()
        h = fold(h ^ len(text), second ^ 0xD1B54A32D192ED03)
        for at in range(0, len(text), 16):
            x, y = (int.from_bytes(text[at + word : at + word + 8][:8], "little") for word in (0, 8))
            h = fold(x ^ h, y ^ second)
    return fold(h ^ second, 0x8BB84B93962EACC9 ^ seed)


@cache
def keys_with_one_prefix(name: str, seed: int) -> list[Key]:
    """Return ALIKE keys whose hashes share at least their first PREFIX_BITS bits."""
    keys = candidate_keys(name, 16_000)
    hashes = [key_hash(key, seed) for key in keys]
    order = sorted(range(len(keys)), key=hashes.__getitem__)
    shift = 64 - PREFIX_BITS
    start = next(i for i in range(len(keys)) if hashes[order[i]] >> shift == hashes[order[i + ALIKE - 1]] >> shift)
    return [keys[i] for i in order[start : start + ALIKE]]


@cache
def pool(name: str, seed: int) -> list[Key]:
    return keys_with_one_prefix(name, seed) + ordinary_keys(name)


@pytest.mark.parametrize("name", NAMES)
def test_native_hashes_share_the_prefix(name: str) -> None:
    """The native code computes the same hashes for these keys."""
    view, keys = VIEWS[name], keys_with_one_prefix(name, SEEDS[1])
    layout = layout_of(view, SEEDS[1])
    parts, arena = encode_keys(layout, view, key_columns(name, keys))
    rows = SortedRows(layout, [(parts, b"".join(arena.parts))])
    assert [int.from_bytes(rows.hash(i)) for i in range(len(rows))] == [key_hash(key, SEEDS[1]) for key in keys]
    assert len({int.from_bytes(rows.hash(i)) >> (64 - PREFIX_BITS) for i in range(ALIKE)}) == 1
    assert layout.rows_per_page < ALIKE / 2


# -- rows ----------------------------------------------------------------------------------------------------------


def values_of(row: Row) -> list[Any]:
    """Return the feature values of a row; None for null."""
    time_us, number, nulls = row
    vector = [float(number + i) for i in range(WIDTH)]
    text = "" if number % 7 == 0 else f"{number}é" * (number % 60)
    values = [number % 2 == 1, -number, number << 20, number / 4, number / 8, time_us + number, vector, text]
    return [None if nulls >> f & 1 else value for f, value in enumerate(values)]


def batch_of(name: str, given: list[tuple[Key, Row]]) -> ColumnBatch:
    table = [values_of(row) for _, row in given]
    features: list[Any] = []
    for f, feature in enumerate(FEATURES):
        column = [values[f] for values in table]
        if feature.dtype == dtypes.String:
            texts = np.empty(len(column), object)
            texts[:] = column
            features.append((texts, None))
            continue
        shape = (len(column), WIDTH) if f == 6 else len(column)
        array = np.full(shape, 1, feature.dtype.numpy)  # values under a mask must be ignored
        for i, value in enumerate(column):
            if value is not None:
                array[i] = value
        nulls = np.array([value is None for value in column], np.bool_)
        features.append((array, nulls if nulls.any() else None))
    times = np.array([row[0] for _, row in given], np.int64)
    return ColumnBatch(key_columns(name, [key for key, _ in given]), times, features)


def rows_of(batch: ColumnBatch) -> Iterator[tuple[Key, int, list[Any]]]:
    for i in range(len(batch)):
        values: list[Any] = []
        for array, mask in batch.features:
            null = array[i] is None or (mask is not None and mask[i])
            values.append(
                None if null else array[i].tolist() if isinstance(array, np.ndarray) and array.ndim == 2 else array[i]
            )
        yield tuple(column[i] for column in batch.keys), int(batch.event_time_us[i]), values


# -- the machine ---------------------------------------------------------------------------------------------------

names = st.sampled_from(NAMES)
draws = st.integers(0, 2**32)  # a step generates its rows from this number, which is faster than drawing each row
some = st.one_of(st.integers(0, 4), st.integers(0, 70))
which = st.integers(0, 1)


def counts(outcome: int) -> int | Counts:
    """Return (the number itself, given, older, duplicate) of a RowCount; another number as it is."""
    if not isinstance(outcome, RowCount):
        return outcome
    assert outcome.given == outcome.loaded + outcome.older + outcome.duplicate
    return int(outcome), outcome.given, outcome.older, outcome.duplicate


class StoreMachine(RuleBasedStateMachine):
    """Applies each step to two stores on one path, and to self.rows: view -> key -> row of the existing views."""

    n_steps = 0  # over all examples

    @initialize(seed=st.sampled_from(SEEDS), log_commits=st.sampled_from([1, 5, LIMITS.change_log_commits]))
    def make(self, seed: int, log_commits: int) -> None:
        self.seed, self.rows = seed, {}
        self.patches = [
            mock.patch("secrets.randbits", return_value=seed),
            mock.patch.object(
                environment, "LIMITS", replace(LIMITS, change_log_commits=log_commits, drop_commit_pages=5)
            ),
            mock.patch.object(load_module, "LIMITS", replace(LIMITS, load_commit_bytes=32 << 10)),
        ]
        for patch in self.patches:
            patch.start()
        memory = Path("/dev/shm")  # these tests do not need a disk
        self.folder = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
        self.path = Path(self.folder) / "store"
        self.stores = [Store.open(self.path, create=True), Store.open(self.path)]
        self.idle_reader = Store.open(self.path)
        for name in NAMES:
            self.add(0, name)

    def teardown(self) -> None:
        if hasattr(self, "idle_reader"):
            self.close()
            shutil.rmtree(self.folder)
            for patch in self.patches:
                patch.stop()

    def close(self) -> None:
        for store in (*self.stores, self.idle_reader):
            store.close()

    def add(self, writer: int, name: str) -> None:
        with self.stores[writer].edit_catalog() as catalog:
            catalog.add(VIEWS[name])
        self.rows[name] = {}

    def drawn(self, name: str, draw: int, n: int) -> list[tuple[Key, Row]]:
        rng = random.Random(draw)
        keys = rng.choices(pool(name, self.seed)[: rng.choice([5, ALIKE, 99])], k=n)
        nulls = [0, 255, rng.randrange(256)]
        return [(key, (rng.randrange(4), rng.randrange(1000), rng.choice(nulls))) for key in keys]

    def put(self, name: str, given: list[tuple[Key, Row]]) -> Counts:
        """Put rows into the dict of a view. Return the counts of a push of these rows."""
        rows, kept = self.rows[name], dict[Key, int]()
        for i, (key, row) in enumerate(given):
            if key not in rows or row[0] >= rows[key][0]:
                rows[key], kept[key] = row, i
        lost = [(key, row) for i, (key, row) in enumerate(given) if kept.get(key) != i]
        older = sum(row[0] < rows[key][0] for key, row in lost)
        return len(given) - older, len(given), older, len(lost) - older

    def remove(self, name: str, keys: list[Key]) -> int:
        return sum(self.rows[name].pop(key, None) is not None for key in dict.fromkeys(keys))

    @rule(writer=which, name=names, draw=draws, n=some, cut=st.integers(1, 30))
    def load(self, writer: int, name: str, draw: int, n: int, cut: int) -> None:
        given = self.drawn(name, draw, n)
        batch = batch_of(name, given)
        parts = [batch.slice(start, start + cut) for start in range(0, n, cut)]
        if name not in self.rows:
            with pytest.raises(NotFound):
                self.stores[writer].load(name, parts)
            return
        if self.rows[name] and not given:
            with pytest.raises(InvalidArgument, match="the load has 0 rows"):
                self.stores[writer].load(name, parts)
        self.rows[name] = {}
        _, *lost = self.put(name, given)
        count = self.stores[writer].load(name, parts, allow_shrink=True)
        assert counts(count) == (len(self.rows[name]), *lost)

    @rule(writer=which, name=names, draw=draws, n=some)
    def push(self, writer: int, name: str, draw: int, n: int) -> None:
        given = self.drawn(name, draw, n)
        if name not in self.rows:
            with pytest.raises(NotFound):
                self.stores[writer].upsert(name, batch_of(name, given))
            return
        pushed = self.put(name, given)
        assert counts(self.stores[writer].upsert(name, batch_of(name, given))) == pushed

    @rule(writer=which, name=names, draw=draws, n=some)
    def delete(self, writer: int, name: str, draw: int, n: int) -> None:
        keys = [key for key, _ in self.drawn(name, draw, n)]
        if name not in self.rows:
            with pytest.raises(NotFound):
                self.stores[writer].delete(name, key_columns(name, keys))
            return
        removed = self.remove(name, keys)
        assert self.stores[writer].delete(name, key_columns(name, keys)) == removed

    @rule(
        writer=which,
        edits=st.lists(st.tuples(st.sampled_from(["put", "remove", "wrong"]), names, draws, some), max_size=6),
    )
    def commit(self, writer: int, edits: list[tuple[str, str, int, int]]) -> None:
        given: list[Any] = []
        wanted: list[Any] = []
        for kind, name, draw, n in edits:
            rows = self.drawn(name, draw, n)
            keys = key_columns(name, [key for key, _ in rows])
            if kind == "wrong":
                given.append(Delete(name, [*keys, *keys, *keys]))
            else:
                given.append(Upsert(name, batch_of(name, rows)) if kind == "put" else Delete(name, keys))
            if name not in self.rows:
                wanted.append(NotFound)
            elif kind == "wrong":
                wanted.append(InvalidArgument)
            elif kind == "put":
                wanted.append(self.put(name, rows))
            else:
                wanted.append(self.remove(name, [key for key, _ in rows]))
        outcomes = self.stores[writer].commit(given)
        assert [type(o) if isinstance(o, Exception) else counts(o) for o in outcomes] == wanted

    @rule(reader=which, name=names, draw=draws, n=some, now_us=st.sampled_from([0, TTL_US, TTL_US + 2]))
    def look_up(self, reader: int, name: str, draw: int, n: int, now_us: int) -> None:
        self.check_lookup(self.stores[reader], name, [key for key, _ in self.drawn(name, draw, n + 1)], now_us)

    @rule(draw=draws, n=some)
    def look_up_in_the_idle_reader(self, draw: int, n: int) -> None:
        """This reader does nothing else, so it may be behind by more commits than the change log holds."""
        for name in NAMES:
            self.check_lookup(self.idle_reader, name, [key for key, _ in self.drawn(name, draw, n + 1)], 0)

    def check_lookup(self, store: Store, name: str, keys: list[Key], now_us: int) -> None:
        columns = Columns(list(KEYS[name]), list(KEYS[name].values()))
        columns.append({key: [row[k] for row in keys] for k, key in enumerate(KEYS[name])})
        numbers, texts = np.empty((len(keys), 6 + WIDTH)), np.empty(len(keys), object)
        status, statuses = np.empty((1, len(keys)), np.uint8), np.empty((len(OPS) + 1, len(keys)), np.uint8)
        with store.reading():
            if name not in self.rows:
                with pytest.raises(NotFound):
                    store.layout(name)
                return
            plan = Lookup(store.layout(name), range(len(KEYS[name])), [*OPS, (7, 1, 0, "none")], TTL_US)
            lookup([store.directory(name)], [plan], columns, [numbers, texts], status, now_us, statuses)
        for i, key in enumerate(keys):
            row = self.rows[name].get(key)
            there = Status.NOT_FOUND if row is None else Status.STALE if row[0] < now_us - TTL_US else Status.PRESENT
            assert status[0, i] == there, key
            values = values_of(row) if row is not None and there == Status.PRESENT else [None] * len(FEATURES)
            shown = [f.default if v is None else v for f, v in zip(FEATURES, values, strict=True)]
            got = [*numbers[i, :6].tolist(), numbers[i, 6:].tolist(), texts[i]]
            for f, (found, right) in enumerate(zip(got, shown, strict=True)):
                nothing = np.isnan(found).all() if right is None else found == right
                assert nothing, (name, key, FEATURES[f].name, found, right)
                state = Status.NULL if there == Status.PRESENT and values[f] is None else there
                assert statuses[f, i] == state, (name, key, FEATURES[f].name)

    @rule(reader=which, name=names)
    def scan(self, reader: int, name: str) -> None:
        if name not in self.rows:
            with pytest.raises(NotFound):
                next(self.stores[reader].scan(name))
            return
        found = {}
        for batch in self.stores[reader].scan(name):
            for key, time_us, values in rows_of(batch):
                assert key not in found
                found[key] = (time_us, values)
        assert found == {key: (row[0], values_of(row)) for key, row in self.rows[name].items()}

    @rule(first=which)
    def reopen(self, first: int) -> None:
        if first:  # reopen one store while the other keeps LMDB open
            self.stores[0].close()
            self.stores[0] = Store.open(self.path)
            return
        self.close()
        self.stores = [Store.open(self.path), Store.open(self.path)]
        self.idle_reader = Store.open(self.path)

    @rule(store=which)
    def release_if_stale(self, store: int) -> None:
        self.stores[store].release_if_stale()

    @rule(writer=which, name=names, keep=st.booleans())
    def add_or_drop(self, writer: int, name: str, keep: bool) -> None:
        if name not in self.rows:
            self.add(writer, name)
            return
        if keep:  # so that most steps find their view
            return
        with self.stores[writer].edit_catalog() as catalog:
            catalog.drop_view(name)
        del self.rows[name]

    @invariant()
    def counts_agree(self) -> None:
        StoreMachine.n_steps += 1
        if hasattr(self, "stores"):
            for name, rows in self.rows.items():
                assert self.stores[1].count(name) == len(rows)


def test_a_store_equals_a_dict() -> None:
    StoreMachine.n_steps = 0
    while StoreMachine.n_steps < STEPS:
        n_examples = (STEPS - StoreMachine.n_steps) // (STEPS_PER_EXAMPLE - 10) + 1
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            StoreMachine,
            settings=settings(
                max_examples=n_examples,
                stateful_step_count=STEPS_PER_EXAMPLE,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(f"{StoreMachine.n_steps} steps")
