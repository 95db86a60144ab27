"""Implements, with NumPy, the few ONNX operators that converters put around a tree ensemble.

Each entry of OPERATORS takes a node and returns a function of the node's input arrays. An operator is here only if it
surely gives what ONNX Runtime gives; a graph with any other operator runs in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.models.ensemble import NotAForest
from shorttail.models.leaf_paths import Columns
from shorttail.models.onnx_graph import ELEMENTS, Node

Array = NDArray[Any]
Operation = Callable[..., Array]


def binary(function: Operation) -> Callable[[Node], Operation]:
    return lambda node: function


def cast(node: Node) -> Operation:
    name, code = ELEMENTS.get(int(node.attributes.get("to", 0)), ("", ""))
    if name not in ("float", "double", "int64", "int32"):
        raise NotAForest(f"a Cast to {name or 'a type that is not known'}")
    dtype = np.dtype(code)

    def run(x: Array) -> Array:
        if x.dtype == object:
            raise NotAForest("a Cast of strings")
        return x.astype(dtype, copy=False)

    return run


def total(node: Node) -> Operation:
    def run(*arrays: Array) -> Array:
        result = arrays[0]
        for array in arrays[1:]:
            result = result + array
        return result

    return run


def sigmoid(node: Node) -> Operation:
    def run(x: Array) -> Array:
        one = x.dtype.type(1)
        v = one / (one + np.exp(-np.abs(x)))
        result: Array = np.where(x < 0, one - v, v)
        return result

    return run


def softmax(node: Node) -> Operation:
    axis = int(node.attributes.get("axis", -1))

    def run(x: Array) -> Array:
        if x.ndim != 2 or axis not in (1, -1):
            raise NotAForest("a Softmax along another axis than the last")
        powers = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
        result: Array = powers / powers.sum(axis=1, keepdims=True)
        return result

    return run


def concat(node: Node) -> Operation:
    axis = int(node.attributes["axis"])
    return lambda *arrays: np.concatenate(arrays, axis=axis)


def argmax(node: Node) -> Operation:
    axis, keep = int(node.attributes.get("axis", 0)), bool(node.attributes.get("keepdims", 1))
    if node.attributes.get("select_last_index", 0):
        raise NotAForest("an ArgMax that selects the last index")

    def run(x: Array) -> Array:
        found: Array = np.argmax(x, axis=axis, keepdims=True)
        if x.dtype.kind == "f" and np.isnan(x).any():  # ONNX Runtime goes on past NaN, but not if it comes first
            known = np.argmax(np.where(np.isnan(x), -np.inf, x), axis=axis, keepdims=True)
            found = np.where(np.isnan(np.take(x, [0], axis=axis)), 0, known)
        return found if keep else np.squeeze(found, axis)

    return run


def feature_extractor(node: Node) -> Operation:
    """ArrayFeatureExtractor selects columns by index. From a vector ONNX Runtime makes a matrix with one row."""

    def run(x: Array, which: Array) -> Array:
        taken = np.take(x, which.reshape(-1), axis=-1)
        return taken.reshape(1, -1) if x.ndim == 1 else taken

    return run


def reshape(node: Node) -> Operation:
    if node.attributes.get("allowzero", 0):
        raise NotAForest("a Reshape with allowzero")

    def run(x: Array, shape: Array) -> Array:
        return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])

    return run


OPERATORS: dict[str, Callable[[Node], Operation]] = {
    "Add": binary(np.add),
    "Sub": binary(np.subtract),
    "Mul": binary(np.multiply),
    "Div": binary(np.divide),
    "Neg": binary(np.negative),
    "Exp": binary(np.exp),
    "Sum": total,
    "Cast": cast,
    "Sigmoid": sigmoid,
    "Softmax": softmax,
    "Concat": concat,
    "ArgMax": argmax,
    "ArrayFeatureExtractor": feature_extractor,
    "Reshape": reshape,
}


def keeps_value(node: Node, dtype: str, constants: dict[str, Array]) -> str | None:
    """Return the input that the node returns unchanged (Identity, Cast to the same type, product with 1), else None."""
    if node.op_type == "Identity":
        return node.inputs[0]
    if node.op_type == "Cast" and ELEMENTS.get(int(node.attributes.get("to", 0)), ("", ""))[0] == dtype:
        return node.inputs[0]
    if node.op_type == "Mul" and len(node.inputs) == 2:
        for value, factor in (node.inputs, node.inputs[::-1]):
            constant = constants.get(factor)
            if constant is not None and constant.size == 1 and constant.ndim <= 1 and constant.reshape(()) == 1:
                return value
    return None


def result_dtype(op_type: str, node: Node, dtypes: Sequence[str]) -> str:
    """Return the element type of a node's result. dtypes: the element types of its inputs."""
    if op_type == "Cast":
        return ELEMENTS[int(node.attributes["to"])][0]
    return "int64" if op_type == "ArgMax" else dtypes[0]


def selected_columns(node: Node, inputs: Sequence[Columns | None], constants: dict[str, Array]) -> Columns | None:
    """Return which input columns of the graph the columns of a node's result are, None if they are computed ones.

    inputs: the same for each input of the node.
    """
    first = inputs[0] if inputs else None
    if node.op_type == "Identity":
        return first
    if node.op_type == "Cast" and first is not None:
        to_int = ELEMENTS.get(int(node.attributes.get("to", 0)), ("", ""))[0].startswith("int")
        return Columns(first.column, first.whole | to_int)
    if node.op_type == "Concat" and node.attributes.get("axis") in (1, -1):
        parts = [part for part in inputs if part is not None]
        if len(parts) == len(inputs):
            return Columns(np.concatenate([p.column for p in parts]), np.concatenate([p.whole for p in parts]))
    if node.op_type == "ArrayFeatureExtractor" and first is not None and node.inputs[1] in constants:
        which = constants[node.inputs[1]].reshape(-1)
        return Columns(first.column[which], first.whole[which])
    return None
