"""A store of format 2 is read, not written, until `shorttail migrate` has rewritten it with the same rows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from format_2 import format_of, make_format_2, tables_of_format_2
from test_cli import Project, write_model, write_project
from test_load import ALL, SMALL, Rows, batch_of, batches_of, make_store, random_rows
from test_scan import expected as rows_of_pages

from shorttail.config import LIMITS
from shorttail.define.catalog import PAGE_FORMAT
from shorttail.errors import Internal, InvalidArgument, ResourceExhausted, Unavailable
from shorttail.registry.history import line
from shorttail.store import Store
from shorttail.store import migrate as migrate_module
from shorttail.store.backup import backup
from shorttail.store.environment import table_ids, table_pages
from shorttail.store.format import FORMAT_VERSION, migrating
from shorttail.store.migrate import Migration, migrate
from shorttail.store.stat import store_stats
from shorttail.store.table import make_layout
from shorttail.store.verify import verify

N = 8000
Found = dict[str, list[Any]]


def make_old_store(path: Path, n: int = N) -> None:
    """Make a store of format 2 with rows of every type, long strings, and an empty view."""
    random = np.random.default_rng(11)
    rows: Rows = random_rows(random, n, 4 * n)
    rows = [(key, (time_us, (*values[:-1], "x" * 9000 if at % 1000 == 5 else values[-1])))
            for at, (key, (time_us, values)) in enumerate(rows)]  # fmt: skip
    with tables_of_format_2(), make_store(path) as store:
        store.load("all", batches_of(ALL, rows, 1000))
        store.upsert("all", batch_of(ALL, random_rows(random, n // 4, 4 * n)))
        gone = [key for key, _ in rows[: n // 2]]
        store.delete("all", [np.array([key[0] for key in gone], np.int64), np.array([key[1] for key in gone], object)])
    make_format_2(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "store"
    make_old_store(path)
    return path


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """A store of format 2."""
    shutil.copytree(made, tmp_path / "store", ignore=shutil.ignore_patterns("lock.mdb"))
    return tmp_path / "store"


def rows_in(store: Store) -> Found:
    """Return the rows of each view, by plain decoding of pages, in an order of their own."""
    return {view.name: sorted(rows_of_pages(store, view), key=repr) for view in (ALL, SMALL)}


def rows_at(path: Path) -> Found:
    with Store.open(path) as store:
        return rows_in(store)


def small(*keys: int) -> Any:
    return batch_of(SMALL, [((key,), (5, (float(key),))) for key in keys])


WRITES: dict[str, Callable[[Store], Any]] = {
    "upsert": lambda store: store.upsert("small", small(1)),
    "delete": lambda store: store.delete("small", [np.array([1])]),
    "load": lambda store: store.load("small", [small(1)]),
    "settings": lambda store: store.set_max_clock_skew(5),
    "catalog": lambda store: store.edit_catalog().__enter__(),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_to_a_store_of_format_2_are_refused(path: Path, write: str) -> None:
    before = (path / "data.mdb").read_bytes()
    with Store.open(path) as store:
        for _ in range(2):
            with pytest.raises(InvalidArgument) as caught:
                WRITES[write](store)
            assert caught.value.message == (
                f"store '{path}' has format 2, which this shorttail only reads; run `shorttail migrate --store {path}`"
            )
    assert (path / "data.mdb").read_bytes() == before


def test_a_store_of_format_2_is_read_verified_and_backed_up(path: Path, tmp_path: Path) -> None:
    with Store.open(path) as store:
        n = store.count("all")
        assert n > N / 2
        assert {table.page_format for table in store.catalog.tables.values()} == {2}
        rows = rows_in(store)
        scanned = [batch.event_time_us for batch in store.scan("all")]
        assert sum(map(len, scanned)) == n == len(rows["all"])
        assert store_stats(store)["format"] == 2
        assert [event.action for event in store.history()][-1:] == ["loaded"]
        backup(store, tmp_path / "copy")
    assert (format_of(tmp_path / "copy"), rows_at(tmp_path / "copy")) == (2, rows)
    report = verify(path)
    assert (report.problems, report.rows) == ([], n)
    assert report.notes == [f"the store has format 2, which is only read; run `shorttail migrate --store {path}`"]


@pytest.mark.parametrize(("was", "flipped"), [(2, 3), (3, 2)])
def test_verify_finds_a_format_that_is_not_that_of_the_pages(path: Path, was: int, flipped: int) -> None:
    """The formats 2 and 3 differ by one bit of the file."""
    if was == 3:
        with Store.open(path) as store:
            migrate(store.environment)
    with Store.open(path) as store, migrating(), store.environment.write() as writer:
        writer.txn.put(b"format", str(flipped).encode())
    assert verify(path).problems == [
        f"the store has format {flipped}, and view '{name}' has pages of format {was}" for name in ("all", "small")
    ]


def test_a_migrated_store_has_the_same_rows_in_pages_of_format_3(path: Path) -> None:
    before = rows_at(path)
    told: list[int] = []
    with Store.open(path) as store:
        old = dict(store.catalog.tables)
        done = migrate(store.environment, "me", lambda rows, total: told.append(rows))
        assert done == Migration(str(path), 2, 2, len(before["all"]))
        assert told[-1] == done.rows
        assert rows_in(store) == before
        assert store.count("all") == len(before["all"])
        for name, table in store.catalog.tables.items():
            assert (table.page_format, table.seed, table.page_bytes) == (
                PAGE_FORMAT,
                old[name].seed,
                old[name].page_bytes,
            )
        with store.environment.read() as txn:
            assert table_ids(txn) == [store.catalog.tables["all"].id]  # the old tables are gone
            sequence = store.environment.sequence(txn)
            table = store.catalog.tables["all"]
            layout = make_layout(store.catalog.stored("all"))
            assert {layout.commit(page) < sequence for _, page in table_pages(txn, table.id)} == {True}
        event = store.history()[-1]
        assert (event.action, event.who, event.detail["from_format"]) == ("migrated", "me", 2)
        assert line(event) == f"migrated: format 3, {done.rows:,} rows"
        assert event.answers["view all"] == {"table": table.id}
        assert store.upsert("small", small(1, 2)) == 2
        assert store.load("all", [batch_of(ALL, random_rows(np.random.default_rng(3), 4000, 9000))]) > 0
    assert format_of(path) == FORMAT_VERSION
    report = verify(path)
    assert (report.problems, report.notes) == ([], [])


def test_there_is_nothing_to_do_for_a_store_of_format_3(path: Path) -> None:
    with Store.open(path) as store:
        migrate(store.environment)
        with store.environment.read() as txn:
            commit = store.environment.sequence(txn)
        rows, events = rows_in(store), store.history()
        assert migrate(store.environment) == Migration(str(path), FORMAT_VERSION)
        with store.environment.read() as txn:
            assert store.environment.sequence(txn) == commit
        assert (rows_in(store), store.history()) == (rows, events)


@pytest.mark.parametrize("views", [(), (SMALL,)])
def test_stores_without_rows_and_without_views_are_migrated(tmp_path: Path, views: Any) -> None:
    path = tmp_path / "store"
    with tables_of_format_2(), Store.open(path, create=True) as store, store.edit_catalog() as catalog:
        for view in views:
            catalog.entities[view.entity.name] = view.entity
            catalog.add(view)
        catalog.max_clock_skew_us += 1
    make_format_2(path)
    with Store.open(path) as store:
        assert migrate(store.environment) == Migration(str(path), 2, len(views), 0)
        store.refresh()
        assert list(store.catalog.views) == [view.name for view in views]
        for view in views:
            assert store.upsert(view.name, small(1)) == 1
    assert verify(path).problems == []


def test_readers_go_on_while_a_store_is_migrated_and_move_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, looked = rows_at(path), []
    monkeypatch.setattr(migrate_module, "LIMITS", replace(LIMITS, load_commit_bytes=100_000))
    with Store.open(path) as reader, Store.open(path) as store:
        scan = reader.scan("all", batch_rows=20)
        held = [next(scan)]

        def look(rows: int, total: int | None) -> None:
            looked.append(rows)
            held.append(next(scan))  # a scan that nobody reads is ended
            reader.refresh()
            assert reader.count("all") == len(before["all"])
            assert {table.page_format for table in reader.catalog.tables.values()} == {2}
            with pytest.raises(InvalidArgument, match="only reads"):
                in_a_thread(lambda: reader.upsert("small", small(1)))

        migrate(store.environment, progress=look)
        assert len(looked) > 4
        held += list(scan)  # its snapshot is from before
        times_us = [int(time_us) for batch in held for time_us in batch.event_time_us]
        n_keys = len(ALL.keys)
        assert sorted(times_us) == sorted(row[n_keys] for row in before["all"])
        assert rows_in(reader) == before
        assert {table.page_format for table in reader.catalog.tables.values()} == {PAGE_FORMAT}
        assert in_a_thread(lambda: reader.upsert("small", small(1))) == 1


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def unchanged(path: Path, before: Found) -> None:
    """Check that a failed migration left the store of format 2 and no tables of its own; and that another succeeds."""
    assert format_of(path) == 2
    assert verify(path).problems == []
    with Store.open(path) as store:
        assert rows_in(store) == before
        with store.environment.read() as txn:
            assert set(table_ids(txn)) <= {table.id for table in store.catalog.tables.values()}
            document = json.loads(bytes(txn.get(b"catalog")))  # still in the form that an older shorttail reads
            assert {len(entry) for entry in document["tables"].values()} == {3}
        migrate(store.environment)
        assert rows_in(store) == before
    assert format_of(path) == FORMAT_VERSION


@pytest.mark.parametrize("what", ["disk", "map"])
def test_a_migration_that_has_no_room_changes_nothing(made: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "store"
    backup(made, path)  # without free pages
    before, content = rows_at(path), (path / "data.mdb").read_bytes()
    with Store.open(path) as store, pytest.MonkeyPatch.context() as patch:
        if what == "disk":
            patch.setattr(migrate_module.os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
        else:
            patch.setattr(migrate_module, "usable_pages", lambda map_bytes: 300)
        with pytest.raises(ResourceExhausted) as caught:
            migrate(store.environment)
    assert re.fullmatch(
        rf"store '{path}': all tables are written once more, which takes [\d.]+ MiB, and its {what}.* has room for "
        r"[\d.]+ (KiB|bytes|MiB); make room, then migrate again",
        caught.value.message,
    )
    assert (path / "data.mdb").read_bytes() == content
    unchanged(path, before)


def test_a_store_that_is_written_meanwhile_is_not_migrated(path: Path) -> None:
    """As a process of an older shorttail does, which knows no format but its own."""
    before = rows_at(path)
    with Store.open(path) as store:

        def write(rows: int, total: int | None) -> None:  # in the thread that migrates, which may write
            with store.environment.write() as writer:
                writer.changed(bytes(12))

        with pytest.raises(Unavailable, match="was written by a process of an older shorttail while it was migrated"):
            migrate(store.environment, progress=write)
    unchanged(path, before)


def test_a_damaged_page_ends_a_migration(path: Path) -> None:
    with Store.open(path) as store, store.environment.read() as txn:
        table = store.catalog.tables["all"]
        bucket, page = list(table_pages(txn, table.id))[7]
        image = bytes(page)
    data = bytearray((path / "data.mdb").read_bytes())
    at = data.index(image)
    data[at + 200] ^= 1
    (path / "data.mdb").write_bytes(data)
    with Store.open(path) as store:
        with pytest.raises(Internal, match=f"the table of view 'all' is damaged .bucket {bucket.hex()}: its checksum"):
            migrate(store.environment)
        with store.environment.read() as txn:
            assert table_ids(txn) == [table.id]
    assert format_of(path) == 2
    data[at + 200] ^= 1
    (path / "data.mdb").write_bytes(data)
    assert verify(path).problems == []


def test_an_error_in_the_last_commit_changes_nothing(path: Path) -> None:
    before = rows_at(path)
    with Store.open(path) as store, pytest.MonkeyPatch.context() as patch:

        def fail(*_: Any) -> None:
            raise ResourceExhausted("full")

        patch.setattr(migrate_module.history, "append", fail)
        with pytest.raises(ResourceExhausted, match="full"):
            migrate(store.environment)
    unchanged(path, before)


def test_two_migrations_take_turns(path: Path) -> None:
    before = rows_at(path)
    with Store.open(path) as store, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: migrate(store.environment), range(2)))
        assert sorted(each.from_format for each in done) == [2, FORMAT_VERSION]
        assert rows_in(store) == before


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose store has format 2."""
    project = write_project(tmp_path)
    with tables_of_format_2():
        project.ok("apply", "definitions.py", "--store", "store", "--create")
        project.ok("materialize", "--store", "store")
    make_format_2(tmp_path / "store")
    return project


def test_the_command_migrates_once(project: Project) -> None:
    assert (
        "format: 2, which is only read; run `shorttail migrate --store store`"
        in project.ok("stat", "--store", "store").out.splitlines()
    )
    answer = ["predict", "delay", "tailnum=N1", "origin=JFK", "dest_id=1", "--store", "store"]
    before = project.run(*answer)
    done = project.ok("migrate", "--store", "store", "--by", "ci", "--json").json
    assert done.pop("seconds") >= 0
    assert done == {"store": "store", "from_format": 2, "format": FORMAT_VERSION, "tables": 2, "rows": 3}
    assert project.run(*answer) == before
    assert project.ok("migrate", "--store", "store").out == "store: has format 3; there is nothing to do\n"
    assert re.search(r"  ci  migrated: format 3, 3 rows\n$", project.ok("history", "--store", "store").out)
    assert "format: " not in project.ok("stat", "--store", "store").out
    assert project.ok("verify", "--store", "store", "--json").json["ok"]


def test_the_command_says_what_it_did(project: Project) -> None:
    said = project.ok("migrate", "--store", "store").out
    assert re.fullmatch(r"store: format 2 is now 3; 2 tables, 3 rows in \d+\.\d s\n", said)
    assert "no store at 'other'" in project.fails("migrate", "--store", "other")


REFUSED = [
    ["apply", "definitions.py", "--max-clock-skew", "5m"],
    ["materialize"],
    ["load", "plane", "planes.parquet"],
    ["push", "plane", "planes.parquet"],
    ["delete", "plane", "tailnum=N1"],
    ["settings", "set", "max_clock_skew", "5m"],
    ["models", "deploy", "delay", "delay2.onnx"],
]


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_commands_that_write_name_the_migration(project: Project, command: list[str]) -> None:
    write_model(project.folder / "delay2.onnx", bias=1.0)
    before = (project.folder / "store" / "data.mdb").read_bytes()
    assert project.fails(*command, "--store", "store") == (
        "error: store 'store' has format 2, which this shorttail only reads; run `shorttail migrate --store store`\n"
    )
    assert (project.folder / "store" / "data.mdb").read_bytes() == before
    assert [path.name for path in (project.folder / "store" / "models" / "delay").iterdir()] == ["1"]
