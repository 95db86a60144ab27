"""Measure Engine.predict for one row, from a dict to a score: features of two views and a model of 100 trees.

    python bench/micro/predict.py [--json] [--quick]

A call predicts for one user and one item, with new keys in every call. The rivals are the model alone on a prepared
matrix (ONNX Runtime's session.run, and the compiled forest), in turn in the same run. Figures are medians in
microseconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import installed
import candidates
import numpy as np
import report

import shorttail as st
from shorttail.models.forest import compile_forest
from shorttail.models.session import Session

CALLS = 2000
PREDICT_US_BAR = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shorttail-predict-") as folder:
        figures = measure(Path(folder), 5 if options.quick else 15)
    bars = [report.at_most("one row by Engine.predict", figures["Engine.predict, us"]["median"], PREDICT_US_BAR, "us")]
    if options.json:
        return report.print_json(figures, bars)
    for name, value in figures.items():
        print(f"{name:<28}{value['median']:8.2f} ({value['min']:.2f} .. {value['max']:.2f})")
    report.print_bars(bars)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    candidates.make_store(folder / "store")
    random = np.random.default_rng()
    width = candidates.forests.WIDTH
    session = Session(folder / "ranker.onnx", ["probabilities"])
    forest = compile_forest(folder / "ranker.onnx", ["probabilities"])
    found: dict[str, list[float]] = {"Engine.predict, us": [], "ONNX Runtime alone, us": [], "forest alone, us": []}
    with st.Engine.open(folder / "store") as engine:
        for number in range(-1, rounds):  # the first round is a warm-up
            users, items = random.integers(0, candidates.USERS, CALLS), random.integers(0, candidates.ITEMS, CALLS)
            rows = [
                {"user_id": user, "item_id": item} for user, item in zip(users.tolist(), items.tolist(), strict=True)
            ]
            matrices = [[random.normal(size=(1, width)).astype(np.float32)] for _ in range(CALLS)]
            took = [
                time_calls(lambda row: engine.predict(candidates.MODEL, row), rows),
                time_calls(session.run, matrices),
                time_calls(forest.run, matrices),
            ]
            if number >= 0:
                for values, value in zip(found.values(), took, strict=True):
                    values.append(value)
    return {name: report.spread(values) for name, values in found.items()}


def time_calls(call: Callable[[Any], object], arguments: list[Any]) -> float:
    """Return the median time of a call in microseconds."""
    times = []
    for argument in arguments:
        start = time.perf_counter_ns()
        call(argument)
        times.append(time.perf_counter_ns() - start)
    return median(times) / 1000


if __name__ == "__main__":
    main()
