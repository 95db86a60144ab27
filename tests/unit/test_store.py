"""Stores on disk: load, upsert, delete, and the view that other processes have."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shorttail._native.columns import Columns
from shorttail._native.pages import Lookup, lookup
from shorttail.config import Limits
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import Internal, InvalidArgument, NotFound
from shorttail.store import ColumnBatch, Store, environment, rebuild
from shorttail.store import load as load_module

USER = Entity("user", keys={"user_id": dtypes.Int64})
VIEW = FeatureView("stats", entity=USER, features=[Feature("score", dtypes.Float64), Feature("tier", dtypes.String)])


def rows(ids: Any, time_us: int = 0, version: int = 0) -> ColumnBatch:
    ids = np.asarray(ids, np.int64)
    tiers = np.empty(len(ids), object)
    tiers[:] = [f"tier {i % 5} v{version}" for i in ids.tolist()]
    score = (ids + version / 10, ids % 7 == 6)
    return ColumnBatch([ids], np.full(len(ids), time_us, np.int64), [score, (tiers, None)])


def make_store(path: Path) -> Store:
    store = Store.open(path, create=True)
    with store.edit_catalog() as catalog:
        catalog.add(VIEW)
    store.refresh()
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with make_store(path) as store:
        yield store


def scores(store: Store, ids: Any) -> list[float | None]:
    """Look up scores in the newest snapshot; None for a row that does not exist."""
    columns = Columns(["user_id"], [dtypes.Int64])
    columns.append({"user_id": list(ids)})
    out, status = np.empty(len(ids)), np.empty((1, len(ids)), np.uint8)
    with store.reading():
        plan = Lookup(store.layout("stats"), [0], [(0, 0, 0, -1.0)], 0)
        lookup([store.directory("stats")], [plan], columns, [out], status, 0)
    return [None if s == 2 else float(v) for v, s in zip(out, status[0], strict=True)]


def scanned(store: Store) -> dict[int, tuple[int, float | None, str]]:
    found: dict[int, tuple[int, float | None, str]] = {}
    for batch in store.scan("stats"):
        (values, mask), (tiers, _) = batch.features
        for i, (key, time_us) in enumerate(zip(batch.keys[0].tolist(), batch.event_time_us.tolist(), strict=True)):
            assert key not in found
            found[key] = (time_us, None if mask is not None and mask[i] else float(values[i]), tiers[i])
    return found


def test_load_upsert_delete_reopen(path: Path) -> None:
    with make_store(path) as store:
        assert store.directory("stats") is None
        assert (store.count("stats"), scanned(store), scores(store, [1])) == (0, {}, [None])
        seen: list[int] = []
        assert store.load("stats", [rows(range(1000)), rows(range(900, 3000))], seen.append) == 3000
        assert sum(seen) == 3100
        assert store.count("stats") == 3000
        assert scores(store, [5, 6, 2999, 3000]) == [5.0, -1.0, 2999.0, None]
        assert store.upsert("stats", rows(range(2990, 5000), 1, version=1)) == 2010
        assert scores(store, [2989, 2990, 4999]) == [2989.0, 2990.1, 4999.1]
        assert store.delete("stats", [np.arange(100, 9000, 2)]) == 2450
        assert store.delete("stats", [np.arange(100, 9000, 2)]) == 0
        assert store.count("stats") == 2550
        before = scanned(store)
    with Store.open(path) as store:
        assert scanned(store) == before
        assert store.count("stats") == 2550
        assert store.load("stats", [rows([7])], allow_shrink=True) == 1
        assert (store.count("stats"), list(scanned(store))) == (1, [7])
        assert store.load("stats", [], allow_shrink=True) == 0
        assert (store.count("stats"), scores(store, [7])) == (0, [None])


def test_latest_event_time_wins(store: Store) -> None:
    store.load("stats", [rows([1], 5, 1), rows([1], 7, 2), rows([1], 6, 3), rows([2], 1, 1), rows([2], 1, 2)])
    assert scores(store, [1, 2]) == [1.2, 2.2]
    store.upsert("stats", rows([1], 6, 4))
    store.upsert("stats", rows([2], 1, 5))
    assert scores(store, [1, 2]) == [1.2, 2.5]
    store.upsert("stats", rows([1, 1, 1], 7, 6))
    assert scores(store, [1]) == [1.6]


def test_snapshot_does_not_change_until_refresh(store: Store) -> None:
    store.load("stats", [rows(range(500))])
    with Store.open(store.path) as reader:
        assert reader.count("stats") == 500
        version = reader.catalog_version
        assert reader.refresh() is False
        store.upsert("stats", rows(range(500, 900)))
        directory = reader.directory("stats")
        assert directory is not None
        assert directory.count_rows() == 500
        assert reader.refresh() is True
        assert directory is reader.directory("stats"), "the directory must be updated, not rebuilt"
        assert directory.count_rows() == 900
        assert reader.catalog_version == version
        store.load("stats", [rows(range(10))])
        assert reader.refresh() is True
        assert reader.catalog_version > version
        assert reader.count("stats") == 10


def test_reader_far_behind_rebuilds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.load("stats", [rows(range(2000))])
    monkeypatch.setattr(environment, "LIMITS", Limits(change_log_commits=3))
    with Store.open(store.path) as reader:
        assert scores(reader, [1999, 2000]) == [1999.0, None]
        for i in range(10):
            store.upsert("stats", rows([2000 + i]))
        assert scores(reader, [2000, 2009, 2010]) == [2000.0, 2009.0, None]
        assert len(logged(reader)) == 3
        monkeypatch.setattr(environment, "LIMITS", Limits(change_log_bytes=0))
        store.upsert("stats", rows([2010]))
        assert scores(reader, [2010]) == [2010.0]
        assert logged(reader) == []


def logged(store: Store) -> list[bytes]:
    with store.environment.read() as txn:
        return [bytes(key) for key in txn.cursor().iternext(values=False) if bytes(key[:1]) == b"l"]


def read_in_other_process(path: str, to_child: Any, to_parent: Any) -> None:
    with Store.open(path) as store:
        assert scores(store, [1, 2]) == [1.0, None]
        to_parent.send(store.refresh())
        to_child.recv()
        to_parent.send((store.refresh(), scores(store, [1, 2])))
        to_child.recv()
        to_parent.send((store.refresh(), scores(store, [1, 2]), store.count("stats")))


def test_other_process_sees_push_and_load(store: Store) -> None:
    store.load("stats", [rows([1])])
    context = multiprocessing.get_context("spawn")
    child_in, to_child = context.Pipe(duplex=False)
    from_child, child_out = context.Pipe(duplex=False)
    process = context.Process(target=read_in_other_process, args=(store.path, child_in, child_out))
    process.start()
    try:
        assert from_child.poll(30)
        assert from_child.recv() is False
        store.upsert("stats", rows([2], 1))
        to_child.send(None)
        assert from_child.poll(30)
        assert from_child.recv() == (True, [1.0, 2.0])
        store.load("stats", [rows([2, 3], 2, version=3)])
        to_child.send(None)
        assert from_child.poll(30)
        assert from_child.recv() == (True, [None, 2.3], 2)
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def test_loads_and_changed_schemas_leave_no_tables(store: Store) -> None:
    for i in range(8):
        store.load("stats", [rows(range(i, i + 3))])
        assert sorted(scanned(store)) == [i, i + 1, i + 2]
    assert len(table_entries(store)) == 2, "the one before is kept, to go back to"
    with store.edit_catalog() as catalog:
        catalog.add(VIEW)
    assert table_entries(store) == {}
    assert scores(store, [7]) == [None]


def test_a_table_shrinks_as_its_rows_are_deleted(store: Store) -> None:
    store.load("stats", [rows(range(20_000))])
    (full,) = table_entries(store).values()
    with Store.open(store.path) as reader:
        assert scores(reader, [19_999]) == [19_999.0]
        order = np.random.default_rng(1).permutation(20_000)
        for part in np.split(order, 40)[:-1]:
            assert store.delete("stats", [part]) == len(part)
            assert scores(reader, part[:50]) == [None] * 50
        left = order[-500:]
        assert sum(table_entries(store).values()) < full / 15
        expected = [None if i % 7 == 6 else float(i) for i in left.tolist()]
        assert [None if value == -1.0 else value for value in scores(reader, left)] == expected
        assert reader.count("stats") == 500
        assert store.delete("stats", [left]) == 500
        assert list(table_entries(store).values()) == [1]
        assert (scores(reader, left[:3]), reader.count("stats")) == ([None] * 3, 0)
        store.upsert("stats", rows(range(3000), 1, version=1))
        assert scores(reader, [1, 2999]) == [1.1, 2999.1]


def test_failed_load_changes_nothing_and_leaves_nothing(store: Store, monkeypatch: Any) -> None:
    store.load("stats", [rows([1])])

    def broken() -> Iterator[ColumnBatch]:
        yield rows([2])
        raise OSError("the source went away")

    def failing(*args: Any, **options: Any) -> None:
        raise InvalidArgument("the view was changed")

    with pytest.raises(OSError, match="went away"):
        store.load("stats", broken())
    with pytest.raises(InvalidArgument, match="tier"):
        store.load("stats", [ColumnBatch([np.arange(2)], np.zeros(2, np.int64), [(np.zeros(2), None)] * 2)])
    assert scores(store, [1, 2]) == [1.0, None]

    monkeypatch.setattr(load_module, "LIMITS", Limits(load_commit_bytes=100_000))
    with monkeypatch.context() as patched:
        patched.setattr(rebuild.Rebuild, "put_in_place", failing)  # the load fails in its last commit
        with pytest.raises(InvalidArgument, match="was changed"):
            store.load("stats", [rows(range(5000))])
    assert scores(store, [1, 2]) == [1.0, None]
    assert list(table_entries(store).values()) == [1]
    store.load("stats", [rows([3])])
    assert list(table_entries(store).values()) == [1, 1]
    assert scores(store, [1, 3]) == [None, 3.0]


def table_entries(store: Store) -> dict[int, int]:
    """Return the number of pages by table id."""
    with store.environment.read() as txn:
        return {number: sum(1 for _ in environment.table_pages(txn, number)) for number in environment.table_ids(txn)}


def test_killed_load_leaves_the_store_as_it_was(store: Store) -> None:
    store.load("stats", [rows(range(100))])
    code = (
        "import sys, os, signal\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import test_store as t\n"
        "from shorttail.config import Limits\n"
        "t.load_module.LIMITS = Limits(load_commit_bytes=100_000)\n"
        "s = t.Store.open(sys.argv[1])\n"
        "t.rebuild.Rebuild.put_in_place = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.load('stats', [t.rows(range(5000))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, store.path, str(Path(__file__).parent)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert store.count("stats") == 100
    assert max(table_entries(store).values()) > 50
    for _ in range(2):  # the table before is kept
        assert store.load("stats", [rows(range(10))]) == 10
    assert max(table_entries(store).values()) == 1


def test_removed_views_lose_their_tables(store: Store) -> None:
    store.load("stats", [rows(range(1000))])
    store.refresh()
    with store.edit_catalog() as catalog:
        del catalog.views["stats"], catalog.tables["stats"]
    assert store.refresh()
    assert table_entries(store) == {}
    with pytest.raises(NotFound, match="stats"):
        store.count("stats")
    with pytest.raises(NotFound, match="stats"):
        store.upsert("stats", rows([1]))


def test_edit_catalog_commits_neither_after_an_error_nor_without_a_change(store: Store) -> None:
    version = store.catalog_version

    def broken() -> None:
        with store.edit_catalog() as catalog:
            catalog.views.clear()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    with store.edit_catalog():
        pass
    assert store.refresh() is False
    assert store.catalog_version == version
    assert list(store.catalog.views) == ["stats"]


def test_counts_and_refresh_within_a_catalog_edit(store: Store) -> None:
    """Registering definitions counts rows inside the edit. It must not deadlock, even after commits of other stores."""
    with Store.open(store.path) as other:
        other.load("stats", [rows(range(10))])
        with store.edit_catalog() as catalog:
            assert store.count("stats") == 10
            catalog.add(VIEW)
            with pytest.raises(Internal, match="within another"):
                store.upsert("stats", rows([1]))
        assert store.count("stats") == other.count("stats") == 0


def test_threads_push_while_others_look_up(store: Store) -> None:
    store.load("stats", [rows(range(2000))])
    errors: list[BaseException] = []

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def push(start: int) -> None:
        for i in range(start, start + 100):
            store.upsert("stats", rows([i, i + 10_000], i))

    def look() -> None:
        for _ in range(200):
            assert scores(store, [0, 1, 1999]) == [0.0, 1.0, 1999.0]

    threads = [guarded(lambda s=s: push(s)) for s in (2000, 2100)] + [guarded(look) for _ in range(2)]
    for thread in threads:
        thread.join()
    assert not errors
    assert store.count("stats") == 2400


def test_wrong_columns_are_refused(store: Store) -> None:
    good = rows([1, 2])
    for wrong, message in [
        (ColumnBatch(good.keys, good.event_time_us, good.features[:1]), "2 features"),
        (ColumnBatch([np.arange(3)], good.event_time_us, good.features), "'user_id' has 3 values for 2 rows"),
        (ColumnBatch([np.array([1.5, 2])], good.event_time_us, good.features), "'user_id'.*float64"),
        (ColumnBatch(good.keys, good.event_time_us, [good.features[1], good.features[1]]), "'score'.*object"),
        (
            ColumnBatch(good.keys, good.event_time_us, [good.features[0], (np.array(["\ud800", ""], object), None)]),
            "'tier'.*surrogate",
        ),
        (
            ColumnBatch(
                good.keys, good.event_time_us, [good.features[0], (np.array(["x" * 65_536, ""], object), None)]
            ),
            "'tier'.*65536 bytes",
        ),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            store.upsert("stats", wrong)
    with pytest.raises(InvalidArgument, match="key columns"):
        store.delete("stats", [np.arange(2), np.arange(2)])
    assert store.count("stats") == 0


def test_damaged_page_is_named(store: Store) -> None:
    store.load("stats", [rows(range(10))])
    store.refresh()
    key = environment.page_key(store.catalog.tables["stats"].id, bytes(8))
    with store.environment.write() as writer:
        page = bytearray(writer.txn.get(key))
        page[200] ^= 1
        writer.txn.put(key, page)
    for use in (lambda: list(store.scan("stats")), lambda: store.upsert("stats", rows([1]))):
        with pytest.raises(Internal, match=r"view 'stats' is damaged.*checksum.*load it again"):
            use()
