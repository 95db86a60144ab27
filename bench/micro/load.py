"""Compare a bulk load of 10 M rows (Int64 key, event time, 32 Float32 features) with a plain write of the same size.

    python bench/micro/load.py [--json] [--quick] [--folder DIR]

Each measurement has a process of its own, which prepares its batches first:

- a load with memory for all rows;
- a load limited to 512 MiB, with its peak memory;
- a load from a Parquet file;
- the time from opening the store in a new process to the first answer, with and without the file in the page cache.

After every load a plain file of the same size as the store is written and synced, so that other load on the machine
slows both. "Up to the last sync" ends where the last commit of rows begins. The first round is not counted, because it
gets memory from the system that later rounds reuse. --quick uses an eighth of the rows and of the memory. --folder is
the place of stores and files, on the disk to be measured (default: the current folder).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import installed
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import report

import shorttail as st
from shorttail.store.environment import Environment, WriteTransaction

ROWS, QUICK_ROWS = 10_000_000, 1_250_000  # with an eighth, buckets are equally full, so ratios are the same
ROUNDS, QUICK_ROUNDS = 3, 2
LIMITED_BYTES = 512 << 20  # the limit for ROWS
PLENTY_BYTES = 4 << 30
BATCH_ROWS = 65_536
FEATURES = 32
RAW_ROW_BYTES = 8 + 8 + 4 * FEATURES  # key, event time, features
VIEW = st.FeatureView(
    "v",
    entity=st.Entity("e", keys={"id": st.Int64}),
    features=[st.Feature(f"f{i}", st.Float32) for i in range(FEATURES)],
)


def make_batches(rows: int) -> Iterator[pa.RecordBatch]:
    random = np.random.default_rng(0)
    ids = random.permutation(rows)
    for start in range(0, rows, BATCH_ROWS):
        part = ids[start : start + BATCH_ROWS]
        columns = {"id": part, "event_time": np.full(len(part), 1_700_000_000_000_000)}
        columns |= {f.name: random.random(len(part), np.float32) for f in VIEW.features}
        yield pa.RecordBatch.from_pydict(columns)


def parquet_file(folder: Path, rows: int) -> Path:
    path = folder / "rows.parquet"
    batches = make_batches(rows)
    first = next(batches)
    with pyarrow.parquet.ParquetWriter(path, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return path


# -- one process per measurement -----------------------------------------------------------------------------------


@contextmanager
def row_commits(starts: list[float]) -> Iterator[None]:
    """Record when the load's thread starts to commit, which writes and syncs its pages."""
    write = Environment.write

    @contextmanager
    def noted(environment: Environment) -> Iterator[WriteTransaction]:
        with write(environment) as writer:
            yield writer
            if threading.current_thread().name.startswith("shorttail-load"):
                starts.append(time.perf_counter())

    Environment.write = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Environment.write = write  # type: ignore[method-assign]


def memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def write_plain(path: Path, size: int) -> float:
    """Return the seconds to write and sync `size` bytes, 1 MiB at a time."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for at in range(0, size, len(block)):
        os.write(fd, block[: size - at])
    os.fsync(fd)
    os.close(fd)
    taken = time.perf_counter() - start
    path.unlink()
    return taken


def measure_load(folder: Path, rows: int, memory: int, data: Any) -> dict[str, float]:
    """Measure one load into a new store, and keep the store."""
    path = folder / "store"
    shutil.rmtree(path, ignore_errors=True)
    starts: list[float] = []
    with st.Engine.open(path, create=True) as engine:
        engine.apply([VIEW])
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory_bytes("VmRSS")
        start = time.perf_counter()
        with row_commits(starts):
            if engine.load("v", data, memory_bytes=memory) != rows:
                raise SystemExit("the load lost rows")
        seconds = time.perf_counter() - start
        peak = memory_bytes("VmHWM") - before
    return {
        "s": seconds,
        "rows_s": starts[-1] - start,
        "peak_bytes": peak,
        "file_bytes": (path / "data.mdb").stat().st_size,
    }


def run_loads(folder: Path, rows: int, rounds: int, memory: int, parquet: Path | None) -> list[dict[str, float]]:
    batches = [] if parquet else list(make_batches(rows))
    results = []
    for _ in range(rounds + 1):
        result = measure_load(folder, rows, memory, str(parquet) if parquet else batches)
        result["plain_s"] = write_plain(folder / "plain", int(result["file_bytes"]))
        results.append(result)
    return results[1:]


def first_lookup(folder: Path) -> dict[str, float]:
    import shorttail.pipeline  # noqa: F401  imports are not measured

    start = time.perf_counter()
    with st.Engine.open(folder / "store") as engine:
        opened = time.perf_counter()
        found = engine.get_online_features(["v:f0"], {"id": [5]})
        answered = time.perf_counter()
    if not 0 <= found.to_numpy()["v:f0"][0] < 1:
        raise SystemExit("the row was not found")
    return {"open_ms": (opened - start) * 1e3, "answer_ms": (answered - start) * 1e3}


def in_child(folder: Path, what: str, *arguments: Any) -> Any:
    command = [sys.executable, __file__, "--folder", str(folder), "--child", json.dumps([what, *arguments])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child(folder: Path, what: str, *arguments: Any) -> None:
    if what == "lookup":
        print(json.dumps(first_lookup(folder)))
    else:
        rows, rounds, memory, parquet = arguments
        print(json.dumps(run_loads(folder, rows, rounds, memory, Path(parquet) if parquet else None)))


def forget_file(path: Path) -> None:
    """Drop a file from the page cache, as after a restart."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


# -- figures and bars ----------------------------------------------------------------------------------------------


def figures_of(rows: int, results: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "rows_per_s": report.spread([rows / r["s"] for r in results]),
        "rows_per_s_to_last_sync": report.spread([rows / r["rows_s"] for r in results]),
        "plain_file_s": report.spread([r["plain_s"] for r in results]),
        "times_plain_file": report.spread([r["s"] / r["plain_s"] for r in results]),
        "peak_mib": report.spread([r["peak_bytes"] / (1 << 20) for r in results]),
        "file_bytes_per_raw_byte": report.spread([r["file_bytes"] / rows / RAW_ROW_BYTES for r in results]),
    }


def measure(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    limited = LIMITED_BYTES * rows // ROWS
    figures: dict[str, Any] = {"rows": rows, "limited_mib": limited >> 20}
    print("with memory for all rows ...", file=sys.stderr, flush=True)
    figures["in_memory"] = figures_of(rows, in_child(folder, "load", rows, rounds, PLENTY_BYTES, None))
    lookups = [in_child(folder, "lookup") for _ in range(3)]
    figures["first_lookup_ms"] = report.spread([r["answer_ms"] for r in lookups])
    forget_file(folder / "store" / "data.mdb")
    figures["first_lookup_cold_ms"] = in_child(folder, "lookup")["answer_ms"]
    print(f"limited to {limited >> 20} MiB ...", file=sys.stderr, flush=True)
    figures["limited"] = figures_of(rows, in_child(folder, "load", rows, rounds, limited, None))
    print("from Parquet ...", file=sys.stderr, flush=True)
    path = parquet_file(folder, rows)
    figures["parquet"] = figures_of(rows, in_child(folder, "load", rows, rounds, limited, str(path)))
    return figures


def bars_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    def median(what: str, name: str) -> float:
        value: float = figures[what][name]["median"]
        return value

    rate = median("in_memory", "rows_per_s_to_last_sync")
    limited = median("limited", "rows_per_s_to_last_sync")
    return [
        report.at_least("rows with memory for all, up to the last sync", rate, 1.2e6, "rows/s"),
        report.at_most("that load in all / a plain file", median("in_memory", "times_plain_file"), 1.5, "times"),
        report.at_least(f"held to {figures['limited_mib']} MiB / with memory for all", limited / rate, 0.5, "times"),
        report.at_most("peak memory of that", median("limited", "peak_mib"), figures["limited_mib"], "MiB"),
        report.at_least("from Parquet, in all", median("parquet", "rows_per_s"), 600_000, "rows/s"),
        report.at_most("file / raw bytes", median("in_memory", "file_bytes_per_raw_byte"), 1.6, "times"),
        report.at_most("open to first lookup, file cached", figures["first_lookup_ms"]["median"], 500, "ms"),
    ]


def print_figures(figures: dict[str, Any]) -> None:
    print(f"{figures['rows']:,} rows{'rows/s':>18}{'to last sync':>14}{'plain file s':>14}{'times':>7}{'peak MiB':>10}")
    for what in ("in_memory", "limited", "parquet"):
        median = {name: value["median"] for name, value in figures[what].items()}
        print(
            f"{what:<16}{median['rows_per_s']:>15,.0f}{median['rows_per_s_to_last_sync']:>14,.0f}"
            f"{median['plain_file_s']:>14.2f}{median['times_plain_file']:>7.2f}{median['peak_mib']:>10.0f}"
        )
    print(
        f"open to first answer: {figures['first_lookup_ms']['median']:.1f} ms, "
        f"{figures['first_lookup_cold_ms']:.1f} ms with nothing of the file in memory"
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
    rows, rounds = (QUICK_ROWS, QUICK_ROUNDS) if options.quick else (ROWS, ROUNDS)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-load-") as folder:
        figures = measure(Path(folder), rows, rounds)
    bars = bars_of(figures)
    if options.json:
        report.print_json(figures, bars)
    else:
        print_figures(figures)
        report.print_bars(bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
