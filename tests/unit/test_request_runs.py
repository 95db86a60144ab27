"""Batches that run in parts: only the requests that make the model fail get no answer; the others get their own."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument
from shorttail.models.request_runs import PartRun, RequestRows
from shorttail.models.session import ModelFailed, RunTimedOut
from shorttail.server.senders import Senders

BAD, ENDLESS = 1e6, 2e6


def run_in_parts(*arguments):
    run = PartRun(*arguments)
    while not run.is_done:
        run.step()
    return run.result()


class FakeRunner:
    """Returns each row's double, and the number of rows of its run. Rows of BAD and ENDLESS make a run fail."""

    output_names = ("double", "rows")
    loop_rows_max = 0

    def __init__(self, by_request=False):
        self.by_request = by_request
        self.runs = []

    def run(self, inputs):
        [x] = inputs
        self.runs.append(len(x))
        if (x == ENDLESS).any():
            raise RunTimedOut("the model failed: it took too long")
        if (x == BAD).any():
            raise ModelFailed("the model failed: out of bounds")
        return [x * 2, np.full(len(x), len(x))]

    def explain(self, error, worked=False):
        return InvalidArgument(error.message)


@given(some.lists(some.tuples(some.integers(1, 3), some.sampled_from(["good", "bad", "endless", "gone"])), min_size=1),
       some.sampled_from([1.0, 2.5, 8.0, math.inf]), some.booleans())  # fmt: skip
def test_each_request_gets_its_own_answer_or_its_own_error(kinds, requests_per_run, by_request):
    runner = FakeRunner(by_request)
    x = np.zeros(sum(rows for rows, _ in kinds))
    requests, first = [], 0
    for number, (rows, kind) in enumerate(kinds):
        x[first : first + rows] = number
        x[first + rows - 1] = {"bad": BAD, "endless": ENDLESS}.get(kind, number)
        if kind != "gone":
            requests.append(RequestRows(number, first, rows))
        first += rows
    parts = run_in_parts(runner, [x], len(x), requests, requests_per_run)
    assert set(parts.failures) == {number for number, (_, kind) in enumerate(kinds) if kind in ("bad", "endless")}
    answered = [number for part in parts.answered for number in part.requests]
    assert sorted(answered) == [number for number, (_, kind) in enumerate(kinds) if kind == "good"]
    for part in parts.answered:
        for number in part.requests:
            [request] = [request for request in requests if request.number == number]
            rows = slice(request.first, request.first + request.rows)
            assert part.outputs[0][rows].tolist() == (2 * x[rows]).tolist()
            if by_request:
                assert part.outputs[1][rows].tolist() == [request.rows] * request.rows
    assert (parts.requests_per_run == 1.0) if by_request else parts.requests_per_run >= 1.0


def test_few_runs_find_a_single_bad_request_among_many():
    runner, x = FakeRunner(), np.zeros(512)
    x[300] = BAD
    parts = run_in_parts(runner, [x], 512, [RequestRows(i, i, 1) for i in range(512)], math.inf)
    assert set(parts.failures) == {300}
    assert len(runner.runs) <= 1 + 2 * 9  # the whole, and two halves on each of nine levels


def test_the_requests_of_a_run_shrink_while_runs_fail_and_grow_again():
    """With one bad request in ten, a run has a few requests; when all are good again, all share a run."""
    runner, limit = FakeRunner(), math.inf
    for _ in range(20):
        x = np.zeros(100)
        x[::10] = BAD
        limit = run_in_parts(runner, [x], 100, [RequestRows(i, i, 1) for i in range(100)], limit).requests_per_run
    assert 1 <= limit < 20
    runner.runs.clear()
    for _ in range(60):
        limit = run_in_parts(runner, [np.zeros(100)], 100, [RequestRows(i, i, 1) for i in range(100)], limit)[2]
    assert limit == math.inf
    assert runner.runs[-1] == 100


def test_a_model_that_gives_other_rows_than_it_got_is_said_to_fail():
    runner = SimpleNamespace(
        by_request=True,
        loop_rows_max=0,
        output_names=["y"],
        run=lambda inputs: [np.zeros(1)],
        explain=lambda error, worked: error,
    )
    parts = run_in_parts(runner, [np.zeros(4)], 4, [RequestRows(0, 0, 2), RequestRows(1, 2, 2)], 1.0)
    assert parts.answered == []
    assert isinstance(parts.failures[0], Internal)
    assert "output 'y' has the shape [1] for 2 rows" in parts.failures[0].message


def test_a_sender_is_a_suspect_after_several_bad_rows(monkeypatch):
    now_ns = 10**12
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    senders = Senders({})
    for _ in range(LIMITS.suspect_requests - 1):
        senders.blame((None, "10.0.0.1"))
    senders.blame((None, "10.0.0.2"))
    senders.blame(None)
    assert senders.suspects == {}
    senders.blame((None, "10.0.0.1"))
    assert senders.suspects == {(None, "10.0.0.1"): now_ns + int(1e9 * LIMITS.suspect_s)}
    now_ns += int(1e9 * LIMITS.suspect_s) + 1
    senders.blame((None, "10.0.0.3"))  # once in a while is no reason
    senders.forgive(now_ns)
    assert senders.suspects == {}


def test_the_senders_that_are_remembered_are_bounded():
    senders = Senders({})
    for i in range(LIMITS.senders_blamed + 100):
        for _ in range(LIMITS.suspect_requests):
            senders.blame((None, f"10.0.{i >> 8}.{i & 255}"))
    assert len(senders.suspects) == LIMITS.senders_blamed


def test_an_unknown_failure_is_not_blamed_on_a_request():
    runner = SimpleNamespace(by_request=False, loop_rows_max=0, output_names=["y"], run=lambda inputs: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_in_parts(runner, [np.zeros(2)], 2, [RequestRows(0, 0, 1), RequestRows(1, 1, 1)], math.inf)
