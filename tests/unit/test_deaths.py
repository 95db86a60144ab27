"""What a worker noted of its runs and loads tells, after its death, which model to ban."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from shorttail.config import LIMITS
from shorttail.server.deaths import Deaths, DiedIn, RunsPage

NONE = DiedIn(set(), set())


@pytest.fixture
def page() -> Iterator[RunsPage]:
    made = RunsPage()
    yield made
    made.close()


def die(page: RunsPage, code: str) -> None:
    """Run code in a process that uses the page, until the process kills itself."""
    start = f"""
import os, signal, threading
from shorttail._native import runs
runs.share({page.fd})
def run(key, call): return runs.run(lambda *_: call(), [], {{}}, key, 0, object)
def in_thread(call):
    begun, never = threading.Event(), threading.Event()
    threading.Thread(target=lambda: call(lambda: (begun.set(), never.wait())), daemon=True).start()
    begun.wait()
def segv(): signal.raise_signal(signal.SIGSEGV)
def kill(): os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", start + code], pass_fds=[page.fd], timeout=60, capture_output=True)
    assert done.returncode < 0, done.stderr.decode()


def test_a_signal_in_a_load_blames_the_model_that_is_loaded(page: RunsPage) -> None:
    die(page, "in_thread(lambda call: run(7, call))\nruns.begin_load(5)\nsegv()")
    assert page.died_in() == DiedIn(set(), {5})


def test_a_signal_in_a_run_blames_no_load_of_another_model(page: RunsPage) -> None:
    die(page, "in_thread(lambda call: (runs.begin_load(5), call()))\nrun(7, segv)")
    assert page.died_in() == DiedIn({7}, set())


def test_a_run_that_belongs_to_a_load_blames_the_load(page: RunsPage) -> None:
    die(page, "runs.begin_load(5)\nrun(5, segv)")
    assert page.died_in() == DiedIn({5}, {5})


def test_after_its_load_a_model_is_not_blamed(page: RunsPage) -> None:
    die(page, "runs.end_load(runs.begin_load(5))\nsegv()")
    assert page.died_in() == NONE


def test_a_signal_elsewhere_blames_all_that_runs_and_loads(page: RunsPage) -> None:
    die(page, "in_thread(lambda call: run(7, call))\nin_thread(lambda call: (runs.begin_load(5), call()))\nkill()")
    assert page.died_in() == DiedIn({7}, {5})
    assert page.died_in(hung_s=60.0) == NONE, "neither took as long"


def test_more_loads_than_places_are_not_noted(page: RunsPage) -> None:
    die(page, "for key in range(1, 20): runs.begin_load(key)\nkill()")
    assert page.died_in().loads == set(range(1, 9))


def test_one_death_in_a_load_bans_and_two_in_a_run() -> None:
    deaths = Deaths()
    assert not deaths.note(DiedIn({7}, set()))
    assert deaths.note(DiedIn(set(), {5}))
    assert not deaths.note(DiedIn(set(), {5})), "it is banned already"
    assert deaths.note(DiedIn({7}, set()))
    assert deaths.banned == [5, 7]
    deaths.forget()
    assert deaths.banned == []
    assert not deaths.note(DiedIn({7}, set()))


def test_workers_that_are_killed_again_and_again_while_they_load_a_model_ban_it() -> None:
    """The system kills for memory, people kill for other reasons."""
    deaths = Deaths()
    for _ in range(LIMITS.load_kills - 1):
        assert not deaths.note_killed({5, 6})
    assert deaths.note_killed({5})
    assert deaths.banned == [5]
