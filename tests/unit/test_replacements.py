"""What is fed where a stored value or a request's text is missing: the text that the file has for it, a default, what
the model says, or nothing: such rows are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import StringTensorType
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

import shorttail as st
from shorttail.define.catalog import Catalog
from shorttail.errors import InvalidArgument
from shorttail.registry import versions as registry

USER = st.Entity("user", keys={"user_id": st.Int64})


def features(**defaults: Any) -> st.FeatureView:
    return st.FeatureView(
        "stats",
        entity=USER,
        ttl="1h",
        features=[
            st.Feature("tier", st.String, default=defaults.get("tier")),
            st.Feature("visits", st.Int64, default=defaults.get("visits")),
            st.Feature("small", st.Int32, default=defaults.get("small")),
            st.Feature("seen", st.Timestamp, default=defaults.get("seen")),
            st.Feature("new", st.Bool, default=defaults.get("new")),
            st.Feature("age", st.Float32, default=defaults.get("age")),
        ],
    )


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([features()])
        engine.push(
            "stats",
            {
                "user_id": [1, 2],
                "tier": ["gold", None],
                "visits": [5, None],
                "small": [6, None],
                "seen": [7, None],
                "new": [True, None],
                "age": [30.0, None],
            },
        )
        yield engine


def save(path: Path, nodes: list[Any], inputs: dict[str, int], outputs: dict[str, int], **constants: Any) -> Path:
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [value(name, kind, [None, 1]) for name, kind in inputs.items()],
        [value(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save_model(helper.make_model(made, opset_imports=opsets, ir_version=8), path)
    return path


def encoder(path: Path, *known: str) -> str:
    """Save a model that returns the number of a tier among those known, -1 for others."""
    node = helper.make_node(
        "LabelEncoder",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        keys_strings=list(known),
        values_int64s=list(range(len(known))),
        default_int64=-1,
    )
    return str(save(path, [node], {"x": TensorProto.STRING}, {"y": TensorProto.INT64}))


def returned(path: Path, kind: int) -> str:
    """Save a model that returns what it gets."""
    return str(save(path, [helper.make_node("Identity", ["x"], ["y"])], {"x": kind}, {"y": kind}))


def y_of(engine: st.Engine, request: dict[str, Any]) -> list[Any]:
    values: list[Any] = engine.predict("m", request).outputs["y"].ravel().tolist()
    return values


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "", "missing"])
def test_the_only_text_for_a_missing_value_in_the_vocabulary_is_fed(
    engine: st.Engine, tmp_path: Path, text: str
) -> None:
    path = encoder(tmp_path / "m.onnx", "gold", text, "tin")
    engine.apply([st.Model("m", path, ["stats:tier"])])
    assert y_of(engine, {"user_id": [1, 2, 99, None]}) == [0, 1, 1, 1]
    assert engine.store.catalog.models["m"].version().replacements == {"stats:tier": text}
    engine.apply([st.Model("m", path, ["request:tier"])])
    for nothing in (None, float("nan")):
        assert y_of(engine, {"tier": ["gold", nothing]}) == [0, 1]
    assert Catalog.from_json(engine.store.catalog.to_json()) == engine.store.catalog


def test_a_stale_text_is_missing_too(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", encoder(tmp_path / "m.onnx", "gold", "nan"), ["stats:tier"])])
    others = {name: [None] for name in ("visits", "small", "seen", "new", "age")}
    engine.push("stats", {"user_id": [3], "tier": ["gold"], "event_time": [np.datetime64("2020-01-01")], **others})
    assert y_of(engine, {"user_id": [1, 3]}) == [0, 1]


@pytest.mark.parametrize("reference", ["stats:tier", "request:tier"])
def test_of_several_texts_the_model_says_which(engine: st.Engine, tmp_path: Path, reference: str) -> None:
    path = encoder(tmp_path / "m.onnx", "gold", "nan", "missing")
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([st.Model("m", path, [reference])])
    assert caught.value.message == (
        f"model 'm': {reference} feeds a vocabulary with 'nan' and 'missing'; say which of them stands for a missing"
        f" value: missing={{'{reference}': 'nan'}}"
    )
    request = {"user_id": [1, 2]} if reference == "stats:tier" else {"tier": ["gold", None]}
    for name in (reference, "tier"):
        for text, number in (("nan", 1), ("missing", 2), ("gold", 0), ("other", -1)):
            engine.apply([st.Model("m", path, [reference], missing={name: text})])
            assert y_of(engine, request) == [0, number]


@pytest.mark.parametrize("kept", ["encoder", "identity", "normalizer"])
def test_without_such_a_text_a_request_without_the_value_is_refused(
    engine: st.Engine, tmp_path: Path, kept: str
) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["texts"]),
        helper.make_node("StringNormalizer", ["texts"], ["y"], case_change_action="LOWER", locale="C"),
    ]
    path = {
        "encoder": lambda: encoder(tmp_path / "m.onnx", "gold", "tin"),
        "identity": lambda: returned(tmp_path / "m.onnx", TensorProto.STRING),
        "normalizer": lambda: str(
            save(tmp_path / "m.onnx", nodes, {"x": TensorProto.STRING}, {"y": TensorProto.STRING}, flat=[-1])
        ),
    }[kept]()
    changes = engine.apply([st.Model("m", path, ["request:tier"])])
    assert [change.kind for change in changes] == ["+"]
    with pytest.raises(InvalidArgument, match="column 'tier' takes String; got a missing value"):
        engine.predict("m", {"tier": None})
    *_, warning = engine.apply([st.Model("m", path, ["stats:tier"])])
    assert warning.kind == "!"
    assert warning.detail == (
        "rows in which stats:tier is missing in the store are refused; to take them, give the feature a default, or the"
        " model missing={'stats:tier': ...}"
    )
    assert y_of(engine, {"user_id": 1})[0] in (0, "gold")
    for users, row in ((2, 0), ([1, 99], 1), ([1, 1, None], 2)):
        with pytest.raises(InvalidArgument, match=rf"stats:tier has no value at row {row} .*missing={{'stats:tier'"):
            engine.predict("m", {"user_id": users})
    assert engine.get_online_features(["stats:tier"], {"user_id": [1, 2]}).to_dict()["stats:tier"] == ["gold", None]


def test_a_default_of_the_feature_stands_before_the_vocabulary_and_after_the_model(
    engine: st.Engine, tmp_path: Path
) -> None:
    path = encoder(tmp_path / "m.onnx", "gold", "nan", "missing")
    engine.apply([features(tier="gold"), st.Model("m", path, ["stats:tier"])])
    assert y_of(engine, {"user_id": [2, 99]}) == [0, 0]
    engine.apply([st.Model("m", path, ["stats:tier"], missing={"tier": "missing"})])
    assert y_of(engine, {"user_id": [2, 99]}) == [2, 2]


def test_a_default_that_is_dropped_later_is_kept_until_that_is_accepted(engine: st.Engine, tmp_path: Path) -> None:
    model = st.Model("m", returned(tmp_path / "m.onnx", TensorProto.INT64), ["stats:visits"])
    engine.apply([features(visits=0), model])
    assert y_of(engine, {"user_id": [1, 2]}) == [5, 0]
    engine.apply([features()])
    assert y_of(engine, {"user_id": [1, 2]}) == [5, 0]
    engine.apply([features()], accept=True)
    with pytest.raises(InvalidArgument, match="stats:visits has no value at row 1"):
        engine.predict("m", {"user_id": [1, 2]})


@pytest.mark.parametrize(
    ("feature", "kind", "value"),
    [
        ("visits", TensorProto.INT64, 5),
        ("small", TensorProto.INT32, 6),
        ("small", TensorProto.INT64, 6),
        ("seen", TensorProto.INT64, 7),
        ("new", TensorProto.INT64, 1),
        ("new", TensorProto.INT32, 1),
    ],
)
def test_a_missing_integer_is_refused_or_replaced_and_never_0(
    engine: st.Engine, tmp_path: Path, feature: str, kind: int, value: int
) -> None:
    path, reference = returned(tmp_path / "m.onnx", kind), f"stats:{feature}"
    new, warning = engine.apply([st.Model("m", path, [reference])])
    assert (new.kind, warning.kind) == ("+", "!")
    assert y_of(engine, {"user_id": [1, 1]}) == [value, value]
    for missing in (2, 99):
        with pytest.raises(InvalidArgument, match=f"model 'm': {reference} has no value at row 1"):
            engine.predict("m", {"user_id": [1, missing]})
    replacement = True if feature == "new" else -1
    engine.apply([st.Model("m", path, [reference], missing={feature: replacement})])
    assert y_of(engine, {"user_id": [1, 2, 99]}) == [value, int(replacement), int(replacement)]
    engine.apply([features(**{feature: False if feature == "new" else 3}), st.Model("m", path, [reference])])
    assert y_of(engine, {"user_id": [1, 2, 99]}) == [value, *[0 if feature == "new" else 3] * 2]


def test_a_stored_bool_of_a_bool_input_needs_a_replacement(engine: st.Engine, tmp_path: Path) -> None:
    path = returned(tmp_path / "m.onnx", TensorProto.BOOL)
    with pytest.raises(
        InvalidArgument, match="stats:new feeds the bool input 'x', which has no value that says missing"
    ):
        engine.apply([st.Model("m", path, ["stats:new"])])
    engine.apply([st.Model("m", path, ["stats:new"], missing={"stats:new": True})])
    assert y_of(engine, {"user_id": [1, 2, 99]}) == [True, True, True]


@pytest.mark.parametrize("feature", ["visits", "small", "seen", "new", "age"])
def test_in_a_float_input_what_is_missing_is_nan_or_replaced(engine: st.Engine, tmp_path: Path, feature: str) -> None:
    path, reference = returned(tmp_path / "m.onnx", TensorProto.FLOAT), f"stats:{feature}"
    assert [change.kind for change in engine.apply([st.Model("m", path, [reference])])] == ["+"]
    assert np.isnan(y_of(engine, {"user_id": [2, 99]})).all()
    engine.apply([st.Model("m", path, [reference], missing={reference: 1})])
    assert y_of(engine, {"user_id": [2, 99]}) == [1, 1]


def test_a_column_that_the_graph_does_not_read_may_be_missing(engine: st.Engine, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    value = helper.make_tensor_value_info
    kinds = {"a": TensorProto.FLOAT, "b": TensorProto.STRING, "c": TensorProto.INT64}
    made = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["y"])],
        "g",
        [value(name, kind, [None, 1]) for name, kind in kinds.items()],
        [value("y", TensorProto.FLOAT, [None, 1])],
    )
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    inputs = {"a": ["stats:age"], "b": ["stats:tier"], "c": ["stats:visits"]}
    assert [change.kind for change in engine.apply([st.Model("m", str(path), inputs)])] == ["+"]
    assert y_of(engine, {"user_id": 1}) == [30]
    assert np.isnan(y_of(engine, {"user_id": [2, 99]})).all()


@pytest.mark.parametrize("imputer", [None, "most_frequent", "constant"])
def test_pipelines_answer_for_missing_texts_as_scikit_learn_does(
    engine: st.Engine, tmp_path: Path, imputer: str | None
) -> None:
    tiers = pd.DataFrame({"tier": ["gold", "tin", "tin", "nan"] * 10})
    steps: list[Any] = [OneHotEncoder() if imputer else OrdinalEncoder(), LogisticRegression()]
    if imputer:
        fill = {"fill_value": "missing"} if imputer == "constant" else {}
        steps.insert(0, SimpleImputer(strategy=imputer, missing_values="nan", **fill))
    fitted = make_pipeline(*steps).fit(tiers, np.arange(40) % 4 == 3)
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(fitted, initial_types=[("tier", StringTensorType([None, 1]))]).SerializeToString())
    engine.apply([st.Model("m", str(path), ["stats:tier"])])
    got = engine.predict("m", {"user_id": [1, 2, 99]}).outputs["output_probability"]
    expected = fitted.predict_proba(pd.DataFrame({"tier": ["gold", "nan", "nan"]}))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_older_version_without_replacements_refuses_until_it_is_applied_again(
    engine: st.Engine, tmp_path: Path
) -> None:
    model = st.Model("m", encoder(tmp_path / "m.onnx", "gold", "nan"), ["stats:tier"])
    engine.apply([model])
    with engine.store.edit_catalog() as catalog:
        document = json.loads(catalog.to_json())
        for version in document["models"]["m"]["versions"].values():
            del version["replacements"]
        catalog.models.update(Catalog.from_json(json.dumps(document).encode()).models)
    engine.store.refresh()
    with st.Engine.open(engine.store.path) as other, pytest.raises(InvalidArgument, match="stats:tier has no value"):
        other.predict("m", {"user_id": [2]})
    changes = engine.apply([model])
    assert [change.detail for change in changes] == ["version 1 -> 2: other values for what is missing"]
    assert y_of(engine, {"user_id": [1, 2]}) == [0, 1]


@pytest.mark.parametrize(
    ("columns", "missing", "message"),
    [
        (["stats:tier"], {"tiers": "x"}, "missing names 'tiers', which is not one of its columns: stats:tier"),
        (
            ["stats:tier", "request:tier"],
            {"tier": "x"},
            "missing names 'tier', which is stats:tier and request:tier; write one of these",
        ),
        (["stats:tier", "request:a"], {"tier": "x", "stats:tier": "y"}, "missing names stats:tier twice"),
        (["stats:tier", "request:a"], {"tier": 3}, "missing: column 'stats:tier' takes String; got 3 (int)"),
        (["stats:tier", "request:a"], {"tier": None}, "missing: column 'stats:tier' needs a value, not None"),
    ],
)
def test_a_wrong_name_or_value_is_refused(
    engine: st.Engine, tmp_path: Path, columns: list[str], missing: Any, message: str
) -> None:
    path = tmp_path / "m.onnx"
    node = helper.make_node("Identity", ["x"], ["y"])
    value = helper.make_tensor_value_info
    tensors = [[value(name, TensorProto.STRING, [None, len(columns)])] for name in "xy"]
    made = helper.make_graph([node], "g", *tensors)
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([st.Model("m", str(path), columns, missing=missing)])
    assert caught.value.message == f"model 'm': {message}"


def test_names_that_both_kinds_of_columns_have_are_told_apart(engine: st.Engine, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    value = helper.make_tensor_value_info
    tensors = [[value(name, TensorProto.STRING, [None, 2])] for name in "xy"]
    made = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *tensors)
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    missing = {"stats:tier": "stored", "request:tier": "asked"}
    engine.apply([st.Model("m", str(path), ["stats:tier", "request:tier"], missing=missing)])
    assert y_of(engine, {"user_id": 99, "tier": None}) == ["stored", "asked"]
    assert registry.describe(engine.store.catalog, "m")["missing"] == missing
    assert Catalog.from_json(engine.store.catalog.to_json()) == engine.store.catalog


def test_functions_get_the_replacement_of_their_arguments(engine: st.Engine, tmp_path: Path) -> None:
    @st.on_demand
    def doubled(visits: st.Int64) -> st.Float32:  # type: ignore[valid-type]
        return visits * 2.0

    path = returned(tmp_path / "m.onnx", TensorProto.FLOAT)
    engine.apply([st.Model("m", path, [doubled("stats:visits")], missing={"visits": -1})])
    assert y_of(engine, {"user_id": [1, 2, 99]}) == [10, -2, -2]


def test_an_entity_without_a_row_and_one_with_it_in_a_list(engine: st.Engine, tmp_path: Path) -> None:
    """The answer of a row does not depend on whether another row of the batch has a value."""
    engine.apply([st.Model("m", encoder(tmp_path / "m.onnx", "gold", "nan"), ["stats:tier"])])
    alone = [y_of(engine, {"user_id": user})[0] for user in (1, 2, 99)]
    assert y_of(engine, {"user_id": [1, 2, 99]}) == alone == [0, 1, 1]
