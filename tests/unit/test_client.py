"""Client and AsyncClient against a scripted peer that behaves as each test says, mostly wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from shorttail import errors, protocol
from shorttail.client import AsyncClient, Client
from shorttail.config import LIMITS


class Peer:
    """The server's end of a connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.unpacker = protocol.new_unpacker()

    def receive(self) -> tuple[int, str, list[Any]]:
        """Return the next request: msgid, method, params. Raises EOFError when the client has closed."""
        while True:
            for kind, msgid, method, params in self.unpacker:
                assert kind == protocol.REQUEST
                return msgid, method, params
            data = self.connection.recv(65_536)
            if not data:
                raise EOFError
            self.unpacker.feed(data)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self, msgid: int | None, result: Any, error: Any = None) -> None:
        self.send(msgpack.packb([protocol.RESPONSE, msgid, error, result]))


Script = Callable[[Peer], None]


@contextlib.contextmanager
def serving(script: Script, path: Path | None = None) -> Iterator[str]:
    """Run a server that calls `script` on each connection and then closes it. Yields its address."""
    listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    listener.bind(str(path) if path else ("127.0.0.1", 0))
    listener.listen()
    open_connections: set[socket.socket] = set()
    threads: list[threading.Thread] = []

    def play(connection: socket.socket) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            script(Peer(connection))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                open_connections.add(connection)
                threads.append(threading.Thread(target=play, args=(connection,)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"unix:{path}" if path else f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for connection in open_connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def echo_params(peer: Peer) -> None:
    """Answer predict with the params that arrived, so that a test sees what was sent."""
    while True:
        msgid, method, params = peer.receive()
        if method == "predict":
            model, columns, options = params
            peer.answer(msgid, {"outputs": {}, "version": 1, "seen": repr((model, columns, options))})
        else:
            peer.answer(msgid, "pong")


def prediction(peer: Peer) -> None:
    while True:
        msgid, _, params = peer.receive()
        rows = np.asarray(params[1]["x"], np.float32).reshape(-1)
        statuses = {"stats": protocol.pack_tensor(np.zeros(len(rows), np.uint8))}
        outputs = {"y": protocol.pack_tensor(rows * 2), "label": ["a"] * len(rows)}
        peer.answer(msgid, {"outputs": outputs, "version": 3, "statuses": statuses})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Both clients behave the same: each case runs a call through Client and through AsyncClient


def call_blocking(address: str, call: Callable[[Any], Any], timeout_s: float = 5.0) -> Any:
    with Client(address, timeout_s=timeout_s) as client:
        return call(client)


def call_async(address: str, call: Callable[[Any], Any], timeout_s: float = 5.0) -> Any:
    async def run() -> Any:
        async with await AsyncClient.connect(address, timeout_s=timeout_s) as client:
            return await call(client)

    return asyncio.run(run())


both = pytest.mark.parametrize("run", [call_blocking, call_async])


@both
def test_predict_returns_numpy_and_statuses(run: Any) -> None:
    with serving(prediction) as address:
        p = run(address, lambda c: c.predict("m", {"x": np.array([1.0, 2.5], np.float32)}, statuses=True))
    assert (p.model, p.version) == ("m", 3)
    assert p.outputs["y"].dtype == np.float32
    np.testing.assert_array_equal(p.outputs["y"], [2.0, 5.0])
    assert p.outputs["y"].flags.writeable
    assert p.outputs["label"].dtype == object
    assert p.outputs["label"].tolist() == ["a", "a"]
    np.testing.assert_array_equal(p.statuses["stats"], [0, 0])
    assert p.statuses["stats"].dtype == np.uint8


@both
def test_get_online_features(run: Any) -> None:
    def script(peer: Peer) -> None:
        msgid, method, params = peer.receive()
        assert method == "get_online_features"
        assert 0 < params[2].pop("deadline_ms") <= 500
        assert params == [["v:a", "v:s"], {"k": [1, 2]}, {"encoding": "tensor"}]
        statuses = [protocol.pack_tensor(np.array([0, 2], np.uint8))] * 2
        values = [protocol.pack_tensor(np.array([1.5, np.nan])), ["x", None]]
        peer.answer(msgid, {"feature_names": ["v:a", "v:s"], "values": values, "statuses": statuses})

    with serving(script) as address:
        f = run(address, lambda c: c.get_online_features(["v:a", "v:s"], {"k": [1, 2]}, deadline_ms=500))
    assert f.to_dict() == {"v:a": [1.5, None], "v:s": ["x", None]}
    np.testing.assert_array_equal(f.statuses["v"], [0, 2])


@both
def test_models_views_and_ping(run: Any) -> None:
    answers: dict[str, Any] = {"models": [{"name": "m"}], "views": [{"name": "v"}], "ping": "pong"}

    def script(peer: Peer) -> None:
        while True:
            msgid, method, params = peer.receive()
            assert params == []
            peer.answer(msgid, answers[method])

    with serving(script) as address:
        assert run(address, lambda c: c.models()) == [{"name": "m"}]
        assert run(address, lambda c: c.views()) == [{"name": "v"}]
        assert run(address, lambda c: c.ping()) is None


@both
def test_unix_socket(run: Any, tmp_path: Path) -> None:
    with serving(prediction, tmp_path / "s") as address:
        assert run(address, lambda c: c.predict("m", {"x": 4.0})).outputs["y"].tolist() == [8.0]


@both
@pytest.mark.parametrize("kind", list(errors.BY_CODE.values()))
def test_an_error_of_the_server_is_raised_by_its_code(run: Any, kind: type[errors.ShorttailError]) -> None:
    def script(peer: Peer) -> None:
        msgid, _, _ = peer.receive()
        peer.answer(msgid, None, {"code": kind.code, "message": "model 'm': says no"})
        peer.receive()

    with serving(script) as address, pytest.raises(kind, match=r"^model 'm': says no$"):
        run(address, lambda c: c.predict("m", {}))


@both
def test_without_a_server_the_error_says_how_to_start_one(run: Any, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(errors.Unavailable) as caught:
        run(address, lambda c: c.ping())
    assert caught.value.message == (
        f"no server at {address}: connection refused; start one with `shorttail serve --store STORE`"
    )
    with pytest.raises(errors.Unavailable, match=r"no server at unix:.*: no such file or directory; start one"):
        run(f"unix:{tmp_path}/none", lambda c: c.ping())


@both
def test_a_call_without_an_answer_in_time_fails(run: Any) -> None:
    with serving(lambda peer: [peer.receive() for _ in range(2)] and None) as address:
        with pytest.raises(errors.DeadlineExceeded, match=f"^predict: no answer from {address} within 0.2 s$"):
            run(address, lambda c: c.predict("m", {}), timeout_s=0.2)
        with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.101 s|before the request was sent"):
            run(address, lambda c: c.predict("m", {}, deadline_ms=1))


@both
def test_a_reply_that_trickles_does_not_extend_the_timeout(run: Any) -> None:
    """The reply has a million bytes, and each arrives well within the timeout after the last one."""

    def script(peer: Peer) -> None:
        peer.receive()
        peer.send(b"\x94\x01\x00\xc0\xdd\x00\x10\x00\x00")
        while True:
            peer.send(b"\x01")
            time.sleep(0.005)

    with serving(script) as address, pytest.raises(errors.DeadlineExceeded):
        run(address, lambda c: c.ping(), timeout_s=0.1)


@both
@pytest.mark.parametrize("part", [b"", b"\x94\x01\x00\xc0", b"\x94"])
def test_a_connection_closed_during_a_call_is_unavailable(run: Any, part: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.receive()
        peer.send(part)

    with serving(script) as address, pytest.raises(errors.Unavailable, match=address):
        run(address, lambda c: c.predict("m", {}))


@both
@pytest.mark.parametrize(
    "reply", [b"\xc1", b"\x00", b"\x93\x01\x00\xc0", b"\x94\x00\x00\xc0\xc0", b"HTTP/1.1 400 no\r\n"]
)
def test_a_reply_that_breaks_the_protocol_is_an_error(run: Any, reply: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.receive()
        peer.send(reply)
        peer.receive()

    with serving(script) as address, pytest.raises(errors.Internal):
        run(address, lambda c: c.ping())


@both
def test_an_error_about_the_connection_is_raised(run: Any) -> None:
    """The error has no msgid, because the server could not read which message it was about."""

    def script(peer: Peer) -> None:
        peer.receive()
        peer.answer(None, None, {"code": "RESOURCE_EXHAUSTED", "message": "a message of more than 9 bytes"})

    with serving(script) as address, pytest.raises(errors.ResourceExhausted, match="more than 9 bytes"):
        run(address, lambda c: c.ping())


@both
@pytest.mark.parametrize("deadline_ms", [0, -1.5])
def test_a_deadline_that_has_passed_is_an_error_at_once(run: Any, deadline_ms: float) -> None:
    with serving(prediction) as address, pytest.raises(errors.DeadlineExceeded, match="has passed already"):
        run(address, lambda c: c.predict("m", {"x": 1.0}, deadline_ms=deadline_ms))


@both
@pytest.mark.parametrize("result", [None, [], {"outputs": 1, "version": 1}, {"outputs": {}}])
def test_a_result_of_a_wrong_form_is_an_error(run: Any, result: Any) -> None:
    def script(peer: Peer) -> None:
        while True:
            peer.answer(peer.receive()[0], result)

    with serving(script) as address:
        with pytest.raises(errors.Internal, match="not understood"):
            run(address, lambda c: c.predict("m", {}))
        with pytest.raises(errors.Internal, match="not understood"):
            run(address, lambda c: c.get_online_features(["v:a"], {}))


@both
def test_a_reply_may_arrive_in_many_pieces(run: Any) -> None:
    def script(peer: Peer) -> None:
        msgid, _, _ = peer.receive()
        message = msgpack.packb([1, msgid, None, {"outputs": {"y": protocol.pack_tensor(np.arange(5))}, "version": 1}])
        for i in range(len(message)):
            peer.send(message[i : i + 1])

    with serving(script) as address:
        assert run(address, lambda c: c.predict("m", {})).outputs["y"].tolist() == [0, 1, 2, 3, 4]


# Client


def test_client_connects_again_after_a_failure() -> None:
    calls = 0

    def script(peer: Peer) -> None:
        nonlocal calls
        calls += 1
        msgid, _, _ = peer.receive()
        if calls > 1:
            peer.answer(msgid, "pong")

    with serving(script) as address, Client(address, retries=0) as client:
        with pytest.raises(errors.Unavailable, match="closed the connection during ping"):
            client.ping()
        client.ping()


def test_client_notices_that_an_idle_connection_was_closed() -> None:
    def script(peer: Peer) -> None:
        peer.answer(peer.receive()[0], "pong")

    with serving(script) as address, Client(address) as client:
        for _ in range(3):
            client.ping()
            time.sleep(0.05)  # the peer closes the connection after an answer


def test_client_refuses_the_reply_to_another_call() -> None:
    def script(peer: Peer) -> None:
        peer.answer(peer.receive()[0] + 1, "pong")
        peer.receive()

    with serving(script) as address, Client(address) as client, pytest.raises(errors.Internal, match="instead of 0"):
        client.ping()


def test_client_does_not_take_a_late_reply_for_the_next_call() -> None:
    given_up = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            msgid, _, params = peer.receive()
            given_up.wait(10)
            peer.answer(msgid, {"outputs": {"y": [params[1]["x"]]}, "version": 1})

    with serving(script) as address, Client(address) as client:
        with pytest.raises(errors.DeadlineExceeded):
            client.predict("m", {"x": 0.3}, deadline_ms=1)
        given_up.set()
        assert client.predict("m", {"x": 0.0}).outputs["y"].tolist() == [0.0]


def test_threads_share_a_client() -> None:
    wrong: list[float] = []

    def work(client: Client, number: int) -> None:
        for i in range(50):
            x = number * 1000 + i
            if client.predict("m", {"x": float(x)}).outputs["y"].tolist() != [2.0 * x]:
                wrong.append(x)

    with serving(prediction) as address, Client(address) as client:
        threads = [threading.Thread(target=work, args=(client, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# AsyncClient


def test_replies_may_come_in_any_order() -> None:
    def script(peer: Peer) -> None:
        requests = [peer.receive() for _ in range(20)]
        for msgid, _, params in reversed(requests):
            peer.answer(msgid, {"outputs": {"y": [params[1]["x"]]}, "version": 1})

    async def run(address: str) -> list[Any]:
        async with await AsyncClient.connect(address) as client:
            return await asyncio.gather(*(client.predict("m", {"x": x}) for x in range(20)))

    with serving(script) as address:
        assert [p.outputs["y"].tolist() for p in asyncio.run(run(address))] == [[x] for x in range(20)]


def test_a_call_that_timed_out_or_was_cancelled_leaves_the_others_alone() -> None:
    arrived, given_up = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        msgids = [peer.receive()[0] for _ in range(3)]
        arrived.set()
        given_up.wait(10)
        for msgid in msgids:
            peer.answer(msgid, {"outputs": {"y": [msgid]}, "version": 1})
        peer.receive()

    async def run(address: str) -> None:
        async with await AsyncClient.connect(address) as client:
            cancelled = asyncio.create_task(client.predict("m", {}))
            timed_out = asyncio.create_task(client.predict("m", {}, deadline_ms=100))
            answered = asyncio.create_task(client.predict("m", {}))
            while not arrived.is_set():
                await asyncio.sleep(0.01)
            cancelled.cancel()
            with pytest.raises(errors.DeadlineExceeded):
                await timed_out
            given_up.set()
            assert (await answered).outputs["y"].tolist() == [2]

    with serving(script) as address:
        asyncio.run(run(address))


def test_every_call_in_flight_fails_when_the_connection_is_lost_and_the_next_connects_again() -> None:
    calls = 0

    def script(peer: Peer) -> None:
        nonlocal calls
        calls += 1
        requests = [peer.receive()[0] for _ in range(3 if calls == 1 else 1)]
        if calls > 1:
            peer.answer(requests[0], "pong")

    async def run(address: str) -> None:
        async with await AsyncClient.connect(address, retries=0) as client:
            results = await asyncio.gather(*(client.ping() for _ in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [errors.Unavailable] * 3
            await client.ping()

    with serving(script) as address:
        asyncio.run(run(address))


def test_large_requests_wait_for_a_peer_that_reads_late() -> None:
    rows = LIMITS.rows_per_request
    columns = {"x": np.zeros((rows, 25))}

    def script(peer: Peer) -> None:
        time.sleep(0.1)
        for _ in range(8):
            msgid, _, params = peer.receive()
            peer.answer(msgid, {"outputs": {"n": [len(params[1]["x"])]}, "version": 1})

    async def run(address: str) -> list[Any]:
        async with await AsyncClient.connect(address) as client:
            first = [asyncio.create_task(client.predict("m", columns)) for _ in range(4)]
            await asyncio.sleep(0.05)  # writing is paused now
            return await asyncio.gather(*first, *(client.predict("m", columns) for _ in range(4)))

    with serving(script) as address:
        assert [p.outputs["n"].tolist() for p in asyncio.run(run(address))] == [[rows]] * 8


def test_calls_on_a_closed_async_client_fail() -> None:
    async def run(address: str) -> None:
        client = await AsyncClient.connect(address)
        waiting = asyncio.create_task(client.ping())
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(errors.Unavailable, match="the client was closed"):
            await waiting
        with pytest.raises(errors.Unavailable, match="is closed"):
            await client.ping()

    with serving(lambda peer: peer.receive() and peer.receive() and None) as address:
        asyncio.run(run(address))


# Errors before anything is sent


def test_arguments_are_checked() -> None:
    with Client(":1") as client:
        for call in (
            lambda: client.predict("m", [1]),  # type: ignore[arg-type]
            lambda: client.predict("m", {"x": object()}),
            lambda: client.predict("m", {"x": [object()]}),
            lambda: client.predict("m", {"x": ["a", "\ud800"]}),
            lambda: client.predict("m", {"x": datetime.timedelta(1)}),
            lambda: client.predict("m", {"x": b"raw"}),
            lambda: client.predict("m", {"x": np.array([b"raw"])}),
            lambda: client.predict("m", {"x": np.array([1j])}),
            lambda: client.get_online_features("v:a", {}),
            lambda: Client(":1", timeout_s=0),
            lambda: Client(":1", retries=-1),
            lambda: Client(":1", max_connections=0),
            lambda: AsyncClient(":1", connections=0),
        ):
            with pytest.raises(errors.InvalidArgument) as caught:
                call()
            assert "\n" not in caught.value.message
