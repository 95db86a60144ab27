"""An `apply` killed at any moment leaves the old state of a view or the new one, and every push that was acknowledged.

SHORTTAIL_FAULT_CYCLES is the number of random kills (`make soak`: 1,000); a short run makes a quarter of its default.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import changing
import pytest
from changing import ROWS, X, definitions, rows, state_in, state_of
from extent import CYCLES, SOAK
from zygote import AFTER, KILL, TEAR, Child, Zygote

import shorttail as st
from shorttail.registry.apply import apply
from shorttail.store import Store
from shorttail.store.verify import verify

KILLS = CYCLES if SOAK else CYCLES // 4
ASKED = 10_000  # rows of a request


def make(path: Path) -> None:
    with Store.open(path, create=True) as store:
        apply(store, [definitions(0)])
        store.upsert("v", rows(list(range(ROWS))))


def answers(engine: st.Engine, keys: list[int], *names: str) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in names]
    for start in range(0, len(keys), ASKED):
        part = {"id": keys[start : start + ASKED]}
        features = engine.get_online_features([f"v:{name}" for name in names], part).to_dict()
        for values, name in zip(found, names, strict=True):
            values += features[f"v:{name}"]
    return found


def check(engine: st.Engine, step: int, pushed: list[int], random_: random.Random, has_x: bool = False) -> int:
    """Check that the view is as of `step` or as of the one before, and return which."""
    engine.refresh(force=True)
    state = state_of(engine.store)
    assert state in (state_in(step), state_in(step - 1)), step
    at = step if state == state_in(step) else step - 1
    keys = [*random_.sample(range(ROWS), 50), *pushed]
    assert answers(engine, keys, "a", "s") == [keys, [str(key) for key in keys]]
    if more := [name for name, _, _ in state if name in "xy"]:
        default = state[-1][2]
        first = X if has_x else default
        assert answers(engine, [0, 1, *pushed], more[0]) == [[first, default, *[default] * len(pushed)]]
    return at


def acknowledged(pusher: Child) -> list[int]:
    """Return the last keys that the pusher has reported."""
    while len(pusher.messages) > 1:
        pusher.messages.popleft()
    return [pusher.read()["acked"]]


@pytest.mark.parametrize("busy", [True, False], ids=["pushes", "quiet"])
def test_an_apply_killed_at_random_leaves_one_of_two_states(zygote: Zygote, tmp_path: Path, busy: bool) -> None:
    seed = int(os.environ.get("SHORTTAIL_FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"SHORTTAIL_FAULT_SEED={seed}")
    rng = random.Random(seed)
    path = tmp_path / "store"
    make(path)
    pusher = zygote.start("push_on", path=str(path)) if busy else None
    pushed: list[int] = []
    step, kills, states, has_x = 1, 0, set(), False  # has_x: row 0 has a value of the added feature
    with st.Engine.open(path) as engine:
        while kills < KILLS:
            fault = [rng.choice([KILL, TEAR, AFTER]), rng.randrange(1, 60)]  # the largest change takes about so many
            child = zygote.start("change", path=str(path), step=step, fault=fault)
            child.wait_for_first()
            if kills % 3 == 2:
                time.sleep(rng.uniform(0, 0.05))  # for random timing, not for synchronisation
                child.kill()
            *messages, end = child.wait()
            done = any("done" in message for message in messages)
            kills += "killed" in end
            if pusher is not None:
                pushed = acknowledged(pusher)
            at = check(engine, step, pushed, rng, has_x)
            assert at == step or not done
            states.add((at == step, "killed" in end))
            if at == step:
                has_x = step % changing.STATES in (1, 2, 3, 4)
                if step % changing.STATES == 1:
                    engine.store.upsert("v", rows([0], X))
                step += 1
            elif rng.random() < 0.3:  # else the next one that is killed finds what this one left
                apply(engine.store, [definitions(step)])
                assert check(engine, step, pushed, rng, has_x) == step
                has_x = step % changing.STATES in (1, 2, 3, 4)
                if step % changing.STATES == 1:
                    engine.store.upsert("v", rows([0], X))
                step += 1
            if kills % 10 == 9:
                assert verify(path).problems == []
        if pusher is not None:
            pusher.kill()
            pushed = [message["acked"] for message in pusher.wait() if "acked" in message][-1:]
        apply(engine.store, [definitions(step)])
        assert check(engine, step, pushed, rng, has_x) == step
        assert (engine.store.catalog.filling, engine.store.catalog.coming) == ({}, {})
        every = list(range(ROWS, pushed[0] + 1)) if pushed else []
        assert answers(engine, every, "a") == [every] if every else True
    assert verify(path).problems == []
    assert step > 3


def test_an_apply_killed_at_each_write(zygote: Zygote, tmp_path: Path) -> None:
    """A feature is added: the table is filled, is coming, and is swapped in."""
    base = tmp_path / "base"
    make(base)
    shutil.copytree(base, tmp_path / "counted", ignore=shutil.ignore_patterns("lock.mdb"))
    writes = zygote.start("count_writes", path=str(tmp_path / "counted"), step=1).result()["writes"]
    assert writes > 10
    seen = set()
    for nth in range(1, writes + 1, 1 if SOAK else 3):
        path = tmp_path / "store"
        shutil.copytree(base, path, ignore=shutil.ignore_patterns("lock.mdb"))
        child = zygote.start("change", path=str(path), step=1, fault=[KILL, nth])
        *_, end = child.wait()
        assert "killed" in end
        with st.Engine.open(path) as engine:
            at = check(engine, 1, [], random.Random(nth))
            seen.add(at)
            engine.store.upsert("v", rows([ROWS]))
            apply(engine.store, [definitions(1)])
            assert state_of(engine.store) == state_in(1)
            assert answers(engine, [ROWS], "a", "x") == [[ROWS], [1.5]]
        shutil.rmtree(path)
    assert 0 in seen


def test_an_apply_after_one_that_was_killed_right_after_its_commit(zygote: Zygote, tmp_path: Path) -> None:
    """While a process has the store open, readers miss a commit whose writer was killed right after it."""
    base = tmp_path / "base"
    make(base)
    shutil.copytree(base, tmp_path / "counted", ignore=shutil.ignore_patterns("lock.mdb"))
    writes = zygote.start("count_writes", path=str(tmp_path / "counted"), step=1).result()["writes"]
    for nth in range(writes // 2, writes + 1):
        path = tmp_path / "store"
        shutil.copytree(base, path, ignore=shutil.ignore_patterns("lock.mdb"))
        with st.Engine.open(path) as engine:
            assert "killed" in zygote.start("change", path=str(path), step=1, fault=[AFTER, nth]).wait()[-1]
            assert "killed" not in zygote.start("change", path=str(path), step=1).wait()[-1]
            engine.refresh()
            assert state_of(engine.store) == state_in(1)
        shutil.rmtree(path)
