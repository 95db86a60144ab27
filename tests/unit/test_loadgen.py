"""The load generator counts every request once and catches a server that answers wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from shorttail import protocol
from shorttail.client import columns as client_columns

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import loadgen

RUN = {"duration_s": 0.2, "warmup_s": 0.02}
Answer = Callable[[int], bytes]


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    loadgen.build()


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    rows = [{"user_id": user, "amount": user / 7} for user in range(100)]
    path = tmp_path / "payload"
    loadgen.write_payload(path, [client_columns.pack_request(2**32 - 1, "predict", ["m", row]) for row in rows])
    return path


@contextlib.contextmanager
def answering(answer: Answer, reverse: bool = False) -> Iterator[str]:
    """A server that answers each msgid with the bytes of `answer`. reverse: it answers the last request first."""
    loop = asyncio.new_event_loop()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.unpacker = protocol.new_unpacker()

        def data_received(self, data: bytes) -> None:
            self.unpacker.feed(data)
            ids = [message[1] for message in self.unpacker]
            self.transport.write(b"".join(map(answer, reversed(ids) if reverse else ids)))

    server = loop.run_until_complete(loop.create_server(Server, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.02))
        loop.close()


def reply(msgid: int, result: Any = None, error: Any = None) -> bytes:
    return bytes(msgpack.packb([1, msgid, error, result]))


@pytest.mark.parametrize(("connections", "pipeline"), [(1, 1), (8, 1), (3, 5)])
@pytest.mark.parametrize("unix", [False, True])
def test_an_echo_server_answers_every_request(tmp_path: Path, connections: int, pipeline: int, unix: bool) -> None:
    payload = tmp_path / "payload"
    loadgen.write_payload(payload, [bytes(100)] * 3)
    listen = f"unix:{tmp_path}/s" if unix else "127.0.0.1:0"
    with loadgen.start_echo(100, 33, address=listen) as address:
        figures = loadgen.run(address, payload, connections, pipeline=pipeline, raw_reply_bytes=33, **RUN)
    assert figures["requests"] > 0
    assert (figures["errors"], figures["bad_nonce"], figures["unanswered"]) == (0, 0, 0)
    assert (figures["connections"], figures["pipeline"]) == (connections, pipeline)
    assert figures["requests_per_s"] == pytest.approx(figures["requests"] / figures["seconds"], rel=1e-3)
    latencies = [figures[name] for name in ("p50_us", "p90_us", "p99_us", "p999_us", "max_us")]
    assert latencies == sorted(latencies)
    assert latencies[0] > 0


@pytest.mark.parametrize(("connections", "pipeline", "awake"), [(1, 64, False), (3, 20, True)])
def test_an_open_loop_sends_at_the_given_rate(tmp_path: Path, connections: int, pipeline: int, awake: bool) -> None:
    payload = tmp_path / "payload"
    loadgen.write_payload(payload, [bytes(100)])
    with loadgen.start_echo(100, 33) as address:
        figures = loadgen.run(
            address, payload, connections, pipeline=pipeline, raw_reply_bytes=33, per_s=1000, awake=awake, **RUN
        )
    assert figures["requests"] == 200
    assert figures["unanswered"] == 0


def test_an_open_loop_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    """A server that holds the first answer until all are due: with one in flight the others wait, and that is counted.
    From when it was sent, each but the first takes as long as an echo does."""
    payload = tmp_path / "payload"
    loadgen.write_payload(payload, [bytes(10)])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                data = peer.recv(65536)
                time.sleep(0.3)  # the last is due 0.2 s after the first
                while data:
                    peer.sendall(data)
                    data = peer.recv(65536)

        server = threading.Thread(target=serve)
        server.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        figures = loadgen.run(address, payload, 1, 0.2, warmup_s=0.0, raw_reply_bytes=10, per_s=100)
        server.join()
    assert (figures["requests"], figures["unanswered"]) == (20, 0)
    assert figures["p50_us"] > 100_000


def test_replies_far_larger_than_any_buffer(tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    loadgen.write_payload(payload, [bytes(10)])
    with loadgen.start_echo(10, 3_000_000) as address:
        figures = loadgen.run(address, payload, 2, raw_reply_bytes=3_000_000, pipeline=2, **RUN)
    assert figures["requests"] > 0
    assert figures["unanswered"] == 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("pipeline", [1, 16])
def test_right_replies_of_every_shape(payload: Path, pipeline: int, reverse: bool) -> None:
    """Replies have every MessagePack type and length class, so an error in skipping values breaks the framing."""
    values: list[Any] = [
        *(None, True, 0, -1, -32, 127, 128, 255, 256, 65_535, 65_536, 2**32, 2**63, -33, -128, -129, -32_769, -(2**40)),
        *(1.5, "", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "x" * 70_000, b"x", b"x" * 256, b"x" * 70_000),
        *([], [[]], [1] * 15, [1] * 16, ["y"] * 70_000, {}, {"a": {}}, {str(i): [i] for i in range(20)}),
        {str(i): None for i in range(70_000)},
        *(msgpack.ExtType(1, bytes(n)) for n in (0, 1, 2, 3, 4, 8, 16, 17, 256, 70_000)),
        {"outputs": {"y": protocol.pack_tensor(np.ones((3, 2)))}, "version": 1},
    ]
    packed = [bytes(msgpack.packb(value)) for value in values] + [b"\xca" + bytes(4)]
    seed = random.SystemRandom().randrange(2**32)
    chosen = random.Random(seed)

    def answer(msgid: int) -> bytes:
        return b"\x94\x01" + msgpack.packb(msgid) + b"\xc0" + chosen.choice(packed)

    with answering(answer, reverse) as address:
        figures = loadgen.run(address, payload, 4, pipeline=pipeline, **RUN)
    assert figures["requests"] > 0, f"seed {seed}"
    assert (figures["errors"], figures["bad_nonce"], figures["unanswered"]) == (0, 0, 0), f"seed {seed}"


def test_each_request_has_its_own_id(payload: Path) -> None:
    seen: list[int] = []

    def answer(msgid: int) -> bytes:
        seen.append(msgid)
        return reply(msgid)

    with answering(answer) as address:
        loadgen.run(address, payload, 4, pipeline=3, **RUN)
    assert len(seen) > 100
    assert len(set(seen)) == len(seen)


def test_a_wrong_id_is_counted(payload: Path) -> None:
    with answering(lambda msgid: reply(msgid ^ 1)) as address:
        figures = loadgen.run(address, payload, 1, **RUN)
    assert figures["bad_nonce"] > 0
    assert (figures["requests"], figures["errors"]) == (0, 0)


def test_replies_crossed_between_connections_are_counted(payload: Path) -> None:
    """A reply has the id of a request that is in flight on another connection."""
    before = [0]

    def answer(msgid: int) -> bytes:
        before.append(msgid)
        return reply(before[-2])

    with answering(answer) as address:
        figures = loadgen.run(address, payload, 4, **RUN)
    assert figures["bad_nonce"] > 0
    assert figures["unanswered"] == 0


def test_an_old_id_is_counted(payload: Path) -> None:
    first: list[int] = []

    def answer(msgid: int) -> bytes:
        first.append(msgid)
        return reply(first[0])

    with answering(answer) as address:
        figures = loadgen.run(address, payload, 1, **RUN)
    assert figures["bad_nonce"] > 0
    assert figures["requests"] == 0


def test_error_replies_are_counted_and_the_first_is_shown(payload: Path) -> None:
    error = {"code": "NOT_FOUND", "message": 'model "m": no such\nmodel'}
    with answering(lambda msgid: reply(msgid, error=error)) as address:
        figures = loadgen.run(address, payload, 2, **RUN)
    assert figures["errors"] > 0
    assert (figures["requests"], figures["bad_nonce"]) == (0, 0)
    assert "NOT_FOUND" in figures["first_error"]
    assert "model" in figures["first_error"]


def test_requests_without_a_reply_are_counted(payload: Path) -> None:
    last: list[bytes] = []

    def answer(msgid: int) -> bytes:
        last.append(b"")
        return reply(msgid) if len(last) < 200 else b""

    with answering(answer) as address:
        figures = loadgen.run(address, payload, 3, warmup_s=0, duration_s=0.2)
    assert figures["requests"] == 199
    assert figures["unanswered"] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc1", "not MessagePack"),
        (b"\x00", "not a MessagePack-RPC response"),
        (b"\x94\x00\x01\xc0\xc0", "not a MessagePack-RPC response"),
        (reply(0) * 2, "a reply to nothing"),
        (b"\x94\x01\xc0\xa4nope\xc0", "refused the connection:  nope"),
    ],
)
def test_an_error_that_ends_a_run_is_one_line(payload: Path, data: bytes, message: str) -> None:
    with answering(lambda msgid: data) as address, pytest.raises(loadgen.BenchError) as caught:
        # The run is over and sends no more requests, so the second of two replies answers no request.
        loadgen.run(address, payload, 1, warmup_s=0, duration_s=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x09\x00\x00\x00short", b"\x08\x00\x00\x00notaready"])
def test_an_invalid_payload_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "payload"
    path.write_bytes(content)
    with pytest.raises(loadgen.BenchError, match=str(path)):
        loadgen.run("127.0.0.1:1", path, 1, 0.1)


def test_no_server_and_no_compiler(payload: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(loadgen.BenchError, match="cannot connect to unix:/none: No such file or directory"):
        loadgen.run("unix:/none", payload, 1, 0.1)
    monkeypatch.setattr(loadgen, "BUILD", tmp_path / "build")
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(loadgen.BenchError, match="no C compiler: 'no-such-compiler' not found"):
        loadgen.build()
