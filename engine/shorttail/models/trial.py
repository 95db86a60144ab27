"""Tries model files in a process of its own: native code that a file crashes or hangs can be stopped there alone.

The process is a new interpreter, because ONNX Runtime and LMDB do not work after a fork. It takes about a second to
start, so it is kept for IDLE_S seconds after a call, for the next one. It ends when its parent ends, however that
happens, and before its parent forks.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from typing import Any, Final, TypeVar

from shorttail.config import LIMITS
from shorttail.define.durations import parse_duration
from shorttail.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, ShorttailError

T = TypeVar("T")
IDLE_S: Final = 10.0
# The packages of this process, wherever it has them from: a notebook or a test may have changed its path.
START: Final = "import sys; sys.path[:] = sys.argv[3:]; from shorttail.models.trial import main; main()"
PACKAGE: Final = "shorttail"

NICE: Final = 10  # a trial at low priority yields a CPU that an answering thread wants

_nice: ContextVar[int] = ContextVar("nice", default=0)
_lock = threading.Lock()
_idle: TrialProcess | None = None
_processes: weakref.WeakSet[TrialProcess] = weakref.WeakSet()


def try_file(function: Callable[..., T], *args: Any, model: str, limit_s: float) -> T:
    """Return `function(*args)`, which runs in another process. Both and the result are pickled.

    What the function logs is logged here. model: its name, for errors. Raises what the function raises;
    DeadlineExceeded after limit_s seconds; InvalidArgument, ResourceExhausted or Internal if the process dies. The
    process is killed if this thread is interrupted.
    """
    job = pickle.dumps((function, args, logging.getLogger(PACKAGE).getEffectiveLevel()))
    process = _take()
    try:
        done, result = process.run(job, f"model '{model}'", time.monotonic() + limit_s, limit_s)
    except BaseException:
        process.close()
        raise
    _keep(process)
    if not done:
        raise result
    value: T = result
    return value


@contextmanager
def low_priority() -> Iterator[None]:
    """Try files at a low scheduling priority within the block."""
    token = _nice.set(NICE)
    try:
        yield
    finally:
        _nice.reset(token)


def trial_limit_s(given: str | timedelta | None) -> float:
    """Return the seconds of a `vet_timeout`, LIMITS.vet_s for None. Raises InvalidArgument."""
    return LIMITS.vet_s if given is None else parse_duration(given, "vet_timeout", "'90s' or '10m'") / 1e6


class TrialProcess:
    """The process, as its parent sees it. It reads jobs from a socket, and ends when the pipe `lifeline` closes."""

    def __init__(self) -> None:
        self.timer: threading.Timer | None = None  # runs while the process is idle, and ends it
        self.connection, theirs = Pipe()
        end, self.lifeline = os.pipe()
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno()), str(end), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the output of a command is an interface
                pass_fds=[theirs.fileno(), end],
                process_group=0,  # Ctrl-C in a terminal then reaches the parent alone
            )
        except BaseException as error:  # Ctrl-C too: the process may have started, and ends with its lifeline
            self.let_go()
            if isinstance(error, OSError):
                raise ResourceExhausted(f"no process can be started to try a model: {error.strerror}") from None
            raise
        finally:
            theirs.close()
            os.close(end)
        _processes.add(self)
        self.nice = _nice.get()
        if self.nice:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.popen.pid, self.nice)

    def run(self, job: bytes, where: str, until_s: float, limit_s: float) -> tuple[bool, Any]:
        """Run a job until a time of time.monotonic(). Returns (True, result) or (False, the exception it raised)."""
        try:
            self.connection.send_bytes(job)
            while self.connection.poll(max(0.0, until_s - time.monotonic())):
                kind, value = pickle.loads(self.connection.recv_bytes())
                if kind != "log":
                    return kind == "done", value
                logging.getLogger(value.name).handle(value)
        except (EOFError, OSError):
            raise died(self.popen.wait(), where) from None
        raise DeadlineExceeded(
            f"{where}: trying its file took longer than {limit_s:g} s, and was ended; if it is only slow, give it more"
            " time with --vet-timeout (vet_timeout=)"
        )

    def close(self) -> None:
        """Kill the process and wait for its end."""
        if self.timer is not None:
            self.timer.cancel()
        self.popen.kill()
        self.popen.wait()
        self.let_go()

    def let_go(self) -> None:
        """Close the file descriptors of the process, which ends when its last copies are closed.

        A forked child calls this to close its own copies.
        """
        if self.lifeline >= 0:
            self.connection.close()
            os.close(self.lifeline)
            self.lifeline = -1


def died(code: int, where: str) -> ShorttailError:
    """Return the error for a process that ended during a trial, with this exit code."""
    if code == -signal.SIGKILL:
        return ResourceExhausted(
            f"{where}: the process that tried its file was killed (SIGKILL); it may need more memory than there is"
        )
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return InvalidArgument(f"{where}: its file killed the process that tried it ({name})")
    return Internal(f"{where}: the process that tried its file ended with exit code {code}")


def _take() -> TrialProcess:
    """Return the idle process, or a new one."""
    global _idle
    with _lock:
        process, _idle = _idle, None
    if process is not None:
        if process.timer is not None:
            process.timer.cancel()
        if process.popen.poll() is None and process.nice == _nice.get():
            return process
        process.close()
    return TrialProcess()


def _keep(process: TrialProcess) -> None:
    """Keep a process for the next call, or end it if another one is kept."""
    global _idle
    with _lock:
        if _idle is None:
            process.timer = threading.Timer(IDLE_S, end_idle, [process])
            process.timer.daemon = True
            try:
                process.timer.start()
                _idle = process
                return
            except RuntimeError:  # the interpreter is ending
                process.timer = None
    process.close()


def end_idle(process: TrialProcess | None = None) -> None:
    """End the process that is kept, if there is one, and if it is `process` where that is given."""
    global _idle
    with _lock:
        if _idle is None or process not in (None, _idle):
            return
        ended, _idle = _idle, None
    ended.close()
    if ended.timer is not None and ended.timer is not threading.current_thread():
        ended.timer.join()  # no thread is left for a fork


def _forget_all() -> None:
    """In a forked child: leave the processes to the parent."""
    global _lock, _idle
    _lock, _idle = threading.Lock(), None
    for process in list(_processes):
        process.let_go()
        process.popen.returncode = 0  # or its destructor would complain that the process runs
    _processes.clear()


atexit.register(end_idle)
os.register_at_fork(before=end_idle, after_in_child=_forget_all)


# -- in the process --------------------------------------------------------------------------------------------------


class Forward(logging.Handler):
    """Sends log records to the parent."""

    def __init__(self, connection: Connection):
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.connection.send_bytes(pickle.dumps(("log", record)))


def pickled(error: Exception) -> bytes:
    """Return the message for an exception. What is no error of this package gets its traceback as a note."""
    if not isinstance(error, ShorttailError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        message = pickle.dumps(("raised", error))
        pickle.loads(message)
    except Exception:
        return pickle.dumps(("raised", Internal(f"{type(error).__name__}: {' '.join(str(error).split())}")))
    return message


def end_with_parent(lifeline: int) -> None:
    """Have the system end this process when the other end of a pipe closes, also while native code holds the GIL."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    closed = select.poll()
    closed.register(lifeline, 0)  # a hang-up is always reported
    if closed.poll(0):  # the parent ended before this, and the system told nobody
        raise SystemExit


def main() -> None:
    """Run jobs until the parent ends."""
    connection, lifeline = Connection(int(sys.argv[1])), int(sys.argv[2])
    end_with_parent(lifeline)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    )  # a crash is told in words
    logger = logging.getLogger(PACKAGE)
    logger.addHandler(Forward(connection))
    logger.propagate = False
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            function, args, level = pickle.loads(job)
            logger.setLevel(level)
            message = pickle.dumps(("done", function(*args)))
        except Exception as error:
            message = pickled(error)
        connection.send_bytes(message)
