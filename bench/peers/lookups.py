"""The scenario's data, the check of answers and the closed loop for the in-process peers of "features only".

A peer provides a function that looks up the keys of one request. All peers get the same keys in the same order and are
timed in the same way, so they differ only in their store and its client. Needs numpy and pyarrow.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as parquet

REQUESTS: Final = 4096  # different requests in the loop, more than a cache of answers would hold
WARM_UP: Final = 0.2  # as a share of the measured seconds
SEED: Final = 1


@dataclass(frozen=True)
class View:
    """A feature view. keys: int64 [n]; rows: float32 [n, features], C-contiguous; columns: positions in the answer."""

    name: str
    features: list[str]
    keys: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    @property
    def row_bytes(self) -> int:
        return 4 * len(self.features)


class Scenario:
    """A data folder of kind "features": views of one entity with all their features, in any order of columns."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        described = json.loads((self.folder / "scenario.json").read_text())
        self.name: str = described["name"]
        self.inputs: list[str] = described["inputs"]
        self.rows: int = described["rows"]
        ((self.key, (self.low, self.high)),) = described["keys"].items()
        place = {reference: i for i, reference in enumerate(self.inputs)}
        self.views = []
        for name, view in described["views"].items():
            table = parquet.read_table(self.folder / f"{name}.parquet")
            features = [feature for feature in view["features"] if f"{name}:{feature}" in place]
            rows = np.column_stack([table[feature].to_numpy() for feature in features]).astype(np.float32)
            columns = np.array([place[f"{name}:{feature}"] for feature in features])
            self.views.append(View(name, features, table[self.key].to_numpy(), np.ascontiguousarray(rows), columns))
        self.checks = json.loads((self.folder / "requests.json").read_text())

    def assemble(self, parts: Sequence[bytes]) -> np.ndarray:
        """Convert packed float32 rows (all keys of the first view, then of the next) to float32 [rows, inputs]."""
        n = len(parts) // len(self.views)
        if len(self.views) == 1:
            return np.frombuffer(b"".join(parts), np.float32).reshape(n, -1)
        matrix = np.empty((n, len(self.inputs)), np.float32)
        for i, view in enumerate(self.views):
            packed = np.frombuffer(b"".join(parts[i * n : (i + 1) * n]), np.float32)
            matrix[:, view.columns] = packed.reshape(n, -1)
        return matrix


def measure(
    scenario: Scenario,
    seconds: float,
    look_up: Callable[[list[int]], Any],
    describe: str,
    as_matrix: Callable[[Any], np.ndarray] = lambda answer: answer,
) -> None:
    """Check the answers, time one closed loop, and print one JSON line. Exits with a message if an answer is wrong.

    look_up: takes the keys of a request, and returns the answer in the form that users of the peer get. as_matrix
    converts that answer to [rows, inputs], and is not timed.
    """
    for i, check in enumerate(scenario.checks):
        found = np.asarray(as_matrix(look_up(check["columns"][scenario.key])), np.float32)
        expected = np.array(check["scores"], np.float32).reshape(scenario.rows, -1)
        if found.shape != expected.shape or not np.array_equal(found, expected, equal_nan=True):
            sys.exit(f"wrong answer: request {i} of requests.json gave other values")
    drawn = np.random.default_rng(SEED).integers(scenario.low, scenario.high + 1, (REQUESTS, scenario.rows))
    requests = drawn.tolist()
    loop(look_up, requests, WARM_UP * seconds)
    took_ns, elapsed_s = loop(look_up, requests, seconds)
    p50, p90, p99 = np.percentile(took_ns, [50, 90, 99]) / 1e3
    result = {
        "p50_us": round(p50, 2),
        "p90_us": round(p90, 2),
        "p99_us": round(p99, 2),
        "requests": len(took_ns),
        "requests_per_s": round(len(took_ns) / elapsed_s, 1),
        "lookups_per_s": round(len(took_ns) * scenario.rows / elapsed_s, 1),
        "checked": True,
        "describe": describe,
    }
    print(json.dumps(result), flush=True)


def loop(look_up: Callable[[list[int]], Any], requests: list[list[int]], seconds: float) -> tuple[np.ndarray, float]:
    """Run the closed loop. Returns (ns of each request, total seconds)."""
    took_ns: list[int] = []
    begin = now = time.perf_counter_ns()
    end = begin + round(seconds * 1e9)
    while now < end:
        for keys in requests:
            before = time.perf_counter_ns()
            look_up(keys)
            now = time.perf_counter_ns()
            took_ns.append(now - before)
            if now >= end:
                break
    return np.array(took_ns), (now - begin) / 1e9


def arguments() -> tuple[Scenario, float, str, str]:
    """Return FOLDER SECONDS REDIS_URL [VARIANT] of a `local.py`; the variant is "" if it is not given."""
    if not 4 <= len(sys.argv) <= 5:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER SECONDS REDIS_URL [VARIANT]")
    return Scenario(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else ""
