"""Calls of more than 16,384 rows, and messages beyond the limits, against a scripted peer that shows what is sent."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from test_client import Peer, both, serving

from shorttail import errors, protocol
from shorttail.client import AsyncClient, Client
from shorttail.config import LIMITS

MOST = LIMITS.rows_per_request
ROWS = 2 * MOST + 100
PARTS = [MOST, MOST, 100]
MODELS: list[dict[str, Any]] = [
    {"name": "m", "version": 3, "columns": {"x": "Float64", "tier": "String", "emb": "Vector(3)"}, "outputs": ["y"]},
    {"name": "wide", "version": 1, "columns": {"x": "Float64", "emb": "Vector(20000)"}, "outputs": ["y"]},
    {"name": "rows", "version": 1, "columns": {"x": "Float64"}, "batching": "rows", "outputs": ["y"]},
    {"name": "list", "version": 1, "columns": {"x": "Float64"}, "batching": "request", "outputs": ["y"]},
]
VIEWS = [{"name": "v", "keys": {"x": "Int64"}, "features": {"tier": "String", "emb": "Vector(3)"}, "timestamp": None}]


class Recorder:
    """Answers as a server does, and keeps the requests. y is twice x; versions: of the predictions, in turn."""

    def __init__(self, versions: tuple[int, ...] = (), fail_at: int | None = None):
        self.asked: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = []
        self.n_connections = 0
        self.versions = list(versions)
        self.fail_at = fail_at

    def __call__(self, peer: Peer) -> None:
        self.n_connections += 1
        while True:
            msgid, method, params = peer.receive()
            if method in ("models", "views"):
                peer.answer(msgid, MODELS if method == "models" else VIEWS)
                continue
            if method == "ping":
                peer.answer(msgid, "pong")
                continue
            self.asked.append((method, *params))
            if len(self.asked) - 1 == self.fail_at:
                peer.answer(msgid, None, {"code": "INVALID_ARGUMENT", "message": "x is null at row 5"})
                continue
            x = np.atleast_1d(np.asarray(params[1]["x"], np.float64))
            zeros = protocol.pack_tensor((x % 3).astype(np.uint8))
            if method == "predict":
                asked = params[2].get("version")
                version = asked or (self.versions.pop(0) if self.versions else 3)
                outputs = {"y": protocol.pack_tensor(np.stack([x, 2 * x], 1)), "label": [f"{v:g}" for v in x]}
                peer.answer(msgid, {"outputs": outputs, "version": version, "statuses": {"v": zeros}})
            elif method == "get_online_features":
                names = {"feature_names": ["v:a", "v:a"], "types": ["Float64", "String"], "has_default": [False, True]}
                values = [protocol.pack_tensor(x), [None if v % 2 else f"{v:g}" for v in x]]
                peer.answer(msgid, names | {"values": values, "statuses": [zeros, zeros]})
            else:
                peer.answer(msgid, {"rows": len(x)})

    def rows(self) -> list[int]:
        return [len(np.atleast_1d(np.asarray(columns["x"]))) for _, _, columns, _ in self.asked]


X = np.arange(ROWS, dtype=np.float64)


@both
def test_a_prediction_is_split_and_joined(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        columns = {"x": X, "tier": "gold", "emb": [0.5, 1.5, 2.5]}
        p = run(address, lambda c: c.predict("m", columns, statuses=True, traceparent="t"))
    assert (p.model, p.version) == ("m", 3)
    np.testing.assert_array_equal(p.outputs["y"], np.stack([X, 2 * X], 1))
    assert p.outputs["label"].tolist() == [f"{v:g}" for v in X]
    np.testing.assert_array_equal(p.statuses["v"], X % 3)
    assert recorder.rows() == PARTS
    for method, model, sent, options in recorder.asked:
        assert (method, model) == ("predict", "m")
        assert (sent["tier"], sent["emb"]) == ("gold", [0.5, 1.5, 2.5]), "a single value stays one"
        assert (options["traceparent"], options["statuses"]) == ("t", True)


@both
def test_features_are_split_and_joined(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        found = run(address, lambda c: c.get_online_features(["v:a", "v:a"], {"x": range(ROWS)}))
    assert recorder.rows() == PARTS
    assert found.feature_names == ["v:a", "v:a"]
    assert len(found) == ROWS
    np.testing.assert_array_equal(found["v:a"], X)
    names, types = found._names, found._types
    assert (names, types) == (["v:a", "v:a"], ["Float64", "String"])
    assert found._values[1].tolist() == [None if v % 2 else f"{v:g}" for v in X]
    np.testing.assert_array_equal(found._status_rows[1], X % 3)


@both
@pytest.mark.parametrize("method", ["push", "delete"])
def test_writes_are_split_in_their_order(run: Any, method: str) -> None:
    recorder = Recorder()
    columns: dict[str, Any] = {"x": np.arange(ROWS)}
    if method == "push":
        columns |= {"tier": ["a", None] * (ROWS // 2), "emb": [None, *np.ones((ROWS - 1, 3))], "event_time": 0}
    with serving(recorder) as address:
        assert run(address, lambda c: getattr(c, method)("v", columns)) == ROWS
    assert recorder.rows() == PARTS
    np.testing.assert_array_equal(np.concatenate([sent["x"] for _, _, sent, _ in recorder.asked]), np.arange(ROWS))
    if method == "push":
        assert [len(sent["emb"]) for _, _, sent, _ in recorder.asked] == PARTS
        assert [sent["event_time"] for _, _, sent, _ in recorder.asked] == [0, 0, 0]


@both
def test_each_part_of_a_partial_push_is_partial(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        assert run(address, lambda c: c.push("v", {"x": np.arange(ROWS)}, partial=True)) == ROWS
    assert recorder.rows() == PARTS
    assert [options["partial"] for *_, options in recorder.asked] == [True] * len(PARTS)


@pytest.mark.parametrize("rows", [1, MOST])
@both
def test_what_fits_is_one_request(run: Any, rows: int) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        run(address, lambda c: c.predict("m", {"x": np.zeros(rows)}))
        run(address, lambda c: c.push("v", {"x": [1] * rows}))
    assert recorder.rows() == [rows, rows]


@both
def test_a_long_vector_is_one_row(run: Any) -> None:
    """A column of 20,000 numbers is a single value of a Vector(20000), as the server's list of models says."""
    recorder = Recorder()
    vector = [0.5] * 20_000
    with serving(recorder) as address:
        run(address, lambda c: c.predict("wide", {"x": 1.0, "emb": vector}))
        run(address, lambda c: c.predict("wide", {"x": [1.0, 2.0], "emb": np.array(vector)}))
    assert recorder.rows() == [1, 2]
    assert recorder.asked[0][2]["emb"] == vector


@both
def test_a_part_is_small_enough_for_a_message(run: Any) -> None:
    recorder = Recorder()
    texts = ["x" * 60_000] * 300 + ["y"] * (MOST - 200)
    with serving(recorder) as address:
        p = run(address, lambda c: c.predict("m", {"x": np.arange(len(texts)), "tier": texts}))
    assert recorder.rows() == [MOST // 64, MOST // 64, MOST // 32, MOST // 16, MOST // 8, MOST // 4, MOST // 2, 100]
    assert len(p.outputs["y"]) == len(texts)
    assert [text for _, _, sent, _ in recorder.asked for text in sent["tier"]] == texts


@both
def test_rows_that_a_model_takes_together_are_not_split(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        with pytest.raises(errors.InvalidArgument, match="model 'list' answers the rows of a request together"):
            run(address, lambda c: c.predict("list", {"x": X}))
        assert recorder.asked == []
        run(address, lambda c: c.predict("list", {"x": X[:MOST]}))
        run(address, lambda c: c.predict("rows", {"x": X}))
    assert recorder.rows() == [MOST, *PARTS]


@both
def test_parts_that_another_version_answered_are_asked_again(run: Any) -> None:
    recorder = Recorder(versions=(7, 8, 7))
    with serving(recorder) as address:
        p = run(address, lambda c: c.predict("m", {"x": X}))
    assert p.version == 7
    np.testing.assert_array_equal(p.outputs["y"][:, 0], X)
    assert [options.get("version") for *_, options in recorder.asked] == [None, None, None, 7]
    assert recorder.asked[3][2]["x"][0] == MOST


@both
def test_the_deadline_is_that_of_the_whole_call(run: Any) -> None:
    recorder = Recorder()
    with serving(recorder) as address:
        run(address, lambda c: c.predict("m", {"x": X}, deadline_ms=60_000), timeout_s=600.0)
        run(address, lambda c: c.predict("m", {"x": X}), timeout_s=300.0)
    left = [options["deadline_ms"] for *_, options in recorder.asked]
    assert 60_000 > left[0] > left[1] > left[2] > 0
    assert 300_000 > left[3] > left[4] > left[5] > 60_000
    with serving(recorder) as address, pytest.raises(errors.DeadlineExceeded):
        run(address, lambda c: c.predict("m", {"x": X}, deadline_ms=0))


@both
def test_an_error_says_in_which_part_it_is(run: Any) -> None:
    place = f"x is null at row 5 (in a part of the call: its row 0 is row {MOST}"
    with serving(Recorder(fail_at=1)) as address, pytest.raises(errors.InvalidArgument) as caught:
        run(address, lambda c: c.predict("m", {"x": X}))
    assert caught.value.message == f"{place})"
    recorder = Recorder(fail_at=1)
    with serving(recorder) as address, pytest.raises(errors.InvalidArgument) as caught:
        run(address, lambda c: c.push("v", {"x": X}))
    assert caught.value.message == f"{place}; the rows before it are pushed)"
    assert len(recorder.asked) == 2, "nothing is sent after an error"


@both
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            {"tier": [*["a"] * (ROWS - 1), datetime.timedelta(1)]},
            f"column 'tier' .* at row 99 .* row 0 is row {2 * MOST}",
        ),
        ({"tier": [*["a"] * (ROWS - 1), "a" * LIMITS.frame_bytes]}, "push: a message of more than"),
        ({"tier": ["a"] * 300}, f"column 'tier' has 300 values where others have {ROWS}"),
        ({"tier": ["a"]}, f"column 'tier' has 1 values where others have {ROWS}"),
        ({"tier": ["a"] * (ROWS + 1)}, f"column 'x' has {ROWS} values where others have {ROWS + 1}"),
    ],
)
def test_nothing_of_a_push_is_written_if_a_part_cannot_be_sent(run: Any, wrong: dict[str, Any], match: str) -> None:
    recorder = Recorder()
    with serving(recorder) as address, pytest.raises(errors.ShorttailError, match=match):
        run(address, lambda c: c.push("v", {"x": X} | wrong))
    assert recorder.asked == []


@given(some.data(), some.sampled_from([np.bool_, np.int32, np.int64, np.float32, np.float64, "M8[us]", np.uint8]))
def test_a_cut_tensor_holds_these_rows(data: some.DataObject, dtype: Any) -> None:
    shape = data.draw(some.lists(some.integers(1, 5), min_size=1, max_size=3))
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    start = data.draw(some.integers(0, shape[0] - 1))
    stop = data.draw(some.integers(start + 1, shape[0]))
    tensor = protocol.pack_tensor(array)
    assert protocol.cut_tensor(tensor, start, stop) == protocol.pack_tensor(array[start:stop])
    assert (protocol.tensor_dims(tensor), protocol.tensor_rows(tensor)) == (len(shape), shape[0])


# Messages beyond the limits

BEYOND: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "bytes": (lambda: {"x": ["a" * 60_000] * 300}, f"predict: a message of more than {LIMITS.frame_bytes} bytes"),
    "a tensor": (lambda: {"x": np.zeros((10_000, 300))}, f"predict: a message of more than {LIMITS.frame_bytes} bytes"),
    "depth": (lambda: {"x": [[[[[[1.0]]]]]]}, "predict: a message nested more than 8 deep"),
    "elements": (lambda: {"x": [[1] * 300] * 16_000}, f"predict: a message of more than {LIMITS.declared_elements} el"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_message_beyond_a_limit_fails_alone(case: str) -> None:
    columns, message = BEYOND[case]
    recorder = Recorder()

    async def run(address: str) -> None:
        async with await AsyncClient.connect(address) as client:
            first = [asyncio.create_task(client.predict("m", {"x": float(i)})) for i in range(10)]
            with pytest.raises(errors.ResourceExhausted, match=message):
                await client.predict("m", columns())
            for i, p in enumerate(await asyncio.gather(*first)):
                assert p.outputs["y"].tolist() == [[i, 2 * i]]
            await client.ping()

    with serving(recorder) as address:
        asyncio.run(run(address))
        assert recorder.n_connections == 1
        assert len(recorder.asked) == 10
        with Client(address) as client:
            client.ping()
            with pytest.raises(errors.ResourceExhausted, match=message):
                client.predict("m", columns())
            client.ping()
        assert recorder.n_connections == 2
        assert len(recorder.asked) == 10


def test_the_largest_message_is_sent() -> None:
    recorder = Recorder()
    with serving(recorder) as address, Client(address, timeout_s=60.0) as client:
        empty = len(msgpack.packb([0, 0, "predict", ["m", {"x": 1.0, "tier": ["", ""]}, {"encoding": "tensor"}]]))
        room = LIMITS.frame_bytes - empty - len(msgpack.packb("deadline_ms")) - 9 - 2 * 4
        client.predict("m", {"x": 1.0, "tier": ["a" * (room // 2), "a" * (room - room // 2)]})
        with pytest.raises(errors.ResourceExhausted):
            client.predict("m", {"x": 1.0, "tier": ["a" * (room // 2), "a" * (room - room // 2 + 1)]})
    assert len(recorder.asked) == 1
