"""What the load generator measures, against servers that stall, that answer late and that do not answer.

These tests take as long as the stalls that they plant. Of a latency they assert only what was planted, as a lower
bound: a busy machine adds to it.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from fakes import good, load_on, rpc_server, with_load

from shorttail._native import loadtest as native


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print("seed", chosen)
    return chosen


def test_every_request_is_counted_once_and_percentiles_are_right(seed: int) -> None:
    with rpc_server() as fake:
        step = load_on(fake.address, with_load(seed=seed, duration_s=1.0), rate=2000.0)
    events = step.events
    assert step.due == step.outcomes["good"] == len(events) == step.latency.total == step.service.total
    assert sum(part.outcomes["good"] for part in step.slices) == step.due
    assert step.due == pytest.approx(2000, abs=6 * 2000**0.5)
    assert (events["intended_ns"] <= events["sent_ns"]).all()
    assert (events["sent_ns"] <= events["done_ns"]).all()
    for histogram, begin in ((step.latency, "intended_ns"), (step.service, "sent_ns")):
        took = (events["done_ns"] - events[begin]).astype(np.int64)
        assert histogram.max_ns == took.max()
        assert histogram.mean_ns == pytest.approx(took.mean(), rel=1e-6)
        for percentile in (50, 90, 99, 99.9):
            exact = np.percentile(took, percentile, method="inverted_cdf")
            around = np.percentile(took, [max(percentile - 0.1, 0), min(percentile + 0.1, 100)], method="inverted_cdf")
            assert around[0] * 0.999 <= histogram.percentile(percentile) <= around[1] * 1.001, (percentile, exact)


def test_a_stall_is_charged_to_what_was_due_and_a_closed_loop_misses_it() -> None:
    """Bar: at least 90% of what arithmetic on the intended times gives. Noise can only add to a latency, so the bound
    holds on any machine. The closed loop has one request in each stall at most: fewer than a P99 could show."""
    with rpc_server(stall_every_s=1.0, stall_s=0.1) as fake:
        step = load_on(fake.address, with_load(duration_s=2.5), rate=500.0)
        stalls = np.array(fake.stalls)
    due = step.events["intended_ns"] / 1e9
    waits = np.zeros(len(due))
    for start, end in stalls:
        waits = np.where((due >= start) & (due < end), end - due, waits)
    expected_s = np.percentile(waits, 99)
    assert expected_s > 0.07, "no stall was planted: the test shows nothing"
    assert step.latency.percentile(99) / 1e9 >= 0.9 * expected_s
    with rpc_server(stall_every_s=1.0, stall_s=0.1) as fake:
        closed = load_on(fake.address, with_load(duration_s=1.5, closed=True, connections=1, pipeline=1), rate=None)
        stalls = np.array(fake.stalls)
    sent = closed.events["sent_ns"] / 1e9
    assert 1 <= len(stalls) < len(sent) / 100
    assert all(((sent >= start) & (sent < end)).sum() <= 1 for start, end in stalls)
    assert closed.latency.max_ns / 1e9 >= 0.09


def test_offered_load_does_not_wait_for_the_server() -> None:
    """A server that answers nothing is sent as much as its connections hold; the rest times out unsent."""
    with rpc_server(lambda request: b"") as fake:
        step = load_on(fake.address, with_load(timeout_s=0.2, pipeline=8, connections=2))
    assert step.due == pytest.approx(400, abs=6 * 400**0.5)
    assert step.outcomes == {"good": 0, "error": 0, "timeout": step.due, "lost": 0}
    assert step.counts["unsent"] > 0
    assert step.counts["blocked"] > 0
    assert step.latency.total == step.due  # what timed out took at least so long
    assert step.latency.percentile(1) >= 0.199e9
    assert any("every connection was full" in warning for warning in step.warnings())


def test_late_answers_are_not_taken_for_others() -> None:
    """Each tenth answer comes 0.3 s late, with a limit of 0.1 s: no other request may have its id meanwhile."""
    waiting: list[tuple[float, bytes]] = []
    n = [0]

    def answer(request: list[Any]) -> bytes:
        n[0] += 1
        due = b"".join(data for at, data in waiting if at <= time.monotonic())
        waiting[:] = [item for item in waiting if item[0] > time.monotonic()]
        if n[0] % 10 == 0:
            waiting.append((time.monotonic() + 0.3, good(request)))
            return due
        return due + good(request)

    with rpc_server(answer) as fake:
        step = load_on(fake.address, with_load(timeout_s=0.1, duration_s=1.0, connections=1, pipeline=200), rate=500.0)
    assert not step.fatal
    assert step.counts["late_answers"] > 0
    assert step.outcomes["timeout"] > 0
    assert step.outcomes["good"] + step.outcomes["timeout"] == step.due


def test_hiccups_see_a_schedule_that_is_missed() -> None:
    hiccups = native.Hiccups(period_ns=1_000_000, slice_ns=10_000_000, slices=1000)
    thread = threading.Thread(target=hiccups.run)
    thread.start()
    while hiccups.results()[0][0].sum() < 50:
        time.sleep(0.01)
    hiccups.stop()
    thread.join()
    (counts, max_ns, _), start_ns, worst = hiccups.results()
    assert start_ns > 0
    assert int(worst.max()) == max_ns // 1000
    assert counts.sum() >= 50
