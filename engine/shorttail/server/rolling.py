"""A reload (SIGHUP): replaces the workers one by one by new workers, without refusing or breaking a request.

A new worker reads the token and TLS files and opens the store and its models. When it is ready, the old worker retires:
it stops accepting, and gives each connection to another worker when no reply is owed on it. TLS connections cannot
move, because their keys are in the old process. The old worker answers the requests that it has received on them and
closes them with a close_notify.

If the new files are not valid or a new worker does not start, the server continues as before and logs the reason.
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

RETIRE: Final = b"retire\n"  # sent on a worker's control socket


class ReloadingSupervisor(Protocol):
    """The part of the supervisor that a reload uses."""

    settings: ServerSettings
    systemd: Notifier
    n_workers: int
    others: set[Child]  # processes beside the workers that serve: successors, and workers that retire

    def say(self, level: str, text: str) -> None:
        """Write a line to the server's log."""

    def wait(self, until_s: float = ...) -> None:
        """Handle the next events, or return at `until_s` (of time.monotonic)."""

    def start_successor(self, number: int) -> Child:
        """Start a worker that will take the place of the worker of that number. Raises OSError."""

    def succeed(self, successor: Child) -> Child | None:
        """Let a ready successor serve. Returns the worker that has to retire, or None if it has died."""


def reload(supervisor: ReloadingSupervisor) -> None:
    """Check the settings and replace all workers. If one cannot be replaced, the others stay as they are."""
    supervisor.systemd.reloading()
    try:
        security.check(supervisor.settings)
    except ShorttailError as error:
        supervisor.say("warning", f"reload refused: {error.message}; the server continues as before")
    else:
        n = supervisor.n_workers  # a worker that died just now is replaced too, a little before its restart was due
        if all(replace(supervisor, number) for number in range(1, n + 1)):
            supervisor.say("info", f"reloaded: {n} worker{'' if n == 1 else 's'} replaced")
    supervisor.systemd.say("READY=1")


def replace(supervisor: ReloadingSupervisor, number: int) -> bool:
    """Replace the worker of this number. Returns False if the new worker did not start; then the old one stays.

    A new worker that dies in a model which is banned for it is started again.
    """
    while True:
        try:
            successor = supervisor.start_successor(number)
        except OSError as error:
            supervisor.say(
                "warning", f"reload stopped: no process can be started: {error.strerror}; the old workers continue"
            )
            return False
        while not successor.said and successor in supervisor.others:  # it is killed if it is not ready in time
            supervisor.wait()
        if successor.said:
            break
        if not successor.excused:
            supervisor.say("warning", f"reload stopped: the new worker {number} did not start; the old one continues")
            return False
    old = supervisor.succeed(successor)
    if old is not None:
        with contextlib.suppress(OSError):
            old.control.send(RETIRE)
        _wait_for_end(supervisor, old, LIMITS.stop_grace_s)
    return True


def _wait_for_end(supervisor: ReloadingSupervisor, child: Child, grace_s: float) -> None:
    """Handle events until a child has ended. After grace_s seconds the child is killed."""
    deadline_s = time.monotonic() + grace_s
    while child in supervisor.others and time.monotonic() < deadline_s:
        supervisor.wait(deadline_s)
    if child in supervisor.others:
        child.process.kill()
        while child in supervisor.others:
            supervisor.wait()
