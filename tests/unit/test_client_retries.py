"""Retries of both clients: which calls are sent again, over which connections, with which deadlines."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_client import Peer, both, call_async, call_blocking, serving

from shorttail import errors
from shorttail.client import AsyncClient, Client, retries
from shorttail.client.calls import Call, Deadline
from shorttail.config import LIMITS
from shorttail.protocol import parse_address

READS: dict[str, Callable[[Any], Any]] = {
    "predict": lambda c: c.predict("m", {"x": 1.0}),
    "get_online_features": lambda c: c.get_online_features(["v:a"], {"k": 1}),
    "models": lambda c: c.models(),
    "views": lambda c: c.views(),
    "ping": lambda c: c.ping(),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "push": lambda c: c.push("v", {"k": 1, "a": 2.0}),
    "delete": lambda c: c.delete("v", {"k": 1}),
}
RESULTS: dict[str, Any] = {
    "predict": {"outputs": {}, "version": 1},
    "get_online_features": {"feature_names": ["v:a"], "values": [[1.0]], "statuses": [[0]]},
    "models": [],
    "views": [],
    "ping": "pong",
    "push": {"rows": 1},
    "delete": {"rows": 1},
    "auth": True,
}


class Failing:
    """A peer that fails the first `n` requests and answers the others. seen: (method, params) of all requests."""

    def __init__(self, n: int, fail: Callable[[Peer, int], None]):
        self.n = n
        self.fail = fail
        self.lock = threading.Lock()
        self.seen: list[tuple[str, list[Any]]] = []
        self.n_connections = 0

    def __call__(self, peer: Peer) -> None:
        with self.lock:
            self.n_connections += 1
        while True:
            msgid, method, params = peer.receive()
            with self.lock:
                self.seen.append((method, params))
                fails = len(self.seen) <= self.n
            if fails:
                self.fail(peer, msgid)
            else:
                peer.answer(msgid, RESULTS[method])


def closes(peer: Peer, msgid: int) -> None:
    raise EOFError


def is_unavailable(peer: Peer, msgid: int) -> None:
    peer.answer(msgid, None, {"code": "UNAVAILABLE", "message": "the server is stopping"})


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "backoff_s", lambda failures: 0.0)


@pytest.fixture
def closed_port() -> Iterator[socket.socket]:
    """A bound socket that refuses connections until a test calls listen()."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


# Which calls


@both
@pytest.mark.parametrize("fail", [closes, is_unavailable])
@pytest.mark.parametrize("method", READS)
def test_a_read_is_sent_again(run: Any, method: str, fail: Any) -> None:
    server = Failing(2, fail)
    with serving(server) as address:
        run(address, READS[method])
    assert [name for name, _ in server.seen] == [method] * 3


@both
@pytest.mark.parametrize("fail", [closes, is_unavailable])
@pytest.mark.parametrize("method", WRITES)
def test_a_write_that_was_sent_is_not_sent_again(run: Any, method: str, fail: Any) -> None:
    server = Failing(1, fail)
    with serving(server) as address, pytest.raises(errors.Unavailable):
        run(address, WRITES[method])
    assert [name for name, _ in server.seen] == [method]


@both
@pytest.mark.parametrize("method", [*READS, *WRITES])
def test_a_call_that_was_not_sent_is_sent_later(
    run: Any, method: str, closed_port: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def answer() -> None:
        connection, _ = closed_port.accept()
        with connection:
            peer = Peer(connection)
            msgid, method, _ = peer.receive()
            seen.append(method)
            peer.answer(msgid, RESULTS[method])

    answering = threading.Thread(target=answer)

    def start_listening(failures: int) -> float:
        if failures == 1:
            closed_port.listen()
            answering.start()
        return 0.0

    monkeypatch.setattr(retries, "backoff_s", start_listening)
    run(f"127.0.0.1:{closed_port.getsockname()[1]}", {**READS, **WRITES}[method])
    answering.join()
    assert seen == [method]


@pytest.mark.parametrize("method", [*READS, *WRITES])
def test_a_connection_lost_during_auth_is_made_again(method: str) -> None:
    call = {**READS, **WRITES}[method]

    async def asynchronously(address: str) -> None:
        async with await AsyncClient.connect(address, token="t") as client:
            await call(client)

    server = Failing(2, closes)
    with serving(server) as address:
        with Client(address, token="t") as client:
            call(client)
        server.n += len(server.seen)
        asyncio.run(asynchronously(address))
    assert [name for name, _ in server.seen] == ["auth", "auth", "auth", method] * 2


@both
@pytest.mark.parametrize("kind", [kind for kind in errors.BY_CODE.values() if kind is not errors.Unavailable])
def test_other_errors_are_final(run: Any, kind: type[errors.ShorttailError]) -> None:
    """RESOURCE_EXHAUSTED is the most important: an overloaded server must not get retries."""
    server = Failing(9, lambda peer, msgid: peer.answer(msgid, None, {"code": kind.code, "message": "no"}))
    with serving(server) as address, pytest.raises(kind):
        run(address, READS["predict"])
    assert len(server.seen) == 1


# How often, and until when


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_retries_are_limited(limit: int, at_once: None) -> None:
    async def asynchronously(address: str) -> None:
        async with await AsyncClient.connect(address, retries=limit) as client:
            await client.ping()

    server = Failing(99, closes)
    with serving(server) as address:
        with Client(address, retries=limit) as client, pytest.raises(errors.Unavailable, match="closed the connection"):
            client.ping()
        assert len(server.seen) == 1 + limit
        with pytest.raises(errors.Unavailable, match="lost"):
            asyncio.run(asynchronously(address))
        assert len(server.seen) == 2 * (1 + limit)


@both
def test_a_call_fails_at_once_if_the_pause_would_outlast_the_deadline(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "backoff_s", lambda failures: 60.0)
    server = Failing(9, closes)
    with serving(server) as address, pytest.raises(errors.Unavailable, match=r"closed|lost"):
        run(address, lambda c: c.predict("m", {"x": 1.0}, deadline_ms=500))
    assert len(server.seen) == 1


@both
@pytest.mark.parametrize("deadline_ms", [None, 3000])
def test_each_request_carries_the_time_left_until_the_deadline(run: Any, deadline_ms: float | None) -> None:
    def close_later(peer: Peer, msgid: int) -> None:
        time.sleep(0.05)
        raise EOFError

    server = Failing(2, close_later)
    with serving(server) as address:
        run(address, lambda c: c.predict("m", {"x": 1.0}, version=7, deadline_ms=deadline_ms), timeout_s=4.0)
    sent_ms = [params[2].pop("deadline_ms") for _, params in server.seen]
    assert 0 < sent_ms[0] <= (deadline_ms or 4000)
    assert sent_ms[1] <= sent_ms[0] - 50
    assert sent_ms[2] <= sent_ms[1] - 50
    assert [params for _, params in server.seen] == [["m", {"x": 1.0}, {"encoding": "tensor", "version": 7}]] * 3


def test_pauses_are_random_below_a_bound_that_doubles() -> None:
    for failures in range(12):
        bound_s = min(LIMITS.client_backoff_min_s * 2**failures, LIMITS.client_backoff_max_s)
        drawn = [retries.backoff_s(failures) for _ in range(300)]
        assert 0 <= min(drawn) < bound_s / 4 < 3 * bound_s / 4 < max(drawn) <= bound_s


def test_the_budget_holds_for_any_order_of_calls() -> None:
    seed = time.time_ns() % 1_000_000
    print(f"seed={seed}")
    rng = random.Random(seed)
    address = parse_address(":1")
    for _ in range(20):
        policy = retries.Retries(100)
        granted = 0
        failing = rng.choice((0.05, 0.5, 1.0))
        for begun in range(1, 3001):
            policy.earn()
            in_flight = rng.choice((0, 1, 50))
            call = Call(address, 0, "ping", [], Deadline(3600.0))
            while rng.random() < failing:
                try:
                    policy.pause_s(call, errors.Unavailable("lost"), in_flight)
                except errors.Unavailable:
                    break
                granted += 1
            allowed = LIMITS.client_retry_reserve + LIMITS.client_retry_ratio * begun
            assert granted <= allowed + 50 + 1e-6
        if failing == 1.0:
            assert granted > allowed - 2, "all tokens can be used"


def test_the_budget_limits_retries_to_a_server_that_loses_every_call(at_once: None) -> None:
    server = Failing(1_000_000, closes)
    calls = 400
    with serving(server) as address, Client(address) as client:
        for _ in range(calls):
            with pytest.raises(errors.Unavailable):
                client.ping()
    assert calls < len(server.seen) <= calls * (1 + LIMITS.client_retry_ratio) + LIMITS.client_retry_reserve


def test_all_calls_of_a_lost_connection_can_be_sent_again() -> None:
    count = 3000
    server = Failing(count, lambda peer, msgid: None)
    lost = threading.Event()

    def script(peer: Peer) -> None:
        if lost.is_set():
            server(peer)
        for _ in range(count):
            server.seen.append(peer.receive()[1:])
        lost.set()

    async def run(address: str) -> None:
        async with await AsyncClient.connect(address) as client:
            await asyncio.gather(*(client.predict("m", {"x": x}) for x in range(count)))

    with serving(script) as address:
        asyncio.run(run(address))
    assert len(server.seen) == 2 * count


# The connections of Client


def in_threads(n: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * n

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except errors.ShorttailError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_calls_of_threads_run_at_the_same_time() -> None:
    together = threading.Barrier(4)
    used: list[int] = []

    def script(peer: Peer) -> None:
        while True:
            msgid, _, params = peer.receive()
            if params:
                together.wait(10)  # no call is answered before all have arrived
            used.append(id(peer))
            peer.answer(msgid, RESULTS["predict"])

    with serving(script) as address, Client(address) as client:
        results = in_threads(4, lambda _: client.predict("m", {"x": 1.0}).version)
        assert results == [1] * 4
        assert len(set(used)) == 4
        used.clear()
        for _ in range(8):
            client.ping()
        assert len(set(used)) == 1  # the other connections stay idle until the server closes them


def test_calls_wait_for_a_connection_at_the_limit() -> None:
    server = Failing(0, closes)
    with serving(server) as address, Client(address, max_connections=2) as client:
        assert in_threads(8, lambda _: [client.predict("m", {"x": 1}).version for _ in range(20)]) == [[1] * 20] * 8
    assert server.n_connections <= 2
    assert len(server.seen) == 160


def test_a_deadline_passes_while_all_connections_are_in_use() -> None:
    held, free = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        msgid, _, _ = peer.receive()
        held.set()
        free.wait(10)
        peer.answer(msgid, "pong")

    with serving(script) as address, Client(address, max_connections=1) as client:
        holding = threading.Thread(target=client.ping)
        holding.start()
        held.wait(10)
        with pytest.raises(errors.DeadlineExceeded, match=f"other calls held all 1 connections to {address}"):
            client.predict("m", {}, deadline_ms=1)
        free.set()
        holding.join()


def test_a_failed_call_gives_its_connection_slot_back(closed_port: socket.socket) -> None:
    with Client(f"127.0.0.1:{closed_port.getsockname()[1]}", max_connections=1, retries=0) as client:
        for _ in range(3):
            with pytest.raises(errors.Unavailable, match="refused"):
                client.ping()
        closed_port.listen()
        for _ in range(2):  # connected, but not accepted: no answer comes
            with pytest.raises(errors.DeadlineExceeded):
                client.predict("m", {}, deadline_ms=1)


def test_connections_in_use_are_closed_when_they_are_given_back() -> None:
    held, free = threading.Event(), threading.Event()
    ended = threading.Semaphore(0)

    def script(peer: Peer) -> None:
        try:
            while True:
                msgid, method, _ = peer.receive()
                if method == "models":
                    held.set()
                    free.wait(10)
                peer.answer(msgid, RESULTS[method])
        finally:
            ended.release()

    with serving(script) as address:
        client = Client(address)
        using = threading.Thread(target=client.models)
        using.start()
        held.wait(10)
        client.ping()  # a second connection, which is idle afterwards
        client.close()
        assert ended.acquire(timeout=10)
        free.set()
        using.join()
        assert ended.acquire(timeout=10)
        client.ping()  # connects again
        client.close()


# The connections of AsyncClient


def test_calls_use_the_connection_with_the_fewest_in_flight() -> None:
    arrived: dict[int, list[int]] = {}
    answers = threading.Event()

    def script(peer: Peer) -> None:
        mine = arrived[id(peer)] = []
        while len(mine) < 5:
            mine.append(peer.receive()[0])
        answers.wait(10)
        for msgid in mine:
            peer.answer(msgid, "pong")
        peer.receive()

    async def run(address: str) -> None:
        async with await AsyncClient.connect(address, connections=3) as client:
            calls = [asyncio.create_task(client.ping()) for _ in range(15)]
            while sum(map(len, arrived.values())) < 15:
                await asyncio.sleep(0.01)
            answers.set()
            await asyncio.gather(*calls)

    with serving(script) as address:
        asyncio.run(asyncio.wait_for(run(address), 10))
    assert [len(mine) for mine in arrived.values()] == [5] * 3


def test_a_lost_connection_is_made_again_while_the_others_serve() -> None:
    server = Failing(0, closes)

    async def run(address: str) -> None:
        async with await AsyncClient.connect(address, connections=2, retries=0) as client:
            for connections in range(3, 6):
                [kept, lost] = [line.stream for line in client._lines]
                assert kept is not None
                assert lost is not None
                lost.lose("cut by the test")
                while server.n_connections < connections:
                    await client.ping()
                while (again := client._lines[1].stream) is lost:
                    await client.ping()
                assert again is not None
                assert client._lines[0].stream is kept

    with serving(server) as address:
        asyncio.run(asyncio.wait_for(run(address), 10))
    assert server.n_connections == 5


def test_calls_that_wait_for_a_connection_share_one_attempt() -> None:
    server = Failing(0, closes)

    async def run(address: str) -> None:
        async with AsyncClient(address) as client:
            await asyncio.gather(*(client.ping() for _ in range(200)))

    with serving(server) as address:
        asyncio.run(run(address))
    assert (server.n_connections, len(server.seen)) == (1, 200)


def test_the_deadline_of_a_call_holds_while_it_waits_for_a_connection() -> None:
    """The peer accepts connections and never answers `auth`."""

    async def run(address: str) -> None:
        client = AsyncClient(address, token="t", timeout_s=30)
        waiting = asyncio.create_task(client.ping())
        with pytest.raises(errors.DeadlineExceeded, match=r"predict: no answer from .* within 0\.101 s"):
            await client.predict("m", {}, deadline_ms=1)
        assert not waiting.done()
        await client.close()
        with pytest.raises(errors.Unavailable, match="closed"):
            await waiting

    with serving(lambda peer: peer.receive() and peer.receive() and None) as address:
        asyncio.run(run(address))


@pytest.mark.parametrize("run", [call_blocking, call_async])
def test_retries_do_not_change_the_error_of_a_closed_port(run: Any, closed_port: socket.socket) -> None:
    address = f"127.0.0.1:{closed_port.getsockname()[1]}"
    with pytest.raises(errors.Unavailable, match=f"^no server at {address}: connection refused; start one with"):
        run(address, READS["predict"])
