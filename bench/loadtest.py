"""Measure the load generator itself: its throughput, its punctuality, and the accuracy of its figures.

    python bench/loadtest.py [--json] [--quick] [--rounds N]

The bare C echo (bench/c/echo.c) runs on one CPU, the generator on another. Measured are:

- the maximum requests/s of one thread, in an open loop far above its capacity and in a closed loop;
- its send lag at 10,000 requests/s: actual minus intended time;
- its percentiles against those of an independent client (bench/c/loadgen.c), both in an open loop of 10,000 requests/s
  at even intervals: in turn, half a second each, both spinning, because otherwise the median contains their wake-ups;
  and at the same time on the same CPU, both sleeping between requests, so that both see the stalls of the machine that
  decide P90 and P99;
- its percentiles against NumPy's on the raw times of the same run;
- a server that stalls for 200 ms every 10 s (every 2 s with --quick) at 1,000 requests/s: the reported P99 against the
  P99 calculated from the intended times, and the P99 that a closed loop reports for the same server.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed
import loadgen
import numpy as np
import report
from loadgen import BenchError

from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Workload, plan_raw, plan_rpc

REQUEST_BYTES, REPLY_BYTES = 120, 60
RATE_MIN = 100_000.0
LAG_P99_US_MAX = 100.0
AGREEMENT_MAX = 0.05
STALL_SHARE_MIN = 0.9
PACE_PER_S = 10_000
PACE = Rate(PACE_PER_S, PACE_PER_S)
FLOOD = Rate(1_000_000.0, 1_000_000.0)
COMPARED = ("p50_us", "p90_us", "p99_us")
IN_TURN, AT_ONCE = "in turn", "at the same time"
PAIRS, PAIR_S = 2, 0.5  # pairs of runs in turn, per second of a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; ends within 50 s")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of (7; 3 with --quick)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    duration_s = 1.0 if options.quick else 4.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = against_echo(Path(folder), rounds, duration_s)
        figures["stall"] = stall(2.0, 8.0) if options.quick else stall(10.0, 60.0)
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    bars = [
        report.at_least("requests/s, one thread, open loop", figures["open_per_s"]["median"], RATE_MIN, "1/s"),
        report.at_least("requests/s, one thread, closed loop", figures["closed_per_s"]["median"], RATE_MIN, "1/s"),
        report.at_most("send lag P99 at 10,000/s", figures["lag_p99_us"]["median"], LAG_P99_US_MAX, "us"),
        *(
            report.at_most(
                f"{name}: generator / independent client - 1, {way}", abs(ratio["median"] - 1), AGREEMENT_MAX, ""
            )
            for way, ratios in figures["agreement"].items()
            for name, ratio in ratios.items()
        ),
        report.at_most("percentiles: histogram / raw times - 1", figures["histogram_error"], 0.01, ""),
        report.at_least("P99 with stalls: reported / arithmetic", figures["stall"]["ratio"], STALL_SHARE_MIN, ""),
        report.at_most("P99 with stalls: closed loop / arithmetic", figures["stall"]["closed_ratio"], 0.5, ""),
    ]
    if options.json:
        report.print_json(figures, bars)
        return
    for name, value in figures.items():
        print(f"{name}: {value}")
    report.print_bars(bars)


def against_echo(folder: Path, rounds: int, duration_s: float) -> dict[str, Any]:
    """Measure everything in every round, so that other load on the machine affects all figures equally."""
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    loadgen.write_payload(folder / "blanks", [bytes(REQUEST_BYTES)])
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    load = Load(connections=16, duration_s=duration_s, warmup_s=0.3, raw_reply_bytes=REPLY_BYTES)
    with loadgen.start_echo(REQUEST_BYTES, REPLY_BYTES, server_cpu) as address:
        echo = target.find(address)
        plan = plan_raw(REQUEST_BYTES)

        def run(load: Load, rate: Rate | None) -> Step:
            with loadgen.pinned(client_cpu):  # its threads inherit the CPU
                step = run_step(plan, echo, load, rate)
            if step.fatal:
                raise BenchError(step.fatal)
            return step

        for _ in range(rounds):
            note("open_per_s", run(replace(load, pipeline=256), FLOOD).good_per_s)
            note("closed_per_s", run(replace(load, pipeline=16, closed=True), None).good_per_s)
            paced = run(replace(load, events=int(20_000 * duration_s)), PACE)
            for p, ns in zip(("p50", "p99", "p999"), paced.lag.at([50, 99, 99.9]), strict=True):
                note(f"lag_{p}_us", ns / 1e3)
            note("hiccup_p99_us", paced.hiccups.percentile(99) / 1e3)
            note("histogram_error", histogram_error(paced))
        agreement = compare_clients(run, address, folder / "blanks", client_cpu, rounds, duration_s)
    error = max(found.pop("histogram_error"))
    return {
        "request_bytes": REQUEST_BYTES,
        "reply_bytes": REPLY_BYTES,
        "pinned": server_cpu is not None,
        **{name: report.spread(values) for name, values in found.items()},
        "agreement": agreement,
        "histogram_error": error,
    }


def compare_clients(
    run: Callable[[Load, Rate], Step], address: str, payload: Path, cpu: int | None, rounds: int, duration_s: float
) -> dict[str, dict[str, Any]]:
    """Return {way: {percentile: the generator's / the independent client's}}."""
    load = Load(connections=16, warmup_s=0.1, raw_reply_bytes=REPLY_BYTES, poisson=False)
    awake = replace(load, duration_s=PAIR_S, spin_us=1000.0)
    asleep = replace(load, duration_s=duration_s, spin_us=0.0)

    def generator(load: Load) -> list[float]:
        return [ns / 1e3 for ns in run(load, PACE).latency.at([50, 90, 99])]

    def independent(load: Load) -> list[float]:
        figures = loadgen.run(
            address, payload, load.connections, load.duration_s, load.pipeline, load.warmup_s, cpu,
            raw_reply_bytes=REPLY_BYTES, per_s=PACE_PER_S, awake=load is awake,
        )  # fmt: skip
        return [figures[name] for name in COMPARED]

    pairs: dict[str, list[tuple[list[float], list[float]]]] = {IN_TURN: [], AT_ONCE: []}
    with ThreadPoolExecutor(1) as thread:
        for _ in range(rounds):
            for _ in range(int(PAIRS * duration_s)):
                pairs[IN_TURN].append((generator(awake), independent(awake)))
            other = thread.submit(independent, asleep)
            pairs[AT_ONCE].append((generator(asleep), other.result()))
    return {
        way: {name: report.spread([ours[i] / theirs[i] for ours, theirs in found]) for i, name in enumerate(COMPARED)}
        for way, found in pairs.items()
    }


def histogram_error(step: Step) -> float:
    """Return the largest relative difference between percentiles of the histogram and of the raw times."""
    took = (step.events["done_ns"] - step.events["intended_ns"]).astype(np.int64)
    exact = [np.percentile(took, p, method="inverted_cdf") for p in (50, 90, 99)]
    return max(abs(ns / raw - 1) for ns, raw in zip(step.latency.at([50, 90, 99]), exact, strict=True))


def stall(every_s: float, duration_s: float) -> dict[str, Any]:
    """Measure a Python server that sleeps for 200 ms at a time and records its stalls by its own clock."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))
    from fakes import MODELS, VIEWS, rpc_server

    plan = plan_rpc(Workload(predict="m", keys=["user_id=uniform:1:1000"]), MODELS, VIEWS)
    load = Load(connections=8, duration_s=duration_s, warmup_s=0.5, events=2_000_000)
    with rpc_server(stall_every_s=every_s, stall_s=0.2) as fake:
        step = run_step(plan, target.find(fake.address), load, Rate(1000.0, 1000.0))
        stalls = list(fake.stalls)
    with rpc_server(stall_every_s=every_s, stall_s=0.2) as fake:
        closed = replace(load, closed=True, connections=1, pipeline=1, events=0)
        missed = run_step(plan, target.find(fake.address), closed, None)
    due = step.events["intended_ns"] / 1e9
    waits = np.zeros(len(due))
    for start, end in stalls:
        waits = np.where((due >= start) & (due < end), end - due, waits)
    arithmetic_us = float(np.percentile(waits, 99)) * 1e6
    if not arithmetic_us:
        raise BenchError("fewer than one request in a hundred fell into a stall: the run shows nothing")
    reported_us, closed_us = step.latency.percentile(99) / 1e3, missed.latency.percentile(99) / 1e3
    return {
        "every_s": every_s,
        "stalls": len(stalls),
        "arithmetic_p99_us": arithmetic_us,
        "reported_p99_us": reported_us,
        "closed_loop_p99_us": closed_us,
        "ratio": reported_us / arithmetic_us,
        "closed_ratio": closed_us / arithmetic_us,
    }


if __name__ == "__main__":
    main()
