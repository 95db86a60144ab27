"""Versions that are added, removed and run side by side while `shorttail serve` runs."""

import collections
import math
import threading
from dataclasses import replace

import msgpack
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pushing import until
from serving import ASAN, DEFINITIONS, ROWS, Server, write_sum

import shorttail as st
from shorttail.registry import versions as registry

CLIENTS = 4
PIPELINE = 8
STEPS = 50_000 if ASAN else 5_000  # of the slow model: too slow to run in the event loop

SLOW = """
slow = st.Model("slow", path="slow.onnx", inputs=["request:x"])
"""


def write_slow(path):
    """Write a model that adds 1 STEPS times: y [rows] = x + STEPS."""
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["again"]),
            helper.make_node("Add", ["before", "one"], ["after"]),
        ],
        "step",
        [
            scalar("i", TensorProto.INT64, []),
            scalar("condition", TensorProto.BOOL, []),
            scalar("before", TensorProto.FLOAT, [None]),
        ],
        [scalar("again", TensorProto.BOOL, []), scalar("after", TensorProto.FLOAT, [None])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["steps", "true", "x"], ["y"], body=body)],
        "slow",
        [scalar("x", TensorProto.FLOAT, [None])],
        [scalar("y", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("steps", TensorProto.INT64, [], [STEPS]),
            helper.make_tensor("true", TensorProto.BOOL, [], [True]),
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


class Swapping:
    """A server, and an engine on its store. Version n of `total` returns n times the sum."""

    def __init__(self, home, *options):
        (home / "definitions.py").write_text(DEFINITIONS + SLOW)
        write_sum(home / "total.onnx", 1.0)
        write_slow(home / "slow.onnx")
        self.home = home
        self.engine = st.Engine.open(home / "store", create=True)
        self.engine.apply(home / "definitions.py")
        self.engine.push("stats", ROWS)
        # With this budget no request is refused, however slow the machine is.
        self.server = Server(home / "store", "--p99-budget-ms", "1e6", *options, log=home / "log")
        self.peer = self.server.connect()

    def deploy(self, **options):
        number = max(self.engine.store.catalog.model("total").versions) + 1
        write_sum(self.home / "next.onnx", float(number))
        assert self.engine.deploy("total", self.home / "next.onnx", **options) == number
        return number

    def model(self, name="total"):
        return next(model for model in self.peer.ask(0, 1, "models", [])[3] if model["name"] == name)

    def total(self, user, **options):
        """Return (version, total) for one row."""
        reply = self.peer.ask(0, 1, "predict", ["total", {"user_id": user, "amount": 0.5}, options])
        assert reply[2] is None, reply
        return reply[3]["version"], reply[3]["outputs"]["total"][0]

    def close(self):
        self.peer.__exit__()
        self.engine.close()
        self.server.kill()


@pytest.fixture
def swapping(tmp_path):
    swapping = Swapping(tmp_path)
    yield swapping
    swapping.close()


class Load(threading.Thread):
    """Sends requests without a pause, PIPELINE at a time. seen: (version, total) -> count; wrong: errors."""

    def __init__(self, server):
        super().__init__()
        self.peer = server.connect()
        self.over = threading.Event()
        self.seen = collections.Counter()
        self.wrong = []

    def run(self):
        request = msgpack.packb([0, 1, "predict", ["total", {"user_id": 1, "amount": 0.5}]])
        while not self.over.is_set():
            self.peer.send(request * PIPELINE)
            for _ in range(PIPELINE):
                reply = self.peer.reply()
                if reply is None or reply[2] is not None:
                    self.wrong.append(reply)
                    return
                self.seen[reply[3]["version"], *reply[3]["outputs"]["total"]] += 1


def test_deploy_promote_and_rollback_under_load_break_no_request(swapping):
    loads = [Load(swapping.server) for _ in range(CLIENTS)]
    for load in loads:
        load.start()

    def answered_by(version):
        until(
            lambda: any(load.wrong for load in loads) or all((version, 11.5 * version) in load.seen for load in loads),
            f"version {version} answers all",
        )

    answered_by(1)
    for _ in range(5):
        answered_by(swapping.deploy())
    idle = swapping.deploy(promote=False)
    assert registry.promote(swapping.engine.store, "total", idle) == idle - 1
    answered_by(idle)
    for load in loads:
        load.seen.clear()
    assert registry.rollback(swapping.engine.store, "total") == idle - 1
    answered_by(idle - 1)
    for load in loads:
        load.over.set()
    for load in loads:
        load.join()
        assert load.wrong == []
        # Each answer is right for the version that it names.
        assert {total / version for version, total in load.seen} == {11.5}
        load.peer.__exit__()
    assert swapping.server.log.read_text() == ""


def test_a_version_that_cannot_be_loaded_never_answers(swapping):
    assert swapping.total(1) == (1, 11.5)
    number = swapping.deploy(promote=False)
    file = registry.model_path(swapping.engine.store.path, "total", number)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(np.float32(number).tobytes(), np.float32(666).tobytes()))
    # The command would notice; so make it current without the command, as if the file was damaged later.
    with pytest.raises(st.ShorttailError, match="SHA-256 differs"):
        registry.promote(swapping.engine.store, "total", number)
    with swapping.engine.store.edit_catalog() as catalog:
        catalog.models["total"] = catalog.models["total"].with_current(number)
    problem = until(lambda: swapping.model()["problem"], "the server has tried")
    assert problem == "model 'total' version 2: model.onnx is not the file that was registered: its SHA-256 differs"
    assert [swapping.total(1) for _ in range(50)] == [(1, 11.5)] * 50
    reply = swapping.peer.ask(0, 1, "predict", ["total", {"user_id": 1, "amount": 0.5}, {"version": number}])
    assert (reply[2]["code"], reply[2]["message"]) == ("UNAVAILABLE", problem)
    said = f"{problem}; version 1 serves"
    until(lambda: said in swapping.server.log.read_text(), "it is in the log")
    assert swapping.server.log.read_text().count(said) == 1

    file.write_bytes(whole)  # it is tried again at the next change of the catalog
    with swapping.engine.store.edit_catalog() as catalog:
        entity = catalog.entities["user"]
        catalog.entities["user"] = replace(entity, description="changed")
    until(lambda: swapping.total(1) == (number, 11.5 * number), "it answers")
    assert swapping.model()["problem"] is None


def test_a_canary_answers_its_share_of_the_entities(swapping):
    number = swapping.deploy(promote=False)
    swapping.peer.ask(0, 1, "predict", ["total", {"user_id": 1, "amount": 0.5}])
    registry.set_canary(swapping.engine.store, "total", 20.0)
    until(lambda: swapping.model()["canary"] == {"version": number, "percent": 20.0}, "it is loaded")

    users, sums = range(2000), {1: 11.5, 2: 22.5, 3: 5.0}
    stream = b"".join(msgpack.packb([0, i, "predict", ["total", {"user_id": i, "amount": 0.5}]]) for i in users)

    def versions():
        swapping.peer.send(stream)
        replies = sorted(swapping.peer.reply() for _ in users)
        assert all(replies[i][3]["outputs"]["total"] == [sums[i] * replies[i][3]["version"]] for i in sums)
        return [reply[3]["version"] for reply in replies]

    first = versions()
    assert first == versions(), "an entity gets the same version every time"
    expected, spread = 0.2 * len(users), math.sqrt(len(users) * 0.2 * 0.8)
    assert abs(first.count(number) - expected) < 5 * spread, "no random numbers: this share is always the same"
    # The embedded engine and any number of rows choose the same entities; a version in the request overrides that.
    embedded = [swapping.engine.predict("total", {"user_id": i, "amount": 0.5}).version for i in users]
    assert embedded == first
    rows = {"user_id": [first.index(number), 1, 2, 3], "amount": 1.0}
    assert swapping.peer.ask(0, 1, "predict", ["total", rows])[3]["version"] == number
    assert swapping.total(first.index(number), version=1)[0] == 1

    registry.set_canary(swapping.engine.store, "total", 60.0)
    until(lambda: swapping.model()["canary"]["percent"] == 60.0, "its share grows")
    assert all(later == number for before, later in zip(first, versions(), strict=True) if before == number)
    registry.promote(swapping.engine.store, "total")
    until(lambda: swapping.model()["canary"] is None, "it serves")
    assert set(versions()) == {number}


def test_a_shadow_is_compared_and_never_answers(swapping):
    number = swapping.deploy(promote=False)
    registry.set_shadow(swapping.engine.store, "total", number)
    until(lambda: swapping.model()["shadow"], "it is loaded")
    asked = {"user_id": [1, 2, 3], "amount": [-11.0, 0.5, 0.5]}  # the first sum is 0, so twice the sum is equal
    for n in range(1, 31):
        reply = swapping.peer.ask(0, n, "predict", ["total", asked])
        assert reply[3] == {"outputs": {"total": [0.0, 22.5, 5.0]}, "version": 1}
    shadow = until(
        lambda: (s := swapping.model()["shadow"])["batches"] + s["skipped"] == 30 and s, "all batches are counted"
    )
    assert shadow["batches"] >= 1
    assert (shadow["version"], shadow["percent"], shadow["errors"], shadow["last_error"]) == (number, 100.0, 0, "")
    assert shadow["rows"] == 3 * shadow["batches"]
    assert shadow["rows_differing"] == 2 * shadow["batches"]
    assert shadow["largest_difference"] == 22.5
    registry.set_shadow(swapping.engine.store, "total", None)
    until(lambda: swapping.model()["shadow"] is None, "it ends")


def test_a_slow_model_delays_no_other_request(swapping):
    slow = [0, 0, "predict", ["slow", {"x": 1.0}]]
    fast = [[0, i, "predict", ["total", {"user_id": 1, "amount": 0.5}]] for i in range(1, 6)]
    with swapping.server.connect() as peer:
        assert peer.ask(*slow)[3]["outputs"]["y"] == [STEPS + 1.0]
        # In one turn, with the slow request first: its answer comes last, because it runs in a thread.
        peer.send(b"".join(map(msgpack.packb, [slow, *fast])))
        replies = [peer.reply() for _ in range(6)]
        assert [reply[1] for reply in replies] == [1, 2, 3, 4, 5, 0]
        assert replies[-1][3]["outputs"]["y"] == [STEPS + 1.0]

        # Requests that arrive meanwhile are the next batch; a request whose deadline passes is not run.
        peer.send(msgpack.packb(slow))
        assert peer.ask(0, 9, "ping", []) == [1, 9, None, "pong"]
        late = [0, 10, "predict", ["slow", {"x": 2.0}, {"deadline_ms": 0.01}]]
        more = [[0, 20 + i, "predict", ["slow", {"x": [float(i), 5.0]}]] for i in range(3)]
        peer.send(b"".join(map(msgpack.packb, [late, *more])))
        replies = {reply[1]: reply for reply in (peer.reply() for _ in range(5))}
        assert replies[10][2]["code"] == "DEADLINE_EXCEEDED"
        assert replies[0][3]["outputs"]["y"] == [STEPS + 1.0]
        for i in range(3):
            assert replies[20 + i][3] == {"outputs": {"y": [STEPS + i, STEPS + 5.0]}, "version": 1}, replies

        # A server that stops finishes the batch.
        peer.send(msgpack.packb(slow))
        assert peer.ask(0, 9, "ping", []) == [1, 9, None, "pong"]
        assert swapping.server.stop() == 0
        assert peer.reply()[3]["outputs"]["y"] == [STEPS + 1.0]
