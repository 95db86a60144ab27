"""bench/compare.py measures a peer only if its answers are right, and otherwise gives the reason in one line."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCENARIO = {"kind": "model", "keys": {"key": [1, 9]}, "values": {}, "shared": [], "rows": 1, "inputs": ["view:feature"]}
REQUESTS = [{"columns": {"key": key}, "scores": [key / 8]} for key in (1, 2, 3)]
SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        key = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["key"]
        ANSWER
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

START
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
RIGHT = 'answer = {"scores": [key / 8]}'


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    import rivals

    monkeypatch.setattr(rivals, "PEERS", tmp_path / "peers")
    monkeypatch.setattr(rivals, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(rivals, "ANSWER_S", 0.3)
    yield rivals
    for name in ("rivals", "loadgen", "peers.answers", "peers"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "scenario.json").write_text(json.dumps(SCENARIO))
    (folder / "requests.json").write_text(json.dumps(REQUESTS))
    return folder


def make(rivals: ModuleType, answer: str = RIGHT, start: str = "", **described: Any) -> Any:
    folder = rivals.PEERS / "peer"
    folder.mkdir(parents=True)
    peer = {"kind": "model", "describe": "", "path": "/", "answer": ["scores"], "environment": "this", "ready_s": 15}
    (folder / "peer.json").write_text(json.dumps({**peer, **described}))
    (folder / "serve.py").write_text(SERVER.replace("ANSWER", answer).replace("START", start))
    (folder / "requirements.txt").write_text("")
    (found,) = rivals.find("model", [])
    return found


def serve(rivals: ModuleType, peer: Any, data: Path) -> Any:
    return rivals.serving(peer, data, "redis://", 1, os.sched_getaffinity(0), data / "log")


def test_a_peer_with_right_answers_is_measured_and_then_stopped(rivals: ModuleType, data: Path) -> None:
    with serve(rivals, make(rivals), data) as url:
        assert rivals.ask(url, '{"key": 4}') == {"scores": [0.5]}
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, b"{}", timeout=5)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"answer": 'answer = {"scores": [key / 8 + (key == 3) * 1e-3]}'}, "wrong answer: request 2"),
        ({"answer": 'answer = {"scores": [key / 8] * 2}'}, "wrong answer: request 0"),
        ({"answer": 'answer = {"other": []}'}, "its answer is not understood"),
        ({"start": 'sys.exit("no such port")'}, "it does not start: no such port"),
        ({"answer": "import time; time.sleep(1)", "ready_s": 0.2}, "request 0 was not answered"),
    ],
    ids=["one value", "too many", "another form", "ends", "hangs"],
)
def test_a_peer_with_wrong_answers_is_refused_with_the_reason(
    how: dict[str, Any], reason: str, rivals: ModuleType, data: Path
) -> None:
    with pytest.raises(rivals.Unusable, match=reason), serve(rivals, make(rivals, **how), data):
        pass


def test_a_peer_that_cannot_be_installed_is_refused(
    rivals: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    peer = make(rivals, environment="own")
    (peer.folder / "requirements.txt").write_text("shorttail-has-no-such-peer==1.0\n")
    with pytest.raises(rivals.Unusable, match=r"it does not install: ERROR: .*no-such-peer"), serve(rivals, peer, data):
        pass
