"""The writer's queue and its commits, with a fake store that each test controls and a fake worker."""

import asyncio
import threading
import time
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest

import shorttail as st
from shorttail import protocol
from shorttail.config import LIMITS, Limits
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted, ShorttailError
from shorttail.server import writer as module
from shorttail.server.errorlog import ErrorLog
from shorttail.server.writer import WorkerConnection, Writer, read_params
from shorttail.sources.rows import column_batch
from shorttail.store import Delete, Upsert

HUGE_AND_EMPTY = msgpack.ExtType(1, b"\x04\x08" + b"\0\0\0\0" + b"\xff" * 28)  # dimensions 0, 2**32 - 1, ...
USER = st.Entity("user", keys={"user_id": st.Int64})
STATS = st.FeatureView("stats", entity=USER, features=[st.Feature("age", st.Float32)])


class FakeStore:
    """A store that records the edits of each commit. fail: called with the edits before they are recorded."""

    def __init__(self):
        self.commits, self.fail, self.newer = [], lambda edits: None, {}
        self.views = {"stats": STATS}
        self.catalog = SimpleNamespace(view=self.view, max_clock_skew_us=LIMITS.max_clock_skew_us)

    def view(self, name):
        if name not in self.views:
            raise NotFound(f"no feature view '{name}'")
        return self.views[name]

    def refresh(self, force=False):
        if force and self.newer:
            self.views |= self.newer
            self.newer = {}
            return True
        return False

    def commit(self, edits):
        self.fail(edits)
        self.commits.append(list(edits))
        return [len(e.batch) if isinstance(e, Upsert) else len(e.keys[0]) for e in edits]


class FakeWorker:
    def __init__(self):
        self.answers = {}

    def answer(self, number, outcome):
        assert number not in self.answers
        self.answers[number] = outcome


class Served:
    def __init__(self, loop):
        self.store, self.faults, self.worker = FakeStore(), ErrorLog(), FakeWorker()
        self.writer = Writer(self.store, loop, self.faults)

    def send(self, number, method="push", view="stats", columns=None, deadline_ns=0, **options):
        columns = {"user_id": number, "age": 1.0} if columns is None else columns
        params = [view, columns, options] if options else [view, columns]
        self.writer.take(self.worker, [0, number, method, msgpack.packb(params), deadline_ns])

    async def finish(self):
        self.writer.stop()
        await self.writer.run()
        return self.worker.answers


def serving(test):
    """Run an async test with a new Served."""

    def run(*arguments, **named):
        async def main():
            await test(Served(asyncio.get_running_loop()), *arguments, **named)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@serving
async def test_queued_requests_are_one_commit(served):
    for number in range(100):
        served.send(number)
    served.send(100, "delete", columns={"user_id": [1, 2, 3]})
    assert await served.finish() == dict.fromkeys(range(100), 1) | {100: 3}
    assert [len(edits) for edits in served.store.commits] == [101]
    assert isinstance(served.store.commits[0][100], Delete)
    assert (served.writer.queued_rows, served.writer.queued_bytes) == (0, 0)


@serving
async def test_pushes_of_different_features_are_one_commit(served):
    features = [st.Feature(name, st.Float32) for name in ("age", "height")]
    served.store.views["stats"] = st.FeatureView("stats", USER, features)
    whole, age, height = (
        {"user_id": 1, **values} for values in ({"age": 1.0, "height": 2.0}, {"age": 3.0}, {"height": 4.0})
    )
    served.send(0, columns=whole)
    served.send(1, columns=age, partial=True)
    served.send(2, columns=height, partial=True, deadline_ms=1000)
    served.send(3, columns=whole, partial=True)
    served.send(4, columns=age, partial=False)
    served.send(5, columns=age)
    answers = await served.finish()
    [edits] = served.store.commits
    assert [edit.batch.given for edit in edits] == [("age", "height"), ("age",), ("height",), ("age", "height")]
    for number in (4, 5):
        assert isinstance(answers.pop(number), InvalidArgument)
    assert answers == dict.fromkeys(range(4), 1)


@serving
async def test_requests_during_a_commit_are_the_next_commit(served):
    running = asyncio.create_task(served.writer.run())
    loop, going, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def wait(edits):
        loop.call_soon_threadsafe(going.set)
        assert go_on.wait(10)

    served.store.fail = wait
    served.send(0)
    await going.wait()
    for number in range(1, 30):
        served.send(number)
    assert served.worker.answers == {}
    go_on.set()
    served.writer.stop()
    await running
    assert [len(edits) for edits in served.store.commits] == [1, 29]
    assert len(served.worker.answers) == 30


@serving
async def test_a_full_disk_fails_all_requests_of_a_commit_and_the_next_is_tried(served):
    full = ResourceExhausted("the disk is full")

    def fail(edits):
        served.store.fail = lambda edits: None
        raise full

    served.store.fail = fail
    task = asyncio.create_task(served.writer.run())
    for number in range(3):
        served.send(number)
    while len(served.worker.answers) < 3:
        await asyncio.sleep(0)
    served.send(3)
    served.writer.stop()
    await task
    assert served.worker.answers == {0: full, 1: full, 2: full, 3: 1}
    assert len(served.store.commits) == 1


@serving
async def test_a_request_that_makes_the_commit_fail_fails_alone(served):
    def fail(edits):
        if any(isinstance(edit, Upsert) and edit.batch.keys[0][0] == 2 for edit in edits):
            raise RuntimeError("first line\nsecond line")

    served.store.fail = fail
    for number in range(5):
        served.send(number)
    answers = await served.finish()
    failed = answers.pop(2)
    assert (failed.code, failed.message) == ("INTERNAL", "view 'stats': RuntimeError: first line")
    assert answers == {0: 1, 1: 1, 3: 1, 4: 1}
    assert len(served.store.commits) == 4
    assert list(served.faults.seen.values()) == [1]


@serving
async def test_the_error_of_an_edit_fails_that_request_only(served):
    wrong = InvalidArgument("wrong columns")
    served.store.commit = lambda edits: [wrong if number == 1 else 1 for number in range(len(edits))]
    for number in range(3):
        served.send(number)
    assert await served.finish() == {0: 1, 1: wrong, 2: 1}


@serving
async def test_a_request_past_its_deadline_is_not_written(served):
    now_ns = time.monotonic_ns()
    served.send(0, deadline_ns=now_ns - 1)
    served.send(1, deadline_ns=now_ns + 60_000_000_000)
    served.send(2, deadline_ns=1)
    answers = await served.finish()
    assert [answers[n].code for n in (0, 2)] == ["DEADLINE_EXCEEDED"] * 2
    assert answers[1] == 1
    assert [len(edits) for edits in served.store.commits] == [1]


@serving
async def test_requests_that_are_all_late_make_no_commit(served):
    served.send(0, deadline_ns=1)
    assert (await served.finish())[0].code == "DEADLINE_EXCEEDED"
    assert served.store.commits == []


@pytest.fixture
def limits(monkeypatch):
    def limit(**changed):
        monkeypatch.setattr(module, "LIMITS", Limits(**changed))

    return limit


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [({"commit_rows": 5}, [2, 2, 1]), ({"commit_rows": 1}, [1] * 5), ({"commit_bytes": 2000}, [3, 2]), ({}, [5])],
)
def test_a_commit_is_limited_in_size_but_has_at_least_one_request(limits, changed, sizes):
    limits(**changed)

    @serving
    async def check(served):
        for number in range(5):
            served.send(number, columns={"user_id": [number, number], "age": 1.0})
        assert await served.finish() == dict.fromkeys(range(5), 2)
        assert [len(edits) for edits in served.store.commits] == sizes

    check()


@pytest.mark.parametrize("changed", [{"queued_rows": 4}, {"queued_bytes": 1200}])
def test_requests_beyond_the_queue_limits_are_refused_at_once(limits, changed):
    limits(**changed)

    @serving
    async def check(served):
        for number in range(4):
            served.send(number, columns={"user_id": [number, number], "age": 1.0})
        assert {n: outcome.code for n, outcome in served.worker.answers.items()} == {
            2: "RESOURCE_EXHAUSTED", 3: "RESOURCE_EXHAUSTED",
        }  # fmt: skip
        answers = await served.finish()
        assert (answers[0], answers[1]) == (2, 2)

    check()


@serving
async def test_an_unknown_view_makes_the_writer_read_the_catalog_again(served):
    served.store.newer = {"late": STATS}
    served.send(0, view="late")
    served.send(1, view="never")
    answers = await served.finish()
    assert (answers[0], answers[1].code) == (1, "NOT_FOUND")


@serving
async def test_a_request_after_the_stop_is_refused(served):
    served.writer.stop()
    served.send(0)
    assert served.worker.answers[0].code == "UNAVAILABLE"


@serving
async def test_an_unexpected_exception_is_answered_and_logged(served):
    served.store.refresh = lambda force=False: 1 / 0
    served.send(0)
    assert served.worker.answers[0].message == "push: ZeroDivisionError: division by zero"
    assert served.faults.seen


def test_params_may_hold_tensors_and_all_plain_values():
    tensor = protocol.pack_tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
    given = ["stats", {"a": tensor, "b": [1, None, "é", 2.5, True]}]
    for options in ([], [None], [{"partial": True}]):
        name, columns, found = read_params(msgpack.packb(given + options))
        assert (name, columns["b"], found) == ("stats", given[1]["b"], (options and options[0]) or {})
    np.testing.assert_array_equal(columns["a"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("dtype", [st.Float64, st.Int64, st.Bool, st.String])
@pytest.mark.parametrize("many", [True, False])
def test_times_reach_the_view_as_times(dtype, many):
    times = np.array(["2026-01-31T12:00:00.5", "1969-12-31"], "M8[us]")
    sent = protocol.pack_tensor(times) if many else msgpack.Timestamp(1_769_860_800, 500_000_999)
    ids = [1, 2] if many else 1
    columns = read_params(msgpack.packb(["v", {"user_id": ids, "x": sent}]))[1]
    taken = column_batch(st.FeatureView("v", entity=USER, features=[st.Feature("x", st.Timestamp)]), columns, 1)
    assert taken.features[0][0].tolist() == times[: len(taken.features[0][0])].astype(np.int64).tolist()
    other = st.FeatureView("v", entity=USER, features=[st.Feature("x", dtype)])
    with pytest.raises(InvalidArgument, match=f"view 'v': column 'x' takes {dtype}; got "):
        column_batch(other, columns, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (b"\x81\xa1a\xd4\x09\x00", "ext type 9 is not known"),
        (b"\x81\xa1a\xa1\xff", "a string is not valid UTF-8"),
        (b"\x81\xa1a\xc7\x05\xff12345", "a map key or ext value that cannot be read"),
        (b"\x81\x91\x01\x02", "a map key or ext value that cannot be read"),
        (b"\x82\xa1a\x01\xa1a\x02", "column 'a' is given twice"),
        (b"\x81\xa1a\xc7\x01\x01\x03", "tensor of 1 bytes: its head is cut short"),
        (
            b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(1, b"\x04\x08" + b"\0\0\0\0" + b"\xff" * 28)),
            "a map key or ext",
        ),
    ],
)
def test_params_that_cannot_be_read_are_invalid(columns, message):
    with pytest.raises(InvalidArgument) as caught:
        read_params(b"\x92\xa5stats" + columns)
    assert caught.value.message.startswith(message)


def test_a_worker_connection_reads_messages_in_any_pieces_and_answers_by_number():
    rng = np.random.default_rng(3)

    class Transport:
        written = b""

        def write(self, data):
            self.written += data

        def writelines(self, parts):
            self.written += b"".join(parts)

    @serving
    async def check(served):
        connection, transport = WorkerConnection(served.writer), Transport()
        connection.connection_made(transport)
        sent = b"".join(
            msgpack.packb([0, n, "push", msgpack.packb(["stats" if n % 2 else "none", {"user_id": n, "age": 1}]), 0])
            for n in range(20)
        )
        at = 0
        while at < len(sent):
            step = int(rng.integers(1, 50))
            connection.data_received(sent[at : at + step])
            at += step
        await served.finish()
        unpacker = msgpack.Unpacker()
        unpacker.feed(transport.written)
        ready, *answers = unpacker
        assert ready == [2, "ready", []]
        outcome = {number: (error and error["code"], result) for _, number, error, result in answers}
        assert outcome == {n: (None, {"rows": 1}) if n % 2 else ("NOT_FOUND", None) for n in range(20)}
        connection.connection_lost(None)
        connection.answer(99, ShorttailError("nobody reads this"))

    check()
