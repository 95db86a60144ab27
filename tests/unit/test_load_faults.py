"""Bulk loads while others read and write, and loads that fail or are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_load import SMALL, Seen, held, small, small_memory, store, tables

from shorttail._native.pages import PageImages
from shorttail.config import LIMITS
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.store import ColumnBatch, Store, rebuild
from shorttail.store import load as load_module

__all__ = ["small_memory", "store"]  # fixtures


def test_progress_adds_up_to_the_rows_given(store: Store, small_memory: Callable[..., Seen]) -> None:
    small_memory(512)
    seen: list[int] = []
    assert store.load("small", [small(range(20_001)), small(range(9000))], seen.append) == 20_001
    assert sum(seen) == 29_001
    assert min(seen) > 0
    assert len(seen) > 4, "also while it is written"


def test_too_little_memory_is_refused(store: Store) -> None:
    with pytest.raises(InvalidArgument, match=r"memory_bytes=1000 is too small.*4194304 or more"):
        store.load("small", [small([1])], None, 1000)
    assert store.load("small", [small([1])], None, 4 << 20) == 1


def test_readers_see_all_new_rows_or_none(store: Store, small_memory: Callable[..., Seen]) -> None:
    small_memory(512)
    store.load("small", [small(range(2000), 1.0)])
    errors: list[BaseException] = []
    seen: set[float] = set()
    changed = threading.Condition()
    stop = threading.Event()

    def read() -> None:
        try:
            with Store.open(store.path) as reader:
                while not stop.is_set():
                    found = held(reader)
                    assert len(found) == 2000
                    (version,) = set(found.values())
                    with changed:
                        seen.add(version)
                        changed.notify()
        except BaseException as error:
            errors.append(error)
            stop.set()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for version in range(2, 5):
            store.load("small", [small(range(2000), float(version))])
            with changed:
                assert changed.wait_for(lambda v=version: v in seen or stop.is_set(), 30)
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_writers_commit_in_between(store: Store, small_memory: Callable[..., Seen]) -> None:
    """During the load another view gets rows, and a table with a higher id."""
    small_memory(512)
    store.load("small", [small(range(100))])
    view = FeatureView("later", entity=SMALL.entity, features=SMALL.features)
    done = 0

    def write(rows: int) -> None:
        nonlocal done
        done += rows
        if done > 20_000 and "later" not in store.catalog.views:
            with store.edit_catalog() as catalog:
                catalog.add(view)
            store.refresh()
        if done > 20_000:
            store.upsert("later", small([done]))
            store.upsert("small", small([-1]))

    assert store.load("small", [small(range(40_000), 2.0)], write) == 40_000
    assert held(store) == dict.fromkeys(range(-1, 40_000), 2.0) | {-1: 0.0}, "what was upserted meanwhile is there"
    assert store.count("later") > 2
    assert tables(store)[0] == tables(store)[1] - {1}


def test_a_failing_source_leaves_nothing(store: Store, small_memory: Callable[..., Seen]) -> None:
    small_memory(512)
    store.load("small", [small([1])])
    before = tables(store)[0]

    def broken() -> Iterator[ColumnBatch]:
        yield small(range(30_000))
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        store.load("small", broken())
    assert held(store) == {1: 0.0}
    assert tables(store)[0] == before


def test_a_failing_commit_leaves_nothing(
    store: Store, small_memory: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(512)
    store.load("small", [small([1])])
    before = tables(store)[0]
    put, calls = load_module.PageWriter._put, []

    def failing(writer: load_module.PageWriter, images: PageImages) -> None:
        calls.append(len(images))
        if len(calls) == 3:
            raise ResourceExhausted("no room")
        put(writer, images)

    monkeypatch.setattr(load_module.PageWriter, "_put", failing)
    with pytest.raises(ResourceExhausted, match="no room"):
        store.load("small", [small(range(60_000))])
    assert len(calls) == 3
    assert held(store) == {1: 0.0}
    assert tables(store)[0] == before


def run(code: str, store: Store, memory_kib: int) -> subprocess.CompletedProcess[str]:
    """Run code in another process, in which `s` is the store and loads use little memory."""
    before = (
        "import sys, os, signal, resource\n"
        "from dataclasses import replace\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "import test_load as t\n"
        "from shorttail.errors import ResourceExhausted\n"
        f"t.load_module.LIMITS = replace(t.LIMITS, load_memory_bytes={memory_kib << 10}, load_memory_bytes_min=1)\n"
        "s = t.Store.open(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", before + code, store.path, *map(str, Path(__file__).parents[:2])]
    return subprocess.run(command, timeout=60, capture_output=True, text=True)


def test_the_next_load_deletes_the_leftovers_of_a_killed_one(store: Store) -> None:
    store.load("small", [small(range(100))])
    done = run(
        "done = 0\n"
        "def progress(rows):\n"
        "    global done\n"
        "    done += rows\n"
        "    if done > 20_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.load('small', [t.small(range(30_000))], progress)\n",
        store,
        512,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert store.count("small") == 100
    store.refresh()
    left = store.catalog.filling["small"].id
    assert left in tables(store)[0], "what it had written is there"
    assert not [entry for entry in Path(store.path).iterdir() if entry.name.startswith("load.rows")]
    assert store.load("small", [small(range(10))]) == 10
    present, used = tables(store)
    assert present <= used - {left}
    assert not store.catalog.filling


def test_full_disk_for_the_rows(store: Store) -> None:
    store.load("small", [small(range(100))])
    done = run(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try:\n    s.load('small', [t.small(range(50_000))])\n"
        "except ResourceExhausted as error:\n    print(error)\n",
        store,
        512,
    )
    assert "the disk has no room for the" in done.stdout, done.stderr
    assert store.path in done.stdout
    assert "view 'small'" in done.stdout
    assert store.count("small") == 100
    assert tables(store)[0] <= tables(store)[1]
    assert store.load("small", [small(range(50_000))]) == 50_000


def test_a_file_system_without_unnamed_files(
    store: Store, small_memory: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = small_memory(512)
    monkeypatch.setattr(os, "O_TMPFILE", os.O_EXCL | os.O_CREAT)  # opening a directory fails with these flags
    assert store.load("small", [small(range(50_000))]) == 50_000
    assert seen.spills > 0
    assert not (Path(store.path) / "load.rows").exists()


def file_pages(store: Store) -> int:
    return (Path(store.path) / "data.mdb").stat().st_size // 4096


READER = """
import sys
from shorttail.store import Store
with Store.open(sys.argv[1]) as store:
    print(store.count("small"), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("reader", ["none", "of this process", "of another process"])
def test_loads_that_fail_again_and_again_do_not_grow_the_file(
    store: Store, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """They fail before the first page, in the middle, and at the end. A reader holds a snapshot before each of them."""
    monkeypatch.setattr(load_module, "LIMITS", replace(LIMITS, load_commit_bytes=256 << 10))
    good = [small(range(60_000))]
    put, in_place = load_module.PageWriter._put, rebuild.Rebuild.put_in_place
    calls: list[int] = []

    def broken() -> Iterator[ColumnBatch]:
        yield from good
        raise OSError("the source went away")

    def failing(writer: load_module.PageWriter, images: PageImages) -> None:
        calls.append(len(images))
        if len(calls) == 5:
            raise OSError("the disk went away")
        put(writer, images)

    def refuse(*args: Any, **options: Any) -> None:
        raise InvalidArgument("the view was changed")

    def fail(how: str) -> None:
        calls.clear()
        monkeypatch.setattr(load_module.PageWriter, "_put", failing if how == "middle" else put)
        monkeypatch.setattr(rebuild.Rebuild, "put_in_place", refuse if how == "end" else in_place)
        with pytest.raises((OSError, InvalidArgument)):
            store.load("small", broken() if how == "source" else good)
        assert len(calls) == (5 if how == "middle" else 0)
        monkeypatch.setattr(load_module.PageWriter, "_put", put)
        monkeypatch.setattr(rebuild.Rebuild, "put_in_place", in_place)

    assert store.load("small", good) == 60_000
    other = None
    if reader == "of another process":
        command = [sys.executable, "-c", READER, store.path]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None
        assert other.stdout.readline() == b"60000\n"
    try:
        table = file_pages(store)
        sizes = []
        for how in ("end", "source", "middle", "end", "middle", "end"):
            if reader == "of this process":
                assert store.count("small") == 60_000  # moves the snapshot to the last commit
            fail(how)
            sizes.append(file_pages(store))
        assert sizes[0] < 2.2 * table, "the old table and the new one"
        assert sizes[-1] - sizes[0] < table / 20, sizes
        assert store.load("small", good) == 60_000
        assert file_pages(store) - sizes[0] < table / 20
    finally:
        if other is not None:
            other.communicate()


def test_refused_loads_do_not_grow_the_file(store: Store) -> None:
    store.load("small", [small(range(40_000))])
    sizes = []
    for _ in range(4):
        with pytest.raises(InvalidArgument, match="the load has 10,000 rows, and 40,000 are served"):
            store.load("small", [small(range(10_000))] * 5)  # known when equal keys have been found
        sizes.append(file_pages(store))
    assert sizes[-1] - sizes[0] < sizes[0] / 20, sizes
