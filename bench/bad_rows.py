"""Good requests beside requests on which the model fails: a part of bench/overload.py.

    python bench/bad_rows.py [--json] [--quick] [--rounds N]

One worker has one CPU, the load generators another. Two models look an item up in a table and work on its row: one
takes about 10 us a row, one about 1 ms. An item that is not in the table makes the run fail, and with it the batch that
it shares with good requests. A closed loop of good requests measures the capacity. Then half of it arrives in an open
loop, of which 10% or 50% is bad: from one sender, on a connection of its own, or from the address of the good ones. In
turn, the same good requests arrive alone. Every good request has to be answered, and rightly.

Beside them a third model, a small one, gets a tenth of the rate of its closed loop: with the bad requests, and alone.
Bad requests draw from 1,000 items; with --distinct, hardly one is like another.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import installed
import loadgen
import numpy as np
import onnx
import onnxruntime
import report
from loadgen import BenchError
from onnx import TensorProto, helper, numpy_helper
from serving import start_server

import shorttail as st
from shorttail.client import calls
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_rpc
from shorttail.loadtest.verify import unpack

ITEMS, WIDTH = 1000, 1024
ROW_US = {"row_10us": 10.0, "row_1ms": 1000.0}
SHARES = (0.1, 0.5)
SENDERS = ("one", "all")
ROUNDS, SECONDS = 3, 4.0
GOODPUT_MIN = 0.8  # with 10% bad requests, of what the same good requests have alone
OTHER_LOAD = 0.1  # of what its closed loop reaches, which has far larger batches than an open loop
OTHER_MIN = 0.8  # of the other model's goodput alone
VERIFIED = 100
DEADLINE_MS = 1000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="one round of steps of 1 s; ends within 50 s")
    parser.add_argument("--distinct", action="store_true", help="bad requests that do not repeat")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of (3; 1 with --quick)")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), rounds, 1.0 if options.quick else SECONDS, options.distinct)
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    if options.json:
        report.print_json(figures, bars_of(figures))
        return
    show(figures)
    report.print_bars(bars_of(figures))


def bars_of(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    bars = []
    for name, model in figures.items():
        for case in model["cases"]:
            what = f"{name}, {case['share']:.0%} bad from {case['sender']}"
            bars.append(report.at_most(f"{what}: good requests failed or wrong", case["harmed"], 0, "requests"))
            if case["share"] == SHARES[0]:
                goodput = case["goodput"]["median"]
                bars.append(report.at_least(f"{what}: goodput / that without bad ones", goodput, GOODPUT_MIN, "x"))
            bars.append(report.at_least(f"{what}: the other model / alone", case["other"]["median"], OTHER_MIN, "x"))
    return bars


@dataclass(frozen=True, slots=True)
class Source:
    """A generator of requests of one kind: its traffic, where it goes, and its rate."""

    plan: Traffic
    where: target.Target
    load: Load
    per_s: float


def run(sources: Mapping[str, Source], cpu: int | None) -> dict[str, Step]:
    """Send the requests of all sources at the same time."""
    steps: dict[str, Step] = {}
    failed: list[BaseException] = []

    def send(name: str, source: Source) -> None:
        try:
            with loadgen.pinned(cpu):
                rate = Rate(source.per_s, source.per_s) if source.per_s else None
                steps[name] = run_step(source.plan, source.where, source.load, rate)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=send, args=each) for each in sources.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    for name, step in steps.items():
        if step.fatal:
            raise BenchError(f"{name}: {step.fatal}")
    return steps


def measure(folder: Path, rounds: int, seconds: float, distinct: bool = False) -> dict[str, Any]:
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    store = make_store(folder)
    figures = {}
    for name in ROW_US:
        cases = []
        for share in SHARES:
            for sender in SENDERS:
                uds = folder / f"{name}-{share}-{sender}.sock"
                # A server of its own, because senders of bad rows are remembered.
                with start_server(store, folder / "log", "--uds", str(uds), cpu=server_cpu) as (address, _):
                    bench = Bench(name, address, f"unix:{uds}", client_cpu, seconds, distinct)
                    cases.append(summary([bench.case(share, sender) for _ in range(rounds)]))
        figures[name] = {"cases": cases}
    return figures


class Bench:
    """A server under load."""

    def __init__(self, name: str, address: str, uds: str, cpu: int | None, seconds: float, distinct: bool):
        with st.Client(address) as client:
            models, views = client.models(), client.views()

        def plan(model: str, first: int, last: int) -> Traffic:
            workload = Workload(predict=model, keys=[f"item=uniform:{first}:{last}"], deadline_ms=DEADLINE_MS)
            return plan_rpc(workload, models, views)

        warmup_s = min(0.5, seconds)
        self.load = Load(
            connections=8, pipeline=4096, duration_s=seconds, warmup_s=warmup_s, timeout_s=5.0, spin_us=0.0
        )
        self.closed = replace(self.load, closed=True, pipeline=16, duration_s=min(2.0, seconds))
        self.tcp, self.unix, self.cpu = target.find(address), target.find(uds), cpu
        self.good, self.other = plan(name, 0, ITEMS - 1), plan("other", 0, ITEMS - 1)
        self.bad = plan(name, 10 * ITEMS, 10 * ITEMS + (1 << 40 if distinct else ITEMS))

    def case(self, share: float, sender: str) -> dict[str, Any]:
        """Measure the good requests and the other model, with the bad ones and without."""
        cpu, tcp = self.cpu, self.tcp
        capacity_per_s = run({"good": Source(self.good, tcp, self.closed, 0.0)}, cpu)["good"].good_per_s
        other_per_s = run({"other": Source(self.other, tcp, self.closed, 0.0)}, cpu)["other"].good_per_s
        checked = replace(self.load, verified=VERIFIED)
        beside = Source(self.other, tcp, checked, OTHER_LOAD * other_per_s)
        ours = Source(self.good, tcp, checked, (1 - share) * 0.5 * capacity_per_s)
        alone = run({"good": ours}, cpu)["good"]
        other_alone = run({"other": beside}, cpu)["other"]
        where, connections = (self.unix, 1) if sender == "one" else (tcp, 8)
        theirs = Source(self.bad, where, replace(self.load, connections=connections), share * 0.5 * capacity_per_s)
        both = run({"good": ours, "bad": theirs}, cpu)
        with_other = run(
            {
                "good": replace(ours, per_s=ours.per_s / 2),
                "other": beside,
                "bad": replace(theirs, per_s=theirs.per_s / 2),
            },
            cpu,
        )
        return {
            "share": share,
            "sender": sender,
            "capacity_per_s": capacity_per_s,
            "goodput": both["good"].good_per_s / alone.good_per_s,
            "p99_us": both["good"].latency.percentile(99) / 1e3,
            "p99_alone_us": alone.latency.percentile(99) / 1e3,
            "other": with_other["other"].good_per_s / other_alone.good_per_s,
            "other_lag_p99_us": with_other["other"].lag.percentile(99) / 1e3,
            "harmed": harmed(both["good"]) + harmed(with_other["good"]) + harmed(with_other["other"]),
            "errors": counts(both["good"]),
            "other_errors": counts(with_other["other"]),
            "bad_answers": counts(both["bad"]),
        }


def counts(step: Step) -> dict[str, int]:
    return {code: error.count for code, error in step.errors.items()}


def harmed(step: Step) -> int:
    """Count the good requests that failed for another reason than overload, or got a wrong answer."""
    failed = sum(
        error.count for code, error in step.errors.items() if code not in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
    )
    return failed + int(step.counts["wrong_answers"]) + sum(map(is_wrong, step.captures))


def is_wrong(pair: tuple[bytes, bytes]) -> bool:
    """Whether an answer is not the sum of the item's row, which is the item's number."""
    asked, answered = (unpack(message) for message in pair)
    (output,) = calls.read_prediction("m", answered[3]).outputs.values()
    return not np.allclose(np.ravel(output), np.ravel(asked[3][1]["item"]), rtol=1e-3)


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    measured = ("capacity_per_s", "goodput", "other", "p99_us", "p99_alone_us", "other_lag_p99_us")
    figures = {name: report.spread([case[name] for case in cases]) for name in measured}
    return {
        **{name: cases[0][name] for name in ("share", "sender")},
        **figures,
        "harmed": sum(case["harmed"] for case in cases),
        "errors": [case["errors"] for case in cases],
        "bad_answers": [case["bad_answers"] for case in cases],
        "other_errors": [case["other_errors"] for case in cases],
    }


def make_store(folder: Path) -> Path:
    """Make a store with a model of each cost, and the small one."""
    layer_us = (row_us(folder, 20) - row_us(folder, 0)) / 20
    models = [st.Model("other", save(folder / "other.onnx", 0), ["request:item"])]
    for name, wanted_us in ROW_US.items():
        layers = max(1, round(wanted_us / layer_us))
        models.append(st.Model(name, save(folder / f"{name}.onnx", layers), ["request:item"]))
    with st.Engine.open(folder / "store", create=True) as engine:
        engine.apply(models)
    return folder / "store"


def row_us(folder: Path, layers: int) -> float:
    """Return the microseconds per row of a model with so many layers, in batches of 64."""
    session = onnxruntime.InferenceSession(save(folder / "measured.onnx", layers))
    items, best_ns = np.arange(64), 1 << 62
    for _ in range(50):
        start_ns = time.perf_counter_ns()
        session.run(None, {"item": items})
        best_ns = min(best_ns, time.perf_counter_ns() - start_ns)
    return best_ns / 64e3


def save(path: Path, layers: int) -> str:
    """Write a model: the number of an item, as a float, by way of `layers` operators on a row of WIDTH zeros."""
    table = np.zeros((ITEMS, WIDTH), np.float32)
    table[:, 0] = np.arange(ITEMS)
    nodes = [helper.make_node("Gather", ["table", "item"], ["row"])]
    nodes.append(helper.make_node("Mul", ["row", "mask"], ["x0"]))  # zeros, and sin(0) is 0
    nodes += [helper.make_node("Sin", [f"x{i}"], [f"x{i + 1}"]) for i in range(layers)]
    nodes.append(helper.make_node("Add", ["row", f"x{layers}"], ["both"]))
    nodes.append(helper.make_node("ReduceSum", ["both", "axis"], ["y"], keepdims=1))
    constants = {"table": table, "mask": np.zeros(WIDTH, np.float32), "axis": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "items",
        [helper.make_tensor_value_info("item", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return str(path)


def show(figures: Mapping[str, Any]) -> None:
    for name, model in figures.items():
        print(f"{name}: {model['cases'][0]['capacity_per_s']['median']:,.0f} requests/s in a closed loop")
        for case in model["cases"]:
            print(
                f"  {case['share']:4.0%} bad from {case['sender']:3}  goodput {case['goodput']['median']:.2f}"
                f"  P99 {case['p99_us']['median'] / 1e3:8.2f} ms (alone {case['p99_alone_us']['median'] / 1e3:.2f})"
                f"  other model {case['other']['median']:.2f}  harmed {case['harmed']}  {case['errors'][0] or ''}"
                f"  {case['bad_answers'][0]}  other: {case['other_errors'][0] or ''} lag P99"
                f" {case['other_lag_p99_us']['median'] / 1e3:.1f} ms"
            )


if __name__ == "__main__":
    main()
