"""Change the definitions of a view of 10 M rows while it is served and pushed to, and time plans of large catalogs.

    python bench/change.py [--json] [--quick] [--changes N] [--folder DIR]

One worker on one CPU answers predictions of 100 rows each in an open loop at half of its capacity; for single rows the
generator alone would take all of the other CPU. Its budget of P99 refuses none, so a request that waits counts with its
latency; beyond LIMITS.waiting_rows it refuses, and these requests count as failed. The other CPU has the generator, a
client that pushes rows, a client that compares answers with the states in which the store may be, and a process that
applies one change after the other at a low priority, as `shorttail apply --wait` does. What they leave of it goes to a
process that copies memory: the CPUs of a small machine often share a core, and without it the quiet seconds would be
those of a core that has nothing else to do. Changes of nine kinds follow each other in a cycle; quiet seconds lie
between them. After each change all answers must be those of the new state, and all rows that were pushed meanwhile must
be there. A virtual machine stands still now and then: the generator runs ahead of all others, so a second in which even
it was late is left out of the latencies, and counted. Failures count in such a second too.

Then `plan` is timed for 200 views and 100 models of which one view has changed. --quick: 200,000 rows, 5 changes of
each kind, a tenth of the views and models; ends within three minutes. --folder: the place of the store, which takes up
to four times its rows (default: the system's folder for temporary files).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import installed
import change_plan
import loadgen
import numpy as np
import report
import serving
from change_clients import SEEN_S, Checker, Failures, Pusher, applier, busy_cpu
from change_states import KINDS, OF_MODEL, PUSHED, Cycle, Layout, State, features_of, write_source
from loadgen import BenchError
from swap import unpack
from worst import ahead

import shorttail as st
from shorttail import protocol
from shorttail.config import LIMITS
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.histogram import Histogram
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Interrupts, Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_rpc
from shorttail.store.verify import verify


@dataclass(frozen=True)
class Times:
    """Of a step of the load: the length of a slice, and of the warm-up."""

    slice_s: float
    warmup_s: float


ROWS, QUICK_ROWS = 10_000_000, 200_000
CHANGES, QUICK_CHANGES = 50, 5
TIMES, QUICK_TIMES = Times(slice_s=1.0, warmup_s=1.0), Times(slice_s=0.1, warmup_s=0.3)
QUIET = 2  # whole slices before each change
CONNECTIONS = 32
REQUEST_ROWS = 100
MARGIN_S = 0.05  # a change begins and ends so far from a quiet slice, because the load's first slice begins a bit late
ROOM = 0.8  # no change begins in the last part of a step; one that lasts longer sees the next step begin
CAPTURED = 2000  # answers of each step that are checked
P99_RATIO_MAX = 1.5
STOOD_STILL_US = 10_000.0  # a slice whose generator, which runs ahead of all others, was later than this is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--quick", action="store_true", help="200,000 rows, 5 changes of each kind; ends in three minutes"
    )
    parser.add_argument("--changes", type=int, help="changes of each kind (50; 5 with --quick)")
    parser.add_argument("--folder", help="the place of the store")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("one CPU is too few: the server and the load need one each")
    if options.changes is not None and options.changes < 1:
        parser.error("--changes: at least 1")
    changes = options.changes or (QUICK_CHANGES if options.quick else CHANGES)
    try:
        with tempfile.TemporaryDirectory(prefix="shorttail-change-", dir=options.folder) as folder:
            figures = measure(Path(folder), changes, options.quick)
            figures["plan"] = change_plan.measure(Path(folder) / "plan", options.quick)
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    bars = bars_of(figures)
    if options.json:
        report.print_json(figures, bars)
        return
    for name, value in figures.items():
        print(f"{name}: {value}")
    report.print_bars(bars)


def bars_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    bars = [
        report.at_most("failed requests", figures["failed"], 0, "requests"),
        report.at_most("answers that are of neither state", figures["wrong"], 0, "answers"),
        report.at_most("pushed rows that are not there", figures["lost"], 0, "rows"),
        report.at_most("problems that verify finds", len(figures["problems"]), 0, "problems"),
        report.at_most("P99 in seconds with a change / in quiet ones", figures["p99_ratio"], P99_RATIO_MAX, "x"),
    ]
    for kind in KINDS:
        ratio = figures["kinds"][kind]["p99_ratio"]
        bars.append(report.at_most(f"P99 in seconds with a change / in quiet ones: {kind}", ratio, P99_RATIO_MAX, "x"))
    return bars + change_plan.bars_of(figures["plan"])


def measure(folder: Path, changes: int, quick: bool) -> dict[str, Any]:
    cpus = sorted(os.sched_getaffinity(0))
    layout = Layout(QUICK_ROWS if quick else ROWS)
    cycle, failures = Cycle(folder, layout), Failures()
    write_source(cycle.source, layout.rows)
    with st.Engine.open(folder / "store", create=True) as engine:
        engine.apply(cycle.start().definitions)
        engine.load("stats", str(cycle.source))
    with (
        loadgen.pinned(cpus[-1]),
        busy_cpu(),
        serving.start_server(folder / "store", folder / "log", "--p99-budget-ms", "1e6", cpu=cpus[0]) as (address, _),
        applier(folder / "store") as apply,
    ):
        checker, pusher = Checker(address, layout, failures), Pusher(address, layout, failures)
        pusher.push(layout.base + np.arange(PUSHED))  # their rows are later than those of the source
        driver = Driver(cycle, apply, checker, pusher, changes, QUICK_TIMES if quick else TIMES)
        plan, where = traffic(address, layout), target.find(address)
        capacity_per_s, steps = driver.run(plan, where)
        pusher.check(pusher.turns)
    problems = verify(folder / "store").problems
    checked = sum(check_captures(step, failures) for _, step in steps)
    quiet, by_kind, left_out = spells(steps, driver.made)
    changing = Histogram.empty()
    for kind in KINDS:
        changing.add(by_kind[kind])
    return {
        "rows": layout.rows,
        "capacity_per_s": capacity_per_s,
        "rate_per_s": capacity_per_s / 2,
        "seconds": sum(step.duration_s for _, step in steps),
        "requests": sum(step.due for _, step in steps),
        "errors": {code: each.message for _, step in steps for code, each in step.errors.items()},
        "failed": failures.counts["failed"] + sum(step.due - step.outcomes["good"] for _, step in steps),
        "wrong": failures.counts["wrong"],
        "lost": failures.counts["lost"],
        "failures": failures.first,
        "checked": checker.asked + checked,
        "pushes": pusher.pushes,
        "rows_pushed": len(pusher.turns),
        "problems": problems,
        "quiet": latency(quiet),
        "kinds": {kind: of_kind(driver.made, kind, found, quiet) for kind, found in by_kind.items()},
        "p99_ratio": ratio(changing, quiet),
        "slices": sum(len(step.slices) for _, step in steps),
        "slices_left_out": left_out,
        "generator_lag_p99_us": max(step.lag.percentile(99) for _, step in steps) / 1e3,
    }


def traffic(address: str, layout: Layout) -> Traffic:
    workload = Workload(predict="m", keys=[f"user_id=uniform:0:{layout.base - 1}"], rows=REQUEST_ROWS)
    with st.Client(address) as client:
        return plan_rpc(workload, client.models(), client.views())


def measure_capacity(plan: Traffic, where: target.Target) -> float:
    """Return the requests a second that are answered when each connection has one in flight."""
    closed = Load(connections=CONNECTIONS, pipeline=1, closed=True, duration_s=2.0, warmup_s=1.0, spin_us=0.0)
    with ahead():
        most = run_step(plan, where, closed, None)
    if fatal := most.fatal or most.outcomes["error"]:
        raise BenchError(f"the load could not be put on the server: {fatal}")
    return most.good_per_s


# -- making the changes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A change that was made, from begin_s to end_s of time.monotonic(). checked_s: when its answers were checked."""

    kind: str
    begin_s: float
    end_s: float
    checked_s: float


class Running:
    """A step of the load while it runs. start_s: of its first slice, of time.monotonic()."""

    def __init__(self, times: Times):
        self.start_s, self.slice_s = time.monotonic() + times.warmup_s, times.slice_s
        self.interrupts = Interrupts()

    def slice_from(self, when_s: float) -> int:
        """Return the number of the first slice that begins then or later."""
        return max(0, math.ceil((when_s - self.start_s) / self.slice_s))

    def wait_for(self, number: int, margin_s: float = 0.0) -> None:
        """Wait until a slice begins, and margin_s longer."""
        time.sleep(max(0.0, self.start_s + number * self.slice_s + margin_s - time.monotonic()))

    def end(self) -> None:
        """Let the load end; all answers are waited for."""
        self.interrupts.count = 1


class Driver:
    """Makes the changes, one after the other, under a load of several steps. made: those that are done."""

    def __init__(
        self,
        cycle: Cycle,
        apply: Callable[[State], None],
        checker: Checker,
        pusher: Pusher,
        cycles: int,
        times: Times,
    ):
        self.cycle, self.apply, self.checker, self.pusher = cycle, apply, checker, pusher
        self.cycles, self.times = cycles, times
        self.made: list[Change] = []
        self.ended = False
        self.running = Running(times)

    def run(self, plan: Traffic, where: target.Target) -> tuple[float, list[tuple[float, Step]]]:
        """Return the capacity, and the steps of the load. A step comes with the time at which its first slice began.

        The capacity is what the server answers beside the pushes and the checks, which go on all the time. The load is
        half of it.
        """
        load = Load(
            connections=CONNECTIONS,
            duration_s=self.times.slice_s * LIMITS.bench_intervals,
            warmup_s=self.times.warmup_s,
            timeout_s=10.0,
            verified=CAPTURED,
            spin_us=0.0,
        )
        steps, stop = [], threading.Event()
        self.running = Running(self.times)
        with ThreadPoolExecutor(3) as pool:
            working = [pool.submit(self.checker.run, stop), pool.submit(self.pusher.run, stop)]
            try:
                capacity_per_s = measure_capacity(plan, where)
                rate = Rate(capacity_per_s / 2, capacity_per_s / 2)
                changing = pool.submit(self.change_all)
                while not changing.done():
                    running = self.running = Running(self.times)
                    with ahead():
                        step = run_step(plan, where, load, rate, interrupts=running.interrupts)
                    if step.fatal:
                        raise BenchError(step.fatal)
                    steps.append((running.start_s, step))
            finally:
                self.ended = True
                stop.set()
            for future in (changing, *working):
                future.result()
        return capacity_per_s, steps

    def change_all(self) -> None:
        before = self.cycle.start()
        try:
            for number in range(self.cycles):
                for after in self.cycle.states(number):
                    self.wait_for_quiet()
                    if self.ended:
                        return
                    self.made.append(self.change(before, after))
                    before = after
                took_s = self.made[-1].checked_s - self.made[0].begin_s
                print(f"{number + 1} of {self.cycles} cycles in {took_s:.0f} s", file=sys.stderr, flush=True)
        finally:
            self.running.end()

    def wait_for_quiet(self) -> None:
        """Wait until QUIET whole slices of the load are over since the last change, in a step with room for another."""
        last_s = self.made[-1].checked_s + MARGIN_S if self.made else 0.0
        while not self.ended:
            running = self.running
            number = running.slice_from(last_s) + QUIET
            running.wait_for(number, MARGIN_S)
            if number <= ROOM * LIMITS.bench_intervals:
                return
            running.end()
            while self.running is running and not self.ended:
                time.sleep(MARGIN_S)

    def change(self, before: State, after: State) -> Change:
        """Make a change, and check that all is as it should be then."""
        begin_s = time.monotonic()
        self.checker.begin(before, after)
        if after.rows is None:
            self.apply(after)
        else:
            view, rows = after.rows
            self.checker.client.push(view, rows, partial=True)
            time.sleep(SEEN_S)
        end_s = time.monotonic()
        self.checker.end(after)
        self.checker.check_all()
        self.pusher.check_fresh()
        return Change(after.kind, begin_s, end_s, time.monotonic())


# -- what was measured -------------------------------------------------------------------------------------------------


def spells(steps: list[tuple[float, Step]], made: list[Change]) -> tuple[Histogram, dict[str, Histogram], int]:
    """Return the latency in quiet slices, in slices with a change by its kind, and how many slices are left out.

    A slice is left out if the machine stood still in it. A slice in which answers were only checked is in neither.
    """
    quiet, by_kind = Histogram.empty(), {change.kind: Histogram.empty() for change in made}
    left_out = 0
    for start_s, step in steps:
        for piece in step.slices:
            if piece.lag_max_us > STOOD_STILL_US:
                left_out += 1
                continue
            begin_s = start_s + piece.start_s - MARGIN_S
            end_s = begin_s + piece.length_s + 2 * MARGIN_S
            changing = [each.kind for each in made if each.begin_s < end_s and begin_s < each.end_s]
            if changing:
                by_kind[changing[0]].add(piece.latency)
            elif not any(each.begin_s < end_s and begin_s < each.checked_s for each in made):
                quiet.add(piece.latency)
    if not quiet.total:
        raise BenchError("no quiet second was measured")
    return quiet, by_kind, left_out


def of_kind(made: list[Change], kind: str, found: Histogram, quiet: Histogram) -> dict[str, Any]:
    seconds = [change.end_s - change.begin_s for change in made if change.kind == kind]
    return {"seconds": report.spread(seconds), **latency(found), "p99_ratio": ratio(found, quiet)}


def ratio(found: Histogram, quiet: Histogram) -> float:
    return found.percentile(99) / quiet.percentile(99)


def latency(found: Histogram) -> dict[str, float]:
    p50, p99 = found.at([50, 99])
    return {"requests": found.total, "p50_us": p50 / 1e3, "p99_us": p99 / 1e3, "max_us": found.max_ns / 1e3}


def check_captures(step: Step, failures: Failures) -> int:
    """Check the answers to the load that were kept. Returns their number."""
    for request, reply in step.captures:
        (asked,), (answered,) = unpack(request), unpack(reply)
        result = protocol.read_response(answered)[2]
        if result is None:
            continue  # it counts as failed
        keys = np.ravel(asked[3][1]["user_id"])
        (output,) = result["outputs"].values()
        wanted = features_of(keys)[:, :OF_MODEL].mean(axis=1)
        if not np.array_equal(np.ravel(output), wanted):
            failures.note("wrong", ("m", keys.tolist()), np.ravel(output).tolist(), wanted.tolist())
    return len(step.captures)


if __name__ == "__main__":
    main()
