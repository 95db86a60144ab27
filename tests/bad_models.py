"""ONNX files that hang or crash the process that loads or runs them, and stores that have them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.store import Store
from shorttail.store.files import model_path


def save(path: Path, nodes: list[Any], constants: dict[str, Any], kind: int = TensorProto.FLOAT) -> str:
    value = [helper.make_tensor_value_info(name, kind, [None, 1]) for name in "xy"]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "bad", value[:1], value[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def endless(path: Path) -> str:
    """A model of which ONNX Runtime computes a constant when it loads it: a loop that ends after 2**62 rounds."""
    state = helper.make_tensor_value_info("v", TensorProto.FLOAT, [1])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sin", ["v"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            state,
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, [1]),
        ],
    )
    constants = {"rounds": np.int64(1 << 62), "yes": np.bool_(True), "one": np.ones(1, np.float32)}
    nodes = [
        helper.make_node("Loop", ["rounds", "yes", "one"], ["w"], body=body),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    return save(path, nodes, constants)


def deadly(path: Path) -> str:
    """A model that divides the smallest integer by -1 whatever it gets, for which the processor sends SIGFPE."""
    nodes = [
        helper.make_node("Mul", ["x", "none"], ["zero"]),
        helper.make_node("Add", ["zero", "smallest"], ["a"]),
        helper.make_node("Add", ["zero", "minus_one"], ["b"]),
        helper.make_node("Div", ["a", "b"], ["y"]),
    ]
    constants = {"none": np.int64(0), "smallest": np.int64(-(1 << 63)), "minus_one": np.int64(-1)}
    return save(path, nodes, constants, TensorProto.INT64)


def deadly_to_load(path: Path) -> str:
    """A model with such a division of constants, which ONNX Runtime does when it loads the model."""
    nodes = [
        helper.make_node("Div", ["smallest", "minus_one"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    constants = {"smallest": np.full(1, -(1 << 63)), "minus_one": np.full(1, -1)}
    return save(path, nodes, constants, TensorProto.INT64)


def sound(path: Path) -> str:
    return save(path, [helper.make_node("Sigmoid", ["x"], ["y"])], {})


def store_of(home: Path, *names: str) -> Path:
    """Make a store with models of these names, which are sound and take the request column a. Returns its path."""
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply([st.Model(name, path=sound(home / "sound.onnx"), inputs=["request:a"]) for name in names])
    return home / "store"


def plant(store: Path, name: str, make: Callable[[Path], str]) -> None:
    """Replace the file of version 1 by one that `apply` would refuse, as if it had been sound on another machine."""
    path = model_path(store, name, 1)
    make(path)
    opened = Store.open(store)
    try:
        with opened.edit_catalog() as catalog:
            entry = catalog.model(name)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            catalog.models[name] = entry.with_version(1, replace(entry.version(1), sha256=sha256))
    finally:
        opened.close()
