"""The supervisor of `shorttail serve`: binds the sockets, starts the workers and the writer, restarts them, stops them.

The supervisor opens neither the store nor a model. It starts its children as new interpreters and never forks, because
LMDB and ONNX Runtime do not work after a fork. The listening sockets stay open in the supervisor, so a worker that is
restarted goes on with the same queue of connections.

A single worker accepts connections itself. With several workers the supervisor accepts, and gives each connection to
the worker that has the fewest (acceptor.py): if the workers accepted, a few long-lived connections could all end up
with one worker.

SIGHUP replaces the workers one by one by new workers, which read the token and TLS files again (rolling.py).
"""

from __future__ import annotations

import math
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, cast

from shorttail.config import DEFAULT_HOST, DEFAULT_PORT, LIMITS
from shorttail.errors import ShorttailError, Unavailable
from shorttail.observe import logs, stderr
from shorttail.observe.logs import Seldom
from shorttail.server import acceptor, bulk, limits, rolling, security
from shorttail.server.acceptor import Acceptor
from shorttail.server.bulk import BULK, BulkSockets
from shorttail.server.children import WRITER, Child, Launcher, Restarts, how_it_ended
from shorttail.server.deaths import DiedIn
from shorttail.server.inherited import Inherited
from shorttail.server.listen import Listeners, PrivateSockets
from shorttail.server.settings import ServerSettings
from shorttail.server.signals import RELOAD, STOP, Signals
from shorttail.server.systemd import Notifier

WAIT_MAX_S: Final = 0.25
# If the supervisor looks at its workers this long after the last time, it did not run itself, so perhaps no process
# did.
STOOD_STILL_S: Final = 0.75
WORKER: Final = "worker_restarts"
# The signals that say something against the model that a worker ran. SIGKILL does not: somebody else sent it.
DEADLY: Final = (signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGABRT)


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
    code: bool = True,
    check: bool = False,
    settings: ServerSettings | None = None,
) -> int:
    """Serve a store until SIGTERM, SIGINT or SIGQUIT, and return the exit code of the command.

    port: 0 takes a free port. uds: path of a Unix socket to listen on as well. device: "cpu", "cuda" or "cuda:N", where
    models run that are not compiled forests. pretouch, lock_memory, code: see Engine.open. check: load everything, say
    what would be served, and exit. settings: security, limits and CPUs. Errors are one line on stderr. Must be called
    in the main thread, because it handles signals.
    """
    settings = settings or ServerSettings()
    stderr.log_as_json(settings.log)
    given = {"--pretouch": pretouch, "--lock-memory": lock_memory, "--no-code": not code}
    options = [option for option, wanted in given.items() if wanted]
    # A single worker accepts by itself, except with TLS: it would not know of connections that are still in their
    # handshake, and a reload would cut them. It knows those that the supervisor gave to it.
    accepts = workers == 1 and settings.tls_cert is None
    try:
        with Signals() as signals:
            security.check(settings)
            with (
                Listeners(settings.rpc_host(host), port, uds, settings, bind=not check) as listeners,
                PrivateSockets() as private,
                Inherited(settings, host, port, workers, bind=not check) as shared,
                Launcher(
                    str(store), listeners, private, shared, settings,
                    device=device, options=options, accepts=accepts,
                ) as launcher,
            ):  # fmt: skip
                return Supervisor(launcher, workers, signals).run(check)
    except ShorttailError as error:
        logs.log_now(settings.log, "error", error.message)
        return 1


class StartFailed(Exception):
    """A worker ended before it was ready; it has logged why."""


class Stopped(Exception):
    """A signal of STOP was received. interrupted: it was SIGINT, from Ctrl-C."""

    def __init__(self, interrupted: bool):
        super().__init__()
        self.interrupted = interrupted


class Supervisor:
    """Starts, watches, replaces and stops the processes of one server: `workers` workers and one writer."""

    def __init__(self, launcher: Launcher, workers: int, signals: Signals):
        self.launcher = launcher
        self.settings = launcher.settings
        self.n_workers = workers
        self.signals = signals
        self.selector = selectors.DefaultSelector()
        self.bulk = BulkSockets(self.selector, [launcher.private.bulk, launcher.private.bulk_http])
        self.acceptor = Acceptor(
            self.selector, [] if launcher.accepts else launcher.listeners.sockets, self.note_refused
        )
        self._refused = Seldom()
        self.restarts = Restarts()
        self.systemd = Notifier()
        self.children: dict[int, Child] = {}
        self.others: set[Child] = set()  # successors that are not ready, and workers that retire
        self.served: dict[str, Any] = {}  # what the first worker that was ready said it serves
        self.starting = True
        self.reload_wanted = False
        self.looked_s = 0.0  # when workers that hang were last looked for
        self.check = False
        self.told: set[str] = set()  # why models are not served, as far as the log says it

    def run(self, check: bool) -> int:
        self.signals.register(self.selector)
        self.check = check
        try:
            self._start_all()
            if check:
                for child in self.children.values():
                    child.process.wait()
                if self.served["unavailable"]:
                    return 1
                print(f"ok · {self._contents()}", flush=True)
                return 0
            if self.settings.bulk:
                self.bulk.watch()
            if warning := limits.files_warning(self.settings, http=self.launcher.inherited.listener is not None):
                self.say("warning", warning)
            self._announce()
            while True:
                if self.reload_wanted:
                    self.reload_wanted = False
                    self.launcher.deaths.forget()
                    self.told.clear()
                    self.launcher.inherited.show("banned_models", 0)
                    rolling.reload(self)
                    if BULK in self.children:
                        self.children[BULK].process.terminate()
                self.wait()
        except StartFailed:
            return 1
        except Stopped as stopped:
            code = self._stop()
            return 130 if self.starting and stopped.interrupted else code
        finally:
            self._kill()  # the children that are left, however the run ends
            self.selector.close()

    def say(self, level: str, text: str) -> None:
        logs.log_now(self.settings.log, level, text)

    def note_refused(self, reason: str, n: int) -> None:
        """Count connections that were closed because no process can take them, and say so now and then."""
        self.launcher.inherited.count("refused", n)
        if reason == acceptor.NO_FILES:
            self.launcher.inherited.count("file_shortages", n)
        if told := self._refused.count(n):
            self.say("warning", f"{told} connection{'s' * (told != 1)} closed: {reason}")

    def workers(self) -> list[Child]:
        return [child for child in self.children.values() if child.number != WRITER]

    # -- starting ----------------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        """Start the writer and one worker, then the other workers. So a store that does not load is reported once."""
        if not self.check:
            self._start(WRITER)
        for numbers in ([1], range(2, 1 if self.check else self.n_workers + 1)):
            for number in numbers:
                self._start(number)
            # A worker that died in a model is started again without that model.
            while self.restarts.due_s.keys() - {WRITER} or not all(worker.said for worker in self.workers()):
                self.wait()
        self.starting = False

    def _announce(self) -> None:
        plural = "" if self.n_workers == 1 else "s"
        where = f"{self.launcher.listeners}{self.launcher.inherited}"
        text = f"serving on {where} · {self.n_workers} worker{plural} · {self._contents()}"
        # On stdout, whatever the log's format: programs that start a server read the port there.
        logs.write_text(text, sys.stdout)
        self._note(text)
        self.systemd.say("READY=1", f"STATUS={self._contents()}")

    def _contents(self) -> str:
        models = ", ".join(f"{model['name']} v{model['version']}" for model in self.served["models"])
        missing = ", ".join(self.served["unavailable"])
        text = f"models: {models or 'none'} · views: {', '.join(self.served['views']) or 'none'}"
        return f"{text} · not loaded: {missing}" if missing else text

    def _note(self, text: str) -> None:
        """Write a line for log collectors alone: a person at a terminal does not need it."""
        if self.settings.log == "json":
            self.say("info", text)

    def _start(self, number: int) -> None:
        try:
            child = self.launcher.start(number, check=self.check)
        except OSError as error:
            raise Unavailable(f"a process cannot be started: {error.strerror}") from None
        self._take_in(child)
        self.children[number] = child

    def _start_bulk(self) -> None:
        """Start the bulk worker, because a large request waits."""
        if BULK in self.children:
            return
        self.bulk.unwatch()
        try:
            self._start(BULK)
        except Unavailable as error:
            self.bulk.refuse()
            self.restarts.plan(BULK, 0.0)
            self.say("error", f"the bulk worker: {error.message}")

    def _take_in(self, child: Child) -> None:
        self.selector.register(child.control, selectors.EVENT_READ, child)
        if child.share is not None:
            self.selector.register(child.share.channel, selectors.EVENT_READ, child)

    # -- events ------------------------------------------------------------------------------------------------

    def wait(self, until_s: float = math.inf) -> None:
        """Handle the next events, or return at `until_s`. Children that died are started again when that is due."""
        for number in self.restarts.take():
            if number == BULK:
                self.bulk.watch()
                continue
            try:
                self._start(number)
            except Unavailable as error:
                wait_s = self.restarts.plan(number, 0.0)
                self.say("error", f"{error.message}; trying it again in {wait_s:g} s")
        self._kill_hung()
        self._wait(min(until_s, self.restarts.next_s))

    def _wait(self, until_s: float) -> None:
        due_s = min(until_s, self.acceptor.due_s, math.inf if self.systemd.due_s is None else self.systemd.due_s)
        for key, _ in self.selector.select(min(max(0.0, due_s - time.monotonic()), WAIT_MAX_S)):
            if key.data is None:
                self._hear_signals()
            elif key.data == acceptor.ACCEPT:
                self.acceptor.accept(cast(socket.socket, key.fileobj))
            elif key.data == bulk.WANTED:
                self._start_bulk()
            elif key.fileobj is key.data.control:
                self._hear(key.data)
            elif key.data.control.fileno() >= 0:  # not buried in this round
                key.data.share.hear(self.acceptor.give)
        if self.acceptor.due_s <= time.monotonic():
            self.acceptor.look()
        self.systemd.beat()

    def _hear_signals(self) -> None:
        signals = self.signals.take()
        if signals & STOP:
            raise Stopped(signal.SIGINT in signals)
        self.reload_wanted |= bool(signals & RELOAD)

    def _hear(self, child: Child) -> None:
        if child.control.fileno() < 0:
            return  # buried in this round
        if child.hear():
            if child.said and child.share is not None and not child.is_successor:
                self.served = self.served or child.said
                if child.number != BULK:
                    self.acceptor.add(child.share)
            self._tell_unavailable(child)
            return
        code = self._bury(child)
        if child.is_successor or child.retires:
            return  # rolling.py handles these
        if child.number == BULK and code == 0:
            self.bulk.watch()  # it was idle, or a reload has ended it
        elif child.number == BULK:
            self.bulk.refuse()
            self._plan_restart(child, code)
        elif child.number == WRITER:
            # If the store cannot be opened, the worker reports it.
            self._plan_restart(child, code, silent=self.starting)
        elif not self.starting or child.said or child.excused:
            self._plan_restart(child, code)
        else:
            if code != 1:  # with 1 it has logged why
                self.say("error", f"a worker died while it started: {child.killed_for or how_it_ended(code)}")
            raise StartFailed

    def _tell_unavailable(self, child: Child) -> None:
        """Log which models a worker that is ready cannot serve, and why. Workers that say the same are logged once."""
        for reason in (child.said or {}).get("unavailable", {}).values():
            if reason not in self.told:
                self.told.add(reason)
                self.say("error", reason)

    def _bury(self, child: Child) -> int:
        """Forget a child whose control socket has closed, and return its exit code."""
        self.selector.unregister(child.control)
        self.others.discard(child)
        if self.children.get(child.number) is child:
            del self.children[child.number]
        if child.share is not None:
            child.share.hear(self.acceptor.give)  # the last connections that it gave away
            self.selector.unregister(child.share.channel)
            self.acceptor.remove(child.share)
        self._note_death(child)
        return child.close()

    def _note_death(self, child: Child) -> None:
        """Note the models in whose runs or loads a worker died, and ban a model that has killed workers."""
        if child.runs is None:
            return
        deaths, signum, hung_s = self.launcher.deaths, -child.process.wait(), 0.0
        if child.killed_for:  # of a worker that was not ready in time, the load that took most of that time is meant
            hung_s = self.settings.hang_deadline_s if child.said else self.settings.start_timeout_s / 2
        if child.killed_for or signum in DEADLY:
            banned = deaths.note(child.runs.died_in(hung_s))
        else:
            banned = signum == signal.SIGKILL and not child.said and deaths.note_killed(child.runs.died_in().loads)
        if banned:
            child.excuse()
            self._tell_banned()

    def _tell_banned(self) -> None:
        """Tell every worker which models it must not run."""
        self.launcher.inherited.show("banned_models", len(self.launcher.deaths.banned))
        for child in [*self.children.values(), *self.others]:
            if child.runs is not None:
                child.runs.ban(self.launcher.deaths.banned)

    def _plan_restart(self, child: Child, code: int, *, silent: bool = False) -> None:
        wait_s = self.restarts.plan(child.number, time.monotonic() - child.started_s)
        if not silent:
            self.launcher.inherited.count({WRITER: "writer_restarts", BULK: "bulk_restarts"}.get(child.number, WORKER))
            reason = child.killed_for or (child.said or {}).get("error") or how_it_ended(code)
            self.say("warning", f"{child} died: {reason}; starting it again in {wait_s:g} s")

    # -- workers that hang -------------------------------------------------------------------------------------

    def _kill_hung(self) -> None:
        """Kill workers whose event loop hangs, and workers that are not ready in time. They are then restarted."""
        now_s = time.monotonic()
        if now_s - self.looked_s > STOOD_STILL_S:
            self._forgive(now_s)
        self.looked_s = now_s
        for worker in self._watched():
            if not worker.killed_for and (reason := worker.hangs(now_s, self.settings)):
                worker.killed_for = f"{reason}, and was killed"
                self.launcher.inherited.count("hung_workers")
                worker.process.kill()
            elif worker.said and worker.runs is not None:
                self._give_up_loads(worker, worker.runs.loading(self.settings.start_timeout_s))

    def _give_up_loads(self, worker: Child, loads: set[int]) -> None:
        """Ban models that a worker which serves has been loading for too long: it loads the next ones then."""
        if loads and self.launcher.deaths.note(DiedIn(set(), loads)):
            self.say(
                "warning", f"{worker} did not load a model in {self.settings.start_timeout_s:g} s, and gives it up"
            )
            self._tell_banned()

    def _watched(self) -> list[Child]:
        """The workers, and the successors of workers."""
        return [*self.workers(), *(child for child in self.others if child.is_successor)]

    def _forgive(self, now_s: float) -> None:
        """Restart the time-outs of all workers: the whole machine or container may have been paused."""
        for worker in self._watched():
            if worker.share is not None:
                worker.share.heard_s = now_s
            if not worker.said:
                worker.started_s = now_s

    # -- for rolling.py ----------------------------------------------------------------------------------------

    def start_successor(self, number: int) -> Child:
        """Start a worker that will take the place of the worker of that number. Raises OSError."""
        child = self.launcher.start(number)
        child.await_turn()
        self._take_in(child)
        self.others.add(child)
        return child

    def succeed(self, successor: Child) -> Child | None:
        """Let a ready successor serve. Returns the worker that has to retire, or None if it has died."""
        old = self.children.get(successor.number)
        successor.take_turn()
        self.others.discard(successor)
        self.children[successor.number] = successor
        self.restarts.forget(successor.number)
        if successor.share is not None:
            self.acceptor.add(successor.share)
        if old is not None:
            old.retire()
            self.others.add(old)
            if old.share is not None:
                self.acceptor.remove(old.share)
        return old

    # -- stopping ----------------------------------------------------------------------------------------------

    def _stop(self) -> int:
        """Stop all children and return 0 if all ended in time. A second signal kills them at once."""
        self.systemd.say("STOPPING=1")
        self._note("stopping")
        self.acceptor.accept_no_more()
        self.launcher.listeners.close()
        self.launcher.inherited.close()
        deadline_s = time.monotonic() + LIMITS.stop_grace_s
        # Workers that retire stop first, because they give their connections to the others; successors have nothing in
        # flight. The writer and the bulk worker stop last, so that everything that workers have forwarded is answered.
        self.bulk.unwatch()
        serving = [child for child in self.workers() if child.number != BULK]
        clean = self._end(self.others, deadline_s) and self._end(serving, deadline_s)
        clean = clean and self._end(self.children.values(), time.monotonic() + LIMITS.stop_grace_s)
        self._note("stopped" if clean else "stopped, with work cut off")
        return 0 if clean else 1

    def _end(self, children: Iterable[Child], deadline_s: float) -> bool:
        """Send SIGTERM to children that do not retire already. True if all of them ended well and in time.

        A child that is loading has no handler for SIGTERM and ends at once, which is well: it has nothing in flight.
        """
        waiting, clean = set(children), True
        for child in waiting:
            if not child.retires:
                child.process.send_signal(signal.SIGTERM)
        while waiting:
            events = self.selector.select(max(0.0, deadline_s - time.monotonic()))
            if not events:
                return False
            for key, _ in events:
                if key.data is None:
                    if self.signals.take() & STOP:
                        return False
                    continue
                child = key.data
                if child.control.fileno() < 0:
                    continue  # buried in this round
                if key.fileobj is not child.control:
                    child.share.hear(self.acceptor.give)
                elif not child.hear():
                    waiting.discard(child)
                    clean &= self._bury(child) in (0, -signal.SIGTERM) or child.said is None
            self.systemd.beat()
        return clean

    def _kill(self) -> None:
        for child in [*self.children.values(), *self.others]:
            child.process.kill()
            child.close()
        self.acceptor.close()
