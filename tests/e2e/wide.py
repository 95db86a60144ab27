"""A model of many columns, and large requests for it, for the tests of the bulk worker."""

import msgpack
import numpy as np
import onnx
from onnx import TensorProto, helper
from serving import make_store

import shorttail as st
from shorttail.config import LIMITS

ROWS = LIMITS.rows_per_request
WIDE = 40  # columns of the model "wide", and outputs of a row
INFER = "/v2/models/wide/infer"
TOKEN = "0123456789abcdef" * 2


def write_wide(path):
    """Write a model that returns its float32 [rows, WIDE] input times two, and a text for each row."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["double"]), helper.make_node("Identity", ["text"], ["same"])],
        "wide",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDE]),
            helper.make_tensor_value_info("text", TensorProto.STRING, [None, 1]),
        ],
        [
            helper.make_tensor_value_info("double", TensorProto.FLOAT, [None, WIDE]),
            helper.make_tensor_value_info("same", TensorProto.STRING, [None, 1]),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))


def make_wide_store(home):
    """Make the store of serving.py with the model "wide" in this folder, and return its path."""
    made = make_store(home)
    write_wide(home / "wide.onnx")
    columns = {"x": [f"request:a{i}" for i in range(WIDE)], "text": ["request:text"]}
    with st.Engine.open(made) as engine:
        engine.apply([st.Model("wide", path=str(home / "wide.onnx"), inputs=columns)])
    return made


def columns_of(rows, first=0):
    """Columns of the model "wide", each value unlike any other."""
    numbers = np.arange(first, first + rows)
    return {
        **{f"a{i}": (numbers + i / 64).astype(np.float32).tolist() for i in range(WIDE)},
        "text": [f"row {n} of the text" for n in numbers.tolist()],
    }


def doubled(rows, first=0):
    numbers = np.arange(first, first + rows)[:, None] + np.arange(WIDE)[None, :] / 64
    return 2 * numbers.astype(np.float32)


def message(method, *params, msgid=7):
    return msgpack.packb([0, msgid, method, list(params)])


def read_reply(peer):
    unpacker = msgpack.Unpacker(max_buffer_size=1 << 30)
    while True:
        data = peer.socket.recv(1 << 20)
        if not data:
            return None
        unpacker.feed(data)
        for found in unpacker:
            return found


def infer_body(rows):
    asked = columns_of(rows)
    return {
        "inputs": [
            {"name": name, "datatype": "BYTES" if name == "text" else "FP32", "shape": [rows], "data": values}
            for name, values in asked.items()
        ]
    }


def doubles(document, rows):
    (found,) = (output for output in document["outputs"] if output["name"] == "double")
    return np.array(found["data"], np.float32).reshape(rows, WIDE)
