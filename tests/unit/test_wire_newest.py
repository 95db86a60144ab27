"""Newest-first admission: the newest requests of each connection are admitted, and none is answered twice."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as values
from test_wire_admission import Measured

from shorttail.config import LIMITS

MALFORMED = b"\xc1"


def request(msgid):
    return msgpack.packb([0, msgid, "predict", ["double", {"key": msgid, "amount": 0}]])


class Overloaded(Measured):
    def __init__(self):
        super().__init__()
        for _ in range(3):
            self.offer(10)

    def overload(self, rows):
        """Refuse requests, so that the next turn defers its requests. rows: the budget of that turn, in rows."""
        self.always(1)
        while not self.router.newest_first:
            assert self.offer(10)[1] > 0
            self.offer(1)  # begins the next turn
        self.always(rows)

    def turn(self, streams, rows):
        """Return the list of replies to each stream of requests, in a turn that defers requests."""
        while True:
            self.overload(rows)
            connections = [self.connect() for _ in streams]
            for connection, stream in zip(connections, streams, strict=True):
                connection.data_received(stream)
            deferred = self.router.newest_first  # False if this process was delayed for 100 ms
            self.loop.turn()
            replies = [self.replies(connection) for connection in connections]
            for connection in connections:
                connection.connection_lost(None)
            if deferred:
                return replies


@pytest.fixture
def overloaded():
    return Overloaded()


def good(replies):
    return [reply[1] for reply in replies if reply[2] is None]


def test_the_newest_of_every_connection_are_admitted(overloaded):
    counts = [1000, 1000, 500, 10]
    answers = overloaded.turn([b"".join(map(request, range(n))) for n in counts], 251)
    for count, replies in zip(counts, answers, strict=True):
        assert sorted(reply[1] for reply in replies) == list(range(count))
        admitted = good(replies)
        assert sorted(admitted) == list(range(count - len(admitted), count))
        assert len(admitted) == pytest.approx(count / 10, abs=1)


def test_connections_with_one_request_each_are_admitted_in_turn(overloaded):
    answered = set()
    for _ in range(40):
        overloaded.overload(30)
        replies = overloaded.turn([request(n) for n in range(100)], 30)
        answered |= {n for n, [reply] in enumerate(replies) if reply[2] is None}
    assert answered == set(range(100))


def test_other_methods_are_not_deferred(overloaded):
    ping = msgpack.packb([0, 5000, "ping", []])
    [replies] = overloaded.turn([request(1) + ping + request(2)], 100)
    assert {reply[1]: reply[2] for reply in replies} == {1: None, 2: None, 5000: None}


@settings(deadline=None, max_examples=200)
@given(values.data())
def test_each_request_is_answered_once_however_the_stream_is_split(data):
    overloaded = Overloaded()
    overloaded.overload(50)
    stream = b"".join(map(request, range(200)))
    cuts = sorted(data.draw(values.lists(values.integers(0, len(stream)), max_size=12)))
    connection = overloaded.connect()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        connection.data_received(stream[start:end])
        if data.draw(values.booleans()):
            overloaded.loop.turn()
    overloaded.loop.turn()
    assert sorted(reply[1] for reply in overloaded.replies(connection)) == list(range(200))
    assert overloaded.router.in_flight == connection.in_flight == 0


def test_the_bytes_of_deferred_requests_are_limited(overloaded):
    """The limit counts memory, not requests: a small request keeps all bytes that arrived with it in memory."""
    stream = request(1) + msgpack.packb([2, "ping", [bytes(1 << 20)]])
    while True:  # repeat, because this process may be delayed between the two
        overloaded.overload(2000)
        first = overloaded.connect()
        first.data_received(bytes(bytearray(stream)))  # a new object
        if overloaded.router.newest_first:
            break
        overloaded.loop.turn()
    connections = [first]
    for count in range(2, LIMITS.kept_bytes // len(stream) + 4):
        connections.append(overloaded.connect())
        connections[-1].data_received(bytes(bytearray(stream)))
        assert overloaded.router.deferred_bytes == min(count, 16) * len(stream)
        assert overloaded.router.in_flight == max(0, count - 16)  # the others are admitted as they are read
    overloaded.loop.turn()
    assert overloaded.router.deferred_bytes == 0
    assert [good(overloaded.replies(connection)) for connection in connections] == [[1]] * len(connections)


def test_deferred_requests_of_a_closed_connection_are_dropped(overloaded):
    overloaded.overload(50)
    gone, there = overloaded.connect(), overloaded.connect()
    for connection in (gone, there):
        connection.data_received(request(1))
    gone.connection_lost(None)
    overloaded.loop.turn()
    assert good(overloaded.replies(there)) == [1]
    assert overloaded.replies(gone) == []
    assert overloaded.router.in_flight == 0


def test_a_peer_that_ends_with_a_deferred_request_is_answered_and_closed(overloaded):
    overloaded.overload(50)
    connection = overloaded.connect()
    connection.data_received(request(1))
    assert connection.eof_received()
    assert connection.partial_if_idle(100) is None
    overloaded.loop.turn()
    assert good(overloaded.replies(connection)) == [1]
    assert overloaded.transport_of[connection].closed


def test_a_peer_that_ends_after_a_deferred_notification_is_closed(overloaded):
    overloaded.overload(50)
    connection = overloaded.connect()
    connection.data_received(msgpack.packb([2, "predict", ["double", {"key": 1, "amount": 0}]]))
    connection.eof_received()
    overloaded.loop.turn()
    assert overloaded.transport_of[connection].closed


def test_requests_before_a_malformed_message_are_answered(overloaded):
    [replies] = overloaded.turn([request(1) + request(2) + MALFORMED + request(3)], 100)
    assert sorted(good(replies)) == [1, 2]
    [refused] = [reply for reply in replies if reply[2] is not None]
    assert refused[1] is None
    assert refused[2]["code"] == "INVALID_ARGUMENT"


def test_a_byte_at_a_time_does_not_extend_the_frame_timeout(overloaded):
    overloaded.router.frame_deadline_s = 30
    connection = overloaded.connect()
    for now_s, byte in enumerate(request(1), 1):
        overloaded.overload(10)
        connection.data_received(bytes([byte]))
        overloaded.sweep(now_s)
    assert overloaded.transport_of[connection].closed
