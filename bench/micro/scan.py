"""Scan a view of 10 M rows (Int64 key, event time, ten features) to Parquet, and to columns in memory.

    python bench/micro/scan.py [--json] [--quick] [--folder DIR]

Each measurement has a process of its own, pinned to one CPU: `views scan --output rows.parquet` does the same. The
features are four Float32, two Int64, an Int32, a Bool, a Timestamp and a String of five values; a twentieth of the
Float32 values are null. Anonymous memory is RssAnon at its highest, read every 5 ms, less that before the scan. Then a
server with one worker answers an open loop of one-row predicts, in turn alone, beside a process that copies memory at
the lowest priority, and beside `views scan` to Parquet, which runs again and again in a process of its own. Both may
use any CPU, and the generator runs before all others. The copier shows what any other process costs on this machine:
the CPUs of a small one share caches, and often a core. --quick uses an eighth of the rows. --folder is the place of the
store and of the file, on the disk to be measured (default: the current folder).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import installed
import loadgen
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet  # imports are not measured
import report
from change_clients import busy_cpu
from onnx import TensorProto, helper
from serving import start_server
from worst import ahead

import shorttail as st
import shorttail.engine
from shorttail.cli.row_output import write_rows
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Workload, plan_rpc

ROWS, QUICK_ROWS = 10_000_000, 1_250_000
ROUNDS, QUICK_ROUNDS = 3, 2
BATCH_ROWS = 65_536
PROBES_PER_S, SECONDS, PAIRS = 2000.0, 4.0, 8
TIERS = np.array(["basic", "silver", "gold", "platinum", "none"])
FEATURES = [
    *(st.Feature(f"f{i}", st.Float32) for i in range(4)),
    st.Feature("visits", st.Int64),
    st.Feature("amount", st.Int64),
    st.Feature("age", st.Int32),
    st.Feature("new", st.Bool),
    st.Feature("since", st.Timestamp),
    st.Feature("tier", st.String),
]
VIEW = st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=FEATURES)


def make_batches(rows: int) -> Iterator[pa.RecordBatch]:
    random = np.random.default_rng(0)
    ids = random.permutation(rows)
    for start in range(0, rows, BATCH_ROWS):
        part = ids[start : start + BATCH_ROWS]
        n = len(part)
        columns: dict[str, Any] = {"id": part, "event_time": np.full(n, 1_700_000_000_000_000)}
        columns |= {f"f{i}": pa.array(random.random(n, np.float32), mask=random.random(n) < 0.05) for i in range(4)}
        columns |= {"visits": random.poisson(3, n), "amount": random.integers(1 << 40, size=n)}
        columns |= {"age": random.integers(18, 80, n, np.int32), "new": random.random(n) < 0.5}
        columns |= {"since": 1_600_000_000_000_000 + random.integers(1 << 45, size=n)}
        columns |= {"tier": TIERS[random.integers(len(TIERS), size=n)]}
        yield pa.RecordBatch.from_pydict(columns)


# -- one process per measurement ---------------------------------------------------------------------------------------


class Memory:
    """The highest anonymous memory of this process during a `with` block, above that at its beginning."""

    peak_bytes = 0

    def __enter__(self) -> Memory:
        self._before = self._read()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, self._read() - self._before)

    def _read(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def to_columns(folder: Path) -> int:
    with st.Engine.open(folder / "store") as engine, engine.store.open_scan("v") as scan:
        return sum(batch[0].n for batch in scan)


def to_parquet(folder: Path) -> int:
    with st.Engine.open(folder / "store") as engine, engine.views["v"].rows() as rows:
        return write_rows(rows, "parquet", str(folder / "rows.parquet"))


def child(folder: Path, what: str, rows: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    run = {"columns": to_columns, "parquet": to_parquet}[what]
    with Memory() as memory:
        start_s = time.perf_counter()
        if run(folder) != rows:
            raise SystemExit("the scan lost rows")
        seconds = time.perf_counter() - start_s
    print(json.dumps({"rows_per_s": rows / seconds, "anonymous_mib": memory.peak_bytes / (1 << 20)}))


def in_child(folder: Path, what: str, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--child", json.dumps([what, rows])]
    measured: dict[str, float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return measured


# -- predicts meanwhile ------------------------------------------------------------------------------------------------


def write_model(path: Path) -> str:
    """Save a model that returns its two columns."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", ends[:1], ends[1:])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


@contextlib.contextmanager
def scanning(folder: Path) -> Iterator[None]:
    """Scan the view to Parquet again and again, in other processes, during the `with` block."""
    scan = f"{sys.executable} -m shorttail views scan v --store {folder / 'store'} --output {folder / 'out.parquet'}"
    command = ["sh", "-c", f"while true; do {scan} || exit 1; done"]
    # Not a session of its own: Linux may share a CPU among sessions first, and by priorities only within each.
    with subprocess.Popen(command, process_group=0, stdout=subprocess.DEVNULL) as process:
        try:
            time.sleep(2.0)  # it has begun to read
            yield
            if process.poll() is not None:
                raise SystemExit("the scan ended")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def beside(folder: Path, rows: int, pairs: int) -> dict[str, Any]:
    """Measure one-row predicts alone, beside a process that copies memory, and beside scans, in turn."""
    cpu = max(os.sched_getaffinity(0))
    alone_us, copying_us, beside_us = [], [], []
    with start_server(folder / "store", folder / "log", "--pin-cpus") as (address, _):
        with st.Client(address) as client:
            asked = Workload(predict="m", keys=[f"id=uniform:0:{rows - 1}"])
            probe = plan_rpc(asked, client.models(), client.views())
        load = Load(connections=1, pipeline=256, duration_s=SECONDS, warmup_s=0.5, spin_us=0.0)

        def p99_us() -> float:
            with loadgen.pinned(cpu), ahead():
                step = run_step(probe, target.find(address), load, Rate(PROBES_PER_S, PROBES_PER_S))
            if step.fatal or step.errors:
                raise SystemExit(step.fatal or f"requests failed: {step.errors}")
            return step.latency.percentile(99) / 1e3

        p99_us()  # the first answers pay for caches
        for _ in range(pairs):
            alone_us.append(p99_us())
            with busy_cpu():
                time.sleep(1.0)  # it has begun to copy
                copying_us.append(p99_us())
            with scanning(folder):
                beside_us.append(p99_us())
    spreads = {
        "p99_ratio": [ours / alone for ours, alone in zip(beside_us, alone_us, strict=True)],
        "p99_ratio_to_copying": [ours / other for ours, other in zip(beside_us, copying_us, strict=True)],
        "alone_p99_us": alone_us,
        "copying_p99_us": copying_us,
        "beside_p99_us": beside_us,
    }
    return {name: report.spread(values) for name, values in spreads.items()}


# -- figures and bars --------------------------------------------------------------------------------------------------


def measure(folder: Path, rows: int, rounds: int, pairs: int) -> dict[str, Any]:
    with st.Engine.open(folder / "store", create=True) as engine:
        engine.apply([VIEW, st.Model("m", write_model(folder / "m.onnx"), ["v:f0", "v:visits"])])
        engine.load("v", make_batches(rows))
        row_bytes = engine.views["v"].describe()["bytes_per_row"]
    figures: dict[str, Any] = {"rows": rows, "store_bytes_per_row": row_bytes}
    for what in ("columns", "parquet"):
        print(f"{what} ...", file=sys.stderr, flush=True)
        results = [in_child(folder, what, rows) for _ in range(rounds)]
        figures[what] = {name: report.spread([result[name] for result in results]) for name in results[0]}
    print("predicts meanwhile ...", file=sys.stderr, flush=True)
    figures["beside"] = beside(folder, rows, pairs)
    figures["parquet_bytes_per_row"] = (folder / "rows.parquet").stat().st_size / rows
    return figures


def bars_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    parquet = {name: value["median"] for name, value in figures["parquet"].items()}
    return [
        report.at_least("to Parquet, on one CPU", parquet["rows_per_s"], 1e6, "rows/s"),
        report.at_most("anonymous memory of that", parquet["anonymous_mib"], 200, "MiB"),
        report.at_most("P99 of predicts beside scans", figures["beside"]["p99_ratio"]["median"], 1.2, "x alone"),
    ]


def print_figures(figures: dict[str, Any]) -> None:
    print(f"{figures['rows']:,} rows{'rows/s':>18}{'anonymous MiB':>16}")
    for what in ("columns", "parquet"):
        median = {name: value["median"] for name, value in figures[what].items()}
        print(f"{what:<16}{median['rows_per_s']:>13,.0f}{median['anonymous_mib']:>16.0f}")
    found = {name: value["median"] for name, value in figures["beside"].items()}
    print(
        f"P99 of predicts: {found['alone_p99_us']:.0f} us alone, {found['copying_p99_us']:.0f} us beside a process that"
        f" copies memory, {found['beside_p99_us']:.0f} us beside scans"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="end within 50 s on two cores")
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to be measured (.)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.folder, *json.loads(options.child))
        return 0
    rows, rounds, pairs = (QUICK_ROWS, QUICK_ROUNDS, 2) if options.quick else (ROWS, ROUNDS, PAIRS)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-scan-") as folder:
        figures = measure(Path(folder), rows, rounds, pairs)
    bars = bars_of(figures)
    if options.json:
        report.print_json(figures, bars)
    else:
        print_figures(figures)
        report.print_bars(bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
