"""Workers that die, and the end of a server."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import time

import msgpack
import pytest
from serving import (
    PREDICT,
    PREDICTED,
    SERVE,
    TIMEOUT_S,
    Peer,
    alive,
    children_of,
    replaced,
    stopped,
    until,
)


def test_sigterm_answers_what_is_in_flight_and_exits_with_0(start, store, tmp_path):
    server = start("--uds", str(tmp_path / "socket"))
    with server.connect() as peer, server.connect() as idle:
        assert peer.ask(*PREDICT) == PREDICTED
        peer.send(msgpack.packb(PREDICT) * 500)
        server.process.send_signal(signal.SIGTERM)
        assert [peer.reply() for _ in range(500)] == [PREDICTED] * 500
        assert peer.reply() is None
        assert idle.reply() is None
    assert server.wait() == 0  # 1 would say that a worker was killed after the stop timeout
    assert not (tmp_path / "socket").exists()
    assert server.log.read_text() == ""
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_sigint_does_the_same(start):
    assert start("--workers", "2").stop(signal.SIGINT) == 0


def unread(n):
    """Encode n requests whose replies are larger than the buffers of a Unix socket."""
    columns, options = {"user_id": [1] * 16_000}, {"encoding": "tensor"}
    return msgpack.packb([0, 1, "get_online_features", [["stats:taste"], columns, options]]) * n


def test_a_second_signal_does_not_wait(start, tmp_path):
    server = start("--uds", tmp_path / "socket", "--p99-budget-ms", 1e6)  # no request is refused for overload
    with Peer(str(tmp_path / "socket")) as peer:
        peer.send(unread(20))  # unread replies keep the worker from ending
        assert peer.reply()[2] is None
        server.process.send_signal(signal.SIGTERM)
        until(lambda: is_refused(server), server)
        assert server.stop() == 1


def test_sigterm_during_the_start_leaves_no_process(store, tmp_path):
    """The signal comes soon after the socket exists, and after the first child has started."""
    for started in (lambda path, pid: path.exists(), lambda path, pid: children_of(pid)):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        path = folder / "s"
        command = [*SERVE, "--store", str(store), "--port", "0", "--workers", "2", "--uds", str(path)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)}, stdout=pipe, stderr=pipe) as process:
            end_s = time.monotonic() + TIMEOUT_S
            while not started(path, process.pid):
                assert time.monotonic() < end_s
                time.sleep(0.001)
            left = children_of(process.pid)
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=TIMEOUT_S) == (b"", b"")
        assert process.returncode == 0
        assert not any(map(alive, left))
        assert list(folder.iterdir()) == []


def test_sighup_during_the_stop_breaks_no_request(start, tmp_path):
    server = start("--uds", tmp_path / "socket", "--p99-budget-ms", 1e6)  # no request is refused for overload
    n = 20
    with Peer(str(tmp_path / "socket")) as peer:  # a Unix socket has small buffers
        peer.send(unread(n))  # the worker cannot end before the answers are read
        first = peer.reply()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: is_refused(server), server)
        server.process.send_signal(signal.SIGHUP)
        assert [first, *(peer.reply() for _ in range(n - 1))] == [first] * n
        assert peer.reply() is None
    assert server.wait() == 0


def is_refused(server):
    try:
        server.connect().socket.close()
    except ConnectionRefusedError:
        return True
    return False


# -- workers that die ----------------------------------------------------------------------------------------------


def test_two_workers_share_the_sockets_and_a_killed_one_is_replaced(start, tmp_path):
    server = start("--workers", "2", "--uds", tmp_path / "socket")
    assert "· 2 workers ·" in server.line
    first = server.workers()
    assert len(first) == 2
    for address in (server.address, str(tmp_path / "socket")):
        for _ in range(20):
            with Peer(address) as peer:
                assert peer.ask(*PREDICT) == PREDICTED
    os.kill(first[0], signal.SIGKILL)
    replaced(server, first[0], 2)
    assert len(set(server.workers()) - set(first)) == 1
    assert re.fullmatch(
        rf"worker \d \(pid {first[0]}\) died: signal 9 \(SIGKILL\); starting it again in 0\.1 s\n",
        server.log.read_text(),
    )
    with stopped(first[1]):  # so that the new worker has to answer
        for address in (server.address, str(tmp_path / "socket")):
            with Peer(address) as peer:
                assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_new_connections_do_not_go_to_a_worker_that_hangs(start, tmp_path):
    server = start("--workers", "2", "--hang-deadline-s", "1000")
    hung, _ = server.workers()
    with contextlib.ExitStack() as peers:
        with stopped(hung):
            held = [peers.enter_context(server.connect()) for _ in range(20)]  # each worker gets half
            for peer in held:
                assert peer.ask(*PREDICT) == PREDICTED
        for peer in [*held, *(peers.enter_context(server.connect()) for _ in range(20))]:
            assert peer.ask(*PREDICT) == PREDICTED  # the worker that continues has lost them
    assert server.stop() == 0
    assert server.log.read_text() == ""


def test_connections_that_a_dead_worker_had_not_accepted_go_to_its_successor(start):
    server = start("--workers", "2", "--hang-deadline-s", "1000")
    killed, hung = server.workers()
    with contextlib.ExitStack() as peers, stopped(killed, hung):
        waiting = [peers.enter_context(server.connect()) for _ in range(10)]
        for peer in waiting:
            peer.send(msgpack.packb(PREDICT))
        os.kill(killed, signal.SIGKILL)
        assert [peer.reply() for peer in waiting] == [PREDICTED] * 10
    assert server.stop() == 0


def test_the_restart_of_a_worker_is_tried_again(start):
    server = start("--workers", "2")
    killed, _ = server.workers()
    files = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, files[1]))
    os.kill(killed, signal.SIGKILL)
    said = r"error: a process cannot be started: Too many open files; trying it again in 0\.\d s\n"
    until(lambda: re.search(said, server.log.read_text()), server)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, files)
    replaced(server, killed, 2)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0


def test_workers_end_when_their_supervisor_is_killed(start):
    server = start("--workers", "2")
    workers = server.workers()
    server.kill()
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s and any(map(alive, workers)):
        time.sleep(0.05)
    assert not any(map(alive, workers))
