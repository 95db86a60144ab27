"""Compile bench/c/loadgen.c, bench/c/echo.c and bench/c/sink.c if needed, and run them.

from loadgen import run, start_echo, write_payload

write_payload(path, [client_columns.pack_request(0, "predict", [...]) for ... in ...])
figures = run("127.0.0.1:7711", path, connections=64, duration_s=2.0)
with start_echo(request_bytes=120, reply_bytes=60) as address:
    floor = run(address, path, connections=64, duration_s=2.0, raw_reply_bytes=60)
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent / "c"
BUILD = SOURCES.parents[1] / "build" / "bench"
PROGRAMS = ("echo", "loadgen", "sink")
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra")


class BenchError(RuntimeError):
    """A measurement could not be made; the message is one line."""


def build() -> Path:
    """Compile programs that are missing or older than their sources, and return their folder. Raises BenchError."""
    BUILD.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in SOURCES.iterdir())
    for program in PROGRAMS:
        binary = BUILD / program
        if binary.exists() and binary.stat().st_mtime >= newest:
            continue
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if shutil.which(compiler[0]) is None:
            raise BenchError(f"no C compiler: {compiler[0]!r} not found; install gcc or clang, or name one in CC")
        # Compile to another name and rename, so that a concurrent run never executes an incomplete program.
        fd, temporary = tempfile.mkstemp(dir=BUILD, prefix=program)
        os.close(fd)
        done = subprocess.run(
            [*compiler, *FLAGS, "-o", temporary, str(SOURCES / f"{program}.c")], capture_output=True, text=True
        )
        if done.returncode != 0:
            Path(temporary).unlink()
            raise BenchError(f"cannot compile {program}.c: {_error_line(done.stderr)}")
        Path(temporary).chmod(0o755)
        Path(temporary).replace(binary)
    return BUILD


def write_payload(path: str | os.PathLike[str], requests: Sequence[bytes]) -> None:
    """Write requests for `run`. Each is MessagePack-RPC with a 5-byte message id, as pack_request makes it."""
    with Path(path).open("wb") as file:
        for request in requests:
            file.write(struct.pack("<I", len(request)))
            file.write(request)


@contextlib.contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Start child processes on this CPU. A child inherits the affinity of the thread that starts it."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(
    address: str,
    payload: str | os.PathLike[str],
    connections: int,
    duration_s: float,
    pipeline: int = 1,
    warmup_s: float = 0.5,
    cpu: int | None = None,
    raw_reply_bytes: int | None = None,
    per_s: int | None = None,
    awake: bool = False,
) -> dict[str, Any]:
    """Run the compiled closed-loop client. Returns the JSON object described in bench/c/loadgen.c.

    raw_reply_bytes: for start_echo; a reply is that many bytes, and its content is ignored. per_s: makes the run an
    open loop of that many requests per second, with raw_reply_bytes only. awake: an open loop that spins between
    requests and does not sleep. Raises BenchError if a connection was refused or cut, or if an answer was not
    MessagePack-RPC.
    """
    command = [
        *(str(build() / "loadgen"), "--address", address, "--payload", os.fspath(payload)),
        *("--connections", str(connections), "--pipeline", str(pipeline)),
        *("--warmup-s", str(warmup_s), "--duration-s", str(duration_s)),
    ]
    if raw_reply_bytes is not None:
        command += ["--raw", "--reply-bytes", str(raw_reply_bytes)]
    if per_s is not None:
        command += ["--per-s", str(per_s), *(["--awake"] if awake else [])]
    with pinned(cpu):
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with client:
        try:
            output, errors = client.communicate(timeout=warmup_s + duration_s + 30)
        except subprocess.TimeoutExpired:
            client.kill()
            raise BenchError(f"the client did not end {duration_s + warmup_s + 30:.0f} s after it started") from None
    if client.returncode != 0:
        raise BenchError(_error_line(errors) or f"loadgen ended with status {client.returncode}")
    result: dict[str, Any] = json.loads(output)
    return result


@contextlib.contextmanager
def start_echo(
    request_bytes: int, reply_bytes: int, cpu: int | None = None, address: str = "127.0.0.1:0"
) -> Iterator[str]:
    """Start the bare echo server, which answers every `request_bytes` with `reply_bytes`. Yields its address."""
    command = [str(build() / "echo"), "--address", address]
    command += ["--request-bytes", str(request_bytes), "--reply-bytes", str(reply_bytes)]
    with pinned(cpu):
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with server:
        try:
            assert server.stdout is not None
            bound = server.stdout.readline().strip()
            if not bound:
                raise BenchError(_error_line(server.communicate()[1]) or "echo did not start")
            yield bound
        finally:
            server.kill()


def receiving_us(request_bytes: int, per_s: float, cpus: tuple[int | None, int | None]) -> float:
    """Return CPU microseconds per request of a process that only reads requests. cpus: the reader's, the sender's."""
    server, client = (-1 if cpu is None else cpu for cpu in cpus)
    command = [str(build() / "sink"), "--request-bytes", str(request_bytes), "--per-s", str(per_s)]
    done = subprocess.run(
        [*command, "--duration-s", "2", "--cpu", f"{server},{client}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchError(_error_line(done.stderr) or f"sink ended with status {done.returncode}")
    return float(done.stdout) / 1e3


def _error_line(text: str) -> str:
    lines = text.strip().splitlines()
    errors = [line for line in lines if "error" in line]
    return (errors or lines or [""])[0 if errors else -1]
