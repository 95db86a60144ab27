"""ZipMap is taken off when a model is registered: answers have its name and the numbers of the tensor under it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import catboost
import lightgbm
import numpy as np
import onnx
import onnxmltools
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxmltools.convert.common.data_types import FloatTensorType
from skl2onnx import to_onnx
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

import shorttail as st
from shorttail.errors import InvalidArgument
from shorttail.models.signature import ModelFile
from shorttail.registry import versions as registry
from shorttail.store.files import model_path

X = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(int) + (X[:, 2] > 1)
TEXTS = np.array(["low", "mid", "high"])[Y]


def by_skl2onnx(estimator: Any) -> Callable[[Path], Any]:
    def save(path: Path) -> Any:
        fitted = estimator.fit(X, TEXTS)
        path.write_bytes(to_onnx(fitted, X[:1]).SerializeToString())
        return fitted

    return save


def by_lightgbm(path: Path) -> Any:
    fitted = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(X, Y)
    onnxmltools.utils.save_model(
        onnxmltools.convert_lightgbm(fitted, initial_types=[("x", FloatTensorType([None, 3]))]), path
    )
    return fitted


def by_catboost(labels: Any) -> Callable[[Path], Any]:
    def save(path: Path) -> Any:
        fitted = catboost.CatBoostClassifier(iterations=5, depth=3, verbose=0, allow_writing_files=False).fit(X, labels)
        fitted.save_model(str(path), format="onnx")
        return fitted

    return save


MAKERS = {
    "logistic regression": by_skl2onnx(LogisticRegression()),
    "random forest": by_skl2onnx(RandomForestClassifier(n_estimators=5, random_state=0)),
    "lightgbm": by_lightgbm,
    "catboost of 3 classes": by_catboost(Y),
    "catboost of 2 classes": by_catboost((Y > 0).astype(int)),
    "catboost of texts": by_catboost(TEXTS),
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        yield engine


def model(path: Path, **options: Any) -> st.Model:
    return st.Model("m", str(path), [f"request:x{column}" for column in range(3)], **options)


REQUEST = {f"x{column}": X[:, column] for column in range(3)}


@pytest.mark.parametrize("name", MAKERS)
def test_probabilities_of_every_class_come_as_a_matrix(engine: st.Engine, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    fitted = MAKERS[name](path)
    outputs = onnxruntime.InferenceSession(path).get_outputs()
    assert [output.type.startswith("seq(map(") for output in outputs] == [False, True]
    engine.apply([model(path)])
    answer = engine.predict("m", REQUEST).outputs
    assert list(answer) == [output.name for output in outputs]
    np.testing.assert_allclose(answer[outputs[1].name], fitted.predict_proba(X), atol=1e-5)
    np.testing.assert_array_equal(np.ravel(answer[outputs[0].name]), np.ravel(fitted.predict(X)))
    kind = engine.plan_for_model("m").runner.kind
    assert kind == ("onnxruntime" if name == "logistic regression" else "forest")


def test_the_store_has_the_cleaned_file_and_the_same_source_makes_no_new_version(
    engine: st.Engine, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    MAKERS["catboost of 3 classes"](path)
    source = path.read_bytes()
    engine.apply([model(path)])
    kept = model_path(engine.store.path, "m", 1).read_bytes()
    assert path.read_bytes() == source
    assert b"ZipMap" not in kept
    assert engine.store.catalog.models["m"].version().sha256 == hashlib.sha256(kept).hexdigest()
    onnx.checker.check_model(onnx.load_model_from_string(kept))
    assert [change.kind for change in engine.apply([model(path)])] == ["="]
    assert registry.deploy(engine.store, "m", path) == 1
    MAKERS["catboost of 2 classes"](path)
    assert registry.deploy(engine.store, "m", path) == 2
    assert engine.predict("m", REQUEST).outputs["probabilities"].shape == (200, 2)


def zipmap_graph(nodes: list[Any], outputs: list[Any]) -> bytes:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opsets, ir_version=8
    ).SerializeToString()


def maps(name: str) -> Any:
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    return helper.make_value_info(
        name, helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    )


def test_a_map_that_is_passed_on_or_made_twice_and_a_tensor_that_is_an_output_too(
    engine: st.Engine, tmp_path: Path
) -> None:
    def zipmap(output: str) -> Any:
        return helper.make_node("ZipMap", ["p"], [output], domain="ai.onnx.ml", classlabels_int64s=[0, 1])

    nodes = [
        helper.make_node("Softmax", ["x"], ["p"]),
        zipmap("a"),
        zipmap("b"),
        helper.make_node("Identity", ["b"], ["c"]),
    ]
    tensor = helper.make_tensor_value_info("p", TensorProto.FLOAT, [None, 2])
    path = tmp_path / "m.onnx"
    path.write_bytes(zipmap_graph(nodes, [tensor, maps("a"), maps("c")]))
    engine.apply([st.Model("m", str(path), ["request:u", "request:v"])])
    answer = engine.predict("m", {"u": [0.0, 1.0], "v": [0.0, 1.0]}).outputs
    assert {name: array.tolist() for name, array in answer.items()} == {name: [[0.5, 0.5]] * 2 for name in "pac"}


def test_a_file_without_zipmap_outputs_stays_as_it_is(tmp_path: Path) -> None:
    plain = to_onnx(LogisticRegression().fit(X, Y), X[:1], options={"zipmap": False})
    plain.doc_string = "ZipMap"
    data = plain.SerializeToString() + b"\x28\x07"  # model_version, which a writer would put before the graph
    (tmp_path / "m.onnx").write_bytes(data)
    assert ModelFile.read(tmp_path / "m.onnx", "m").data == data


def test_an_output_that_is_no_tensor_is_refused_with_the_names_of_the_others(engine: st.Engine, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1),
        helper.make_node("Softmax", ["x"], ["p"]),
    ]
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    path = tmp_path / "m.onnx"
    path.write_bytes(zipmap_graph(nodes, [parts, helper.make_tensor_value_info("p", TensorProto.FLOAT, [None, 2])]))
    columns = ["request:u", "request:v"]
    with pytest.raises(InvalidArgument) as caught:
        engine.apply([st.Model("m", str(path), columns)])
    assert caught.value.message == (
        "model 'm': output 'parts' of m.onnx is seq(tensor(float)); supported: float, double, int64, int32,"
        " bool, string; name the others: outputs=['p']"
    )
    engine.apply([st.Model("m", str(path), columns, outputs=["p"])])


def test_a_process_that_serves_does_not_import_onnx(engine: st.Engine, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    MAKERS["catboost of 2 classes"](path)
    engine.apply([model(path)])
    program = (
        "import sys, shorttail as st\n"
        f"engine = st.Engine.open({str(engine.store.path)!r})\n"
        "engine.predict('m', {'x0': 1.0, 'x1': 1.0, 'x2': 1.0})\n"
        "import shorttail.server.worker\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'onnx'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
