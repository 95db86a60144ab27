"""HTTP connections: how many there may be, who keeps a reserve, and what is not HTTP."""

import contextlib
import socket

import pytest
from http_asking import Asking, ask, ask_json, http_port
from serving import Server, environment_with


def test_connections_that_were_idle_make_room_for_new_ones(store, tmp_path):
    (tmp_path / "limits").mkdir()
    env = environment_with(tmp_path / "limits", http_connections=6, http_reserve=2)
    one = Server(store, log=tmp_path / "log", env=env)
    try:
        with contextlib.ExitStack() as stack:
            idle = []
            for _ in range(30):
                idle.append(Asking(one, stack))
                assert idle[-1].probe() == 200
            assert ask_json(one, "GET", "/v2")[0] == 200
            assert sum(is_open(peer.peer) for peer in idle) <= 8
        assert one.stop() == 0
    finally:
        one.kill()


def test_probes_and_metrics_are_answered_when_all_connections_are_busy(store, tmp_path):
    (tmp_path / "limits").mkdir()
    env = environment_with(tmp_path / "limits", http_connections=6, http_reserve=2)
    one = Server(store, log=tmp_path / "log", env=env)
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                peer = Asking(one, stack)
                peer.begin(100, "Expect: 100-continue")
                assert peer.answer() == (100, b"")
            for path in ("/livez", "/readyz", "/metrics"):
                assert ask(one, "GET", path)[0] == 200
            status, answer = ask_json(one, "GET", "/v2")
            assert (status, answer) == (503, {"error": "too many HTTP connections are open; connect again later"})
            metrics = ask(one, "GET", "/metrics")[1].decode()
        assert 'shorttail_connections_refused_total{protocol="http"}' in metrics
        assert one.stop() == 0
    finally:
        one.kill()


def is_open(peer):
    peer.setblocking(False)
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer SECRET\r\nAuthorization Bearer SECRET\r\n\r\n",
    b"GET / HTTP/1.1\r\nAuthorization : Bearer SECRET\r\n\r\n",
    b"POST /invocations HTTP/1.1\r\nAuthorization: Bearer SECRET\r\nTransfer-Encoding: chunked\r\n\r\nSECRET\r\n",
    b"GET /SECRET SECRET HTTP/1.1\r\n\r\n",
    b"SECRET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01SECRET\r\n\r\n",
    b"GET /" + b"SECRET" * 2000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"SECRET" * 2000 + b"\r\n\r\n",
    b"GET / HTTP/SECRET\r\n\r\n",
]


@pytest.mark.parametrize("form", ["text", "json"])
def test_garbage_fills_no_log_and_shows_no_secret(store, start, form):
    one = start("--log-failed", "--log", form, of=store)
    for _ in range(100):
        for garbage in GARBAGE:
            with socket.create_connection(("127.0.0.1", http_port(one))) as peer, contextlib.suppress(ConnectionError):
                peer.sendall(garbage)
                answer = peer.recv(4096)
                assert answer.startswith(b"HTTP/1."), answer
                assert answer.split()[1] == b"400", answer
                assert b"SECRET" not in answer
    one.stop()
    log = one.log.read_text()
    assert "SECRET" not in log
    assert 0 < log.count("\n") < 100 * len(GARBAGE)
