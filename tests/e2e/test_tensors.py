"""Models of raw tensors over HTTP: metadata, JSON and bytes, wrong requests, other protocols, shadows, many at once."""

import concurrent.futures
import json
import struct

import failing_models
import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from http_asking import ask, ask_json, http_port, tensor
from onnx import TensorProto, helper
from serving import TIMEOUT_S, Server, until, write_sum
from tritonclient.utils import InferenceServerException

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded
from shorttail.registry import versions as registry

FLOAT, FLOAT16, INT64, STRING = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.STRING


def save(path, nodes, takes, gives):
    values = [[helper.make_tensor_value_info(n, t, s) for n, (t, s) in side.items()] for side in (takes, gives)]
    graph = helper.make_graph(nodes, "g", *values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return str(path)


def write_product(path, *more):
    """Write a model of inputs whose first axes differ: c = a b, n = the number of its elements, t = a text."""
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["c"]),
        helper.make_node("Size", ["c"], ["n"]),
        helper.make_node("Identity", ["text"], ["t"]),
        *more,
    ]
    takes = {"a": (FLOAT, ["i", "j"]), "b": (FLOAT, ["j", 2]), "text": (STRING, [])}
    gives = {"c": (FLOAT, ["i", 2]), "n": (INT64, []), "t": (STRING, [])}
    return save(path, nodes, takes, gives)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp("raw")
    identity = [helper.make_node("Identity", ["x"], ["y"])]
    nothing = [helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0])]
    write_sum(home / "columns.onnx", 1.0)
    models = {
        "product": write_product(home / "product.onnx"),
        "halves": save(home / "halves.onnx", identity, {"x": (FLOAT16, [None, 2, 3])}, {"y": (FLOAT16, [None, 2, 3])}),
        "any": save(home / "any.onnx", identity, {"x": (FLOAT, None)}, {"y": (FLOAT, None)}),
        "nothing": save(home / "nothing.onnx", nothing, {}, {"y": (FLOAT, [2])}),
    }
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply([st.Model(name, path=path, batching="request") for name, path in models.items()])
        columns = ["request:a", "request:b", "request:c"]
        engine.apply([st.Model("columns", path=home / "columns.onnx", inputs=columns)])
    return home / "store"


@pytest.fixture(scope="module")
def server(store):
    server = Server(store, log=store.parent / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(
        f"127.0.0.1:{http_port(server)}", network_timeout=TIMEOUT_S, connection_timeout=TIMEOUT_S
    ) as client:
        yield client


def product_inputs(a, b, text="Zürich\0", binary=True):
    return [
        tensor("a", np.asarray(a, np.float32), "FP32", binary),
        tensor("b", np.asarray(b, np.float32), "FP32", binary),
        tensor("text", np.array(text, np.object_), "BYTES", binary),
    ]


def infer(server, model, *inputs, **more):
    """Send inputs (name, datatype, shape, data) as JSON, and return (status, answer)."""
    entries = [dict(zip(("name", "datatype", "shape", "data"), entry, strict=True)) for entry in inputs]
    return ask_json(server, "POST", f"/v2/models/{model}/infer", {"inputs": entries, **more})


def refused(server, model, *inputs):
    status, answer = infer(server, model, *inputs)
    assert status == 400, answer
    assert "\n" not in answer["error"]
    return answer["error"]


# -- what is described and served ------------------------------------------------------------------------------------


def test_metadata_have_the_types_and_shapes_of_the_file(client):
    product = client.get_model_metadata("product")
    inputs = [
        {"name": "a", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "b", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "text", "datatype": "BYTES", "shape": []},
    ]
    assert product["inputs"] == product["tensors"] == inputs
    assert product["outputs"] == [
        {"name": "c", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "n", "datatype": "INT64", "shape": []},
        {"name": "t", "datatype": "BYTES", "shape": []},
    ]
    assert client.get_model_metadata("halves")["inputs"] == [{"name": "x", "datatype": "FP16", "shape": [-1, 2, 3]}]
    assert client.get_model_metadata("any")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    assert client.get_model_metadata("nothing")["inputs"] == []


def test_the_configuration_says_that_requests_are_not_batched(client):
    config = client.get_model_config("halves")
    assert config["max_batch_size"] == 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP16", "dims": [-1, 2, 3]}]
    assert client.get_model_config("columns")["max_batch_size"] == LIMITS.rows_per_request


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 0])
def test_a_standard_client_gets_what_the_model_gives(client, binary, rows):
    a, b = np.arange(rows * 4).reshape(rows, 4), np.arange(8).reshape(4, 2)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in "cnt"]
    found = client.infer("product", product_inputs(a, b, binary=binary), outputs=wanted)
    np.testing.assert_array_equal(found.as_numpy("c"), (a @ b).astype(np.float32))
    assert (found.as_numpy("n").shape, found.as_numpy("n").item()) == ((), 2 * rows)
    text = found.as_numpy("t").item()
    assert (text.decode() if isinstance(text, bytes) else text) == "Zürich\0"


def test_data_of_json_is_nested_or_flat(server):
    answers = [
        infer(server, "product", ("a", "FP32", [1, 2], a), ("b", "FP32", [2, 2], b), ("text", "BYTES", [], text))
        for a, b, text in (([1, 2], [1, 2, 3, 4], ["x"]), ([[1, 2]], [[1, 2], [3, 4]], "x"))
    ]
    assert answers[0] == answers[1]
    status, answer = answers[0]
    assert status == 200
    assert [(o["shape"], o["data"]) for o in answer["outputs"]] == [([1, 2], [7.0, 10.0]), ([], [2]), ([], ["x"])]
    assert infer(server, "nothing")[1]["outputs"][0]["data"] == [1.0, 2.0]
    halves = infer(server, "halves", ("x", "FP16", [1, 2, 3], [[[1.5, None, 3], [4, 5, 6]]]))[1]["outputs"][0]
    assert halves == {"name": "y", "datatype": "FP16", "shape": [1, 2, 3], "data": [1.5, None, 3.0, 4.0, 5.0, 6.0]}
    empty = infer(server, "any", ("x", "FP32", [2, 0, 4], [[], []]))[1]["outputs"][0]
    assert (empty["shape"], empty["data"]) == ([2, 0, 4], [])
    deep = infer(server, "any", ("x", "FP32", [1] * 20, [7]))[1]["outputs"][0]
    assert (deep["shape"], deep["data"]) == ([1] * 20, [7.0])


def test_many_requests_of_other_shapes_at_once(server):
    def ask_one(rows):
        a, b = ("a", "FP32", [rows, 3], [rows] * 3 * rows), ("b", "FP32", [3, 2], [1] * 6)
        status, answer = infer(server, "product", a, b, ("text", "BYTES", [], f"text {rows}"))
        return status, [(output["shape"], output["data"]) for output in answer["outputs"]]

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        for rows, found in enumerate(pool.map(ask_one, range(200))):
            c = [rows, 2], [3.0 * rows] * 2 * rows
            assert found == (200, [c, ([], [2 * rows]), ([], [f"text {rows}"])])


# -- what is refused ---------------------------------------------------------------------------------------------------

GOOD = {"a": ("a", "FP32", [1, 1], [1]), "b": ("b", "FP32", [1, 2], [1, 2]), "text": ("text", "BYTES", [], ["x"])}
DATATYPES = "BOOL, UINT8, UINT16, UINT32, UINT64, INT8, INT16, INT32, INT64, FP16, FP32, FP64, BYTES"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("a", "FP64", [1, 1], [1]), "input 'a' is float [-1, -1]; got float64"),
        (("a", "INT64", [1, 1], [None]), "input 'a' is float [-1, -1]; got null"),
        (("a", "FP32", [1], [1]), "input 'a' is float [-1, -1]; got the shape [1]"),
        (("b", "FP32", [1, 3], [1, 2, 3]), "input 'b' is float [-1, 2]; got the shape [1, 3]"),
        (("text", "BYTES", [1], ["x"]), "input 'text' is string []; got the shape [1]"),
        (("text", "BYTES", [], [None]), "input 'text' is string []; got null"),
        (("a", "FP32", [2, 1], [[1, 2]]), "input 'a': data is nested as [1, 2], where the shape is [2, 1]"),
        (("a", "FP32", [3, 0], [[], []]), "input 'a': data is nested as [2, 0], where the shape is [3, 0]"),
        (("a", "FP32", [1, 1], 1), "input 'a': data must be an array of FP32, nested as its shape or flat"),
        (("a", "FP32", [2, 1], [1]), "input 'a': 1 elements of data, where the shape [2, 1] has 2"),
        (("a", "BF16", [1, 1], [1]), f"input 'a': datatype 'BF16' is not one of {DATATYPES}"),
    ],
)
def test_wrong_inputs_are_refused_by_name(server, wrong, said):
    assert refused(server, "product", *(GOOD | {wrong[0]: wrong}).values()) == said


def test_names_must_be_those_of_the_file(server):
    takes = "model 'product' takes tensors and has no input 'user_id'; its inputs: a, b, text"
    assert refused(server, "product", ("user_id", "INT64", [1], [1]), *GOOD.values()) == takes
    missing = "model 'product' takes tensors, and input 'text', which is string [], is missing"
    assert refused(server, "product", GOOD["b"], GOOD["a"]) == missing


@pytest.mark.parametrize("shape", [[-1, 1], [1 << 40, 1 << 40], [1] * 65, [True], [1.0], "1", None])
def test_no_shape_is_believed(server, shape):
    assert "shape" in refused(server, "any", ("x", "FP32", shape, [1]))


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [0, (1 << 64) - 1]])
def test_a_shape_without_elements_may_be_too_large_as_well(server, shape):
    assert refused(server, "any", ("x", "FP32", shape, [])).startswith("input 'x': the shape [0, ")


def test_bytes_must_be_those_of_the_shape(server):
    entry = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [entry]}).encode()
    body = head + struct.pack("<f", 1)
    status, answer = ask(server, "POST", "/v2/models/any/infer", body, Inference_Header_Content_Length=str(len(head)))
    assert (status, json.loads(answer)) == (400, {"error": "input 'x': 4 bytes of data, where [2] of FP32 has 8"})


def test_what_the_graph_refuses_is_the_callers_error(client):
    with pytest.raises(InferenceServerException, match=r"the model refuses this request: .*MatMul") as caught:
        client.infer("product", product_inputs(np.ones((2, 3)), np.ones((4, 2))))
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="model 'product' has no output 'z'; its outputs: c, n, t"):
        client.infer("product", product_inputs([[1]], [[1, 2]]), outputs=[triton.InferRequestedOutput("z")])


def test_columns_are_refused_with_advice(server):
    advice = (
        "model 'product' takes tensors, not columns: send them to POST /v2/models/product/infer, or apply the model"
        " with inputs=[...]"
    )
    for columns in ({"a": [1.0], "b": [1.0], "text": ["x"]}, {}, {"user_id": 1}):
        with server.connect() as peer:
            assert peer.ask(0, 1, "predict", ["product", columns])[2] == {"code": "INVALID_ARGUMENT", "message": advice}
    status, answer = ask_json(
        server, "POST", "/invocations", {"instances": [{"a": 1}], "parameters": {"model": "product"}}
    )
    assert (status, answer) == (400, {"error": advice})
    with server.connect() as peer:  # and other models are answered
        assert peer.ask(0, 1, "predict", ["columns", {"a": 1, "b": 2, "c": 3}])[3]["outputs"] == {"total": [6.0]}
        listed = {model["name"]: model for model in peer.ask(0, 2, "models", [])[3]}
    assert listed["product"]["tensors"] == {"a": "float [-1, -1]", "b": "float [-1, 2]", "text": "string []"}
    assert "tensors" not in listed["columns"]


@pytest.mark.parametrize("rows", [None, 1])
def test_a_run_that_does_not_end_is_stopped(tmp_path, start, rows):
    """A model of fixed shapes runs in the event loop, unless a run takes too long there."""
    failing_models.endless(tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    if rows is not None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = rows
        onnx.save(model, str(tmp_path / "m.onnx"))
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=tmp_path / "m.onnx", run_timeout="300ms")])
        endless = {"x": np.full((1, 1), 2e6, np.float32)}
        with pytest.raises(DeadlineExceeded, match=r"it ran longer than its run_timeout of 0\.3 s"):
            engine.predict("m", endless)
    server = start(of=tmp_path / "store")
    for _ in range(2):
        status, answer = infer(server, "m", ("x", "FP32", [1, 1], [2e6]))
        assert (status, answer["error"]) == (504, "the model failed: it ran longer than its run_timeout of 0.3 s")
        assert infer(server, "m", ("x", "FP32", [1, 1], [2]))[1]["outputs"][0]["data"] == [2.0]


# -- versions ---------------------------------------------------------------------------------------------------------


def test_a_shadow_is_compared_request_by_request(tmp_path, start):
    same = write_product(tmp_path / "same.onnx")
    other = write_product(tmp_path / "other.onnx", helper.make_node("Add", ["a", "a"], ["unused"]))
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([st.Model("m", path=same)])
        registry.deploy(engine.store, "m", other, promote=False)
        registry.set_shadow(engine.store, "m", 2)
    server = start(of=tmp_path / "store")
    with triton.InferenceServerClient(f"127.0.0.1:{http_port(server)}", network_timeout=TIMEOUT_S) as client:
        client.infer("m", product_inputs(np.ones((3, 1)), np.ones((1, 2))))

    def compared():
        with server.connect() as peer:
            (model,) = peer.ask(0, 1, "models", [])[3]
        return model["shadow"] if model["shadow"]["batches"] + model["shadow"]["errors"] else None

    shadow = until(compared, server)
    assert (shadow["batches"], shadow["rows"], shadow["rows_differing"], shadow["errors"]) == (1, 1, 0, 0)
