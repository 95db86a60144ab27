"""Damaged messages to a running server: it answers or closes, continues to serve, and does not grow.

FUZZ_FRAMES=1000000 makes the run long (`make fuzz`); FUZZ_SEED sets the seed.
"""

import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

import msgpack
import pytest
from mutations import FRAMES, streams
from serving import PREDICT, TIMEOUT_S, Server, make_store

N_FRAMES = int(os.environ.get("FUZZ_FRAMES", "3000"))
SEED = int(os.environ.get("FUZZ_SEED", "20260101"))
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("fuzzed"))
    server = Server(store, log=store.parent / "log")
    yield server
    assert server.stop() == 0


def rss(server):
    [worker] = server.workers()
    return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def send(server, stream):
    """Send a stream and return the replies until the server closes. Fails if it does not close."""
    with socket.create_connection(server.address, timeout=TIMEOUT_S) as connection:
        unpacker = msgpack.Unpacker(max_buffer_size=64 * MIB)
        try:
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                unpacker.feed(data)
        except ConnectionError:
            pass  # the server closed with bytes unread
        return list(unpacker)


def test_the_messages_are_valid_before_they_are_damaged(server):
    for frame in FRAMES[:-1]:
        [answer] = send(server, frame)
        assert answer[2] is None, answer


def test_damaged_messages_are_answered_or_end_their_connection(server):
    print(f"seed {SEED}")
    [pid] = server.workers()
    plateau = 0
    for number, stream in enumerate(streams(SEED, N_FRAMES)):
        for answer in send(server, stream):
            assert len(answer) == 4, (number, stream)
            assert answer[0] == 1, (number, stream)
            assert answer[2] is None or answer[2]["code"] != "INTERNAL", (number, stream, answer)
        if number == N_FRAMES // 2:
            plateau = rss(server)
    assert server.workers() == [pid]
    with server.connect() as peer:
        # A damaged push may have stored any valid row, so predicted values are not compared.
        assert len(peer.ask(*PREDICT)[3]["outputs"]["total"]) == 3
    assert rss(server) - plateau <= MIB
