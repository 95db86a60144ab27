"""Vectors of doubles keep their 64 bits: in requests, however they come, and in the store."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as some
from onnx import TensorProto, helper

import shorttail as st
from shorttail._native import wire
from shorttail._native.columns import Columns
from shorttail.client.columns import encode_columns, pack_request
from shorttail.define.dtypes import Vector, parse_dtype
from shorttail.define.values import as_column
from shorttail.errors import InvalidArgument
from shorttail.store.verify import verify

EPOCHS = [1_700_000_123.456, -1e300, 2.0**53 - 1]
WIDE = Vector(3, st.Float64)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        yield engine


def identity(path: Path, **inputs: int) -> str:
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs],
        "g",
        [value(name, kind, [None, 3]) for name, kind in inputs.items()],
        [value(f"{name}_out", kind, [None, 3]) for name, kind in inputs.items()],
    )
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def by_the_wire(columns: Columns, value: Any) -> Any:
    """Return the column "v" as a server decodes it from a client's request."""
    head = len(pack_request(1, "predict", ["m"]))
    wire.read_columns(columns, pack_request(1, "predict", ["m", encode_columns({"v": value})])[head:])
    return columns.column("v")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (EPOCHS, [EPOCHS]),
        ([EPOCHS, [1, 2, 2**53]], [EPOCHS, [1, 2, 2**53]]),
        (np.array(EPOCHS), [EPOCHS]),
        (np.array([EPOCHS, EPOCHS]), [EPOCHS, EPOCHS]),
        (np.array([[1.5, 2.5, 0.1]], np.float32), [np.float32([1.5, 2.5, 0.1]).tolist()]),
        (np.array([[1, 2, 2**53 - 1]]), [[1, 2, 2**53 - 1]]),
        ([EPOCHS, None], [EPOCHS, [math.nan] * 3]),
        ([[0.1, None, 1e300]], [[0.1, math.nan, 1e300]]),
        ([tuple(EPOCHS), np.array(EPOCHS)], [EPOCHS, EPOCHS]),
    ],
    ids=str,
)
def test_the_elements_stay_exact(value: Any, expected: Any) -> None:
    embedded, sent = Columns(["v"], [WIDE]), Columns(["v"], [WIDE])
    embedded.append({"v": value})
    for got in (embedded.column("v"), by_the_wire(sent, value)):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, np.array(expected, np.float64))


@given(rows=some.lists(some.lists(some.floats(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_double_is_the_same_by_every_way(rows: list[list[float]]) -> None:
    array = np.array(rows)
    for value in (rows, array):
        columns = Columns(["v"], [WIDE])
        columns.append({"v": value})
        np.testing.assert_array_equal(columns.column("v"), array)
        np.testing.assert_array_equal(by_the_wire(Columns(["v"], [WIDE]), value), array)
        np.testing.assert_array_equal(as_column(WIDE, value)[0], array)


def test_models_of_doubles_get_doubles_and_models_of_floats_floats(engine: st.Engine, tmp_path: Path) -> None:
    path = identity(tmp_path / "m.onnx", d=TensorProto.DOUBLE, f=TensorProto.FLOAT)
    engine.apply([st.Model("m", path, {"d": ["request:v"], "f": ["request:w"]})])
    plan = engine.plan_for_model("m")
    assert dict(zip(plan.names, plan.dtypes, strict=True)) == {"v": WIDE, "w": Vector(3)}
    answer = engine.predict("m", {"v": [EPOCHS, None], "w": [0.1, 0.2, 0.3]}).outputs
    np.testing.assert_array_equal(answer["d_out"], [EPOCHS, [math.nan] * 3])
    np.testing.assert_array_equal(answer["f_out"], np.float32([[0.1, 0.2, 0.3]] * 2))
    with pytest.raises(InvalidArgument, match=r"column 'v' takes Vector\(3, Float64\); got 2 numbers"):
        engine.predict("m", {"v": [1.0, 2.0], "w": [0.1, 0.2, 0.3]})


@pytest.mark.parametrize("order", [("d", "f"), ("f", "d")])
def test_a_vector_for_both_is_wide(engine: st.Engine, tmp_path: Path, order: tuple[str, str]) -> None:
    kinds = {"d": TensorProto.DOUBLE, "f": TensorProto.FLOAT}
    path = identity(tmp_path / "m.onnx", **{name: kinds[name] for name in order})
    model = st.Model("m", path, {name: ["request:v"] for name in order}, missing={"v": [1.0, 2.0, 1e9 + 1]})
    engine.apply([model])
    answer = engine.predict("m", {"v": [EPOCHS, None]}).outputs
    np.testing.assert_array_equal(answer["d_out"], [EPOCHS, [1.0, 2.0, 1e9 + 1]])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(answer["f_out"], np.array([EPOCHS, [1.0, 2.0, 1e9 + 1]]).astype(np.float32))


@pytest.mark.parametrize("kind", ["INT64", "INT32"])
def test_a_vector_for_integers_is_refused_with_what_to_write(engine: st.Engine, tmp_path: Path, kind: str) -> None:
    path = identity(tmp_path / "m.onnx", ids=getattr(TensorProto, kind))
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([st.Model("m", path, ["request:v"])])
    assert caught.value.message == (
        f"model 'm': request:v feeds all 3 columns of input 'ids', of type {kind.title()}, and a vector has floats;"
        " name the columns one by one: ['request:v_0', 'request:v_1', ...]"
    )
    engine.apply([st.Model("m", path, [f"request:v_{i}" for i in range(3)])])
    large = 2**53 + 1 if kind == "INT64" else 2**31 - 1
    answer = engine.predict("m", {"v_0": large, "v_1": 0, "v_2": -large})
    assert answer.outputs["ids_out"].tolist() == [[large, 0, -large]]


def test_vectors_of_functions_have_float32_elements() -> None:
    with pytest.raises(InvalidArgument, match="vectors of functions have Float32 elements"):

        @st.on_demand
        def first(v: WIDE) -> st.Float64:  # type: ignore[valid-type]
            return v[0]

    with pytest.raises(InvalidArgument, match=r"Vector\(3, Int64\): the elements must be Float32 or Float64"):
        st.Vector(3, st.Int64)


def stored(**default: Any) -> st.FeatureView:
    """A view of both kinds of vectors, with scalars around them."""
    return st.FeatureView(
        "v",
        entity=st.Entity("u", keys={"id": st.Int64}),
        features=[
            st.Feature("flag", st.Bool),
            st.Feature("wide", WIDE, **default),
            st.Feature("narrow", Vector(3), **default),
            st.Feature("after", st.Int64),
        ],
    )


def rows(ids: list[int], vectors: Any) -> dict[str, Any]:
    return {"id": ids, "flag": [True] * len(ids), "wide": vectors, "narrow": vectors, "after": ids}


def test_stored_vectors_of_doubles_stay_exact(engine: st.Engine, tmp_path: Path) -> None:
    path = identity(tmp_path / "m.onnx", d=TensorProto.DOUBLE, e=TensorProto.DOUBLE, f=TensorProto.FLOAT)
    inputs = {"d": ["v:wide"], "e": ["v:narrow"], "f": ["v:wide"]}
    engine.apply([stored(), st.Model("m", path, inputs)])
    engine.push("v", rows([1, 2], [EPOCHS, None]))
    answer = engine.predict("m", {"id": [1, 2, 9]}).outputs
    nothing = [math.nan] * 3
    np.testing.assert_array_equal(answer["d_out"], [EPOCHS, nothing, nothing])
    with np.errstate(over="ignore"):
        narrow = np.array([EPOCHS, nothing, nothing]).astype(np.float32)
    np.testing.assert_array_equal(answer["e_out"], narrow.astype(np.float64))
    np.testing.assert_array_equal(answer["f_out"], narrow)
    features = engine.get_online_features(["v:wide", "v:narrow", "v:after"], {"id": [1, 2]})
    assert features.feature_types["v:wide"] == "Vector(3, Float64)"
    assert features.to_arrow().column("v:wide").to_pylist() == [EPOCHS, None]
    assert features.to_arrow().column("v:after").to_pylist() == [1, 2]
    assert features.to_dict()["v:wide"] == [EPOCHS, None]


def test_stored_vectors_of_doubles_are_loaded_and_have_defaults(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([stored(default=[0.1, 1e300, 2.0**53 - 1])])
    pa.parquet.write_table(pa.table(rows(list(range(1000)), [EPOCHS] * 999 + [None])), tmp_path / "rows.parquet")
    assert engine.load("v", tmp_path / "rows.parquet") == 1000
    features = engine.get_online_features(["v:wide"], {"id": [5, 999, 1000]})
    np.testing.assert_array_equal(features.to_numpy()["v:wide"], [EPOCHS, *[[0.1, 1e300, 2.0**53 - 1]] * 2])
    assert verify(engine.store.path).problems == []


def test_the_name_of_the_type_is_read_back() -> None:
    for dtype in (Vector(7), WIDE, Vector(65_536, st.Float64)):
        assert parse_dtype(repr(dtype)) == dtype
    for name in ("Vector(3,Float64)", "Vector(3, Int64)", "Vector()", "Vector(0)", "Vector(3, Float64"):
        with pytest.raises(InvalidArgument):
            parse_dtype(name)
