"""Measure upserts into a large table: rows/s against py-lmdb, the effect on a reader, and the growth of the file.

    python bench/micro/push.py [--json] [--quick] [--minutes 10]

1. Commits of 1,000 rows, 9 of 10 with existing keys, into the store and into an ordinary tree of py-lmdb, in turn, with
   a sync at every commit. py-lmdb uses one putmulti per commit, with rows in the given order, and in another run sorted
   by key (the sorting is not timed). The tree gets rows that are bytes already; the store gets columns. The files are
   first in the page cache as the load left them, then as after a restart: the kernel caches a file in pieces of up to
   megabytes, and the size of the pieces decides the cost of writing one page.
2. A reader in another process looks up batches of 100 random keys, first alone and then while the store is written to:
   its P99, the delay between the return of a commit and its visibility, and the cost of moving to a new snapshot per
   changed bucket.
3. The growth of the file during 2, over the given minutes (20 s with --quick).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import installed
import numpy as np
import tables
from report import at_least, at_most, print_bars, print_json, spread

from shorttail._native.columns import Columns
from shorttail._native.pages import Lookup, lookup
from shorttail.define import dtypes
from shorttail.store import Store

COMMIT_ROWS, NEW_ROWS = 1000, 100
READ_ROWS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="1 M rows and 20 s of growth: within 50 s")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the measurement of growth")
    options = parser.parse_args()
    n = 1_000_000 if options.quick else 10_000_000
    rounds, commits = (5, 8) if options.quick else (9, 20)
    growth_s = 20.0 if options.quick else 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="shorttail-push-") as folder:
        figures = measure(Path(folder), n, rounds, commits, growth_s)
    bars = judge(figures)
    if options.json:
        return print_json(figures, bars)
    for what, value in figures.items():
        shown = (
            f"{value['median']:,.3f} ({value['min']:,.3f} .. {value['max']:,.3f})" if isinstance(value, dict) else value
        )
        print(f"{what:<48}{shown}")
    print_bars(bars)


def judge(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        at_least("store against py-lmdb, rows/s", figures["store / tree"]["median"], 1.0, "times"),
        at_most("reader's P99 while written to", figures["reader P99, written / quiet"]["median"], 1.5, "times"),
        at_most("commit to visible elsewhere, P99", figures["visible after, P99, ms"]["median"], 5, "ms"),
        at_most("snapshot, a changed bucket", figures["refresh, us a bucket"]["median"], 2, "us"),
        at_most("growth of the file", figures["file grew to"], 1.1, "times"),
    ]


def measure(folder: Path, n: int, rounds: int, commits: int, growth_s: float) -> dict[str, Any]:
    keys = tables.random_keys(n + NEW_ROWS * 100_000, seed=1)
    tables.make_store(folder / "store", keys[:n]).close()
    tables.make_tree(folder / "tree", keys[:n]).close()
    figures: dict[str, Any] = {"rows": n, "rows a commit": COMMIT_ROWS, "rounds": rounds}
    draw = drawn(keys, n)
    figures |= throughput(folder, draw, rounds, commits)
    # This runs in its own process: a process that has LMDB's file open must not open and close it a second time.
    recache = "import sys, pathlib, tables; [tables.cache_anew(pathlib.Path(p)) for p in sys.argv[1:]]"
    files = [str(folder / name / "data.mdb") for name in ("store", "tree")]
    subprocess.run([sys.executable, "-c", recache, *files], cwd=Path(__file__).parent, check=True)
    again = throughput(folder, draw, rounds, commits)
    figures |= {f"after a restart: {what}": value for what, value in again.items()}
    with Store.open(folder / "store") as store:
        figures |= with_reader(folder / "store", store, draw, keys[:n], rounds, growth_s)
    return figures


def drawn(keys: tables.Keys, n: int) -> Iterator[tables.Keys]:
    """Yield the keys of one commit after the other: existing and new keys."""
    rng = np.random.default_rng(2)
    while n + NEW_ROWS <= len(keys):
        existing = keys[rng.integers(0, n, COMMIT_ROWS - NEW_ROWS)]
        yield np.concatenate([existing, keys[n : n + NEW_ROWS]])
        n += NEW_ROWS


def throughput(folder: Path, draw: Iterator[tables.Keys], rounds: int, commits: int) -> dict[str, Any]:
    tree = tables.open_tree(folder / "tree")
    with Store.open(folder / "store") as store:
        store.pretouch()
        figures = in_turn(store, tree, draw, rounds, commits)
    tree.close()
    return figures


def in_turn(store: Store, tree: Any, draw: Iterator[tables.Keys], rounds: int, commits: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"store": [], "tree": [], "tree, sorted": []}
    for number in range(-1, rounds):  # the first round is not counted, because it maps pages
        now_us = time.time_ns() // 1000
        batches = [tables.batch(next(draw), now_us) for _ in range(commits)]
        took = {"store": timed(lambda batch: store.upsert("rows", batch), batches)}
        for name, order in (("tree", np.asarray), ("tree, sorted", np.sort)):
            rows = [tables.tree_rows(order(next(draw)), now_us) for _ in range(commits)]
            took[name] = timed(lambda items: put(tree, items), rows)
        if number >= 0:
            for name, seconds in took.items():
                found[name].append(commits * COMMIT_ROWS / seconds)
    figures = {f"{name}, rows/s": spread(values) for name, values in found.items()}
    for name in ("tree", "tree, sorted"):
        figures[f"store / {name}"] = spread([a / b for a, b in zip(found["store"], found[name], strict=True)])
    return figures


def timed(write: Callable[[Any], object], commits: list[Any]) -> float:
    start = time.perf_counter()
    for rows in commits:
        write(rows)
    return time.perf_counter() - start


def put(tree: Any, rows: list[tuple[bytes, bytes]]) -> None:
    with tree.begin(write=True) as txn:
        txn.cursor().putmulti(rows)


def with_reader(
    path: Path, store: Store, draw: Iterator[tables.Keys], keys: tables.Keys, rounds: int, growth_s: float
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    marker = keys[:1]
    reader = context.Process(target=read, args=(str(path), keys[:: max(1, len(keys) // 1_000_000)], marker, theirs))
    reader.start()
    ours.recv()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    found: dict[str, list[float]] = {"ratio": [], "quiet": [], "written": [], "visible": [], "refresh": []}
    try:
        for _ in range(rounds):
            ours.send(3.0)
            quiet = ours.recv()
            ours.send(3.0)
            returned = write_for(store, draw, marker, 3.0)
            written = ours.recv()
            found["quiet"].append(quiet["p99_us"])
            found["written"].append(written["p99_us"])
            found["ratio"].append(written["p99_us"] / quiet["p99_us"])
            delays = [seen - returned[k] for k, seen in written["seen"].items() if k in returned]
            found["visible"].append(1000 * float(np.percentile(np.maximum(delays, 0), 99)))
            found["refresh"].append(written["refresh_us"] / COMMIT_ROWS)
        size = (path / "data.mdb").stat().st_size
        ours.send(growth_s)
        write_for(store, draw, marker, growth_s)
        ours.recv()
        grown = (path / "data.mdb").stat().st_size
    finally:
        ours.send(None)
        reader.join()
        os.sched_setaffinity(0, cores)
    return {
        "reader P99, quiet, us": spread(found["quiet"]),
        "reader P99, written, us": spread(found["written"]),
        "reader P99, written / quiet": spread(found["ratio"]),
        "visible after, P99, ms": spread(found["visible"]),
        "refresh, us a bucket": spread(found["refresh"]),
        "file grew to": grown / size,
        "growth, s": growth_s,
    }


def write_for(store: Store, draw: Iterator[tables.Keys], marker: tables.Keys, seconds: float) -> dict[int, float]:
    """Commit until the time is over. Returns when each commit returned, by the number in its marker row."""
    returned = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        batch = tables.batch(np.concatenate([marker, next(draw)[1:]]), time.time_ns() // 1000)
        number = write_for.number = getattr(write_for, "number", 0) + 1  # type: ignore[attr-defined]
        batch.features[0][0][0] = number
        store.upsert("rows", batch)
        returned[number] = time.monotonic()
    return returned


def read(path: str, keys: tables.Keys, marker: tables.Keys, pipe: Any) -> None:
    """Run the reader process: it looks up for the requested number of seconds, then reports."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    rng = np.random.default_rng(3)
    with Store.open(path) as store:
        columns = Columns(["id"], [dtypes.Int64])
        out, status = np.empty((READ_ROWS, tables.FEATURES), np.float32), np.empty((1, READ_ROWS), np.uint8)
        plan = Lookup(store.layout("rows"), [0], [(i, 0, i, None) for i in range(tables.FEATURES)], 0)
        with store.reading():
            store.directory("rows")
            store._tree.populate()
        pipe.send("ready")
        while (seconds := pipe.recv()) is not None:
            batches = keys[rng.integers(0, len(keys), (4096, READ_ROWS))]
            batches[:, 0] = marker[0]
            took_ns, refreshes_us, seen, last, number = [], [], {}, 0.0, 0
            end = time.monotonic() + seconds
            while (now := time.monotonic()) < end:
                columns.reset()
                columns.append({"id": batches[number % 4096]})
                number += 1
                start = time.perf_counter_ns()
                moved = store.refresh()
                refreshed = time.perf_counter_ns()
                with store.reading():
                    lookup([store.directory("rows")], [plan], columns, [out], status, 0)
                took_ns.append(time.perf_counter_ns() - start)
                if moved:
                    refreshes_us.append((refreshed - start) / 1000)
                if out[0, 0] != last:
                    last = float(out[0, 0])
                    seen[int(last)] = time.monotonic()
            pipe.send(
                {
                    "p99_us": float(np.percentile(took_ns, 99)) / 1000,
                    "refresh_us": float(np.median(refreshes_us)) if refreshes_us else 0.0,
                    "seen": seen,
                }
            )
            del now


if __name__ == "__main__":
    main()
