"""Compare lookups of rows with 32 float32 features: shorttail's store, py-lmdb and a hash table in memory.

    python bench/micro/lookup.py [--json] [--quick]

Every figure is nanoseconds per row. In each round the rivals look up the same new keys in turn on one core. Figures are
medians over batches and then over rounds; ratios are taken within a round. The script checks that all three give the
same answers. `getmulti` is py-lmdb's batch lookup on an ordinary tree of the same rows, with values joined and decoded
by NumPy. The table in memory (bench/c/hash.c) has the same prefetching loops and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import statistics
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
from numpy.typing import NDArray
from report import at_least, at_most, print_bars, print_json, spread

from shorttail._native.columns import Columns
from shorttail._native.pages import Lookup, lookup
from shorttail.define import dtypes
from shorttail.engine import Engine
from shorttail.store import Store

BATCHES = (1, 10, 100, 1000)
Draw = Callable[[int], NDArray[np.int64]]  # n -> positions of keys
Ask = Callable[[tables.Keys], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="smaller tables, fewer rounds: within 50 s")
    options = parser.parse_args()
    sizes = (100_000, 1_000_000) if options.quick else (1_000_000, 10_000_000)
    rounds = 5 if options.quick else 15
    figures: dict[str, Any] = {"unit": "ns a row", "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="shorttail-lookup-", dir=os.environ.get("TMPDIR")) as folder:
        for n in sizes:
            figures[f"{n:,} rows"] = measure(Path(folder) / str(n), n, rounds)
    bars = judge(figures, *(f"{n:,} rows" for n in sizes))
    if options.json:
        return print_json(figures, bars)
    for name in (f"{n:,} rows" for n in sizes):
        print(name)
        for what, value in figures[name].items():
            print(f"  {what:<44}{value['median']:>10.1f}   ({value['min']:.1f} .. {value['max']:.1f})")
    print_bars(bars)


def judge(figures: dict[str, Any], small: str, large: str) -> list[dict[str, Any]]:
    def median(size: str, what: str) -> float:
        return float(figures[size][what]["median"])

    bars = []
    for size, limit in ((small, 50), (large, 80)):
        bars.append(at_most(f"lookup, 1,000 keys, {size}", median(size, "store, 1000 keys"), limit, "ns a row"))
        bars.append(at_least(f"getmulti against it, {size}", median(size, "getmulti / store"), 15, "times"))
        bars.append(at_most(f"it against a hash table in memory, {size}", median(size, "store / memory"), 1.6, "times"))
    bars.append(at_most("one row by the embedded API", median(small, "Engine, 1 key") / 1000, 5, "us"))
    bars.append(at_most("string keys against integers", median(small, "strings / integers"), 1.6, "times"))
    return bars


def measure(folder: Path, n: int, rounds: int) -> dict[str, Any]:
    """Build the rivals for n rows, check that their answers are equal, and time them in turn."""
    folder.mkdir()
    keys = tables.random_keys(n, seed=1)
    rng = np.random.default_rng(n)
    scattered = rng.permutation(n)
    draws: dict[str, Draw] = {
        "uniform": lambda size: rng.integers(0, n, size),
        "zipf": lambda size: scattered[np.minimum(rng.zipf(1.1, size), n) - 1],
    }
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(tables.make_store(folder / "store", keys))
        texts = stack.enter_context(tables.make_store(folder / "texts", keys, text=True))
        tree = tables.make_tree(folder / "tree", keys)
        stack.callback(tree.close)
        engine = stack.enter_context(Engine.open(folder / "store"))
        memory = stack.enter_context(memory_table(keys))
        with tree.begin(buffers=False) as txn, store.reading(), texts.reading():
            ask_store, ask_texts = store_lookup(store), store_lookup(texts, text=True)
            ask_tree = tree_lookup(txn)
            asks: dict[str, Ask] = {"store": ask_store, "getmulti": ask_tree, "memory": memory, "texts": ask_texts}
            check(asks, keys[draws["uniform"](1000)])
            for _ in range(rounds):
                one_round(found, asks, keys, draws)
                found.setdefault("Engine, 1 key", []).append(time_engine(engine, keys[draws["uniform"](2000)]))
    return {what: spread(values) for what, values in found.items()}


def one_round(found: dict[str, list[float]], asks: dict[str, Ask], keys: tables.Keys, draws: dict[str, Draw]) -> None:
    def add(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    uniform = draws["uniform"]
    for size in BATCHES:
        add(f"store, {size} keys", time_batches(asks["store"], keys, uniform, size))
        add(f"memory, {size} keys", time_batches(asks["memory"], keys, uniform, size))
    ours, theirs = found["store, 1000 keys"][-1], time_batches(asks["getmulti"], keys, uniform, 1000, n_batches=10)
    add("getmulti, 1000 keys", theirs)
    add("getmulti / store", theirs / ours)
    add("store / memory", ours / found["memory, 1000 keys"][-1])
    add("store, 1000 keys, zipf", time_batches(asks["store"], keys, draws["zipf"], 1000))
    strings = time_batches(asks["texts"], keys, uniform, 1000)
    add("store, 1000 strings", strings)
    add("strings / integers", strings / ours)


def time_batches(ask: Ask, keys: tables.Keys, draw: Draw, size: int, n_batches: int = 0) -> float:
    """Return the median ns per row. Only the lookups of batches are timed, not the making of keys."""
    n_batches = n_batches or max(40, 2000 // size)
    times = []
    for _ in range(n_batches):
        ask(keys[draw(size)])
        times.append(ask.took_ns / size)  # type: ignore[attr-defined]
    return statistics.median(times)


class StoreLookup:
    """The engine's lookup, from request columns to a float32 matrix."""

    def __init__(self, store: Store, text: bool):
        dtype = dtypes.String if text else dtypes.Int64
        self.columns = Columns(["id"], [dtype])
        self.text = text
        self.plan = Lookup(store.layout("rows"), [0], [(i, 0, i, None) for i in range(tables.FEATURES)], 0)
        self.directories = [store.directory("rows")]
        self.took_ns = 0

    def __call__(self, keys: tables.Keys) -> NDArray[np.float32]:
        self.columns.reset()
        self.columns.append({"id": tables.text_keys(keys).tolist() if self.text else keys})
        out, status = np.empty((len(keys), tables.FEATURES), np.float32), np.empty((1, len(keys)), np.uint8)
        start = time.perf_counter_ns()
        lookup(self.directories, [self.plan], self.columns, [out], status, 0)
        self.took_ns = time.perf_counter_ns() - start
        return out


def store_lookup(store: Store, text: bool = False) -> Ask:
    return StoreLookup(store, text)


class TreeLookup:
    """py-lmdb's getmulti; one NumPy view of the bytes gives the features of all values."""

    def __init__(self, txn: Any):
        self.cursor = txn.cursor()
        self.took_ns = 0

    def __call__(self, keys: tables.Keys) -> NDArray[np.float32]:
        names = [key.to_bytes(8, "big") for key in keys.tolist()]
        start = time.perf_counter_ns()
        values = b"".join([value for _, value in self.cursor.getmulti(names)])
        rows = np.frombuffer(values, np.float32).reshape(len(keys), -1)[:, 2:]  # 2 words of event time come first
        self.took_ns = time.perf_counter_ns() - start
        return rows


def tree_lookup(txn: Any) -> Ask:
    return TreeLookup(txn)


class MemoryLookup:
    def __init__(self, library: ctypes.CDLL, table: int):
        self.library, self.table, self.took_ns = library, table, 0

    def __call__(self, keys: tables.Keys) -> NDArray[np.float32]:
        out, status = np.empty((len(keys), tables.FEATURES), np.float32), np.empty(len(keys), np.uint8)
        arguments = (self.table, keys.ctypes.data, len(keys), out.ctypes.data, status.ctypes.data)
        start = time.perf_counter_ns()
        self.library.table_lookup(*arguments)
        self.took_ns = time.perf_counter_ns() - start
        return out


@contextlib.contextmanager
def memory_table(keys: tables.Keys) -> Iterator[Ask]:
    rows = np.concatenate([tables.features_of(part) for part in np.array_split(keys, max(1, len(keys) // 65_536))])
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(Path(__file__).resolve().parents[1] / "c" / "hash.c", Path(folder) / "hash.so")
    library.table_new.restype = ctypes.c_void_p
    library.table_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32]
    library.table_lookup.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64] + [ctypes.c_void_p] * 2
    library.table_free.argtypes = [ctypes.c_void_p]
    table = library.table_new(keys.ctypes.data, rows.ctypes.data, len(keys), rows.strides[0])
    if not table:
        raise MemoryError
    try:
        yield MemoryLookup(library, table)
    finally:
        library.table_free(table)


def compile_library(source: Path, target: Path) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-std=c11", "-O3", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return ctypes.CDLL(str(target))


def time_engine(engine: Engine, keys: tables.Keys) -> float:
    """Return the median ns of get_online_features for all features of one row, including the Python call."""
    names = [f"rows:f{i}" for i in range(tables.FEATURES)]
    times = []
    for key in keys.tolist():
        start = time.perf_counter_ns()
        engine.get_online_features(names, {"id": key})
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def check(asks: dict[str, Ask], keys: tables.Keys) -> None:
    for name, ask in asks.items():
        if not np.array_equal(ask(keys), tables.features_of(keys)):
            sys.exit(f"error: {name} gives other rows than were stored")


if __name__ == "__main__":
    main()
