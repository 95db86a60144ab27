"""Pushes and deletes on the wire: forwarded without decoding their columns, and answered with the outcome."""

import time

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as values
from test_wire import PREDICT, PREDICTED, Served

from shorttail._native import wire
from shorttail.config import LIMITS
from shorttail.errors import ResourceExhausted, Unavailable

DONE = msgpack.packb(None) + msgpack.packb({"rows": 3})


class Forwarding(Served):
    """A router that records what it forwards."""

    def __init__(self):
        super().__init__()
        self.taken, self.refusal = [], None
        self.router.forward = self.forward

    def forward(self, connection, msgid, method, params, deadline_ns):
        if self.refusal is not None:
            raise self.refusal
        self.taken.append((connection, msgid, method, params, deadline_ns))


@pytest.fixture
def served():
    return Forwarding()


@settings(max_examples=50, deadline=None)
@given(
    values.dictionaries(values.text(), values.lists(values.integers(0, 9) | values.none() | values.text())),
    values.integers(0, 2**32 - 1),
    values.sampled_from(["push", "delete"]),
    values.booleans(),
    values.data(),
)
def test_params_are_forwarded_byte_for_byte_however_they_were_split(columns, msgid, method, silent, data):
    served = Forwarding()
    connection = served.connect()
    params = ["stats", columns]
    message = msgpack.packb([2, method, params] if silent else [0, msgid, method, params])
    cut = data.draw(values.integers(0, len(message)))
    connection.data_received(message[:cut])
    connection.data_received(message[cut:])
    caller = (None, 0) if silent else (connection, msgid)
    assert served.taken == [(*caller, method, msgpack.packb(params), 0)]
    assert connection.in_flight == (not silent)


def test_the_outcome_is_relayed_and_predictions_do_not_wait_for_it(served):
    connection = served.connect()
    push = [0, 2**32 - 1, "push", ["stats", {"key": 1}]]
    assert served.ask(push, PREDICT, connection=connection) == [PREDICTED]
    assert connection.in_flight == 1
    connection.relay(2**32 - 1, DONE)
    served.loop.turn()
    assert served.replies(connection) == [[1, 2**32 - 1, None, {"rows": 3}]]
    assert connection.in_flight == 0


def test_all_outcomes_of_a_turn_are_one_write(served):
    connection = served.connect()
    assert served.ask(*([0, n, "delete", ["stats", {}]] for n in range(10)), connection=connection) == []
    for n in range(10):
        connection.relay(n, DONE)
    served.loop.turn()
    assert len(served.transport_of[connection].written) == 1
    assert [reply[1] for reply in served.replies(connection)] == list(range(10))


def test_an_ending_connection_waits_for_outcomes_and_a_closed_one_is_ignored(served):
    ending, gone = served.connect(), served.connect()
    for connection in (ending, gone):
        served.ask([0, 1, "push", ["stats", {}]], connection=connection)
    assert ending.eof_received() is True
    gone.connection_lost(None)
    assert not served.transport_of[ending].closed
    for connection in (ending, gone):
        connection.relay(1, DONE)
    served.loop.turn()
    assert served.replies(ending) == [[1, 1, None, {"rows": 3}]]
    assert served.replies(gone) == []
    assert served.transport_of[ending].closed
    assert (ending.in_flight, gone.in_flight) == (0, 0)


def test_a_deadline_is_forwarded_as_a_time(served):
    before_ns = time.monotonic_ns()
    served.ask([0, 1, "push", ["stats", {}, {"deadline_ms": 50}]], [0, 2, "push", ["stats", {}, None]])
    assert before_ns <= served.taken[0][4] - 50_000_000 <= time.monotonic_ns()
    assert served.taken[1][4] == 0


@pytest.mark.parametrize("partial", [True, False])
def test_only_a_push_may_be_partial(served, partial):
    params = ["stats", {"key": 1}, {"partial": partial, "deadline_ms": 50}]
    assert served.ask([0, 1, "push", params]) == []
    assert served.taken[0][3] == msgpack.packb(params)  # the writer reads the option
    for method, call in (("delete", params[:2]), ("get_online_features", [[], {}]), ("predict", ["total", {}])):
        [reply] = served.ask([0, 2, method, [*call, {"partial": partial}]])
        assert reply[2]["code"] == "INVALID_ARGUMENT"
        known = "deadline_ms, traceparent" if method == "delete" else "as_of, deadline_ms, encoding, "
        assert reply[2]["message"].startswith(f"unknown option 'partial'; options: {known}")
    assert len(served.taken) == 1


@pytest.mark.parametrize("refusal", [Unavailable("away"), ResourceExhausted("full")])
def test_a_refused_push_is_not_in_flight(served, refusal):
    connection = served.connect()
    served.refusal = refusal
    error = {"code": refusal.code, "message": refusal.message}
    assert served.ask([0, 4, "push", ["stats", {}]], connection=connection) == [[1, 4, error, None]]
    assert served.ask([2, "push", ["stats", {}]], connection=connection) == []
    assert connection.in_flight == 0


@pytest.mark.parametrize(
    ("params", "code", "message"),
    [
        ([], "INVALID_ARGUMENT", "push takes [view, {column: value or array}, {option: value}?]"),
        (["stats", [1]], "INVALID_ARGUMENT", "push takes [view,"),
        ([None, {}], "INVALID_ARGUMENT", "push takes [view,"),
        (["stats", {}, {}, 1], "INVALID_ARGUMENT", "push takes [view,"),
        ({}, "INVALID_ARGUMENT", "params of 'push' must be an array"),
        (["stats", {}, 5], "INVALID_ARGUMENT", "options must be a map"),
        (
            ["stats", {}, {"encoding": "list"}],
            "INVALID_ARGUMENT",
            "unknown option 'encoding'; options: deadline_ms, partial, traceparent",
        ),
        (["stats", {}, {"priority": 1}], "INVALID_ARGUMENT", "unknown option 'priority'"),
        (["stats", {}, {"partial": 1}], "INVALID_ARGUMENT", "option 'partial' must be true or false; got 1"),
        (["stats", {}, {"partial": None}], "INVALID_ARGUMENT", "option 'partial' must be true or false; got None"),
        (["stats", {}, {"statuses": True}], "INVALID_ARGUMENT", "unknown option 'statuses'"),
        (["stats", {}, {"deadline_ms": -1}], "DEADLINE_EXCEEDED", "deadline_ms -1"),
    ],
)
def test_wrong_params_are_refused_and_not_forwarded(served, params, code, message):
    [reply] = served.ask([0, 5, "push", params])
    assert (reply[2]["code"], reply[3]) == (code, None)
    assert reply[2]["message"].startswith(message)
    assert served.taken == []


def test_the_pushes_in_flight_on_a_connection_are_limited(served):
    connection = served.connect()
    most = LIMITS.pushes_per_connection
    [refused] = served.ask(*([0, n, "push", ["stats", {}]] for n in range(most + 1)), connection=connection)
    assert (refused[1], refused[2]["code"]) == (most, "RESOURCE_EXHAUSTED")
    connection.relay(0, DONE)
    assert served.ask([0, 7, "push", ["stats", {}]], connection=connection) == [[1, 0, None, {"rows": 3}]]
    assert len(served.taken) == most + 1
    assert served.ask([0, 8, "push", ["stats", {}]]) == []  # another connection has its own limit


def test_without_a_writer_push_is_an_unknown_method():
    [reply] = Served().ask([0, 1, "push", ["stats", {}]])
    assert reply[2]["message"] == "unknown method 'push'; methods: predict, get_online_features, ping, echo"


def test_relay_takes_bytes():
    connection = wire.Connection(Served().router)
    with pytest.raises(TypeError):
        connection.relay(1, None)
