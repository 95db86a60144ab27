"""SIGHUP under load: workers are replaced one by one, and no request is refused, lost or answered twice."""

import contextlib
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import pytest
from serving import PREDICT, PREDICTED, TIMEOUT_S, Peer, Server, alive, hang_up, pending, replaced, stopped, until

import shorttail as st


def asking(msgid):
    return msgpack.packb([0, msgid, "predict", ["total", {"user_id": 1, "amount": msgid % 1000}]])


class Caller(threading.Thread):
    """Sends requests on one connection, `depth` at a time, each with its own number."""

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
                    data = b"".join(map(asking, asked))
                    peer.send(data[:-7])  # the end of the last message is sent later, perhaps to another worker
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
    server = start("--workers", workers, "--uds", tmp_path / "s", "--p99-budget-ms", 1e6)  # refuses nothing
    before = server.workers()
    callers = [Caller(server.connect, depth) for depth in (1, 1, 20, 200)]
    callers.append(Caller(lambda: Peer(str(tmp_path / "s")), 10))
    for caller in callers:
        caller.start()
    try:
        with server.connect() as idle:
            assert idle.ask(*PREDICT) == PREDICTED
            for _ in range(3 - workers):
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
    assert "reload stopped: the new worker 1 did not start; the old one continues" in said
    assert server.workers() == workers
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_a_worker_that_is_killed_after_a_reload_is_started_again(start):
    server = start()
    hang_up(server)
    [worker] = server.workers()
    os.kill(worker, signal.SIGKILL)
    replaced(server, worker, 1)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_a_stop_while_a_worker_serves_and_waits_for_the_writer(start):
    """It is not ready yet for the supervisor, and has a request in flight."""
    server = start()
    [worker], [writer] = server.workers(), server.children("writer")
    with stopped(writer):
        os.kill(worker, signal.SIGKILL)
        replaced(server, worker, 1)
        [worker] = server.workers()
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
            with stopped(worker):
                peer.send(msgpack.packb(PREDICT))
                server.process.send_signal(signal.SIGTERM)
                until(lambda: signal.SIGTERM in pending(worker) or not alive(worker), server)
            assert peer.reply() == PREDICTED
    assert server.wait() == 0


def test_a_stop_during_a_reload_ends_all_processes(start):
    for successors in (1, 2):  # after this many starts; then the other of the two has retired, or is retiring
        server = start("--workers", "2", "--p99-budget-ms", 1e6)
        first = server.workers()
        callers = [Caller(server.connect, 20) for _ in range(8)]
        for caller in callers:
            caller.start()
        try:
            until(lambda of=callers: all(caller.answered for caller in of), server)  # each has a worker by now
            server.process.send_signal(signal.SIGHUP)
            until(lambda n=successors, old=first, at=server: len(set(at.workers()) - set(old)) == n, server)
            left = server.workers()
            assert server.stop() == 0, server.log.read_text()
        finally:
            for caller in callers:
                caller.ends.set()
            for caller in callers:
                caller.join()
        assert not any(Path(f"/proc/{pid}").exists() for pid in left)
        for caller in callers:
            assert all(ended.startswith(("Connection", "BrokenPipe")) for ended in caller.wrong), caller.wrong


def test_a_reload_requested_during_another_follows_it(start):
    server = start("--workers", "2")
    first = server.workers()
    server.process.send_signal(signal.SIGHUP)
    until(lambda: set(server.workers()) - set(first), server)  # the reload has begun
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.log.read_text().count("reloaded: 2 workers replaced\n") == 2, server)
    assert not set(server.workers()) & set(first)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_a_worker_that_dies_during_a_reload_is_replaced(start):
    server = start("--workers", "2")
    first = server.workers()
    server.process.send_signal(signal.SIGHUP)
    until(lambda: set(server.workers()) - set(first), server)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    until(lambda: "reloaded: 2 workers replaced\n" in server.log.read_text(), server)
    until(lambda: len(server.workers()) == 2, server)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


# -- TLS: connections stay with the worker that has their keys -----------------------------------------------------


class TlsCaller(Caller):
    """A Caller over TLS. After a close_notify it connects again and repeats unanswered requests."""

    def __init__(self, server, authority, depth):
        super().__init__(server.connect, depth)
        self.context = ssl.create_default_context(cafile=authority)
        self.ended = 0

    def connected(self):
        peer = self.connect()
        # Without a close_notify, recv raises SSLEOFError at the end; with one, it returns b"".
        peer.socket = self.context.wrap_socket(peer.socket, server_hostname="127.0.0.1", suppress_ragged_eofs=False)
        return peer

    def run(self):
        try:
            peer = self.connected()
            for number in itertools.count():
                if self.ends.is_set():
                    return peer.socket.close()
                asked = set(range(number * self.depth, (number + 1) * self.depth))
                while asked:
                    peer.send(b"".join(map(asking, asked)))
                    while asked and (reply := peer.reply()) is not None:
                        if reply[2] is not None or reply[3]["outputs"]["total"] != [11.0 + reply[1] % 1000]:
                            self.wrong.append(reply)
                        asked.remove(reply[1])
                        self.answered += 1
                    if asked:
                        peer.socket.close()
                        self.ended += 1
                        peer = self.connected()
        except Exception as error:
            self.wrong.append(repr(error))


class ClientCaller(Caller):
    """The package's client, which must not notice the reload."""

    def __init__(self, server, authority):
        super().__init__(server.connect, 1)
        self.client = st.Client("{}:{}".format(*server.address), tls=authority, timeout_s=TIMEOUT_S)

    def run(self):
        try:
            with self.client as client:
                while not self.ends.is_set():
                    amount = self.answered % 1000
                    if client.predict("total", {"user_id": 1, "amount": amount}).outputs["total"] != [11.0 + amount]:
                        self.wrong.append(amount)
                    self.answered += 1
        except Exception as error:
            self.wrong.append(repr(error))


@pytest.mark.parametrize("workers", [1, 2])
def test_tls_connections_end_with_close_notify_when_workers_are_replaced(start, certificates, workers):
    server = start("--workers", workers, "--tls-cert", certificates / "server.pem", "--p99-budget-ms", 1e6)
    callers = [TlsCaller(server, certificates / "ca.pem", depth) for depth in (1, 1, 20)]
    clients = [ClientCaller(server, certificates / "ca.pem") for _ in range(2)]
    callers += clients
    for caller in callers:
        caller.start()
    try:
        for _ in range(3 - workers):
            assert hang_up(server) == f"reloaded: {workers} worker{'s' * (workers > 1)} replaced\n"
        counts = [caller.answered for caller in callers]
        until(lambda: all(c.answered > n or c.wrong for c, n in zip(callers, counts, strict=True)), server)
    finally:
        for caller in callers:
            caller.ends.set()
        for caller in callers:
            caller.join()
    assert [caller.wrong for caller in callers] == [[]] * len(callers)
    assert all(caller.ended for caller in callers if caller not in clients)
    assert server.stop() == 0


class Handshake:
    """A connection in the middle of its handshake: the server has answered the client's first message."""

    def __init__(self, server, context):
        self.peer = server.connect()
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.peer.send(self.outgoing.read())
        self.incoming.write(self.peer.socket.recv(65536))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.peer.socket.close()

    def finish(self):
        """Finish the handshake and return the answer to PREDICT."""
        self.all_of(self.tls.do_handshake)
        self.tls.write(msgpack.packb(PREDICT))
        self.peer.send(self.outgoing.read())
        return msgpack.unpackb(self.all_of(lambda: self.tls.read(65536)))

    def all_of(self, step):
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.peer.send(self.outgoing.read())
                data = self.peer.socket.recv(65536)
                assert data, "the server has ended it"
                self.incoming.write(data)


def owners(server, connection):
    """Return the workers that hold the other end of a connection."""
    port = f":{connection.getsockname()[1]:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    inodes = {f"socket:[{words[9]}]" for words in lines if words[2].endswith(port)}
    found = set()
    for pid in server.workers():
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            found |= {pid for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd) in inodes}  # noqa: PTH115
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_handshake_in_progress_is_not_broken(start, certificates, workers):
    server = start("--workers", workers, "--tls-cert", certificates / "server.pem")
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    old = set(server.workers())

    def one_retires():
        with server.connect() as peer:
            peer.socket = context.wrap_socket(peer.socket, server_hostname="127.0.0.1")
            assert peer.ask(*PREDICT) == PREDICTED
            return owners(server, peer.socket) - old

    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Handshake(server, context)) for _ in range(2 * workers)]
        server.process.send_signal(signal.SIGHUP)
        until(one_retires, server)
        assert [handshake.finish() for handshake in waiting] == [PREDICTED] * len(waiting)
    until(lambda: "reloaded" in server.log.read_text(), server)
    assert server.stop() == 0


# -- systemd -------------------------------------------------------------------------------------------------------


def test_the_server_notifies_systemd(store, tmp_path, monkeypatch):
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


def test_sockets_of_systemd_are_used(store, tmp_path):
    """LISTEN_PID has to be the server's pid, so a shell sets it and then execs the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "shorttail", "serve", "--store", str(store), "--http-port", "0"]
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
