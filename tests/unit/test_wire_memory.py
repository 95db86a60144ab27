"""Memory of large messages: it grows with what arrives, is given back in parts, and no byte is lost as it grows."""

import itertools
import re
from pathlib import Path

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as values
from test_wire import Served

from shorttail._native import wire
from shorttail.config import LIMITS

MIB = 1 << 20


def held():
    """Resident bytes of this process that are not of files."""
    [kib] = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


@pytest.fixture
def served():
    return Served()


def feed(connection, data, piece):
    for at in range(0, len(data), piece):
        connection.data_received(data[at : at + piece])


def later(served):
    """Run the callbacks that wait, and return how many there were."""
    due, served.loop.later = served.loop.later, []
    for callback in due:
        callback()
    return len(due)


@settings(max_examples=60, deadline=None)
@given(
    counts=values.lists(values.integers(1, LIMITS.rows_per_request), min_size=1, max_size=3),
    cuts=values.lists(values.integers(1, 300_000), max_size=4),
)
@example([4000], [10])
@example([10_000], [10])
@example([2000, 10_000, 10], [24_010])
def test_a_message_is_answered_wherever_it_is_cut(counts, cuts):
    """A part that is not scanned yet is scanned in a later turn, also when nothing more arrives."""
    served = Served()
    connection = served.connect()
    asked = [[0, i, "predict", ["double", {"key": [1] * n, "amount": [0.5] * n}]] for i, n in enumerate(counts)]
    data = b"".join(map(msgpack.packb, asked))
    places = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(places):
        connection.data_received(data[begin:end])
    served.loop.turn()
    while later(served):
        served.loop.turn()
    assert {reply[1]: len(reply[3]["outputs"]["label"]) for reply in served.replies(connection)} == dict(
        enumerate(counts)
    )


@pytest.mark.parametrize("piece", [100_000, 3 * MIB])
def test_a_large_message_is_whole_when_its_buffer_has_grown(served, piece):
    passed = []
    served.router.connect(bulk=lambda connection, msgid, message, deadline_ns: passed.append(bytes(message)))
    connection = served.connect()
    sent = [
        msgpack.packb([0, i, "predict", ["double", {"key": 1, "amount": "é" * (600_000 * i)}]]) for i in range(1, 6)
    ]
    data = b"".join(sent)
    for at in range(0, len(data), piece):
        connection.data_received(data[at : at + piece])
        while later(served):
            pass
    assert passed == sent


def test_the_memory_of_a_dropped_message_is_given_back_in_parts(served):
    connection = served.connect()
    before = held()
    body = msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": b"x" * (12 * MIB)}]])
    feed(connection, body[: 10 * MIB], 256 << 10)
    assert held() - before > 9 * MIB
    connection.connection_lost(None)
    served.loop.later.clear()
    assert held() - before > 9 * MIB  # the turn in which a connection ends gives nothing back
    served.router.sweep(1)
    turns = 0
    while later(served):
        turns += 1
    assert turns > 20
    assert held() - before < 4 * MIB  # the test itself takes some


def test_more_than_so_much_memory_is_given_back_at_once(served):
    """Or it would pile up under a flood."""
    body = msgpack.packb([0, 1, "ping", [b"x" * (15 * MIB)]])[: 15 * MIB]
    before = held()
    for _ in range(24):
        connection = served.connect()
        feed(connection, body, MIB)
        connection.connection_lost(None)
    assert held() - before < 300 * MIB
    served.router.sweep(1)
    while later(served):
        pass
    assert held() - before < 4 * MIB  # the test itself takes some


def test_frames_are_limited_while_they_grow(served):
    connection = served.connect()
    feed(connection, msgpack.packb([0, 1, "ping", [b"x" * (LIMITS.frame_bytes + 1)]]), MIB)
    while later(served):
        pass
    served.loop.turn()
    [reply] = served.replies(connection)
    assert reply[2]["code"] == "RESOURCE_EXHAUSTED"


def test_a_reply_of_the_bulk_worker_grows_as_a_message_does():
    message = msgpack.packb([1, 7, None, "é" * (4 * MIB)])
    reply = wire.BulkReply()
    for at in range(0, len(message), 70_001):
        whole = reply.feed(message[at : at + 70_001])
    assert whole
    assert bytes(reply) == message
