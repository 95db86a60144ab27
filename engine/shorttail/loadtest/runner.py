"""Runs a step of a load test: generator threads, a thread that measures the machine's noise, the live line, Ctrl-C."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Final, Self

from shorttail._native.loadtest import Generator, Hiccups
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, Unavailable
from shorttail.loadtest.histogram import Histogram
from shorttail.loadtest.rates import Objective, Rate
from shorttail.loadtest.result import HICCUP_SLICE_NS, Step, collect
from shorttail.loadtest.target import Target
from shorttail.loadtest.traffic import Traffic

POLL_S: Final = 0.1
SLICE_MIN_S: Final = 0.1
SEARCH_PRECISION: Final = 1.05  # a capacity is found within 5%
CONFIRM_TRIES: Final = 6
NOISE_TRIES: Final = 3

ShowLine = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent. pipeline: most requests in flight on a connection. verified: answers to sample.

    raw_reply_bytes: size of an answer of an echo server, 0 for other servers. events: requests to record one by one.
    """

    connections: int = 16
    pipeline: int = 64
    closed: bool = False
    poisson: bool = True
    duration_s: float = 10.0
    warmup_s: float = 1.0
    timeout_s: float = 5.0
    threads: int = 1
    seed: int = 0
    spin_us: float = 50.0
    verified: int = 0
    raw_reply_bytes: int = 0
    events: int = 0

    def check(self, protocol: str) -> None:
        """Raise InvalidArgument for options that cannot be run. protocol: "msgpack" or "http"."""
        if self.threads > self.connections:
            raise InvalidArgument(f"--threads {self.threads}: more than --connections {self.connections}")
        pipeline = 1 if protocol == "http" else self.pipeline
        if self.connections * pipeline > LIMITS.bench_in_flight:
            raise InvalidArgument(
                f"--connections {self.connections:,} times {pipeline:,} requests in flight are more than "
                f"{LIMITS.bench_in_flight:,}; reduce one of them"
            )


def intervals_of(duration_s: float) -> int:
    return max(1, min(LIMITS.bench_intervals, int(duration_s / SLICE_MIN_S)))


def make_generators(plan: Traffic, target: Target, load: Load, rate: Rate | None) -> list[Generator]:
    """Return a generator for each thread. Rate and connections are divided among them."""
    shares = [load.connections // load.threads + (i < load.connections % load.threads) for i in range(load.threads)]
    expected = (rate.mean if rate else 1000.0) * load.duration_s / load.threads
    return [
        Generator(
            protocol="raw" if load.raw_reply_bytes else target.protocol,
            sockaddr=target.sockaddr,
            templates=plan.templates,
            columns=plan.columns,
            groups=plan.groups,
            connections=connections,
            pipeline=1 if target.protocol == "http" else load.pipeline,
            closed_loop=load.closed,
            poisson=load.poisson,
            rate_from=rate.start / load.threads if rate else 1.0,
            rate_to=rate.end / load.threads if rate else 1.0,
            phase=i / load.threads,
            warmup_ns=round(load.warmup_s * 1e9),
            duration_ns=round(load.duration_s * 1e9),
            timeout_ns=round(load.timeout_s * 1e9),
            intervals=intervals_of(load.duration_s),
            spin_ns=round(load.spin_us * 1e3),
            seed=load.seed * LIMITS.bench_threads + i,
            raw_reply_bytes=load.raw_reply_bytes,
            capture_every=max(1, int(expected / (load.verified / load.threads))) if load.verified else 1,
            captures=-(-load.verified // load.threads),
            events=load.events,
        )
        for i, connections in enumerate(shares)
    ]


def run_generator(generator: Generator, ended: threading.Event) -> None:
    try:
        generator.run()
    finally:
        ended.set()


class Interrupts:
    """Counts each Ctrl-C of a `with` block, instead of a KeyboardInterrupt, which would lose the results of the steps.

    Only where Ctrl-C would raise KeyboardInterrupt: in the main thread, with Python's own handler.
    """

    def __init__(self) -> None:
        self.count = 0
        self._counts = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        self._counts = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._counts:
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._counts:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_step(
    plan: Traffic,
    target: Target,
    load: Load,
    rate: Rate | None,
    show_line: ShowLine | None = None,
    interrupts: Interrupts | None = None,
) -> Step:
    """Send a load at a rate (None: closed loop) until its end.

    Ctrl-C stops sending and waits for the answers; a second Ctrl-C ends the step at once. show_line: called several
    times per second with the live line. interrupts: of all steps together, entered. Raises Unavailable if the server
    accepts no connections.
    """
    if interrupts is None:
        with Interrupts() as interrupts:
            return run_step(plan, target, load, rate, show_line, interrupts)
    generators = make_generators(plan, target, load, rate)
    planned_s = load.warmup_s + load.duration_s + load.timeout_s + 10
    hiccups = Hiccups(slice_ns=HICCUP_SLICE_NS, slices=int(planned_s * 1e9 / HICCUP_SLICE_NS))
    ended = [threading.Event() for _ in generators]
    threads = [
        threading.Thread(target=run_generator, args=pair, daemon=True) for pair in zip(generators, ended, strict=True)
    ]
    sampler = threading.Thread(target=hiccups.run, daemon=True)
    for thread in (sampler, *threads):
        thread.start()
    while running := [event for event in ended if not event.is_set()]:
        running[0].wait(POLL_S)
        if show_line is not None:
            show_line(live_line(generators, load))
        if interrupts.count:
            for generator in generators:
                generator.stop(interrupts.count > 1)
        if any(generator.progress()["failed"] for generator in generators):
            for generator in generators:
                generator.stop(True)
    hiccups.stop()
    sampler.join()
    if fatal := next((r["fatal"] for g in generators if not (r := g.results())["start_ns"] and r["fatal"]), ""):
        raise Unavailable(f"{target.text}: {fatal}")
    return collect(rate, generators, [template.name for template in plan.templates], hiccups, interrupts.count > 0)


def live_line(generators: Sequence[Generator], load: Load) -> str:
    """Return "3.2 s of 10 s  10,002 good/s  0 bad  P50 85 us  P99 240 us  12 in flight".

    The percentiles are those of about the last second.
    """
    states = [generator.progress() for generator in generators]
    if not all(state["running"] for state in states):
        return "connecting"
    now_ns = time.monotonic_ns()
    elapsed_s = (now_ns - states[0]["warm_ns"]) / 1e9
    if elapsed_s < 0:
        return f"warming up, {-elapsed_s:.1f} s"
    good, bad = sum(s["good"] for s in states), sum(s["error"] + s["timeout"] + s["lost"] for s in states)
    count = intervals_of(load.duration_s)
    current = min(int(elapsed_s / load.duration_s * count), count - 1)
    recent = Histogram.merged(g.interval_latency(i) for g in generators for i in {max(current - 1, 0), current})
    p50, p99 = recent.at([50, 99])
    in_flight = sum(s["in_flight"] for s in states)
    return (
        f"{min(elapsed_s, load.duration_s):.1f} s of {load.duration_s:g} s  {good / max(elapsed_s, 1e-3):,.0f} good/s  "
        f"{bad:,} bad  P50 {p50 / 1e3:,.0f} us  P99 {p99 / 1e3:,.0f} us  {in_flight:,} in flight"
    )


class LiveLine:
    """Shows a line on stderr that each call overwrites, if stderr is a terminal."""

    def __init__(self) -> None:
        self._prefix = ""
        self._shown = 0
        self._is_terminal = sys.stderr.isatty()

    def begin(self, prefix: str) -> None:
        """Put this before every text from now on."""
        self._prefix = prefix

    def __call__(self, text: str) -> None:
        if self._is_terminal:
            line = f"{self._prefix}{text}"
            sys.stderr.write("\r" + line.ljust(self._shown))
            sys.stderr.flush()
            self._shown = len(line)

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            sys.stderr.flush()
            self._shown = 0


@dataclass(slots=True)
class Capacity:
    """The highest rate that met the objective, and why the search ended."""

    objective: Objective
    rate_per_s: float
    reason: str


def find_capacity(
    run: Callable[[Rate, float], Step], objective: Objective, start_per_s: float, step_s: float
) -> tuple[Capacity, list[Step]]:
    """Find the highest rate that meets the objective.

    Double the rate until the objective is missed, halve the gap until it is 5%, and confirm the result with a step that
    is twice as long. run: runs a step at a rate for a duration in seconds. Each step is long enough for
    100 / (1 - percentile) answers. Returns the capacity and all steps.
    """
    steps: list[Step] = []

    def try_rate(per_s: float, seconds: float) -> bool:
        for _ in range(NOISE_TRIES):
            steps.append(run(Rate(per_s, per_s), max(seconds, 1.1 * objective.samples / per_s)))
            met, noise_ns = steps[-1].meets(objective), steps[-1].lag.percentile(objective.percentile)
            if met or steps[-1].fatal or steps[-1].interrupted or noise_ns < objective.limit_s * 1e9 / 4:
                break  # else the generator itself was delayed enough to cause the miss: try again
        return met

    def ended() -> str:
        last = steps[-1]
        if last.fatal:
            return last.fatal
        if last.interrupted:
            return "interrupted"
        return "" if last.generator_kept_up or last.kept_up else "the generator could not offer more"

    low, high, rate = 0.0, 0.0, start_per_s
    while not high or (high > SEARCH_PRECISION * low and high > 1):
        met = try_rate(rate, step_s)
        if steps[-1].fatal or steps[-1].interrupted:
            return Capacity(objective, low, ended()), steps
        low, high = (rate, high) if met else (low, rate)
        if high and low:
            rate = (low * high) ** 0.5
        elif 2 * rate > LIMITS.bench_rate_per_s:
            return Capacity(objective, low, "no higher rate can be asked for"), steps
        else:
            rate = rate * 2 if met else rate / 2
    reason = ended() or f"{objective} is missed above"
    for _ in range(CONFIRM_TRIES):
        if not low or try_rate(low, 2 * step_s) or steps[-1].fatal or steps[-1].interrupted:
            break
        low /= SEARCH_PRECISION
    return Capacity(objective, low, reason), steps


def new_seed() -> int:
    return secrets.randbelow(2**31)
