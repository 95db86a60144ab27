"""Timeouts of connections on a running server: a connection past its timeout is closed, and others are served.

These tests wait for timeouts of a few seconds. tests/unit/test_wire_limits.py tests their exact length, with a clock
that the test sets.
"""

import contextlib
import itertools
import json
import os
import socket
import time
from pathlib import Path

import msgpack
import pytest
from http_asking import Asking, body_of
from serving import PREDICT, PREDICTED, TIMEOUT_S, Server, environment_with, make_store

MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("deadlines"))


@pytest.fixture(scope="module")
def server(store):
    """A server with short timeouts. MessagePack-RPC: 1 s for an incomplete message and for unread output, 2 s between
    requests. HTTP: 1 s for the headers, 2 s for a body, 3 s between requests."""
    (store.parent / "site").mkdir()
    short = environment_with(store.parent / "site", http_header_s=1.0, http_read_s=2.0, http_idle_s=3.0)
    server = Server(
        store, "--frame-deadline-s", "1", "--write-deadline-s", "1", "--idle-deadline-s", "2",
        "--p99-budget-ms", "1e6", log=store.parent / "log", env=short,
    )  # fmt: skip
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


# -- MessagePack-RPC -------------------------------------------------------------------------------------------------


def is_closed(sock):
    """Whether the peer has closed this connection. Asserts that it sends nothing."""
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def rss(server):
    [worker] = server.workers()
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_incomplete_messages_and_later_idle_connections_are_closed(server):
    message = msgpack.packb(PREDICT)
    with server.connect() as half, server.connect() as idle, server.connect() as busy:
        half.send(message[:20])
        idle.send(message)
        assert idle.reply() == PREDICTED
        for one in (half, idle):
            end_s = time.monotonic() + TIMEOUT_S
            while not is_closed(one.socket):
                assert busy.ask(*PREDICT) == PREDICTED
                assert time.monotonic() < end_s, "not cut off"
                time.sleep(0.02)


def test_clients_that_never_read_are_closed_and_their_memory_is_freed(server):
    """In each round, four clients do not read. A leak of replies would add 16 MiB per round; other growth does not
    repeat in each round."""
    left = []
    for _ in range(3):
        starve(server)
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
        left.append(rss(server))
    growth = [after - before for before, after in itertools.pairwise(left)]
    assert min(growth) < 8 * MIB, left


def starve(server):
    request = msgpack.packb([0, 1, "predict", ["total", {"user_id": [1] * 4000, "amount": 0.5}]])
    with contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(socket.create_connection(server.address)) for _ in range(4)]
        sent = dict.fromkeys(greedy, 0)
        for one in greedy:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(0.05)
        last = time.monotonic()
        while greedy:  # send until requests are not read any more, and then until the connection is closed
            assert time.monotonic() - last < TIMEOUT_S, "not cut off"
            assert rss(server) < 1000 * MIB
            for one in list(greedy):
                try:  # continue where the last send ended, so that the stream stays valid
                    sent[one] += one.send((request * 16)[sent[one] % len(request) :])
                    last = time.monotonic()
                except TimeoutError:
                    pass
                except ConnectionError:
                    greedy.remove(one)


# -- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def connect(server):
    with contextlib.ExitStack() as stack:
        yield lambda: Asking(server, stack)


def test_a_connection_without_headers_in_time_is_closed(connect):
    silent, half, asked = connect(), connect(), connect()
    half.send("GET /livez HTTP/1.1\r\nHos")
    assert asked.probe() == 200
    assert silent.has_ended()
    assert half.has_ended()
    assert asked.probe() == 200  # past the header timeout, which holds for the first request only


def test_a_request_without_its_body_in_time_fails(connect):
    body = body_of(1)
    silent, slow, half, other = connect(), connect(), connect(), connect()
    for one in (slow, half):
        one.begin(len(body))
        one.send(body[:20])
    assert other.probe() == 200  # so the server has had time to read the first part
    slow.send(body[20:])
    status, answer = slow.answer()
    assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, [11.5])
    assert half.answer() == (504, b'{"error":"the body did not arrive within 2 s"}')
    assert silent.has_ended_already()  # closed at the header timeout, which is shorter than that of a body


def test_an_idle_http_connection_is_closed(connect):
    """Each request restarts the timeout: the busy connection, which began earlier, outlives the idle one."""
    busy, idle = connect(), connect()
    assert [busy.probe(), idle.probe()] == [200, 200]
    while not idle.has_ended_already():
        assert busy.probe() == 200
        time.sleep(0.05)
    assert busy.probe() == 200
