"""Start `shorttail serve` for the benchmarks, as a user would."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import loadgen
from loadgen import BenchError

START_TIMEOUT_S = 60


@contextlib.contextmanager
def start_server(
    store: Path, log: Path, *options: str, cpu: int | None = None, workers: int = 1
) -> Iterator[tuple[str, int]]:
    """Start a server on a free port. Yields its address and its process id. Raises BenchError."""
    command = [sys.executable, "-m", "shorttail", "serve", "--store", str(store), "--port", "0"]
    with log.open("wb") as output, loadgen.pinned(cpu):
        server = subprocess.Popen(
            [*command, "--workers", str(workers), *options], stdout=output, stderr=subprocess.STDOUT
        )
    with server:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not (ready := re.search(r"serving on (\S+:\d+)", log.read_text())):
                if server.poll() is not None or time.monotonic() > deadline:
                    last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
                    raise BenchError(f"the server did not start: {last}")
                time.sleep(0.01)
            yield ready[1], server.pid
        finally:
            server.terminate()


def http_address(log: Path) -> str:
    """Return the HTTP address from a server's log. Raises BenchError if it serves no HTTP."""
    found = re.search(r"http on (\S+:\d+)", log.read_text())
    if found is None:
        raise BenchError("the server serves no HTTP; pip install 'shorttail[http]'")
    return found[1]


def worker_of(server: int) -> int:
    """Return the process id of the only worker of a supervisor, beside its bulk worker."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children}
    (worker,) = (
        pid for pid, words in commands.items() if b"shorttail.server.worker" in words and b"--bulk" not in words
    )
    return worker
