"""Compare compiled forests with ONNX Runtime, in one process and one thread.

    python bench/micro/forest.py [--json] [--quick] [--models DIR] [--seconds S]

The script trains the models of the bars (LightGBM 100 x 31 and 500 x 63, XGBoost 300 x depth 6, random forest 200 x
depth 12) on synthetic data, converts them, and times both engines in turn on the same rows, so that other load on the
machine slows both. Every turn has new rows: repeated rows train the branch predictor and make tree walkers look twice
as fast. Figures are medians in microseconds. --models keeps the converted files for the next run; --quick trains on
fewer rows and measures for a shorter time. SHORTTAIL_SIMD=avx2 or scalar selects older vector instructions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import installed
import numpy as np
import report

from shorttail.models.forest import compile_forest
from shorttail.models.session import Session

WIDTH = 32
TRAINING_ROWS = 20_000
QUICK_TRAINING_ROWS = 8_000  # enough for trees with 63 leaves, and with depth 12
BATCHES = (1, 8, 64, 500)
TURNS_MIN, TURNS_MAX = 15, 5000
LOAD_MS_BAR = 200
# Speedup over ONNX Runtime at batch 500, by vector instructions (plain C has no bar). At 1 and 8: never slower.
BARS: dict[str, dict[str, float]] = {
    "lightgbm-100x31": {"avx512": 10, "avx2": 6},
    "lightgbm-500x63": {"avx512": 6, "avx2": 3},
    "xgboost-300x6": {"avx512": 6, "avx2": 3},
    "random-forest-200x12": {"avx512": 2, "avx2": 2},
}
training_rows = TRAINING_ROWS


def training_data() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    x = random.normal(size=(training_rows, WIDTH)).astype(np.float32)
    score = x[:, :8].sum(axis=1) + np.sin(3 * x[:, 8] * x[:, 9]) + random.normal(size=len(x))
    return x, (score > 0).astype(int)


def lightgbm_model(trees: int, leaves: int) -> Callable[[], bytes]:
    def make() -> bytes:
        import lightgbm
        import onnxmltools
        from onnxmltools.convert.common.data_types import FloatTensorType

        model = lightgbm.LGBMClassifier(n_estimators=trees, num_leaves=leaves, verbose=-1, n_jobs=1).fit(
            *training_data()
        )
        kind = [("X", FloatTensorType([None, WIDTH]))]
        return bytes(onnxmltools.convert_lightgbm(model, initial_types=kind, zipmap=False).SerializeToString())

    return make


def xgboost_model() -> bytes:
    import onnxmltools
    import xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = xgboost.XGBClassifier(n_estimators=300, max_depth=6, n_jobs=1).fit(*training_data())
    kind = [("X", FloatTensorType([None, WIDTH]))]
    return bytes(onnxmltools.convert_xgboost(model, initial_types=kind).SerializeToString())


def random_forest() -> bytes:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(200, max_depth=12, n_jobs=1, random_state=0).fit(*training_data())
    kind = [("X", FloatTensorType([None, WIDTH]))]
    return bytes(convert_sklearn(model, initial_types=kind, options={id(model): {"zipmap": False}}).SerializeToString())


MODELS: dict[str, Callable[[], bytes]] = {
    "lightgbm-100x31": lightgbm_model(100, 31),
    "lightgbm-500x63": lightgbm_model(500, 63),
    "xgboost-300x6": xgboost_model,
    "random-forest-200x12": random_forest,
    "lightgbm-1000x31": lightgbm_model(1000, 31),
}


def model_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    if not path.exists():
        print(f"training {name} ...", file=sys.stderr, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path.write_bytes(MODELS[name]())
    return path


def time_both(session: Session, forest: Any, batch: int, seconds: float) -> dict[str, Any]:
    """Return microseconds per run over `batch` new rows, with ONNX Runtime and the forest in turn."""
    random = np.random.default_rng()
    theirs: list[float] = []
    ours: list[float] = []
    until = time.perf_counter() + seconds
    while len(ours) < TURNS_MIN or (time.perf_counter() < until and len(ours) < TURNS_MAX):
        rows = random.normal(size=(batch, WIDTH)).astype(np.float32)
        t0 = time.perf_counter_ns()
        session.run([rows])
        t1 = time.perf_counter_ns()
        forest.run([rows])
        t2 = time.perf_counter_ns()
        theirs.append((t1 - t0) / 1e3)
        ours.append((t2 - t1) / 1e3)
    return {
        "batch": batch,
        "onnxruntime_us": middle(theirs),
        "forest_us": middle(ours),
        "times": median(theirs) / median(ours),
    }


def middle(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, mid, high = quantiles(values, n=4)
    return {"median": mid, "p25": low, "p75": high, "turns": len(values)}


def measure(path: Path, seconds: float) -> dict[str, Any]:
    session = Session(path)
    forest = compile_forest(path, session.output_names)
    forest.verify_against(session)
    trees = forest.ensembles[0].trees
    runs = [time_both(session, forest, batch, seconds) for batch in BATCHES]
    return {"model": path.stem, "simd": trees.simd, "trees": trees.n_trees, "leaves": trees.n_leaves, "runs": runs}


def load_ms(path: Path) -> float:
    """Return the median of five loads from the page cache, without the comparison with ONNX Runtime."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        compile_forest(path, ["label", "probabilities"])
        taken.append((time.perf_counter() - start) * 1e3)
    return median(taken)


def bars_of(results: list[dict[str, Any]], load: float) -> list[dict[str, Any]]:
    bars = []
    for result in results:
        for run in result["runs"]:
            limit = 1.0 if run["batch"] in (1, 8) else BARS[result["model"]].get(result["simd"])
            if limit is not None and run["batch"] != 64:
                name = f"{result['model']} at {run['batch']} rows, ONNX Runtime / forest ({result['simd']})"
                bars.append(report.at_least(name, run["times"], limit, "times"))
    bars.append(report.at_most("load of 1,000 trees x 31 leaves", load, LOAD_MS_BAR, "ms"))
    return bars


def print_figures(results: list[dict[str, Any]], load: float) -> None:
    print(f"{'model':<22}{'simd':<8}{'rows':>5}{'onnxruntime us':>16}{'forest us':>11}{'times':>7}")
    for result in results:
        for run in result["runs"]:
            print(
                f"{result['model']:<22}{result['simd']:<8}{run['batch']:>5}{run['onnxruntime_us']['median']:>16.1f}"
                f"{run['forest_us']['median']:>11.1f}{run['times']:>7.1f}"
            )
    print(f"load of 1,000 trees x 31 leaves: {load:.0f} ms")


def main() -> int:
    global training_rows
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="end within 50 s on two cores")
    parser.add_argument("--models", type=Path, help="folder for converted models; missing models are made")
    parser.add_argument("--seconds", type=float, help="seconds per model and batch size (2; 0.5 with --quick)")
    options = parser.parse_args()
    training_rows = QUICK_TRAINING_ROWS if options.quick else TRAINING_ROWS
    seconds = options.seconds or (0.5 if options.quick else 2.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = [measure(model_file(folder, name), seconds) for name in BARS]
        load = load_ms(model_file(folder, "lightgbm-1000x31"))
    bars = bars_of(results, load)
    if options.json:
        report.print_json({"models": results, "load_1000_trees_ms": load, "training_rows": training_rows}, bars)
    else:
        print_figures(results, load)
        report.print_bars(bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
