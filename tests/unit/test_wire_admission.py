"""Admission: the budget of a turn, the requests it refuses, and the cost estimate of a route."""

import random
import time
from types import SimpleNamespace

import msgpack
import pytest
from test_wire import PREDICT, FakeEngine
from test_wire_limits import Guarded

from shorttail._native import wire
from shorttail.errors import DeadlineExceeded, ResourceExhausted


class Measured(Guarded):
    """A router that records the route of its last batch."""

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
        """Send `count` requests in one turn. Returns (requests answered, requests refused)."""
        params = ["double", {"key": 1, "amount": 0}] + ([options] if options else [])
        replies = self.ask(*([0, msgid, "predict", params] for msgid in range(count)))
        assert sorted(reply[1] for reply in replies) == list(range(count))
        shed = [reply[2]["code"] for reply in replies if reply[2] is not None]
        assert set(shed) <= {"RESOURCE_EXHAUSTED"}
        return count - len(shed), len(shed)

    def always(self, rows):
        """Set both budgets of a turn to the cost of exactly `rows` rows."""
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
    """Set target_ns to the cost of `least` rows and 8 batches, the least budget, and burst_ns to `more` rows more."""
    row_ns = measured.route.row_cost_ns
    least += 8 * measured.route.batch_cost_ns / row_ns
    measured.router.target_ns = least * row_ns
    measured.router.burst_ns = (least + more) * row_ns


def until_regained(queue, measured):
    """Run turns until the budget cut is 0. queue: the router, or a route whose batches run in a thread."""
    before_ns = queue.budget_cut_ns
    assert before_ns > 0
    measured.offer(1)
    assert queue.budget_cut_ns < before_ns
    end_s = time.monotonic() + 20
    while queue.budget_cut_ns:
        measured.offer(1)
        assert time.monotonic() < end_s


def test_a_burst_within_the_budget_is_served_whole(measured):
    budgets(measured, 1, 1e9)
    assert measured.offer(2000) == (2000, 0)
    assert measured.router.budget_cut_ns == 0.0


def test_requests_beyond_the_budget_of_a_turn_are_refused(measured):
    for rows in (1, 7, 500):
        measured.always(rows)
        assert measured.offer(1000) == (rows, 1000 - rows)
    assert measured.router.shed == 3000 - 508
    assert measured.router.admitted_ns == 0.0


def test_a_full_turn_halves_the_budget_and_time_without_one_restores_it(measured):
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


def test_requests_of_low_priority_alone_do_not_cut_the_budget(measured):
    budgets(measured, 1, 2000)
    answered, shed = measured.offer(1900, {"priority": 0})
    assert answered < 1900
    assert shed
    assert measured.router.budget_cut_ns == 0.0


def test_requests_of_low_priority_are_refused_first(measured):
    measured.always(100)
    assert measured.offer(1000, {"priority": 0})[0] == 50
    measured.always(100)
    assert measured.offer(1000, {"priority": 1})[0] == 100
    measured.always(100)
    assert measured.offer(1000, {"priority": 2})[0] == 200


def test_a_priority_other_than_0_1_or_2_is_an_error(served):
    for wrong in (-1, 3, "high", 1.0, None):
        [reply] = served.ask([0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"priority": wrong}]])
        assert reply[2]["message"].startswith("option 'priority' must be 0, 1 or 2")


def test_a_route_that_runs_in_a_thread_has_its_own_queue(measured):
    measured.router.burst_ns = 9.5 * measured.route.row_cost_ns
    measured.route.threaded = True
    assert measured.offer(1000) == (10, 990)
    assert measured.route.admitted_ns == measured.router.admitted_ns == 0.0


def test_the_queue_of_a_thread_is_kept_short_too(measured):
    budgets(measured, 20, 500)
    measured.route.threaded = True
    assert measured.offer(5000)[0] > 500
    for _ in range(9):
        assert measured.offer(5000)[1]
    assert measured.route.budget_cut_ns == measured.router.burst_ns - measured.router.target_ns
    assert measured.router.budget_cut_ns == 0.0
    until_regained(measured.route, measured)


def test_a_request_that_would_miss_its_deadline_is_refused_at_once(measured):
    """Requests are admitted as long as their estimated end is before the deadline."""
    deadline_ms = 300.25 * measured.route.row_cost_ns / 1e6
    message = [0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": deadline_ms}]]
    connection = measured.connect()
    connection.data_received(msgpack.packb(message) * 1000)
    assert connection.in_flight <= 301  # one more than fits: the first is always admitted
    assert measured.router.shed == 1000 - connection.in_flight
    measured.loop.turn()
    codes = {reply[2]["code"] for reply in measured.replies(connection) if reply[2] is not None}
    assert "RESOURCE_EXHAUSTED" in codes


def test_a_request_past_its_deadline_is_refused_as_it_is_read(measured):
    """If a turn begins just after the last one, its deadlines count from the begin of the last one."""
    connection = measured.connect()
    message = msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": 1}]])
    run = measured.router.run

    def held_up():
        time.sleep(0.005)
        run()

    measured.router.run = held_up
    for _ in range(1000):  # repeat, because this process may be delayed between two turns
        connection.data_received(msgpack.packb(PREDICT))
        measured.loop.turn()
        connection.data_received(message)
        if connection.in_flight == 0:
            break
        measured.loop.turn()
    assert connection.in_flight == 0
    measured.loop.turn()
    assert measured.replies(connection)[-1][2]["message"] == "the deadline passed before the request was read"


@pytest.mark.parametrize("form", [1, 2])
def test_refusals_have_the_form_of_errors(measured, form):
    measured.router.limit(error_form=form)
    deadline_ms = 300.25 * measured.route.row_cost_ns / 1e6
    message = [0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": deadline_ms}]]
    connection = measured.connect()
    connection.data_received(msgpack.packb(message) * 1000)
    measured.loop.turn()
    errors = [reply[2] for reply in measured.replies(connection) if reply[2] is not None]
    said = "RESOURCE_EXHAUSTED: the server is overloaded; send it again later"
    assert (said if form == 1 else [8, said]) in errors
    assert {type(error) for error in errors} == {str if form == 1 else list}


def test_batches_without_a_waiting_caller_do_not_change_the_cost(measured):
    before = measured.route.row_cost_ns
    connection = measured.connect()
    for _ in range(20):
        connection.data_received(msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}]]) * 100)
        measured.lose(connection)
        measured.loop.turn()
        connection = measured.connect()
    assert measured.route.row_cost_ns == before
    assert measured.router.waiting_rows == 0


def test_requests_of_another_protocol_are_under_the_same_admission(measured):
    """As HttpBatches does it: admit, count, run."""
    measured.always(3)
    plan = measured.route.plan
    route = wire.WireRoute(plan, b"", -1)
    for ran in (True, True):  # the first sample is not used
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


def test_refused_notifications_get_no_reply(measured):
    measured.always(3)
    connection = measured.connect()
    connection.data_received(msgpack.packb([2, "predict", ["double", {"key": 1, "amount": 0}]]) * 10)
    measured.loop.turn()
    assert measured.replies(connection) == []
    assert measured.router.shed == 7


# -- learning what a batch and a row cost ----------------------------------------------------------------------------


def route_expecting(one_us, row_us):
    """A route of a model whose warm-up measured these costs of one row and of each further row."""
    plan = FakeEngine().plan_for_model("double")
    plan.runner = SimpleNamespace(by_request=False, cost_us=lambda rows: one_us + (rows - 1) * row_us)
    return wire.WireRoute(plan, b"", -1)


@pytest.mark.parametrize(("batch_us", "row_us"), [(75_000, 1), (100, 900), (20_000, 200), (60, 2)])
@pytest.mark.parametrize("expected", [(75_000, 75_000), (1_000, 1), (100, 10)])
def test_the_cost_of_a_batch_and_of_a_row_are_learned_from_batches(batch_us, row_us, expected):
    """Whatever the warm-up measured, batches of several sizes show the true line, noise of 10% or not."""
    route = route_expecting(*expected)
    dice = random.Random(1)
    for _ in range(400):
        rows = dice.randint(1, 60)
        route.learn(rows, 1000 * (batch_us + row_us * rows) * dice.uniform(0.9, 1.1))
    for rows in (1, 20, 60):
        assert route.batch_cost_ns + rows * route.row_cost_ns == pytest.approx(
            1000 * (batch_us + row_us * rows), rel=0.3
        )


def test_a_fixed_cost_is_found_although_every_batch_has_one_request():
    """As long as requests are refused, rows are tried at a lower price. Else nothing is changed on a guess."""
    route = route_expecting(75_000, 75_000)
    for _ in range(100):
        route.learn(1, 75e6)
    assert route.row_cost_ns == pytest.approx(75e6, rel=0.01)
    for _ in range(200):
        route.learn(1, 75e6, full=True)
    assert route.row_cost_ns < 0.05 * 75e6
    assert route.batch_cost_ns + route.row_cost_ns == pytest.approx(75e6, rel=0.05)


def test_a_price_that_was_tried_too_low_is_corrected_by_the_next_batches():
    route = route_expecting(1_000, 1_000)
    for _ in range(200):
        route.learn(1, 1e6, full=True)
    assert route.row_cost_ns < 0.1e6
    for rows in (2, 3, 5, 8, 7, 9, 6, 8, 10, 9) * 5:
        route.learn(rows, 1e6 * rows)
    assert route.row_cost_ns == pytest.approx(1e6, rel=0.2)
