"""SIGHUP under load: workers are replaced one by one, and no request is refused, lost or answered twice."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import pytest
from test_server import PREDICT, PREDICTED, TIMEOUT_S, Peer, Server, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("reloaded"))


@pytest.fixture
def start(store, tmp_path):
    servers = []

    def start_server(*options):
        servers.append(Server(store, *map(str, options), log=tmp_path / f"log{len(servers)}"))
        return servers[-1]

    yield start_server
    for one in servers:
        one.kill()


def until(condition, server):
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, server.log.read_text()
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)


def hang_up(server):
    """SIGHUP, and wait until it is done; what the log said."""
    before = len(server.log.read_text())
    server.process.send_signal(signal.SIGHUP)
    until(lambda: re.search(r"^reload.*\n", server.log.read_text()[before:], re.MULTILINE), server)
    return server.log.read_text()[before:]


class Caller(threading.Thread):
    """Asks one thing after another on one connection, `depth` at a time, each with its own number."""

    def __init__(self, connect, depth):
        super().__init__()
        self.connect, self.depth = connect, depth
        self.ends = threading.Event()
        self.answered, self.wrong = 0, []

    def run(self):
        try:
            with self.connect() as peer:
                for number in itertools.count():
                    if self.ends.is_set():
                        return
                    asked = {number * self.depth + k: k for k in range(self.depth)}
                    messages = [
                        msgpack.packb([0, msgid, "predict", ["total", {"user_id": 1, "amount": msgid % 1000}]])
                        for msgid in asked
                    ]
                    data = b"".join(messages)
                    peer.send(data[:-7])  # the end of the last comes by itself, perhaps to another worker
                    peer.send(data[-7:])
                    for _ in range(self.depth):
                        reply = peer.reply()
                        if reply is None:
                            raise ConnectionError("closed by the server")
                        if reply[2] is not None or reply[3]["outputs"]["total"] != [11.0 + reply[1] % 1000]:
                            self.wrong.append(reply)
                        del asked[reply[1]]
                        self.answered += 1
        except Exception as error:
            self.wrong.append(repr(error))


@pytest.mark.parametrize("workers", [1, 2])
def test_replacing_workers_under_load_breaks_nothing(start, tmp_path, workers):
    server = start("--workers", workers, "--uds", tmp_path / "s", "--p99-budget-ms", 1e6)  # none is shed
    before = server.workers()
    callers = [Caller(server.connect, depth) for depth in (1, 1, 20, 200)]
    callers.append(Caller(lambda: Peer(str(tmp_path / "s")), 10))
    for caller in callers:
        caller.start()
    try:
        with server.connect() as idle:
            assert idle.ask(*PREDICT) == PREDICTED
            for _ in range(2):
                assert hang_up(server) == f"reloaded: {workers} worker{'s' * (workers > 1)} replaced\n"
                with server.connect() as peer:
                    assert peer.ask(*PREDICT) == PREDICTED
                assert idle.ask(*PREDICT) == PREDICTED
            counts = [caller.answered for caller in callers]
            until(lambda: all(c.answered > n or c.wrong for c, n in zip(callers, counts, strict=True)), server)
    finally:
        for caller in callers:
            caller.ends.set()
        for caller in callers:
            caller.join()
    assert [caller.wrong for caller in callers] == [[]] * len(callers)
    assert len(server.workers()) == workers
    assert not set(server.workers()) & set(before)
    assert server.stop() == 0


def test_a_store_that_does_not_open_keeps_the_old_workers(start, store):
    server = start("--workers", "2")
    workers = server.workers()
    moved = store.with_name("elsewhere")
    store.rename(moved)
    try:
        said = hang_up(server)
    finally:
        moved.rename(store)
    assert "error: " in said
    assert "reload stopped: the new worker 1 did not start; the old one goes on" in said
    assert server.workers() == workers
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_a_worker_that_is_killed_after_a_reload_is_started_again(start):
    server = start()
    hang_up(server)
    [worker] = server.workers()
    os.kill(worker, signal.SIGKILL)
    until(lambda: server.workers() and server.workers() != [worker], server)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_stopping_in_the_middle_of_a_reload(start):
    server = start("--workers", "2")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(server.workers()) > 2, server)
    workers = server.workers()
    assert server.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


# -- systemd -------------------------------------------------------------------------------------------------------


def test_what_systemd_is_told(store, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(TIMEOUT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        server = Server(store, log=tmp_path / "log")
        try:
            said = told(notices, "READY=1")
            assert "STATUS=models: total v1" in said
            assert told(notices, "WATCHDOG=1")
            assert told(notices, "WATCHDOG=1")
            server.process.send_signal(signal.SIGHUP)
            assert "MONOTONIC_USEC=" in told(notices, "RELOADING=1")
            assert told(notices, "READY=1")
            server.process.send_signal(signal.SIGTERM)
            assert told(notices, "STOPPING=1")
            assert server.wait() == 0
        finally:
            server.kill()


def told(notices, wanted):
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        text = notices.recv(4096).decode()
        if wanted in text.split("\n"):
            return text
    pytest.fail(f"systemd was not told {wanted}")


def test_sockets_that_systemd_listens_on(store, tmp_path):
    """LISTEN_PID has to be the server's: a shell sets it, and becomes the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "shorttail", "serve", "--store", str(store)]
        script = 'exec 3<&"$0"; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", script, str(listener.fileno()), *command],
            stdout=subprocess.PIPE, text=True, pass_fds=[listener.fileno()],
        )  # fmt: skip
        try:
            port = listener.getsockname()[1]
            assert process.stdout.readline().startswith(f"serving on 127.0.0.1:{port} ·")
            with Peer(("127.0.0.1", port)) as peer:
                assert peer.ask(*PREDICT) == PREDICTED
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
