"""Partial and whole rows compared with dicts: Hypothesis draws commits of pushes and deletes to several tables.

A failure prints the shortest failing sequence of steps that Hypothesis found, and a line that repeats it. Rows follow
from a number that is an argument of the step.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from test_edits import SEED, keys_of_one_hash

from shorttail.define import clock, dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.results import RowCount
from shorttail.store import ColumnBatch, Delete, Store, Upsert, edits
from shorttail.store.table import UNTIMED

STEPS = int(os.environ.get("SHORTTAIL_MACHINE_STEPS", "3000")) // 4  # a step has up to eight edits
STEPS_PER_EXAMPLE = 40
NOW_US = 3
WIDTH = 40  # of the vector: a page of 4 KiB then holds about 16 rows, so that buckets split
LONGEST = 3000  # of a text: two rows of such texts need a page of their own, or a longer one

FEATURES = [
    Feature("i", dtypes.Int64),
    Feature("f", dtypes.Float32),
    Feature("s", dtypes.String),
    Feature("v", dtypes.Vector(WIDTH)),
    Feature("flag", dtypes.Bool),
    Feature("t", dtypes.String),
    Feature("c", dtypes.Int32),
    Feature("d", dtypes.Float64),
    Feature("u", dtypes.String),  # the ninth: null bits of a second byte
]
TEXTS = ["", "x", "é" * 5, "y" * 40, "z" * LONGEST]
KEYS: dict[str, list[tuple[Any, ...]]] = {
    "number": [(n,) for n in range(60)],
    "text": [(text,) for text in ("", "k" * 300, *(f"user-{n}" for n in range(58)))],
    "alike": [*keys_of_one_hash(12), *((n, n) for n in range(48))],
}
TYPES = {
    "number": {"a": dtypes.Int64},
    "text": {"k": dtypes.String},
    "alike": {"a": dtypes.Int64, "b": dtypes.Int64},
}
VIEWS = {name: FeatureView(name, Entity(name, keys=keys), FEATURES) for name, keys in TYPES.items()}
NAMES = sorted(VIEWS)

Row = tuple[int, list[Any]]  # event time, a value of each feature; None for null


def value_of(feature: Feature, rng: random.Random) -> Any:
    if rng.random() < 0.25:
        return None
    number = rng.randrange(1000)
    if feature.dtype == dtypes.String:
        return f"{number}{rng.choice(TEXTS)}" if rng.random() < 0.9 else ""
    if feature.dtype == dtypes.Bool:
        return number % 2 == 1
    if feature.dtype.is_vector:
        return [float(number + i) for i in range(WIDTH)]
    return number / 4 if feature.dtype.is_float else number


def column_of(feature: Feature, values: list[Any]) -> tuple[Any, Any]:
    """Return (values, mask) of a column, in one of the ways in which a batch may hold nulls."""
    if feature.dtype == dtypes.String:
        texts = np.empty(len(values), object)
        texts[:] = values
        return texts, None
    shape = (len(values), WIDTH) if feature.dtype.is_vector else len(values)
    array = np.full(shape, 1, feature.dtype.numpy)
    for i, value in enumerate(values):
        if value is not None:
            array[i] = value
    mask = np.array([value is None for value in values], np.bool_)
    return array, mask if mask.any() else None


def key_columns(name: str, keys: list[tuple[Any, ...]]) -> list[Any]:
    columns = []
    for k, dtype in enumerate(TYPES[name].values()):
        column = np.empty(len(keys), object if dtype == dtypes.String else np.int64)
        column[:] = [key[k] for key in keys]
        columns.append(column)
    return columns


def rows_of(batch: ColumnBatch) -> Iterator[tuple[tuple[Any, ...], Row]]:
    for i in range(len(batch)):
        values = []
        for array, mask in batch.features:
            null = array[i] is None or (mask is not None and mask[i])
            values.append(None if null else array[i].tolist() if isinstance(array[i], np.generic | np.ndarray)
                          else array[i])  # fmt: skip
        yield tuple(column[i] for column in batch.keys), (int(batch.event_time_us[i]), values)


def counts(outcome: Any) -> Any:
    """Return (the number itself, older, duplicate) of a RowCount; another outcome as it is."""
    return (int(outcome), outcome.older, outcome.duplicate) if isinstance(outcome, RowCount) else outcome


names = st.sampled_from(NAMES)
draws = st.integers(0, 2**32)
some = st.one_of(st.integers(0, 4), st.integers(0, 70))


class PartialMachine(RuleBasedStateMachine):
    """Applies each step to a store and to self.rows: view -> key -> row."""

    n_steps = n_kept = n_buckets_max = n_longer_pages = 0  # over all examples

    @initialize(pages=st.sampled_from([1, 2, edits.PAGES_AT_ONCE]))
    def make(self, pages: int) -> None:
        """pages: the page images that are made at once; with few, buckets are merged again for want of room."""
        self.patches = [
            mock.patch("secrets.randbits", return_value=SEED),
            mock.patch.object(clock, "now_us", return_value=NOW_US),
            mock.patch.object(edits, "PAGES_AT_ONCE", pages),
        ]
        for patch in self.patches:
            patch.start()
        memory = Path("/dev/shm")  # these tests do not need a disk
        self.folder = tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None)
        self.store = Store.open(Path(self.folder) / "store", create=True)
        self.rows: dict[str, dict[Any, Row]] = {name: {} for name in NAMES}
        with self.store.edit_catalog() as catalog:
            for view in VIEWS.values():
                catalog.add(view)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)
            for patch in self.patches:
                patch.stop()

    def drawn(self, name: str, draw: int, n: int, partial: bool) -> tuple[ColumnBatch, Any]:
        """Return a batch of n rows, and what its push answers; put the rows into the dict of the view."""
        rng = random.Random(draw)
        keys = rng.choices(KEYS[name][: rng.choice([3, 14, 60])], k=n)
        times = [UNTIMED if kind else rng.randrange(6) for kind in rng.choices([True, False], [1, 3], k=n)]
        if rng.random() < 0.5:  # as pushes are: all rows have times, or none has
            times = [UNTIMED if times and times[0] == UNTIMED else max(time, 0) for time in times]
        numbers = rng.sample(range(len(FEATURES)), rng.randint(1, len(FEATURES) - 1)) if partial else None
        given = range(len(FEATURES)) if numbers is None else numbers
        table = [[value_of(FEATURES[f], rng) for f in given] for _ in keys]
        batch = ColumnBatch(
            key_columns(name, keys),
            np.array(times, np.int64),
            [column_of(FEATURES[f], [values[i] for values in table]) for i, f in enumerate(given)],
            None if numbers is None else tuple(FEATURES[f].name for f in numbers),
        )
        rows = self.rows[name]
        before = {key: row[0] for key, row in rows.items()}
        made, last = [], dict[Any, int]()
        for i, (key, time, values) in enumerate(zip(keys, times, table, strict=True)):
            made.append(max(NOW_US, before.get(key, -1) + 1) if time == UNTIMED else time)
            if key in rows and made[i] < rows[key][0]:
                continue
            new = list(rows[key][1]) if key in rows else [None] * len(FEATURES)
            PartialMachine.n_kept += sum(value is not None for f, value in enumerate(new) if f not in given)
            for f, value in zip(given, values, strict=True):
                new[f] = value
            rows[key], last[key] = (made[i], new), i
        lost = [i for i, key in enumerate(keys) if last.get(key) != i]
        older = sum(made[i] < rows[keys[i]][0] for i in lost)
        return batch, (n - older, older, len(lost) - older)

    @rule(steps=st.lists(st.tuples(st.sampled_from(["partial", "partial", "whole", "delete"]), names, draws, some),
                         min_size=1, max_size=8))  # fmt: skip
    def commit(self, steps: list[tuple[str, str, int, int]]) -> None:
        given: list[Any] = []
        wanted: list[Any] = []
        for kind, name, draw, n in steps:
            if kind == "delete":
                keys = random.Random(draw).choices(KEYS[name], k=n // 8)
                given.append(Delete(name, key_columns(name, keys)))
                wanted.append(sum(self.rows[name].pop(key, None) is not None for key in dict.fromkeys(keys)))
                continue
            batch, answer = self.drawn(name, draw, n, kind == "partial")
            given.append(Upsert(name, batch))
            wanted.append(answer)
        assert [counts(outcome) for outcome in self.store.commit(given)] == wanted

    @rule(name=names, draw=draws)
    def load(self, name: str, draw: int) -> None:
        self.rows[name] = {}
        batch, _ = self.drawn(name, draw, 50, False)
        self.store.load(name, [batch], allow_shrink=True)

    @invariant()
    def rows_agree(self) -> None:
        PartialMachine.n_steps += 1
        if not hasattr(self, "store"):
            return
        self.store.refresh(force=True)
        for name, rows in self.rows.items():
            found = {}
            for batch in self.store.scan(name):
                for key, row in rows_of(batch):
                    assert key not in found
                    found[key] = row
            assert found == rows, name
        with self.store.reading():
            for name in NAMES:
                if (directory := self.store.directory(name)) is None:
                    continue
                buckets, _, image_bytes, _ = directory.measure()
                PartialMachine.n_buckets_max = max(PartialMachine.n_buckets_max, buckets)
                PartialMachine.n_longer_pages += image_bytes > buckets * self.store.layout(name).page_bytes


def test_partial_rows_equal_a_dict() -> None:
    PartialMachine.n_steps = PartialMachine.n_kept = 0
    PartialMachine.n_buckets_max = PartialMachine.n_longer_pages = 0
    while PartialMachine.n_steps < STEPS:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            PartialMachine,
            settings=settings(
                max_examples=(STEPS - PartialMachine.n_steps) // (STEPS_PER_EXAMPLE - 10) + 1,
                stateful_step_count=STEPS_PER_EXAMPLE,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(f"{PartialMachine.n_steps} steps, {PartialMachine.n_kept} values kept")
    assert PartialMachine.n_kept > STEPS
    assert PartialMachine.n_buckets_max > 4
    assert PartialMachine.n_longer_pages
