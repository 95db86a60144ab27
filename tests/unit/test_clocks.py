"""The times that the store makes, over a clock that jumps, and its setting max_clock_skew."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import run_well
from hypothesis import given, settings
from hypothesis import strategies as values

import shorttail as st
from shorttail.define import clock, dtypes
from shorttail.errors import InvalidArgument
from shorttail.results import RowCount
from shorttail.store import ColumnBatch, Delete, Edit, Store, Upsert
from shorttail.store.table import UNTIMED

NOW_US = 1_795_000_000_000_000
SECOND_US, HOUR_US, DAY_US = 1_000_000, 3_600_000_000, 86_400_000_000
PAIR = st.FeatureView(
    "pair", st.Entity("pair", {"a": dtypes.Int64, "name": dtypes.String}), [st.Feature("x", dtypes.Int64)]
)
VIEW = st.FeatureView("v", st.Entity("e", {"id": st.Int64}), [st.Feature("x", st.Int64)], ttl="1d")

SetClock = Callable[[int], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Return set_clock(time in microseconds), which sets the clock that event times are compared with."""

    def to(time_us: int) -> None:
        monkeypatch.setattr(clock, "now_us", lambda: time_us)

    to(NOW_US)
    return to


@pytest.fixture
def engine(tmp_path: Path, set_clock: SetClock) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([VIEW])
        yield engine


def stored(engine: st.Engine) -> dict[int, tuple[int, int]]:
    """Return {id: (x, event time)}."""
    return {
        key: (x, time_us)
        for batch in engine.store.scan("v")
        for key, x, time_us in zip(
            batch.keys[0].tolist(), batch.features[0][0].tolist(), batch.event_time_us.tolist(), strict=True
        )
    }


# -- the times that the store makes --------------------------------------------------------------------------------


def test_a_push_without_a_time_wins_after_the_clock_went_back(engine: st.Engine, set_clock: SetClock) -> None:
    engine.push("v", {"id": [1, 2], "x": [1, 1]})
    set_clock(NOW_US - DAY_US)
    count = engine.push("v", {"id": [1, 3, 3], "x": [2, 2, 3]})
    assert (count, count.older, count.duplicate) == (3, 0, 1)
    assert stored(engine) == {1: (2, NOW_US + 1), 2: (1, NOW_US), 3: (3, NOW_US - DAY_US)}
    set_clock(NOW_US + 5)
    engine.push("v", {"id": 1, "x": 4})
    assert stored(engine)[1] == (4, NOW_US + 5)
    engine.delete("v", {"id": 1})  # a delete has no time: what is pushed next starts anew
    set_clock(NOW_US - DAY_US)
    engine.push("v", {"id": 1, "x": 5})
    assert stored(engine)[1] == (5, NOW_US - DAY_US)


def test_a_row_that_lies_in_the_future_no_longer_hides_later_pushes(engine: st.Engine) -> None:
    later_us = NOW_US + 30 * DAY_US
    last_us = 2**63 - 1
    times = np.array([later_us, last_us])  # such rows were taken by older versions
    engine.store.upsert("v", ColumnBatch([np.array([1, 2])], times, [(np.array([1, 1]), None)]))
    count = engine.push("v", {"id": [1, 2], "x": [2, 2], "event_time": [NOW_US] * 2})
    assert (count, count.older) == (0, 2)
    assert engine.push("v", {"id": [1, 2], "x": [99, 99]}) == 2
    assert stored(engine) == {1: (99, later_us + 1), 2: (99, last_us)}
    assert engine.load("v", {"id": [1, 2], "x": [3, 3]}) == 2
    assert stored(engine) == {1: (3, NOW_US), 2: (3, NOW_US)}


def test_pushes_of_one_commit_follow_each_other(engine: st.Engine, set_clock: SetClock) -> None:
    def push(x: int, *times: int) -> Upsert:
        ids = np.ones(len(times), np.int64)
        return Upsert("v", ColumnBatch([ids], np.array(times, np.int64), [(ids * x, None)]))

    assert engine.store.commit(
        [push(1, NOW_US + HOUR_US), push(2, UNTIMED, UNTIMED), push(3, NOW_US), push(4, UNTIMED)]
    ) == [1, 2, 0, 1]
    assert stored(engine) == {1: (4, NOW_US + HOUR_US + 2)}


Op = tuple[str, list[tuple[int, int]]]  # what it is, and (key, seconds after the start)
KEYS: Any = values.integers(0, 4)
OPS: Any = values.one_of(
    values.tuples(
        values.just("push"), values.lists(values.tuples(KEYS, values.integers(0, 9)), min_size=1, max_size=6)
    ),
    values.tuples(values.just("untimed"), values.lists(values.tuples(KEYS, values.just(0)), min_size=1, max_size=6)),
    values.tuples(values.just("delete"), values.lists(values.tuples(KEYS, values.just(0)), min_size=1, max_size=2)),
)
Commit = tuple[int, list[Op]]
COMMITS: Any = values.lists(values.tuples(values.integers(0, 9), values.lists(OPS, min_size=1, max_size=4)), max_size=6)


class Model:
    """The rule: of a key, the row of the latest time stays, and of equal times the last one.

    A push without times has, for each key, the present time, or 1 us more than the stored time of the key.
    """

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, int]] = {}  # key -> (time, value)

    def push(self, rows: list[tuple[int, int, int]]) -> tuple[int, int, int]:
        """Apply a push of (key, time, value). Returns its (given, older, duplicate)."""
        kept: dict[int, int] = {}
        for i, (key, time_us, value) in enumerate(rows):
            if key not in self.rows or time_us >= self.rows[key][0]:
                self.rows[key], kept[key] = (time_us, value), i
        lost = [i for i, (key, _, _) in enumerate(rows) if kept.get(key) != i]
        older = sum(rows[i][1] < self.rows[rows[i][0]][0] for i in lost)
        return len(rows), older, len(lost) - older

    def made(self, key: int, now_us: int) -> int:
        return max(now_us, self.rows[key][0] + 1) if key in self.rows else now_us

    def delete(self, keys: list[int]) -> int:
        return sum(self.rows.pop(key, None) is not None for key in keys)


@pytest.fixture(scope="module")
def pairs() -> Iterator[Store]:
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    with Store.open(Path(folder) / "store", create=True) as store:
        with store.edit_catalog() as catalog:
            catalog.add(PAIR)
        yield store
    shutil.rmtree(folder)


def key_columns(keys: list[int]) -> list[Any]:
    return [np.array(keys, np.int64), np.array([f"key {key}" * key for key in keys], object)]


@given(values.booleans(), COMMITS)
@settings(max_examples=150)
def test_the_store_keeps_what_the_rule_says(pairs: Store, has_other_rows: bool, commits: list[Commit]) -> None:
    """has_other_rows: 500 other keys are stored, so that the rows of a push lie in several pages."""
    with pairs.edit_catalog() as catalog:
        catalog.add(PAIR)
    others = list(range(10, 510)) if has_other_rows else []
    if others:
        pairs.upsert("pair", ColumnBatch(key_columns(others), np.zeros(500, np.int64), [(np.array(others), None)]))
    model, number = Model(), 0
    with pytest.MonkeyPatch.context() as patch:
        for now, ops in commits:
            patch.setattr(clock, "now_us", lambda time_us=SECOND_US * now: time_us)
            edits: list[Edit] = []
            wanted: list[Any] = []
            for kind, rows in ops:
                keys = [key for key, _ in rows]
                if kind == "delete":
                    edits.append(Delete("pair", key_columns(keys)))
                    wanted.append(model.delete(keys))
                    continue
                numbers = np.arange(number, number + len(rows))
                number += len(rows)
                if kind == "push":
                    given_us = times_us = [SECOND_US * time for _, time in rows]
                else:
                    given_us, times_us = [UNTIMED] * len(rows), [model.made(key, SECOND_US * now) for key in keys]
                batch = ColumnBatch(key_columns(keys), np.array(given_us, np.int64), [(numbers, None)])
                edits.append(Upsert("pair", batch))
                wanted.append(model.push(list(zip(keys, times_us, numbers.tolist(), strict=True))))
            told = [(o.given, o.older, o.duplicate) if isinstance(o, RowCount) else o for o in pairs.commit(edits)]
            assert told == wanted
            found = {
                key: (time_us, value)
                for batch in pairs.scan("pair")
                for key, time_us, value in zip(
                    batch.keys[0].tolist(), batch.event_time_us.tolist(), batch.features[0][0].tolist(), strict=True
                )
                if key < 10
            }
            assert found == model.rows


# -- what is refused, and what is served at once -------------------------------------------------------------------


def test_a_push_with_one_wrong_time_writes_nothing(engine: st.Engine) -> None:
    rows = {"id": [1, 2, 3], "x": [1, 2, 3], "event_time": [NOW_US, NOW_US + 2 * HOUR_US, NOW_US]}
    for form in (rows, pd.DataFrame(rows)):
        with pytest.raises(
            InvalidArgument, match=r"view 'v': column 'event_time' at row 1: .* is 2h ahead of this host"
        ):
            engine.push("v", form)
    assert engine.store.count("v") == 0


@pytest.mark.parametrize("kind", ["parquet", "csv", "dict"])
def test_a_load_with_one_wrong_time_changes_nothing(engine: st.Engine, tmp_path: Path, kind: str) -> None:
    engine.push("v", {"id": 7, "x": 7})
    frame = pd.DataFrame({"id": [1, 2], "x": [1, 2], "event_time": [NOW_US, NOW_US // 1000]})
    (tmp_path / "rows").mkdir()
    good = frame.assign(event_time=NOW_US)
    if kind == "dict":
        data, where = frame.to_dict("list"), "view 'v'"
    elif kind == "parquet":
        good.to_parquet(tmp_path / "rows" / "a.parquet")
        frame.to_parquet(tmp_path / "rows" / "b.parquet")
        data, where = tmp_path / "rows", "rows/b.parquet"
    else:
        good.to_csv(tmp_path / "rows" / "a.csv")
        frame.to_csv(tmp_path / "rows" / "b.csv")
        data, where = tmp_path / "rows", "rows/b.csv"
    with pytest.raises(InvalidArgument, match=rf"{where}: column 'event_time' at row 1: .* in milliseconds; give"):
        engine.load("v", data)
    assert stored(engine) == {7: (7, NOW_US)}


def test_a_row_within_the_skew_is_served_at_once(engine: st.Engine, tmp_path: Path) -> None:
    # The clock of lookups is the real one, so a row of an hour ahead of it is in its future.
    ahead = pd.Timestamp.now(tz="UTC") + pd.Timedelta("59m")
    forever = st.FeatureView("forever", VIEW.entity, [st.Feature("x", st.Int64)], ttl=timedelta(days=30_000_000))
    short = st.FeatureView("short", VIEW.entity, [st.Feature("x", st.Int64)], ttl="1ms")
    engine.apply([VIEW, forever, short])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "now_us", lambda: int(pd.Timestamp.now(tz="UTC").value // 1000))
        for view in ("v", "forever", "short"):
            engine.push(view, {"id": 1, "x": 5, "event_time": [ahead]})
            found = engine.get_online_features([f"{view}:x"], {"id": 1})
            assert found[f"{view}:x"].tolist() == [5]
            assert found.statuses[view].tolist() == [st.Status.PRESENT]
        engine.push("forever", {"id": 2, "x": 6, "event_time": 0})
        assert engine.get_online_features(["forever:x"], {"id": 2})["forever:x"].tolist() == [6]


# -- the setting ---------------------------------------------------------------------------------------------------


def test_the_skew_is_kept_in_the_store_for_all_processes(tmp_path: Path, set_clock: SetClock) -> None:
    path = tmp_path / "store"
    ahead = {"id": 1, "x": 1, "event_time": NOW_US + 10 * 60 * SECOND_US}
    with st.Engine.open(path, create=True, max_clock_skew="5m") as engine:
        engine.apply([VIEW])
        with pytest.raises(
            InvalidArgument, match=r"10m ahead of this host's clock .*, and max_clock_skew is 5m; is it a"
        ):
            engine.push("v", ahead)
        change = ["settings", "set", "max_clock_skew", "15m", "--store", str(path)]
        subprocess.run([sys.executable, "-m", "shorttail", *change], check=True, capture_output=True)
        assert engine.push("v", ahead) == 1
        with st.Engine.open(path, max_clock_skew=timedelta(minutes=1)):
            pass
        with pytest.raises(InvalidArgument, match="max_clock_skew is 1m"):
            engine.load("v", ahead)
    with st.Engine.open(path) as engine:
        engine.apply([VIEW])
        assert engine.store.catalog.max_clock_skew_us == 60 * SECOND_US
    for wrong in ("-1m", "0s", "soon", 5):
        with pytest.raises(
            InvalidArgument, match=f"max_clock_skew {wrong!r} is not a positive time; write '1h' or '5m'"
        ):
            st.Engine.open(tmp_path / "other", create=True, max_clock_skew=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_a_catalog_of_an_older_version_has_the_default(engine: st.Engine) -> None:
    from shorttail.define.catalog import Catalog

    document = engine.store.catalog.to_json()
    older = document.replace(b',"max_clock_skew_us":3600000000', b"")
    assert len(older) < len(document)
    assert Catalog.from_json(older) == engine.store.catalog


def test_the_command_shows_and_changes_the_setting(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    definitions = tmp_path / "definitions.py"
    definitions.write_text(
        "import shorttail as st\n"
        "v = st.FeatureView('v', st.Entity('e', {'id': st.Int64}), [st.Feature('x', st.Int64)])\n"
    )
    apply = ["apply", str(definitions), "--store", store, "--create", "--max-clock-skew", "90m"]
    assert "~ setting max_clock_skew  1h -> 90m\n3 changes; dry run" in run_well(*apply, "--dry-run").out
    assert not Path(store).exists()
    assert "~ setting max_clock_skew  1h -> 90m\n" in run_well(*apply).out
    again = run_well(*apply).out
    assert again.endswith(f"= setting max_clock_skew  90m\n{store}: no changes\n")
    assert run_well("settings", "list", "--store", store, "--json").json["max_clock_skew"] == "90m"
    assert run_well("settings", "set", "max_clock_skew", "2h", "--store", store).out == "max_clock_skew: 90m -> 2h\n"
    assert run_well("settings", "set", "max_clock_skew", "120m", "--store", store).out == "max_clock_skew: 2h\n"
    assert run_well("stat", "--store", store, "--json").json["max_clock_skew_us"] == 2 * HOUR_US
    assert "max_clock_skew: 2h\n" in run_well("stat", "--store", store).out
    run_well("apply", str(definitions), "--store", store)
    assert run_well("settings", "list", "--store", store, "--json").json["max_clock_skew"] == "2h"
    assert (
        run_well("settings", "set", "max_clock_skew", "default", "--store", store).out == "max_clock_skew: 2h -> 1h\n"
    )
