"""`shorttail serve`: binds the sockets, starts the workers and the writer, restarts the dead, stops them all.

This process opens neither the store nor a model, and its children are started as new interpreters, never forked: LMDB
and ONNX Runtime survive no fork. The listening sockets stay open here, so that a worker can die and its successor go on
with the same queue of connections. A worker alone accepts connections itself. Of several, each would take what it
happens to see first, and a few long-lived connections could all end up with one: so here they are accepted, and given
to the worker that has the fewest (handover.py).

SIGHUP replaces the workers one by one by new ones, which read the files of tokens and TLS anew (rolling.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from shorttail.config import DEFAULT_HOST, DEFAULT_PORT, LIMITS
from shorttail.errors import ShorttailError, Unavailable
from shorttail.monitor import logs
from shorttail.server import handover, rolling, security
from shorttail.server.listen import Listeners, WriterSocket
from shorttail.server.settings import Settings
from shorttail.server.shared import Shared
from shorttail.server.systemd import Notifier

STABLE_S: Final = 10.0  # a child that lived this long starts its backoff anew
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
ACCEPTED_AT_ONCE: Final = 64  # then others have their turn
ACCEPT: Final = "accept"
SIGNALS: Final = (*STOP_SIGNALS, signal.SIGHUP)


def serve(
    store: str | Path,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    uds: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    pretouch: bool = False,
    lock_memory: bool = False,
    check: bool = False,
    settings: Settings | None = None,
) -> int:
    """Serve a store until SIGTERM or SIGINT; returns the exit code of the command.

    port 0 takes a free port; uds is the path of a Unix socket to listen on too. device: "cpu", "cuda" or "cuda:N", for
    the models that are no forests. pretouch, lock_memory: see Engine.open. check: only see whether everything would
    load. settings: of security, limits and CPUs. Errors are one line on stderr. Call it in the main thread.
    """
    settings = settings or Settings()
    try:
        security.check(settings)
        with (
            Listeners(host, port, uds, settings, bind=not check) as listeners,
            WriterSocket() as writer_socket,
            Shared(settings, host, port, workers, bind=not check) as shared,
        ):
            options = [*(["--pretouch"] if pretouch else []), *(["--lock-memory"] if lock_memory else [])]
            supervisor = Supervisor(str(store), listeners, writer_socket, workers, device, options, settings, shared)
            return supervisor.run(check)
    except ShorttailError as error:
        _say(f"error: {error.message}", settings.log)
        return 1


def _say(text: str, form: str) -> None:
    print(logs.line("json", "warning", text, {}) if form == "json" else text, file=sys.stderr, flush=True)


class StartFailed(Exception):
    """A worker ended before it was ready, and has said why."""


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


WRITER: Final = 0  # its number; workers count from 1


@dataclass(slots=True, eq=False)
class Child:
    number: int
    process: subprocess.Popen[bytes]
    control: socket.socket  # one line of JSON comes when it is ready; then nothing until it is gone
    started_s: float
    said: dict[str, Any] | None = None  # what is served; or of a writer that cannot write {"error": why}
    received: bytes = b""
    shares: handover.Shares | None = None  # of a worker
    is_successor: bool = False  # not ready yet, to take the place of one that serves
    retires: bool = False

    def __str__(self) -> str:
        name = "writer" if self.number == WRITER else f"worker {self.number}"
        return f"{name} (pid {self.process.pid})"


class Supervisor:
    def __init__(
        self,
        store: str,
        listeners: Listeners,
        writer_socket: WriterSocket,
        workers: int,
        device: str,
        worker_options: Sequence[str],
        settings: Settings,
        shared: Shared,
    ):
        self.settings = settings
        self.shared = shared
        self.store = store
        self.listeners = listeners
        self.writer_socket = writer_socket
        self.n_workers = workers
        self.device = device
        self.worker_options = worker_options
        self.children: dict[int, Child] = {}
        self.due_s: dict[int, float] = {}  # when a dead child is started again
        self.backoff_s: dict[int, float] = {}
        self.selector = selectors.DefaultSelector()
        self.others: set[Child] = set()  # successors that are not ready, and workers that retire
        self.systemd = Notifier()
        self.accepts = False
        self.reload_wanted = False

    def run(self, check: bool) -> int:
        with self._signals():
            try:
                self._start_all(check)
                if check:
                    self._wait_for_end()
                    print(f"ok · {self._contents()}", flush=True)
                    return 0
                print(self._announcement(), flush=True)
                self.systemd.say("READY=1", f"STATUS={self._contents()}")
                while True:
                    self._restart_due()
                    if self.reload_wanted:
                        self.reload_wanted = False
                        rolling.reload(self)
                    self._wait(self._next_due_s())
            except StartFailed:
                return 1
            except Stopped:
                return self._stop()
            finally:
                self._kill()  # whoever is left, however this ends

    # -- children ----------------------------------------------------------------------------------------------

    def _start(self, number: int, *more: str, is_successor: bool = False) -> Child:
        shares = None
        passed = []
        inherited: list[int] = []
        if number == WRITER:
            module, fds = "writer", [self.writer_socket.listener.fileno()]
        else:
            accepts = self.n_workers == 1
            module, fds = "worker", [listener.fileno() for listener in self.listeners.sockets] if accepts else []
            channel, channel_end = handover.pair()
            shares = handover.Shares(channel)
            passed.append(channel_end)
            more = ("--channel-fd", str(channel_end.fileno()), "--settings", self.settings.to_json(), *more)
            more = (*self.shared.worker_options, *more)
            inherited += self.shared.fds
            if self.settings.pin_cpus:
                cpus = sorted(os.sched_getaffinity(0))
                more = ("--cpu", str(cpus[(number - 1) % len(cpus)]), *more)
            more = ("--writer", self.writer_socket.path, "--device", self.device, *self.worker_options, *more)
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", f"shorttail.server.{module}"]
        command += ["--control-fd", str(theirs.fileno()), *(f"--listen-fd={fd}" for fd in fds), *more, "--", self.store]
        passed.append(theirs)
        try:
            # In a group of its own: Ctrl-C in a terminal is for the supervisor, which passes it on once.
            pass_fds = [*(end.fileno() for end in passed), *fds, *inherited]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=pass_fds, process_group=0)
        finally:
            for end in passed:
                end.close()
        ours.setblocking(False)
        child = Child(number, process, ours, time.monotonic(), shares=shares, is_successor=is_successor)
        if is_successor:
            self.others.add(child)
        else:
            self.children[number] = child
        self.selector.register(ours, selectors.EVENT_READ, child)
        if shares is not None:
            self.selector.register(shares.channel, selectors.EVENT_READ, child)
        return child

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
        if self.systemd.due_s is not None:
            beat_s = max(0.0, self.systemd.due_s - time.monotonic())
            timeout_s = beat_s if timeout_s is None else min(timeout_s, beat_s)
        self._update_accepting()
        for key, _ in self.selector.select(timeout_s):
            if key.data is None:
                self._hear_signals()
            elif key.data == ACCEPT:
                self._accept(cast(socket.socket, key.fileobj))
            elif key.data.shares is not None and key.fileobj is key.data.shares.channel:
                self._hear_channel(key.data)
            else:
                self._hear(key.data, starting)
        self.systemd.beat()

    def _hear_signals(self) -> None:
        signals = set(self._wakeup.recv(64))
        if not signals.isdisjoint(STOP_SIGNALS):
            raise Stopped
        self.reload_wanted = True

    def _hear(self, child: Child, starting: bool) -> None:
        if child.control.fileno() < 0:
            return  # buried in this round
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
        if child.is_successor or child.retires:
            return  # rolling.py looks after them
        if child.number == WRITER:
            self._plan_restart(child, code, silent=starting)  # if the store is wrong, the worker says so
        elif not starting:
            self._plan_restart(child, code)
        elif child.said is None or code != 0:
            if code != 1:  # 1: it has said why
                _say(f"error: a worker died while it started: {_how_it_ended(code)}", self.settings.log)
            raise StartFailed

    def _bury(self, child: Child) -> int:
        """Forget a child whose control socket has closed; returns its exit code."""
        if child.shares is not None:
            if child.retires:
                self._hear_channel(child)  # the last connections that it gave away
            if child.shares.channel.fileno() >= 0:
                self._forget_channel(child)
        self.selector.unregister(child.control)
        child.control.close()
        self.others.discard(child)
        if self.children.get(child.number) is child:
            del self.children[child.number]
        return child.process.wait()

    # -- connections -------------------------------------------------------------------------------------------

    def _takers(self) -> list[Child]:
        """Workers that can be given connections: the one with the fewest first, and last those that hang."""
        ready = [child for child in self._workers() if child.said and child.shares is not None]
        return sorted(ready, key=lambda child: (child.shares.hangs, child.shares.load) if child.shares else (True, 0))

    def _update_accepting(self) -> None:
        """Several workers: accept here, while there is a worker to give connections to. Else they wait."""
        wanted = self.n_workers > 1 and bool(self._takers())
        if wanted != self.accepts:
            self.accepts = wanted
            for listener in self.listeners.sockets:
                if wanted:
                    self.selector.register(listener, selectors.EVENT_READ, ACCEPT)
                else:
                    self.selector.unregister(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except OSError:  # none is left, or it has gone already
                return
            self._give(bytes([handover.FRESH]), connection)

    def _give(self, data: bytes, connection: socket.socket) -> None:
        with connection:
            for child in self._takers():
                if child.shares is not None and child.shares.give(data, connection):
                    return
        # Every worker is far behind: this connection is closed, which its client sees at once.

    def _hear_channel(self, child: Child) -> None:
        if child.shares is not None and child.shares.channel.fileno() >= 0 and not child.shares.hear(self._give):
            self._forget_channel(child)

    def _forget_channel(self, child: Child) -> None:
        assert child.shares is not None
        self.selector.unregister(child.shares.channel)
        child.shares.channel.close()

    # -- for rolling.py ----------------------------------------------------------------------------------------

    def start_successor(self, number: int) -> Child:
        return self._start(number, is_successor=True)

    def succeed(self, successor: Child) -> Child | None:
        """A successor that is ready takes its place. Returns the worker that is to retire, if it still lives."""
        old = self.children.get(successor.number)
        successor.is_successor = False
        self.others.discard(successor)
        self.children[successor.number] = successor
        self.due_s.pop(successor.number, None)
        if old is not None:
            old.retires = True
            self.others.add(old)
        return old

    def workers(self) -> list[Child]:
        return self._workers()

    def wait(self, until_s: float | None) -> None:
        """Handle what happens next; deaths and restarts of others too."""
        self._restart_due()
        due_s = [moment for moment in (until_s, self._next_due_s()) if moment is not None]
        self._wait(min(due_s, default=None))

    def say(self, line: str) -> None:
        _say(line, self.settings.log)

    # -- restarts ----------------------------------------------------------------------------------------------

    def _plan_restart(self, child: Child, code: int, *, silent: bool = False) -> None:
        now_s = time.monotonic()
        wait_s = 2 * self.backoff_s.get(child.number, 0.0)
        if now_s - child.started_s > STABLE_S:
            wait_s = 0.0
        wait_s = min(max(wait_s, LIMITS.restart_backoff_min_s), LIMITS.restart_backoff_max_s)
        self.backoff_s[child.number] = wait_s
        self.due_s[child.number] = now_s + wait_s
        if not silent:
            self.shared.restarted(writer=child.number == WRITER)
            reason = (child.said or {}).get("error") or _how_it_ended(code)
            _say(f"{child} died: {reason}; starting it again in {wait_s:g} s", self.settings.log)

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
        self.systemd.say("STOPPING=1")
        if self.accepts:
            for listener in self.listeners.sockets:
                self.selector.unregister(listener)
        self.listeners.close()
        self.shared.close()
        clean = self._end([*self._workers(), *self.others], LIMITS.stop_grace_s)
        # The writer last: what workers have handed to it is written and answered.
        writer = [child for child in self.children.values() if child.number == WRITER]
        return 0 if clean and self._end(writer, LIMITS.stop_grace_s) else 1

    def _end(self, children: list[Child], grace_s: float) -> bool:
        """SIGTERM; True if they all ended well in time."""
        deadline_s = time.monotonic() + grace_s
        for child in children:
            # One that is not ready has nothing in flight, and may be busy for long.
            child.process.send_signal(signal.SIGTERM if child.said else signal.SIGKILL)
        clean, waiting = True, set(children)
        while waiting:
            events = self.selector.select(deadline_s - time.monotonic())
            if not events or any(key.data is None for key, _ in events):
                return False
            for key, _ in events:
                ending: Child = key.data
                if key.fileobj is not ending.control:
                    self._hear_channel(ending)
                elif ending.control.fileno() >= 0 and ending.control.recv(65536) == b"":
                    waiting.discard(ending)
                    clean &= self._bury(ending) == 0 or ending.said is None
        return clean

    def _wait_for_end(self) -> None:
        for child in self.children.values():
            child.process.wait()

    def _kill(self) -> None:
        for child in [*self.children.values(), *self.others]:
            child.process.kill()
            child.process.wait()
            child.control.close()
            if child.shares is not None:
                child.shares.channel.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn signals into bytes on a socket that the selector watches."""
        self._wakeup, wakeup_end = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup_end.setblocking(False)
        self.selector.register(self._wakeup, selectors.EVENT_READ, None)
        old_fd = signal.set_wakeup_fd(wakeup_end.fileno(), warn_on_full_buffer=False)
        old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
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
        return f"serving on {self.listeners}{self.shared} · {self.n_workers} worker{plural} · {self._contents()}"


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
