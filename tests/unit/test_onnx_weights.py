"""Weights that a model keeps in files beside it come into the store with it; files elsewhere are never read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.errors import InvalidArgument
from shorttail.models import onnx_weights
from shorttail.models.signature import ModelFile

FLOAT = TensorProto.FLOAT
OTHER_FILE = "keeps weights in "


def weights(*values: float) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.float32), "w")


def model(nodes: list[Any], initializers: list[Any], **fields: Any) -> onnx.ModelProto:
    """y [n, 2] of x [n, 2]."""
    value = [helper.make_tensor_value_info(name, FLOAT, ["n", 2]) for name in "xy"]
    graph = helper.make_graph(nodes, "weights", value[:1], value[1:], initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **fields)


def add(*names: str) -> onnx.NodeProto:
    return helper.make_node("Add", list(names), ["y"])


def in_initializer() -> onnx.ModelProto:
    return model([add("x", "w")], [weights(1, 2)])


def in_attribute() -> onnx.ModelProto:
    return model([helper.make_node("Constant", [], ["w"], value=weights(1, 2)), add("x", "w")], [])


def in_subgraph() -> onnx.ModelProto:
    out = [helper.make_tensor_value_info("t", FLOAT, [2])]
    branches = [
        helper.make_graph([helper.make_node("Constant", [], ["t"], value=weights(*values))], "branch", [], out)
        for values in ((1, 2), (3, 4))
    ]
    choose = helper.make_node("If", ["yes"], ["w"], then_branch=branches[0], else_branch=branches[1])
    return model([choose, add("x", "w")], [numpy_helper.from_array(np.array(True), "yes")])


def in_function() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=weights(1, 2))
    shifted = helper.make_function(
        "own", "Shifted", ["x"], ["y"], [constant, add("x", "w")], [helper.make_opsetid("", 18)]
    )
    return model([helper.make_node("Shifted", ["x"], ["y"], domain="own")], [], functions=[shifted])


def in_sparse_initializer() -> onnx.ModelProto:
    indices = numpy_helper.from_array(np.array([0, 1], np.int64), "indices")
    made = model([add("x", "w")], [])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(weights(1, 2), indices, [2]))
    return made


PLACES = [in_initializer, in_attribute, in_subgraph, in_function, in_sparse_initializer]


def move_out(made: onnx.ModelProto, folder: Path, location: str = "weights.bin", **entries: str) -> Path:
    """Write the model to m.onnx, and the bytes of its float tensors to a file of which the model names `location`."""
    content = b""
    for tensor in onnx_weights.tensors(made):
        if tensor.data_type == FLOAT:
            data = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                {"location": location, "offset": str(len(content)), "length": str(len(data))} | entries
            ).items():
                tensor.external_data.add(key=key, value=value)
            content += data
    (folder / "weights.bin").write_bytes(content)
    path = folder / "m.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("make", PLACES)
def test_weights_beside_the_model_come_into_the_store(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    whole = make()
    path = move_out(make(), tmp_path)
    assert ModelFile.read(path, "m").data == whole.SerializeToString()
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        inputs = ["request:a", "request:b"]
        engine.apply([st.Model("m", path=str(path), inputs=inputs)])
        (tmp_path / "weights.bin").unlink()
        assert engine.predict("m", {"a": 1.0, "b": 1.0}).outputs["y"].tolist() == [[2.0, 3.0]]
        # The same file again makes no new version, nor does the file that has the weights in itself.
        path = move_out(make(), tmp_path)
        assert engine.deploy("m", path) == 1
        path.write_bytes(whole.SerializeToString())
        assert engine.deploy("m", path) == 1


@pytest.mark.parametrize("make", PLACES)
def test_a_server_serves_what_apply_has_taken(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    path = move_out(make(), tmp_path)
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=str(path), inputs=["request:a", "request:b"])])
    (tmp_path / "weights.bin").unlink()
    command = [sys.executable, "-m", "shorttail", "serve", "--store", str(tmp_path / "store"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok · models: m v1 · views: none\n", "")


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{outside}/weights.bin", "which is not in its folder; save it as one file: onnx.save_model"),
        ("../outside/weights.bin", "which is not in its folder"),
        ("folder/../../outside/weights.bin", "which is not in its folder"),
        ("link", "which is not in its folder"),
        ("linked/weights.bin", "which is not in its folder"),
        ("circle", "does not say where"),
        ("gone.bin", "there is no such file"),
        ("folder", "there is no such file"),
        ("fifo", "there is no such file"),
        ("a\0b", "does not say where"),
        ("*/_ORT_MEM_ADDR_/*", "there is no such file"),  # ONNX Runtime's own word for an address in memory
    ],
)
def test_files_elsewhere_are_refused(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], location: str, message: str
) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    (folder / "folder").mkdir(parents=True)
    (outside / "weights.bin").write_bytes(np.array([1, 2, 3, 4], np.float32).tobytes())
    (folder / "link").symlink_to(outside / "weights.bin")
    (folder / "linked").symlink_to(outside)
    (folder / "circle").symlink_to(folder / "circle")
    os.mkfifo(folder / "fifo")
    path = move_out(make(), folder, location.format(outside=outside))
    with pytest.raises(InvalidArgument, match=OTHER_FILE) as caught:
        ModelFile.read(path, "m")
    assert caught.value.message.startswith("model 'm': m.onnx keeps weights in ")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "9"}, "shorter than it says"),
        ({"offset": "4"}, "shorter than it says"),
        ({"offset": "-4"}, "shorter than it says"),
        ({"length": "-1"}, "shorter than it says"),
        ({"length": "eight"}, "does not say where"),
    ],
)
def test_a_part_that_the_file_does_not_have_is_refused(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ModelFile.read(move_out(in_initializer(), tmp_path, **entries), "m")


def test_a_model_that_is_too_large_for_one_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = move_out(in_initializer(), tmp_path, length=str(3 << 30))
    os.truncate(tmp_path / "weights.bin", 3 << 30)  # sparse
    with pytest.raises(InvalidArgument, match=r"m\.onnx has 3\.0 GiB with the weights .*less than 2 GiB"):
        ModelFile.read(path, "m")


def test_a_tag_that_is_longer_than_it_must_be_hides_nothing(tmp_path: Path) -> None:
    """Field 7 of a model, its graph, as a reader of protocol buffers takes it: in one byte or in five."""
    made = in_initializer()
    path = move_out(made, tmp_path, "/etc/hostname")
    graph = made.graph.SerializeToString()
    made.ClearField("graph")
    long_tag = b"\xba\x80\x80\x80\x00"
    assert len(graph) > 0x7F
    size = bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7])
    path.write_bytes(made.SerializeToString() + long_tag + size + graph)
    assert onnx.load(path, load_external_data=False).graph.initializer[0].external_data[0].value == "/etc/hostname"
    with pytest.raises(InvalidArgument, match="'/etc/hostname', which is not in its folder"):
        ModelFile.read(path, "m")


def test_onnx_runtimes_own_format_is_refused(tmp_path: Path) -> None:
    """It is loaded by the name of the file, which is another one in the store."""
    onnx.save_model(in_initializer(), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.ort")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options)
    with pytest.raises(InvalidArgument, match=r"m\.ort is a model in ONNX Runtime's own format"):
        ModelFile.read(tmp_path / "m.ort", "m")


def test_a_model_of_another_ending_is_served(tmp_path: Path) -> None:
    onnx.save_model(in_initializer(), tmp_path / "m.ort")
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=str(tmp_path / "m.ort"), inputs=["request:a", "request:b"])])
        assert engine.predict("m", {"a": 1.0, "b": 1.0}).outputs["y"].tolist() == [[2.0, 3.0]]


def test_an_operator_that_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model([helper.make_node("Unknown", ["x"], ["y"], domain="own")], []).SerializeToString())
    with (
        st.Engine.open(tmp_path / "store", create=True) as engine,
        pytest.raises(InvalidArgument, match=r"model 'm': m\.onnx: ONNX Runtime cannot load this model: .*Unknown"),
    ):
        engine.apply([st.Model("m", path=str(path), inputs=["request:a", "request:b"])])


def test_a_server_imports_no_onnx_package(tmp_path: Path) -> None:
    onnx.save_model(in_initializer(), tmp_path / "m.onnx")
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=str(tmp_path / "m.onnx"), inputs=["request:a", "request:b"])])
    code = """
import sys
from shorttail.server.worker import load
engine, served = load("store", "cpu")
with engine:
    print(served["models"], "onnx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout == "[{'name': 'm', 'version': 1}] False\n", done.stderr
