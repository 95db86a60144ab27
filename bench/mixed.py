"""Measure how pushes affect the latency of predictions.

    python bench/mixed.py [--json] [--quick] [--rounds N] [--seconds S]

The benchmark uses the data and the model of the scenario "fraud". One server (worker and writer) has one set of CPUs,
the generator of `shorttail bench --mix` another. A closed loop finds the peak rate of predictions. Then predictions
arrive in an open loop at a quarter of that rate, together with 0, 50 and 250 pushes per second. A push is one row of 24
features and is answered when it is durable. Keys of both follow Zipf 0.99, so the rows that are read most are also
written most.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed
import compare
import loadgen
import report
import rivals

import shorttail as st
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, plan_rpc

SCENARIO, VIEW = "fraud", "activity"
SHARE_OF_PEAK = 0.25
PUSHES_PER_S = (0, 50, 250)
CONNECTIONS, IN_FLIGHT = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="number of rounds (5; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="seconds per measurement (5; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small data, one round; ends within 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        parser.error("one CPU is too few: the server and the load need one each")
    rounds, seconds = options.rounds or (1 if options.quick else 5), options.seconds or (2.0 if options.quick else 5.0)
    try:
        with tempfile.TemporaryDirectory(prefix="shorttail-mixed-") as folder:
            run = compare.Run(SCENARIO, Path(folder), options.quick, seconds, {cpus[0]}, {cpus[1]}, redis_url="")
            with compare.own_server(run) as own:
                figures = measure(run, own["rpc"], rounds)
    except (loadgen.BenchError, ShorttailError, rivals.Unusable) as error:
        raise SystemExit(f"error: {error}") from None
    if options.json:
        report.print_json(figures, [])
        return
    for pushes, found in figures["mixes"].items():
        print(f"{pushes:>6} pushes/s: " + ", ".join(f"{k} {v['median']:,.0f}" for k, v in found.items()))


def measure(run: compare.Run, address: str, rounds: int) -> dict[str, Any]:
    """Measure every mix in rounds, at one rate of predictions."""
    peak = run.peak(run.rpc(address), address)
    rate = SHARE_OF_PEAK * float(peak["good_per_s"])
    plans = {pushes: plan_of(run, address, pushes / rate) for pushes in PUSHES_PER_S}
    found: dict[int, list[dict[str, float]]] = {pushes: [] for pushes in PUSHES_PER_S}
    for number in range(rounds):
        for pushes in PUSHES_PER_S[:: 1 if number % 2 == 0 else -1]:
            found[pushes].append(of_step(drive(run, plans[pushes], address, rate + pushes)))
    return {
        "server_cpus": 1,
        "rounds": rounds,
        "seconds": run.seconds,
        "peak_per_s": peak["good_per_s"],
        "predictions_per_s": rate,
        "mixes": {
            str(pushes): {name: report.spread([entry[name] for entry in entries]) for name in entries[0]}
            for pushes, entries in found.items()
        },
    }


def plan_of(run: compare.Run, address: str, share: float) -> Traffic:
    """Return the plan of a mix. share: pushes per prediction."""
    workload = replace(run.workload, predict=SCENARIO)
    if share:
        workload = replace(workload, push=VIEW, overwrite=True, mix={"predict": 1.0, "push": share})
    with st.Client(address) as client:
        return plan_rpc(workload, client.models(), client.views())


def drive(run: compare.Run, plan: Traffic, address: str, rate: float) -> Step:
    load = Load(connections=CONNECTIONS, pipeline=IN_FLIGHT, duration_s=run.seconds, warmup_s=compare.WARMUP_S)
    with rivals.pinned(run.client):
        step = run_step(plan, target.find(address), load, Rate(rate, rate))
    if step.fatal or not step.outcomes["good"]:
        raise rivals.Unusable(f"under load: {step.fatal or step.outcomes}")
    return step


def of_step(step: Step) -> dict[str, float]:
    """Return the latencies of a step in us, from the intended send time."""
    found = {"bad": float(step.due - step.outcomes["good"])}
    for kind, latency in (step.by_kind or {"predict": step.latency}).items():
        p50_ns, p99_ns = latency.at([50, 99])
        found[f"{kind}_per_s"] = latency.total / step.seconds
        found |= {f"{kind}_p50_us": p50_ns / 1e3, f"{kind}_p99_us": p99_ns / 1e3}
    return found


if __name__ == "__main__":
    main()
