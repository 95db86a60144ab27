"""Readers killed at any moment while a writer writes: no reader slot leaks, and dead readers pin no page.

SHORTTAIL_FAULT_CYCLES is half the number of kills (`make soak`: 1,000). SHORTTAIL_FAULT_SEED repeats the choices of a
run.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import workload
from extent import CYCLES
from zygote import Child, Zygote

from shorttail.config import LIMITS
from shorttail.store import Store, environment
from shorttail.store.verify import verify

KILLS = 2 * CYCLES  # as many as kills of writers
READERS = 4  # alive at a time
SLOTS_EACH = 8


def pages(store: Store) -> int:
    return int(store.environment.handle.env.info()["last_pgno"]) + 1


def active_slots(store: Store) -> list[str]:
    """Return the lines of LMDB's reader table."""
    return [line for line in store.environment.handle.env.readers().splitlines()[1:] if line]


def dead(child: Child) -> list[dict[str, int]]:
    """Return the messages of a reader that was killed. Fails if a snapshot was not the state after a step."""
    *said, end = child.wait()
    assert end == {"killed": signal.SIGKILL}
    return said


def test_readers_killed_at_random_leak_nothing(zygote: Zygote, tmp_path: Path) -> None:
    seed = int(os.environ.get("SHORTTAIL_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"SHORTTAIL_FAULT_SEED={seed}")
    rng = random.Random(seed)
    path = tmp_path / "store"
    workload.create(path)
    readers: list[Child] = []
    step = seen = 0
    with Store.open(path) as store:
        for _ in range(KILLS):
            readers.append(zygote.start("read", path=str(path)))
            if rng.random() < 0.8:  # the other readers are killed while they start
                readers[-1].wait_for_first()
            for _ in range(rng.randrange(4)):
                step += 1
                workload.take(store, step)
            if len(readers) == READERS:
                victim = readers.pop(rng.randrange(READERS))
                victim.kill()
                seen += len(dead(victim))
            if step < 3 * len(workload.CYCLE):
                usual_pages = pages(store)
            assert workload.slots(store) <= READERS * SLOTS_EACH
        for reader in readers:
            reader.kill()
            dead(reader)
        assert workload.step_seen(workload.look_up_all(store)) == step
        assert seen > KILLS / 2, "the readers did read"
        # A slow reader pins pages for a while; a dead reader that is not noticed would pin them for ever.
        assert pages(store) < 10 * usual_pages, f"{pages(store)} pages, from {usual_pages}"
    assert zygote.start("check", path=str(path)).result()["seen"] == step
    assert verify(path).problems == []


def test_the_writer_frees_what_dead_readers_held(
    zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process opens the store any more, so only the writer can notice that its readers are dead."""
    monkeypatch.setattr(environment, "LIMITS", replace(LIMITS, reader_check_ms=1))
    path = tmp_path / "store"
    workload.create(path)
    cycle = len(workload.CYCLE)
    with Store.open(path) as store:
        for step in range(1, 2 * cycle):
            workload.take(store, step)
        readers = [zygote.start("read", path=str(path)) for _ in range(READERS)]
        for reader in readers:
            reader.wait_for_first()
        for reader in readers:
            reader.kill()
            dead(reader)
        assert len(active_slots(store)) >= READERS
        before = pages(store)
        for step in range(2 * cycle, 20 * cycle):
            workload.take(store, step)
        assert len(active_slots(store)) < READERS
        assert pages(store) < 3 * before, f"{pages(store)} pages, from {before}"


@pytest.mark.parametrize("n_opened", [1, 3])
def test_closing_a_store_frees_its_reader_slots(tmp_path: Path, n_opened: int) -> None:
    path = tmp_path / "store"
    workload.create(path)
    with Store.open(path) as store:
        for step in range(1, 40):
            others = [Store.open(path) for _ in range(n_opened)]
            workload.take(store, step)
            for other in others:
                assert workload.step_seen(workload.look_up_all(other)) == step
                other.close()
        assert workload.slots(store) <= n_opened + SLOTS_EACH
