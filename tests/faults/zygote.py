"""A process that has imported all modules and forks a child for each job, so that a job starts in milliseconds.

Run as a program, it reads commands and writes the reports of itself and its children, as lines of JSON. It may fork,
because it has no threads and no open store. It runs with shim.c preloaded, which a child controls through `Shim`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 120
OFF, KILL, TEAR, AFTER, FULL, FULL_ONCE, SHORT, FAILING, LOST = range(9)  # as in shim.c


class Shim:
    """Controls shim.c in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name in ("fault_calls", "fault_unsynced", "fault_disorder"):
            getattr(self._library, name).restype = ctypes.c_long

    def arm(self, path: str | os.PathLike[str], mode: int, nth: int) -> None:
        self._library.fault_arm(os.path.realpath(path).encode(), mode, ctypes.c_long(nth))

    def watch(self, path: str | os.PathLike[str]) -> None:
        """Only count writes."""
        self.arm(path, KILL, sys.maxsize)

    def disarm(self) -> None:
        self._library.fault_disarm()

    def reached(self, nth: int, message: str | None) -> bool:
        """Whether there were nth writes."""
        return self.calls >= nth

    @property
    def calls(self) -> int:
        return int(self._library.fault_calls())

    @property
    def unsynced(self) -> int:
        return int(self._library.fault_unsynced())

    @property
    def disorder(self) -> int:
        return int(self._library.fault_disorder())


def build_shim(folder: Path) -> Path:
    """Compile shim.c with the compiler of the package."""
    library = folder / "shim.so"
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    command = [*compiler.split(), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(HERE / "shim.c"), "-ldl"], check=True, timeout=TIMEOUT_S)
    return library


# -- the test's side -----------------------------------------------------------------------------------------------


class Child:
    """A job that runs. Its messages are dicts; the last, from the zygote, is {"exit": code} or {"killed": signal}."""

    def __init__(self, zygote: Zygote, number: int) -> None:
        self.messages: deque[dict[str, Any]] = deque()
        self.ended = False
        self._zygote = zygote
        self._number = number

    def read(self) -> dict[str, Any]:
        """Return the next message. Fails the test on an error in the child, or if no message comes."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.messages:
            assert not self.ended, "the child has ended"
            self._zygote.receive(deadline)
        message = self.messages.popleft()
        assert "error" not in message, message["error"]
        return message

    def wait_for_first(self) -> None:
        """Wait for the first message, and leave it for read() and wait()."""
        self.messages.appendleft(self.read())

    def wait(self) -> list[dict[str, Any]]:
        """Wait for the end of the job and return the messages that are left."""
        messages = [self.read()]
        while not {"exit", "killed"} & messages[-1].keys():
            messages.append(self.read())
        return messages

    def result(self) -> dict[str, Any]:
        """Return the only message of a child that ends by itself."""
        message, end = self.wait()
        assert end == {"exit": 0}, end
        return message

    def kill(self) -> None:
        self._zygote.send({"kill": self._number})


class Zygote:
    """The test's side of the zygote process; a context manager."""

    def __init__(self, shim: Path, prefix: Sequence[str] = ()) -> None:
        """prefix: the command that starts the process in another namespace."""
        preload = f"{os.environ['LD_PRELOAD']}:{shim}" if os.environ.get("LD_PRELOAD") else str(shim)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"LD_PRELOAD": preload, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        self._children: dict[int, Child] = {}
        self._buffer = b""

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()  # its children end with it: see _child
        self._process.communicate()

    def start(self, job: str, **arguments: Any) -> Child:
        """Run a function of workload.py in a new process."""
        number = len(self._children)
        child = self._children[number] = Child(self, number)
        self.send({"number": number, "job": job, "arguments": arguments})
        return child

    def send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, deadline: float) -> None:
        """Wait for messages and give them to their children."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        assert select.select([fd], [], [], max(0, deadline - time.monotonic()))[0], "a child hangs"
        data = os.read(fd, 1 << 20)
        assert data, "the zygote died"
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            child = self._children[message.pop("number")]
            child.messages.append(message)
            child.ended = bool({"exit", "killed"} & message.keys())


# -- the zygote's side ---------------------------------------------------------------------------------------------


def main() -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import workload

    workload.set_limits()
    jobs: dict[str, Callable[..., None]] = workload.JOBS
    gc.collect()
    gc.freeze()
    running: dict[int, int] = {}  # pid -> number
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            reap(running)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                command = json.loads(line)
                if "kill" in command:  # killed here, because a pid is not reused before its parent reaps it
                    for pid in [pid for pid, number in running.items() if number == command["kill"]]:
                        os.kill(pid, signal.SIGKILL)
                    continue
                pid = os.fork()
                if pid == 0:
                    child(jobs[command["job"]], command["number"], command["arguments"])
                running[pid] = command["number"]


def reap(running: dict[int, int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        code = os.waitstatus_to_exitcode(status)
        report(running.pop(pid), {"exit": code} if code >= 0 else {"killed": -code})


def report(number: int, message: dict[str, Any]) -> None:
    line = json.dumps({"number": number} | message).encode() + b"\n"
    assert len(line) <= select.PIPE_BUF, "only then lines do not mix"
    os.write(1, line)


def child(job: Callable[..., None], number: int, arguments: dict[str, Any]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the zygote
        job(lambda **message: report(number, message), **arguments)
        code = 0
    except BaseException:
        report(number, {"error": traceback.format_exc()[-3000:]})
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
