"""Builds models for the tests of row_check.py, and examines them as `apply` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shorttail.define.catalog import TENSOR_TYPES
from shorttail.models.buffers import Buffer
from shorttail.models.load import load_runner
from shorttail.models.row_check import RowFinding, examine_rows
from shorttail.models.settings import RunSettings

FLOAT, INT64, STRING, FLOAT16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.FLOAT16
Take = Mapping[str, tuple[int, Sequence[Any]]]
X4: Take = {"x": (FLOAT, [None, 4])}


def op(kind: str, takes: str, gives: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node. takes, gives: names, separated by spaces; "-" is an input that is left out."""
    inputs = ["" if name == "-" else name for name in takes.split()]
    return helper.make_node(kind, inputs, gives.split(), name=f"{kind.lower()}_{gives.split()[0]}", **attributes)


def graph(
    path: Path, nodes: Sequence[onnx.NodeProto], takes: Take, gives: Take, opset: int = 17, **constants: Any
) -> Path:
    tensors = [[helper.make_tensor_value_info(n, t, s) for n, (t, s) in side.items()] for side in (takes, gives)]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", tensors[0], tensors[1], weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save_model(helper.make_model(made, opset_imports=opsets, ir_version=8), path)
    return path


def weight(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.float32(shape[0] ** 0.5)


def examine(
    path: Path,
    outputs: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    example: Callable[[int], list[Any]] | None = None,
    forest: bool = False,
    padded: bool = False,
) -> RowFinding:
    """Examine a model with the examples of `Buffer`. texts: values of its text inputs.

    forest: it may run as a compiled forest. padded: it runs in padded batches.
    """
    settings = RunSettings(runner="auto" if forest else "onnxruntime", padded=padded)
    if outputs is None:
        outputs = [output.name for output in onnx.load(path).graph.output if output.type.HasField("tensor_type")]
    runner = load_runner(path, outputs, settings)
    random = np.random.default_rng(1)

    def made(rows: int) -> list[Any]:
        arrays = []
        for tensor in runner.inputs:
            buffer = Buffer(np.dtype(TENSOR_TYPES[tensor.dtype].numpy), tensor.shape[1] if tensor.shape[1:] else None)
            array = buffer.example(rows, random)
            if texts is not None and tensor.dtype == "string":
                array = random.choice(np.array(texts, object), array.shape)
            arrays.append(array)
        return arrays

    return examine_rows(runner, path.read_bytes(), example or made)
