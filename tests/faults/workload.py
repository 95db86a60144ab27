"""The work of the processes under test: numbered steps, each of which changes a known store into another known store.

A step is one of three kinds: a commit that changes rows of the views "stats" and "extra", a bulk load of "stats", or a
new table and a new description for "extra". The row MARKER of "stats" and the description tell the last step that a
store has seen. `expected` returns the other contents, which are a function of the number of the step.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import changing
import commands
import numpy as np
from numpy.typing import NDArray
from small_disk import ROOM, FullDisk, free, mount_of
from zygote import FULL_ONCE, LOST, Shim

from shorttail._native.columns import Columns
from shorttail._native.pages import Lookup, lookup
from shorttail.config import LIMITS
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import ResourceExhausted, Unavailable
from shorttail.registry.apply import apply
from shorttail.store import ColumnBatch, Delete, Store, Upsert
from shorttail.store.backup import backup
from shorttail.store.environment import table_ids, table_pages
from shorttail.store.files import model_path
from shorttail.store.migrate import migrate
from shorttail.store.table import make_layout

Report = Callable[..., None]
Rows = dict[int, int]  # key -> the step that wrote it
MARKER = -1
N_KEYS = 400
WIDTH = 60  # rows are wide, so a page holds about a dozen
KINDS = ("edit", "grow", "shrink", "load", "catalog")
CYCLE = ("edit", "edit", "grow", "shrink", "load", "edit", "edit", "catalog")

USER = Entity("user", keys={"user_id": dtypes.Int64})
FEATURES = [Feature("v", dtypes.Vector(WIDTH)), Feature("s", dtypes.String), Feature("n", dtypes.Int64)]
VIEWS = {name: FeatureView(name, entity=USER, features=FEATURES) for name in ("stats", "extra")}
OTHER = FeatureView("other", entity=USER, features=FEATURES)  # the steps do not change it


def set_limits() -> None:
    """Set limits so small that a load and the deletion of a table take several commits. Only for a child process."""
    for name, value in {"load_commit_bytes": 64 << 10, "drop_commit_pages": 16}.items():
        object.__setattr__(LIMITS, name, value)


def kind_of(step: int) -> str:
    return CYCLE[step % len(CYCLE)]


def first_of(kind: str, start: int) -> int:
    """Return the first step of a kind, from `start` on."""
    return next(step for step in range(start, start + len(CYCLE)) if kind_of(step) == kind)


def changed_keys(step: int) -> tuple[list[int], list[int], list[int]]:
    """Return (keys of stats to put, keys to delete, keys of extra to put) of a step."""
    rng = random.Random(step)
    puts, deletes = {"edit": (60, 20), "grow": (250, 0), "shrink": (5, 300), "load": (300, 0), "catalog": (0, 0)}[
        kind_of(step)
    ]
    keys = rng.sample(range(N_KEYS), puts + deletes) if puts + deletes <= N_KEYS else []
    extra = rng.sample(range(N_KEYS), 30) if kind_of(step) not in ("load", "catalog") else []
    return keys[:puts], keys[puts:], extra


def expected(step: int) -> tuple[Rows, Rows, str]:
    """Return the rows of stats, the rows of extra and the description of extra after a step."""
    stats: Rows = {}
    extra: Rows = {}
    described = 0
    for number in range(
        max(1, step - 2 * len(CYCLE)), step + 1
    ):  # each of the last two cycles has a load and a new table
        kind = kind_of(number)
        puts, deletes, others = changed_keys(number)
        if kind == "catalog":
            extra, described = {}, number
            continue
        if kind == "load":
            stats = {}
        for key in deletes:
            stats.pop(key, None)
        stats |= dict.fromkeys([*puts, MARKER], number)
        extra |= dict.fromkeys(others, number)
    return stats, extra, str(described)


# -- rows ----------------------------------------------------------------------------------------------------------


def columns_of(keys: NDArray[np.int64], steps: NDArray[np.int64]) -> tuple[Any, Any, Any, Any]:
    """Return the features of rows: v, s, n, and a mask where n is null."""
    v = ((keys * 1000 + steps)[:, None] + np.arange(WIDTH)).astype(np.float32)
    s = np.empty(len(keys), object)
    s[:] = [f"{k}:{n} " * (k % 5) if k % 11 else None for k, n in zip(keys.tolist(), steps.tolist(), strict=True)]
    nulls = keys % 7 == 3
    return v, s, np.where(nulls, 0, steps), nulls


def batch_of(keys: list[int], step: int) -> ColumnBatch:
    ids = np.array(keys, np.int64)
    times = np.full(len(ids), step, np.int64)
    v, s, n, nulls = columns_of(ids, times)
    return ColumnBatch([ids], times, [(v, None), (s, None), (n, nulls)])


def create(path: str | os.PathLike[str]) -> None:
    """Create a store that has seen step 0."""
    with Store.open(path, create=True) as store, store.edit_catalog() as catalog:
        for view in VIEWS.values():
            catalog.add(replace(view, description="0"))
        catalog.add(OTHER)


def create_before(path: str | os.PathLike[str], kind: str) -> int:
    """Create a store with some steps whose next step is of a kind, and return that step."""
    create(path)
    step = first_of(kind, 2 * len(CYCLE))
    with Store.open(path) as store:
        for number in range(1, step):
            take(store, number)
    return step


def take(store: Store, step: int) -> None:
    """Do a step."""
    kind = kind_of(step)
    puts, deletes, extra = changed_keys(step)
    if kind == "catalog":
        with store.edit_catalog() as catalog:
            catalog.add(replace(VIEWS["extra"], description=str(step)))
    elif kind == "load":
        rows = batch_of([*puts, MARKER], step)
        store.load("stats", [rows.slice(at, at + 100) for at in range(0, len(rows), 100)])
    else:
        outcomes = store.commit(
            [
                Delete("stats", [np.array(deletes, np.int64)]),
                Upsert("stats", batch_of([*puts, MARKER], step)),
                Upsert("extra", batch_of(extra, step)),
            ]
        )
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


# -- checks --------------------------------------------------------------------------------------------------------


def look_up_all(store: Store) -> tuple[Rows, Rows, str]:
    """Read what `expected` returns by lookups in one snapshot. AssertionError for a row with wrong bytes."""
    found: list[Rows] = []
    keys = np.arange(MARKER, N_KEYS + 50)
    columns = Columns(["user_id"], [dtypes.Int64])
    columns.append({"user_id": keys.tolist()})
    store.enter()
    try:
        for view in VIEWS:
            numbers, texts = np.empty((len(keys), WIDTH + 1)), np.empty(len(keys), object)
            status, per_feature = np.empty((1, len(keys)), np.uint8), np.empty((3, len(keys)), np.uint8)
            ops = [(0, 0, 0, None), (1, 1, 0, None), (2, 0, WIDTH, None)]
            plan = Lookup(store.layout(view), [0], ops, 0)
            lookup([store.directory(view)], [plan], columns, [numbers, texts], status, 0, per_feature)
            there = status[0] != 2
            steps = np.where(there, numbers[:, 0] - keys * 1000, 0).astype(np.int64)
            v, s, n, nulls = (part[there] for part in columns_of(keys, steps))
            assert (numbers[there, :WIDTH] == v).all(), view
            assert (texts[there] == s).all(), view
            assert ((per_feature[2, there] == 1) == nulls).all(), view
            assert (numbers[there, WIDTH][~nulls] == n[~nulls]).all(), view
            found.append(dict(zip(keys[there].tolist(), steps[there].tolist(), strict=True)))
        return found[0], found[1], store.catalog.views["extra"].description
    finally:
        store.leave()


def scan_all(store: Store) -> tuple[Rows, Rows, str]:
    """Read the same by scans, which check the checksum of every page."""
    found = []
    store.refresh()
    for view in VIEWS:
        rows: Rows = {}
        for batch in store.scan(view):
            (v, _), (s, _), (n, mask) = batch.features
            wanted_v, wanted_s, wanted_n, nulls = columns_of(batch.keys[0], batch.event_time_us)
            assert (v == wanted_v).all()
            assert (s == wanted_s).all()
            assert ((np.zeros(len(n), np.bool_) if mask is None else mask) == nulls).all()
            assert (n == wanted_n).all()
            assert not rows.keys() & set(batch.keys[0].tolist())
            rows |= dict(zip(batch.keys[0].tolist(), batch.event_time_us.tolist(), strict=True))
        found.append(rows)
    return found[0], found[1], store.catalog.views["extra"].description


def step_seen(state: tuple[Rows, Rows, str]) -> int:
    """Return the step after which this is the state. AssertionError if there is none: a step is stored in part."""
    step = max(state[0].get(MARKER, 0), int(state[2]))
    wanted = expected(step)
    for name, found, right in zip((*VIEWS, "description"), state, wanted, strict=True):
        assert found == right, f"{name} is not as step {step} leaves it: {difference(found, right)}"
    return step


def difference(found: Any, right: Any) -> str:
    if not isinstance(found, dict):
        return f"{found} instead of {right}"
    pairs = [(key, found.get(key), right.get(key)) for key in sorted(found.keys() | right.keys())]
    return f"(key, found, right) {[pair for pair in pairs if pair[1] != pair[2]][:20]}"


def check_structure(store: Store) -> None:
    """Check that each page of each table in the catalog is valid, and that the buckets cover all hashes once."""
    with store.environment.read() as txn:
        for name, table in store.catalog.tables.items():
            layout, expected_key = make_layout(store.catalog.stored(name)), 0
            for key, page in table_pages(txn, table.id):
                layout.check(page, key, table.id)
                assert int.from_bytes(key) == expected_key
                expected_key += 1 << (64 - page[4])
            assert expected_key in (0, 1 << 64)


def slots(store: Store) -> int:
    """Return how many reader slots were ever in use at the same time."""
    return int(store.environment.handle.env.info()["num_readers"])


# -- jobs ----------------------------------------------------------------------------------------------------------


def write(report: Report, path: str, fault: list[int] | None = None) -> None:
    """Check the store, then take steps for ever and report each when it is durable."""
    with Store.open(path) as store:
        step = step_seen(look_up_all(store))
        report(seen=step)
        if fault is not None:
            Shim().arm(path, *fault)
        while True:
            step += 1
            take(store, step)
            report(done=step)


def take_one(report: Report, path: str, step: int, fault: list[int]) -> None:
    """Take one step with a fault, and report when it is durable."""
    with Store.open(path) as store:
        Shim().arm(path, *fault)
        take(store, step)
        report(done=step)


def migrate_with(report: Report, path: str, fault: list[int]) -> None:
    """Migrate a store with a fault, and report when it is done."""
    with Store.open(path) as store:
        Shim().arm(path, *fault)
        done = migrate(store.environment)
        report(done=done.rows)


def make(report: Report, path: str, fault: list[int]) -> None:
    Shim().arm(path, *fault)
    create(path)
    report(done=0)


def check(report: Report, path: str) -> None:
    """Check and report the state of a store that no process has open."""
    with Store.open(path) as store:
        state = scan_all(store)
        assert look_up_all(store) == state
        check_structure(store)
        report(seen=step_seen(state), slots=slots(store))


def read(report: Report, path: str) -> None:
    """Look all rows up for ever. Each snapshot must be the state after a step."""
    with Store.open(path) as store:
        newest = 0
        report(ready=True)
        while True:
            step = step_seen(look_up_all(store))
            assert step >= newest
            if step > newest:
                report(seen=step)
            newest = step


def watch_syncs(report: Report, path: str) -> None:
    """Take two cycles of steps, and report the writes that were not synced when each step returned."""
    shim = Shim()
    with Store.open(path) as store:
        late, n_calls = [], 0
        for step in range(1, 2 * len(CYCLE) + 1):
            shim.watch(path)
            take(store, step)
            late.append((step, shim.unsynced, shim.disorder))
            n_calls += shim.calls
        report(late=[entry for entry in late if entry[1:] != (0, 0)], calls=n_calls)


def fault_of(mode: int) -> Shim | FullDisk:
    """Return what makes a fault of a mode."""
    return FullDisk() if mode == ROOM else Shim()


def survive(report: Report, path: str, step: int, fault: list[int]) -> None:
    """Take a step with a fault and then without. The failed step must change nothing for stores that are open."""
    mode, nth = fault
    shim = fault_of(mode)
    message = None
    with Store.open(path) as store, Store.open(path) as reader:
        before = look_up_all(reader)
        shim.arm(path, mode, nth)
        try:
            take(store, step)
        except ResourceExhausted as error:
            message = error.message
        during = look_up_all(reader), look_up_all(store)
        reached = shim.reached(nth, message)
        shim.disarm()
        assert during[0] == during[1] == scan_all(store)
        at = step_seen(during[0])
        assert at == step if message is None else during[0] == before or mode == LOST
        store.upsert("other", batch_of([1, 2, 3], 1))
        for number in range(at + 1, step + 2):
            take(store, number)
        assert look_up_all(reader) == scan_all(store) == expected(step + 1)
        take(store, first_of("load", step + 2))
        store.refresh()
        check_structure(store)
        with store.environment.read() as txn:
            assert set(table_ids(txn)) <= {table.id for _, table in store.catalog.all_tables()}, "tables were left over"
        report(reached=reached, message=message)


def survive_creation(report: Report, path: str, fault: list[int]) -> None:
    """Create a store with a fault and then without."""
    shim, message = fault_of(fault[0]), None
    Path(path).parent.mkdir(exist_ok=True)
    shim.arm(Path(path).parent, *fault)
    try:
        create(path)
    except ResourceExhausted as error:
        message = error.message
    reached = shim.reached(fault[1], message)
    shim.disarm()
    create(path)
    with Store.open(path) as store:
        take(store, 1)
        assert step_seen(look_up_all(store)) == 1
    report(reached=reached, message=message)


def survive_migration(report: Report, path: str, step: int, fault: list[int]) -> None:
    """Migrate a store with a fault and then without. A failure must change nothing for stores that are open."""
    mode, nth = fault
    shim, message = fault_of(mode), None
    with Store.open(path) as store, Store.open(path) as reader:
        before = look_up_all(reader)
        shim.arm(path, mode, nth)
        try:
            migrate(store.environment)
        except ResourceExhausted as error:
            message = error.message
        reached = shim.reached(nth, message)
        shim.disarm()
        assert look_up_all(reader) == look_up_all(store) == scan_all(store) == before
        migrate(store.environment)
        assert look_up_all(reader) == scan_all(store) == before
        take(store, step)
        assert look_up_all(reader) == scan_all(store) == expected(step)
        take(store, first_of("load", step + 1))
        store.refresh()
        check_structure(store)
        with store.environment.read() as txn:
            assert set(table_ids(txn)) <= {table.id for _, table in store.catalog.all_tables()}, "tables were left over"
            assert bytes(txn.get(b"format")) == b"3"
    report(reached=reached, message=message)


def survive_apply(report: Report, path: str, definitions: str, fault: list[int]) -> None:
    """Apply definitions with a model, with a fault and then without."""
    shim, message = fault_of(fault[0]), None
    with Store.open(path) as store:
        before = store.catalog
        shim.arm(path, *fault)
        try:
            apply(store, definitions)
        except ResourceExhausted as error:
            message = error.message
        reached = shim.reached(fault[1], message)
        shim.disarm()
        store.refresh()
        assert (store.catalog == before) == (message is not None)
        apply(store, definitions)
        (version,) = store.catalog.models["score"].versions.items()
        assert hashlib.sha256(model_path(path, "score", version[0]).read_bytes()).hexdigest() == version[1].sha256
        assert store.upsert("scored", ColumnBatch([np.arange(3)], np.arange(3), [(np.ones(3, np.float32), None)])) == 3
        report(reached=reached, message=message)


def survive_opening(report: Report, path: str, step: int, fault: list[int], missing: list[str]) -> None:
    """Open a store of which some files are missing, with a fault and then without."""
    shim, message = fault_of(fault[0]), None
    for name in missing:
        (Path(path) / name).unlink()
    shim.arm(path, *fault)
    try:
        with Store.open(path) as store:
            assert step_seen(look_up_all(store)) == step - 1
    except ResourceExhausted as error:
        message = error.message
    reached = shim.reached(fault[1], message)
    shim.disarm()
    with Store.open(path) as store:
        take(store, step)
        assert step_seen(look_up_all(store)) == step
    report(reached=reached, message=message)


def survive_backup(report: Report, path: str, store: str, fault: list[int]) -> None:
    """Back a store up to a path with a fault and then without."""
    shim, message = fault_of(fault[0]), None
    folder = Path(path).parent
    folder.mkdir(exist_ok=True)
    with Store.open(store) as source:
        shim.arm(folder, *fault)
        try:
            backup(source, path)
        except ResourceExhausted as error:
            message = error.message
        reached = shim.reached(fault[1], message)
        shim.disarm()
        if message is not None:
            assert list(folder.iterdir()) == []
            backup(source, path)
        seen = look_up_all(source)
    with Store.open(path) as copy:
        assert look_up_all(copy) == scan_all(copy) == seen
    report(reached=reached, message=message)


def on_small_disk(report: Report, work: str, base: str | None, path: str, **arguments: Any) -> None:
    """Do a job with a copy of a store at a path of a file system that this process alone uses."""
    disk = mount_of(Path(path))
    free(disk)
    for left in disk.iterdir():  # by the job before, which may have been killed
        shutil.rmtree(left)
    if base is not None:
        shutil.copytree(base, path, ignore=shutil.ignore_patterns("load.lock"))
    JOBS[work](report, path=path, **arguments)


def command(report: Report, arguments: list[str]) -> None:
    """Run `shorttail ARGUMENTS` in this process, which has imported most of it."""
    done = commands.run(*arguments)
    report(code=done.code, err=done.err)


def survive_in_threads(report: Report, path: str, seed: int, n_steps: int) -> None:
    """Threads look all rows up while another takes steps on a disk that is full now and then."""
    shim, rng, stop = Shim(), random.Random(seed), threading.Event()
    errors: list[str] = []
    n_lookups = [0] * 4

    def look_up(number: int, reader: Store) -> None:
        try:
            while not stop.is_set():
                step_seen(look_up_all(reader))
                n_lookups[number] += 1
        except BaseException:
            errors.append(traceback.format_exc()[-1500:])

    with Store.open(path) as store, Store.open(path) as other:
        readers = [store, store, other, other]
        threads = [threading.Thread(target=look_up, args=pair) for pair in enumerate(readers)]
        for thread in threads:
            thread.start()
        failures = unknown = 0
        for step in range(1, n_steps + 1):
            # The second step has few writes, so the fault often hits the last one, of the meta page.
            for work in (lambda number=step: take(store, number), lambda: store.upsert("other", batch_of([1], 1))):
                shim.arm(path, FULL_ONCE, rng.randrange(1, 12))
                try:
                    work()
                except ResourceExhausted as error:
                    failures += 1
                    unknown += "it is unknown whether" in error.message
                    shim.disarm()
                    work()
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        assert step_seen(scan_all(store)) == n_steps
        report(failures=failures, unknown=unknown, lookups=min(n_lookups))


def survive_while_scanned(report: Report, path: str) -> None:
    """The meta page cannot be written while a scan runs; the memory of the scan must stay mapped."""
    shim = Shim()
    with Store.open(path) as store, Store.open(path) as reader:
        for step in range(1, len(CYCLE)):
            take(store, step)
        seen = look_up_all(reader)
        scan = store.scan("stats")
        first = next(scan)
        for nth in range(1, 100):
            shim.arm(path, FULL_ONCE, nth)
            try:
                store.upsert("other", batch_of([nth], nth))
                raise AssertionError("the meta page was not reached")
            except ResourceExhausted as error:
                if "it is unknown whether" in error.message:
                    break
            finally:
                shim.disarm()
        assert look_up_all(reader) == seen, "the snapshot that was there still serves"
        try:
            store.upsert("other", batch_of([1], 1))
            raise AssertionError("a scan was left without its memory")
        except Unavailable as error:
            message = error.message
        n_rows = len(first) + sum(len(batch) for batch in scan)
        assert n_rows == len(seen[0])
        store.upsert("other", batch_of([1], 1))
        assert look_up_all(reader) == look_up_all(store) == scan_all(store) == seen
        report(message=message)


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job
    for job in (
        *changing.JOBS,
        write,
        take_one,
        make,
        migrate_with,
        check,
        read,
        watch_syncs,
        survive,
        survive_creation,
        survive_apply,
        survive_migration,
        survive_opening,
        survive_backup,
        on_small_disk,
        command,
        survive_in_threads,
        survive_while_scanned,
    )
}
