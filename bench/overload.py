"""Overload a server, and measure its goodput, the latency of its answers, and the cost of a refusal.

    python bench/overload.py [--json] [--quick] [--rounds N]

One worker has one CPU, the load generator another. In each round a closed loop measures the capacity. Then requests
arrive in an open loop at 0.5, 0.8, 1, 2 and 5 times the capacity, each with `deadline_ms`. Latency is that of good
answers, from the intended send time. Goodput is good answers per second, as a share of the round's capacity, because
the speed of the machine changes; its peak is the best step. Figures are medians of the rounds.

There are three loads. A neural network of a million weights (ONNX Runtime) gets one row per request: with less work,
one generator could not offer five times the capacity of the server. A forest of 100 trees ranks 500 candidates per
request, and a forest gets 200 rows per request at three times its capacity. `bench/bad_rows.py` is the fourth: requests
on which the model fails, beside good ones.

Every answer has to match a request in flight on its connection; samples are compared with the answers of the embedded
engine. The measures of the largest overload are:

- Recovery: the time from its last request until the P99 of windows of 100 ms, at 0.8 times the capacity, is within 1.5
  times the P99 of the step at 0.8.
- The cost of a rejection: the worker's CPU time, minus that of the good answers at their cost in the closed loop,
  divided by the number of rejections.
- `receiving_us`: the time that a C program takes per request that it only reads (bench/c/sink.c). `free_goodput` is the
  goodput of a server for which a refusal costs only that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import installed
import loadgen
import numpy as np
import onnx
import report
from loadgen import BenchError
from micro import forest as forests
from onnx import TensorProto, helper, numpy_helper
from serving import start_server, worker_of

import shorttail as st
from shorttail.client import calls
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_rpc
from shorttail.loadtest.verify import unpack

USERS = 10_000
TIMES = {"network": (0.5, 0.8, 1.0, 2.0, 5.0), "forest": (0.5, 0.8, 1.0, 2.0, 5.0), "rows_200": (0.5, 0.8, 1.0, 3.0)}
ROUNDS, SECONDS = 5, 4.0  # 20 s per step in total
DEADLINE_MS = 100.0
HIDDEN = 1024
ROWS = {"network": 1, "forest": 500, "rows_200": 200}
IN_FLIGHT = {"network": 16, "forest": 2, "rows_200": 4}  # per connection in the closed loop; together a few ms of work
CONNECTIONS = 8
WINDOW_S = 0.1
VERIFIED = 100
GOODPUT_MIN = {"network": 0.9, "forest": 0.9, "rows_200": 0.85}
P99_RATIO_MAX = 2.0
RECOVERED_RATIO = 1.5
RECOVERY_S_MAX = 1.0
REJECTION_MAX = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="one round of steps of 1.5 s; ends within 50 s")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of (5; 1 with --quick)")
    parser.add_argument("--model", choices=sorted(ROWS), action="append", help="only this model")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    seconds = 1.5 if options.quick else SECONDS
    forests.training_rows = forests.QUICK_TRAINING_ROWS
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = {name: measure(Path(folder), name, rounds, seconds) for name in options.model or ROWS}
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    bars = [bar for name, figure in figures.items() for bar in bars_of(name, figure)]
    if options.json:
        report.print_json(figures, bars)
        return
    for name, figure in figures.items():
        show(name, figure)
    report.print_bars(bars)


def bars_of(name: str, figure: dict[str, Any]) -> list[dict[str, Any]]:
    steps = {step["times"]: step for step in figure["steps"]}
    over = [steps[times] for times in TIMES[name] if times > 1]
    calm_us = steps[0.8]["p99_us"]["median"]
    return [
        *(
            report.at_least(
                f"{name}: goodput at {step['times']:g} x / peak",
                step["goodput"]["median"] / figure["peak_goodput"],
                GOODPUT_MIN[name],
                "x",
            )
            for step in over
        ),
        *(
            report.at_most(
                f"{name}: P99 at {step['times']:g} x / at 0.8 x", step["p99_us"]["median"] / calm_us, P99_RATIO_MAX, "x"
            )
            for step in over
        ),
        *(
            report.at_most(f"{name}: P99 at {step['times']:g} x", step["p99_us"]["median"] / 1e3, DEADLINE_MS, "ms")
            for step in over
        ),
        report.at_most(
            f"{name}: recovery after {TIMES[name][-1]:g} x", figure["recovery_s"]["median"], RECOVERY_S_MAX, "s"
        ),
        report.at_most(f"{name}: a rejection / a service", figure["rejection_ratio"]["median"], REJECTION_MAX, "x"),
        report.at_most(f"{name}: wrong answers", figure["wrong_answers"], 0, "answers"),
    ]


@dataclass(frozen=True, slots=True)
class Bench:
    """A Bench is a server under load: its address, its requests, and the CPU of the generator."""

    plan: Traffic
    times: tuple[float, ...]  # the steps, as multiples of the capacity
    where: target.Target
    worker: int
    cpu: int | None
    load: Load

    def run(self, load: Load, per_s: float | None) -> Step:
        with loadgen.pinned(self.cpu):  # its threads inherit the CPU
            step = run_step(self.plan, self.where, load, None if per_s is None else Rate(per_s, per_s))
        if step.fatal and not step.counts["wrong_answers"]:
            raise BenchError(step.fatal)
        return step

    def run_and_count(self, load: Load, per_s: float | None) -> tuple[Step, float]:
        """Run a step, and add the worker's CPU seconds per second of the step."""
        load = replace(load, warmup_s=0.0)
        before_s, start_s = cpu_seconds(self.worker), time.monotonic()
        step = self.run(load, per_s)
        return step, (cpu_seconds(self.worker) - before_s) / (time.monotonic() - start_s)


def measure(folder: Path, name: str, rounds: int, seconds: float) -> dict[str, Any]:
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    model = folder / f"{name}.onnx"
    model.write_bytes(network() if name == "network" else forests.MODELS["lightgbm-100x31"]())
    store = make_store(folder / name, model, "score" if name == "network" else "probabilities")
    workload = Workload(predict="m", keys=[f"user_id=uniform:0:{USERS - 1}"], rows=ROWS[name], deadline_ms=DEADLINE_MS)
    with st.Engine.open(store) as engine:
        plan = plan_rpc(workload, engine.models(), engine.views())
        runs = engine.models()[0]["runs"]
        (expected,) = engine.predict("m", {"user_id": np.arange(USERS)}).outputs.values()
    load = Load(connections=CONNECTIONS, pipeline=4096, duration_s=seconds, warmup_s=min(1.0, seconds), timeout_s=2.0)
    with start_server(store, folder / "log", cpu=server_cpu) as (address, server):
        bench = Bench(plan, TIMES[name], target.find(address), worker_of(server), client_cpu, load)
        closed = replace(load, closed=True, pipeline=IN_FLIGHT[name], duration_s=min(2.0, seconds))
        bench.run(closed, None)
        taken = [take_round(bench, closed, expected) for _ in range(rounds)]
        worst = [one.steps[TIMES[name][-1]] for one in taken]
        request_bytes = round(np.mean([len(asked) for step in worst for asked, _ in step.captures]))
        receiving_us = loadgen.receiving_us(request_bytes, worst[-1].offered_per_s, (server_cpu, client_cpu))
    steps = [{"times": times, **describe([one.steps[times] for one in taken], taken)} for times in TIMES[name]]
    service_us = report.spread([one.service_us for one in taken])
    return {
        "runs": runs,
        "rows": ROWS[name],
        "request_bytes": request_bytes,
        "deadline_ms": DEADLINE_MS,
        "pinned": server_cpu is not None,
        "capacity_per_s": report.spread([one.capacity_per_s for one in taken]),
        "steps": steps,
        "peak_goodput": max(step["goodput"]["median"] for step in steps),
        "wrong_answers": sum(one.wrong for one in taken),
        "service_us": service_us,
        "rejection_us": report.spread([one.rejection_us for one in taken]),
        "rejection_ratio": report.spread([one.rejection_us / one.service_us for one in taken]),
        "receiving_us": receiving_us,
        "free_goodput": max(0.0, 1 - (TIMES[name][-1] - 1) * receiving_us / service_us["median"]),
        "recovery_s": report.spread([one.recovery_s for one in taken]),
    }


@dataclass(frozen=True, slots=True)
class Round:
    capacity_per_s: float
    service_us: float
    steps: dict[float, Step]
    wrong: int
    rejection_us: float
    recovery_s: float


def take_round(bench: Bench, closed: Load, expected: Any) -> Round:
    most, busy = bench.run_and_count(closed, None)
    if most.outcomes["error"] or not most.outcomes["good"]:
        raise BenchError(f"the load could not be put on the server: {most.errors}")
    capacity_per_s, service_us = most.good_per_s, busy / most.good_per_s * 1e6
    steps, wrong = {}, 0
    for times in bench.times:
        step = steps[times] = bench.run(replace(bench.load, verified=VERIFIED), times * capacity_per_s)
        wrong += step.counts["wrong_answers"] + sum(is_wrong(pair, expected) for pair in step.captures)
    rejection_us = cost_of_rejection(bench, bench.times[-1] * capacity_per_s, service_us)
    calm_us = steps[0.8].latency.percentile(99) / 1e3
    return Round(capacity_per_s, service_us, steps, wrong, rejection_us, recovery(bench, capacity_per_s, calm_us))


def is_wrong(pair: tuple[bytes, bytes], expected: Any) -> bool:
    """Whether an answer differs from the expected one of its users. expected: [users, ...]."""
    asked, answered = (unpack(message) for message in pair)
    users = np.ravel(asked[3][1]["user_id"])
    (output,) = calls.read_prediction("m", answered[3]).outputs.values()
    return not np.allclose(output, expected[users], rtol=1e-4, atol=1e-6)


def describe(steps: list[Step], rounds: list[Round]) -> dict[str, Any]:
    """Summarize the same step of all rounds."""
    rejected: Counter[str] = Counter()
    for step in steps:
        rejected.update({code: error.count for code, error in step.errors.items()})
    latency = {
        f"p{str(percent).replace('.', '')}_us": report.spread(
            [step.latency.percentile(percent) / 1e3 for step in steps]
        )
        for percent in (50, 99, 99.9)
    }
    return {
        "offered_per_s": report.spread([step.offered_per_s for step in steps]),
        "good_per_s": report.spread([step.good_per_s for step in steps]),
        "goodput": report.spread(
            [step.good_per_s / one.capacity_per_s for step, one in zip(steps, rounds, strict=True)]
        ),
        **latency,
        **{outcome: sum(step.outcomes[outcome] for step in steps) for outcome in steps[0].outcomes},
        "rejected": dict(rejected),
        "lag_p99_us": report.spread([step.lag.percentile(99) / 1e3 for step in steps]),
        "hiccup_p999_us": report.spread([step.hiccups.percentile(99.9) / 1e3 for step in steps]),
        "compared": sum(len(step.captures) for step in steps),
    }


def cost_of_rejection(bench: Bench, per_s: float, service_us: float) -> float:
    """Return the CPU microseconds of the worker per rejection."""
    step, busy = bench.run_and_count(replace(bench.load, duration_s=min(2.0, bench.load.duration_s)), per_s)
    rejected = step.outcomes["error"]
    if not rejected:
        raise BenchError(f"nothing was rejected at {bench.times[-1]:g} times the capacity")
    return max(0.0, busy * step.seconds * 1e6 - step.outcomes["good"] * service_us) / rejected


def recovery(bench: Bench, capacity_per_s: float, calm_us: float) -> float:
    """Return the recovery time in seconds. It includes the generator's switch from one load to the other."""
    seconds, rates = min(2.0, bench.load.duration_s), (bench.times[-1] * capacity_per_s, 0.8 * capacity_per_s)
    load = replace(bench.load, duration_s=seconds, warmup_s=0.0)
    flood = bench.run(replace(load, events=int(seconds * rates[0] * 1.2)), rates[0])
    calm = bench.run(replace(load, events=int(seconds * rates[1] * 1.2)), rates[1])
    ended_ns = int(flood.events["intended_ns"].max())
    good = calm.events[calm.events["outcome"] == 0]
    since_s = (good["intended_ns"].astype(np.int64) - ended_ns) / 1e9
    took_us = (good["done_ns"] - good["intended_ns"]) / 1e3
    begun_s, found = float(since_s.min()), 0.0
    for n in range(int(seconds / WINDOW_S)):
        window = took_us[(since_s >= begun_s + n * WINDOW_S) & (since_s < begun_s + (n + 1) * WINDOW_S)]
        if len(window) and np.percentile(window, 99) <= RECOVERED_RATIO * calm_us:
            return begun_s + n * WINDOW_S
        found = begun_s + (n + 1) * WINDOW_S
    return found


def network() -> bytes:
    """Make a network with 32 inputs, two hidden layers and one score; the weights are random."""
    widths, random = (forests.WIDTH, HIDDEN, HIDDEN, 1), np.random.default_rng(0)
    nodes, weights, at = [], [], "X"
    for layer, (inputs, outputs) in enumerate(pairwise(widths)):
        drawn = random.normal(scale=inputs**-0.5, size=(inputs, outputs)).astype(np.float32)
        weights += [numpy_helper.from_array(drawn, f"w{layer}")]
        weights += [numpy_helper.from_array(np.zeros(outputs, np.float32), f"b{layer}")]
        last = layer == len(widths) - 2
        nodes.append(helper.make_node("Gemm", [at, f"w{layer}", f"b{layer}"], [f"g{layer}"]))
        at = "score" if last else f"r{layer}"
        nodes.append(helper.make_node("Sigmoid" if last else "Relu", [f"g{layer}"], [at]))
    ends = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, widths[0]])]
    ends += [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])]
    graph = helper.make_graph(nodes, "network", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def make_store(folder: Path, model: Path, output: str) -> Path:
    rows = np.random.default_rng(0).normal(size=(USERS, forests.WIDTH)).astype(np.float32)
    names = [f"f{i}" for i in range(forests.WIDTH)]
    user = st.Entity("user", keys={"user_id": st.Int64})
    view = st.FeatureView("stats", entity=user, features=[st.Feature(name, st.Float32) for name in names])
    with st.Engine.open(folder, create=True) as engine:
        engine.apply([user, view, st.Model("m", str(model), [f"stats:{name}" for name in names], outputs=[output])])
        engine.push("stats", {"user_id": np.arange(USERS), **{name: rows[:, i] for i, name in enumerate(names)}})
    return folder


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(name: str, figure: dict[str, Any]) -> None:
    capacity_per_s = figure["capacity_per_s"]["median"]
    print(f"{name}: {figure['rows']} rows per request, {capacity_per_s:,.0f} requests/s in a closed loop")
    for step in figure["steps"]:
        print(
            f"  {step['times']:3g} x  offered {step['offered_per_s']['median']:9,.0f}/s  good"
            f" {step['good_per_s']['median']:8,.0f}/s  P50 {step['p50_us']['median'] / 1e3:7.2f} ms"
            f"  P99 {step['p99_us']['median'] / 1e3:7.2f} ms  {step['rejected'] or ''}"
            f"  (send lag P99 {step['lag_p99_us']['median'] / 1e3:.2f} ms,"
            f" hiccups P99.9 {step['hiccup_p999_us']['median'] / 1e3:.2f} ms)"
        )
    print(
        f"  a request takes {figure['service_us']['median']:.1f} us of CPU, a rejection"
        f" {figure['rejection_us']['median']:.2f} us, of which receiving it {figure['receiving_us']:.2f} us (goodput at"
        f" {TIMES[name][-1]:g} x if nothing else: {figure['free_goodput']:.2f}); recovered"
        f" {figure['recovery_s']['median']:.2f} s after {TIMES[name][-1]:g} x"
    )


if __name__ == "__main__":
    main()
