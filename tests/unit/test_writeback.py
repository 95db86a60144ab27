"""Writeback starts disk writes during a large commit. It is only a hint and must not change any result."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from shorttail._native.pages import Writeback
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.store import ColumnBatch, Store
from shorttail.store.lmdb_handle import EARLY_PAGES
from shorttail.store.verify import verify

ROWS_PER_PAGE = 30  # most rows of 32 floats in a page


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def ended(before: set[int]) -> bool:
    """Return whether no other thread runs. The kernel may list a thread for a moment after it was joined."""
    end_s = time.monotonic() + 10
    while threads() - before and time.monotonic() < end_s:
        time.sleep(0.001)
    return not threads() - before


def test_the_thread_ends_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    before, files = threads(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        with Writeback(path):
            assert len(threads() - before) == 1
            path.write_bytes(os.urandom(1 << 16))
        assert ended(before)
    assert len(list(Path("/proc/self/fd").iterdir())) == files


def test_a_file_that_cannot_be_opened_is_ignored(tmp_path: Path) -> None:
    before = threads()
    with Writeback(tmp_path / "missing"):
        assert threads() <= before


def test_the_destructor_ends_the_thread(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    before = threads()
    writeback = Writeback(path)
    writeback.__enter__()
    assert len(threads() - before) == 1
    del writeback
    assert ended(before)


def test_the_thread_blocks_all_signals(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    own = threads()
    with Writeback(path):
        (added,) = threads() - own
        status = Path(f"/proc/self/task/{added}/status").read_text().splitlines()
        blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
        assert blocked >> (signal.SIGTERM - 1) & 1
        assert blocked >> (signal.SIGINT - 1) & 1


def test_large_and_small_commits_are_read_back(tmp_path: Path) -> None:
    features = [Feature(f"f{i}", dtypes.Float32) for i in range(32)]
    view = FeatureView("rows", entity=Entity("row", keys={"id": dtypes.Int64}), features=features)
    n = 2 * EARLY_PAGES * ROWS_PER_PAGE
    with Store.open(tmp_path / "store", create=True) as store:
        with store.edit_catalog() as catalog:
            catalog.add(view)
        before = threads()
        for keys in (np.arange(n), np.arange(10)):
            values = [(np.full(len(keys), float(i + len(keys)), np.float32), None) for i in range(32)]
            store.upsert("rows", ColumnBatch([keys], np.zeros(len(keys), np.int64), values))
        assert ended(before)
    report = verify(tmp_path / "store")
    assert report.ok, report.problems
