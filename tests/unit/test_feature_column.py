"""Feature(column=): the column that a feature is read from, wherever rows come in; answers have the feature's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as hs

import shorttail as st
from shorttail.define.views import Feature
from shorttail.errors import InvalidArgument

USER = st.Entity("user", keys={"id": st.Int64})
FEATURES = [
    st.Feature("avg_7d", st.Float32, column="7d_avg"),
    st.Feature("largest", st.Float64, column="amount (USD)"),
    st.Feature("height", st.Int64, column="größe"),
    st.Feature("a_b", st.String, column="a.b[0]"),
    st.Feature("plain", st.Bool),
]
COLUMNS = {
    "id": [1, 2],
    "7d_avg": [0.5, None],
    "amount (USD)": [0.1, 7.0],
    "größe": [180, None],
    "a.b[0]": ["x", None],
    "plain": [True, False],
}
SERVED = {f"v:{feature.name}": values for feature, values in zip(FEATURES, list(COLUMNS.values())[1:], strict=True)}


def view(*features: Feature, name: str = "v", source: st.ParquetSource | None = None) -> st.FeatureView:
    return st.FeatureView(name, entity=USER, features=list(features), source=source)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view(*FEATURES)])
        yield engine


def file_of(write: Callable[[Any, Path], object], name: str) -> Callable[[st.Engine, Path], object]:
    def load(engine: st.Engine, folder: Path) -> object:
        write(pa.table(COLUMNS), folder / name)
        return engine.load("v", folder / name)

    return load


WAYS: dict[str, Callable[[st.Engine, Path], object]] = {
    "load a Parquet file": file_of(pyarrow.parquet.write_table, "rows.parquet"),
    "load a CSV file": file_of(pyarrow.csv.write_csv, "rows.csv"),
    "load a table": lambda engine, _: engine.load("v", pa.table(COLUMNS)),
    "load a dict": lambda engine, _: engine.load("v", COLUMNS),
    "push a dict": lambda engine, _: engine.push("v", COLUMNS),
    "push a table": lambda engine, _: engine.push("v", pa.table(COLUMNS)),
    "push pandas": lambda engine, _: engine.push("v", pd.DataFrame(COLUMNS)),
    "push polars": lambda engine, _: engine.push("v", pl.DataFrame(COLUMNS)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_feature_is_read_from_its_column_and_served_by_its_name(engine: st.Engine, tmp_path: Path, way: str) -> None:
    assert WAYS[way](engine, tmp_path) == 2
    assert engine.get_online_features(list(SERVED), {"id": [1, 2]}).to_dict() == SERVED


def test_the_name_of_the_feature_is_no_column(engine: st.Engine) -> None:
    named = {**{feature.name: COLUMNS[feature.source_column] for feature in FEATURES}, "id": [1, 2]}
    for take in (engine.push, engine.load):
        with pytest.raises(InvalidArgument, match=r"no column 'avg_7d'; feature 'avg_7d' is read from column '7d_avg'"):
            take("v", named)
    with pytest.raises(
        InvalidArgument, match=r"no column '7d_avg' \(feature 'avg_7d' of view 'v'\); its columns: avg_7d"
    ):
        engine.load("v", pa.table(named))
    with pytest.raises(InvalidArgument, match=r"column 'größe' takes Int64; got 1.5"):
        engine.push("v", COLUMNS | {"größe": [1, 1.5]})


def test_features_may_share_a_column_also_a_key_or_the_event_time(tmp_path: Path) -> None:
    features = [
        st.Feature("coarse", st.Float32, column="x"),
        st.Feature("fine", st.Float64, column="x"),
        st.Feature("same_id", st.Int64, column="id"),
        st.Feature("seen", st.Timestamp, column="at"),
    ]
    shared = view(*features, source=st.ParquetSource("gone.parquet", timestamp="at"))
    rows = {"id": [1, 2], "x": [0.1, 0.2], "at": [5, 6]}
    wanted = {"v:fine": [0.1, 0.2], "v:same_id": [1, 2], "v:seen": [5, 6]}
    for way in ("push", "load a dict", "load a table"):
        with st.Engine.open(tmp_path / way, create=True) as engine:
            engine.apply([shared])
            assert (
                engine.push("v", rows)
                if way == "push"
                else engine.load("v", pa.table(rows) if "table" in way else rows)
            ) == 2
            found = engine.get_online_features([*wanted, "v:coarse"], {"id": [1, 2]}).to_dict()
            assert found.pop("v:coarse") == [pytest.approx(0.1), pytest.approx(0.2)]
            assert found == wanted
            assert next(sorted(batch.event_time_us.tolist()) for batch in engine.store.scan("v")) == [5, 6]


@pytest.mark.parametrize(
    ("feature", "is_event_time"),
    [
        (st.Feature("event_time", st.Int64), False),
        (st.Feature("seen", st.Int64, column="event_time"), False),
        (st.Feature("event_time", st.Int64, column="other"), True),
    ],
)
def test_event_times_come_from_event_time_unless_a_feature_is_read_from_it(
    tmp_path: Path, feature: Feature, is_event_time: bool
) -> None:
    rows = {"id": [1], "event_time": [7], "other": [9]}
    pushed = {name: rows[name] for name in rows if name != "other" or feature.column == "other"}
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view(feature)])
        for write in (
            lambda: engine.load("v", pa.table(rows)),
            lambda: engine.load("v", rows),
            lambda: engine.push("v", pushed),
        ):
            write()
            (batch,) = engine.store.scan("v")
            assert (batch.event_time_us.tolist() == [7]) == is_event_time
            engine.delete("v", {"id": [1]})


def test_another_column_of_a_feature_changes_no_rows(engine: st.Engine) -> None:
    engine.push("v", COLUMNS)
    other = st.Feature("avg_7d", st.Float32, column="avg 7 d")
    changes = engine.apply([view(other, *FEATURES[1:])])
    [(kind, detail)] = [(change.kind, change.detail) for change in changes if change.what == "view v"]
    assert (kind, detail.partition("  ")[2]) == ("~", "column of avg_7d")
    assert engine.get_online_features(list(SERVED), {"id": [1, 2]}).to_dict() == SERVED
    assert engine.push("v", {"avg 7 d" if name == "7d_avg" else name: values for name, values in COLUMNS.items()}) == 2
    assert engine.views()[0]["columns"]["avg_7d"] == "avg 7 d"


@pytest.mark.parametrize("column", ["", 7, b"x", ["x"], "\ud800"])
def test_a_column_is_any_text(column: Any) -> None:
    with pytest.raises(InvalidArgument, match="feature 'x': column must be the name of a column, not "):
        st.Feature("x", st.Int64, column=column)


@given(hs.text(min_size=1))
def test_definitions_keep_the_column(column: str) -> None:
    feature = st.Feature("x", st.Int64, column=column)
    assert Feature.from_json(json.loads(json.dumps(feature.to_json()))) == feature
    assert (feature.source_column, st.Feature("x", st.Int64).source_column) == (column, "x")


def test_definitions_of_older_stores_have_no_column() -> None:
    document = st.Feature("x", st.Int64).to_json()
    del document["column"]
    assert Feature.from_json(document) == st.Feature("x", st.Int64)
