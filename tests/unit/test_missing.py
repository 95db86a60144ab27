"""A missing value in a request column is refused, becomes NaN, or is replaced by the value that the model gives."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import shorttail as st
from shorttail._native import wire
from shorttail.client.columns import encode_columns, pack_request
from shorttail.define.catalog import Catalog
from shorttail.errors import InvalidArgument
from shorttail.registry import versions as registry
from shorttail.results import Status

USER = st.Entity("user", keys={"user_id": st.Int64})
STATS = st.FeatureView("stats", entity=USER, features=[st.Feature("age", st.Float32)])
INPUTS: dict[str, Any] = {  # input -> (type, width, columns)
    "numbers": (TensorProto.FLOAT, 2, ["stats:age", "request:amount"]),
    "visits": (TensorProto.INT64, 1, ["request:visits"]),
    "small": (TensorProto.INT32, 1, ["request:small"]),
    "tier": (TensorProto.STRING, 1, ["request:tier"]),
    "new": (TensorProto.BOOL, 1, ["request:new"]),
    "taste": (TensorProto.FLOAT, 3, ["request:taste"]),
}
REQUEST = {"user_id": 1, "amount": 2.5, "visits": 3, "small": 4, "tier": "gold", "new": True, "taste": [1.0, 2.0, 3.0]}
INSTEAD = {"amount": 0.25, "visits": -1, "small": -2.0, "tier": "none", "new": 0, "taste": [0, 0.5, 1]}
KEPT = {"amount": 0.25, "visits": -1, "small": -2, "tier": "none", "new": False, "taste": [0.0, 0.5, 1.0]}
NOTHING = [None, math.nan, np.datetime64("NaT"), np.ma.masked]


def model(tmp_path: Path, **options: Any) -> st.Model:
    """Return a model that returns its inputs as its outputs."""
    value = helper.make_tensor_value_info
    path = tmp_path / "m.onnx"
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in INPUTS],
        "identity",
        [value(name, kind, [None, width]) for name, (kind, width, _) in INPUTS.items()],
        [value(f"{name}_out", kind, [None, width]) for name, (kind, width, _) in INPUTS.items()],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return st.Model("m", str(path), {name: columns for name, (_, _, columns) in INPUTS.items()}, **options)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([USER, STATS, model(tmp_path)])
        engine.push("stats", {"user_id": [1], "age": [30.0]})
        yield engine


def by_the_wire(engine: st.Engine, request: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the request columns that a server decodes from a client's request."""
    columns = engine.plan_for_model("m").new_columns()
    head = len(pack_request(1, "predict", ["m"]))
    wire.read_columns(columns, pack_request(1, "predict", ["m", encode_columns(request)])[head:])
    return {name: columns.column(name) for name in columns.names}


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("name", ["visits", "small", "tier", "new"])
def test_integers_bools_and_strings_refuse_a_missing_value(engine: st.Engine, name: str, nothing: Any) -> None:
    message = f"column '{name}' takes .*; got a missing value at row 1: send a value, or let the model say"
    request = REQUEST | {name: [REQUEST[name], nothing]}
    for ask in (lambda: engine.predict("m", request), lambda: by_the_wire(engine, request)):
        with pytest.raises(InvalidArgument, match=message):
            ask()
    assert engine.predict("m", REQUEST).outputs["visits_out"].tolist() == [[3]]


@pytest.mark.parametrize("nothing", NOTHING)
def test_a_missing_float_or_vector_is_nan_and_a_missing_key_matches_no_row(engine: st.Engine, nothing: Any) -> None:
    answer = engine.predict("m", REQUEST | {"user_id": [1, nothing], "amount": nothing, "taste": nothing})
    np.testing.assert_array_equal(answer.outputs["numbers_out"], np.float32([[30, math.nan], [math.nan] * 2]))
    assert np.isnan(answer.outputs["taste_out"]).all()
    assert answer.statuses["stats"].tolist() == [Status.PRESENT, Status.NOT_FOUND]
    part = engine.predict("m", REQUEST | {"taste": [1.0, nothing, 3.0]})
    np.testing.assert_array_equal(part.outputs["taste_out"], np.float32([[1, math.nan, 3]]))


@pytest.mark.parametrize("nothing", NOTHING)
def test_the_model_gives_values_that_replace_missing_ones(engine: st.Engine, tmp_path: Path, nothing: Any) -> None:
    engine.apply([USER, STATS, model(tmp_path, missing=INSTEAD)])
    request = REQUEST | {name: [REQUEST[name], nothing] for name in INSTEAD if name != "taste"}
    answer = engine.predict("m", request | {"taste": [REQUEST["taste"], nothing]}).outputs
    assert answer["numbers_out"].tolist() == [[30, 2.5], [30, 0.25]]
    assert answer["visits_out"].tolist() == [[3], [-1]]
    assert answer["small_out"].tolist() == [[4], [-2]]
    assert answer["tier_out"].tolist() == [["gold"], ["none"]]
    assert answer["new_out"].tolist() == [[True], [False]]
    assert answer["taste_out"].tolist() == [[1, 2, 3], [0, 0.5, 1]]
    sent = by_the_wire(engine, request | {"taste": [REQUEST["taste"], nothing]})
    assert {name: column.tolist() for name, column in sent.items()} == {
        "user_id": [1, 1],
        "amount": [2.5, 0.25],
        "visits": [3, -1],
        "small": [4, -2],
        "tier": ["gold", "none"],
        "new": [1, 0],
        "taste": [[1, 2, 3], [0, 0.5, 1]],
    }


def test_the_replacements_belong_to_a_version(engine: st.Engine, tmp_path: Path) -> None:
    changes = engine.apply([USER, STATS, model(tmp_path, missing=INSTEAD)])
    assert [f"{change.what}: {change.detail}" for change in changes if change.kind != "="] == [
        "model m: version 1 -> 2: other values for what is missing"
    ]
    assert registry.describe(engine.store.catalog, "m")["missing"] == KEPT
    assert all(change.kind == "=" for change in engine.apply([USER, STATS, model(tmp_path, missing=KEPT)]))
    assert Catalog.from_json(engine.store.catalog.to_json()) == engine.store.catalog
    assert engine.predict("m", REQUEST | {"visits": None}).outputs["visits_out"].tolist() == [[-1]]
    registry.rollback(engine.store, "m")
    with pytest.raises(InvalidArgument, match="column 'visits' takes Int64; got a missing value"):
        engine.predict("m", REQUEST | {"visits": None})


def test_an_older_catalog_without_replacements_is_read(engine: st.Engine) -> None:
    document = json.loads(engine.store.catalog.to_json())
    for version in document["models"]["m"]["versions"].values():
        del version["model"]["missing"]
    assert Catalog.from_json(json.dumps(document).encode()) == engine.store.catalog


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"visits": 1.5}, "model 'm': missing: column 'visits' takes Int64; got 1.5 (float)"),
        ({"small": 2**31}, "model 'm': missing: column 'small' takes Int32; got 2147483648 (int)"),
        ({"tier": 1}, "model 'm': missing: column 'tier' takes String; got 1 (int)"),
        ({"amount": "0"}, "model 'm': missing: column 'amount' takes Float64; got '0' (str)"),
        ({"amount": None}, "model 'm': missing: column 'amount' needs a value, not None"),
        ({"taste": [1, 2]}, "model 'm': missing: column 'taste' takes Vector(3); got 2 numbers"),
        ({"user_id": 1}, "model 'm': missing names 'user_id', which is not one of its columns: "),
    ],
)
def test_a_replacement_of_another_type_is_refused(
    engine: st.Engine, tmp_path: Path, missing: Any, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([USER, STATS, model(tmp_path, missing=missing)])
    assert caught.value.message.startswith(message)


def test_a_canary_must_take_the_missing_values_that_the_current_version_takes(
    engine: st.Engine, tmp_path: Path
) -> None:
    engine.apply([USER, STATS, model(tmp_path, missing=INSTEAD)])
    with pytest.raises(
        InvalidArgument, match="version 1 refuses a missing value of new, small, tier, visits, for which"
    ):
        registry.set_canary(engine.store, "m", 10.0, 1)
    registry.promote(engine.store, "m", 1)
    registry.set_canary(engine.store, "m", 100.0, 2)
    assert engine.predict("m", REQUEST).version == 2
