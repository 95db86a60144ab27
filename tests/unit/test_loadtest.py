"""The load generator at work: what it makes of every kind of answer. What it measures: test_loadtest_latency.py."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import MODELS, QUICK, VIEWS, good, http_server, load_on, predict, reply, rpc_server, with_load

from shorttail._native import loadtest as native
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Workload, plan_http, plan_rpc


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print("seed", chosen)
    return chosen


def test_errors_are_counted_by_code() -> None:
    def answer(request: list[Any]) -> bytes:
        kind = request[1] >> 6 & 7
        if kind > 5:
            return good(request)
        errors = {"message": "full\nup", "code": "RESOURCE_EXHAUSTED"}, "odd", {"x": [1], "code": "INTERNAL"}
        more = "NOT_FOUND: no model: x", "odd: OR: even", [14, "UNAVAILABLE: stopping"]
        return reply(request[1], error=(*errors, *more)[kind])

    with rpc_server(answer) as fake:
        step = load_on(fake.address)
    assert not step.fatal
    assert set(step.errors) == {"RESOURCE_EXHAUSTED", "ERROR", "INTERNAL", "NOT_FOUND", "UNAVAILABLE"}
    assert step.errors["NOT_FOUND"].message == "no model: x"
    assert step.errors["UNAVAILABLE"].message == "stopping"
    assert step.errors["RESOURCE_EXHAUSTED"].message == "full up"
    assert step.errors["ERROR"].message in ("odd", "odd: OR: even")
    assert sum(error.count for error in step.errors.values()) == step.outcomes["error"] > 0
    assert step.latency.total == step.outcomes["good"]
    assert step.outcomes["good"] + step.outcomes["error"] == step.due


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda request: good([0, request[1] ^ 1]), "answer to message id"),
        (lambda request: good([0, 2**40]), "which was never sent"),
        (lambda request: good(request) * 2, "which was answered before"),
        (lambda request: b"\xc1", "bytes that are not MessagePack"),
        (lambda request: b"\x05", "not a MessagePack-RPC response"),
        (lambda request: reply("id"), "message id that is not an unsigned integer"),
        (lambda request: b"\x91" * 40, "256 MiB or 32 levels"),
    ],
)
def test_wrong_answers_end_the_run(answer: Any, message: str) -> None:
    with rpc_server(answer) as fake:
        step = load_on(fake.address, with_load(connections=1))
    assert message in step.fatal


def test_answers_crossed_between_connections_end_the_run() -> None:
    held: list[list[Any]] = []

    def answer(request: list[Any]) -> bytes:
        """Answer the first request on the connection of the second, which is another connection."""
        held.append(request)
        return b"" if len(held) < 2 else good(held[-2])

    with rpc_server(answer) as fake:
        step = load_on(fake.address, with_load(connections=2, pipeline=1, closed=True), rate=None)
    assert "which another connection sent" in step.fatal


def test_lost_connections_are_counted_and_opened_again() -> None:
    with rpc_server(close_after=20) as fake:
        step = load_on(fake.address)
        assert fake.n_connections > 4
    assert not step.fatal
    assert step.counts["reconnects"] > 0
    assert step.outcomes["lost"] == step.errors["CONNECTION_LOST"].count > 0
    assert step.outcomes["good"] > 0
    assert sum(step.outcomes.values()) == step.due


@pytest.mark.parametrize("unix", [False, True])
def test_closed_loop_and_threads(tmp_path: Path, unix: bool) -> None:
    with rpc_server(path=str(tmp_path / "s") if unix else None) as fake:
        step = load_on(
            fake.address, with_load(closed=True, pipeline=3, connections=5, threads=2, duration_s=2.0), rate=None
        )
        assert fake.n_connections == 5 + 1  # one to see whether somebody is there
    assert step.due == step.outcomes["good"] > 0
    assert step.lag.total == 0


def test_two_threads_share_a_rate(seed: int) -> None:
    with rpc_server() as fake:
        step = load_on(fake.address, with_load(threads=2, seed=seed, poisson=False))
    assert step.due == pytest.approx(400, abs=3)
    assert step.outcomes["good"] == step.due


def test_stop_ends_a_run_early() -> None:
    with rpc_server() as fake:
        plan = plan_rpc(predict(), MODELS, VIEWS)
        found = target.find(fake.address)
        generator = native.Generator(
            protocol="msgpack", sockaddr=found.sockaddr, templates=plan.templates, columns=plan.columns,
            groups=plan.groups, connections=2, pipeline=4, rate_from=500.0, rate_to=500.0, duration_ns=3600 * 10**9,
        )  # fmt: skip
        thread = threading.Thread(target=generator.run)
        thread.start()
        while generator.progress()["good"] < 20:
            time.sleep(0.01)
        generator.stop()
        thread.join(10)
        assert not thread.is_alive()
    result = generator.results()
    assert 20 <= result["good"] == result["due"] < 500 * 3600


# -- HTTP --------------------------------------------------------------------------------------------------------------


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def chunked(body: bytes) -> bytes:
    pieces = b"".join(b"%x;x=1\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n" + pieces + b"0\r\nTrailer: x\r\n\r\n"


BODY = '{"id": "{{nonce}}", "user": {{ user }}, "items": [{{item...}}], "name": "{{name}}"}'


def http_load(fake_address: str, load: Load = QUICK, **given: Any) -> Step:
    found = target.find(f"http://{fake_address}/v1/predict?x=1")
    keys = ["user=uniform:1:5", "item=uniform:1:9", "name=uniform:1:3:n{}"]
    work = Workload(**{"body": BODY, "keys": keys, "rows": 3, **given})
    return run_step(plan_http(work, found), found, load, Rate(800.0, 800.0))


@pytest.mark.parametrize("frame", [ok, chunked, lambda body: b"HTTP/1.1 100 Continue\r\n\r\n" + ok(body)])
def test_http_requests_and_answers(frame: Any) -> None:
    import json

    with http_server(lambda head, body: frame(body)) as fake:
        step = http_load(fake.address, headers=["X-Key: secret"])
        assert fake.n_connections == QUICK.connections + 1  # kept alive
    assert not step.fatal
    assert step.due == step.outcomes["good"] > 100
    for head, body in fake.requests:
        assert head.startswith(b"POST /v1/predict?x=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nX-Key: secret" in head
        document = json.loads(body)
        assert 1 <= document["user"] <= 5
        assert len(document["items"]) == 3
        assert document["name"] in ("n1", "n2", "n3")
    assert len({json.loads(body)["id"] for _, body in fake.requests}) == len(fake.requests)


def test_http_errors_closing_servers_and_bodies_without_length() -> None:
    n = [0]

    def answer(head: bytes, body: bytes) -> bytes:
        n[0] += 1
        if n[0] % 4 == 0:
            return b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
        if n[0] % 4 == 1:
            return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b<close>" % (len(body), body)
        if n[0] % 4 == 2:
            return b"HTTP/1.0 200 OK\r\n\r\n" + body + b"<close>"
        return ok(body)

    with http_server(answer) as fake:
        step = http_load(fake.address)
    assert not step.fatal
    assert step.outcomes["lost"] == 0
    assert step.errors["HTTP 503"].count == step.outcomes["error"] > 0
    assert step.errors["HTTP 503"].message == "busy"
    assert step.outcomes["good"] + step.outcomes["error"] == step.due
    assert step.counts["reconnects"] > 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda head, body: ok(b'{"id": "x"}'), "was answered without it"),
        (lambda head, body: ok(body) + ok(body), "more answers than it sent"),
        (lambda head, body: b"hello\r\n\r\n", "not HTTP/1.1"),
        (lambda head, body: b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "not HTTP/1.1"),
        (lambda head, body: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP/1.1"),
    ],
)
def test_http_that_is_wrong_ends_the_run(answer: Any, message: str) -> None:
    with http_server(answer) as fake:
        step = http_load(fake.address, with_load(connections=1))
    assert message in step.fatal


def test_http_timeouts_close_the_connection() -> None:
    n = [0]

    def answer(head: bytes, body: bytes) -> bytes:
        n[0] += 1
        return b"" if n[0] % 20 == 0 else ok(body)

    with http_server(answer) as fake:
        step = http_load(fake.address, with_load(timeout_s=0.1, connections=8))
    assert not step.fatal
    assert step.outcomes["timeout"] > 0
    assert step.outcomes["good"] + step.outcomes["timeout"] == step.due
