"""`shorttail serve`: binds the sockets, starts the workers and the writer, restarts the dead, stops them all.

This process opens neither the store nor a model, and its children are started as new interpreters, never forked: LMDB
and ONNX Runtime survive no fork. The listening sockets are inherited, so that a worker can die and its successor go on
with the same queue of connections.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shorttail.config import DEFAULT_HOST, DEFAULT_PORT, LIMITS
from shorttail.errors import ShorttailError, Unavailable
from shorttail.server.listen import Listeners, WriterSocket

STABLE_S: Final = 10.0  # a child that lived this long starts its backoff anew
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def serve(
    store: str | Path,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    uds: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    check: bool = False,
) -> int:
    """Serve a store until SIGTERM or SIGINT; returns the exit code of the command.

    port 0 takes a free port; uds is the path of a Unix socket to listen on too. device: "cpu", "cuda" or "cuda:N", for
    the models that are no forests. check: only see whether everything would load. Errors are one line on stderr. Call
    it in the main thread.
    """
    try:
        with Listeners(host, port, uds, bind=not check) as listeners, WriterSocket() as writer_socket:
            return Supervisor(str(store), listeners, writer_socket, workers, device).run(check)
    except ShorttailError as error:
        _say(f"error: {error.message}")
        return 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StartFailed(Exception):
    """A worker ended before it was ready, and has said why."""


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


WRITER: Final = 0  # its number; workers count from 1


@dataclass(slots=True)
class Child:
    number: int
    process: subprocess.Popen[bytes]
    control: socket.socket  # one line of JSON comes when it is ready; then nothing until it is gone
    started_s: float
    said: dict[str, Any] | None = None  # what is served; or of a writer that cannot write {"error": why}
    received: bytes = b""

    def __str__(self) -> str:
        name = "writer" if self.number == WRITER else f"worker {self.number}"
        return f"{name} (pid {self.process.pid})"


class Supervisor:
    def __init__(self, store: str, listeners: Listeners, writer_socket: WriterSocket, workers: int, device: str):
        self.store = store
        self.listeners = listeners
        self.writer_socket = writer_socket
        self.n_workers = workers
        self.device = device
        self.children: dict[int, Child] = {}
        self.due_s: dict[int, float] = {}  # when a dead child is started again
        self.backoff_s: dict[int, float] = {}
        self.selector = selectors.DefaultSelector()

    def run(self, check: bool) -> int:
        with self._signals():
            try:
                self._start_all(check)
                if check:
                    self._wait_for_end()
                    print(f"ok · {self._contents()}", flush=True)
                    return 0
                print(self._announcement(), flush=True)
                while True:
                    self._restart_due()
                    self._wait(self._next_due_s())
            except StartFailed:
                return 1
            except Stopped:
                return self._stop()
            finally:
                self._kill()  # whoever is left, however this ends

    # -- children ----------------------------------------------------------------------------------------------

    def _start(self, number: int, *more: str) -> None:
        if number == WRITER:
            module, fds = "writer", [self.writer_socket.listener.fileno()]
        else:
            module, fds = "worker", [listener.fileno() for listener in self.listeners.sockets]
            more = ("--writer", self.writer_socket.path, "--device", self.device, *more)
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", f"shorttail.server.{module}"]
        command += ["--control-fd", str(theirs.fileno()), *(f"--listen-fd={fd}" for fd in fds), *more, "--", self.store]
        with theirs:
            # In a group of its own: Ctrl-C in a terminal is for the supervisor, which passes it on once.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno(), *fds], process_group=0
            )
        ours.setblocking(False)
        child = Child(number, process, ours, time.monotonic())
        self.children[number] = child
        self.selector.register(ours, selectors.EVENT_READ, child)

    def _start_all(self, check: bool) -> None:
        """One worker alone with the writer, so that a store that does not load is said once; then the others."""
        deadline_s = time.monotonic() + LIMITS.start_timeout_s
        if not check:
            self._start(WRITER)
        for numbers in ([1], range(2, 1 if check else self.n_workers + 1)):
            for number in numbers:
                self._start(number, *(["--check"] if check else []))
            while not all(worker.said for worker in self._workers()):
                if time.monotonic() > deadline_s:
                    raise Unavailable(f"a worker was not ready after {LIMITS.start_timeout_s:g} s")
                self._wait(deadline_s, starting=True)
        # Usually ready before the workers are. Serving does not depend on it: without it, only pushes are refused.
        deadline_s = time.monotonic() + LIMITS.writer_start_wait_s
        while WRITER in self.children and not self.children[WRITER].said and time.monotonic() < deadline_s:
            self._wait(deadline_s, starting=True)

    def _workers(self) -> list[Child]:
        return [child for child in self.children.values() if child.number != WRITER]

    def _wait(self, until_s: float | None, *, starting: bool = False) -> None:
        """Handle what happens next, or return when the time has come."""
        timeout_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        for key, _ in self.selector.select(timeout_s):
            if key.data is None:
                self._wakeup.recv(64)
                raise Stopped
            self._hear(key.data, starting)

    def _hear(self, child: Child, starting: bool) -> None:
        try:
            received = child.control.recv(65536)
        except ConnectionError:
            received = b""
        if received:
            child.received += received
            if child.received.endswith(b"\n"):
                child.said = json.loads(child.received)
            return
        code = self._bury(child)
        if child.number == WRITER:
            self._plan_restart(child, code, silent=starting)  # if the store is wrong, the worker says so
        elif not starting:
            self._plan_restart(child, code)
        elif child.said is None or code != 0:
            if code != 1:  # 1: it has said why
                _say(f"error: a worker died while it started: {_how_it_ended(code)}")
            raise StartFailed

    def _bury(self, child: Child) -> int:
        """Forget a child whose control socket has closed; returns its exit code."""
        self.selector.unregister(child.control)
        child.control.close()
        del self.children[child.number]
        return child.process.wait()

    def _plan_restart(self, child: Child, code: int, *, silent: bool = False) -> None:
        now_s = time.monotonic()
        wait_s = 2 * self.backoff_s.get(child.number, 0.0)
        if now_s - child.started_s > STABLE_S:
            wait_s = 0.0
        wait_s = min(max(wait_s, LIMITS.restart_backoff_min_s), LIMITS.restart_backoff_max_s)
        self.backoff_s[child.number] = wait_s
        self.due_s[child.number] = now_s + wait_s
        if not silent:
            reason = (child.said or {}).get("error") or _how_it_ended(code)
            _say(f"{child} died: {reason}; starting it again in {wait_s:g} s")

    def _next_due_s(self) -> float | None:
        return min(self.due_s.values(), default=None)

    def _restart_due(self) -> None:
        now_s = time.monotonic()
        for number in [number for number, due_s in self.due_s.items() if due_s <= now_s]:
            del self.due_s[number]
            self._start(number)

    # -- stopping ----------------------------------------------------------------------------------------------

    def _stop(self) -> int:
        """Let them finish; returns 0 if all did in time. A second signal kills them."""
        self.listeners.close()
        clean = self._end(self._workers(), LIMITS.stop_grace_s)
        # The writer last: what workers have handed to it is written and answered.
        writer = [child for child in self.children.values() if child.number == WRITER]
        return 0 if clean and self._end(writer, LIMITS.stop_grace_s) else 1

    def _end(self, children: list[Child], grace_s: float) -> bool:
        """SIGTERM; True if they all ended well in time."""
        deadline_s = time.monotonic() + grace_s
        for child in children:
            # One that is not ready has nothing in flight, and may be busy for long.
            child.process.send_signal(signal.SIGTERM if child.said else signal.SIGKILL)
        clean, waiting = True, {child.number for child in children}
        while waiting:
            events = self.selector.select(deadline_s - time.monotonic())
            if not events or any(key.data is None for key, _ in events):
                return False
            for key, _ in events:
                child = key.data
                if child.control.recv(65536) == b"":
                    waiting.discard(child.number)
                    clean &= self._bury(child) == 0 or child.said is None
        return clean

    def _wait_for_end(self) -> None:
        for child in self.children.values():
            child.process.wait()

    def _kill(self) -> None:
        for child in self.children.values():
            child.process.kill()
            child.process.wait()
            child.control.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn signals into bytes on a socket that the selector watches."""
        self._wakeup, wakeup_end = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup_end.setblocking(False)
        self.selector.register(self._wakeup, selectors.EVENT_READ, None)
        old_fd = signal.set_wakeup_fd(wakeup_end.fileno(), warn_on_full_buffer=False)
        old = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)
            self.selector.close()
            self._wakeup.close()
            wakeup_end.close()

    # -- words -------------------------------------------------------------------------------------------------

    def _contents(self) -> str:
        served = self.children[1].said
        assert served is not None
        models = ", ".join(f"{model['name']} v{model['version']}" for model in served["models"])
        return f"models: {models or 'none'} · views: {', '.join(served['views']) or 'none'}"

    def _announcement(self) -> str:
        plural = "" if self.n_workers == 1 else "s"
        return f"serving on {self.listeners} · {self.n_workers} worker{plural} · {self._contents()}"


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
