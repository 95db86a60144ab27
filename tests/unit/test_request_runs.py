"""Batches that run in parts: only the requests that make the model fail get no answer; the others get their own."""

import itertools
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument
from shorttail.models.load import RunCounts
from shorttail.models.request_runs import BadShare, PartRun, RequestRows, best_size
from shorttail.models.session import ModelFailed, RunTimedOut
from shorttail.server.senders import Senders

BAD, ENDLESS = 1e6, 2e6


def run_in_parts(runner, inputs, rows, requests, bad=None, most=10**6):
    run = PartRun(runner, inputs, rows, requests, bad or BadShare(runner), most)
    while not run.is_done:
        run.step()
    return run.result()


class FakeRunner:
    """Returns each row's double, and the number of rows of its run. Rows of BAD and ENDLESS make a run fail."""

    output_names = ("double", "rows")
    loop_rows_max = 0
    failure_us = 100.0

    def __init__(self, by_request=False):
        self.by_request = by_request
        self.runs = []
        self.counts = RunCounts()
        self.is_bad = lambda x: x == BAD

    def cost_us(self, rows):
        return 10.0 + 2.0 * rows

    def note_failure(self, took_us, error):
        self.counts.note(error)

    def run(self, inputs):
        [x] = inputs
        self.runs.append(len(x))
        if (x == ENDLESS).any():
            raise RunTimedOut("the model failed: it took too long")
        if self.is_bad(x).any():
            raise ModelFailed("the model failed: out of bounds")
        return [x * 2, np.full(len(x), len(x))]

    def explain(self, error, worked=False):
        return InvalidArgument(error.message)


@given(some.lists(some.tuples(some.integers(1, 3), some.sampled_from(["good", "bad", "endless", "gone"])), min_size=1),
       some.sampled_from([1, 2, 8, 1000]), some.floats(0, 1), some.booleans())  # fmt: skip
def test_each_request_gets_its_own_answer_or_its_own_error(kinds, most, share, by_request):
    runner = FakeRunner(by_request)
    bad = BadShare(runner)
    bad.value = share
    x = np.zeros(sum(rows for rows, _ in kinds))
    requests, first = [], 0
    for number, (rows, kind) in enumerate(kinds):
        x[first : first + rows] = number
        x[first + rows - 1] = {"bad": BAD, "endless": ENDLESS}.get(kind, number)
        if kind != "gone":
            requests.append(RequestRows(number, first, rows))
        first += rows
    parts = run_in_parts(runner, [x], len(x), requests, bad, most)
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
    assert bad.requests_per_run >= 1


def test_rows_that_were_refused_are_refused_again_without_a_run(monkeypatch):
    now_ns = 10**12
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    runner, x = FakeRunner(), np.arange(100.0)
    x[[3, 50]] = BAD, BAD + 1
    runner.is_bad = lambda x: x >= BAD
    bad = BadShare(runner)
    requests = [RequestRows(i, i, 1) for i in range(100)]
    first = run_in_parts(runner, [x], 100, requests, bad)
    runner.runs.clear()
    bad.learn(0, 10**6, 10**6)  # all was good since
    again = run_in_parts(runner, [x], 100, requests, bad)
    assert runner.runs == [98]  # one run of all others
    assert {number: str(error) for number, error in again.failures.items()} == {
        number: str(error) for number, error in first.failures.items()
    }
    [(numbers, outputs)] = again.answered
    assert len(numbers) == 98
    assert outputs[0][numbers].tolist() == (2 * x[numbers]).tolist()
    only = run_in_parts(runner, [x[3:4]], 1, [RequestRows(0, 0, 1)], bad)
    assert (only.answered, set(only.failures)) == ([], {0})
    now_ns += int(1e9 * LIMITS.refusal_kept_s) + 1
    runner.is_bad = lambda x: x < 0  # the model takes them now
    assert run_in_parts(runner, [x], 100, requests, bad).failures == {}


@pytest.mark.parametrize(
    ("refused", "others"),
    [
        ([np.ones((1, 6))], [np.ones((1, 2, 3))]),  # the same bytes in another shape
        ([np.array([[1.0], [2.0]])], [np.array([[1.0], [3.0]])]),  # equal in the first row alone
        ([np.ones((1, 2)), np.float64(1)], [np.ones((1, 2)), np.float64(2)]),  # a tensor without rows
        ([], []),
    ],
)
def test_a_refused_request_of_tensors_stands_for_itself_alone(refused, others):
    """Tensors of a request may have any shapes: none is refused because another is like it in part."""
    runner, bad = FakeRunner(), BadShare(FakeRunner())
    bad.learn(1, 1, 1)
    runner.run = lambda inputs: (_ for _ in ()).throw(ModelFailed("the model failed: shapes"))
    assert set(run_in_parts(runner, refused, 1, [RequestRows(0, 0, 1)], bad).failures) == {0}
    runner.run = lambda inputs: [np.zeros(1), np.zeros(1)]
    assert run_in_parts(runner, others, 1, [RequestRows(0, 0, 1)], bad).failures == {}


def test_few_runs_find_a_single_bad_request_among_many():
    runner, x = FakeRunner(), np.zeros(512)
    x[300] = BAD
    parts = run_in_parts(runner, [x], 512, [RequestRows(i, i, 1) for i in range(512)])
    assert set(parts.failures) == {300}
    assert len(runner.runs) <= 1 + 2 * 9  # the whole, and two halves on each of nine levels


def test_the_requests_of_a_run_shrink_while_runs_fail_and_grow_again():
    """With one bad request in ten, a run has few requests; when all are good again, all share a run."""
    runner, numbers = FakeRunner(), itertools.count()
    runner.is_bad = lambda x: x >= BAD
    bad = BadShare(runner)
    requests = [RequestRows(i, i, 1) for i in range(100)]
    for _ in range(20):
        x = np.arange(100.0)
        x[::10] = BAD + next(numbers)  # rows that are known are not counted
        run_in_parts(runner, [x], 100, requests, bad)
    assert 0.05 < bad.value < 0.2
    assert bad.requests_per_run <= 4
    for _ in range(60):
        runner.runs.clear()
        run_in_parts(runner, [np.zeros(100)], 100, requests, bad)
    assert (bad.value, bad.requests_per_run, runner.runs) == (0.0, math.inf, [100])


@pytest.mark.parametrize("failure_us", [5.0, 20.0, 500.0])
def test_runs_of_the_best_size_take_the_least_time(failure_us):
    """In a simulation of the search, no other size takes less than 1 / 1.3 of the time."""
    runner = FakeRunner()
    runner.failure_us = failure_us
    for share in (0.5, 0.1, 0.001):
        found = best_size(runner, share, 1.0)
        times_us = {size: simulated_us(runner, share, size) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
        assert times_us.get(int(found), min(times_us.values())) <= 1.3 * min(times_us.values()), (
            share,
            found,
            times_us,
        )


def simulated_us(runner, share, size):
    """Mean time a request of runs of `size` requests, each bad with this probability."""
    dice, total_us = random.Random(1), 0.0
    requests = 4096
    for _ in range(requests // size):
        waiting = [[dice.random() < share for _ in range(size)]]
        while waiting:
            part = waiting.pop()
            if not any(part):
                total_us += 20.0 + 2.0 * len(part)
            else:
                total_us += runner.failure_us
                if len(part) > 1:
                    waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
    return total_us / requests


def test_a_model_that_gives_other_rows_than_it_got_is_said_to_fail():
    runner = SimpleNamespace(
        by_request=True,
        loop_rows_max=0,
        output_names=["y"],
        run=lambda inputs: [np.zeros(1)],
        note_failure=lambda took_us, error: None,
        counts=RunCounts(),
        explain=lambda error, worked: error,
    )
    parts = run_in_parts(runner, [np.zeros(4)], 4, [RequestRows(0, 0, 2), RequestRows(1, 2, 2)], most=1)
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
    runner = SimpleNamespace(
        by_request=False, loop_rows_max=0, output_names=["y"], run=lambda inputs: 1 // 0, counts=RunCounts()
    )
    with pytest.raises(ZeroDivisionError):
        run_in_parts(runner, [np.zeros(2)], 2, [RequestRows(0, 0, 1), RequestRows(1, 1, 1)])
