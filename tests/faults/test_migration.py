"""A migration that is killed, or whose disk is full or fails, at any of its writes: the old store, or the new one.

`make soak` tries each mode of fault; a short run tries some.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import workload
from extent import CYCLES, SOAK
from format_2 import format_of, make_format_2, tables_of_format_2
from lmdb.verify import verify as verify_lmdb
from zygote import AFTER, FAILING, FULL, FULL_ONCE, KILL, LOST, SHORT, TEAR, Zygote

from shorttail.errors import InvalidArgument
from shorttail.store import Store
from shorttail.store.format import migrating
from shorttail.store.migrate import migrate
from shorttail.store.verify import verify

KILLS = {"before": KILL, "within": TEAR, "after": AFTER}
FAULTS = {"full": FULL, "full once": FULL_ONCE, "short write": SHORT, "failing": FAILING, "lost": LOST}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A store of format 2 with some steps, and the next step, which is an edit."""
    path = tmp_path_factory.mktemp("base") / "store"
    with tables_of_format_2():
        step = workload.create_before(path, "edit")
    make_format_2(path)
    return path, step


def copy(base: Path, path: Path) -> None:
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("lock.mdb"))


def whole(path: Path, step: int, observer: Store) -> None:
    """Check that a store is one of format 2 or of format 3, with all its rows, and can be migrated and written."""
    found = format_of(path)
    assert found in (2, 3)
    assert workload.step_seen(workload.look_up_all(observer)) == step - 1
    if found == 2:
        with pytest.raises(InvalidArgument, match="which this shorttail only reads"):
            workload.take(observer, step)
    assert migrate(observer.environment).from_format == found
    workload.take(observer, step)
    assert workload.step_seen(workload.look_up_all(observer)) == step
    workload.check_structure(observer)


STRIDE = 3  # of the writes at which a short run kills


@pytest.mark.parametrize("mode", KILLS if SOAK else ["within", "after"])
def test_a_migration_killed_at_each_write(zygote: Zygote, base: tuple[Path, int], tmp_path: Path, mode: str) -> None:
    old, step = base
    path, formats, done, nth = tmp_path / "store", [], False, 0
    while not done:
        nth += 1 if SOAK else STRIDE
        copy(old, path)
        with Store.open(path) as observer:
            *acks, end = zygote.start("migrate_with", path=str(path), fault=[KILLS[mode], nth]).wait()
            done = bool(acks)
            assert end == ({"exit": 0} if done else {"killed": signal.SIGKILL})
            with migrating(), observer.environment.write():
                pass  # if a process dies right after its commit, others see that commit only when a writer begins
            formats.append(format_of(path))
            assert zygote.start("check", path=str(path)).result()["seen"] == step - 1
            whole(path, step, observer)
        assert verify_lmdb(str(path)) == []
        if len(formats) % 10 == 0 or done:
            assert verify(path).problems == []
        shutil.rmtree(path)
    assert formats == sorted(formats)  # the old store before one of the writes, and the new one from there on
    assert (formats[0], formats[-1]) == (2, 3)
    print(f"killed at {len(formats) - 1} writes, {formats.count(2)} of them before the commit of the new format")
    assert formats.count(2) > 5


def test_a_migration_killed_at_random(zygote: Zygote, base: tuple[Path, int], tmp_path: Path) -> None:
    """Killed and started again until it is done: each starts from what the ones before it have left."""
    seed = time.time_ns() % 1_000_000
    print("seed", seed)
    rng, (old, step), path = random.Random(seed), base, tmp_path / "store"
    for _ in range(CYCLES // 4):
        copy(old, path)
        with Store.open(path) as observer:
            for _ in range(5):
                child = zygote.start("migrate_with", path=str(path), fault=[TEAR, rng.randrange(1, 60)])
                child.wait()
                assert workload.step_seen(workload.look_up_all(observer)) == step - 1
            with migrating(), observer.environment.write():
                pass
            whole(path, step, observer)
        assert verify_lmdb(str(path)) == []
        shutil.rmtree(path)


@pytest.mark.parametrize("mode", FAULTS if SOAK else ["full", "full once", "lost"])
def test_a_failure_of_any_write_of_a_migration(
    zygote: Zygote, base: tuple[Path, int], tmp_path: Path, mode: str
) -> None:
    old, step = base
    path, messages, reached = tmp_path / "store", [], True
    while reached:
        copy(old, path)
        fault = [FAULTS[mode], len(messages) + 1]
        found = zygote.start("survive_migration", path=str(path), step=step, fault=fault).result()
        reached = found["reached"]
        if reached:
            messages.append(found["message"])
        assert verify_lmdb(str(path)) == []
        shutil.rmtree(path)
    print(f"{mode}: at each of {len(messages)} writes")
    full = f"the disk of store '{path}' is full or failing; "
    unknown = full + "it is unknown whether the last write is in the store: check, or write it again"
    # A failure to delete the old tables at the end is not reported; the next load deletes them.
    assert set(messages) - {None} == {full + "nothing was written", unknown}
    assert len(messages) > 12
