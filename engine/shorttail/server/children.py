"""The supervisor's children: how workers and the writer are started, and when they are started again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shorttail.config import LIMITS
from shorttail.observe import stderr
from shorttail.server.acceptor import WorkerShare
from shorttail.server.bulk import BULK
from shorttail.server.deaths import Deaths, RunsPage
from shorttail.server.inherited import Inherited
from shorttail.server.listen import Listeners, PrivateSockets
from shorttail.server.settings import ServerSettings

WRITER: Final = 0  # the writer's number; workers count from 1
STABLE_S: Final = 10.0  # the backoff of a child that lived this long starts at its minimum again
LAST_WORDS_S: Final = 1.0  # how long to wait until the last lines of children are passed on


@dataclass(slots=True, eq=False)
class Child:
    """A worker, the bulk worker or the writer.

    control: a socket on which the child sends one line of JSON when it is ready; it closes when the child ends. share:
    a worker's connections; None for the writer. said: the line: what is served, or {"error": why} from a writer that
    cannot open the store. killed_for: why the supervisor killed it. runs: what a worker runs now. is_successor: it will
    replace a worker, and is not ready yet. retires: another worker has replaced it. excused: it died in a model that
    was banned for it, so a worker that is started again may live.
    """

    number: int
    process: subprocess.Popen[bytes]
    control: socket.socket
    share: WorkerShare | None
    runs: RunsPage | None
    started_s: float = field(default_factory=time.monotonic)
    said: dict[str, Any] | None = None
    received: bytes = b""
    killed_for: str = ""
    is_successor: bool = False
    retires: bool = False
    excused: bool = False

    def __str__(self) -> str:
        return f"{name_of(self.number)} (pid {self.process.pid})"

    def await_turn(self) -> None:
        """Mark the child as a successor: it serves only after `take_turn`."""
        self.is_successor = True

    def take_turn(self) -> None:
        """The successor takes the place of the worker of its number."""
        self.is_successor = False

    def retire(self) -> None:
        """Another worker has replaced this one: it is not restarted when it ends."""
        self.retires = True

    def excuse(self) -> None:
        """A model that it ran or loaded is banned for its death."""
        self.excused = True

    def hear(self) -> bool:
        """Read what the child sends on its control socket. Returns False if the child has ended."""
        try:
            received = self.control.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            received = b""
        self.received += received
        if received and self.received.endswith(b"\n"):
            self.said = json.loads(self.received)
            if self.share is not None:
                self.share.heard_s = time.monotonic()
        return bool(received)

    def hangs(self, now_s: float, settings: ServerSettings) -> str:
        """Why the child must be killed, or "": its loop was silent for too long, or it is not ready in time."""
        if self.said is None:
            late = now_s - self.started_s > settings.start_timeout_s
            return f"it was not ready after {settings.start_timeout_s:g} s" if late else ""
        hung = self.share is not None and now_s - self.share.heard_s > settings.hang_deadline_s
        return f"it hung for {settings.hang_deadline_s:g} s" if hung else ""

    def close(self) -> int:
        """Wait until the child ends, and return its exit code."""
        self.control.close()
        if self.share is not None:
            self.share.close()
        code = self.process.wait()
        if self.runs is not None:
            self.runs.close()
        return code


class Launcher:
    """Starts children as new interpreters. A context manager: leaving it passes on the last lines of their stderr."""

    def __init__(
        self,
        store: str,
        listeners: Listeners,
        private: PrivateSockets,
        inherited: Inherited,
        settings: ServerSettings,
        *,
        device: str,
        options: Sequence[str],
        accepts: bool,
    ):
        """options: command-line options of every worker. accepts: the worker accepts connections itself."""
        self.store = store
        self.listeners = listeners
        self.private = private
        self.inherited = inherited
        self.settings = settings
        self.device = device
        self.options = options
        self.accepts = accepts
        self.deaths = Deaths()
        self._relays: list[threading.Thread] = []

    def start(self, number: int, *, check: bool = False) -> Child:
        """Start the child of that number. Raises OSError when the system cannot start a process."""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            control, control_end = socket.socketpair()
            ours.callback(control.close)
            theirs.callback(control_end.close)
            control.setblocking(False)
            share = runs = None
            fds = [control_end.fileno()]
            options = ["--control-fd", str(control_end.fileno())]
            if number == WRITER:
                listening = [self.private.writer.fileno()]
                options += ["--settings", self.settings.to_json(), "--metrics-fd", str(self.inherited.memory.fd)]
                fds.append(self.inherited.memory.fd)
            else:
                share = WorkerShare()
                ours.callback(share.close)
                runs = RunsPage()
                ours.callback(runs.close)
                runs.ban(self.deaths.banned)
                sockets = self.listeners.sockets if self.accepts else []
                http = self.inherited.listener
                if number == BULK:
                    sockets, http = [self.private.bulk], self.private.bulk_http if http is not None else None
                listening = [listener.fileno() for listener in sockets]
                fds += [share.worker_end.fileno(), runs.fd, self.inherited.memory.fd]
                if http is not None:
                    fds.append(http.fileno())
                    options += ["--http-fd", str(http.fileno())]
                options += ["--channel-fd", str(share.worker_end.fileno()), "--runs-fd", str(runs.fd)]
                options += self._worker_options(number, check)
            options += [f"--listen-fd={fd}" for fd in listening]
            process = self._spawn("writer" if number == WRITER else "worker", options, [*fds, *listening])
            ours.pop_all()
        if process.stderr is not None:
            self._relays = [relay for relay in self._relays if relay.is_alive()]
            self._relays.append(stderr.relay(process.stderr, name_of(number)))
        return Child(number, process, control, share, runs)

    def _worker_options(self, number: int, check: bool) -> list[str]:
        options = ["--settings", self.settings.to_json(), "--sockets", str(self.private.folder)]
        options += ["--metrics-fd", str(self.inherited.memory.fd), "--device", self.device, *self.options]
        if number == BULK:
            return [*options, "--bulk"]
        if self.settings.pin_cpus:
            cpus = sorted(os.sched_getaffinity(0))
            options += ["--cpu", str(cpus[(number - 1) % len(cpus)])]
        return [*options, "--check"] if check else options

    def _spawn(self, module: str, options: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", f"shorttail.server.{module}", *options, "--", self.store],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE if self.settings.log == "json" else None,  # every line of it becomes a line of JSON
            pass_fds=fds,
            process_group=0,  # Ctrl-C in a terminal then reaches the supervisor alone, which stops its children
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        end_s = time.monotonic() + LAST_WORDS_S
        for relay in self._relays:
            relay.join(max(0.0, end_s - time.monotonic()))


class Restarts:
    """When children that died are started again: at once at first, with a doubling backoff if they die soon again."""

    def __init__(self) -> None:
        self.due_s: dict[int, float] = {}
        self._backoff_s: dict[int, float] = {}

    @property
    def next_s(self) -> float:
        return min(self.due_s.values(), default=math.inf)

    def plan(self, number: int, lived_s: float) -> float:
        """Plan the restart of a child that lived so long. Returns the wait in seconds."""
        wait_s = 0.0 if lived_s > STABLE_S else 2 * self._backoff_s.get(number, 0.0)
        wait_s = min(max(wait_s, LIMITS.restart_backoff_min_s), LIMITS.restart_backoff_max_s)
        self._backoff_s[number] = wait_s
        self.due_s[number] = time.monotonic() + wait_s
        return wait_s

    def take(self) -> list[int]:
        """Return, and forget, the numbers of the children whose restart is due."""
        now_s = time.monotonic()
        due = [number for number, due_s in self.due_s.items() if due_s <= now_s]
        for number in due:
            del self.due_s[number]
        return due

    def forget(self, number: int) -> None:
        """Plan no restart: another child has taken its place."""
        self.due_s.pop(number, None)


def name_of(number: int) -> str:
    return {WRITER: "writer", BULK: "bulk worker"}.get(number, f"worker {number}")


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
