"""A writer killed at any moment: acknowledged steps are in the store, and others are there completely or not at all.

SHORTTAIL_FAULT_CYCLES is the number of random kills in each of two ways (`make soak`: 1,000), and makes the tests kill
each kind of step in each mode. SHORTTAIL_FAULT_SEED repeats the choices of a printed seed, but not the times of kills
by the test process.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import workload
from extent import CYCLES, SOAK, pairs
from lmdb.verify import verify as verify_lmdb
from zygote import AFTER, KILL, TEAR, Child, Zygote

from shorttail.store import Store
from shorttail.store.verify import verify

MODES = {"before": KILL, "within": TEAR, "after": AFTER}
SHORT = {
    "edit": list(MODES),
    "grow": ["before"],
    "shrink": ["within"],
    "load": ["within", "after"],
    "catalog": ["after"],
}
LOAD_STRIDE = 3  # in a short run a load, which has the most writes, is killed at each third
READERS_MAX = 12  # slots: a few processes, with a few transactions each


def sound(zygote: Zygote, path: Path) -> int:
    """Check the store in a new process and return its step."""
    found = zygote.start("check", path=str(path)).result()
    assert found["slots"] <= READERS_MAX
    return int(found["seen"])


def sound_at_rest(path: Path) -> None:
    """Check a store that no process has open: each page is in use or free, and never both."""
    assert verify_lmdb(str(path)) == []


def acknowledged(child: Child) -> tuple[int, int]:
    """Return (first step seen, last step reported as durable) of a writer that is dead."""
    messages = child.wait()
    assert messages[-1] == {"killed": signal.SIGKILL}
    steps = [message["done"] for message in messages if "done" in message]
    seen = [message["seen"] for message in messages if "seen" in message]
    return (seen or [-1])[0], (steps or seen or [-1])[-1]


@pytest.mark.parametrize("observed", [True, False], ids=["observed", "alone"])
def test_a_writer_killed_at_random_loses_no_acknowledged_step(zygote: Zygote, tmp_path: Path, observed: bool) -> None:
    """observed: this process reads meanwhile, so LMDB cannot create its lock file again for each writer."""
    seed = int(os.environ.get("SHORTTAIL_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"SHORTTAIL_FAULT_SEED={seed}")
    rng = random.Random(seed)
    path = tmp_path / "store"
    workload.create(path)
    done = 0
    observer = Store.open(path) if observed else None
    try:
        for cycle in range(CYCLES):
            # Half of them kill themselves in a write; the test kills the others at any moment.
            fault = [rng.choice([KILL, TEAR, AFTER]), rng.randrange(1, 120)] if cycle % 2 else None
            child = zygote.start("write", path=str(path), fault=fault)
            if fault is None:
                child.wait_for_first()
                time.sleep(rng.uniform(0, 0.03))  # for random timing, not for synchronisation
                child.kill()
            seen, last = acknowledged(child)
            assert seen in (done, done + 1)
            done = max(done, last)
            if observer is not None:
                observer.refresh(force=True)  # a writer may die before it has counted its commit
                at = workload.step_seen(workload.look_up_all(observer))
                assert at in (done, done + 1)
                assert workload.slots(observer) <= READERS_MAX
            if cycle % 10 == 9:
                assert sound(zygote, path) in (done, done + 1)
                if observer is None:
                    sound_at_rest(path)
    finally:
        if observer is not None:
            observer.close()
    assert sound(zygote, path) in (done, done + 1)
    assert verify(path).problems == []
    assert done > CYCLES


@pytest.mark.parametrize(("kind", "mode"), pairs(workload.KINDS, MODES, SHORT))
def test_a_writer_killed_at_each_write_of_a_step(zygote: Zygote, tmp_path: Path, kind: str, mode: str) -> None:
    base, path = tmp_path / "base", tmp_path / "store"
    step = workload.create_before(base, kind)
    nth, kills = 0, 0
    while True:
        nth += 1 if SOAK or kind != "load" else LOAD_STRIDE
        shutil.copytree(base, path, ignore=shutil.ignore_patterns("lock.mdb"))
        with Store.open(path) as observer:
            child = zygote.start("take_one", path=str(path), step=step, fault=[MODES[mode], nth])
            *acks, end = child.wait()
            at = sound(zygote, path)
            assert workload.step_seen(workload.look_up_all(observer)) == at
            assert at == step if acks else at in (step - 1, step)
            # If a writer dies right after its commit, readers see the commit only when the next writer begins.
            observer.load("other", [workload.batch_of([1], 1)])
            assert workload.step_seen(workload.look_up_all(observer)) in (at, step)
            for number in range(at + 1, step + 3):
                workload.take(observer, number)
            assert workload.step_seen(workload.look_up_all(observer)) == step + 2
        sound_at_rest(path)
        shutil.rmtree(path)
        if acks:
            assert end == {"exit": 0}
            break
        assert end == {"killed": signal.SIGKILL}
        kills += 1
    print(f"{kind}: killed at each of {kills} writes")
    assert kills >= 4  # pages, their sync, and the meta page


def test_a_process_killed_at_each_write_of_a_creation(zygote: Zygote, tmp_path: Path) -> None:
    nth = 0
    while True:
        nth += 1
        path = tmp_path / str(nth)
        *acks, _ = zygote.start("make", path=str(path), fault=[KILL, nth]).wait()
        if acks:
            break
        workload.create(path)
        assert sound(zygote, path) == 0
    print(f"killed at each of {nth - 1} writes")
    assert nth > 8


def test_a_step_is_synced_when_it_is_acknowledged(zygote: Zygote, tmp_path: Path) -> None:
    """A killed process loses nothing that it wrote; a machine that loses power does, unless it was synced, in order."""
    path = tmp_path / "store"
    workload.create(path)
    found = zygote.start("watch_syncs", path=str(path)).result()
    assert found["calls"] > 100
    assert found["late"] == [], "(step, writes not synced, meta pages written too early)"
