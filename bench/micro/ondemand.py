"""Compare on-demand features with C, NumPy, Numba and Python: five scalar transforms into a model's matrix.

    python bench/micro/ondemand.py [--json] [--quick]

Every figure is microseconds per batch for all five. In each round the rivals take the same new rows in turn on one
core. Figures are medians over batches and then over rounds; ratios are taken within a round. The script checks that all
rivals give the same numbers. C is bench/c/transforms.c, compiled with -O3 for this processor and called once with
prepared addresses. NumPy writes in place (`out=`, no new arrays) and evaluates both sides of a condition. Numba is one
plain `njit` call per transform with the same loop inside.

The start-up time is what the five transforms add to the import of the engine: compiled for the first time, and then
loaded from the cache, each in a new process.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import installed
import numpy as np
from numpy.typing import NDArray
from report import at_most, print_bars, print_json, spread

import shorttail as st
from shorttail._native.transforms import TransformProgram
from shorttail.ondemand.compile import compile_on_demand

BATCHES = (1, 50, 500, 1000)
# run(a, b, out) returns the call that is timed; it fills the columns of `out`, a float32 matrix.
Run = Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], Callable[[], object]]


@st.on_demand
def ratio(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return a / max(b, 1.0)


@st.on_demand
def balance(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return (a - b) / (a + b) if a + b > 0 else 0.0


@st.on_demand
def growth(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return math.log1p(a) - math.log1p(b)


@st.on_demand
def length(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return math.sqrt(a * a + b * b)


@st.on_demand
def decay(a: st.Float64, b: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return math.exp(-0.1 * a) * min(b, 1.0)


FUNCTIONS = (ratio, balance, growth, length, decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: within 50 s")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)  # the process that is measured
    options = parser.parse_args()
    if options.start:
        return print(start_ms())
    rounds = 7 if options.quick else 31
    with tempfile.TemporaryDirectory(prefix="shorttail-ondemand-") as folder:
        first, later = start_up(Path(folder) / "cache", 3 if options.quick else 9)
        os.environ["SHORTTAIL_CACHE_DIR"] = str(Path(folder) / "cache")
        figures = measure(rivals(Path(folder)), rounds)
    figures |= {"first start, ms": spread([first]), "second start, ms": spread(later)}
    bars = [
        at_most("five transforms over 500 rows against C", figures["500 rows, shorttail / C"]["median"], 1.5, "times"),
        at_most("over 1,000 rows against NumPy", figures["1000 rows, shorttail / NumPy"]["median"], 2, "times"),
        at_most("what a second start adds", statistics.median(later), 100, "ms"),
    ]
    if options.json:
        return print_json({"unit": "us a batch", "rounds": rounds} | figures, bars)
    for what, value in figures.items():
        print(f"{what:<34}{value['median']:>10.2f}   ({value['min']:.2f} .. {value['max']:.2f})")
    print_bars(bars)


def measure(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    random = np.random.default_rng()
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for size in BATCHES:
            n_batches = max(20, 20_000 // size)
            rows = random.uniform(0, 10, size=(2, n_batches, size))
            times = {name: time_run(run, rows) for name, run in runs.items() if name != "Python" or size == 500}
            for name, us in times.items():
                found.setdefault(f"{size} rows, {name}", []).append(us)
            for name in ("C", "NumPy", "Numba"):
                found.setdefault(f"{size} rows, shorttail / {name}", []).append(times["shorttail"] / times[name])
    return {what: spread(values) for what, values in found.items()}


def time_run(run: Run, rows: NDArray[np.float64]) -> float:
    """Return the median us per batch."""
    out = np.empty((rows.shape[2], len(FUNCTIONS)), np.float32)
    run(rows[0, 0], rows[1, 0], out)()
    times = []
    for a, b in zip(*rows, strict=True):
        call = run(a, b, out)
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def rivals(folder: Path) -> dict[str, Run]:
    """Return the ways to compute the five transforms, after a check that their results are equal."""
    runs = {"shorttail": program(), "C": c_library(folder)}
    for name, function in (("NumPy", in_numpy), ("Numba", in_numba()), ("Python", in_python)):
        runs[name] = partial(partial, function)
    a, b = np.random.default_rng(1).uniform(0, 10, size=(2, 1000))
    wanted = np.empty((1000, 5), np.float32)
    in_python(a, b, wanted)
    for run in runs.values():
        found = np.zeros_like(wanted)
        run(a, b, found)()
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    return runs


def program() -> Run:
    arguments = [(0, np.float64, 1), (1, np.float64, 1)]
    steps = [
        (compile_on_demand(function, np.float32), arguments, (2, np.float32, 1, column))
        for column, function in enumerate(FUNCTIONS)
    ]
    compiled = TransformProgram(steps)
    return lambda a, b, out: partial(compiled.run, [a, b, out], len(a))


def c_library(folder: Path) -> Run:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source, target = Path(__file__).resolve().parents[1] / "c" / "transforms.c", folder / "transforms.so"
    flags = ["-O3", "-march=native", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(target), "-lm"], check=True)
    call = ctypes.CDLL(str(target)).transforms
    call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t]
    return lambda a, b, out: partial(call, a.ctypes.data, b.ctypes.data, out.ctypes.data, len(a))


SPARE = np.empty((2, max(BATCHES)))


def in_numpy(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any]) -> None:
    x, y = SPARE[:, : len(a)]
    np.divide(a, np.maximum(b, 1.0, out=x), out=out[:, 0], casting="same_kind")
    np.add(a, b, out=x)
    np.subtract(a, b, out=y)
    with np.errstate(all="ignore"):
        np.divide(y, x, out=y)
    np.copyto(y, 0.0, where=x <= 0)
    out[:, 1] = y
    np.subtract(np.log1p(a, out=x), np.log1p(b, out=y), out=out[:, 2], casting="same_kind")
    np.sqrt(np.add(np.multiply(a, a, out=x), np.multiply(b, b, out=y), out=x), out=out[:, 3], casting="same_kind")
    np.exp(np.multiply(a, -0.1, out=x), out=x)
    np.multiply(x, np.minimum(b, 1.0, out=y), out=out[:, 4], casting="same_kind")


def in_numba() -> Callable[..., None]:
    import numba

    loops = []
    for function in FUNCTIONS:
        assert function.origin is not None
        scalar = numba.njit(error_model="numpy")(function.origin.function)
        loops.append(numba.njit(error_model="numpy", nogil=True)(loop_over(scalar)))

    def run(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any]) -> None:
        for column, loop in enumerate(loops):
            loop(a, b, out, column)

    return run


def loop_over(scalar: Any) -> Callable[..., None]:
    def loop(a: Any, b: Any, out: Any, column: int) -> None:
        for i in range(len(a)):
            out[i, column] = scalar(a[i], b[i])

    return loop


def in_python(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any]) -> None:
    for column, function in enumerate(FUNCTIONS):
        assert function.origin is not None
        out[:, column] = [function.origin.function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def start_up(cache: Path, times: int) -> tuple[float, list[float]]:
    """Return the milliseconds that the five add to the start of a process: of the first process, and of later ones."""
    environment = os.environ | {"SHORTTAIL_CACHE_DIR": str(cache)}

    def start() -> float:
        command = [sys.executable, __file__, "--start"]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    return start(), [start() for _ in range(times)]


def start_ms() -> float:
    begin = time.perf_counter()
    for function in FUNCTIONS:
        compile_on_demand(function, np.float32)
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    main()
