"""Swap versions of a model under load, and measure failed requests, wrong answers, latency and memory.

    python bench/swap.py [--json] [--quick] [--cycles N]

One worker on one CPU serves a LightGBM model of 100 trees with 31 leaves each on a view of 32 features, in an open loop
at half of its capacity. Every other second is a swap second with two cycles. A cycle deploys and promotes a new
version; every fifth cycle also rolls it back and promotes it again. The other seconds are quiet. Every version gives
other answers, so a captured answer shows whether it is of the version that it names. This process, on another CPU,
generates the load. It also loads and checks each version before it deploys it, in a low-priority thread, as
`shorttail models deploy` does.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import installed
import numpy as np
import onnx
import report
import serving
from loadgen import BenchError
from micro import forest as forests

import shorttail as st
from shorttail import protocol
from shorttail.config import LIMITS
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.histogram import Histogram
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_rpc
from shorttail.models.serving import lower_priority
from shorttail.models.session import Session
from shorttail.registry import versions as registry

USERS = 1000
CYCLES_PER_SECOND = 2
WARMUP_S = 2.0
CAPTURED = 20_000
P99_RATIO_MAX = 1.5
GROWTH_MB_MAX = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="20 cycles; ends within 50 s")
    parser.add_argument("--cycles", type=int, help="versions to deploy (100; 20 with --quick)")
    options = parser.parse_args()
    if options.cycles and not 1 <= options.cycles <= LIMITS.bench_intervals:
        parser.error(f"--cycles: 1 to {LIMITS.bench_intervals}")
    forests.training_rows = forests.QUICK_TRAINING_ROWS
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), options.cycles or (20 if options.quick else 100))
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    bars = [
        report.at_most("failed requests", figures["failed"], 0, "requests"),
        report.at_most("answers that are not of the version that they name", figures["wrong"], 0, "answers"),
        report.at_most("P99 in swap seconds / in quiet ones", figures["p99_ratio"], P99_RATIO_MAX, "x"),
        report.at_most("memory above its plateau", figures["rss_growth_mb"], GROWTH_MB_MAX, "MB"),
    ]
    if options.json:
        report.print_json(figures, bars)
    else:
        for name, value in figures.items():
            print(f"{name}: {value}")
        report.print_bars(bars)


class Models:
    """Makes versions of the model: version n has all leaf values multiplied by 1 + n / 100."""

    def __init__(self, folder: Path):
        self.folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first = forests.MODELS["lightgbm-100x31"]()

    def file(self, number: int) -> Path:
        model = onnx.load_model_from_string(self.first)
        (weights,) = (
            attribute
            for node in model.graph.node
            for attribute in node.attribute
            if attribute.name in ("class_weights", "target_weights")
        )
        weights.floats[:] = [weight * (1 + number / 100) for weight in weights.floats]
        path = self.folder / f"{number}.onnx"
        onnx.save_model(model, str(path))
        return path


def measure(folder: Path, cycles: int) -> dict[str, Any]:
    models = Models(folder)
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu = cpus[0] if len(cpus) > 1 else None
    os.sched_setaffinity(0, cpus[1:] or cpus)
    rows = np.random.default_rng(0).normal(size=(USERS, forests.WIDTH)).astype(np.float32)
    names = [f"f{i}" for i in range(forests.WIDTH)]
    user = st.Entity("user", keys={"user_id": st.Int64})
    view = st.FeatureView("stats", entity=user, features=[st.Feature(name, st.Float32) for name in names])
    model = st.Model("m", str(models.file(1)), [f"stats:{name}" for name in names], outputs=["probabilities"])
    with st.Engine.open(folder / "store", create=True) as engine:
        engine.apply([user, view, model])
        engine.push("stats", {"user_id": np.arange(USERS), **{name: rows[:, i] for i, name in enumerate(names)}})
        with serving.start_server(folder / "store", folder / "log", cpu=server_cpu) as (address, server):
            worker = serving.worker_of(server)
            where = target.find(address)
            workload = Workload(predict="m", keys=[f"user_id=uniform:0:{USERS - 1}"])
            plan = plan_rpc(workload, engine.models(), engine.views())
            most = run_step(
                plan, where, Load(connections=32, pipeline=1, closed=True, duration_s=2.0, warmup_s=1.0), None
            )
            if fatal := most.fatal or most.outcomes["error"]:
                raise BenchError(f"the load could not be put on the server: {fatal}")
            rate = most.good_per_s / 2
            step, memory, deployed = swap_under_load(engine, models, plan, where, rate, cycles, worker)
    expected = {number: probabilities(models.folder / f"{number}.onnx", rows) for number in range(1, deployed + 1)}
    checked, wrong, seen = check(step, expected)
    quiet, swaps = spells(step, *spells_for(cycles))
    quiet_us, swap_us = quiet.percentile(99) / 1e3, swaps.percentile(99) / 1e3
    settled = len(memory) // 3
    return {
        "capacity_per_s": most.good_per_s,
        "rate_per_s": rate,
        "cycles": deployed - 1,
        "requests": step.due,
        "failed": step.due - step.outcomes["good"],
        "outcomes": step.outcomes,
        "errors": {code: error.message for code, error in step.errors.items()},
        "checked": checked,
        "wrong": wrong,
        "versions_seen": seen,
        "quiet_us": {"p50": quiet.percentile(50) / 1e3, "p99": quiet_us, "max": quiet.max_ns / 1e3},
        "swap_us": {"p50": swaps.percentile(50) / 1e3, "p99": swap_us, "max": swaps.max_ns / 1e3},
        "p99_ratio": swap_us / quiet_us,
        "rss_mb": memory,
        "rss_growth_mb": max(memory[settled:]) - max(memory[: settled + 1]),
        "generator_lag_p99_us": step.lag.percentile(99) / 1e3,
    }


def swap_under_load(
    engine: st.Engine, models: Models, plan: Traffic, where: target.Target, rate: float, cycles: int, worker: int
) -> tuple[Step, list[float], int]:
    """Run the load. Returns the step, the memory in MB after each swap second, and the last version."""
    duration_s = float(spells_for(cycles)[0])
    load = Load(connections=32, duration_s=duration_s, warmup_s=WARMUP_S, verified=CAPTURED, timeout_s=10.0)
    memory: list[float] = []
    deployed = [1]
    failures: list[BaseException] = []
    start_s = time.monotonic() + WARMUP_S

    def swap() -> None:
        lower_priority()
        try:
            for cycle in range(cycles):
                second, part = divmod(cycle, CYCLES_PER_SECOND)
                file = models.file(deployed[0] + 1)
                wait_until(start_s + 2 * second + 1 + 0.45 * part)
                deployed[0] = engine.deploy("m", file, promote=False)
                registry.promote(engine.store, "m", deployed[0])
                if cycle % 5 == 4:
                    registry.rollback(engine.store, "m")
                    registry.promote(engine.store, "m", deployed[0])
                if part == CYCLES_PER_SECOND - 1 or cycle == cycles - 1:
                    wait_until(start_s + 2 * second + 2.5)
                    memory.append(resident_mb(worker))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=swap)
    thread.start()
    step = run_step(plan, where, load, Rate(rate, rate))
    thread.join()
    if failures:
        raise failures[0]
    return step, memory, deployed[0]


def spells(step: Step, count: int, used: int) -> tuple[Histogram, Histogram]:
    """Return the latency in quiet and in swap spells, over the first `used` of `count` spells."""
    merged = Histogram.empty(), Histogram.empty()
    for piece in step.slices:
        spell = int((piece.start_s + piece.length_s / 2) / step.duration_s * count)
        if spell < used:
            merged[spell % 2].add(piece.latency)
    return merged


def spells_for(cycles: int) -> tuple[int, int]:
    """Return the number of one-second spells, such that no slice of the load test crosses two, and how many count."""
    used = 2 * -(-cycles // CYCLES_PER_SECOND)
    return next(n for n in (12, 20, 24, 30, 40, 60, LIMITS.bench_intervals) if n >= used), used


def wait_until(when_s: float) -> None:
    time.sleep(max(0.0, when_s - time.monotonic()))


def probabilities(path: Path, rows: Any) -> Any:
    return Session(path, ["probabilities"]).run([rows])[0]


def check(step: Step, expected: dict[int, Any]) -> tuple[int, int, int]:
    """Return the number of captured answers, of wrong ones, and of versions among them."""
    wrong, seen = 0, set()
    for request, reply in step.captures:
        (asked,), (answered,) = unpack(request), unpack(reply)
        result = protocol.read_response(answered)[2]
        if result is None:
            continue  # it counts as failed
        user = int(np.ravel(asked[3][1]["user_id"])[0])
        version, output = result["version"], np.ravel(result["outputs"]["probabilities"])
        seen.add(version)
        wrong += version not in expected or not np.allclose(output, expected[version][user], rtol=1e-4, atol=1e-6)
    return len(step.captures), wrong, len(seen)


def unpack(data: bytes) -> list[Any]:
    unpacker = protocol.new_unpacker()
    unpacker.feed(data)
    return list(unpacker)


def resident_mb(pid: int) -> float:
    """Return the anonymous memory of a process in MB. Pages of the store's file belong to the page cache."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
