"""SIGHUP: new workers take the place of the old, one after another, with no request refused or broken.

A new worker reads the files of tokens and TLS and opens the store and its models; only when it is ready does the old
one retire: it stops accepting and gives its connections to the others as soon as each owes nothing. TLS connections
cannot move, since their keys are in the old process: those are ended by a close_notify, once what has come on them is
answered.

What does not validate changes nothing: the server goes on as before, and says why.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, Protocol

from shorttail.config import LIMITS
from shorttail.errors import ShorttailError
from shorttail.server import security

if TYPE_CHECKING:
    from shorttail.server.children import Child
    from shorttail.server.settings import ServerSettings
    from shorttail.server.systemd import Notifier

RETIRE: Final = b"retire\n"  # worker.py: told()


class ReloadingSupervisor(Protocol):
    """The part of the supervisor that a reload works with."""

    settings: ServerSettings
    systemd: Notifier
    n_workers: int
    others: set[Child]  # processes beside the workers that serve: successors, and workers that retire

    def say(self, level: str, text: str) -> None:
        """Write a line of the server's log."""

    def wait(self, until_s: float = ...) -> None:
        """Handle the events that come until that time (of time.monotonic)."""

    def start_successor(self, number: int) -> Child:
        """Start a worker that will take the place of the worker of that number. Raises OSError."""

    def succeed(self, successor: Child) -> Child | None:
        """Let a successor that is ready serve. Returns the worker that is to retire, if it still lives."""


def reload(supervisor: ReloadingSupervisor) -> None:
    supervisor.systemd.reloading()
    try:
        security.check(supervisor.settings)
    except ShorttailError as error:
        supervisor.say("warning", f"reload refused: {error.message}; the server goes on as before")
    else:
        n = supervisor.n_workers  # one that is dead just now is replaced too, a little sooner than it would have been
        if all(replace(supervisor, number) for number in range(1, n + 1)):
            supervisor.say("info", f"reloaded: {n} worker{'' if n == 1 else 's'} replaced")
    supervisor.systemd.say("READY=1")


def replace(supervisor: ReloadingSupervisor, number: int) -> bool:
    """Put a new worker in the place of the one of this number. False: it did not start, and the old one stays."""
    try:
        successor = supervisor.start_successor(number)
    except OSError as error:
        supervisor.say("warning", f"reload stopped: no process can be started: {error.strerror}; the old ones go on")
        return False
    deadline_s = time.monotonic() + LIMITS.start_timeout_s
    while not successor.said and successor in supervisor.others and time.monotonic() < deadline_s:
        supervisor.wait(deadline_s)
    if not successor.said:
        if successor in supervisor.others:
            successor.process.kill()
            _wait_for_end(supervisor, successor, LIMITS.stop_grace_s)
        supervisor.say("warning", f"reload stopped: the new worker {number} did not start; the old one goes on")
        return False
    old = supervisor.succeed(successor)
    if old is not None:
        with contextlib.suppress(OSError):
            old.control.send(RETIRE)
        _wait_for_end(supervisor, old, LIMITS.stop_grace_s)
    return True


def _wait_for_end(supervisor: ReloadingSupervisor, child: Child, grace_s: float) -> None:
    deadline_s = time.monotonic() + grace_s
    while child in supervisor.others and time.monotonic() < deadline_s:
        supervisor.wait(deadline_s)
    if child in supervisor.others:
        child.process.kill()
        while child in supervisor.others:
            supervisor.wait()
