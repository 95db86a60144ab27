"""Timeouts and limits of connections, with a clock and transports that the tests control."""

import msgpack
import pytest
from test_wire import PREDICT, PREDICTED, FakeTransport, Served

from shorttail._native import wire
from shorttail.config import LIMITS


class Slow(FakeTransport):
    """A transport that keeps what is written until the test clears `unsent`."""

    def __init__(self):
        super().__init__()
        self.unsent, self.peer = 0, ("10.0.0.1", 1)

    def write(self, data):
        super().write(data)
        self.unsent += len(data)

    def get_write_buffer_size(self):
        return self.unsent

    def get_extra_info(self, name):
        return self.peer


class Guarded(Served):
    def connect(self, peer=("10.0.0.1", 1), secure=False):
        connection = wire.Connection(self.router, secure)
        self.transport_of[connection] = transport = Slow()
        transport.peer = peer
        connection.connection_made(transport)
        return connection

    def lose(self, connection):
        connection.connection_lost(None)
        return connection not in self.router.connections

    def sweep(self, *seconds):
        for now_s in seconds:
            self.router.sweep(now_s)


@pytest.fixture
def served():
    return Guarded()


# -- timeouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1])
def test_an_incomplete_message_is_closed_after_the_frame_timeout(served, late):
    served.router.frame_deadline_s = 30
    connection = served.connect()
    message = msgpack.packb(PREDICT)
    connection.data_received(message[:10])
    served.sweep(100, 110, 130 + late)
    assert served.transport_of[connection].closed == bool(late)
    assert served.router.timed_out == late
    if not late:
        connection.data_received(message[10:])
        served.loop.turn()
        assert served.replies(connection) == [PREDICTED]


def test_a_byte_at_a_time_does_not_extend_the_frame_timeout(served):
    served.router.frame_deadline_s = 30
    connection = served.connect()
    for now_s, byte in enumerate(msgpack.packb(PREDICT), 1):
        connection.data_received(bytes([byte]))
        served.sweep(now_s)
    assert served.transport_of[connection].closed


def test_each_complete_message_restarts_the_frame_timeout(served):
    """A busy peer may have sent part of a message each time that the sweep checks it."""
    served.router.frame_deadline_s = 3
    connection = served.connect()
    message = msgpack.packb([0, 1, "ping", []])
    connection.data_received(message[:4])
    for now_s in range(1, 40):
        served.sweep(now_s)
        connection.data_received(message[4:] + message[:4])
        served.loop.turn()
    assert not served.transport_of[connection].closed
    served.sweep(40, 44)
    assert served.transport_of[connection].closed


@pytest.mark.parametrize("late", [0, 1])
def test_a_peer_that_does_not_read_is_closed(served, late):
    served.router.write_deadline_s = 20
    connection = served.connect()
    served.ask(PREDICT, connection=connection)
    served.sweep(5, 15, 25 + late)
    assert served.transport_of[connection].closed == bool(late)


def test_a_peer_that_reads_slowly_is_not_closed(served):
    served.router.write_deadline_s = 20
    connection = served.connect()
    for now_s in range(5, 200, 10):
        served.ask(PREDICT, connection=connection)
        owed = served.transport_of[connection].unsent
        served.sweep(now_s)
        served.transport_of[connection].unsent = owed // 2 if now_s % 20 == 5 else 0
    assert not served.transport_of[connection].closed


def test_a_peer_that_reads_a_byte_now_and_then_is_closed(served):
    """All output that is unsent at some moment has to be sent within the timeout; a byte now and then is too little."""
    served.router.write_deadline_s = 20
    connection = served.connect()
    served.ask(PREDICT, connection=connection)
    for now_s in range(5, 30):
        served.sweep(now_s)
        served.transport_of[connection].unsent -= 1
    assert served.transport_of[connection].closed


@pytest.mark.parametrize("late", [0, 1])
def test_an_idle_connection_is_closed_and_a_busy_one_is_not(served, late):
    served.router.idle_deadline_s = 60
    silent, busy = served.connect(), served.connect()
    for now_s in range(10, 71 + late):
        served.ask([0, 1, "ping", []], connection=busy)
        served.transport_of[busy].unsent = 0
        served.sweep(now_s)
    assert served.transport_of[silent].closed == bool(late)
    assert not served.transport_of[busy].closed


def test_a_connection_with_requests_in_flight_is_not_idle(served):
    served.router.idle_deadline_s = 60
    served.router.forward = lambda *_: None
    connection = served.connect()
    connection.data_received(msgpack.packb([0, 1, "push", ["v", {}]]))
    served.sweep(10, 100, 1000)
    assert not served.transport_of[connection].closed


def test_a_sweep_checks_some_connections_and_the_next_sweep_the_others(served):
    served.router.idle_deadline_s = 5
    connections = [served.connect() for _ in range(1300)]
    served.sweep(1, 1, 1, 10)
    closed = sum(served.transport_of[connection].closed for connection in connections)
    assert 0 < closed <= 512
    served.sweep(10, 10)
    assert all(served.transport_of[connection].closed for connection in connections)


def test_a_connection_without_a_token_has_a_timeout(served):
    served.router.access = 0
    served.router.auth_deadline_s = 10
    served.router.auth = lambda params: 2
    stranger, known = served.connect(), served.connect()
    served.ask([0, 1, "auth", ["token"]], connection=known)
    served.transport_of[known].unsent = 0
    served.sweep(1, 11, 12)
    assert served.transport_of[stranger].closed
    assert not served.transport_of[known].closed
    assert known.access == 2


# -- limits --------------------------------------------------------------------------------------------------------


def test_the_number_of_connections_is_limited_in_all_and_per_address(served):
    served.router.max_connections, served.router.max_peer_connections = 4, 2
    first, second = served.connect(), served.connect()
    assert served.ask(PREDICT, connection=second) == [PREDICTED]
    third = served.connect()
    served.loop.turn()
    [refusal] = served.replies(third)
    assert (refusal[1], refusal[2]["code"]) == (None, "RESOURCE_EXHAUSTED")
    assert served.ask(PREDICT, connection=third) == []
    assert served.lose(third)
    others = [served.connect(("10.0.0.2", 1)), served.connect("")]
    assert [served.ask(PREDICT, connection=one) for one in others] == [[PREDICTED]] * 2
    fifth = served.connect(("10.0.0.3", 1))
    served.loop.turn()
    assert "more than 4 connections" in served.replies(fifth)[0][2]["message"]
    assert served.lose(fifth)
    assert served.lose(first)
    assert served.router.peers == {"10.0.0.1": 1, "10.0.0.2": 1}
    assert served.ask(PREDICT, connection=served.connect()) == [PREDICTED]
    assert served.router.refused == 2


def test_the_requests_in_flight_on_a_connection_are_limited(served):
    connection, other = served.connect(), served.connect()
    message = msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}]])
    for _ in range(LIMITS.requests_per_connection + 1):
        connection.data_received(message)
    assert connection.in_flight == LIMITS.requests_per_connection
    other.data_received(message)
    served.loop.turn()
    errors = [reply for reply in served.replies(connection) if reply[2] is not None]
    assert [error[2]["code"] for error in errors] == ["RESOURCE_EXHAUSTED"]
    assert served.replies(other)[0][2] is None
    assert served.router.waiting_rows == served.router.waiting_bytes == 0


@pytest.mark.parametrize("over", [0, 1])
def test_the_rows_of_a_request_are_limited(served, over):
    rows = LIMITS.rows_per_request + over
    [reply] = served.ask([0, 1, "predict", ["double", {"key": list(range(rows)), "amount": 0}]])
    if over:
        assert reply[2]["code"] == "INVALID_ARGUMENT"
        assert reply[2]["message"].startswith(
            f"{rows} rows in one request; at most {LIMITS.rows_per_request} are taken"
        )
    else:
        assert len(reply[3]["outputs"]["label"]) == rows


@pytest.mark.parametrize("over", [0, 1])
def test_the_length_of_a_list_of_features_is_limited(served, over):
    filler = LIMITS.feature_list_bytes - len(msgpack.packb(["v:a", "x" * 40_000])) + 40_000 + over
    references = ["v:a", "x" * filler]
    size = len(msgpack.packb(references))
    assert size == LIMITS.feature_list_bytes + over
    [reply] = served.ask([0, 1, "get_online_features", [references, {"key": 1}]])
    if over:
        message = f"a list of features of {size} bytes; at most {LIMITS.feature_list_bytes} are taken"
        assert reply[2] == {"code": "INVALID_ARGUMENT", "message": message}
    else:
        assert reply[3]["feature_names"] == references


@pytest.mark.parametrize("limit", ["waiting_rows", "waiting_bytes"])
def test_the_rows_and_bytes_that_wait_are_limited(served, limit):
    """The rows are counted with Batch.count, because a test cannot send so many in one turn."""
    assert served.ask(PREDICT) == [PREDICTED]
    plan = served.engine.plan_for_model("double")
    batch = wire.Batch(wire.WireRoute(plan, b"", -1), plan.new_columns())
    at = getattr(LIMITS, limit)
    rows, size = (at - 1, 0) if limit == "waiting_rows" else (1, at - 1)
    batch.count(served.router, rows, size)
    connection = served.connect()
    connection.data_received(msgpack.packb(PREDICT) * 2)  # the first reaches the limit
    assert connection.in_flight == 1
    batch.end(False)
    connection.data_received(msgpack.packb(PREDICT))
    assert connection.in_flight == 2
    served.loop.turn()
    assert [reply[2] and reply[2]["code"] for reply in served.replies(connection)] == ["RESOURCE_EXHAUSTED", None, None]


def test_requests_of_a_peer_that_goes_are_uncounted(served):
    connection = served.connect()
    connection.data_received(msgpack.packb(PREDICT))
    connection.data_received(msgpack.packb(PREDICT)[:5])
    served.lose(connection)
    served.loop.turn()
    assert connection.in_flight == 0
    assert served.router.waiting_rows == 0


# -- moving --------------------------------------------------------------------------------------------------------


def test_a_connection_moves_in_the_middle_of_a_message(served):
    old, new = served.connect(), Guarded()
    message = msgpack.packb(PREDICT)
    served.router.auth = lambda params: 1
    old.data_received(message + message[:9])
    assert old.park(1000)
    assert not served.transport_of[old].reading
    assert old.partial_if_idle(1000) is None  # a request is in flight
    served.loop.turn()
    assert old.partial_if_idle(1000) is None  # its reply is not sent
    served.transport_of[old].unsent = 0
    assert old.partial_if_idle(8) is None  # more bytes have been received than may move
    held = old.partial_if_idle(1000)
    assert held == message[:9]
    moved = wire.Connection(new.router)
    moved.carry(held, 1)
    new.transport_of[moved] = Slow()
    moved.connection_made(new.transport_of[moved])
    moved.data_received(message[9:])
    new.loop.turn()
    assert new.replies(moved) == [PREDICTED]
    assert moved.access == 1


def test_some_connections_cannot_move(served):
    secure, ending, large = served.connect(secure=True), served.connect(), served.connect()
    ending.finish()
    large.data_received(msgpack.packb([0, 1, "echo", ["x" * 5000]])[:3000])
    assert [one.cannot_move for one in (secure, ending, large)] == [True, True, False]
    assert not any(connection.park(1000) for connection in (secure, ending, large))
    assert served.transport_of[large].reading


@pytest.mark.parametrize("more", [0, 1])
def test_the_failures_with_a_traceparent_kept_for_the_log_are_limited(served, more):
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    most = LIMITS.traced_failures
    requests = [[0, n, "predict", ["double", {}, {"traceparent": trace}]] for n in range(most + more)]
    replies = served.ask(*requests)
    assert {reply[2]["code"] for reply in replies} == {"INVALID_ARGUMENT"}
    assert [line[3] for line in served.router.take_traced()] == list(range(most))
    [(counted, last, _)] = served.router.take_errors().values()
    assert (counted, last) == (most + more, most + more - 1)
    assert served.router.take_traced() == []
