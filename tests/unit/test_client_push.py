"""push and delete of both clients: the bytes that they send, and the results and errors that they return."""

import asyncio
import pickle
from typing import Any

import msgpack
import numpy as np
import pytest
import uvloop
from test_client import Peer, serving

from shorttail import errors, protocol
from shorttail.client import AsyncClient, Client


def blocking(address: str, call: Any) -> Any:
    with Client(address) as client:
        return call(client)


async def awaited(address: str, call: Any) -> Any:
    async with await AsyncClient.connect(address) as client:
        return await call(client)


def with_asyncio(address: str, call: Any) -> Any:
    return asyncio.run(awaited(address, call))


def with_uvloop(address: str, call: Any) -> Any:
    return uvloop.run(awaited(address, call))


each = pytest.mark.parametrize("run", [blocking, with_asyncio, with_uvloop])


class Recorder:
    """A peer that answers every push with 7 rows, and records the params, with tensors not decoded."""

    def __init__(self, result: Any = None):
        self.result = {"rows": 7} if result is None else result
        self.seen: list[tuple[str, list[Any]]] = []

    def __call__(self, peer: Peer) -> None:
        peer.unpacker = msgpack.Unpacker()
        while True:
            msgid, method, params = peer.receive()
            self.seen.append((method, params))
            peer.answer(msgid, self.result)


@each
def test_arrays_are_sent_as_tensors_and_strings_as_lists(run: Any) -> None:
    recorder = Recorder()
    rows = {"user_id": np.arange(3), "tier": ["a", None, "c"], "taste": np.ones((3, 2), np.float32), "age": 1.5}
    with serving(recorder) as address:
        assert run(address, lambda c: c.push("stats", rows)) == 7
    [(method, [view, columns, _])] = recorder.seen
    assert (method, view, list(columns)) == ("push", "stats", list(rows))
    assert columns["user_id"] == protocol.pack_tensor(np.arange(3))
    assert columns["taste"] == protocol.pack_tensor(np.ones((3, 2), np.float32))
    assert (columns["tier"], columns["age"]) == (["a", None, "c"], 1.5)


@each
def test_delete_and_push_send_what_is_left_of_the_deadline(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        assert run(address, lambda c: c.delete("stats", {"user_id": [1, 2]}, deadline_ms=500)) == 7
        assert run(address, lambda c: c.push("stats", {"user_id": 1}, deadline_ms=250.5)) == 7
    assert [(method, params[:2]) for method, params in recorder.seen] == [
        ("delete", ["stats", {"user_id": [1, 2]}]),
        ("push", ["stats", {"user_id": 1}]),
    ]
    for (_, params), given_ms in zip(recorder.seen, (500, 250.5), strict=True):
        assert list(params[2]) == ["deadline_ms"]
        assert 0 < params[2]["deadline_ms"] <= given_ms


@each
def test_a_partial_push_says_so_and_a_whole_one_says_nothing(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        for options in ({"partial": True, "traceparent": "t"}, {"partial": False}, {}):
            assert run(address, lambda c, options=options: c.push("stats", {"user_id": 1}, **options)) == 7
    names = [list(params[2]) for _, params in recorder.seen]
    assert names == [["partial", "traceparent", "deadline_ms"], ["deadline_ms"], ["deadline_ms"]]
    assert recorder.seen[0][1][2]["partial"] is True


@each
@pytest.mark.parametrize(
    ("result", "counts"),
    [
        ({"rows": 7}, (7, 7, 7, 0, 0)),  # of an older server
        ({"rows": 7, "older": 2}, (7, 9, 7, 2, 0)),
        ({"rows": 7, "older": 2, "duplicate": 3, "later": "?"}, (7, 9, 4, 2, 3)),
    ],
)
def test_a_push_returns_a_number_with_what_became_of_the_other_rows(run: Any, result: Any, counts: Any) -> None:
    with serving(Recorder(result)) as address:
        count = run(address, lambda c: c.push("stats", {"user_id": 1}))
    assert (count, count.given, count.loaded, count.older, count.duplicate) == counts
    again = pickle.loads(pickle.dumps(count))
    assert (again, again.given, again.older, again.duplicate, f"{again:,}") == (7, *counts[1:2], *counts[3:], "7")


@each
@pytest.mark.parametrize("result", ["7", {}, {"rows": None}, [7], {"rows": 1, "older": None}])
def test_a_result_of_a_wrong_form_is_an_internal_error(run: Any, result: Any) -> None:
    with serving(Recorder(result)) as address, pytest.raises(errors.Internal, match="push: the server's result"):
        run(address, lambda c: c.push("stats", {"user_id": 1}))


@each
def test_rows_of_a_wrong_type_are_refused_before_they_are_sent(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address, pytest.raises(errors.InvalidArgument, match="columns of type list; give a dict"):
        run(address, lambda c: c.push("stats", [1, 2]))
    assert recorder.seen == []


@each
def test_an_error_of_the_writer_is_raised_by_its_code(run: Any) -> None:
    def script(peer: Peer) -> None:
        msgid, _, _ = peer.receive()
        peer.answer(msgid, None, {"code": "UNAVAILABLE", "message": "the writer died"})
        peer.receive()

    with serving(script) as address, pytest.raises(errors.Unavailable, match=r"^the writer died$"):
        run(address, lambda c: c.push("stats", {"user_id": 1}))
