"""Overload: which requests a server refuses, which it answers, and which requests wait for others."""

import concurrent.futures
import contextlib
import http.client
import json
import time

import msgpack
import numpy as np
import onnx
import pytest
from http_asking import http_port
from onnx import TensorProto, helper, numpy_helper
from serving import DEFINITIONS, PREDICT, PREDICTED, ROWS, TIMEOUT_S, Server, environment_with, write_sum

import shorttail as st
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Workload, plan_rpc

WIDE = 1024
SLOW = """
slow = st.Model("slow", path="slow.onnx", inputs=["stats:age", "stats:visits", "request:amount"])
slower = st.Model("slower", path="slow.onnx", inputs=["stats:age", "stats:visits", "request:amount"])
"""
SEED = 7


def write_slow(path):
    """Write a network, score [rows, 1], that takes about 20 us per row."""
    random = np.random.default_rng(SEED)
    widths = [(3, WIDE), (WIDE, WIDE), (WIDE, 1)]
    weights = [random.normal(scale=a**-0.5, size=(a, b)).astype(np.float32) for a, b in widths]
    nodes, at = [], "x"
    for n in range(len(widths)):
        end = "score" if n == len(widths) - 1 else f"r{n}"
        nodes += [helper.make_node("MatMul", [at, f"w{n}"], [f"m{n}"]), helper.make_node("Tanh", [f"m{n}"], [end])]
        at = end
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1]),
    ]
    named = [numpy_helper.from_array(array, f"w{n}") for n, array in enumerate(weights)]
    model = helper.make_model(
        helper.make_graph(nodes, "slow", ends[:1], ends[1:], named), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp("overloaded")
    (home / "definitions.py").write_text(DEFINITIONS + SLOW)
    write_sum(home / "total.onnx", 1.0)
    write_slow(home / "slow.onnx")
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.push("stats", ROWS)
    return home / "store"


@pytest.fixture
def start(store, tmp_path):
    servers = []

    def start(*options):
        servers.append(Server(store, *options, log=tmp_path / f"log{len(servers)}"))
        return servers[-1]

    yield start
    for server in servers:
        assert server.stop() == 0
        assert server.log.read_text() == ""


def slow_request(msgid, rows, model="slow"):
    return [0, msgid, "predict", [model, {"user_id": [1] * rows, "amount": 0.5}]]


def test_a_slow_model_delays_no_other_model(start):
    """The slowest request is sent first and is answered last."""
    with start("--no-http", "--p99-budget-ms", "1e6").connect() as peer:
        messages = [slow_request(1, 8000), slow_request(2, 8000)]
        peer.send(b"".join(map(msgpack.packb, messages)))
        peer.send(msgpack.packb(slow_request(3, 200, "slower")))
        peer.send(msgpack.packb([0, 4, *PREDICT[2:]]))
        order = [peer.reply() for _ in range(4)]
    assert [reply[2] for reply in order] == [None] * 4
    assert [reply[1] for reply in order][-1] in (1, 2)
    place = {reply[1]: n for n, reply in enumerate(order)}
    assert max(place[3], place[4]) < min(place[1], place[2])


def test_an_overload_is_answered_in_part_and_ends_with_the_load(start, store):
    """The load is several seconds of work per second, for a slow model."""
    server = start("--no-http", "--p99-budget-ms", "2")
    with st.Engine.open(store) as engine:
        work = Workload(predict="slow", keys=["user_id=uniform:1:3"], rows=50, deadline_ms=200.0)
        plan = plan_rpc(work, engine.models(), engine.views())
    load = Load(connections=4, pipeline=16_384, duration_s=1.0, warmup_s=0.0, timeout_s=TIMEOUT_S, seed=SEED)
    address = f"127.0.0.1:{server.address[1]}"
    step = run_step(plan, target.find(address), load, Rate(20_000.0, 20_000.0))
    assert step.fatal == ""  # no answer without a request, and none on another connection
    assert step.counts["wrong_answers"] == 0
    assert step.outcomes["timeout"] == step.outcomes["lost"] == 0
    assert step.outcomes["good"] > 0
    assert set(step.errors) <= {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert step.errors["RESOURCE_EXHAUSTED"].message == "the server is overloaded; send it again later"
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
        assert peer.ask(*slow_request(5, 1))[2] is None


def test_no_connection_is_starved_under_overload(start):
    """All connections send the same load, more than the server can do. The first may find it idle more often."""
    server = start("--no-http", "--p99-budget-ms", "20")
    peers = [server.connect() for _ in range(8)]
    burst = b"".join(msgpack.packb(slow_request(n, 400, "total")) for n in range(40))
    good, refused, unsent = [0] * len(peers), [0] * len(peers), [b""] * len(peers)
    for peer in peers:
        peer.socket.setblocking(False)
    end_s = time.monotonic() + TIMEOUT_S
    while sum(good) < 4000 or min(refused) < 1000:
        assert time.monotonic() < end_s, (good, refused)
        time.sleep(0.002)
        for n, peer in enumerate(peers):
            with contextlib.suppress(BlockingIOError):
                unsent[n] = unsent[n] or burst
                unsent[n] = unsent[n][peer.socket.send(unsent[n]) :]
            with contextlib.suppress(BlockingIOError):
                answers = peer.socket.recv(1 << 20)
                good[n] += answers.count(b"outputs")
                refused[n] += answers.count(b"RESOURCE_EXHAUSTED")
    for peer in peers:
        peer.socket.close()
    assert max(good) < 10 * min(good), (good, refused)


def rows_of(count):
    """Return the body of an infer request of so many rows that is small enough for the event loop."""
    users = {"name": "user_id", "datatype": "INT64", "shape": [count], "data": [1] * count}
    amount = {"name": "amount", "datatype": "FP32", "shape": [1], "data": [0.5]}
    return json.dumps({"inputs": [users, amount]}, separators=(",", ":"))


def test_http_is_under_the_same_admission(start):
    """Of several requests of many rows, one runs, one may wait, and the others are refused."""
    server = start("--p99-budget-ms", "0.1")
    body = rows_of(3000)

    def ask(_=0):
        connection = http.client.HTTPConnection("127.0.0.1", http_port(server), timeout=TIMEOUT_S)
        try:
            connection.request("POST", "/v2/models/slow/infer", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.getheader("Retry-After"), json.loads(response.read())
        finally:
            connection.close()

    assert [ask()[0] for _ in range(3)] == [200] * 3  # one after another, so that the server knows their cost
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    refused = [(status, after, answer) for status, after, answer in answers if status != 200]
    assert 1 <= len(refused) < 8
    assert {(status, after) for status, after, _ in refused} == {(429, "1")}
    assert refused[0][2] == {"error": "the server is overloaded; send it again later"}
    assert all(answer["outputs"][0]["shape"][0] == 3000 for status, _, answer in answers if status == 200)
    assert ask()[0] == 200


def test_the_http_requests_in_flight_are_limited(store, tmp_path):
    """With three slow requests in flight a fourth is answered; with four, a fifth is refused."""
    env = environment_with(tmp_path, http_requests=4)
    server = Server(store, "--p99-budget-ms", "1e6", log=tmp_path / "log", env=env)

    def ask(model, rows):
        connection = http.client.HTTPConnection("127.0.0.1", http_port(server), timeout=TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"/v2/models/{model}/infer", rows_of(rows), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def probe(threads, slow):
        """Send small requests while n slow ones are in flight. Returns the answers to both."""
        waiting = [threads.submit(ask, "slow", 10_000) for _ in range(slow)]
        answers = []
        while not any(one.done() for one in waiting):
            answers.append(ask("total", 1))
        return answers, [one.result() for one in waiting]

    try:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            answers, others = probe(threads, 3)
            assert answers
            assert {status for status, _ in answers} == {200}
            assert [status for status, _ in others] == [200] * 3
            answers, others = probe(threads, 4)
            refusal = {"error": "4 HTTP requests are in flight; send it again later"}
            # Five requests at once: a probe is refused, or the last of the four if a probe came before it.
            assert (429, refusal) in answers + others
            assert [status for status, _ in others].count(200) >= 3
        assert server.stop() == 0
        assert server.log.read_text() == ""
    finally:
        server.kill()
