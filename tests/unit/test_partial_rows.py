"""Partial pushes: rows that give only some features, embedded and from files. The others keep what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import Result, run

import shorttail as st
from shorttail.errors import InvalidArgument, NotFound
from shorttail.sources.rows import column_batch
from shorttail.store import ColumnBatch, Upsert
from shorttail.store.table import UNTIMED

USER = st.Entity("user", keys={"user_id": st.Int64})
FEATURES = [
    st.Feature("age", st.Float32),
    st.Feature("tier", st.String),
    st.Feature("taste", st.Vector(2)),
    st.Feature("avg", st.Float64, column="7d_avg"),
]
VIEW = st.FeatureView("stats", USER, FEATURES, source=st.ParquetSource("rows.parquet", timestamp="at"))
ROWS = {
    "user_id": [1, 2, 3],
    "age": [10.0, None, 30.0],
    "tier": ["gold", "tin", None],
    "taste": [[1, 2], None, [5, 6]],
    "7d_avg": [0.5, 1.5, 2.5],
    "at": [100, 100, 100],
}
REFERENCES = ["stats:age", "stats:tier", "stats:taste", "stats:avg"]
HOUR_US = 3_600_000_000


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([VIEW])
        engine.push("stats", ROWS)
        yield engine


def row(engine: st.Engine, user: int) -> list[Any]:
    return [values[0] for values in engine.get_online_features(REFERENCES, {"user_id": [user]}).to_dict().values()]


def event_times(engine: st.Engine) -> dict[int, int]:
    return {
        key: time_us
        for batch in engine.store.scan("stats")
        for key, time_us in zip(batch.keys[0].tolist(), batch.event_time_us.tolist(), strict=True)
    }


FRAMES = {
    "dict": dict,
    "pandas": pd.DataFrame,
    "pandas with an index": lambda rows: pd.DataFrame(rows).set_index("user_id"),
    "pyarrow": pa.table,
    "polars": pl.DataFrame,
}


@pytest.mark.parametrize("frame", FRAMES)
def test_features_that_are_not_given_stay(engine: st.Engine, frame: str) -> None:
    rows = FRAMES[frame]({"user_id": [1, 2, 3, 4], "tier": ["new", None, "three", "four"], "at": [200] * 4})
    assert engine.push("stats", rows, partial=True) == 4
    assert [row(engine, user) for user in (1, 2, 3, 4)] == [
        [10.0, "new", [1.0, 2.0], 0.5],
        [None, None, None, 1.5],
        [30.0, "three", [5.0, 6.0], 2.5],
        [None, "four", None, None],
    ]
    assert event_times(engine) == dict.fromkeys((1, 2, 3, 4), 200)
    answer = engine.get_online_features(REFERENCES, {"user_id": [4]})
    assert answer.feature_statuses["stats:age"].tolist() == [st.Status.NULL]


def test_a_row_that_is_older_is_dropped_as_a_whole_and_an_untimed_one_is_later(engine: st.Engine) -> None:
    rows = {"user_id": [1, 2], "age": [-1.0, -2.0]}
    count = engine.push("stats", rows | {"at": [99, 100]}, partial=True)
    assert (count, count.older, count.duplicate) == (1, 1, 0)
    assert row(engine, 1) == [10.0, "gold", [1.0, 2.0], 0.5]
    assert row(engine, 2) == [-2.0, "tin", None, 1.5]
    assert engine.push("stats", rows, partial=True) == 2
    assert row(engine, 1) == [-1.0, "gold", [1.0, 2.0], 0.5]
    assert event_times(engine)[1] > 1_700_000_000_000_000


def test_rows_of_one_key_in_a_push_are_laid_over_each_other_by_their_times(engine: st.Engine) -> None:
    rows = {"user_id": [1, 1, 1, 1], "7d_avg": [1.0, None, 3.0, 4.0], "at": [100, 300, 200, 300]}
    count = engine.push("stats", rows, partial=True)
    assert (count, count.older, count.duplicate) == (2, 2, 1)
    assert row(engine, 1) == [10.0, "gold", [1.0, 2.0], 4.0]


def test_pushes_of_different_features_share_a_commit(engine: st.Engine) -> None:
    def edit(partial: bool = True, **columns: Any) -> Upsert:
        return Upsert("stats", column_batch(VIEW, columns, HOUR_US, partial=partial))

    with engine.store.environment.read() as txn:
        before = engine.store.environment.sequence(txn)
    outcomes = engine.store.commit(
        [
            edit(user_id=1, age=1.0, at=200),
            edit(user_id=1, taste=[3, 4], at=150),  # older than the one before, and dropped though it gives another
            edit(user_id=[1, 2], tier=["two", "x" * 60_000], at=[200, 300]),
            edit(user_id=2, taste=[7, 8], at=250),  # older than the one before
            edit(user_id=2, taste=[8, 9], age=None, at=300),
            edit(partial=False, user_id=3, age=3.0, tier="all", taste=None, at=200, **{"7d_avg": None}),
            edit(user_id=3, at=201, **{"7d_avg": 9.0}),
            edit(user_id=5, tier="five", at=1),
        ]
    )
    assert [(o.given, o.older) for o in outcomes] == [(1, 0), (1, 1), (2, 0), (1, 1), (1, 0), (1, 0), (1, 0), (1, 0)]
    with engine.store.environment.read() as txn:
        assert engine.store.environment.sequence(txn) == before + 1
    assert [row(engine, user) for user in (1, 2, 3, 5)] == [
        [1.0, "two", [1.0, 2.0], 0.5],
        [None, "x" * 60_000, [8.0, 9.0], 1.5],
        [3.0, "all", None, 9.0],
        [None, "five", None, None],
    ]


def test_a_push_without_rows_leaves_its_features_to_others(engine: st.Engine) -> None:
    """Its rows have the address at which those of the next push begin."""
    empty = column_batch(VIEW, {"user_id": [1], "age": [7.0], "at": [300]}, HOUR_US, partial=True).slice(0, 0)
    tier = column_batch(VIEW, {"user_id": [1], "tier": ["new"], "at": [300]}, HOUR_US, partial=True)
    for batches in ([empty, tier], [tier, empty], [empty, empty]):
        engine.push("stats", ROWS)
        engine.store.commit([Upsert("stats", batch) for batch in batches])
        tiers = "gold" if batches[1] is batches[0] else "new"
        assert row(engine, 1) == [10.0, tiers, [1.0, 2.0], 0.5]
        engine.delete("stats", {"user_id": [1]})


def test_a_deleted_row_gives_nothing(engine: st.Engine) -> None:
    engine.delete("stats", {"user_id": [1]})
    engine.push("stats", {"user_id": [1], "age": [5.0], "at": [1]}, partial=True)
    assert row(engine, 1) == [5.0, None, None, None]


def test_two_features_of_one_column_and_all_features_are_given(engine: st.Engine) -> None:
    twice = st.FeatureView("twice", USER, [st.Feature(name, st.Int64, column="n") for name in "ab"] + FEATURES[:1])
    engine.apply([twice])
    engine.push("twice", {"user_id": [1], "n": [1], "age": [2.0]})
    assert engine.push("twice", {"user_id": [1], "n": [5]}, partial=True) == 1
    answer = engine.get_online_features(["twice:a", "twice:b", "twice:age"], {"user_id": [1]}).to_dict()
    assert answer == {"twice:a": [5], "twice:b": [5], "twice:age": [2.0]}
    assert column_batch(twice, {"user_id": 1, "n": 5, "age": 1.0}, HOUR_US, partial=True).given == ("a", "b", "age")


HINT = ", or push with partial=True (--partial), which keeps what is stored"
NEEDED = "['user_id', 'age', 'tier', 'taste', '7d_avg']"
WRONG: list[tuple[dict[str, Any], bool, str]] = [
    ({"user_id": [1], "age": [1.0]}, False,
     f"view 'stats': column 'tier' is missing from the rows; they need: {NEEDED}{HINT}"),
    ({"age": [1.0]}, False, f"view 'stats': column 'user_id' is missing from the rows; they need: {NEEDED}"),
    ({"age": [1.0]}, True, "view 'stats': key column 'user_id' is missing; keys: user_id"),
    ({"user_id": [1]}, True,
     "view 'stats': the rows have no feature; give at least one of: age, tier, taste, 7d_avg"),
    ({"user_id": [1], "at": [1]}, True,
     "view 'stats': the rows have no feature; give at least one of: age, tier, taste, 7d_avg"),
    ({"user_id": [1], "age": [1.0], "teir": ["x"]}, True,
     "view 'stats' has no column 'teir', and a partial push takes no others; did you mean 'tier'?"),
    ({"user_id": [1], "age": [1.0], "event_time": [1]}, True,
     "view 'stats' has no column 'event_time', and a partial push takes no others; columns: user_id, age, "),
    ({"user_id": [1], "Age": [1.0]}, True, "view 'stats' has no column 'Age'; there is 'age', and case matters"),
    ({"user_id": [1], "avg": [1.0]}, True,
     "view 'stats' has no column 'avg'; feature 'avg' is read from column '7d_avg'"),
    ({"user_id": [1], "age": ["x"]}, True, "view 'stats': column 'age' takes Float32; got 'x' (str) at row 0"),
    ({"user_id": [None], "age": [1.0]}, True, "view 'stats': key 'user_id' is null at row 0; a key needs a value"),
    ({"user_id": [1, 2], "age": [1.0]}, True, "view 'stats': column 'age' has 1 values where others have 2"),
    ({"user_id": [], "age": []}, True, "view 'stats': no rows; send at least one"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "partial", "message"), WRONG)
def test_wrong_rows_are_named_and_change_nothing(
    engine: st.Engine, rows: dict[str, Any], partial: bool, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        engine.push("stats", rows, partial=partial)
    text = caught.value.message
    assert text.startswith(message)
    assert text == message or text[len(message)] not in ","  # no hint where none belongs
    assert row(engine, 1) == [10.0, "gold", [1.0, 2.0], 0.5]


def test_a_load_takes_whole_rows_and_does_not_speak_of_pushes(engine: st.Engine) -> None:
    with pytest.raises(InvalidArgument) as caught:
        engine.load("stats", {"user_id": [1], "age": [1.0]})
    assert caught.value.message.endswith("they need: ['user_id', 'age', 'tier', 'taste', '7d_avg']")
    batch = column_batch(VIEW, {"user_id": [1], "age": [1.0]}, HOUR_US, partial=True)
    with pytest.raises(InvalidArgument, match="'stats': a load replaces whole rows, so give all their features"):
        engine.store.load("stats", [batch], allow_shrink=True)
    assert row(engine, 1) == [10.0, "gold", [1.0, 2.0], 0.5]


def test_features_are_known_by_their_names_when_the_view_changes_before_the_commit(engine: st.Engine) -> None:
    batch = column_batch(VIEW, {"user_id": [1], "tier": ["new"]}, HOUR_US, partial=True)
    changed = st.FeatureView("stats", USER, [st.Feature("name", st.String), *FEATURES[:2]])
    engine.apply([changed])
    assert engine.store.commit([Upsert("stats", batch)]) == [1]
    answer = engine.get_online_features(["stats:name", "stats:tier"], {"user_id": [1]}).to_dict()
    assert answer == {"stats:name": [None], "stats:tier": ["new"]}
    engine.apply([st.FeatureView("stats", USER, [st.Feature("name", st.String), FEATURES[0]])])
    [error] = engine.store.commit([Upsert("stats", batch)])
    assert isinstance(error, InvalidArgument)
    assert error.message == "feature view 'stats' has no feature 'tier', which the rows give"
    with pytest.raises(NotFound, match="no feature view 'nothing'"):
        engine.push("nothing", {"user_id": [1], "tier": ["new"]}, partial=True)


def test_a_batch_of_too_many_or_too_few_columns_is_refused() -> None:
    keys, times, column = [np.array([1])], np.array([UNTIMED]), (np.array([1.0]), None)
    for given, columns in ((("age", "avg"), [column]), (("age",), [column, column])):
        with pytest.raises(InvalidArgument, match=rf"has 1 keys and {len(given)} features, but the rows have 1 and "):
            ColumnBatch(keys, times, columns, given).check(VIEW)


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, engine: st.Engine) -> Path:
    engine.close()
    return tmp_path


def push(folder: Path, *arguments: str) -> Result:
    return run("push", "stats", *arguments, "--store", "store", folder=folder)


def stored(folder: Path, *users: int) -> list[list[Any]]:
    with st.Engine.open(folder / "store") as engine:
        return [row(engine, user) for user in users]


def test_a_file_of_some_features(folder: Path) -> None:
    (folder / "tiers.csv").write_text("user_id,tier,at\n1,new,200\n4,four,200\n")
    assert push(folder, "tiers.csv", "--partial").out.endswith("given 2, loaded 2, older 0, duplicate 0\n")
    assert stored(folder, 1, 4) == [[10.0, "new", [1.0, 2.0], 0.5], [None, "four", None, None]]


def test_each_file_of_a_folder_gives_its_own_features(folder: Path) -> None:
    """In a push of whole rows, a feature that a file lacks is null there. Here it stays."""
    rows = folder / "rows"
    rows.mkdir()
    pyarrow.parquet.write_table(
        pa.table({"user_id": [1, 2], "7d_avg": [7.0, 8.0], "at": [200, 200]}), rows / "0.parquet"
    )
    (rows / "1.csv").write_text("user_id,age,at\n2,20,300\n3,,300\n")
    pyarrow.parquet.write_table(
        pa.table({name: values for name, values in ROWS.items() if name != "taste"}).slice(0, 1).append_column(
            "taste", pa.array([[3.0, 4.0]], pa.list_(pa.float32(), 2))
        ).set_column(4, "at", pa.array([400])), rows / "2.parquet",
    )  # fmt: skip
    assert push(folder, "rows", "--partial", "--json").json["rows"] == 5
    assert stored(folder, 1, 2, 3) == [
        [10.0, "gold", [3.0, 4.0], 0.5],
        [20.0, "tin", None, 8.0],
        [None, None, [5.0, 6.0], 2.5],
    ]


@pytest.mark.parametrize(
    ("text", "partial", "message"),
    [
        ("user_id,tier,at\n1,x,200\n", False,
         f"rows.csv: no column 'age' (feature of view 'stats'); its columns: user_id, tier, at{HINT}"),
        ("tier,at\nx,200\n", True, "rows.csv: no column 'user_id' (key of view 'stats'); its columns: tier, at"),
        ("user_id,tier\n1,x\n", True,
         "rows.csv: no column 'at' (timestamp of view 'stats'); its columns: user_id, tier"),
        ("user_id,at\n1,200\n", True,
         "rows.csv: view 'stats': the rows have no feature; give at least one of: age, tier, taste, 7d_avg"),
        ("user_id,tier,at,ages\n1,x,200,3\n", True,
         "rows.csv: view 'stats' has no column 'ages', and a partial push takes no others; did you mean 'age'?"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(folder: Path, text: str, partial: bool, message: str) -> None:
    (folder / "rows.csv").write_text(text)
    done = push(folder, "rows.csv", *(["--partial"] if partial else []))
    assert (done.code, done.err.strip().removeprefix("error: ")) == (1, message)
    assert stored(folder, 1) == [[10.0, "gold", [1.0, 2.0], 0.5]]


def test_a_load_of_a_file_does_not_speak_of_pushes(folder: Path) -> None:
    (folder / "rows.csv").write_text("user_id,tier,at\n1,x,200\n")
    done = run("load", "stats", "rows.csv", "--store", "store", folder=folder)
    assert done.err.strip().endswith("its columns: user_id, tier, at")
