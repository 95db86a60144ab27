"""Admission: what a turn takes, what it refuses, and what it learns from that."""

import time

import msgpack
import pytest
from test_wire import PREDICT
from test_wire_limits import Guarded

from shorttail._native import wire
from shorttail.errors import DeadlineExceeded, ResourceExhausted


class Measured(Guarded):
    """Remembers the route of its last batch."""

    def __init__(self):
        super().__init__()
        run, take = self.router.run, self.router.take
        self.route = None

        def remember():
            batches = take()
            if batches:
                self.route = batches[0].route
            for batch in batches:
                if batch.drop_expired():
                    batch.reply(self.engine.run(batch.route, batch.columns))
            self.router.flush()

        assert run is not None
        self.router.run = remember

    def offer(self, count, options=None):
        """(answered, shed) of so many requests in one turn."""
        params = ["double", {"key": 1, "amount": 0}] + ([options] if options else [])
        replies = self.ask(*([0, msgid, "predict", params] for msgid in range(count)))
        assert sorted(reply[1] for reply in replies) == list(range(count))
        shed = [reply[2]["code"] for reply in replies if reply[2] is not None]
        assert set(shed) <= {"RESOURCE_EXHAUSTED"}
        return count - len(shed), len(shed)

    def always(self, rows):
        """The budget of a turn is that of so many rows, give or take none."""
        self.router.burst_ns = self.router.target_ns = (rows - 0.25) * self.route.row_cost_ns


@pytest.fixture
def served():
    return Guarded()


@pytest.fixture
def measured():
    served = Measured()
    for _ in range(3):
        served.offer(10)
    assert served.route.row_cost_ns > 0
    return served


def budgets(measured, least, more):
    """In rows: what a turn may take in an overload, and how much more else. It is never less than 8 batches cost."""
    row_ns = measured.route.row_cost_ns
    least += 8 * measured.route.batch_cost_ns / row_ns
    measured.router.target_ns = least * row_ns
    measured.router.burst_ns = (least + more) * row_ns


def until_regained(queue, measured):
    """queue: the router, or the route of one outside the loop."""
    before_ns = queue.budget_cut_ns
    assert before_ns > 0
    measured.offer(1)
    assert queue.budget_cut_ns < before_ns
    end_s = time.monotonic() + 20
    while queue.budget_cut_ns:
        measured.offer(1)
        assert time.monotonic() < end_s


def test_a_burst_is_served_whole(measured):
    budgets(measured, 1, 1e9)
    assert measured.offer(2000) == (2000, 0)
    assert measured.router.budget_cut_ns == 0.0


def test_more_than_a_turn_may_take_is_refused(measured):
    for rows in (1, 7, 500):
        measured.always(rows)
        assert measured.offer(1000) == (rows, 1000 - rows)
    assert measured.router.shed == 3000 - 508
    assert measured.router.admitted_ns == 0.0


def test_a_full_turn_makes_the_next_shorter_and_time_without_one_longer_again(measured):
    budgets(measured, 20, 500)
    longest_ns, least_ns = measured.router.burst_ns, measured.router.target_ns
    assert measured.offer(5000)[0] > 500
    assert measured.router.budget_cut_ns == 0.5 * longest_ns
    for _ in range(9):
        answered, shed = measured.offer(5000)
        assert answered
        assert shed
    assert measured.router.budget_cut_ns == longest_ns - least_ns
    until_regained(measured.router, measured)


def test_requests_of_low_priority_alone_make_no_turn_short(measured):
    budgets(measured, 1, 2000)
    answered, shed = measured.offer(1900, {"priority": 0})
    assert answered < 1900
    assert shed
    assert measured.router.budget_cut_ns == 0.0


def test_requests_of_low_priority_are_shed_first(measured):
    measured.always(100)
    assert measured.offer(1000, {"priority": 0})[0] == 50
    measured.always(100)
    assert measured.offer(1000, {"priority": 1})[0] == 100
    measured.always(100)
    assert measured.offer(1000, {"priority": 2})[0] == 200


def test_priorities_that_are_none(served):
    for wrong in (-1, 3, "high", 1.0, None):
        [reply] = served.ask([0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"priority": wrong}]])
        assert reply[2]["message"].startswith("option 'priority' must be 0, 1 or 2")


def test_a_route_that_runs_apart_has_a_queue_of_its_own(measured):
    measured.router.burst_ns = 9.5 * measured.route.row_cost_ns
    measured.route.threaded = True
    assert measured.offer(1000) == (10, 990)
    assert measured.route.admitted_ns == measured.router.admitted_ns == 0.0


def test_a_queue_outside_the_loop_is_kept_short_alike(measured):
    budgets(measured, 20, 500)
    measured.route.threaded = True
    assert measured.offer(5000)[0] > 500
    for _ in range(9):
        assert measured.offer(5000)[1]
    assert measured.route.budget_cut_ns == measured.router.burst_ns - measured.router.target_ns
    assert measured.router.budget_cut_ns == 0.0
    until_regained(measured.route, measured)


def test_what_would_miss_its_deadline_is_refused_at_once(measured):
    """As much is admitted as there is time for before the deadline, by what a row has cost."""
    deadline_ms = 300.25 * measured.route.row_cost_ns / 1e6
    message = [0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": deadline_ms}]]
    connection = measured.connect()
    connection.data_received(msgpack.packb(message) * 1000)
    assert connection.in_flight <= 301  # one more than fit: the first always is
    assert measured.router.shed == 1000 - connection.in_flight
    measured.loop.turn()
    codes = {reply[2]["code"] for reply in measured.replies(connection) if reply[2] is not None}
    assert "RESOURCE_EXHAUSTED" in codes


def test_what_comes_too_late_is_refused_as_it_is_read(measured):
    """Its time began while the last turn ran, if the loop had no rest between the two."""
    connection = measured.connect()
    message = msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": 1}]])
    run = measured.router.run

    def held_up():
        time.sleep(0.005)
        run()

    measured.router.run = held_up
    for _ in range(1000):  # until this test itself is not held up between two turns
        connection.data_received(msgpack.packb(PREDICT))
        measured.loop.turn()
        connection.data_received(message)
        if connection.in_flight == 0:
            break
        measured.loop.turn()
    assert connection.in_flight == 0
    measured.loop.turn()
    assert measured.replies(connection)[-1][2]["message"] == "the deadline passed before the request was read"


def test_batches_that_nobody_waited_for_teach_no_cost(measured):
    before = measured.route.row_cost_ns
    connection = measured.connect()
    for _ in range(20):
        connection.data_received(msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}]]) * 100)
        measured.lose(connection)
        measured.loop.turn()
        connection = measured.connect()
    assert measured.route.row_cost_ns == before
    assert measured.router.waiting_rows == 0


def test_what_comes_by_another_way_is_admitted_alike(measured):
    """As HTTP does it: ask, count, run."""
    measured.always(3)
    plan = measured.route.plan
    route = wire.WireRoute(plan, b"", -1)
    for ran in (True, True):  # the first teaches nothing
        batch = wire.Batch(route, plan.new_columns())
        measured.router.admit(route)
        batch.count(measured.router, 1, 0)
        batch.start()
        batch.end(ran)
        measured.loop.turn()
    assert route.row_cost_ns > 0
    measured.router.burst_ns = 2.5 * route.row_cost_ns
    batch = wire.Batch(route, plan.new_columns())
    for _ in range(3):
        measured.router.admit(route)
        batch.count(measured.router, 1, 0)
    with pytest.raises(ResourceExhausted, match="the server is overloaded; send it again later"):
        measured.router.admit(route)
    assert measured.router.waiting_rows == 3
    batch.end(False)
    assert (measured.router.waiting_rows, measured.router.admitted_ns) == (0, 0.0)
    measured.loop.turn()
    measured.router.admit(route)
    with pytest.raises(DeadlineExceeded, match="the deadline passed before the request was read"):
        measured.router.admit(route, 1)


def test_notifications_are_shed_in_silence(measured):
    measured.always(3)
    connection = measured.connect()
    connection.data_received(msgpack.packb([2, "predict", ["double", {"key": 1, "amount": 0}]]) * 10)
    measured.loop.turn()
    assert measured.replies(connection) == []
    assert measured.router.shed == 7
