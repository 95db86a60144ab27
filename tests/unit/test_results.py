"""Results of calls: pandas and Arrow tables keep every value and type, and a repr shows values, types and statuses."""

from __future__ import annotations

import sys
from typing import Any

import msgpack
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import shorttail as st
from shorttail import protocol
from shorttail.client import calls
from shorttail.errors import Internal
from shorttail.results import Status

BIG = 2**53 + 1  # the smallest positive integer that a double cannot hold
PRESENT, NULL, NOT_FOUND, STALE = (np.uint8(status) for status in Status)
TYPES = ["Bool", "Int32", "Int64", "Float32", "Float64", "String", "Timestamp", "Vector(2)"]
ARRAYS = [
    np.array([True, False, False, False]),
    np.array([-7, 0, 0, 0], np.int32),
    np.array([BIG, 0, 0, 0]),
    np.array([0.1, np.nan, np.nan, np.nan], np.float32),
    np.array([0.1, np.nan, np.nan, np.nan]),
    np.array(["é\0", None, None, None], object),
    np.array([1_357_016_400_000_001, 0, 0, 0]),
    np.array([[1, 0.5], [np.nan] * 2, [np.nan] * 2, [np.nan] * 2], np.float32),
]
ARROW = [
    pa.bool_(),
    pa.int32(),
    pa.int64(),
    pa.float32(),
    pa.float64(),
    pa.string(),
    pa.timestamp("us", "UTC"),
    pa.list_(pa.float32(), 2),
]
PANDAS = ["boolean", "Int32", "Int64", "float32", "float64", "string", "datetime64[us, UTC]", "object"]
STATUSES = np.array([[PRESENT, NULL, NOT_FOUND, STALE]] * len(TYPES))
TIME = pd.Timestamp("2013-01-01T05:00:00.000001Z")


def features(has_default: bool = False, types: list[str] | None = TYPES) -> st.Features:
    """Return a feature of each type. The first row has a value; the others are NULL, NOT_FOUND and STALE."""
    names = [f"v:{name.lower()}" for name in TYPES]
    return st.Features(names, ARRAYS, STATUSES, [has_default] * len(TYPES), types)


def present(answer: st.Features) -> st.Features:
    """Return the same features with the status PRESENT everywhere."""
    values = [answer[name] for name in answer.feature_names]
    return st.Features(answer.feature_names, values, np.zeros_like(STATUSES), None, TYPES)


def test_arrow_keeps_every_type_and_value() -> None:
    table = features().to_arrow()
    assert table.schema.names == features().feature_names
    assert table.schema.types == ARROW
    first = [True, -7, BIG, float(np.float32(0.1)), 0.1, "é\0", TIME.to_pydatetime(), [1.0, 0.5]]
    for column, value in zip(table.columns, first, strict=True):
        assert column.to_pylist() == [value, None, None, None]
        assert column.null_count == 3
    assert pl.from_arrow(table)["v:int64"].to_list() == [BIG, None, None, None]


def test_pandas_keeps_every_type_and_value() -> None:
    frame = features().to_pandas()
    assert [str(dtype) for dtype in frame.dtypes] == PANDAS
    assert frame.isna().to_numpy().tolist() == [[False] * len(TYPES)] + [[True] * len(TYPES)] * 3
    first = frame.iloc[0].tolist()
    assert first[:3] + first[4:7] == [True, -7, BIG, 0.1, "é\0", TIME]
    assert frame["v:float32"].to_numpy()[0] == np.float32(0.1)
    vector = first[7]
    assert (vector.dtype, vector.tolist()) == (np.float32, [1.0, 0.5])
    assert frame["v:vector(2)"].tolist()[1:] == [None] * 3
    assert frame["v:int64"].astype("Int64").sum() == BIG


@pytest.mark.parametrize("has_default", [False, True])
def test_types_of_columns_do_not_depend_on_nulls(has_default: bool) -> None:
    answer = features(has_default=True) if has_default else present(features())
    assert [str(dtype) for dtype in answer.to_pandas().dtypes] == PANDAS
    assert answer.to_arrow().schema.types == ARROW


def test_a_default_is_a_value_whatever_the_status() -> None:
    names = ["v:int", "v:time", "v:text", "v:nan", "v:taste"]
    arrays = [
        np.array([5, BIG]),
        np.array([5, 0]),
        np.array(["a", "d"], object),
        np.array([1, np.nan]),
        np.ones((2, 3)),
    ]
    types = ["Int64", "Timestamp", "String", "Float64", "Vector(3)"]
    statuses = np.array([[PRESENT, NOT_FOUND]] * len(names))
    answer = st.Features(
        names, [a.astype(np.float32) if a.ndim == 2 else a for a in arrays], statuses, [True] * 5, types
    )
    table, frame = answer.to_arrow(), answer.to_pandas()
    assert [column.null_count for column in table.columns] == [0] * 5
    assert table["v:int"].to_pylist() == frame["v:int"].tolist() == [5, BIG]
    assert frame["v:time"].tolist() == [pd.Timestamp(5, unit="us", tz="UTC"), pd.Timestamp(0, unit="us", tz="UTC")]
    assert table["v:text"].to_pylist() == frame["v:text"].tolist() == ["a", "d"]
    assert np.isnan(table["v:nan"].to_pylist()[1])  # a default that is NaN stays a NaN, not a null
    assert [row.tolist() for row in frame["v:taste"]] == table["v:taste"].to_pylist() == [[1.0] * 3] * 2
    assert answer.to_dict()["v:int"] == [5, BIG]


def test_to_dict_gives_plain_python_values() -> None:
    assert features().to_dict() == {
        "v:bool": [True, None, None, None],
        "v:int32": [-7, None, None, None],
        "v:int64": [BIG, None, None, None],
        "v:float32": [float(np.float32(0.1)), None, None, None],
        "v:float64": [0.1, None, None, None],
        "v:string": ["é\0", None, None, None],
        "v:timestamp": [1_357_016_400_000_001, None, None, None],
        "v:vector(2)": [[1.0, 0.5], None, None, None],
    }
    assert features().feature_types == dict(zip(features().feature_names, TYPES, strict=True))
    assert features().statuses["v"].tolist() == [PRESENT, PRESENT, NOT_FOUND, STALE]


def test_columns_of_a_matrix_and_square_vectors() -> None:
    """The embedded engine returns columns of a shared matrix, which are not contiguous in memory."""
    for matrix in (np.arange(6).reshape(3, 2), np.arange(6, dtype=np.int32).reshape(3, 2)):
        answer = st.Features(["v:a", "v:b"], [matrix[:, 0], matrix[:, 1]], np.zeros((2, 3), np.uint8))
        assert answer.to_arrow().to_pydict() == {"v:a": [0, 2, 4], "v:b": [1, 3, 5]}
        assert answer.to_pandas().to_dict("list") == {"v:a": [0, 2, 4], "v:b": [1, 3, 5]}
    flags = np.array([[True, False], [False, True]])
    answer = st.Features(
        ["v:a", "v:b", "v:c"], [flags[:, 0], flags[:, 1], np.eye(2, dtype=np.float32)], STATUSES[:3, :2]
    )
    assert answer.to_arrow().to_pydict() == {"v:a": [True, None], "v:b": [False, None], "v:c": [[1.0, 0.0], None]}
    assert answer.to_pandas()["v:b"].tolist() == [False, pd.NA]


def test_changing_a_data_frame_does_not_change_the_result() -> None:
    answer = present(features())
    frame = answer.to_pandas()
    frame.loc[0, "v:int64"] = 1
    frame.loc[0, "v:float64"] = 1.0
    frame.loc[0, "v:bool"] = False
    frame["v:vector(2)"][0][0] = 9.0
    assert repr(answer.to_dict()) == repr(present(features()).to_dict())  # NaN is not equal to itself
    assert ARRAYS[7][0, 0] == 1


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_pandas"), ("pyarrow", "to_arrow")])
@pytest.mark.parametrize(
    "answer", [features(), st.Prediction("m", 1, {"y": np.ones(1)}, {})], ids=["features", "model"]
)
def test_a_package_that_is_missing_is_named(
    package: str, method: str, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    extra = {"pandas": "pandas", "pyarrow": "arrow"}[package]
    with pytest.raises(ImportError, match=rf"^{method} needs {package}: pip install 'shorttail\[{extra}\]'$"):
        getattr(answer, method)()


# Over the wire


def reply(**more: Any) -> Any:
    """Return a server's reply as the client receives it. Without types= it is the reply of an older server."""
    values = [array.tolist() if array.dtype == object else protocol.pack_tensor(array) for array in ARRAYS]
    statuses = [protocol.pack_tensor(row) for row in STATUSES]
    result = {"feature_names": features().feature_names, "values": values, "statuses": statuses} | more
    unpacker = protocol.new_unpacker()
    unpacker.feed(msgpack.packb(result))
    return unpacker.unpack()


def test_a_client_gives_what_the_engine_gives() -> None:
    answer = calls.read_features(reply(types=TYPES, has_default=[False] * len(TYPES)))
    assert answer.to_arrow().equals(features().to_arrow())
    pd.testing.assert_frame_equal(answer.to_pandas(), features().to_pandas())
    assert answer.feature_types == features().feature_types
    assert repr(answer) == repr(features())


def test_the_reply_of_an_older_server_is_read_without_types() -> None:
    answer = calls.read_features(reply())
    assert list(answer.feature_types.values()) == [name.replace("Timestamp", "Int64") for name in TYPES]
    table, frame = answer.to_arrow(), answer.to_pandas()
    assert table.schema.types == [pa.int64() if kind == pa.timestamp("us", "UTC") else kind for kind in ARROW]
    assert table["v:timestamp"].to_pylist() == [1_357_016_400_000_001, None, None, None]
    assert [str(dtype) for dtype in frame.dtypes] == [name.replace("datetime64[us, UTC]", "Int64") for name in PANDAS]
    assert answer.to_dict() == features().to_dict()


@pytest.mark.parametrize("types", [TYPES[1:], 7])
def test_types_that_do_not_fit_are_an_error_of_the_server(types: Any) -> None:
    with pytest.raises(Internal, match="get_online_features: the server's result is not understood"):
        calls.read_features(reply(types=types))


# Predictions

PREDICTION = st.Prediction(
    "late",
    3,
    {
        "label": np.array([1, 0, BIG]),
        "probabilities": np.array([[0.25, 0.75], [1 / 3, 2 / 3], [np.nan, np.nan]], np.float32),
        "score": np.array([[0.5], [1.5], [2.5]]),
        "is_late": np.array([True, False, True]),
        "carrier": np.array(["UA", None, "AA"], object),
        "path": np.arange(12, dtype=np.float32).reshape(3, 2, 2),
        "small": np.array([1, 2, 255], np.uint8),
    },
    {"plane": np.array([PRESENT, NOT_FOUND, NOT_FOUND]), "carrier": np.zeros(3, np.uint8)},
)


def test_a_prediction_as_a_data_frame() -> None:
    frame = PREDICTION.to_pandas()
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        "label": "Int64",
        "probabilities_0": "float32",
        "probabilities_1": "float32",
        "score": "float64",
        "is_late": "boolean",
        "carrier": "string",
        "path": "object",
        "small": "UInt8",
    }
    assert frame["label"].tolist() == [1, 0, BIG]
    np.testing.assert_array_equal(
        frame[["probabilities_0", "probabilities_1"]].to_numpy(), PREDICTION.outputs["probabilities"]
    )
    assert frame["score"].tolist() == [0.5, 1.5, 2.5]
    assert frame["carrier"].isna().tolist() == [False, True, False]
    assert frame["path"][2].tolist() == [[8, 9], [10, 11]]


def test_a_prediction_as_an_arrow_table() -> None:
    table = PREDICTION.to_arrow()
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
        "label": pa.int64(),
        "probabilities": pa.list_(pa.float32(), 2),
        "score": pa.float64(),
        "is_late": pa.bool_(),
        "carrier": pa.string(),
        "path": pa.list_(pa.list_(pa.float32(), 2), 2),
        "small": pa.uint8(),
    }
    assert table["label"].to_pylist() == [1, 0, BIG]
    assert table["probabilities"].to_pylist()[0] == [0.25, 0.75]
    assert np.isnan(table["probabilities"].to_pylist()[2]).all()
    assert table["score"].to_pylist() == [0.5, 1.5, 2.5]
    assert table["carrier"].to_pylist() == ["UA", None, "AA"]
    assert table["path"].to_pylist()[2] == [[8, 9], [10, 11]]


def test_outputs_with_the_same_column_name_are_both_kept() -> None:
    outputs = {"p": np.array([[1, 2]]), "p_1": np.array([3])}
    frame = st.Prediction("m", 1, outputs, {}).to_pandas()
    assert (list(frame.columns), frame.to_numpy().tolist()) == (["p_0", "p_1", "p_1"], [[1, 2, 3]])


# Reprs


def test_a_repr_of_features_shows_types_values_and_statuses() -> None:
    assert (
        repr(features())
        == """\
Features(4 rows)
  v:bool       Bool       True, None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:int32      Int32      -7, None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:int64      Int64      9007199254740993, None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:float32    Float32    0.1, None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:float64    Float64    0.1, None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:string     String     'é\\x00', None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:timestamp  Timestamp  2013-01-01T05:00:00.000001, None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)
  v:vector(2)  Vector(2)  [1, 0.5], None, None, None  (1 NULL, 1 NOT_FOUND, 1 STALE)"""
    )
    ages = st.Features(["stats:age"], [np.float32([20])], np.uint8([[0]]), [True], ["Float32"])
    assert repr(ages) == "Features(1 row)\n  stats:age  Float32  20"
    assert repr(st.Features(["v:a"], [np.float32([1.5])], np.uint8([[2]]), [True], ["Float32"])).endswith(
        "v:a  Float32  1.5  (1 NOT_FOUND)"  # the default
    )
    assert repr(st.Features([], [], [])) == "Features(0 rows)"


def test_a_repr_of_a_prediction_shows_values_and_the_version() -> None:
    assert (
        repr(PREDICTION)
        == """\
Prediction('late', version=3, 3 rows)
  label          int64          1, 0, 9007199254740993
  probabilities  float32[2]     [0.25, 0.75], [0.333333, 0.666667], [nan, nan]
  score          float64[1]     [0.5], [1.5], [2.5]
  is_late        bool           True, False, True
  carrier        object         'UA', None, 'AA'
  path           float32[2, 2]  [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]
  small          uint8          1, 2, 255
  statuses: plane 2 NOT_FOUND"""
    )
    ok = st.Prediction("late", 3, {"y": np.float32([0.5])}, {"plane": np.zeros(1, np.uint8)})
    assert repr(ok) == "Prediction('late', version=3, 1 row)\n  y  float32  0.5"


def test_a_repr_stays_short_for_a_large_result() -> None:
    rows, names = 10_000, [f"v:f{i}" for i in range(300)]
    values: list[Any] = [np.arange(rows) / 7] * len(names)
    values[0] = np.array(["a long text " * 100] * rows, object)
    values[1] = np.ones((rows, 512), np.float32)
    text = repr(st.Features(names, values, np.zeros((len(names), rows), np.uint8)))
    lines = text.splitlines()
    assert lines[0] == "Features(10,000 rows)"
    assert lines[1:3] == [
        "  v:f0   String       'a long text a long text…', 'a long text a long text…', …",
        "  v:f1   Vector(512)  [1, 1, 1, 1, …], [1, 1, 1, 1, …], [1, 1, 1, 1, …], …",
    ]
    assert lines[3] == "  v:f2   Float64      0, 0.142857, 0.285714, 0.428571, 0.571429, …"
    assert lines[-1] == "  … and 280 more features"
    assert len(lines) == 22
    outputs = {f"y{i}": np.zeros((rows, 40, 40)) for i in range(3)}
    text = repr(st.Prediction("m", 1, outputs, {"v": np.full(rows, 3, np.uint8)}))
    assert text.endswith("\n  statuses: v 10,000 STALE")
    assert len(text.splitlines()) == 5
    assert max(map(len, (*lines, *text.splitlines()))) <= 100
