"""`shorttail serve`: binds the sockets, starts the workers, restarts the dead, stops them all.

This process opens neither the store nor a model, and workers are started as new interpreters, never forked: LMDB and
ONNX Runtime survive no fork. The listening sockets are inherited, so that a worker can die and its successor go on
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
from shorttail.server.listen import Listeners

STABLE_S: Final = 10.0  # a worker that lived this long starts its backoff anew
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def serve(
    store: str | Path,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    uds: str | Path | None = None,
    workers: int = 1,
    check: bool = False,
) -> int:
    """Serve a store until SIGTERM or SIGINT; returns the exit code of the command.

    port 0 takes a free port; uds is the path of a Unix socket to listen on too. check: only see whether everything
    would load. Errors are one line on stderr. Call it in the main thread.
    """
    try:
        with Listeners(host, port, uds, bind=not check) as listeners:
            return Supervisor(str(store), listeners, workers).run(check)
    except ShorttailError as error:
        _say(f"error: {error.message}")
        return 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StartFailed(Exception):
    """A worker ended before it was ready, and has said why."""


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


@dataclass(slots=True)
class Worker:
    number: int
    process: subprocess.Popen[bytes]
    control: socket.socket  # one line of JSON comes when it is ready; then nothing until it is gone
    started_s: float
    served: dict[str, Any] | None = None
    received: bytes = b""


class Supervisor:
    def __init__(self, store: str, listeners: Listeners, workers: int):
        self.store = store
        self.listeners = listeners
        self.n_workers = workers
        self.workers: dict[int, Worker] = {}
        self.due_s: dict[int, float] = {}  # when a dead worker is started again
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

    # -- workers -----------------------------------------------------------------------------------------------

    def _start(self, number: int, *more: str) -> None:
        ours, theirs = socket.socketpair()
        fds = [listener.fileno() for listener in self.listeners.sockets]
        command = [sys.executable, "-P", "-m", "shorttail.server.worker"]
        command += ["--control-fd", str(theirs.fileno()), *(f"--listen-fd={fd}" for fd in fds), *more, "--", self.store]
        with theirs:
            # In a group of its own: Ctrl-C in a terminal is for the supervisor, which passes it on once.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno(), *fds], process_group=0
            )
        ours.setblocking(False)
        worker = Worker(number, process, ours, time.monotonic())
        self.workers[number] = worker
        self.selector.register(ours, selectors.EVENT_READ, worker)

    def _start_all(self, check: bool) -> None:
        """The first alone, so that a store that does not load is said once; then the others."""
        deadline_s = time.monotonic() + LIMITS.start_timeout_s
        for numbers in ([1], range(2, 1 if check else self.n_workers + 1)):
            for number in numbers:
                self._start(number, *(["--check"] if check else []))
            while not all(worker.served for worker in self.workers.values()):
                if time.monotonic() > deadline_s:
                    raise Unavailable(f"a worker was not ready after {LIMITS.start_timeout_s:g} s")
                self._wait(deadline_s, starting=True)

    def _wait(self, until_s: float | None, *, starting: bool = False) -> None:
        """Handle what happens next, or return when the time has come."""
        timeout_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        for key, _ in self.selector.select(timeout_s):
            if key.data is None:
                self._wakeup.recv(64)
                raise Stopped
            self._hear(key.data, starting)

    def _hear(self, worker: Worker, starting: bool) -> None:
        try:
            received = worker.control.recv(65536)
        except ConnectionError:
            received = b""
        if received:
            worker.received += received
            if worker.received.endswith(b"\n"):
                worker.served = json.loads(worker.received)
            return
        self.selector.unregister(worker.control)
        worker.control.close()
        del self.workers[worker.number]
        code = worker.process.wait()
        if not starting:
            self._plan_restart(worker, code)
        elif worker.served is None or code != 0:
            if code != 1:  # 1: it has said why
                _say(f"error: a worker died while it started: {_how_it_ended(code)}")
            raise StartFailed

    def _plan_restart(self, worker: Worker, code: int) -> None:
        now_s = time.monotonic()
        wait_s = 2 * self.backoff_s.get(worker.number, 0.0)
        if now_s - worker.started_s > STABLE_S:
            wait_s = 0.0
        wait_s = min(max(wait_s, LIMITS.restart_backoff_min_s), LIMITS.restart_backoff_max_s)
        self.backoff_s[worker.number] = wait_s
        self.due_s[worker.number] = now_s + wait_s
        _say(
            f"worker {worker.number} (pid {worker.process.pid}) died: {_how_it_ended(code)}; "
            f"starting it again in {wait_s:g} s"
        )

    def _next_due_s(self) -> float | None:
        return min(self.due_s.values(), default=None)

    def _restart_due(self) -> None:
        now_s = time.monotonic()
        for number in [number for number, due_s in self.due_s.items() if due_s <= now_s]:
            del self.due_s[number]
            self._start(number)

    # -- stopping ----------------------------------------------------------------------------------------------

    def _stop(self) -> int:
        """Let the workers finish; returns 0 if all did in time. A second signal kills them."""
        self.listeners.close()
        deadline_s = time.monotonic() + LIMITS.stop_grace_s
        for worker in self.workers.values():
            # One that is not ready has nothing in flight, and may be busy for long.
            worker.process.send_signal(signal.SIGTERM if worker.served else signal.SIGKILL)
        clean = True
        while self.workers:
            events = self.selector.select(deadline_s - time.monotonic())
            if not events or any(key.data is None for key, _ in events):
                return 1
            for key, _ in events:
                worker = key.data
                if worker.control.recv(65536) == b"":
                    self.selector.unregister(worker.control)
                    worker.control.close()
                    del self.workers[worker.number]
                    clean &= worker.process.wait() == 0 or worker.served is None
        return 0 if clean else 1

    def _wait_for_end(self) -> None:
        for worker in self.workers.values():
            worker.process.wait()

    def _kill(self) -> None:
        for worker in self.workers.values():
            worker.process.kill()
            worker.process.wait()
            worker.control.close()

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
        served = self.workers[1].served
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
