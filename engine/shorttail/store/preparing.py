"""Builds the directories of tables that are about to replace others, so that no lookup waits for that.

While a reader builds one, it holds a shared lock on a file of the store; also while it loads a version of a model. Who
waits for readers takes that lock alone, once every reader has seen the last commit. The system frees it if a reader
dies.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from shorttail._native.pages import Directory
from shorttail.config import LIMITS
from shorttail.define.tables import Stored
from shorttail.errors import ShorttailError
from shorttail.store.environment import Environment
from shorttail.store.opening import translate_errors
from shorttail.store.table import make_layout

READY_FILE: Final = "ready.lock"
NICE: Final = 10  # the thread yields a CPU that an answering thread wants,
REST_US: Final = 800  # and rests, because it would yield it some milliseconds late
TRIES: Final = 3
POLL_S: Final = 0.01

Take = Callable[[int, Directory, int], bool]
"""Takes the directory of a table (its id) as of a commit; False if the change log does not reach back to it."""


@contextmanager
def ready_file(environment: Environment) -> Iterator[int]:
    """Yield a descriptor of the file that is locked while directories are built."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with translate_errors(environment.path):
        fd = os.open(environment.path / READY_FILE, flags, 0o644)
    try:
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def not_ready(environment: Environment) -> ExitStack:
    """Return a context that holds the lock from now on, if it can be had, until it is closed."""
    held = ExitStack()
    with suppress(OSError, ShorttailError):
        fd = held.enter_context(ready_file(environment))
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return held


def wait_until_ready(environment: Environment, wait_s: float) -> bool:
    """Wait until all readers of other processes have moved to the last commit and are ready for what it brings.

    Return False after wait_s seconds. Returns at once if no other process has the store open.
    """
    if not environment.handle.other_processes():
        return True
    end_s, idle_s = time.monotonic() + wait_s, 2 * LIMITS.idle_refresh_ms / 1000  # idle workers look for it so often
    if not environment.handle.wait_for_readers(wait_s):
        return False
    time.sleep(idle_s)
    with ready_file(environment) as fd:
        while time.monotonic() < end_s:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(fd, fcntl.LOCK_UN)  # at once: who is not ready does not wait for the lock
                time.sleep(idle_s)  # until what was prepared is in use
                return True
            time.sleep(POLL_S)
    return False


def prepare(environment: Environment, coming: Sequence[Stored], take: Take) -> None:
    """Begin to build the directories of tables in a thread. The lock is held when this returns, if it can be had."""
    held = not_ready(environment)
    arguments = (environment, coming, take, held)
    thread = threading.Thread(target=_build_all, args=arguments, name="shorttail-prepare", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending
        held.close()


def _build_all(environment: Environment, coming: Sequence[Stored], take: Take, held: ExitStack) -> None:
    with held:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        for stored in coming:
            with suppress(ShorttailError, ValueError):  # the first lookup builds it and raises the error
                for _ in range(TRIES):
                    if _build(environment, stored, take):
                        break


def _build(environment: Environment, stored: Stored, take: Take) -> bool:
    """Build the directory of a table as of the newest commit. Return whether it was taken."""
    txn, tree = environment.read_tree()
    try:
        directory = Directory(make_layout(stored), stored.table.id)
        return not directory.build(tree, REST_US) or take(stored.table.id, directory, environment.sequence(tree))
    finally:
        environment.handle.end_read(txn)
