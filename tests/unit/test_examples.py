"""apply tries a model on rows made of what its graph knows: categories, vocabularies, tables, thresholds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder
from sklearn.tree import DecisionTreeClassifier

import shorttail as st
from shorttail.errors import Internal, InvalidArgument
from shorttail.models.buffers import Buffer
from shorttail.models.examples import Examples
from shorttail.models.vocabulary import read_feeds

FLOAT, INT32, INT64, STRING = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.STRING
TABLE = pd.DataFrame(
    {"country": ["DE", "FR", "US"] * 20, "day": [105, 106, 107] * 20, "amount": np.linspace(0, 1, 60, dtype="f4")}
)
LABELS = np.arange(60) % 2
TYPES: dict[str, Any] = {"country": StringTensorType, "day": Int64TensorType, "amount": FloatTensorType}
VIEW = st.FeatureView(
    "v",
    entity=st.Entity("u", keys={"id": st.Int64}),
    features=[st.Feature("country", st.String), st.Feature("day", st.Int64), st.Feature("amount", st.Float32)],
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([VIEW])
        engine.push("v", {"id": list(range(60)), **{name: TABLE[name].tolist() for name in TABLE}})
        yield engine


def graph(
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, Any]],
    constants: dict[str, Any] | None = None,
) -> bytes:
    """Return the bytes of a model. inputs, outputs: name -> (element type, shape)."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [value(name, *kind) for name, kind in inputs.items()],
        [value(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def ml(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(op_type, inputs, outputs, domain="ai.onnx.ml", **attributes)


@pytest.mark.parametrize(
    ("encoder", "columns"),
    [
        (OneHotEncoder(), ["country"]),
        (OneHotEncoder(), ["day"]),
        (OneHotEncoder(), ["country", "day"]),
        (OneHotEncoder(drop="first"), ["country"]),
        (OrdinalEncoder(), ["country"]),
        (OrdinalEncoder(), ["day"]),
        (TargetEncoder(), ["country"]),
        (make_pipeline(SimpleImputer(strategy="most_frequent", missing_values="nan"), OneHotEncoder()), ["country"]),
    ],
    ids=["one-hot texts", "one-hot integers", "one-hot both", "drop", "ordinal", "ordinal day", "target", "imputer"],
)
@pytest.mark.parametrize("classifier", [LogisticRegression(), DecisionTreeClassifier(max_depth=3)], ids=["lr", "tree"])
def test_pipelines_whose_encoders_refuse_other_values_are_applied(
    engine: st.Engine, tmp_path: Path, encoder: Any, columns: list[str], classifier: Any
) -> None:
    fitted = make_pipeline(make_column_transformer((encoder, columns), ("passthrough", ["amount"])), classifier)
    fitted.fit(TABLE, LABELS)
    kinds = [(name, TYPES[name]([None, 1])) for name in TABLE]
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(fitted, initial_types=kinds, options={"zipmap": False}).SerializeToString())
    names = [value.name for value in onnx.load(path).graph.input]
    changes = engine.apply([st.Model("m", str(path), {name: [f"v:{name}"] for name in names})])
    assert changes[0].kind == "+"
    assert not any("no example of it" in change.detail for change in changes), changes
    answer = engine.predict("m", {"id": list(range(60))}).outputs["probabilities"]
    np.testing.assert_allclose(answer, fitted.predict_proba(TABLE), atol=1e-5)
    assert 512 in engine.plan_for_model("m").runner.measured_us


def test_texts_for_a_vectorizer_have_its_words(engine: st.Engine, tmp_path: Path) -> None:
    fitted = make_pipeline(TfidfVectorizer(), LogisticRegression())
    fitted.fit(["the cat sat", "a dog ran", "the missing dog"] * 5, np.arange(15) % 2)
    made = to_onnx(fitted, initial_types=[("text", StringTensorType([None, 1]))], options={"zipmap": False})
    (feed,) = read_feeds(made.SerializeToString(), {"text": 1})["text"]
    assert {"cat", "dog", "missing", "sat"} <= set(feed.examples())
    assert feed.missing_texts() == [], "a word of a text does not stand for a missing text"


FEEDS: dict[str, tuple[list[Any], Any, int, dict[str, Any], list[Any]]] = {
    # name -> (nodes, element type of x, its width, constants, the values known of each column)
    "concat and split": (
        [
            helper.make_node("Concat", ["x", "x"], ["xx"], axis=1),
            helper.make_node("Split", ["xx", "sizes"], ["a", "b"], axis=1),
            ml("OneHotEncoder", ["a"], ["y"], cats_strings=["p"], zeros=0),
            ml("LabelEncoder", ["b"], ["z"], keys_strings=["q", "r"], values_int64s=[0, 1]),
        ],
        STRING,
        2,
        {"sizes": np.array([1, 3])},
        [["p"], ["q", "r"]],
    ),
    "slice": (
        [
            helper.make_node("Slice", ["x", "begin", "end", "axis"], ["a"]),
            ml("OneHotEncoder", ["a"], ["y"], cats_int64s=[7, 9], zeros=0),
        ],
        INT64,
        3,
        {"begin": np.array([1]), "end": np.array([2]), "axis": np.array([1])},
        [[], [7, 9], []],
    ),
    "extractor, reshape and cast": (
        [
            ml("ArrayFeatureExtractor", ["x", "one"], ["a"]),
            helper.make_node("Reshape", ["a", "flat"], ["b"]),
            helper.make_node("Cast", ["b"], ["c"], to=INT64),
            helper.make_node("Gather", ["table", "c"], ["y"]),
        ],
        FLOAT,
        2,
        {"one": np.array([1]), "flat": np.array([-1]), "table": np.ones((3, 2), "f4")},
        [[], [0, 1, 2]],
    ),
    "ids that begin at 100": (
        [
            helper.make_node("Sub", ["x", "first"], ["a"]),
            helper.make_node("Gather", ["table", "a"], ["y"]),
        ],
        INT64,
        1,
        {"first": np.array(100), "table": np.ones((4, 2), "f4")},
        [[100, 101, 102, 103]],
    ),
    "equal to a constant": (
        [helper.make_node("Equal", ["x", "c"], ["y"])],
        INT64,
        1,
        {"c": np.array([[3, 5]])},
        [[3, 5]],
    ),
    "mapper": (
        [ml("CategoryMapper", ["x"], ["y"], cats_strings=["a", "b"], cats_int64s=[1, 2])],
        STRING,
        1,
        {},
        [["a", "b", 1, 2]],
    ),
    "thresholds": (
        [
            ml(
                "TreeEnsembleRegressor",
                ["x"],
                ["y"],
                nodes_treeids=[0, 0, 0],
                nodes_nodeids=[0, 1, 2],
                nodes_featureids=[1, 0, 0],
                nodes_values=[2.5, 0.0, 0.0],
                nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
                nodes_truenodeids=[1, 0, 0],
                nodes_falsenodeids=[2, 0, 0],
                target_treeids=[0, 0],
                target_nodeids=[1, 2],
                target_ids=[0, 0],
                target_weights=[1.0, 2.0],
                n_targets=1,
            )
        ],
        FLOAT,
        2,
        {},
        [[], [2.5]],
    ),
    "arithmetic is not followed": (
        [
            helper.make_node("Mul", ["x", "two"], ["a"]),
            helper.make_node("Gather", ["table", "a"], ["y"]),
        ],
        INT64,
        1,
        {"two": np.array([[2]]), "table": np.ones((9, 2), "f4")},
        [[]],
    ),
}


@pytest.mark.parametrize("name", FEEDS)
def test_what_a_column_feeds_is_found(name: str) -> None:
    nodes, kind, width, constants, expected = FEEDS[name]
    made = graph(nodes, {"x": (kind, [None, width])}, {"y": (FLOAT, None)}, constants)
    feeds = read_feeds(made, {"x": width})["x"]
    assert [sorted(map(str, feed.examples())) for feed in feeds] == [sorted(map(str, known)) for known in expected]


def test_a_column_that_no_node_reads_is_unused_and_one_that_is_returned_is_opaque() -> None:
    made = graph(
        [helper.make_node("Identity", ["a"], ["y"])],
        {"a": (STRING, [None, 1]), "b": (STRING, [None, 1])},
        {"y": (STRING, [None, 1])},
    )
    feeds = read_feeds(made, {"a": 1, "b": 1})
    assert [feeds[name][0].is_unused for name in "ab"] == [False, True]
    assert feeds["a"][0].opaque
    assert read_feeds(b"\xff\xff", {"a": 2})["a"][1].opaque, "of a damaged file nothing is known"


def test_a_value_must_be_in_every_vocabulary_that_refuses_others() -> None:
    nodes = [
        ml("OneHotEncoder", ["x"], ["y"], cats_strings=["a", "b", "c"], zeros=0),
        ml("OneHotEncoder", ["x"], ["z"], cats_strings=["b", "c", "d"], zeros=0),
        ml("LabelEncoder", ["x"], ["w"], keys_strings=["e", "c"], values_int64s=[0, 1]),
    ]
    made = graph(nodes, {"x": (STRING, [None, 1])}, {"y": (FLOAT, None)})
    assert sorted(read_feeds(made, {"x": 1})["x"][0].examples()) == ["b", "c"]


def test_examples_of_a_large_table_stay_within_it_and_vary() -> None:
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    made = graph(nodes, {"x": (INT32, [None])}, {"y": (FLOAT, None)}, {"table": np.ones((1_000_000, 1), "f4")})
    rows = Examples(["x"], [Buffer(np.dtype(np.int32), None)], made)(500, np.random.default_rng(0))[0]
    assert rows.min() >= 0
    assert 500_000 < rows.max() < 1_000_000
    assert len(set(rows.tolist())) > 300


def hidden_vocabulary(path: Path, zeros: int = 0) -> Path:
    """A model that takes only "GOLD" after a node that is not followed, and returns a matrix."""
    nodes = [
        ml("LabelEncoder", ["x"], ["code"], keys_strings=["a"], values_strings=["gold"], default_string="tin"),
        ml("OneHotEncoder", ["code"], ["encoded"], cats_strings=["never"], zeros=zeros),
        helper.make_node("Reshape", ["encoded", "shape"], ["y"]),
    ]
    made = graph(nodes, {"x": (STRING, [None, 1])}, {"y": (FLOAT, [None, 1])}, {"shape": np.array([-1, 1])})
    path.write_bytes(made)
    return path


def test_a_model_that_refuses_every_example_is_applied_with_a_warning(
    engine: st.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = st.Model("m", str(hidden_vocabulary(tmp_path / "m.onnx")), ["request:tier"])
    new, warning = engine.apply([model])
    assert (new.kind, warning.kind, warning.what) == ("+", "!", "model m")
    assert "no example of it could run (the model failed: OneHotEncoder node" in warning.detail
    assert "Unknown Category" in warning.detail
    with caplog.at_level(logging.WARNING), pytest.raises(Internal, match="Unknown Category"):
        engine.predict("m", {"tier": "a"})
    assert "model 'm' version 1 serves, but no example of it could run" in caplog.text
    assert engine.plan_for_model("m").runner.loop_rows_max == 0, (
        "nobody knows how long it takes, so it never runs on an event loop"
    )
    assert [change.kind for change in engine.apply([model])] == ["="]


@pytest.mark.parametrize(
    ("node", "constant", "message"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones((3, 1), "f4"), "MatMul node: "),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), np.ones((3, 1), "f4"), "Gemm node: "),
        (ml("ArrayFeatureExtractor", ["x", "w"], ["y"]), np.array([5]), "index is out of range"),
    ],
    ids=["matmul", "gemm", "extractor"],
)
def test_a_model_that_no_values_could_run_is_refused(
    engine: st.Engine, tmp_path: Path, node: Any, constant: Any, message: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(graph([node], {"x": (FLOAT, [None, None])}, {"y": (FLOAT, None)}, {"w": constant}))
    with pytest.raises(Internal, match=message):
        engine.apply([st.Model("m", str(path), ["request:a", "request:b"])])
    assert "m" not in engine.store.catalog.models


def test_the_example_that_the_graph_does_not_give_is_found_by_trying(engine: st.Engine, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["a"]),
        ml("OneHotEncoder", ["a"], ["b"], cats_int64s=[1], zeros=0),
        helper.make_node("Reshape", ["b", "shape"], ["y"]),
    ]
    constants = {"one": np.array([[1]]), "shape": np.array([-1, 1])}
    (tmp_path / "m.onnx").write_bytes(graph(nodes, {"x": (INT64, [None, 1])}, {"y": (FLOAT, [None, 1])}, constants))
    changes = engine.apply([st.Model("m", str(tmp_path / "m.onnx"), ["request:n"])])
    assert [change.kind for change in changes] == ["+"]


def test_padding_takes_values_that_the_model_knows(engine: st.Engine, tmp_path: Path) -> None:
    nodes = [
        ml("OneHotEncoder", ["x"], ["b"], cats_int64s=[5, 6], zeros=0),
        helper.make_node("Reshape", ["b", "shape"], ["y"]),
    ]
    made = graph(nodes, {"x": (INT64, [4, 1])}, {"y": (FLOAT, [4, 2])}, {"shape": np.array([4, 2])})
    (tmp_path / "m.onnx").write_bytes(made)
    engine.apply([st.Model("m", str(tmp_path / "m.onnx"), ["request:n"])])
    assert engine.predict("m", {"n": [5, 6, 6, 5, 6]}).outputs["y"].tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]


def test_an_output_that_does_not_fit_is_refused_also_after_failed_examples(engine: st.Engine, tmp_path: Path) -> None:
    nodes = [
        ml("OneHotEncoder", ["x"], ["b"], cats_int64s=[5], zeros=0),
        helper.make_node("ReduceSum", ["b"], ["y"], keepdims=0),
    ]
    (tmp_path / "m.onnx").write_bytes(graph(nodes, {"x": (INT64, [None, 1])}, {"y": (FLOAT, []), "b": (FLOAT, None)}))
    with pytest.raises(InvalidArgument, match=r"output 'y' has the shape \[\] .* name the others: outputs=\['b'\]"):
        engine.apply([st.Model("m", str(tmp_path / "m.onnx"), ["request:n"])])
