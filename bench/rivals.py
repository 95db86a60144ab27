"""Build the environments of the peers of bench/compare.py, start and stop the peers, and check their answers.

A peer is a folder of bench/peers/ with requirements.txt and peer.json. In peer.json, "describe" is its configuration
with the reasons, "kind" is "model" or "features", and "variants" lists runs that differ by an argument. A peer that is
a server has serve.py, run as `python serve.py FOLDER PORT WORKERS REDIS_URL [VARIANT]`; its peer.json has "path",
"answer" (answers.py), and "template" if the protocol needs more than the body of the scenario. Any other peer has
local.py, which measures itself (peers/lookups.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loadgen
import numpy as np
from peers.answers import values_of

PEERS = Path(__file__).resolve().parent / "peers"
ENVIRONMENTS = PEERS / ".environments"
READY_S, ANSWER_S, STOP_S = 120, 20, 15
TOLERANCE = 1e-5


class Unusable(Exception):
    """A peer cannot be measured; the message says why, in one line."""


@dataclass(frozen=True)
class Peer:
    name: str
    variant: str  # "" if it has no variants

    @property
    def folder(self) -> Path:
        return PEERS / self.name

    @property
    def title(self) -> str:
        name: str = self.described.get("title", self.name)
        return f"{name}, {self.variant}" if self.variant else name

    @property
    def described(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.folder / "peer.json").read_text())
        return read

    @property
    def describe(self) -> str:
        own = self.described.get("variants", {}).get(self.variant, "")
        return f"{self.described['describe']}; {own}" if own else self.described["describe"]

    @property
    def is_local(self) -> bool:
        return (self.folder / "local.py").exists()


def find(kind: str, names: list[str]) -> list[Peer]:
    """Return the named peers of a kind, or all of them. Raises SystemExit for an unknown name."""
    found = []
    for path in sorted(PEERS.glob("*/peer.json")):
        peer = Peer(path.parent.name, "")
        if peer.described["kind"] in (kind, "both"):
            found += [Peer(peer.name, variant) for variant in peer.described.get("variants", {"": ""})]
    known = {peer.name for peer in found}
    return [peer for peer in found if peer.name in names] if set(names) & known else [] if names else found


def environment(peer: Peer) -> Path:
    """Return the peer's Python, and rebuild its environment if requirements.txt has changed. Raises Unusable."""
    if peer.described.get("environment") == "this":
        return Path(sys.executable)
    home, wanted = ENVIRONMENTS / peer.name, peer.folder / "requirements.txt"
    python, stamp = home / "bin" / "python", home / "installed"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return python
    print(f"installing {peer.name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    for command in ([sys.executable, "-m", "venv", home], [python, "-m", "pip", "install", "--quiet", "-r", wanted]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=clean())
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise Unusable(f"it does not install: {(lines or ['pip failed'])[0][:300]}")
    stamp.write_text(wanted.read_text())
    return python


def clean() -> dict[str, str]:
    """Return the environment variables without those that would add this Python's packages to another environment."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


@contextlib.contextmanager
def serving(peer: Peer, data: Path, redis_url: str, workers: int, cpus: set[int], log: Path) -> Iterator[str]:
    """Start the peer's server. Yields its URL when it has answered requests.json correctly. Raises Unusable."""
    python, port = environment(peer), free_port()
    command = [python, "serve.py", data.resolve(), port, workers, redis_url, *([peer.variant] if peer.variant else [])]
    with log.open("wb") as output, pinned(cpus):
        server = subprocess.Popen(
            list(map(str, command)),
            cwd=peer.folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=clean(),
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}{peer.described['path']}"
        check(peer, url, data, server, log)
        yield url
    finally:
        stop(server)


def check(peer: Peer, url: str, data: Path, server: subprocess.Popen[bytes], log: Path) -> None:
    """Check the answer to every request of requests.json. Raises Unusable."""
    described, scenario = peer.described, json.loads((data / "scenario.json").read_text())
    deadline_s = time.monotonic() + described.get("ready_s", READY_S)
    for number, request in enumerate(json.loads((data / "requests.json").read_text())):
        asked = body(peer, scenario, request["columns"])
        while True:
            try:
                found = values_of(ask(url, asked), described, scenario["inputs"])
                break
            except (OSError, ValueError) as error:
                if server.poll() is not None:
                    raise Unusable(f"it does not start: {last_line(log)}") from None
                if number or time.monotonic() > deadline_s:
                    raise Unusable(
                        f"request {number} was not answered: {error}; its log ends: {last_line(log)}"
                    ) from None
                time.sleep(0.1)
            except (KeyError, IndexError, TypeError) as error:
                raise Unusable(f"its answer is not understood: {error!r}") from None
        expected = request["scores"]
        if len(found) != len(expected) or not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise Unusable(f"wrong answer: request {number} gave other values than ONNX Runtime on a pandas join")


def body(peer: Peer, scenario: Mapping[str, Any], columns: Mapping[str, Any] | None = None) -> str:
    """Return a request in the form of this peer, of the given columns or as a template of `shorttail bench`.

    "template" in peer.json is the text around {{body}}. "column" makes a tensor of each column, from {{name}},
    {{type}}, {{count}} and {{values}}; without it the body is one object of columns.
    """
    described, parts = peer.described, []
    for name in (*scenario["keys"], *scenario["values"]):
        shared = name in scenario["shared"]
        if columns is None:
            many = not shared and (scenario["rows"] > 1 or scenario["kind"] == "features")
            count = scenario["rows"] if many else 1
            values = f"{{{{{name}...}}}}" if many else f"{{{{{name}}}}}"
        else:
            many = isinstance(columns[name], list)
            count = len(columns[name]) if many else 1
            values = json.dumps(columns[name]).strip("[]")
        if "column" in described:
            kind = "INT64" if name in scenario["keys"] else "FP64"
            filled = {"name": name, "type": kind, "count": str(count), "values": values}
            part = described["column"]
            for word, text in filled.items():
                part = part.replace(f"{{{{{word}}}}}", text)
            parts.append(part)
        else:
            parts.append(f'"{name}": [{values}]' if many else f'"{name}": {values}')
    joined = ", ".join(parts) if "column" in described else "{" + ", ".join(parts) + "}"
    return str(described.get("template", "{{body}}")).replace("{{body}}", joined)


def ask(url: str, text: str) -> Any:
    request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        return json.load(response)


def measure_local(peer: Peer, data: Path, seconds: float, redis_url: str, cpus: set[int]) -> dict[str, Any]:
    """Run the peer's local.py and return its result. Raises Unusable."""
    command = [
        environment(peer),
        "local.py",
        data.resolve(),
        seconds,
        redis_url,
        *([peer.variant] if peer.variant else []),
    ]
    variables = None if peer.described.get("environment") == "this" else clean()
    with pinned(cpus):
        running = subprocess.Popen(
            list(map(str, command)),
            cwd=peer.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            start_new_session=True,
        )
    try:
        output, errors = running.communicate(timeout=peer.described.get("ready_s", READY_S) + 3 * seconds)
    except subprocess.TimeoutExpired:
        raise Unusable("it took too long") from None
    finally:
        stop(running)
    if running.returncode != 0:
        raise Unusable((errors.strip().splitlines() or ["it printed nothing"])[-1][:300])
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


@contextlib.contextmanager
def redis_server(folder: Path, cpus: set[int]) -> Iterator[str]:
    """Start Redis without persistence on the CPUs. Yields its URL. Raises loadgen.BenchError."""
    if shutil.which("redis-server") is None:
        raise loadgen.BenchError(
            "redis-server is not installed, which most peers keep their features in: apt-get install redis-server"
        )
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with pinned(cpus):
        server = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise loadgen.BenchError(f"redis-server ended with status {server.returncode}") from None
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        stop(server)


@contextlib.contextmanager
def pinned(cpus: set[int]) -> Iterator[None]:
    """Start processes on these CPUs: a process inherits the affinity of the thread that starts it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def stop(process: subprocess.Popen[Any]) -> None:
    """Send SIGTERM, and kill the process with its children if it does not end."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if os.getpgid(0) != process.pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it printed nothing"])[-1].strip()[:300]
