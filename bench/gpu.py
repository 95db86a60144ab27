"""Compare padded buckets, pinned buffers and CUDA graphs with plain `session.run` on a GPU host.

    python bench/gpu.py [--json] [--quick] [--device cuda:0]

The models are two multilayer perceptrons, a small one (32 -> 128 -> 64 -> 1) and a wide one (256 -> 2048 -> 2048 -> 1).
Batches have 1 to 1,024 rows, some of them between two powers of two. Both ways take and return NumPy arrays, on new
rows each time, in turn. `--device cpu` runs the same code without a GPU, as a trial. Needs the onnx package.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import installed
import numpy as np
import onnx
import report
from onnx import TensorProto, helper, numpy_helper

from shorttail.errors import ShorttailError
from shorttail.models.buckets import BucketSession
from shorttail.models.device import Device, check_cuda, cuda_providers
from shorttail.models.session import ON_CPU, Session

MODELS = {"mlp-128-64": (32, 128, 64, 1), "mlp-2048-2048": (256, 2048, 2048, 1)}
BATCHES = (1, 2, 8, 33, 64, 100, 256, 500, 1024)
TURNS_MIN, TURNS_MAX = 20, 5000
TOLERANCE = 1e-2  # a GPU may compute in TF32


def write_mlp(path: Path, widths: tuple[int, ...]) -> Path:
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer, (takes, gives) in enumerate(itertools.pairwise(widths)):
        weight = random.normal(size=(takes, gives), scale=takes**-0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        weights.append(numpy_helper.from_array(np.zeros(gives, np.float32), f"b{layer}"))
        last = layer == len(widths) - 2
        nodes.append(helper.make_node("Gemm", [value, f"w{layer}", f"b{layer}"], [f"h{layer}"]))
        value = "y" if last else f"r{layer}"
        nodes.append(helper.make_node("Sigmoid" if last else "Relu", [f"h{layer}"], [value]))
    tensor = helper.make_tensor_value_info
    takes, gives = tensor("x", TensorProto.FLOAT, [None, widths[0]]), tensor("y", TensorProto.FLOAT, [None, widths[-1]])
    graph = helper.make_graph(nodes, "mlp", [takes], [gives], weights)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def measure(path: Path, width: int, device: Device, seconds: float) -> dict[str, Any]:
    """Return microseconds per batch for each size, after a check that both ways give the same answers."""
    plain = Session(path, providers=ON_CPU if device.kind == "cpu" else cuda_providers(device, graphs=False))
    buckets = BucketSession(path, device=device)
    random = np.random.default_rng()
    runs = []
    for rows in BATCHES:
        first = random.normal(size=(rows, width)).astype(np.float32)
        np.testing.assert_allclose(buckets.run([first])[0], plain.run([first])[0], rtol=TOLERANCE, atol=TOLERANCE)
        theirs: list[float] = []
        ours: list[float] = []
        until = time.perf_counter() + seconds
        while len(ours) < TURNS_MIN or (time.perf_counter() < until and len(ours) < TURNS_MAX):
            batch = random.normal(size=(rows, width)).astype(np.float32)
            t0 = time.perf_counter_ns()
            plain.run([batch])
            t1 = time.perf_counter_ns()
            buckets.run([batch])
            t2 = time.perf_counter_ns()
            theirs.append((t1 - t0) / 1e3)
            ours.append((t2 - t1) / 1e3)
        runs.append({"batch": rows, "session_run_us": spread(theirs), "buckets_us": spread(ours)})
    return {"model": path.stem, "runs_as": buckets.description, "runs": runs}


def spread(values: list[float]) -> dict[str, float]:
    percentiles = quantiles(values, n=100)
    return {"p50": percentiles[49], "p99": percentiles[98], "turns": len(values)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="end within 50 s")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the script")
    options = parser.parse_args()
    seconds = 0.5 if options.quick else 3.0
    try:
        device = Device.parse(options.device)
        if device.kind == "cuda":
            check_cuda(device)
        with tempfile.TemporaryDirectory() as folder:
            results = [
                measure(write_mlp(Path(folder) / f"{name}.onnx", widths), widths[0], device, seconds)
                for name, widths in MODELS.items()
            ]
    except ShorttailError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    bars = [
        report.at_most(
            f"{result['model']} at {run['batch']} rows: buckets / session.run",
            run["buckets_us"]["p50"] / run["session_run_us"]["p50"],
            1.0,
            "times",
        )
        for result in results
        for run in result["runs"]
    ]
    if options.json:
        report.print_json({"device": str(device), "models": results}, bars)
        return 0
    for result in results:
        print(f"{result['model']}: {result['runs_as']}")
        print(f"{'rows':>6}{'session.run p50 us':>20}{'p99':>9}{'buckets p50 us':>16}{'p99':>9}")
        for run in result["runs"]:
            theirs, ours = run["session_run_us"], run["buckets_us"]
            print(
                f"{run['batch']:>6}{theirs['p50']:>20.1f}{theirs['p99']:>9.1f}{ours['p50']:>16.1f}{ours['p99']:>9.1f}"
            )
    report.print_bars(bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
