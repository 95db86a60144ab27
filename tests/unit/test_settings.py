"""The settings of a store: its largest size, the length of its change log, and its durability."""

from __future__ import annotations

from pathlib import Path

import commands
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from test_care import in_child, wide_rows, wide_store
from test_store import make_store, rows, scores

from shorttail._native.pages import crc32c
from shorttail.define.sizes import UNIT_BYTES, exact_size, parse_size
from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.store import Store
from shorttail.store.environment import log_entries
from shorttail.store.lmdb_handle import LmdbHandle
from shorttail.store.settings import StoreSettings
from shorttail.store.stat import store_stats
from shorttail.store.verify import verify

DEFAULTS = {
    "max_clock_skew": "1h",
    "map_size": "default",
    "log_bytes": "64MiB",
    "log_commits": "4096",
    "durability": "commit",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with make_store(tmp_path / "store") as store:
        store.load("stats", [rows(range(3000))])
    return tmp_path / "store"


def logged(store: Store) -> int:
    with store.environment.read() as txn:
        return sum(1 for _ in log_entries(txn))


# -- the commands ------------------------------------------------------------------------------------------------------


def test_settings_are_listed_changed_and_told_by_the_history(path: Path) -> None:
    store = ("--store", str(path))
    assert commands.run_well("settings", "list", *store, "--json").json == DEFAULTS
    for name, value, shown in (
        ("map_size", "64GB", "64GB"),
        ("log_bytes", "1048576B", "1MiB"),
        ("log_commits", "100", "100"),
        ("durability", "system", "system"),
    ):
        said = commands.run_well("settings", "set", name, value, *store, "--by", "ops").out
        assert said == f"{name}: {DEFAULTS[name]} -> {shown}\n"
        assert commands.run_well("settings", "set", name, value, *store, "--json").json == {name: shown}
        assert commands.run_well("settings", "set", name, value, *store).out == f"{name}: {shown}\n"
    listed = commands.run_well("settings", "list", *store).out.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [
        ["max_clock_skew", "1h"],
        ["map_size", "64GB"],
        ["log_bytes", "1MiB"],
        ["log_commits", "100"],
        ["durability", "system"],
    ]
    told = commands.run_well("history", *store).out.splitlines()
    assert [line.split("  ", 1)[1] for line in told[-4:]] == [
        "ops  set map_size: 64GB",
        "ops  set log_bytes: 1MiB",
        "ops  set log_commits: 100",
        "ops  set durability: system",
    ]
    for name in DEFAULTS:
        commands.run_well("settings", "set", name, "default", *store)
    assert commands.run_well("settings", "list", *store, "--json").json == DEFAULTS
    assert verify(path).ok


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("map_size", "64", "map_size '64' is not a size from 1MiB to 64TiB; write '64GB' or '512MiB'"),
        ("map_size", "1KB", "map_size '1KB' is not a size from 1MiB"),
        ("map_size", "-1GB", "map_size '-1GB' is not a size"),
        ("map_size", "65TiB", "map_size '65TiB' is not a size"),
        ("log_bytes", "1.5GB", "log_bytes '1.5GB' is not a size from 4KiB to 1TiB"),
        ("log_commits", "0", "log_commits '0' is not a number from 1 to 1,000,000; write 4096"),
        ("log_commits", "٣", "log_commits '٣' is not a number"),
        ("log_commits", "9" * 5000, "is not a number from 1 to 1,000,000"),
        ("durability", "fast", "durability 'fast' is neither 'commit' nor 'system'"),
        ("max_clock_skew", "soon", "max_clock_skew 'soon' is not a positive time"),
    ],
)
def test_wrong_values_change_nothing(path: Path, name: str, value: str, said: str) -> None:
    error = commands.error_of("settings", "set", "--store", str(path), "--", name, value)
    assert said in error or said[-20:] in error
    assert commands.run_well("settings", "list", "--store", str(path), "--json").json == DEFAULTS


@given(some.integers(1, 1 << 46))
def test_sizes_are_shown_as_they_are_read(n_bytes: int) -> None:
    assert parse_size(exact_size(n_bytes), "x", 1, 1 << 46) == n_bytes


@pytest.mark.parametrize("unit", UNIT_BYTES)
def test_units_of_sizes(unit: str) -> None:
    assert parse_size(f" 3 {unit} ", "x", 1, 1 << 60) == 3 * UNIT_BYTES[unit]
    with pytest.raises(InvalidArgument):
        parse_size(f"3{unit.lower()}x", "x", 1, 1 << 60)


# -- the size ----------------------------------------------------------------------------------------------------------


def fill(store: Store, first: int = 0) -> int:
    """Upsert rows until the store is full. Return how many there are."""
    n = first
    for step in (1000, 100, 10):
        try:
            while n < 200_000:
                store.upsert("wide", wide_rows(range(n, n + step), 100))
                n += step
        except ResourceExhausted as error:
            said = error.message
    assert "has reached its map_size of 8MiB; delete rows, some hundreds at a time, or give it more" in said
    return n


def test_a_store_grows_up_to_its_map_size_and_on_when_it_gets_more(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with wide_store(path, 100) as store:
        store.set_setting("map_size", "8MiB")  # it holds at once, also where the store is open
        n = fill(store)
        assert store_stats(store)["map_bytes"] == 8 << 20
        assert store.upsert("wide", wide_rows(range(100), 100)) == 100  # existing rows can still be replaced
        assert store.delete("wide", [np.arange(100)]) == 100
        with pytest.raises(
            InvalidArgument, match=r"map_size '7MiB': 6\.\d MiB of store '.*' are in use, and deletes need"
        ):
            store.set_setting("map_size", "7MiB")
        with Store.open(path) as other:
            other.set_setting("map_size", "64MB")
        assert store.upsert("wide", wide_rows(range(n, 2 * n), 100)) == n
    assert verify(path).ok


def test_a_map_size_above_the_map_is_taken_when_the_store_is_opened(path: Path) -> None:
    code = (
        "import sys\nfrom shorttail.store import Store\n"
        "with Store.open(sys.argv[1]) as store:\n    print(store.environment.handle.env.info()['map_size'])\n"
    )
    with Store.open(path) as store:
        store.set_setting("map_size", "1TiB")
        before = store.environment.handle.env.info()["map_size"]
        assert store_stats(store)["map_bytes"] == before < 1 << 40
        assert in_child(code, path).stdout == f"{1 << 40}\n"
        assert in_child(code, path, SHORTTAIL_MAP_GIB="1").stdout == f"{1 << 30}\n"  # the variable is for one process
    with Store.open(path) as store:
        assert store.environment.handle.env.info()["map_size"] == 1 << 40
        assert scores(store, [1]) == [1.0]
        assert store.upsert("stats", rows(range(5000, 5010))) == 10


# -- the log -----------------------------------------------------------------------------------------------------------


def test_the_log_has_as_many_commits_and_bytes_as_it_is_given(path: Path) -> None:
    with Store.open(path) as store, Store.open(path) as reader:
        for number in range(20):
            store.upsert("stats", rows([9000 + number]))
        assert logged(store) > 20
        reader.enter()  # behind from now on
        store.set_setting("log_commits", "3")
        for number in range(20, 25):
            store.upsert("stats", rows([9000 + number]))
        assert logged(store) == 3
        reader.leave()
        assert scores(reader, [9000, 9024]) == [9000.0, 9024.0]
        store.set_setting("log_commits", "default")
        store.set_setting("log_bytes", "4KiB")
        for _ in range(20):
            store.upsert("stats", rows(range(3000)))  # of many pages
        assert 1 < logged(store) < 20
        assert 2048 < store_stats(store)["change_log"]["bytes"] <= 4096
        assert scores(reader, [9000, 9024]) == scores(store, [9000, 9024])
    assert verify(path).ok


# -- durability --------------------------------------------------------------------------------------------------------


def test_the_durability_is_that_of_the_opening(path: Path) -> None:
    def metasync(store: Store) -> bool:
        return bool(store.environment.handle.env.flags()["metasync"])

    with Store.open(path) as store:
        assert metasync(store)
        store.set_setting("durability", "system")
        assert metasync(store)
    with Store.open(path) as store:
        assert not metasync(store)
        assert store.environment.handle.env.flags()["sync"]  # pages are flushed before the meta page is written
        store.upsert("stats", rows([9000]))
        with Store.open(path) as reader:
            assert scores(reader, [9000]) == [9000.0]
        store.set_setting("durability", "commit")
    with Store.open(path) as store:
        assert metasync(store)
        assert scores(store, [9000]) == [9000.0]
    assert verify(path).ok


WRITES = """
import os, sys
from test_store import *
with Store.open(sys.argv[1]) as store:
    for number in range(10):
        store.upsert("stats", rows([9000 + number]))
    os._exit(0)
"""


def test_a_killed_process_loses_nothing(path: Path) -> None:
    with Store.open(path) as store:
        store.set_setting("durability", "system")
    assert in_child(WRITES, path).returncode == 0
    with Store.open(path) as store:
        assert scores(store, [9000, 9009]) == [9000.0, 9009.0]
    assert verify(path).ok


def test_what_must_last_is_flushed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    sync = LmdbHandle.sync
    monkeypatch.setattr(LmdbHandle, "sync", lambda handle: (flushed.append("sync"), sync(handle))[1])
    with Store.open(path) as store:
        store.set_setting("durability", "system")
        assert len(flushed) == 1
        name = store.catalog.view("stats").entity.name
        store.refresh()
        store.delete_entity(name, {key: np.array([1]) for key in store.catalog.view("stats").keys})
        assert len(flushed) == 2


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b"", b"abc", b"\0\0\0\0{}", bytes(range(40))], ids=len)
def test_damaged_settings_are_the_defaults_and_can_be_set_again(path: Path, bad: bytes) -> None:
    with Store.open(path) as store:
        store.set_setting("log_commits", "5")
        with store.environment.write() as writer:
            writer.txn.put(b"settings", bad)
    assert verify(path).problems == [
        "the settings are damaged; the defaults hold until `shorttail settings set` writes them again"
    ]
    with Store.open(path) as store:
        assert store.settings() == StoreSettings()
        store.set_setting("log_commits", "7")
        assert store.settings() == StoreSettings(log_commits=7)
    assert verify(path).ok


def test_settings_of_a_later_version_are_left_out(path: Path) -> None:
    with Store.open(path) as store:
        text = b'{"colour": "red", "log_commits": 9}'
        with store.environment.write() as writer:
            writer.txn.put(b"settings", crc32c(text).to_bytes(4, "little") + text)
        assert store.settings() == StoreSettings(log_commits=9)
