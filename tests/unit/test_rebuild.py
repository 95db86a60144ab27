"""Edits that are made while a table is being filled are in the new table, as a plain dict says."""

from __future__ import annotations

import fcntl
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument
from shorttail.registry.apply import apply
from shorttail.results import RowCount
from shorttail.store import ColumnBatch, Delete, Store, Upsert, pending, preparing, rebuild
from shorttail.store import load as load_module
from shorttail.store.leftovers import load_lock
from shorttail.store.preparing import wait_until_ready
from shorttail.store.table import UNTIMED
from shorttail.store.verify import verify

USER = st.Entity("user", keys={"id": st.Int64})
VIEW = st.FeatureView("v", USER, [st.Feature("a", st.Int32), st.Feature("s", st.String)])
WIDER = st.FeatureView(
    "v", USER, [st.Feature("s", st.String), st.Feature("x", st.Float64), st.Feature("a", st.Int64)]
)  # fmt: skip
KEYS = 400
Row = tuple[int, dict[str, Any]]  # event time in microseconds, and values


@dataclass
class Oracle:
    """What a view holds: key -> row."""

    rows: dict[int, Row]

    def upsert(self, keys: list[int], times: list[int], values: dict[str, list[Any]], partial: bool) -> None:
        for i, (key, time_us) in enumerate(zip(keys, times, strict=True)):
            old = self.rows.get(key)
            if old is not None and time_us != UNTIMED and time_us < old[0]:
                continue
            given = {name: column[i] for name, column in values.items()}
            kept = old[1] if partial and old is not None else {"a": None, "s": None}
            now_us = max(time.time_ns() // 1000, 0 if old is None else old[0] + 1)
            self.rows[key] = (now_us if time_us == UNTIMED else time_us, {**kept, **given})

    def delete(self, keys: list[int]) -> None:
        for key in keys:
            self.rows.pop(key, None)


class Editor:
    """Makes random edits of a store and of its oracle. Untimed rows come last: their time is that of the commit."""

    def __init__(self, store: Store, oracle: Oracle, seed: int) -> None:
        self.store, self.oracle, self.random, self.n = store, oracle, random.Random(seed), 0

    def edit(self) -> None:
        self.n += 1
        choose = self.random
        keys = choose.sample(range(KEYS), choose.randint(1, 20))
        kind = choose.choice(["full", "full", "partial", "delete"])
        if kind == "delete":
            self.store.delete("v", [np.array(keys)])
            self.oracle.delete(keys)
            return
        times = [choose.choice([choose.randint(1, 2000), UNTIMED]) for _ in keys]
        names = ("a", "s") if kind == "full" else (choose.choice(["a", "s"]),)
        values: dict[str, list[Any]] = {
            "a": [choose.choice([None, choose.randint(-(2**31), 2**31 - 1)]) for _ in keys],
            "s": [choose.choice([None, "", "x" * choose.randint(1, 40), f"é{key}"]) for key in keys],
        }
        chosen = {name: values[name] for name in names}
        self.store.upsert("v", batch(keys, times, chosen, None if kind == "full" else names))
        self.oracle.upsert(keys, times, chosen, kind == "partial")


def batch(
    keys: list[int], times: list[int], values: dict[str, list[Any]], given: tuple[str, ...] | None = None
) -> ColumnBatch:
    columns: list[tuple[Any, Any]] = []
    for name, column in values.items():
        nulls = np.array([value is None for value in column])
        if name == "s":
            columns.append((np.array(column, object), None))
        else:
            columns.append((np.array([0 if value is None else value for value in column], np.int32), nulls))
    return ColumnBatch([np.array(keys)], np.array(times), columns, given)


def scanned(store: Store, names: tuple[str, ...]) -> dict[int, dict[str, Any]]:
    """Return the values of the stored rows."""
    found: dict[int, dict[str, Any]] = {}
    for part in store.scan("v"):
        columns = []
        for values, nulls in part.features:
            plain = values.tolist()
            columns.append([None if nulls is not None and nulls[i] else value for i, value in enumerate(plain)])
        for key, *row in zip(part.keys[0].tolist(), *columns, strict=True):
            found[key] = dict(zip(names, row, strict=True))
    return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    small = replace(LIMITS, load_commit_bytes=64 << 10)
    monkeypatch.setattr(load_module, "LIMITS", small)
    monkeypatch.setattr(load_module, "ADD_ROWS", 100)
    monkeypatch.setattr(rebuild, "PENDING_COMMIT_ENTRIES", 30)
    with Store.open(tmp_path / "store", create=True) as store:
        apply(store, [VIEW])
        yield store


def first_rows(editor: Editor) -> None:
    keys = list(range(0, KEYS, 2))
    values = {"a": list(keys), "s": [str(key) for key in keys]}
    editor.store.upsert("v", batch(keys, [1000] * len(keys), values))
    editor.oracle.upsert(keys, [1000] * len(keys), values, False)
    for _ in range(20):
        editor.edit()


@pytest.mark.parametrize("seed", range(4))
def test_edits_during_a_change_are_in_the_new_table(store: Store, seed: int) -> None:
    editor = Editor(store, Oracle({}), seed)
    first_rows(editor)
    seen = []

    def progress(rows: int) -> None:
        seen.append(rows)
        for _ in range(20):
            editor.edit()

    before = editor.n
    apply(store, [WIDER], progress=progress)
    assert editor.n >= before + 40
    assert store.catalog.views["v"] == WIDER
    expected = {key: {"s": row["s"], "x": None, "a": row["a"]} for key, (_, row) in editor.oracle.rows.items()}
    assert scanned(store, ("s", "x", "a")) == expected
    assert verify(store.path).ok


@pytest.mark.parametrize("seed", range(4))
def test_edits_during_a_load_come_after_its_rows(store: Store, seed: int) -> None:
    editor = Editor(store, Oracle({}), seed)
    first_rows(editor)
    keys = list(range(0, KEYS, 3))
    values: dict[str, list[Any]] = {"a": [-key for key in keys], "s": [f"loaded {key}" for key in keys]}
    loaded, began = Oracle({}), False

    def progress(rows: int) -> None:
        nonlocal began
        if not began:  # what is edited from now on is in both
            began, editor.oracle = True, loaded
            loaded.upsert(keys, [1500] * len(keys), values, False)
        for _ in range(20):
            editor.edit()

    count = store.load("v", [batch(keys, [1500] * len(keys), values)], progress)
    assert count == len(keys)
    assert scanned(store, ("a", "s")) == {key: row for key, (_, row) in loaded.rows.items()}
    assert verify(store.path).ok


def test_several_edits_of_one_commit_are_kept_in_order(store: Store) -> None:
    first_rows(Editor(store, Oracle({}), 1))
    done = False

    def progress(rows: int) -> None:
        nonlocal done
        if not done:
            done = True
            one = [batch([7], [UNTIMED], {"a": [n], "s": [str(n)]}) for n in range(3)]
            edits = [Upsert("v", one[0]), Delete("v", [np.array([7])]), Upsert("v", one[1]), Upsert("v", one[2])]
            assert store.commit(edits) == [1, 1, 1, 1]
            partial = batch([7], [UNTIMED], {"s": ["last"]}, ("s",))
            assert store.commit([Upsert("v", partial), Upsert("nothing", partial)])[0] == 1

    apply(store, [WIDER], progress=progress)
    assert scanned(store, ("s", "x", "a"))[7] == {"s": "last", "x": None, "a": 2}


def test_threads_push_while_views_change(store: Store) -> None:
    """Each thread has its own keys, and knows the last value that was acknowledged."""
    first_rows(Editor(store, Oracle({}), 1))
    stop, wrong, last = threading.Event(), [], [0] * 4

    def push(number: int) -> None:
        with Store.open(store.path) as own:
            value = 0
            while not stop.is_set():
                value += 1
                count = own.upsert("v", batch([10_000 + number], [UNTIMED], {"a": [value]}, ("a",)))
                if count != 1 or not isinstance(count, RowCount):
                    wrong.append(count)
                last[number] = value

    threads = [threading.Thread(target=push, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        extra: list[st.Feature] = []
        for n in range(6):
            extra.append(st.Feature(f"x{n}", st.Float64, default=float(n)))
            apply(store, [st.FeatureView("v", USER, [*VIEW.features, *extra])])
            found = scanned(store, ("a", "s", *(feature.name for feature in extra)))
            assert len(found) >= KEYS / 4
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    found = scanned(store, ("a", "s", *(feature.name for feature in extra)))
    assert [found[10_000 + number]["a"] for number in range(4)] == last
    assert verify(store.path).ok


def test_only_one_changes_a_view_at_a_time(store: Store) -> None:
    """The other one waits, and then sees what the first one did."""
    first_rows(Editor(store, Oracle({}), 1))
    order: list[str] = []

    def other() -> None:
        with Store.open(store.path) as own:
            try:
                apply(own, [st.FeatureView("v", USER, [*VIEW.features, st.Feature("y", st.Bool)])])
                order.append("second")
            except InvalidArgument as error:
                order.append(error.message)

    thread = threading.Thread(target=other)

    def progress(rows: int) -> None:
        if not thread.is_alive() and not order:
            thread.start()
            time.sleep(0.2)  # not for synchronisation: it waits for the lock by then, usually
            order.append("first")

    apply(store, [WIDER], progress=progress)
    thread.join()
    assert order[0] == "first"
    assert order[1] == "second" or "was changed" in order[1]
    assert verify(store.path).ok


def test_a_table_whose_maker_died_gets_no_edits(store: Store) -> None:
    first_rows(Editor(store, Oracle({}), 1))
    code = (
        "import os, signal, sys\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "import test_rebuild as t\n"
        "t.load_module.ADD_ROWS = 10\n"
        "with t.Store.open(sys.argv[1]) as store:\n"
        "    t.apply(store, [t.WIDER], progress=lambda rows: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    done = subprocess.run([sys.executable, "-c", code, store.path, *folders], timeout=60)
    assert done.returncode == -signal.SIGKILL
    store.refresh(force=True)
    left = store.catalog.filling["v"].id
    store.upsert("v", batch([1], [UNTIMED], {"a": [1], "s": ["after"]}))
    store.refresh()
    assert store.catalog.filling == {}
    with store.environment.read() as txn:
        assert pending.count(txn, left) == 0
    assert scanned(store, ("a", "s"))[1] == {"a": 1, "s": "after"}
    apply(store, [WIDER])
    assert scanned(store, ("s", "x", "a"))[1] == {"s": "after", "x": None, "a": 1}
    assert verify(store.path).ok


def test_the_table_of_a_living_maker_keeps_its_edits(store: Store) -> None:
    with load_lock(store.environment):
        with store.edit_catalog() as catalog:
            catalog.filling["v"] = catalog.new_table(catalog.definition("v"))
        store.upsert("v", batch([1], [5], {"a": [1], "s": ["x"]}))
        store.refresh()
        table = store.catalog.filling["v"]
        with store.environment.read() as txn:
            assert pending.count(txn, table.id) == 1
        assert verify(store.path).ok
    store.upsert("v", batch([2], [5], {"a": [1], "s": ["x"]}))
    store.refresh()
    assert store.catalog.filling == {}


def test_a_damaged_list_of_edits_is_found(store: Store) -> None:
    with load_lock(store.environment):
        with store.edit_catalog() as catalog:
            catalog.filling["v"] = catalog.new_table(catalog.definition("v"))
        store.upsert("v", batch([1], [5], {"a": [1], "s": ["x"]}))
        with store.environment.write() as writer:
            cursor = writer.txn.cursor()
            assert cursor.set_range(pending.PREFIX)
            key, value = bytes(cursor.key()), bytes(cursor.value())
            writer.put_value(key, value[:-1] + bytes([value[-1] ^ 1]))
        found = verify(store.path)
        assert [problem for problem in found.problems if "an edit that waits for table" in problem]


def test_a_reader_builds_the_new_directory_before_the_swap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pushed meanwhile is in it, and the first lookup after the swap builds nothing."""
    first_rows(Editor(store, Oracle({}), 1))
    with Store.open(store.path) as reader:
        reader.directory("v")
        built = []

        def make_ready(work: rebuild.Rebuild) -> None:
            reader.refresh()
            table = work.tables["v"]
            end_s = time.monotonic() + 60
            while table.id not in reader.directories:
                assert time.monotonic() < end_s
                time.sleep(0.01)
            built.append(reader.directories[table.id])
            store.upsert("v", batch([KEYS + 1], [UNTIMED], {"a": [5], "s": ["late"]}))
            reader.refresh()
            assert wait_until_ready(store.environment, 60)

        monkeypatch.setattr(rebuild.Rebuild, "make_ready", make_ready)
        monkeypatch.setattr(reader, "_build", None)  # nothing is built at a lookup
        apply(store, [WIDER])
        reader.refresh()
        assert reader.directory("v") is built[0]
        assert scanned(reader, ("s", "x", "a"))[KEYS + 1] == {"s": "late", "x": None, "a": 5}
        assert reader.count("v") == len(scanned(reader, ("s", "x", "a")))


def test_a_directory_that_is_prepared_too_late_does_not_replace_the_one_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests hold the directory in use. If another one took its place, no commit would update theirs any more."""
    keys = list(range(KEYS))
    store.upsert("v", batch(keys, [1000] * KEYS, {"a": keys, "s": ["x"] * KEYS}))
    swapped, builds, build = threading.Event(), [], preparing._build

    def late(*arguments: Any) -> bool:
        assert swapped.wait(60)
        builds.append(build(*arguments))
        return builds[-1]

    monkeypatch.setattr(preparing, "_build", late)
    with st.Engine.open(store.path) as reader:

        def found() -> list[Any]:
            return reader.get_online_features(["v:a"], {"id": keys}).to_dict()["v:a"]

        assert found() == keys
        monkeypatch.setattr(rebuild.Rebuild, "make_ready", lambda work: reader.refresh())
        apply(store, [WIDER])
        assert found() == keys
        swapped.set()
        end_s = time.monotonic() + 60
        while not builds:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        for turn in range(1, 20):  # LMDB uses freed pages again
            later = [key + turn for key in keys]
            columns = [(np.array(later), None)]
            store.upsert("v", ColumnBatch([np.array(keys)], np.full(KEYS, 1000 + turn), columns, ("a",)))
            assert found() == later


def test_a_reader_can_say_at_any_time_that_it_is_not_ready(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for readers holds the lock for a moment only, so a reader can lock the file at any time."""
    paused = []

    def look(seconds: float) -> None:
        with Path(store.path, preparing.READY_FILE).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # raises BlockingIOError
        paused.append(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(store.environment.handle, "other_processes", lambda: {1})
        patch.setattr(preparing.time, "sleep", look)
        assert wait_until_ready(store.environment, 60)
    assert paused


def test_a_store_that_changes_while_a_table_is_filled_is_told(store: Store) -> None:
    first_rows(Editor(store, Oracle({}), 1))

    def progress(rows: int) -> None:
        with Store.open(store.path, by="bob") as other:
            apply(
                other,
                [replace(VIEW, features=[*VIEW.features[:1], replace(VIEW.features[1], name="t", renamed_from="s")])],
            )

    with pytest.raises(
        InvalidArgument, match=r"while v was prepared \(bob applied: ~ view v\); look at `shorttail plan`"
    ):
        apply(store, [WIDER], progress=progress)
    store.refresh()
    assert [feature.name for feature in store.catalog.views["v"].features] == ["a", "t"]
    assert (store.catalog.filling, store.catalog.coming) == ({}, {})
    assert verify(store.path).ok
