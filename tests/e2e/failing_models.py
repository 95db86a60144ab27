"""ONNX models that fail, hang or crash on some rows, for tests of a server."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path, nodes, inputs, outputs, constants=()):
    """Write a model. inputs, outputs: name -> (element type, shape). constants: name -> array."""
    values = [[helper.make_tensor_value_info(name, *kind) for name, kind in side.items()] for side in (inputs, outputs)]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in dict(constants).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "failing", *values, initializers), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, str(path))


def gather(path, delay_rounds=0):
    """Return the item of a table of 10 rows, 0 to 9. Items out of range make the run fail.

    delay_rounds: rounds of a loop that make each run slow.
    """
    nodes = [helper.make_node("Gather", ["table", "item"], ["found"])]
    constants = {"table": np.arange(10, dtype=np.float32).reshape(10, 1)}
    last = "found"
    if delay_rounds:
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go"], ["go_on"]),
                helper.make_node("Sin", ["noise"], ["waved"]),
                helper.make_node("Identity", ["waved"], ["noise_out"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("round", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("noise", TensorProto.FLOAT, [256, 256]),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("noise_out", TensorProto.FLOAT, [256, 256]),
            ],
        )
        constants |= {
            "rounds": np.int64(delay_rounds),
            "yes": np.bool_(True),
            "start": np.zeros((256, 256), np.float32),
        }
        nodes += [
            helper.make_node("Loop", ["rounds", "yes", "start"], ["noise_end"], body=body),
            helper.make_node("ReduceSum", ["noise_end"], ["nothing"], keepdims=0),  # sin(0) is 0
            helper.make_node("Add", ["found", "nothing"], ["slow"]),
        ]
        last = "slow"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    save(path, nodes, {"item": (TensorProto.INT64, [None])}, {"y": (TensorProto.FLOAT, [None, 1])}, constants)


def divide(path):
    """Divide a by b - 100. A division by 0 fails; that of -2**63 by -1 ends the process with SIGFPE."""
    kind = (TensorProto.INT64, [None])
    nodes = [helper.make_node("Sub", ["b", "hundred"], ["by"]), helper.make_node("Div", ["a", "by"], ["y"])]
    save(path, nodes, {"a": kind, "b": kind}, {"y": kind}, {"hundred": np.int64(100)})


def endless(path):
    """Return x; if one of the rows is above 1,000,000 the run never ends."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["v"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [None, 1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, [None, 1]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "million"], ["go"]),
        helper.make_node("Loop", ["", "go", "x"], ["y"], body=body),
    ]
    kind = (TensorProto.FLOAT, [None, 1])
    save(path, nodes, {"x": kind}, {"y": kind}, {"million": np.float32(1e6)})


def listwise(path):
    """Return the softmax over the rows of a run: the answer for a row depends on the other rows."""
    kind = (TensorProto.FLOAT, [None, 1])
    save(path, [helper.make_node("Softmax", ["score"], ["share"], axis=0)], {"score": kind}, {"share": kind})


def top_rows(path):
    """Return for each row the k largest scores of the run, where k is the number of rows: an array [rows, rows]."""
    nodes = [
        helper.make_node("Shape", ["score"], ["shape"], start=0, end=1),
        helper.make_node("Transpose", ["score"], ["row"], perm=[1, 0]),
        helper.make_node("Concat", ["shape", "shape"], ["square"], axis=0),
        helper.make_node("Expand", ["row", "square"], ["all"]),
        helper.make_node("TopK", ["all", "shape"], ["sorted", "places"], axis=1),
    ]
    kinds = {"score": (TensorProto.FLOAT, [None, 1])}, {"sorted": (TensorProto.FLOAT, [None, None])}
    save(path, nodes, *kinds)
