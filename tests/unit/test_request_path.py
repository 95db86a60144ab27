"""The path of a request is short: docs/design.md lists its files, and a traced predict enters no other file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import msgpack
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_wire import FakeLoop, FakeTransport

import shorttail as st
from shorttail._native import wire
from shorttail.server.batcher import Batcher
from shorttail.server.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[2]
STEPS_MAX = 6


def listed() -> tuple[list[str], set[str]]:
    """Return the file of each step of "The way of a request" in order, and all files that its table names."""
    section = (ROOT / "docs" / "design.md").read_text().partition("## The way of a request\n")[2].partition("\n#")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| \d", line)]
    steps = [re.findall(r"`([\w/]+\.pyx?)`", row) for row in rows]
    return [step[0] for step in steps], {file for step in steps for file in step}


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    """Yield an engine with a view and a forest of a single tree: y is 1 where the feature is above 0.5, else 0."""
    tree = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_values": [0.5, 0.0, 0.0], "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0],
        "target_treeids": [0, 0], "target_nodeids": [1, 2], "target_ids": [0, 0], "target_weights": [0.0, 1.0],
        "n_targets": 1,
    }  # fmt: skip
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", **tree)
    value = helper.make_tensor_value_info
    float_, shape = TensorProto.FLOAT, [None, 1]
    graph = helper.make_graph([node], "g", [value("x", float_, shape)], [value("y", float_, shape)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "tree.onnx")
    user = st.Entity("user", keys={"user_id": st.Int64})
    stats = st.FeatureView("stats", entity=user, features=[st.Feature("x", st.Float32)])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([stats, st.Model("m", str(tmp_path / "tree.onnx"), ["stats:x"])])
        engine.push("stats", {"user_id": np.arange(2), "x": np.array([0.0, 1.0])})
        yield engine


def test_a_predict_enters_the_files_that_the_design_lists_and_no_other(engine: st.Engine) -> None:
    loop = FakeLoop()
    router = wire.Router(loop, engine, {})
    Batcher(router, engine, lambda error: None, Telemetry())
    connection, transport = wire.Connection(router), FakeTransport()
    connection.connection_made(transport)
    seen: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "c_call":
            # A native method, named by its class or its module. Python does not show calls inside Cython code.
            owner = type(getattr(argument, "__self__", None)).__module__
            name = owner if owner.startswith("shorttail.") else str(argument.__module__)
        if event in ("call", "c_call") and name.startswith("shorttail."):
            seen.append(name)

    def ask(message: bytes) -> list[Any]:
        connection.data_received(message)
        loop.turn()
        reply: list[Any] = msgpack.unpackb(transport.written.pop())
        return reply

    message = msgpack.packb([0, 7, "predict", ["m", {"user_id": [0, 1]}]])
    ask(message)  # the first request compiles the plan, which later requests use
    sys.setprofile(note)
    try:
        reply = ask(message)
    finally:
        sys.setprofile(None)
    assert reply == [1, 7, None, {"outputs": {"y": [[0.0], [1.0]]}, "version": 1}]

    steps, files = listed()
    assert len(steps) <= STEPS_MAX + 1, "the last step leads back to the file of the first"
    assert steps[0] == steps[-1] == "native/wire.pyx"
    entered = {file_of(module) for module in seen}
    assert {"server/batcher.py", "engine.py", "pipeline.py", "models/forest.py"} <= entered, "nothing was traced"
    assert entered - files == set(), f"not in docs/design.md: {sorted(entered - files)}"


def file_of(module: str) -> str:
    name = module.removeprefix("shorttail.")
    if name.startswith("_native."):
        return f"native/{name.removeprefix('_native.')}.pyx"
    return f"{name.replace('.', '/')}.py"
