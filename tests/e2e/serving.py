"""Helpers for server tests: a small store, a running `shorttail serve`, and plain sockets that talk to it."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import onnx
import pytest
from onnx import TensorProto, helper

import shorttail as st

DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
stats = st.FeatureView("stats", entity=user, features=[
    st.Feature("age", st.Float32, default=1.5),
    st.Feature("visits", st.Int64),
    st.Feature("tier", st.String),
    st.Feature("taste", st.Vector(2)),
])
total = st.Model("total", path="total.onnx", inputs=["stats:age", "stats:visits", "request:amount"])
"""
ROWS = {
    "user_id": [1, 2, 3],
    "age": [10.0, 20.0, None],
    "visits": [1, 2, 3],
    "tier": ["gold", None, "tin"],
    "taste": [[1, 2], [3, 4], [5, 6]],
}
SERVE = [sys.executable, "-m", "shorttail", "serve"]
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")  # `make asan`: several times slower
TIMEOUT_S = 240.0 if ASAN else 60.0  # ends a wait that would never end; no test measures time


def write_sum(path: Path, factor: float) -> None:
    """Write a model: float32 [rows, 3] -> total [rows], the sum of the columns times `factor`."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "factor"], ["total"]),
        ],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
            helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def make_store(home: Path) -> Path:
    """Make a store with DEFINITIONS and ROWS in this folder, and return its path."""
    (home / "definitions.py").write_text(DEFINITIONS)
    write_sum(home / "total.onnx", 1.0)
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.push("stats", ROWS)
    return home / "store"


class Peer:
    """A client made of a socket and a MessagePack decoder, so that a test controls every byte."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(TIMEOUT_S)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        if not isinstance(address, str):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.unpacker = msgpack.Unpacker()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def reply(self):
        """Return the next reply, or None if the server has closed."""
        while True:
            for message in self.unpacker:
                return message
            data = self.socket.recv(65536)
            if not data:
                return None
            self.unpacker.feed(data)

    def ask(self, *message):
        """Send the request [0, msgid, method, params] and return the next reply."""
        self.send(msgpack.packb(message))
        return self.reply()


class Server:
    """A running `shorttail serve` on free ports.

    env: of its processes, by default that of the test. prefix: a command that starts it, as in another namespace.
    """

    def __init__(self, store, *options, log, env=None, prefix=()):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*prefix, *SERVE, "--store", str(store), "--port", "0", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        self.line = self.process.stdout.readline() if ready else ""
        found = re.match(r"serving on 127\.0\.0\.1:(\d+)", self.line)
        if found is None:
            self.kill()
            pytest.fail(f"no announcement: {self.line!r}; stderr: {log.read_text()}")
        self.address = ("127.0.0.1", int(found[1]))

    def connect(self):
        return Peer(self.address)

    def workers(self):
        """Return the process ids of the workers, without the bulk worker."""
        return self.children("worker")

    def children(self, kind):
        """Return the process ids of the children of a kind: "worker", "bulk" (at most one) or "writer"."""
        found = []
        for child in children_of(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                is_bulk = "--bulk" in words
                module = "worker" if kind == "bulk" else kind
                if f"shorttail.server.{module}" in words and is_bulk == (kind == "bulk"):
                    found.append(child)
        return found

    def stop(self, signum=signal.SIGTERM):
        """Send a signal, wait for the end and return the exit code."""
        self.process.send_signal(signum)
        return self.wait()

    def wait(self):
        code = self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
        return code

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def environment_after(folder, script):
    """Return an environment in which each Python process first runs `script`. folder: an empty folder for it."""
    (folder / "sitecustomize.py").write_text(script)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    }


def environment_with(folder, **limits):
    """Return an environment that changes some LIMITS that have no option. folder: an empty folder."""
    lines = [f"object.__setattr__(LIMITS, {name!r}, {value!r})" for name, value in limits.items()]
    return environment_after(folder, "\n".join(["from shorttail.config import LIMITS", *lines]))


PREDICT = [0, 1, "predict", ["total", {"user_id": [1, 2, 9], "amount": 0.5}]]
PREDICTED = [1, 1, None, {"outputs": {"total": [11.5, 22.5, pytest.approx(float("nan"), nan_ok=True)]}, "version": 1}]
FEATURES = [0, 2, "get_online_features", [
    ["stats:age", "stats:visits", "stats:tier", "stats:taste"], {"user_id": [3, 2, 9]},
]]  # fmt: skip
FEATURED = [1, 2, None, {
    "feature_names": ["stats:age", "stats:visits", "stats:tier", "stats:taste"],
    "types": ["Float32", "Int64", "String", "Vector(2)"],
    "values": [[1.5, 20.0, 1.5], [3, 2, None], ["tin", None, None], [[5.0, 6.0], [3.0, 4.0], None]],
    "has_default": [True, False, False, False],
    "statuses": [[1, 0, 2], [0, 0, 2], [0, 1, 2], [0, 0, 2]],
}]  # fmt: skip


def until(condition, server):
    """Wait until the server makes `condition` true, and return its result. No time is asserted."""
    end_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, server.log.read_text()
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)
    return found


def replaced(server, pid, n):
    """Wait until another worker has replaced `pid` and there are n workers."""
    until(lambda: len(found := server.workers()) == n and pid not in found, server)


@contextlib.contextmanager
def stopped(*pids):
    """Stop these processes with SIGSTOP within the block, and continue them with SIGCONT."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            while not has_stopped(pid):
                time.sleep(0.001)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def has_stopped(pid):
    """Whether all threads of a process are stopped. SIGSTOP takes a moment until then."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state in "TZX" for state in states)


def hang_up(server):
    """Reload the server with SIGHUP, and return what it logged until the reload was done."""
    before = len(server.log.read_text())
    server.process.send_signal(signal.SIGHUP)
    until(lambda: re.search(r"^reload.*\n", server.log.read_text()[before:], re.MULTILINE), server)
    return server.log.read_text()[before:]


def refused(*options):
    """Run a `shorttail serve` that has to fail before its announcement, and return its line on stderr."""
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == ""
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def alive(pid):
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pending(pid):
    """Return the signals that wait for a process, because it is stopped. An ended process has none."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        [mask] = re.findall(r"ShdPnd:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
        return {number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1}
    return set()


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
