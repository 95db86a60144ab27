"""No process of ours writes into the home of its user, looks up a name or connects to another machine.

ONNX Runtime does all of this if nobody forbids it (models/runtime.py), but not where it finds the variables of a CI.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from serving import DEFINITIONS, PREDICT, PREDICTED, ROWS, TIMEOUT_S, Server, write_sum

import shorttail as st

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = re.compile(r"^\s*(import|from) onnxruntime\b", re.MULTILINE)
# With these ONNX Runtime is silent by itself.
OF_A_CI = {"CI", "GITHUB_ACTIONS", "BUILD_BUILDID", "TF_BUILD", "GITLAB_CI", "JENKINS_URL", "TRAVIS"}

EMBEDDED = """
import shorttail as st
with st.Engine.open("store") as engine:
    print(engine.predict("total", {"user_id": 1, "amount": 0.5}).outputs["total"].tolist())
"""
# It takes ONNX Runtime two seconds or so to open a connection.
WAITS = "import time; time.sleep(5)"


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def environment(home, tmp_path):
    """The environment of a user who has set nothing, with a shim that notes what goes out in tmp_path/outward."""
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [*compiler.split(), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", "outward.so"]
    source = str(Path(__file__).with_name("outward.c"))
    subprocess.run([*command, source, "-ldl"], check=True, cwd=tmp_path, timeout=TIMEOUT_S)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_")) and k not in OF_A_CI}
    preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(tmp_path / "outward.so")]))
    return kept | {"HOME": str(home), "LD_PRELOAD": preloaded, "OUTWARD_LOG": str(tmp_path / "outward")}


def test_nothing_leaves_the_machine_and_the_home_stays_empty(home, environment, tmp_path):
    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    write_sum(tmp_path / "total.onnx", 1.0)
    run("-m", "shorttail", "apply", "definitions.py", "--store", "store", "--create")
    with st.Engine.open(tmp_path / "store") as engine:
        engine.push("stats", ROWS)
    assert run("-c", EMBEDDED + WAITS) == "[11.5]\n"
    server = Server(tmp_path / "store", log=tmp_path / "log", env=environment)
    try:
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
        run("-c", WAITS)
        assert server.stop() == 0
    finally:
        server.kill()
    assert [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "outward").exists(), (tmp_path / "outward").read_text()


def test_the_shim_sees_what_goes_out(environment, tmp_path):
    tries = """
import contextlib, socket
for name in ("localhost", "127.0.0.1", "nowhere.invalid"):
    with contextlib.suppress(OSError):
        socket.getaddrinfo(name, 80)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    for address in ("127.0.0.1", "192.0.2.1"):  # nothing is sent
        with contextlib.suppress(OSError):
            sender.connect((address, 80))
"""
    subprocess.run([sys.executable, "-c", tries], env=environment, check=True, timeout=TIMEOUT_S)
    assert (tmp_path / "outward").read_text() == "getaddrinfo nowhere.invalid\nconnect 192.0.2.1\n"


def test_a_user_may_leave_the_telemetry_on(environment):
    code = "import os, shorttail.models.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for chosen, kept in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | chosen, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.stdout == f"{kept}\n", done.stderr


def test_one_module_imports_onnx_runtime():
    package = ROOT / "engine" / "shorttail"
    importing = [path for path in package.rglob("*.py") if IMPORTS.search(path.read_text())]
    assert importing == [package / "models" / "runtime.py"]


def test_scripts_and_deployments_turn_the_telemetry_off():
    """Scripts of bench/ and demo/ that import ONNX Runtime are started by others, which import installed.py first."""
    assert 'os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")' in (ROOT / "bench" / "installed.py").read_text()
    for path in ("deploy/Dockerfile", "deploy/shorttail.service"):
        assert "ORT_DISABLE_TELEMETRY=1" in (ROOT / path).read_text()
