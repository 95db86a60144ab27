"""Deadlines and limits of HTTP, on a running server: just within, and beyond."""

import contextlib
import json
import socket
import time

import pytest
from http_asking import ask, http_port
from serving import TIMEOUT_S, Server, environment_with, make_store

from shorttail.config import LIMITS

HEADER_S, READ_S, IDLE_S = 1.0, 2.0, 3.0
PATH = "/v2/models/total/infer"
ROW = {"user_id": 1, "amount": 0.5}
PREDICTED = {"predictions": [11.5]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("patience")
    (home / "site").mkdir()
    short = environment_with(home / "site", http_header_s=HEADER_S, http_read_s=READ_S, http_idle_s=IDLE_S)
    server = Server(make_store(home), log=home / "log", env=short)
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture
def connect(server):
    with contextlib.ExitStack() as stack:
        yield lambda: Asking(server, stack)


class Asking:
    """A request written byte by byte, where http.client would write it whole."""

    def __init__(self, server, stack):
        self.start_s = time.monotonic()  # before the server's own clock of the connection can start
        address = "127.0.0.1", http_port(server)
        self.peer = stack.enter_context(socket.create_connection(address, TIMEOUT_S))

    def send(self, text):
        self.peer.sendall(text.encode())

    def begin(self, body_bytes, *headers):
        self.send("\r\n".join([f"POST {PATH} HTTP/1.1", "Host: x", f"Content-Length: {body_bytes}", *headers, "", ""]))

    def answer(self):
        """(status, body) of the next response; None once the server has closed."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            got = self.peer.recv(1)
            if not got:
                assert not head
                return None
            head += got
        status, *lines = head.decode().split("\r\n")
        lengths = [line.split(":")[1] for line in lines if line.lower().startswith("content-length")]
        body = b""
        while lengths and len(body) < int(lengths[0]):
            body += self.peer.recv(int(lengths[0]) - len(body))
        return int(status.split()[1]), body

    def closed_after_s(self):
        with contextlib.suppress(ConnectionError):
            assert self.answer() is None
        return time.monotonic() - self.start_s


def body_of(count):
    rows = [{"name": name, "datatype": kind, "shape": [count], "data": [value] * count}
            for name, kind, value in (("user_id", "INT64", 1), ("amount", "FP32", 0.5))]  # fmt: skip
    return json.dumps({"inputs": rows})


def test_headers_come_in_time_or_the_connection_is_cut(connect):
    silent, half, asked = connect(), connect(), connect()
    half.send("GET /livez HTTP/1.1\r\nHos")
    asked.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert asked.answer()[0] == 200
    for cut in (silent, half):
        assert HEADER_S <= cut.closed_after_s() < TIMEOUT_S
    asked.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")  # past that deadline, which is its first request's alone
    assert asked.answer()[0] == 200


def test_a_body_comes_in_time_or_the_request_fails(connect):
    body = body_of(1)
    slow, half = connect(), connect()
    for one in (slow, half):
        one.begin(len(body))
        one.send(body[:20])
    time.sleep(READ_S / 10)
    slow.send(body[20:])
    status, answer = slow.answer()
    assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, [11.5])
    assert half.answer() == (504, b'{"error":"the body was not there after 2 s"}')
    assert time.monotonic() - half.start_s >= READ_S


def test_a_connection_rests_for_so_long_between_requests(connect):
    busy, idle = connect(), connect()
    idle.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert idle.answer()[0] == 200
    while time.monotonic() - busy.start_s < IDLE_S + 1.0:
        busy.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert busy.answer()[0] == 200
        time.sleep(IDLE_S / 10)
    assert IDLE_S <= idle.closed_after_s() < TIMEOUT_S


def test_bodies_that_are_being_read_have_a_budget(start):
    """What a request announces counts, whether or not it has come: nothing of it is sent here."""
    server = start()
    body = body_of(1)
    large = LIMITS.frame_bytes
    most, rest = divmod(LIMITS.http_body_bytes, large)
    assert rest == 0
    with contextlib.ExitStack() as stack:

        def announce(size):
            peer = Asking(server, stack)
            peer.begin(size, "Expect: 100-continue")
            assert peer.answer() == (100, b"")  # its headers are read
            return peer

        for _ in range(most - 1):
            announce(large)
        last = announce(large - len(body))
        assert ask(server, "POST", PATH, body)[0] == 200
        assert ask(server, "POST", PATH, body + " ") == (
            429, b'{"error":"too many bytes over HTTP are in flight; send it again later"}',
        )  # fmt: skip
        last.peer.close()
        end_s = time.monotonic() + TIMEOUT_S
        while ask(server, "POST", PATH, body + " ")[0] != 200:  # its bytes count until the server sees that it left
            assert time.monotonic() < end_s
    assert server.stop() == 0
    assert server.log.read_text() == ""
