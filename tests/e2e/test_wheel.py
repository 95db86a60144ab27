"""The wheel works where nothing else is: an empty virtual environment, outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]

DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
stats = st.FeatureView("stats", entity=user, features=[st.Feature("age", st.Float32)])
double = st.Model("double", path="double.onnx", inputs=["stats:age", "request:amount"])
"""

SERVE = """
import re, signal, subprocess, sys
import shorttail as st

with st.Engine.open("store") as engine:
    engine.push("stats", {"user_id": [7], "age": [20.5]})
    embedded = engine.predict("double", {"user_id": 7, "amount": 1.5}).outputs["y"].tolist()
server = subprocess.Popen([sys.argv[1], "serve", "--store", "store", "--port", "0"], stdout=subprocess.PIPE, text=True)
try:
    address = re.search(r"serving on (\\S+)", server.stdout.readline())[1]
    with st.Client(address) as client:
        served = client.predict("double", {"user_id": 7, "amount": 1.5}).outputs["y"].tolist()
finally:
    server.send_signal(signal.SIGTERM)
assert server.wait(30) == 0
print(embedded, served, st.__file__)
"""


def write_model(path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["y"])],
        "double",
        [value("x", TensorProto.FLOAT, [None, 2])],
        [value("y", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(np.array([2], np.float32), "two")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def run(*command: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_serves_from_an_empty_environment(tmp_path: Path) -> None:
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        tmp_path / "dist",
        ROOT,
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "dist").glob("shorttail-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / "bin"
    run(bin_folder / "pip", "install", "--quiet", wheel, cwd=tmp_path)

    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    write_model(tmp_path / "double.onnx")
    applied = run(bin_folder / "shorttail", "apply", "definitions.py", "--store", "store", cwd=tmp_path)
    assert re.search(r"\+ model double +version 1", applied)
    (tmp_path / "smoke.py").write_text(SERVE)
    said = run(bin_folder / "python", "smoke.py", bin_folder / "shorttail", cwd=tmp_path)
    assert said.startswith("[[41.0, 3.0]] [[41.0, 3.0]]")
    assert str(tmp_path / "env") in said
