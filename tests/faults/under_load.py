"""Clients that send request after request, each with its own numbers, so that a wrong answer is detected."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from serving import SERVE, Server

import shorttail as st

TIMEOUT_S = 30.0  # of each call; the start of a worker on a busy machine takes seconds
KNOWN = {1: 11.0, 2: 22.0}  # user_id -> what test_server's model adds to the amount


def question(number: int) -> tuple[dict[str, Any], np.ndarray]:
    """Make columns of one to five rows, and the right answer."""
    users = np.array([(number + k) % 2 + 1 for k in range(number % 5 + 1)])
    amounts = np.float64(number % 5000) + np.arange(len(users))
    return {"user_id": users, "amount": amounts}, np.array([KNOWN[int(user)] for user in users]) + amounts


class Caller(threading.Thread):
    """Base of the clients. answered: number of right answers; wrong: wrong answers; errors: of calls that failed."""

    def __init__(self, address: str, *, retries: int, until_lost: bool = False):
        super().__init__()
        self.address = address
        self.retries = retries
        self.until_lost = until_lost  # stop at the first Unavailable
        self.ends = threading.Event()
        self.numbers = itertools.count()
        self.answered = 0
        self.wrong: list[Any] = []
        self.errors: list[st.ShorttailError] = []

    def check(self, prediction: st.Prediction, expected: np.ndarray) -> None:
        if np.array_equal(prediction.outputs["total"], expected):
            self.answered += 1
        else:
            self.wrong.append((prediction, expected))

    def failed(self, error: st.ShorttailError) -> None:
        self.errors.append(error)
        if self.until_lost:
            self.ends.set()


class Blocking(Caller):
    """Three threads share a Client."""

    def run(self) -> None:
        with st.Client(self.address, timeout_s=TIMEOUT_S, retries=self.retries) as client:
            threads = [threading.Thread(target=self.ask, args=(client,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def ask(self, client: st.Client) -> None:
        while not self.ends.is_set():
            columns, expected = question(next(self.numbers))
            try:
                self.check(client.predict("total", columns), expected)
            except st.ShorttailError as error:
                self.failed(error)


class Pipelined(Caller):
    """Thirty calls in flight on the two connections of an AsyncClient."""

    def run(self) -> None:
        asyncio.run(self.ask_all())

    async def ask_all(self) -> None:
        client = await st.AsyncClient.connect(self.address, timeout_s=TIMEOUT_S, connections=2, retries=self.retries)
        async with client:
            await asyncio.gather(*(self.ask(client) for _ in range(30)))

    async def ask(self, client: st.AsyncClient) -> None:
        while not self.ends.is_set():
            columns, expected = question(next(self.numbers))
            try:
                self.check(await client.predict("total", columns), expected)
            except st.ShorttailError as error:
                self.failed(error)


class Pushing(Caller):
    """Pushes a row per call. A row in `errors` may or may not be written; all answered rows are."""

    def run(self) -> None:
        self.stored: list[int] = []
        with st.Client(self.address, timeout_s=TIMEOUT_S, retries=self.retries) as client:
            while not self.ends.is_set():
                number = next(self.numbers)
                row = {"user_id": 1000 + number, "age": float(number), "visits": number, "tier": "t", "taste": [[0, 0]]}
                try:
                    assert client.push("stats", row) == 1
                    self.stored.append(number)
                    self.answered += 1
                except st.ShorttailError as error:
                    self.failed(error)


@contextlib.contextmanager
def calling(*callers: Caller) -> Iterator[None]:
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        for caller in callers:
            caller.ends.set()
        for caller in callers:
            caller.join()


def until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def open_files(process: int) -> set[str]:
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for file in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(str(file.readlink()))
    return found


def serves(worker: int) -> bool:
    """Whether a worker serves: its event loop is made last."""
    return "anon_inode:[eventpoll]" in open_files(worker)


def connections_of(worker: int) -> set[int]:
    """Return the ports of the clients that are connected to a worker."""
    files = open_files(worker)
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(line[2].partition(":")[2], 16) for line in lines if f"socket:[{line[9]}]" in files}


def own_port(client: st.AsyncClient) -> int:
    stream = client._lines[0].stream
    assert stream is not None
    assert stream._transport is not None
    return int(stream._transport.get_extra_info("sockname")[1])


def go_on(callers: Sequence[Caller], calls: int = 20) -> None:
    """Wait until each caller has received this many more answers."""
    before = [caller.answered for caller in callers]
    until(
        lambda: all(caller.answered >= n + calls for caller, n in zip(callers, before, strict=True)),
        f"all are answered; errors: {[caller.errors[-3:] for caller in callers]}",
    )


class OnSocket(Server):
    """A server on a socket that outlives the server, as with systemd."""

    def __init__(self, store: Path, fd: int, *options: str, log: Path):
        self.log = log
        script = 'eval "exec 3<&$0"; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                ["bash", "-c", script, str(fd), *SERVE, "--store", str(store), "--http-port", "0", *options],
                stdout=subprocess.PIPE, stderr=errors, text=True, pass_fds=[fd],
            )  # fmt: skip
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        self.line = self.process.stdout.readline() if ready else ""
        if not self.line.startswith("serving on "):
            self.kill()
            raise AssertionError(f"no announcement: {self.line!r}; stderr: {log.read_text()}")
