"""Store.commit: several edits in one durable commit, each with its own outcome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_key_hash import fold, key_hash

from shorttail.define import clock, dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import Internal, InvalidArgument, NotFound
from shorttail.results import RowCount
from shorttail.store import ColumnBatch, Delete, Store, Upsert
from shorttail.store.environment import page_key
from shorttail.store.table import UNTIMED

USER = Entity("user", keys={"user_id": dtypes.Int64})
VIEWS = {name: FeatureView(name, entity=USER, features=[Feature("x", dtypes.Float64)]) for name in ("a", "b")}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", create=True) as store:
        with store.edit_catalog() as catalog:
            for view in VIEWS.values():
                catalog.add(view)
        store.refresh()
        yield store


def rows(keys: range | list[int], value: float, time_us: int = 0) -> ColumnBatch:
    ids = np.array(keys, np.int64)
    return ColumnBatch([ids], np.full(len(ids), time_us, np.int64), [(np.full(len(ids), value), None)])


def keys(*values: int) -> list[np.ndarray]:
    return [np.array(values, np.int64)]


def content(store: Store, view: str) -> dict[int, float]:
    return {
        key: value
        for batch in store.scan(view)
        for key, value in zip(batch.keys[0].tolist(), batch.features[0][0].tolist(), strict=True)
    }


def commits(store: Store) -> int:
    with store.environment.read() as txn:
        return store.environment.sequence(txn)


def test_edits_are_applied_in_order_in_one_commit(store: Store) -> None:
    store.load("a", [rows(range(3000), 0)])
    before = commits(store)
    outcomes = store.commit(
        [
            Upsert("a", rows(range(10), 1)),
            Upsert("b", rows([1], 5)),
            Upsert("a", rows([3, 3, 5000], 2)),
            Delete("a", keys(3, 4, 9999)),
            Delete("a", keys(3, 7)),
            Upsert("a", rows([4], 3)),
            Delete("b", keys(1)),
            Upsert("b", rows([2], 6)),
        ]
    )
    assert outcomes == [10, 1, 3, 2, 1, 1, 1, 1]
    assert commits(store) == before + 1
    expected = dict.fromkeys(range(3000), 0.0) | dict.fromkeys(range(10), 1.0) | {5000: 2.0, 4: 3.0}
    del expected[3], expected[7]
    assert content(store, "a") == expected
    assert content(store, "b") == {2: 6.0}


def test_upserts_of_one_key_in_one_commit_keep_the_latest_event_time_or_the_last(store: Store) -> None:
    store.commit([Upsert("a", rows([1, 2], 1, 5)), Upsert("a", rows([1, 2], 2, 4)), Upsert("a", rows([2], 3, 5))])
    assert content(store, "a") == {1: 1.0, 2: 3.0}


def test_a_wrong_edit_does_not_affect_the_others(store: Store) -> None:
    wrong = ColumnBatch([np.array(["x"])], np.zeros(1, np.int64), [(np.zeros(1), None)])
    outcomes = store.commit(
        [
            Upsert("c", rows([1], 1)),
            Upsert("a", rows([1], 1)),
            Upsert("a", wrong),
            Delete("b", [*keys(1), *keys(2)]),
            Upsert("b", rows([2], 2)),
        ]
    )
    assert [type(outcome) for outcome in outcomes] == [NotFound, RowCount, InvalidArgument, InvalidArgument, RowCount]
    assert (content(store, "a"), content(store, "b")) == ({1: 1.0}, {2: 2.0})
    before = commits(store)
    assert store.commit([]) == []
    (error,) = store.commit([Upsert("c", rows([1], 1))])
    assert isinstance(error, NotFound)
    assert commits(store) == before


MIXED = FeatureView(
    "mixed",
    entity=Entity("thing", keys={"name": dtypes.String, "n": dtypes.Int64}),
    features=[
        Feature("count", dtypes.Int32),
        Feature("text", dtypes.String),
        Feature("share", dtypes.Float32),
        Feature("place", dtypes.Vector(3)),
        Feature("flag", dtypes.Bool),
    ],
)


def one_row(random: np.random.Generator) -> ColumnBatch:
    """Return a batch whose features may be null, in every way in which a value can be null."""
    name = np.array([random.choice(["", "a", "Z\u00fcrich", "long" * 20])], object)
    text: list[object] = [random.choice(np.array(["", "x", "\u4eba" * 9, None], object))]
    masks = [np.array([True]) if random.random() < 0.3 else None for _ in MIXED.features]
    values = [
        random.integers(-9, 9, 1).astype(np.int32),
        np.array(text, object),
        random.choice([1.5, np.nan], 1).astype(np.float32),
        random.normal(size=(1, 3)).astype(np.float32),
        random.integers(0, 2, 1).astype(np.bool_),
    ]
    time_us = random.integers(0, 3, 1)
    return ColumnBatch([name, random.integers(0, 50, 1)], time_us, list(zip(values, masks, strict=True)))


def everything(store: Store, view: str) -> dict[tuple[object, ...], list[object]]:
    found = {}
    for batch in store.scan(view):
        columns = [np.where(np.zeros(len(batch), bool) if mask is None else mask, None, column.astype(object))
                   if column.ndim == 1 else [None if mask is not None and mask[i] else tuple(row) for i, row in
                                             enumerate(column.tolist())]
                   for column, mask in batch.features]  # fmt: skip
        for i, key in enumerate(zip(*(column.tolist() for column in batch.keys), strict=True)):
            found[key] = [repr(column[i]) for column in columns] + [int(batch.event_time_us[i])]
    return found


def test_small_upserts_encoded_together_equal_separate_ones(tmp_path: Path) -> None:
    seed = int(np.random.SeedSequence().entropy or 0) % 2**32
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    batches = [one_row(random) for _ in range(300)]
    wrong = ColumnBatch([np.array(["a"], object)], np.zeros(1, np.int64), [])
    surrogate = one_row(random)
    surrogate.features[1] = (np.array(["\ud800"], object), None)  # type: ignore[index]
    large = ColumnBatch(
        [np.array(["a"] * 500, object), np.arange(500)],
        np.ones(500, np.int64),
        [(np.zeros((500, *shape), kind), None) for kind, shape in
         ((np.int32, ()), (object, ()), (np.float32, ()), (np.float32, (3,)), (np.bool_, ()))],
    )  # fmt: skip
    large.features[1][0][:] = "t"
    several = [Upsert("mixed", batch) for batch in [*batches[:100], large, *batches[100:]]]
    for name, extra in (("good", []), ("wrong", [Upsert("mixed", wrong), Upsert("mixed", surrogate)])):
        found = []
        for way in ("together", "alone"):
            with Store.open(tmp_path / name / way, create=True) as store:
                with store.edit_catalog() as catalog:
                    catalog.add(MIXED)
                store.refresh()
                edits = [*several[:50], *extra, *several[50:]]
                if way == "together":
                    outcomes = store.commit(edits)
                else:
                    outcomes = [outcome for edit in edits for outcome in store.commit([edit])]
                assert [i for i, one in enumerate(outcomes) if isinstance(one, InvalidArgument)] == [50, 51][
                    : len(extra)
                ]
                found.append(([str(one) for one in outcomes], everything(store, "mixed")))
        assert len(found[0][1]) > 500
        assert found[0] == found[1]


def test_only_edits_of_a_damaged_page_fail(store: Store) -> None:
    store.load("a", [rows(range(3000), 0)])
    store.refresh()
    table = store.catalog.tables["a"]
    with store.environment.write() as writer:
        page = bytearray(writer.get_page(table.id, bytes(8)) or b"")
        page[100] ^= 1
        writer.txn.put(page_key(table.id, bytes(8)), page)
    outcomes = [store.commit([Upsert("a", rows([i], 1))])[0] for i in range(3000, 3200)]
    bad = [i for i, outcome in enumerate(outcomes, 3000) if isinstance(outcome, Internal)]
    assert 0 < len(bad) < 50
    assert "view 'a' is damaged" in str(outcomes[bad[0] - 3000])
    # The same edits in one commit, with edits of other pages and of another view.
    outcomes = store.commit([*(Upsert("a", rows([i], 2)) for i in range(3000, 3200)), Upsert("b", rows([1], 1))])
    assert [i for i, outcome in enumerate(outcomes, 3000) if isinstance(outcome, Internal)] == bad
    assert content(store, "b") == {1: 1.0}


SEED = 0x1234_5678_9ABC_DEF0
PAIR = FeatureView(
    "pair",
    entity=Entity("pair", keys={"a": dtypes.Int64, "b": dtypes.Int64}),
    features=[Feature("x", dtypes.Float64)],
)


def keys_of_one_hash(count: int) -> list[tuple[int, int]]:
    """Return pairs whose hashes are equal: b undoes what a has done. Only who knows the seed can find such keys."""
    second = fold(SEED ^ 0x2545F4914F6CDD1D, 0xD6E8FEB86659FD93) | 1
    after_a = [fold(a ^ SEED, second ^ 0x9E3779B97F4A7C15) for a in range(count)]
    found = [(a, int(np.uint64(h ^ 12345).astype(np.int64))) for a, h in enumerate(after_a)]
    assert len({key_hash(SEED, [a, b]) for a, b in found}) == 1
    return found


def test_keys_of_one_hash_are_told_apart_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushes of several commits, several pushes in a commit, and a load, compared with a dict. Some have no times."""
    monkeypatch.setattr("secrets.randbits", lambda bits: SEED)
    monkeypatch.setattr(clock, "now_us", lambda: 2)
    seed = int(np.random.SeedSequence().entropy or 0) % 2**32
    print(f"seed {seed}")
    random, pool, stored = np.random.default_rng(seed), keys_of_one_hash(7), dict[tuple[int, int], tuple[int, float]]()

    def draw(n: int) -> tuple[ColumnBatch, tuple[int, int, int]]:
        """Return n rows and the (given, older, duplicate) of a push of them, and put them into `stored`."""
        chosen, times = random.integers(0, len(pool), n), random.integers(0, 4, n)
        given_us = times
        if random.random() < 0.3:
            times = np.array([max(2, stored[pool[k]][0] + 1) if pool[k] in stored else 2 for k in chosen])
            given_us = np.full(n, UNTIMED)
        columns = [np.array([pool[k][c] for k in chosen], np.int64) for c in (0, 1)]
        values, kept = random.normal(size=n), dict[tuple[int, int], int]()
        for i in range(n):
            key = pool[chosen[i]]
            if key not in stored or times[i] >= stored[key][0]:
                stored[key], kept[key] = (int(times[i]), float(values[i])), i
        lost = [i for i in range(n) if kept.get(pool[chosen[i]]) != i]
        older = sum(int(times[i]) < stored[pool[chosen[i]]][0] for i in lost)
        return ColumnBatch(columns, given_us, [(values, None)]), (n, older, len(lost) - older)

    def found() -> dict[tuple[int, int], tuple[int, float]]:
        return {
            (a, b): (time_us, value)
            for batch in store.scan("pair")
            for a, b, time_us, value in zip(
                batch.keys[0].tolist(), batch.keys[1].tolist(), batch.event_time_us.tolist(),
                batch.features[0][0].tolist(), strict=True,
            )
        }  # fmt: skip

    with Store.open(tmp_path / "store", create=True) as store:
        with store.edit_catalog() as catalog:
            catalog.add(PAIR)
        for _ in range(20):
            drawn = [draw(int(random.integers(1, 30))) for _ in range(random.integers(1, 5))]
            outcomes = store.commit([Upsert("pair", batch) for batch, _ in drawn])
            told = [(o.given, o.older, o.duplicate) for o in outcomes if isinstance(o, RowCount)]
            assert told == [wanted for _, wanted in drawn]
            assert found() == stored
        stored.clear()
        batch, wanted = draw(500)
        count = store.load("pair", [batch])
        assert (count, (count.given, count.older, count.duplicate)) == (len(stored), wanted)
        assert found() == stored
