"""Requests that share a batch: none fails for another's row, and none gets an answer that another's row has changed."""

import asyncio
import collections
import os
import random
import re
import signal
import time

import aiohttp
import failing_models
import msgpack
import numpy as np
import pytest
from http_asking import http_port
from serving import replaced, until

import shorttail as st

SMALLEST = -(2**63)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A store with models that fail on some rows, and one beside them."""
    home = tmp_path_factory.mktemp("failing")
    failing_models.gather(home / "gather.onnx")
    failing_models.gather(home / "slow.onnx", delay_rounds=60)
    failing_models.divide(home / "divide.onnx")
    failing_models.endless(home / "endless.onnx")
    failing_models.listwise(home / "listwise.onnx")
    failing_models.top_rows(home / "top.onnx")
    scores = ["request:score"]
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(
            [
                st.Model("gather", str(home / "gather.onnx"), ["request:item"]),
                st.Model("slow", str(home / "slow.onnx"), ["request:item"]),
                st.Model("divide", str(home / "divide.onnx"), {"a": ["request:a"], "b": ["request:b"]}),
                st.Model("endless", str(home / "endless.onnx"), ["request:x"], run_timeout="300ms"),
                st.Model("listwise", str(home / "listwise.onnx"), scores, batching="request"),
                st.Model("top", str(home / "top.onnx"), scores, batching="request"),
            ]
        )
    return home / "store"


async def gathered(address, asked, connections=1):
    """Send all requests (model, columns) at once, and return the answers and errors in order."""
    clients = [await st.AsyncClient.connect(address, retries=0) for _ in range(connections)]
    try:
        calls = [clients[i % connections].predict(*each) for i, each in enumerate(asked)]
        return await asyncio.gather(*calls, return_exceptions=True)
    finally:
        for client in clients:
            await client.close()


def ask_all(server, asked, connections=1):
    return asyncio.run(gathered("{}:{}".format(*server.address), asked, connections))


async def posted(url, bodies):
    """Send all bodies at once, each on a connection of its own that is open before. Returns the statuses in order."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def status(body):
            async with session.post(url, json=body) as response:
                return response.status

        await asyncio.gather(*[status(bodies[0]) for _ in bodies])
        return await asyncio.gather(*map(status, bodies))


def outcome(answer, output="y"):
    """The output as a list, or the code of the error."""
    return answer.code if isinstance(answer, st.ShorttailError) else answer.outputs[output].ravel().tolist()


@pytest.mark.parametrize("model", ["gather", "slow"])
@pytest.mark.parametrize("bad", [1, 20, 100])
def test_only_the_bad_requests_of_a_batch_fail(failing, start, model, bad):
    """Bad rows at random places, in requests of one to three rows."""
    server = start("--p99-budget-ms", 1e6, of=failing)  # refuses nothing
    dice = random.Random(bad)
    print(f"seed {bad}")
    rows = [[dice.randrange(10) for _ in range(dice.randint(1, 3))] for _ in range(200)]
    for guilty in dice.sample(range(200), bad):
        rows[guilty][dice.randrange(len(rows[guilty]))] = 10**6
    expected = [[float(row) for row in each] if max(each) < 10 else "INVALID_ARGUMENT" for each in rows]
    for connections in (1, 7):
        answers = ask_all(server, [(model, {"item": each}) for each in rows], connections)
        assert [outcome(answer) for answer in answers] == expected
    assert {str(answer) for answer in answers if isinstance(answer, Exception)} == {
        next(str(answer) for answer in answers if isinstance(answer, Exception))
    }
    assert "indices element out of data bounds" in next(str(a) for a in answers if isinstance(a, Exception))
    assert server.log.read_text() == ""  # the callers' faults are counted, and leave the log alone
    assert server.stop() == 0


def test_bad_requests_over_http_fail_alone(failing, start):
    server = start("--http-port", "0", of=failing)
    items = [3] * 30 + [10**6] + [3] * 30
    bodies = [{"parameters": {"model": "gather"}, "instances": [{"item": item}]} for item in items]
    statuses = asyncio.run(posted(f"http://127.0.0.1:{http_port(server)}/invocations", bodies))
    assert collections.Counter(statuses) == {200: 60, 400: 1}
    assert statuses[30] == 400


def test_division_by_zero_is_the_callers_fault(failing, start):
    server = start(of=failing)
    answers = ask_all(server, [("divide", {"a": 7, "b": 100 + i % 3}) for i in range(60)])
    assert [outcome(a) for a in answers] == ["INVALID_ARGUMENT" if i % 3 == 0 else [7 // (i % 3)] for i in range(60)]
    with st.Engine.open(failing) as engine, pytest.raises(st.InvalidArgument, match="division by zero"):
        engine.predict("divide", {"a": 1, "b": 100})


def test_a_sender_of_bad_rows_is_batched_apart_for_a_while(failing, start):
    """Afterwards the good requests of others share runs again: no run of theirs fails."""
    server = start("--http-port", "0", of=failing)
    asked = [("gather", {"item": 10**6 if i % 2 else 3}) for i in range(40)]
    answers = ask_all(server, asked)
    assert [outcome(a) for a in answers] == ["INVALID_ARGUMENT" if i % 2 else [3.0] for i in range(40)]
    answers = ask_all(server, asked, connections=3)  # of the same address: suspects, who still get right answers
    assert [outcome(a) for a in answers] == ["INVALID_ARGUMENT" if i % 2 else [3.0] for i in range(40)]


def test_a_run_that_never_ends_is_ended_and_harms_no_other_request(failing, start):
    server = start(of=failing)
    [pid] = server.workers()
    asked = [("endless", {"x": 2e6 if i == 17 else float(i)}) for i in range(40)]
    asked += [("gather", {"item": i % 10}) for i in range(40)]
    answers = ask_all(server, asked)
    endless, gather = answers[:40], answers[40:]
    assert [outcome(a) for a in gather] == [[float(i % 10)] for i in range(40)]
    assert [outcome(a) for a in endless] == ["DEADLINE_EXCEEDED" if i == 17 else [float(i)] for i in range(40)]
    assert "run_timeout of 0.3 s" in str(endless[17])
    assert server.workers() == [pid]
    with st.Engine.open(failing) as engine:
        with pytest.raises(st.DeadlineExceeded, match=r"longer than its run_timeout of 0\.3 s"):
            engine.predict("endless", {"x": 2e6})
        assert engine.predict("endless", {"x": 2.0}).outputs["y"].tolist() == [[2.0]]


def test_a_model_in_whose_runs_two_workers_died_is_not_run_any_more(failing, start):
    server = start(of=failing)
    for _ in range(2):
        [pid] = server.workers()
        [answer] = ask_all(server, [("divide", {"a": SMALLEST, "b": 99})])
        assert isinstance(answer, st.ShorttailError)
        replaced(server, pid, 1)
    until(lambda: "not run any more" in server.log.read_text(), server)
    refused, answered = ask_all(server, [("divide", {"a": 4, "b": 102}), ("gather", {"item": 4})])
    assert outcome(refused) == "UNAVAILABLE"
    assert "'divide' version 1 is not run any more: server processes died in it, or hung" in str(refused)
    assert outcome(answered) == [4.0]
    assert len(re.findall(r"worker 1 \(pid \d+\) died: signal 8", server.log.read_text())) == 2
    # A reload is the operator's word to try it again.
    server.process.send_signal(1)
    until(lambda: "reloaded" in server.log.read_text(), server)
    until(lambda: outcome(ask_all(server, [("divide", {"a": 4, "b": 102})])[0]) == [2], server)
    assert server.stop() == 0


def test_a_model_is_not_blamed_for_workers_that_somebody_killed(failing, start):
    server = start(of=failing)
    for _ in range(2):
        assert outcome(ask_all(server, [("endless", {"x": 2.0})])[0]) == [2.0]  # the worker is ready
        [pid] = server.workers()
        with server.connect() as peer:
            peer.send(msgpack.packb([0, 1, "predict", ["endless", {"x": 2e6}]]))
            time.sleep(0.28)  # in its run, in a thread
            os.kill(pid, signal.SIGKILL)
        replaced(server, pid, 1)
    until(lambda: outcome(ask_all(server, [("endless", {"x": 2.0})])[0]) == [2.0], server)
    assert "not run any more" not in server.log.read_text()


def test_requests_whose_rows_depend_on_each_other_never_share_a_run(failing, start):
    server = start(of=failing)
    rows = [np.random.default_rng(i).normal(size=1 + i % 5) for i in range(60)]
    for connections in (1, 5):
        answers = ask_all(server, [("listwise", {"score": each.tolist()}) for each in rows], connections)
        for each, answer in zip(rows, answers, strict=True):
            share = np.exp(each - each.max())
            assert answer.outputs["share"].ravel() == pytest.approx(share / share.sum(), rel=1e-5)


def test_requests_may_get_outputs_of_different_widths(failing, start):
    server = start(of=failing)
    rows = [np.random.default_rng(i).normal(size=1 + i % 4).astype(np.float32) for i in range(40)]
    answers = ask_all(server, [("top", {"score": each.tolist()}) for each in rows])
    for each, answer in zip(rows, answers, strict=True):
        expected = np.tile(np.sort(each)[::-1], (len(each), 1))
        assert answer.outputs["sorted"].tolist() == expected.tolist()
