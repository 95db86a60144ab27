"""What bench/change.py lets work on a served store: a process that applies, a client that checks, one that pushes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from change_states import FEATURES, OF_MODEL, PUSHED, Keys, Layout, State, Values, as_values, features_of
from loadgen import BenchError

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import NotFound, ShorttailError, Unavailable
from shorttail.registry import apply as applying
from shorttail.registry.planning import Options
from shorttail.store import Store

NICE = 10
CHECK_PAUSE_S = 0.01
PUSHES_PER_S = 50
PUSHED_ROWS, NEW_ROWS = 6, 2  # of a push: rows that are there, and new ones
ASKED_ROWS = 1000  # most rows of a request that checks what was pushed
SEEN_S = 2 * LIMITS.idle_refresh_ms / 1000  # after it, each process answers from a commit
SHOWN = 20  # failures that are kept
TIMEOUT_S = 30.0
COPIED_BYTES = 64 << 20  # more than a cache has


class Failures:
    """Counts answers that are wrong, requests that failed, and rows that are lost. Prints and keeps the first ones."""

    def __init__(self) -> None:
        self.counts = {"wrong": 0, "failed": 0, "lost": 0}
        self.first: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def note(self, kind: str, asked: Any, given: Any, allowed: Any) -> None:
        with self._lock:
            self.counts[kind] += 1
            if len(self.first) < SHOWN:
                found = {"asked": asked, "given": given, "allowed": allowed}
                self.first.append({"kind": kind, **{name: str(value) for name, value in found.items()}})
                print(json.dumps(self.first[-1]), file=sys.stderr, flush=True)


# -- the process that applies ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def applier(store: Path) -> Iterator[Callable[[State], None]]:
    """Yield a function that applies a state in another process and waits for the readers of the store.

    The process stays, because the start of an interpreter would cost others more than most changes do. For each change
    it opens the store and does what `shorttail apply --wait` does, at a low priority.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_changes, args=(theirs, str(store)), daemon=True)
    process.start()
    theirs.close()

    def apply(state: State) -> None:
        try:
            ours.send((state.definitions, state.prune))
            problem = ours.recv()
        except (EOFError, OSError):
            raise BenchError(f"the process that applies ended while it was to {state.kind}") from None
        if problem:
            raise BenchError(f"cannot {state.kind}: {problem}")

    try:
        if ours.recv():
            raise BenchError("the process that applies did not start")
        yield apply
    finally:
        ours.close()
        process.join()


def serve_changes(asked: Connection, store: str) -> None:
    """Apply what comes, and send "" or what went wrong for each, until the other end closes."""
    import shorttail.sources.batches  # noqa: F401  # a change that reads a source pays for no import

    os.nice(NICE)
    problem = ""
    with contextlib.suppress(EOFError):
        while True:
            asked.send(problem)
            definitions, prune = asked.recv()
            try:
                prepared = applying.prepare(definitions)
                with Store.open(store) as target:
                    applying.apply(target, prepared, options=Options(prune=prune))
                    arrived = applying.wait_for_readers(target)
                problem = "" if arrived else "a process still reads the store as it was before"
            except ShorttailError as error:
                problem = error.message


@contextlib.contextmanager
def busy_cpu() -> Iterator[None]:
    """Let a process copy memory for as long as the block runs, whenever nobody else wants its CPU."""
    process = multiprocessing.get_context("spawn").Process(target=copy_memory, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def copy_memory() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    source, target = np.ones(COPIED_BYTES, np.uint8), np.empty(COPIED_BYTES, np.uint8)
    while True:
        np.copyto(target, source)


# -- the clients -------------------------------------------------------------------------------------------------------


class Checker:
    """Asks all the time, and compares each answer with the states in which the store may be."""

    def __init__(self, address: str, layout: Layout, failures: Failures):
        self.layout, self.failures = layout, failures
        self.client = st.Client(address, timeout_s=TIMEOUT_S, retries=0)
        self.allowed: tuple[State, ...] = ()
        self.names: tuple[str, ...] = ()  # of what the states have, features and models
        self.asked = 0
        self._random = np.random.default_rng(1)

    def begin(self, before: State, after: State) -> None:
        """Ask from now on for what either state has, and allow the answers of both."""
        self.names = tuple(dict.fromkeys((*before.answers, *after.answers)))
        self.allowed = (before, after)

    def end(self, after: State) -> None:
        """Allow the answers of the new state alone, also for what only the old one had."""
        self.allowed = (after,)

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(CHECK_PAUSE_S):
            self.check_all()

    def check_all(self) -> None:
        """Ask once for all that the states have, and for what never changes."""
        self.check_features()
        self.check_model()
        for name in self.names:
            self.check(name)

    def check_features(self) -> None:
        keys = self.keys(12)
        wanted = features_of(keys).T.astype(float).tolist()
        self.judge([f"stats:{name}" for name in FEATURES], keys, lambda: (wanted,))

    def check_model(self) -> None:
        keys = self.keys(4)
        wanted = features_of(keys)[:, :OF_MODEL].mean(axis=1).astype(float).tolist()
        self.judge("m", keys, lambda: (wanted,))

    def check(self, name: str) -> None:
        keys = self.keys(8, pushed=":" in name)
        before = self.allowed

        def allowed() -> tuple[Any, ...]:
            states = [*before, *(state for state in self.allowed if state not in before)]
            answers = [state.answers[name](keys) if name in state.answers else None for state in states]
            return tuple([found] if found is not None and ":" in name else found for found in answers)

        self.judge([name] if ":" in name else name, keys, allowed)

    def keys(self, count: int, pushed: bool = False) -> Keys:
        """Return keys that are never pushed, some that have tiers, and, if asked for, some whose rows are pushed."""
        found = [self._random.integers(0, self.layout.base, count), self._random.choice(self.layout.tiered, 4)]
        if pushed:
            found.append(self.layout.base + self._random.integers(0, PUSHED, 2))
        return np.concatenate(found)

    def judge(self, what: str | list[str], keys: Keys, allowed: Callable[[], tuple[Any, ...]]) -> None:
        """Ask, and note an answer that is none of those allowed, which are known when it is there. None: NOT_FOUND."""
        self.asked += 1
        given: Any
        try:
            given = self.ask(what, keys)
        except NotFound:
            given = None
        except ShorttailError as error:
            if isinstance(error, Unavailable) and isinstance(what, str) and None in allowed():
                return  # the model is being made, and not loaded yet
            self.failures.note("failed", (what, keys.tolist()), f"{error.code}: {error.message}", allowed())
            return
        if given not in (answers := allowed()):
            kind = "failed" if given is None else "wrong"
            self.failures.note(kind, (what, keys.tolist()), given, answers)

    def ask(self, what: str | list[str], keys: Keys) -> Values | list[Values]:
        if isinstance(what, str):
            (output,) = self.client.predict(what, {"user_id": keys}).outputs.values()
            return as_values(np.ravel(output))
        found = self.client.get_online_features(what, {"user_id": keys}).to_dict()
        return [[None if value is None else float(value) for value in found[name]] for name in what]


class Pusher:
    """Pushes rows all the time, of keys that are there and of new ones, and knows what must be stored of each key.

    turns: key -> the turn of the last push of it that was acknowledged. fresh: keys pushed since they were checked.
    """

    def __init__(self, address: str, layout: Layout, failures: Failures):
        self.layout, self.failures = layout, failures
        self.client = st.Client(address, timeout_s=TIMEOUT_S, retries=0)
        self.turns: dict[int, int] = {}
        self.fresh: set[int] = set()
        self.pushes = 0
        self.lock = threading.Lock()  # held while it pushes
        self._turn, self._next = 0, layout.rows

    def run(self, stop: threading.Event) -> None:
        random = np.random.default_rng(2)
        while not stop.wait(1 / PUSHES_PER_S):
            with self.lock:
                old = self.layout.base + random.choice(PUSHED, PUSHED_ROWS, replace=False)
                self.push(np.concatenate([old, np.arange(self._next, self._next + NEW_ROWS)]))
                self._next += NEW_ROWS

    def push(self, keys: Keys) -> None:
        self._turn += 1
        features = features_of(keys, self._turn)
        rows = {"user_id": keys, **{name: features[:, i] for i, name in enumerate(FEATURES)}}
        numbers = keys.tolist()
        try:
            self.client.push("stats", rows, partial=True)  # so that it fits each definition
        except ShorttailError as error:
            self.failures.note("failed", f"push of {numbers}", f"{error.code}: {error.message}", "acknowledged")
            for key in numbers:
                self.turns.pop(key, None)  # either is right
            self.fresh.difference_update(numbers)
            return
        self.pushes += 1
        self.turns.update(dict.fromkeys(numbers, self._turn))
        self.fresh.update(numbers)

    def check_fresh(self) -> None:
        """Check the rows that were pushed since the last call. No push goes on meanwhile."""
        with self.lock:
            self.check(self.fresh)
            self.fresh.clear()

    def check(self, numbers: Iterable[int]) -> None:
        """Check the rows of these keys. Those that no process shows yet are looked up again after SEEN_S."""
        if lost := list(self.differing(sorted(numbers))):
            time.sleep(SEEN_S)
            for asked, given, wanted in self.differing([key for key, *_ in lost]):
                self.failures.note("lost", f"stats of {asked}, pushed at turn {self.turns[asked]}", given, wanted)

    def differing(self, numbers: list[int]) -> Iterator[tuple[int, Any, Any]]:
        """Yield (key, the features that are answered, those that were pushed) of the keys for which these differ."""
        names = [f"stats:{name}" for name in FEATURES]
        for start in range(0, len(numbers), ASKED_ROWS):
            keys = np.array(numbers[start : start + ASKED_ROWS])
            wanted = features_of(keys, np.array([self.turns[key] for key in keys.tolist()]))
            try:
                found = self.client.get_online_features(names, {"user_id": keys}).to_dict()
            except ShorttailError as error:
                self.failures.note("failed", (names, keys.tolist()), f"{error.code}: {error.message}", wanted.tolist())
                continue
            given = np.array([found[name] for name in names], float).T  # None is NaN
            for row in np.flatnonzero((given != wanted).any(axis=1)):
                yield int(keys[row]), given[row].tolist(), wanted[row].tolist()
