"""Limits of connections and requests on a running server: what exceeds them is refused, and others are served."""

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest
from http_asking import INFER, Asking, ask, body_of, http_port
from serving import PREDICT, PREDICTED, TIMEOUT_S, Server, make_store

from shorttail.config import LIMITS

MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("limited"))


@pytest.fixture(scope="module")
def strict(store):
    """A server with a limit of few connections."""
    options = ["--max-connections", "12", "--max-peer-connections", "10", "--p99-budget-ms", "1e6"]
    server = Server(store, *options, log=store.parent / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


def closed(sock, within_s=TIMEOUT_S):
    """Wait until the peer closes the connection, and drop what it still sends."""
    sock.settimeout(within_s)
    with contextlib.suppress(ConnectionError):
        while sock.recv(65536):
            pass
    return True


@pytest.mark.parametrize("over", [0, 1])
def test_connections_from_one_address_are_limited(strict, over):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(strict.connect()) for _ in range(10 + over)]
        answers = [peer.ask(*PREDICT) for peer in peers[:10]]
        assert answers == [PREDICTED] * 10
        if over:
            refusal = peers[10].reply()
            assert refusal[1:] == [None, {"code": "RESOURCE_EXHAUSTED", "message": refusal[2]["message"]}, None]
            assert "more than 10 connections from one address" in refusal[2]["message"]
            assert closed(peers[10].socket)
    end = time.monotonic() + TIMEOUT_S
    while True:  # closed connections do not count
        with strict.connect() as peer:
            if peer.ask(*PREDICT) == PREDICTED:
                return
        assert time.monotonic() < end


def test_connections_over_http_beyond_the_limit_are_closed(strict):
    address = "127.0.0.1", http_port(strict)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(address)) for _ in range(LIMITS.http_connections)]
        for peer in peers[:: LIMITS.http_connections - 1]:
            assert alive(peer)
        extra = stack.enter_context(socket.create_connection(address))
        assert closed(extra)
        peers[0].close()
        end = time.monotonic() + TIMEOUT_S
        while True:  # the worker learns of the close at its next read
            with socket.create_connection(address) as again:
                if alive(again):
                    break
            assert time.monotonic() < end


def alive(peer):
    """Whether an HTTP request on the connection is answered."""
    peer.settimeout(TIMEOUT_S)
    try:
        peer.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        return peer.recv(65536).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def test_few_long_connections_are_spread_evenly_over_workers(store, tmp_path):
    server = Server(store, "--workers", "2", log=tmp_path / "log")
    try:
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(server.connect()) for _ in range(8)]
            for peer in peers:
                assert peer.ask(*PREDICT) == PREDICTED
            assert [connections(worker, server.address[1]) for worker in server.workers()] == [4, 4]
            for peer in peers[::2]:
                peer.socket.close()
            time.sleep(0.3)  # workers report their number of connections ten times per second
            more = [stack.enter_context(server.connect()) for _ in range(4)]
            assert [peer.ask(*PREDICT) for peer in more] == [PREDICTED] * 4
            assert [connections(worker, server.address[1]) for worker in server.workers()] == [4, 4]
        assert server.stop() == 0
        assert server.log.read_text() == ""
    finally:
        server.kill()


def connections(pid, port):
    """Count the established connections of a process to this port."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == port and fields[3] == "01":
            inodes.add(f"socket:[{fields[9]}]")
    held = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(str(link.readlink()))
    return len(inodes & held)


@pytest.mark.parametrize(
    "options", [["--busy-poll-us", "200"], ["--busy-poll-us", "0"], ["--pin-cpus", "--workers", "2"]]
)
def test_a_server_that_polls_or_pins_its_cpus_serves_the_same(store, tmp_path, options):
    server = Server(store, *options, log=tmp_path / "log")
    try:
        with server.connect() as peer:
            for _ in range(50):
                assert peer.ask(*PREDICT) == PREDICTED
        if "--pin-cpus" in options:
            allowed = os.sched_getaffinity(0)
            cpus = [os.sched_getaffinity(worker) for worker in server.workers()]
            assert all(len(one) == 1 and one <= allowed for one in cpus)
            assert len(set.union(*cpus)) == min(2, len(allowed))
        assert server.stop() == 0
        assert server.log.read_text() == ""
    finally:
        server.kill()


def test_a_body_that_has_not_arrived_takes_no_room(start):
    """Connections that announce bodies, or never end them, keep nobody else from sending one."""
    server = start()
    body = body_of(1)
    with contextlib.ExitStack() as stack:
        for number in range(2 * LIMITS.http_body_bytes // LIMITS.frame_bytes):
            peer = Asking(server, stack)
            if number % 2:
                peer.begin(LIMITS.frame_bytes, "Expect: 100-continue")
                assert peer.answer() == (100, b"")  # the server has read its headers
            else:
                peer.send(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n")
        assert ask(server, "POST", INFER, body)[0] == 200
    assert server.stop() == 0
    assert server.log.read_text() == ""
