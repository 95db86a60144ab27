"""Models of raw tensors, embedded: every type and rank, outputs of any shape, what `apply` and a request refuse; and
requests that run by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import commands
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.config import LIMITS
from shorttail.define.catalog import TensorInfo
from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.models.device import Device
from shorttail.models.load import Runner, load_runner
from shorttail.models.raw import RAW_TYPES, example_tensors, take_tensors
from shorttail.models.session import Session
from shorttail.models.settings import RunSettings
from shorttail.registry import tune
from shorttail.registry import versions as registry

Shape = Sequence[int | str | None] | None
FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
ELEMENTS = {
    "bool": TensorProto.BOOL,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": INT64,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "float16": TensorProto.FLOAT16,
    "float": FLOAT,
    "double": TensorProto.DOUBLE,
    "string": STRING,
}
Take = dict[str, tuple[int, Shape]]


def save(path: Path, nodes: list[Any], takes: Take, gives: Take, **constants: Any) -> Path:
    values = [[helper.make_tensor_value_info(n, t, s) for n, (t, s) in side.items()] for side in (takes, gives)]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph(nodes, "g", *values, weights)
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def identity(path: Path, kind: int, shape: Shape) -> Path:
    return save(path, [helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, shape)}, {"y": (kind, shape)})


def product(path: Path) -> Path:
    """Save a model of inputs whose first axes differ: c = a b, and n = the number of elements of c, of rank 0."""
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Size", ["c"], ["n"])]
    takes: Take = {"a": (FLOAT, ["i", "j"]), "b": (FLOAT, ["j", "k"])}
    return save(path, nodes, takes, {"c": (FLOAT, ["i", "k"]), "n": (INT64, [])})


def softmax(path: Path, rows: int | str) -> Path:
    """Save a model whose rows depend on each other: the softmax of x over its rows."""
    node = helper.make_node("Softmax", ["x"], ["y"], axis=0)
    return save(path, [node], {"x": (FLOAT, [rows, 2])}, {"y": (FLOAT, [rows, 2])})


def tree(path: Path, width: int | None, rows: int | None = None) -> Path:
    """Save a forest of a single tree: y = 1 where the first column is at most 0.5, else 2."""
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2], nodes_featureids=[0, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_values=[0.5, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0], nodes_hitrates=[1.0] * 3,
        nodes_missing_value_tracks_true=[0, 0, 0],
        target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[1.0, 2.0],
    )  # fmt: skip
    return save(path, [node], {"x": (FLOAT, [rows, width])}, {"y": (FLOAT, [rows, 1])})


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        yield engine


def runner_of(engine: st.Engine, name: str) -> Runner:
    runner = engine.plan_for_model(name).runner
    assert runner is not None
    return runner


def values_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if dtype.hasobject:
        return np.full(shape, "Zürich\0", object)
    return (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)


# -- what is served ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1, 2), (0,), (2, 0, 3)])
def test_every_type_and_rank(engine: st.Engine, tmp_path: Path, element: str, shape: tuple[int, ...]) -> None:
    path = identity(tmp_path / "m.onnx", ELEMENTS[element], [None] * len(shape))
    (change,) = engine.apply([st.Model("m", path=path, batching="request")])
    assert change.detail == "version 1: tensors x -> y"
    x = values_of(RAW_TYPES[element], shape)
    answer = engine.predict("m", {"x": x})
    y = answer.outputs["y"]
    assert (y.dtype, y.shape, y.tolist()) == (x.dtype, x.shape, x.tolist())
    assert (answer.version, answer.statuses) == (1, {})
    assert repr(answer).startswith("Prediction('m', version=1")


def test_first_axes_may_differ_and_outputs_need_no_rows(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=product(tmp_path / "m.onnx"))])
    for i, j, k in ((3, 2, 5), (1, 7, 1), (0, 2, 3)):
        a, b = np.ones((i, j), np.float32), np.full((j, k), 2, np.float32)
        outputs = engine.predict("m", {"b": b, "a": a}).outputs
        np.testing.assert_array_equal(outputs["c"], a @ b)
        assert (outputs["n"].shape, outputs["n"].item()) == ((), i * k)


def test_tables_need_outputs_with_common_rows(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=product(tmp_path / "m.onnx")), st.Model("s", path=softmax(tmp_path / "s", "N"))])
    square = np.ones((2, 2), np.float32)
    answer = engine.predict("m", {"a": square, "b": square})
    for method in ("to_pandas", "to_arrow"):
        said = rf"^{method}: the outputs have no common rows \(c \[2, 2\], n \[\]\); read `outputs`$"
        with pytest.raises(ValueError, match=said):
            getattr(answer, method)()
    assert engine.predict("s", {"x": square}).to_pandas().shape == (2, 2)


def test_a_model_without_inputs(engine: st.Engine, tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0])
    (change,) = engine.apply([st.Model("m", path=save(tmp_path / "m.onnx", [node], {}, {"y": (FLOAT, [2])}))])
    assert change.detail == "version 1: no inputs -> y"
    assert engine.predict("m", {}).outputs["y"].tolist() == [1.0, 2.0]
    with pytest.raises(InvalidArgument, match=r"^model 'm' takes tensors and has no input 'x'; it takes none$"):
        engine.predict("m", {"x": np.ones(1, np.float32)})


def test_only_the_outputs_that_are_named_need_be_tensors(engine: st.Engine, tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("SequenceConstruct", ["x", "x"], ["s"])]
    values = (
        [helper.make_tensor_value_info("x", FLOAT, [None])],
        [
            helper.make_tensor_value_info("y", FLOAT, [None]),
            helper.make_tensor_sequence_value_info("s", FLOAT, None),
        ],
    )
    graph = helper.make_graph(nodes, "g", *values)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m")
    with pytest.raises(InvalidArgument, match=r"output 's' of m is seq\(tensor\(float\)\); .*name others in outputs="):
        engine.apply([st.Model("m", path=tmp_path / "m")])
    engine.apply([st.Model("m", path=tmp_path / "m", outputs=["y"])])
    assert list(engine.predict("m", {"x": np.ones(2, np.float32)}).outputs) == ["y"]


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN"])
def test_types_that_no_request_carries_are_refused(engine: st.Engine, tmp_path: Path, kind: str) -> None:
    element = getattr(TensorProto, kind)
    path = save(
        tmp_path / "m.onnx", [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)], {"x": (element, [1])},
        {"y": (FLOAT, [1])},
    )  # fmt: skip
    model = onnx.load_model(str(path))
    model.opset_import[0].version = 21
    onnx.save_model(model, path)
    with pytest.raises(InvalidArgument, match=rf"^model 'm': input 'x' of m.onnx is {kind.lower()}; supported: bool"):
        engine.apply([st.Model("m", path=path)])


# -- what a request must bring --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": [[1, 2]]}, "input 'x' is float [-1, 2]; give a NumPy array, not list"),
        ({"x": np.ones((1, 2))}, "input 'x' is float [-1, 2]; got float64"),
        ({"x": np.ones((1, 2), ">f4")}, "input 'x' is float [-1, 2]; got >f4"),
        ({"x": np.full((1, 2), "a", object)}, "input 'x' is float [-1, 2]; got string"),
        ({"x": np.full((1, 2), None, object)}, "input 'x' is float [-1, 2]; got null"),
        ({"x": np.ones((1, 3), np.float32)}, "input 'x' is float [-1, 2]; got the shape [1, 3]"),
        ({"x": np.ones(2, np.float32)}, "input 'x' is float [-1, 2]; got the shape [2]"),
        ({}, "model 'm' takes tensors, and input 'x', which is float [-1, 2], is missing"),
        ({"user_id": 1}, "model 'm' takes tensors and has no input 'user_id'; its inputs: x"),
    ],
)
def test_wrong_tensors_are_refused_by_name(engine: st.Engine, tmp_path: Path, given: Any, said: str) -> None:
    engine.apply([st.Model("m", path=softmax(tmp_path / "m.onnx", "N"))])
    with pytest.raises(InvalidArgument) as caught:
        engine.predict("m", given)
    assert caught.value.message == said


def test_texts(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=identity(tmp_path / "m.onnx", STRING, [None]))])
    for texts in (np.array(["a", "b"]), np.array(["a", "b"], object)):
        assert engine.predict("m", {"x": texts}).outputs["y"].tolist() == ["a", "b"]
    for wrong, said in ((None, "null"), (1.5, "float"), (b"a", "bytes")):
        with pytest.raises(InvalidArgument, match=rf"^input 'x' is string \[-1\]; got {said}$"):
            engine.predict("m", {"x": np.array(["a", wrong], object)})
    with pytest.raises(InvalidArgument, match=r"^the model refuses this request: "):
        engine.predict("m", {"x": np.array(["\ud800"], object)})


def test_arrays_in_another_order_of_memory(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=identity(tmp_path / "m.onnx", FLOAT, [None, None]))])
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(3, 4)
    for array in (x.T, x[:, ::2], np.ma.masked_array(x, x > 3), unaligned):
        np.testing.assert_array_equal(engine.predict("m", {"x": array}).outputs["y"], np.asarray(array))


def test_an_input_without_a_shape_takes_any_and_one_of_rank_0_a_single_value(engine: st.Engine, tmp_path: Path) -> None:
    any_rank = st.Model("any", path=identity(tmp_path / "any.onnx", FLOAT, None))
    engine.apply([any_rank, st.Model("one", path=identity(tmp_path / "one.onnx", FLOAT, []))])
    for shape in ((), (3,), (1, 2, 3)):
        assert engine.predict("any", {"x": np.ones(shape, np.float32)}).outputs["y"].shape == shape
    assert engine.predict("one", {"x": np.float32(2)}).outputs["y"].item() == 2
    with pytest.raises(InvalidArgument, match=r"^input 'x' is float \[\]; got the shape \[3\]$"):
        engine.predict("one", {"x": np.ones(3, np.float32)})
    tensors = {model["name"]: model["tensors"] for model in engine.models()}
    assert tensors == {"any": {"x": "float"}, "one": {"x": "float []"}}


# -- runs that fail, and what they may cost --------------------------------------------------------------------------


def reshape(path: Path, shape: Shape = (None, None)) -> Path:
    """Save a model that makes an array of zeros of the shape that the request names."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Reshape", ["zeros", "to"], ["y"]),
    ]
    return save(path, nodes, {"shape": (INT64, [None])}, {"y": (FLOAT, shape)}, to=np.array([-1, 6]))


def test_a_request_that_the_graph_does_not_take_is_told_why(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=product(tmp_path / "m.onnx"))])
    with pytest.raises(InvalidArgument, match=r"^the model refuses this request: .*MatMul"):
        engine.predict("m", {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)})
    assert engine.predict("m", {name: np.ones((1, 1), np.float32) for name in "ab"}).outputs["c"].item() == 1


def test_an_example_that_the_graph_does_not_take_is_a_warning(
    engine: st.Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        changes = engine.apply([st.Model("m", path=reshape(tmp_path / "m.onnx"))])
    (warning,) = [change for change in changes if change.kind == "!"]
    assert "no example of it could run (the model " in warning.detail
    assert engine.predict("m", {"shape": np.array([2, 3])}).outputs["y"].tolist() == [[0.0] * 6]
    assert caplog.records == []  # it was said once, at `apply`


def test_outputs_have_a_limit(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=reshape(tmp_path / "m.onnx"))])
    most = LIMITS.raw_output_bytes // 4 // 6
    assert len(engine.predict("m", {"shape": np.array([most, 6])}).outputs["y"]) == most
    with pytest.raises(ResourceExhausted, match=rf"the outputs have \d+ bytes; at most {LIMITS.raw_output_bytes} are"):
        engine.predict("m", {"shape": np.array([most + 1, 6])})


def test_only_requests_of_known_cost_run_in_the_event_loop(engine: st.Engine, tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"fixed": [2, 3], "open": [None, 3], "any": None, "huge": [1 << 40]}
    models = [st.Model(name, path=identity(tmp_path / name, FLOAT, shape)) for name, shape in shapes.items()]
    engine.apply(models)
    assert {name: runner_of(engine, name).loop_rows_max for name in shapes} == {
        "fixed": 1,
        "open": 0,
        "any": 0,
        "huge": 0,
    }
    assert runner_of(engine, "open").cost_us(1) > 0


def test_examples_are_ones_that_fit() -> None:
    tensors = [tensor_of(name, [None, 2, None]) for name in RAW_TYPES]
    example = example_tensors(tensors)
    assert example is not None
    given = {tensor.name: array for tensor, array in zip(tensors, example, strict=True)}
    assert [array.shape for array in take_tensors("m", tensors, given)] == [(1, 2, 1)] * len(RAW_TYPES)
    assert example_tensors([tensor_of("float", [LIMITS.warm_bytes // 4 + 1])]) is None


def tensor_of(element: str, shape: list[int | None]) -> TensorInfo:
    return TensorInfo(element, element, tuple(shape))


# -- definitions, versions and commands ------------------------------------------------------------------------------


def test_what_does_not_go_with_tensors(engine: st.Engine, tmp_path: Path) -> None:
    path = tree(tmp_path / "m.onnx", 2)
    for option, said in (
        ({"batching": "rows"}, "batching='rows' needs inputs="),
        ({"examples": "x.csv"}, "need inputs="),
    ):
        with pytest.raises(InvalidArgument, match=f"^model 'm': .*{said}"):
            st.Model("m", path=path, **option)  # type: ignore[arg-type]
    engine.apply([st.Model("m", path=path)])
    assert registry.deploy(engine.store, "m", tree(tmp_path / "n.onnx", 3), promote=False) == 2
    assert registry.deploy(engine.store, "m", softmax(tmp_path / "o.onnx", "N"), promote=False) == 3
    with pytest.raises(InvalidArgument, match=r"^model 'm' takes tensors, and has no keys by which a canary"):
        registry.set_canary(engine.store, "m", 10.0, 2)
    with pytest.raises(InvalidArgument, match=r"^model 'm': version 2 and version 1 must take the same tensors"):
        registry.set_shadow(engine.store, "m", 2)
    assert registry.set_shadow(engine.store, "m", 3) is not None
    with pytest.raises(InvalidArgument, match=r"^model 'm' takes tensors of any shape, so there is no batch"):
        tune.tune(engine.store, "m")
    registry.promote(engine.store, "m", 2)
    assert engine.predict("m", {"x": np.zeros((1, 3), np.float32)}).version == 2


def test_a_model_that_took_tensors_may_not_keep_its_types_with_columns(engine: st.Engine, tmp_path: Path) -> None:
    cast = helper.make_node("Cast", ["x"], ["y"], to=ELEMENTS["int8"])
    path = save(tmp_path / "m.onnx", [cast], {"x": (FLOAT, [None, 1])}, {"y": (ELEMENTS["int8"], [None, 1])})
    engine.apply([st.Model("m", path=path)])
    with pytest.raises(InvalidArgument, match=r"^model 'm': output 'y' of m.onnx is int8; supported: float, double"):
        engine.apply([st.Model("m", path=path, inputs=["request:a"])])


def test_the_commands_say_what_the_model_takes(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", path=product(tmp_path / "m.onnx"))])
    store = ("--store", str(engine.store.path))
    assert " tensors  c, n " in commands.run_well("models", *store).out
    assert "input a:     tensor float [-1, -1]" in commands.run_well("models", "show", "m", *store).out
    assert commands.error_of("predict", "m", "a=1", *store) == (
        "error: model 'm' takes tensors, not columns: send them to POST /v2/models/m/infer, or apply the model with"
        " inputs=[...]\n"
    )


def test_columns_do_not_fill_other_types(engine: st.Engine, tmp_path: Path) -> None:
    for kind, shape, said in ((ELEMENTS["int8"], [None, 2], "is int8; supported"), (FLOAT, [None, 2, 2], "has 3 axes")):
        cast = helper.make_node("Cast", ["x"], ["y"], to=FLOAT)
        path = save(tmp_path / "m.onnx", [cast], {"x": (kind, shape)}, {"y": (FLOAT, shape)})
        with pytest.raises(
            InvalidArgument, match=rf"input 'x' of m.onnx {said}.*; without inputs= the model takes tensors"
        ):
            engine.apply([st.Model("m", path=path, inputs=["request:a", "request:b"])])


# -- runners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, None])
def test_a_forest_of_known_width_is_compiled(engine: st.Engine, tmp_path: Path, width: int | None) -> None:
    path = tree(tmp_path / "m.onnx", width)
    engine.apply([st.Model("m", path=path)])
    runner = runner_of(engine, "m")
    assert runner.kind == ("forest" if width else "onnxruntime")
    reference = Session(path)
    for rows in (0, 1, 3):
        x = np.linspace(0, 1, rows * 2, dtype=np.float32).reshape(rows, 2)
        (expected,) = reference.run([x])
        got = engine.predict("m", {"x": x}).outputs["y"]
        assert (got.dtype, got.shape, got.tolist()) == (expected.dtype, expected.shape, expected.tolist())
    if width is None:  # a compiled forest would read beyond the row
        assert engine.predict("m", {"x": np.zeros((1, 1), np.float32)}).outputs["y"].shape == (1, 1)


def test_a_forest_of_fixed_rows_is_checked_and_compiled(tmp_path: Path) -> None:
    """It gives each row its own answer, so it needs no padding and takes any number of rows."""
    runner = load_runner(tree(tmp_path / "m.onnx", 2, rows=3), ["y"], by_request=True)
    assert (runner.kind, runner.exact_rows) == ("forest", None)
    assert runner.run([np.array([[0, 0], [1, 0]], np.float32)])[0].tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("settings", [RunSettings(), RunSettings(padded=True)])
def test_rows_of_a_request_are_never_padded_or_split(tmp_path: Path, settings: RunSettings) -> None:
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    of_any = load_runner(softmax(tmp_path / "any.onnx", "N"), ["y"], settings, by_request=True)
    np.testing.assert_allclose(of_any.run([x])[0].sum(axis=0), 1, rtol=1e-6)
    of_five = load_runner(softmax(tmp_path / "five.onnx", 5), ["y"], settings, by_request=True)
    np.testing.assert_allclose(of_five.run([x])[0].sum(axis=0), 1, rtol=1e-6)
    assert of_five.exact_rows == 5
    for other in (x[:4], np.concatenate([x, x])):
        with pytest.raises(InvalidArgument, match=rf"^the model takes exactly 5 rows a request, not {len(other)}$"):
            of_five.run([other])


@pytest.mark.parametrize("raw", [True, False])
def test_on_a_gpu_requests_run_there_without_buckets(tmp_path: Path, raw: bool) -> None:
    """This host need not have a GPU: the session that would run on it is replaced."""
    path, gpu = softmax(tmp_path / "m.onnx", "N"), Device("cuda", 0)
    with mock.patch("shorttail.models.buckets.open_session", return_value=Session(path)) as opened:
        runner = load_runner(path, ["y"], device=gpu, by_request=True, raw=raw)
    assert opened.call_args.args == (path, ["y"], 1, gpu)
    assert (runner.kind, runner.by_request) == ("cuda", True)
    assert runner.run([np.ones((3, 2), np.float32)])[0].shape == (3, 2)


def test_columns_of_a_file_of_fixed_rows(engine: st.Engine, tmp_path: Path) -> None:
    path = softmax(tmp_path / "m.onnx", 3)
    engine.apply([st.Model("m", path=path, inputs=["request:a", "request:b"], batching="request")])
    assert list(runner_of(engine, "m").measured_us) == [3]
    y = engine.predict("m", {"a": [1.0, 2.0, 3.0], "b": 0.0}).outputs["y"]
    np.testing.assert_allclose(y.sum(axis=0), 1, rtol=1e-6)
    with pytest.raises(InvalidArgument, match="the model takes exactly 3 rows a request, not 2"):
        engine.predict("m", {"a": [1.0, 2.0], "b": 0.0})
    tuning = tune.tune(engine.store, "m", seconds=0.01)
    assert {tuple(candidate.median_us) for candidate in tuning.candidates} == {(3,)}
    assert not any(candidate.settings.padded for candidate in tuning.candidates)
