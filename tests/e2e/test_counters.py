"""Counters of a running server: what its processes refuse, drop, cut and fail is in /metrics."""

import contextlib
import os
import signal

import failing_models
import msgpack
import pytest
from http_asking import Asking, ask
from prometheus_client.parser import text_string_to_metric_families
from pushing import row
from serving import PREDICT, PREDICTED, Server, environment_with, make_store, until, write_sum

import shorttail as st
from shorttail.config import LIMITS
from shorttail.registry import versions

ON_DEMAND = """
import shorttail as st

@st.on_demand
def nth(taste: st.Vector(2), n: st.Int64) -> st.Float32:
    return taste[n]

@st.on_demand
def first(taste: st.Vector(2), n: st.Int64) -> st.Vector(1):
    return taste[:n]

picked = st.Model("picked", path="picked.onnx", inputs=[
    nth("stats:taste", "request:n"), first("stats:taste", "request:m"), "request:amount",
])
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp("counted")
    made = make_store(home)
    write_sum(home / "picked.onnx", 1.0)
    write_sum(home / "twice.onnx", 2.0)
    failing_models.gather(home / "gather.onnx")
    failing_models.endless(home / "endless.onnx")
    definitions = home / "more.py"
    definitions.write_text(ON_DEMAND)
    with st.Engine.open(made) as engine:
        engine.apply(definitions)
        engine.apply(
            [
                st.Model("gather", str(home / "gather.onnx"), ["request:item"]),
                st.Model("endless", str(home / "endless.onnx"), ["request:x"], run_timeout="300ms"),
            ]
        )
        number = engine.deploy("total", home / "twice.onnx", promote=False)
        versions.set_shadow(engine.store, "total", number)
    return made


@pytest.fixture
def served(store, tmp_path):
    """served(*options, **limits): starts a server. Servers that still run after the test are killed."""
    servers = []

    def start(*options, **limits):
        folder = tmp_path / f"limits{len(servers)}"
        folder.mkdir()
        servers.append(
            Server(store, *options, log=tmp_path / f"log{len(servers)}", env=environment_with(folder, **limits))
        )
        return servers[-1]

    yield start
    for one in servers:
        one.kill()


def metrics(server):
    """Return {(name, *sorted labels): value}."""
    status, text = ask(server, "GET", "/metrics")
    assert status == 200
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def reads(server, value, name, **labels):
    """Wait until the metric of a server has this value. Counters are gathered ten times per second."""
    key = (f"shorttail_{name}", *sorted(labels.items()))
    until(lambda: metrics(server).get(key) == value, server)


def pushes(server, *rows, method="push"):
    with server.connect() as peer:
        return [peer.ask(0, i, method, ["stats", each])[2:] for i, each in enumerate(rows)]


def test_rows_of_pushes_are_counted_by_what_became_of_them(served):
    server = served()
    now, past = msgpack.Timestamp.from_unix(1.7e9), msgpack.Timestamp.from_unix(1.6e9)
    answers = pushes(server, row(71), row(72), row(73))
    assert answers == [[None, {"rows": 1, "older": 0}]] * 3
    found = metrics(server)  # no wait: they are counted before they are acknowledged
    assert found["shorttail_push_rows_total", ("outcome", "stored"), ("view", "stats")] == 3
    assert found["shorttail_push_rows_total", ("outcome", "older"), ("view", "stats")] == 0
    commits = found[("shorttail_commit_duration_seconds_count",)]
    assert 1 <= commits <= 3
    timed = {name: [value] * 2 for name, value in row(74).items()} | {"event_time": [now, past]}
    [[error, result]] = pushes(server, timed)
    assert (error, result) == (None, {"rows": 1, "older": 1})
    found = metrics(server)
    assert found["shorttail_push_rows_total", ("outcome", "stored"), ("view", "stats")] == 4
    assert found["shorttail_push_rows_total", ("outcome", "older"), ("view", "stats")] == 1
    assert pushes(server, {"user_id": [71, 72, 999]}, method="delete") == [[None, {"rows": 2}]]
    assert metrics(server)["shorttail_deleted_rows_total", ("view", "stats")] == 2
    assert pushes(server, {"user_id": [1], "age": ["x"]})[0][0]["code"] == "INVALID_ARGUMENT"
    reads(server, 1, "writes_refused_total")
    reads(server, 0, "queued_write_rows")
    # The writer is no worker, and what it has counted outlives it.
    assert {dict(key[1:])["worker"] for key in found if "worker" in dict(key[1:])} == {"1"}
    assert found[("shorttail_workers",)] == 1
    [writer] = server.children("writer")
    os.kill(writer, signal.SIGKILL)
    until(lambda: server.children("writer") not in ([], [writer]), server)
    until(lambda: pushes(server, row(75)) == [[None, {"rows": 1, "older": 0}]], server)
    found = metrics(server)
    assert found["shorttail_push_rows_total", ("outcome", "stored"), ("view", "stats")] == 5
    assert found["shorttail_restarts_total", ("process", "writer")] == 1
    assert server.stop() == 0


def test_rows_without_a_value_of_an_on_demand_function_are_counted_by_function(served):
    server = served()
    columns = {"user_id": [1, 2, 3], "n": [0, 7, -9], "m": [1, 1, 0], "amount": 1.0}
    with server.connect() as peer:
        reply = peer.ask(0, 1, "predict", ["picked", columns])
    assert reply[2] is None
    assert [value != value for value in reply[3]["outputs"]["total"]] == [False, True, True]
    reads(server, 2, "on_demand_failed_rows_total", model="picked", function="nth", reason="error")
    reads(server, 1, "on_demand_failed_rows_total", model="picked", function="first", reason="length")
    reads(server, 0, "on_demand_failed_rows_total", model="picked", function="first", reason="error")
    assert server.stop() == 0


def test_failed_runs_and_refusals_without_a_run_are_counted_by_model(served):
    server = served()
    with server.connect() as peer:
        for i in range(LIMITS.suspect_requests):
            assert peer.ask(0, i, "predict", ["gather", {"item": 99}])[2]["code"] == "INVALID_ARGUMENT"
        assert peer.ask(0, 9, "predict", ["endless", {"x": 2e6}])[2]["code"] == "DEADLINE_EXCEEDED"
        reads(server, 2, "requests_refused_again_total", model="gather")
        found = metrics(server)
        assert found["shorttail_model_failed_runs_total", ("model", "gather"), ("reason", "error")] >= 1
        assert found["shorttail_model_part_runs_total", ("model", "gather")] >= 1
        reads(server, 1, "suspects")
    assert found["shorttail_model_failed_runs_total", ("model", "endless"), ("reason", "run_timeout")] >= 1
    assert server.stop() == 0


def test_what_a_shadow_answers_is_counted_by_version(served):
    server = served()
    of = {"model": "total", "version": "2"}
    with server.connect() as peer:
        for _ in range(5):
            assert peer.ask(*PREDICT) == PREDICTED
    until(lambda: shadowed(metrics(server), of) == 5, server)
    found = metrics(server)
    batches = found["shorttail_shadow_batches_total", *of.items()]
    assert batches >= 1
    assert found["shorttail_shadow_rows_total", *of.items()] == 3 * batches
    assert found["shorttail_shadow_rows_differing_total", *of.items()] == 2 * batches  # the third row is NaN in both
    assert found["shorttail_shadow_largest_difference", *of.items()] == 22.5
    assert found["shorttail_shadow_errors_total", *of.items()] == 0
    [worker] = server.workers()
    os.kill(worker, signal.SIGKILL)
    until(lambda: server.workers() not in ([], [worker]), server)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    until(lambda: shadowed(metrics(server), of) == 6, server)
    assert server.stop() == 0


def shadowed(found, of):
    return sum(found.get((f"shorttail_shadow_{name}_total", *of.items()), 0) for name in ("batches", "skipped_batches"))


def test_refused_and_cut_connections_are_counted_by_protocol(served):
    options = ["--max-connections", "3", "--frame-deadline-s", "1"]
    server = served(*options, http_connections=4, http_reserve=2, http_header_s=2.0)
    rpc, http = {"protocol": "rpc"}, {"protocol": "http"}
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(server.connect()) for _ in range(3)]
        assert [peer.ask(*PREDICT) for peer in peers] == [PREDICTED] * 3
        extra = stack.enter_context(server.connect())
        assert extra.reply()[2]["code"] == "RESOURCE_EXHAUSTED"
        reads(server, 1, "connections_refused_total", **rpc)
        reads(server, 0, "connections_cut_total", **rpc)
        peers[0].send(msgpack.packb(PREDICT)[:-3])
        assert peers[0].reply() is None
        reads(server, 1, "connections_cut_total", **rpc)
    with contextlib.ExitStack() as stack:
        silent = Asking(server, stack)
        assert silent.has_ended()
    reads(server, 1, "connections_cut_total", **http)
    with contextlib.ExitStack() as stack:

        def is_full():  # a connection of the metrics may still hold one of the four places
            Asking(server, stack).begin(1000)
            return in_flight(server) == 4

        until(is_full, server)
        found = metrics(server)
        assert found["shorttail_connections_refused_total", ("protocol", "http")] >= 1
        assert found["shorttail_connections", ("protocol", "http")] <= 6
    assert server.stop() == 0


def in_flight(server):
    return metrics(server)["shorttail_requests_in_flight", ("protocol", "http")]


def test_the_bulk_worker_is_no_worker_and_has_a_label_of_its_own(served):
    server = served()
    rows = LIMITS.rows_per_request
    with server.connect() as peer:
        reply = peer.ask(0, 1, "get_online_features", [["stats:age"] * 20, {"user_id": [1] * rows}])
        assert [len(values) for values in reply[3]["values"]] == [rows] * 20
        until(lambda: "bulk" in workers(metrics(server)), server)
        reads(server, 1, "connections", protocol="rpc")
        reads(server, 0, "requests_in_flight", protocol="rpc")
    found = metrics(server)
    assert workers(found) == {"1", "bulk"}
    assert found[("shorttail_workers",)] == 1
    assert found["shorttail_rows_total", ("method", "get_online_features"), ("model", "")] == rows
    assert server.stop() == 0


def workers(found):
    return {dict(key[1:])["worker"] for key in found if "worker" in dict(key[1:])}
