"""Kinds of models whose rows depend on each other: what saves each, and what the reason that `apply` gives names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from row_models import FLOAT, INT64, STRING, X4, Take, graph, op, weight

Y: Take = {"y": (FLOAT, [None, 4])}
Y1: Take = {"y": (FLOAT, [None, 1])}
COLUMN: Take = {"x": (FLOAT, [None, 1])}


def dense(*nodes: Any, **constants: Any) -> Callable[[Path], Path]:
    """Return what saves a model of x [rows, 4] that multiplies by a matrix first; the nodes go on from `h`, to `y`."""
    first = op("MatMul", "x w", "h")
    return lambda path: graph(path, [first, *nodes], X4, Y, w=weight(4, 4), **constants)


def quantized(path: Path) -> Path:
    """A network of scikit-learn, quantized dynamically: one scale for all rows of a run."""
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier

    random = np.random.default_rng(0)
    x = random.normal(size=(300, 4)).astype(np.float32)
    network = MLPClassifier((32, 16), max_iter=30, random_state=0).fit(x, x[:, 0] * x[:, 1] > 0)
    plain = path.with_suffix(".plain")
    plain.write_bytes(to_onnx(network, x[:1], options={"zipmap": False}, target_opset=17).SerializeToString())
    quantize_dynamic(plain, path, weight_type=QuantType.QUInt8)
    return path


def fixed(rows: int, *nodes: Any, **constants: Any) -> Callable[[Path], Path]:
    """Return what saves a file of a fixed number of rows."""
    shape: Take = {"x": (FLOAT, [rows, 3])}
    return lambda path: graph(path, nodes, shape, {"y": (FLOAT, [rows, None])}, **constants)


def scan_over_rows(path: Path) -> Path:
    """Scan keeps a sum while it goes through the rows."""
    row, state = helper.make_tensor_value_info("row", FLOAT, [4]), helper.make_tensor_value_info("sum", FLOAT, [4])
    results = [helper.make_tensor_value_info(name, FLOAT, [4]) for name in ("after", "out")]
    body = helper.make_graph(
        [op("Add", "sum row", "after"), op("Identity", "after", "out")], "b", [state, row], results
    )
    return graph(path, [op("Scan", "zero x", "last y", body=body, num_scan_inputs=1)], X4, Y, zero=np.zeros(4, "f4"))


def share_of_id(path: Path) -> Path:
    """How often each row's id occurs in the run."""
    nodes = [
        op("Transpose", "id", "across", perm=[1, 0]),
        op("Equal", "id across", "same"),
        op("Cast", "same", "count", to=FLOAT),
        op("ReduceMean", "count", "y", axes=[1]),
    ]
    return graph(path, nodes, {"id": (INT64, [None, 1])}, Y1)


def text_count(path: Path) -> Path:
    nodes = [
        op("LabelEncoder", "city", "id", domain="ai.onnx.ml", keys_strings=["a", "b", "c"], values_int64s=[0, 1, 2]),
        op("Transpose", "id", "across", perm=[1, 0]),
        op("Equal", "id across", "same"),
        op("Cast", "same", "y64", to=INT64),
        op("ReduceSum", "y64 one", "y"),
    ]
    nodes[0].domain = "ai.onnx.ml"
    return graph(path, nodes, {"city": (STRING, [None, 1])}, {"y": (INT64, [None, 1])}, one=np.array([1]))


REDUCE = [op("ReduceMean", "h", "mean", axes=[0]), op("Sub", "h mean", "off")]
N = [op("Shape", "x", "s"), op("Gather", "s zero", "n64"), op("Cast", "n64", "n", to=FLOAT)]
ZERO = np.array(0)

DEPENDENT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "softmax over the rows": (dense(op("Softmax", "h", "y", axis=0)), "Softmax 'softmax_y' works along the rows"),
    "log-softmax of opset 11, which flattens": (
        lambda path: graph(
            path, [op("Reshape", "x to", "h"), op("LogSoftmax", "h", "y", axis=0)], X4, Y, 11, to=np.array([-1, 4])
        ),
        "LogSoftmax",
    ),
    "z-score by the batch": (
        dense(
            *REDUCE,
            op("ReduceL2", "off", "norm", axes=[0]),
            op("Div", "off norm", "y"),
        ),
        "ReduceMean 'reducemean_mean' works along the rows",
    ),
    "divided by the largest of the batch": (
        dense(op("ReduceMax", "h", "m", axes=[0]), op("Div", "h m", "y")),
        "ReduceMax",
    ),
    "divided by the largest number of all": (
        dense(op("Abs", "h", "a"), op("ReduceMax", "a", "m", keepdims=0), op("Div", "h m", "y")),
        "ReduceMax",
    ),
    "dynamic quantization": (quantized, "DynamicQuantizeLinear"),
    "cumulative sum": (dense(op("CumSum", "h axis", "y"), axis=np.array(0)), "CumSum"),
    "rank in the batch": (
        lambda path: graph(
            path,
            [
                *N,
                op("Unsqueeze", "n64 zeros", "k"),
                op("TopK", "x k", "sorted order", axis=0),
                op("Cast", "order", "y", to=FLOAT),
            ],
            COLUMN,
            Y1,
            zero=ZERO,
            zeros=np.array([0]),
        ),
        "TopK",
    ),
    "how many rows are smaller": (
        lambda path: graph(
            path,
            [
                op("Transpose", "x", "across", perm=[1, 0]),
                op("Less", "across x", "less"),
                op("Cast", "less", "count", to=INT64),
                op("ReduceSum", "count one", "y"),
            ],
            COLUMN,
            {"y": (INT64, [None, 1])},
            one=np.array([1]),
        ),
        "Less 'less_less' compares rows with each other",
    ),
    "whether it is the best of the batch": (
        lambda path: graph(
            path,
            [op("ReduceMax", "x", "m", axes=[0]), op("Equal", "x m", "is"), op("Cast", "is", "y", to=INT64)],
            COLUMN,
            {"y": (INT64, [None, 1])},
        ),
        "ReduceMax",
    ),
    "batch normalization in training mode": (
        dense(
            op("BatchNormalization", "h one nil nil one", "y rm rv", training_mode=1),
            one=np.ones(4, "f4"),
            nil=np.zeros(4, "f4"),
        ),
        "BatchNormalization",
    ),
    "attention between the rows": (
        dense(
            op("Transpose", "h", "keys", perm=[1, 0]),
            op("MatMul", "h keys", "scores"),
            op("Softmax", "scores", "shares"),
            op("MatMul", "shares h", "y"),
        ),
        "MatMul 'matmul_scores' compares rows with each other",
    ),
    "sums over the rows by Einsum": (
        dense(op("Einsum", "h h", "gram", equation="nd,ne->de"), op("MatMul", "h gram", "y")),
        "Einsum",
    ),
    "sums over the rows by Gemm": (
        dense(op("Gemm", "h h", "gram", transA=1), op("MatMul", "h gram", "y")),
        "Gemm",
    ),
    "divided by the number of rows": (dense(*N, op("Div", "h n", "y"), zero=ZERO), ""),
    "a recurrent network over the rows": (
        lambda path: graph(
            path,
            [
                op("Unsqueeze", "x one", "seq"),
                op("RNN", "seq w r", "all -", hidden_size=4),
                op("Reshape", "all to", "y"),
            ],
            X4,
            Y,
            one=np.array([1]),
            w=weight(1, 4, 4),
            r=weight(1, 4, 4),
            to=np.array([-1, 4]),
        ),
        "RNN",
    ),
    "the difference to the row before": (
        dense(
            op("Pad", "h pads", "later"),
            op("Slice", "later zeros minus1 zeros", "before"),
            op("Sub", "h before", "y"),
            pads=np.array([1, 0, 0, 0]),
            zeros=np.array([0]),
            minus1=np.array([-1]),
        ),
        "moves rows",
    ),
    "the difference to the first row": (
        dense(op("Gather", "h zeros", "first"), op("Sub", "h first", "y"), zeros=np.array([0])),
        "Gather 'gather_first' makes a single result of all rows",
    ),
    "a convolution along the rows": (
        dense(
            op("Transpose", "h", "t", perm=[1, 0]),
            op("Unsqueeze", "t zeros", "image"),
            op("Conv", "image k", "c", pads=[1, 1]),
            op("Squeeze", "c zeros", "t2"),
            op("Transpose", "t2", "y", perm=[1, 0]),
            zeros=np.array([0]),
            k=weight(4, 4, 3),
        ),
        "Conv",
    ),
    "layer normalization over the rows": (
        dense(
            op("Transpose", "h", "t", perm=[1, 0]),
            op("LpNormalization", "t", "n", axis=-1),
            op("Transpose", "n", "y", perm=[1, 0]),
        ),
        "LpNormalization",
    ),
    "a loop over the rows": (scan_over_rows, "Scan"),
    "how often an id occurs": (share_of_id, "compares rows with each other"),
    "how often a text occurs": (text_count, "compares rows with each other"),
    "softmax over the rows of a file of 4 rows": (fixed(4, op("Softmax", "x", "y", axis=0)), "Softmax"),
    "mean of a file of 8 rows": (fixed(8, op("ReduceMean", "x", "m", axes=[0]), op("Sub", "x m", "y")), "ReduceMean"),
    "products of a file of 4 rows": (
        fixed(4, op("Transpose", "x", "t", perm=[1, 0]), op("MatMul", "x t", "y")),
        "",
    ),
    # Effects that no example shows: the scan alone finds them.
    "the mean of the batch for values above a million": (
        dense(
            op("ReduceMean", "h", "mean", axes=[0]),
            op("Greater", "h million", "is"),
            op("Where", "is mean h", "y"),
            million=np.float32(1e6),
        ),
        "ReduceMean",
    ),
    "saturated": (
        dense(
            op("Softmax", "h", "p", axis=0),
            op("Add", "p much", "a"),
            op("Sigmoid", "a", "y"),
            much=np.float32(100),
        ),
        "Softmax",
    ),
}
