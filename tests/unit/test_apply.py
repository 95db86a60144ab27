"""apply writes everything or nothing, reports the changes, and refuses models that could not serve; deploy, promote and
rollback change versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.define.collect import Definitions, collect_objects
from shorttail.errors import InvalidArgument, NotFound, ShorttailError
from shorttail.registry import versions as registry
from shorttail.registry.apply import Change, apply
from shorttail.store import ColumnBatch, Store

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING

TWO = {"a": (FLOAT, ["N"]), "b": (INT64, ["N", 1])}
TEXT = {"a": (STRING, ["N"]), "b": (FLOAT, ["N"])}

USER = st.Entity("user", keys={"user_id": st.Int64})
AGE, TXN = st.Feature("age", st.Float32), st.Feature("txn_7d", st.Int64)
TIER, TASTE = st.Feature("tier", st.String), st.Feature("taste", st.Vector(4))


def stats(*features: st.Feature, **options: Any) -> st.FeatureView:
    return st.FeatureView("stats", entity=USER, features=list(features or (AGE, TXN, TIER, TASTE)), **options)


@st.on_demand
def ratio(amount: st.Float64, txn: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return amount / max(txn, 1.0)


def save_model(path: Path, inputs: dict[str, tuple[int, list[Any]]], bias: float = 0.0) -> Path:
    """An ONNX file with these inputs (element type, shape); "score" is the sum over the first one's columns."""
    first, (kind, shape) = next(iter(inputs.items()))
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    outputs = [helper.make_tensor_value_info(f"{name}_out", kind, shape) for name, (kind, shape) in inputs.items()]
    initializers = []
    if kind == FLOAT and len(shape) == 2:
        nodes.append(helper.make_node("ReduceSum", [first, "axes"], ["sum"], keepdims=1))
        nodes.append(helper.make_node("Add", ["sum", "bias"], ["score"]))
        constants = {"axes": np.array([1], np.int64), "bias": np.array([bias], np.float32)}
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        outputs = [helper.make_tensor_value_info("score", FLOAT, [shape[0], 1])]
        nodes = nodes[len(inputs) :]
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    graph = helper.make_graph(nodes, "test", values, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "store", create=True)
    yield opened
    opened.close()


@pytest.fixture
def matrix(tmp_path: Path) -> Callable[..., Path]:
    """matrix(columns) saves a model of one float matrix with that many columns."""

    def save(columns: Any, name: str = "fraud.onnx", bias: float = 0.0) -> Path:
        return save_model(tmp_path / name, {"input": (FLOAT, ["N", columns])}, bias)

    return save


def rows(count: int) -> ColumnBatch:
    """Return rows of `stats` with all four features."""
    return ColumnBatch(
        keys=[np.arange(count, dtype=np.int64)],
        event_time_us=np.ones(count, np.int64),
        features=[
            (np.zeros(count, np.float32), None),
            (np.zeros(count, np.int64), None),
            (np.array(["gold"] * count, object), None),
            (np.zeros((count, 4), np.float32), None),
        ],
    )


def shown_id(store: Store) -> str:
    """The first digits of the id of the rows of `stats`."""
    return store.catalog.definition("stats").rows_id[:4]


def lines(changes: list[Change]) -> list[str]:
    return [f"{change.kind} {change.what}  {change.detail}".rstrip() for change in changes]


def test_apply_reports_new_unchanged_and_changed(store: Store, matrix: Callable[..., Path]) -> None:
    model = st.Model(
        "fraud", str(matrix(7)), ["stats:age", "stats:taste", "request:amount", ratio("request:amount", "stats:txn_7d")]
    )
    first = apply(store, [stats(), model])
    assert lines(first) == [
        "+ entity user  user_id Int64",
        "+ view stats  user_id -> 4 features",
        "+ model fraud  version 1: 7 columns -> score",
    ]
    assert {change.kind for change in apply(store, [stats(), model])} == {"="}

    matrix(7, bias=1.0)
    changed = apply(store, [stats(ttl="2d", description="what they did"), model])
    assert lines(changed) == [
        "= entity user  user_id Int64",
        f"~ view stats  {shown_id(store)}  answers change: ttl none -> 2d; descriptions",
        "~ model fraud  version 1 -> 2: new file",
    ]
    assert store.catalog.models["fraud"].previous == 1


def test_views_that_are_not_mentioned_stay(store: Store) -> None:
    apply(store, stats())
    apply(store, st.FeatureView("other", USER, [AGE]))
    assert list(store.catalog.views) == ["stats", "other"]


def test_a_dry_run_writes_nothing(store: Store, matrix: Callable[..., Path]) -> None:
    changes = apply(store, [stats(), st.Model("fraud", str(matrix(1)), ["stats:age"])], dry_run=True)
    assert [change.kind for change in changes] == ["+", "+", "+"]
    assert not store.catalog.views
    assert not registry.model_path(store.path, "fraud", 1).exists()


def test_an_invalid_definition_writes_nothing(store: Store, matrix: Callable[..., Path]) -> None:
    good, bad = st.Model("good", str(matrix(1)), ["stats:age"]), st.Model("bad", str(matrix(1)), ["stats:ages"])
    with pytest.raises(NotFound, match="model 'bad': feature view 'stats' has no feature 'ages'; did you mean 'age'"):
        apply(store, [stats(), good, bad])
    assert not store.catalog.views
    assert not store.catalog.models


def test_a_version_folder_is_complete(store: Store, matrix: Callable[..., Path]) -> None:
    file = matrix(2)
    apply(store, [stats(), st.Model("fraud", str(file), ["stats:age", "request:amount"])])
    path = registry.model_path(store.path, "fraud", 1)
    assert path.read_bytes() == file.read_bytes()
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["sha256"] == store.catalog.models["fraud"].version().sha256
    assert manifest["features"] == ["stats:age"]
    assert manifest["columns"] == ["stats:age", "request:amount"]


def test_a_type_is_not_narrowed_where_there_are_rows(store: Store) -> None:
    changed = stats(TXN, st.Feature("age", st.Int64), st.Feature("new", st.Bool), TASTE)
    apply(store, stats())
    store.load("stats", [rows(3)])
    with pytest.raises(InvalidArgument) as caught:
        apply(store, changed)
    assert caught.value.message == (
        "feature view 'stats': feature 'age' is Float32, and its values may not fit Int64; add a feature of another"
        " name, and remove this one"
    )
    assert store.count("stats") == 3
    store.delete("stats", [np.arange(3)])
    apply(store, changed)
    assert store.catalog.views["stats"].features[1].dtype == st.Int64


def test_a_schema_change_without_rows(store: Store) -> None:
    apply(store, stats())
    before = shown_id(store)
    line = lines(apply(store, stats(AGE)))[1]
    assert line == f"~ view stats  {before} -> {shown_id(store)}  answers change: removed txn_7d, tier, taste"


def test_new_settings_keep_rows(store: Store) -> None:
    apply(store, stats())
    store.load("stats", [rows(3)])
    apply(store, stats(st.Feature("age", st.Float32, default=1.0), TXN, TIER, TASTE, ttl="1h"))
    assert store.count("stats") == 3


def test_keys_of_a_view_that_a_stored_model_uses_do_not_change(store: Store, matrix: Callable[..., Path]) -> None:
    apply(store, [stats(), st.Model("fraud", str(matrix(1)), ["stats:age"])])
    keyed = st.FeatureView("stats", entity=st.Entity("user", keys={"user_id": st.String}), features=[AGE])
    with pytest.raises(InvalidArgument, match="model 'fraud' version 1 takes features of view 'stats', whose keys"):
        apply(store, keyed)
    assert store.catalog.views["stats"].keys == {"user_id": st.Int64}


def width_message(store: Store, path: Path, inputs: Any) -> str:
    with pytest.raises(ShorttailError) as caught:
        apply(store, [stats(), st.Model("fraud", str(path), inputs)])
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_wrong_number_of_columns_is_refused(store: Store, matrix: Callable[..., Path]) -> None:
    assert width_message(store, matrix(14), ["stats:age", "stats:txn_7d"]) == (
        "model 'fraud': fraud.onnx takes 14 columns (input 'input'), but inputs= lists 2;"
        " first: stats:age, stats:txn_7d"
    )
    assert "takes 4 columns (input 'input'), but inputs= lists 2 entries that make 5 columns" in width_message(
        store, matrix(4), ["stats:age", "stats:taste"]
    )


def test_a_request_column_alone_is_a_vector(store: Store, matrix: Callable[..., Path]) -> None:
    apply(store, st.Model("plain", str(matrix(5)), ["request:x"]))
    assert store.catalog.models["plain"].version().inputs[0].shape == (None, 5)


@pytest.mark.parametrize(
    ("signature", "inputs", "message"),
    [
        (TWO, ["stats:age", "stats:txn_7d"], "takes 2 inputs; write inputs={'a': [...], 'b': [...]}"),
        (TWO, {"a": ["stats:age"]}, "takes the inputs 'a', 'b', but inputs= names 'a'"),
        (
            {"a": (FLOAT, [1, 1]), "b": (FLOAT, [2, 1])},
            {"a": ["stats:age"], "b": ["stats:age"]},
            "the inputs of x.onnx take different numbers of rows: [1, 2]",
        ),
        ({"a": (FLOAT, ["N", 1, 1])}, {"a": ["stats:age"]}, "has 3 axes"),
        ({"a": (TensorProto.FLOAT16, ["N"])}, ["stats:age"], "is float16; supported"),
        ({"a": (FLOAT, ["N", 1])}, ["stats:tier"], "stats:tier is String, but input 'a' of x.onnx takes float"),
        ({"a": (INT64, ["N", 1])}, ["stats:age"], "stats:age is Float32, but input 'a' of x.onnx takes int64"),
        ({"a": (STRING, ["N", 1])}, ["stats:txn_7d"], "stats:txn_7d is Int64, but input 'a' of x.onnx takes string"),
        (TEXT, {"a": ["request:q"], "b": ["request:q"]}, "request:q must be String for input 'a' and Float32"),
        (TEXT, {"a": ["request:user_id"], "b": ["stats:age"]}, "request:user_id is a key of type Int64, but must be"),
        ({"a": (FLOAT, ["N", 1])}, [ratio("stats:tier", "request:x")], "'amount' is Float64, but stats:tier is String"),
        ({"a": (FLOAT, ["N", 1])}, ["nowhere:x"], "no feature view 'nowhere'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    store: Store, tmp_path: Path, signature: Any, inputs: Any, message: str
) -> None:
    assert message in width_message(store, save_model(tmp_path / "x.onnx", signature), inputs)
    assert not store.catalog.models


def test_several_inputs_of_one_column(store: Store, tmp_path: Path) -> None:
    path = save_model(tmp_path / "x.onnx", {"a": (FLOAT, ["N"]), "b": (INT64, ["N", 1]), "c": (STRING, ["N", 1])})
    inputs = {"a": ["stats:age"], "b": ["stats:txn_7d"], "c": ["stats:tier"]}
    apply(store, [stats(), st.Model("m", str(path), inputs, outputs=["c_out", "a_out"])])
    assert [tensor.name for tensor in store.catalog.models["m"].version().outputs] == ["c_out", "a_out"]
    with pytest.raises(InvalidArgument, match="has no output 'p'; its outputs: a_out, b_out, c_out"):
        apply(store, [stats(), st.Model("m", str(path), inputs, outputs=["p"])])


def test_files_that_are_not_models_are_refused(store: Store, tmp_path: Path, matrix: Callable[..., Path]) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "link.onnx").symlink_to(matrix(1))
    assert "there is no file" in width_message(store, tmp_path / "gone.onnx", ["stats:age"])
    assert "is a symbolic link" in width_message(store, tmp_path / "link.onnx", ["stats:age"])
    (tmp_path / "empty.onnx").touch()
    text = width_message(store, tmp_path / "text.onnx", ["stats:age"])
    assert text == "model 'fraud': text.onnx is no ONNX model, or damaged; give the .onnx file that the converter wrote"
    assert "model 'fraud': empty.onnx: ONNX Runtime cannot load" in width_message(
        store, tmp_path / "empty.onnx", ["stats:age"]
    )


def test_a_function_that_does_not_compile_is_refused(store: Store, matrix: Callable[..., Path]) -> None:
    pytest.importorskip("numba")

    @st.on_demand
    def broken(x: st.Float64) -> st.Float32:  # type: ignore[valid-type]
        return x.no_such_thing

    with pytest.raises(InvalidArgument, match="'broken'"):
        apply(store, st.Model("m", str(matrix(1)), [broken("request:x")]))
    assert not store.catalog.models


def test_deploy_promote_rollback(store: Store, tmp_path: Path, matrix: Callable[..., Path]) -> None:
    apply(store, [stats(), st.Model("fraud", str(matrix(1)), ["stats:age"])])
    assert registry.deploy(store, "fraud", matrix(1, "new.onnx", bias=2.0)) == 2
    assert registry.deploy(store, "fraud", tmp_path / "new.onnx") == 2, "the same file again is no new version"
    assert registry.deploy(store, "fraud", matrix(1, "newer.onnx", bias=3.0), promote=False) == 3
    assert store.catalog.models["fraud"].current == 2
    assert registry.promote(store, "fraud", 3) == 2
    assert registry.rollback(store, "fraud") == 2
    with pytest.raises(NotFound, match="model 'fraud' has no version 9; its versions: 1, 2, 3"):
        registry.promote(store, "fraud", 9)
    with pytest.raises(InvalidArgument, match="takes 2 columns"):
        registry.deploy(store, "fraud", matrix(2, "wide.onnx"))
    with pytest.raises(NotFound, match="no model 'frau'; did you mean 'fraud'"):
        registry.deploy(store, "frau", tmp_path / "new.onnx")
    assert [(v["version"], v["serving"]) for v in registry.list_versions(store.catalog)] == [
        (3, False),
        (2, True),
        (1, False),
    ]


def test_a_rollback_restores_the_old_inputs(store: Store, matrix: Callable[..., Path]) -> None:
    apply(store, [stats(), st.Model("fraud", str(matrix(1)), ["stats:age"])])
    changes = apply(store, [stats(), st.Model("fraud", str(matrix(2)), ["stats:age", "request:amount"])])
    assert lines(changes)[-1] == "~ model fraud  version 1 -> 2: new file, other inputs"
    registry.rollback(store, "fraud")
    assert store.catalog.models["fraud"].model.columns == ["stats:age"]


def test_a_version_keeps_its_definitions_while_it_may_answer(store: Store, matrix: Callable[..., Path]) -> None:
    apply(store, [stats(), st.Model("fraud", str(matrix(1)), ["stats:age"])])
    apply(store, [stats(TXN), st.Model("fraud", str(matrix(1, "b.onnx", 1.0)), ["stats:txn_7d"])])
    registry.rollback(store, "fraud")
    registry.rollback(store, "fraud")
    assert len(store.catalog.definitions) == 1
    registry.deploy(store, "fraud", matrix(1, "c.onnx", 2.0))
    assert store.catalog.definitions == {}, "version 1 is neither the current nor the previous one"
    with pytest.raises(NotFound, match="no feature 'age'"):
        registry.promote(store, "fraud", 1)


def test_an_unfinished_version_folder_is_replaced(store: Store, matrix: Callable[..., Path]) -> None:
    leftover = registry.model_path(store.path, "fraud", 1)
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half a mod")
    file = matrix(1)
    apply(store, [stats(), st.Model("fraud", str(file), ["stats:age"])])
    assert leftover.read_bytes() == file.read_bytes()


def test_another_process_sees_the_catalog(store: Store, matrix: Callable[..., Path]) -> None:
    definitions = [stats(), st.Model("fraud", str(matrix(1)), ["stats:age"])]
    apply(store, definitions)
    path = store.path
    store.close()
    again = Store.open(path)
    try:
        assert list(again.catalog.models) == ["fraud"]
        assert {change.kind for change in apply(again, definitions)} == {"="}
    finally:
        again.close()


def test_objects_and_files_give_the_same_definitions(tmp_path: Path) -> None:
    found = collect_objects({"views": (stats(),)}, tmp_path)
    assert isinstance(found, Definitions)
    assert list(found.views) == ["stats"]
