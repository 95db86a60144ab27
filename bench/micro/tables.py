"""Make the table that bench/micro/lookup.py and push.py measure, as a store and as an ordinary tree of py-lmdb.

A row is a key, an event time and 32 float32 features. Keys are random 63-bit integers, like many user ids, so new keys
go into the middle of an ordinary tree and not to its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.store import ColumnBatch, Store

FEATURES = 32
BATCH_ROWS = 65_536
READ_BYTES = 128 << 10
TREE_ROW_BYTES = 8 + 4 * FEATURES  # event time and features; the key of the row is the key in the tree
Keys = NDArray[np.int64]


def view(key: dtypes.DType = dtypes.Int64) -> FeatureView:
    features = [Feature(f"f{i}", dtypes.Float32) for i in range(FEATURES)]
    return FeatureView("rows", entity=Entity("row", keys={"id": key}), features=features)


def random_keys(n: int, seed: int) -> Keys:
    """Return n distinct keys. With the same seed and a larger n, the result begins with the same keys."""
    # A bijection from 0 .. n-1 to scattered integers, so the keys are distinct without sorting.
    numbers = np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return ((numbers ^ (numbers >> np.uint64(31))) >> np.uint64(1)).view(np.int64)


def text_keys(keys: Keys) -> NDArray[np.object_]:
    """Return the keys as strings of 17 bytes."""
    return np.array([f"u{key >> 3:016x}" for key in keys.tolist()], object)


def features_of(keys: Keys) -> NDArray[np.float32]:
    """Return float32 [n, 32] that a reader can check: feature i of a key is (key mod 2^20) + i."""
    return ((keys & 0xFFFFF)[:, None] + np.arange(FEATURES)).astype(np.float32)


def batches(keys: Keys, text: bool = False) -> Iterator[ColumnBatch]:
    for start in range(0, len(keys), BATCH_ROWS):
        part = keys[start : start + BATCH_ROWS]
        yield batch(part, text=text)


def batch(keys: Keys, event_time_us: int = 0, text: bool = False) -> ColumnBatch:
    columns = np.ascontiguousarray(features_of(keys).T)
    ids: Any = text_keys(keys) if text else keys
    return ColumnBatch([ids], np.full(len(keys), event_time_us, np.int64), [(column, None) for column in columns])


def make_store(path: Path, keys: Keys, text: bool = False) -> Store:
    """Make a store with these rows, and return it open."""
    store = Store.open(path, create=True)
    with store.edit_catalog() as catalog:
        definition = view(dtypes.String if text else dtypes.Int64)
        catalog.add(definition)
    store.load("rows", batches(keys, text))
    store.refresh()
    return store


def tree_rows(keys: Keys, event_time_us: int = 0) -> list[tuple[bytes, bytes]]:
    """Return (key, value) pairs for an ordinary tree, in the given order."""
    rows = np.empty(len(keys), np.dtype([("time", "<i8"), ("features", "<f4", FEATURES)]))
    rows["time"], rows["features"] = event_time_us, features_of(keys)
    data, names = rows.tobytes(), keys.astype(">i8").tobytes()
    size = TREE_ROW_BYTES
    return [(names[8 * i : 8 * i + 8], data[size * i : size * (i + 1)]) for i in range(len(keys))]


def open_tree(path: Path) -> Any:
    return lmdb.open(str(path), map_size=256 << 30, lib_version=0)


def make_tree(path: Path, keys: Keys) -> Any:
    """Load an ordinary LMDB tree with these rows, in the order of the keys, and return the lmdb.Environment."""
    env = open_tree(path)
    keys = np.sort(keys)
    for start in range(0, len(keys), BATCH_ROWS):
        with env.begin(write=True) as txn:
            txn.cursor().putmulti(tree_rows(keys[start : start + BATCH_ROWS]), append=True)
    return env


def cache_anew(path: Path) -> None:
    """Write the file back, drop it from the page cache and read it again, as a server does that maps its store.

    The way in which a file entered the page cache decides the size of the pieces in which the kernel keeps it, and so
    the cost of later writes. After this call, files that were written in different ways are cached in the same way, as
    after a restart.
    """
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for start in range(0, path.stat().st_size, READ_BYTES):
            os.posix_fadvise(file.fileno(), start, READ_BYTES, os.POSIX_FADV_WILLNEED)
        while file.read(1 << 20):
            pass
