"""The writer: the one process of a server that changes the store. The supervisor starts it, and workers connect to it.

It commits in groups: the requests that arrived while the last commit ran are the next commit. So a push waits for
little more than one commit, however many pushes arrive, and is acknowledged when it is durable. Workers send
`[0, id, method, params, deadline_ns]` (writer_link.py), and every request gets one answer.

It also starts the commands that clients run on the store (commands.py), in processes of their own.

The writer stops on SIGTERM, or when the control socket closes, after it has committed and answered every request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgpack
import uvloop

from shorttail import protocol
from shorttail.config import LIMITS
from shorttail.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ShorttailError,
    Unavailable,
)
from shorttail.observe import logs, stderr
from shorttail.observe.memory import MetricsMemory
from shorttail.results import RowCount
from shorttail.server import spare_memory
from shorttail.server.commands import Commands
from shorttail.server.errorlog import ErrorLog, one_line
from shorttail.server.settings import ServerSettings
from shorttail.server.signals import only_sigterm
from shorttail.server.spare_memory import SpareMemory
from shorttail.server.writer_counts import Outcome, WriterCounts
from shorttail.server.writer_link import NIL, READY, REQUEST_BYTES, failed
from shorttail.sources.rows import column_batch, key_arrays
from shorttail.store import Delete, Edit, Store, Upsert
from shorttail.store.table import count_keys

# A message is kept in memory until it is whole; it is read in pieces of at most READ_BYTES.
READ_BYTES: Final = 1 << 20
NICE: Final = 5  # lookups go first: a push of megabytes keeps a CPU busy for many milliseconds
SPARE_BYTES: Final = 1 << 20  # after requests of so many bytes, free memory is given back
# How long the writer waits, when it stops, until workers have read their last answers.
LAST_WRITES_S: Final = 2.0
BACKLOG: Final = 1024


@dataclass(slots=True, eq=False)
class Request:
    """One push or delete that waits for its commit."""

    worker: WorkerConnection
    number: int
    edit: Edit
    rows: int
    bytes: int
    deadline_ns: int

    def answer(self, outcome: Outcome) -> None:
        self.worker.answer(self.number, outcome)


class Writer:
    """The queue of requests, and their commits.

    fault: called with every exception that is not a ShorttailError. memory: where the writer counts, for /metrics.
    commands: takes the requests of the method `command`.
    """

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        fault: ErrorLog,
        memory: MetricsMemory | None = None,
        commands: Commands | None = None,
    ):
        self.store = store
        self.loop = loop
        self.fault = fault
        self.counts = WriterCounts(memory or MetricsMemory.create(1))
        self.commands = commands
        self.queue: deque[Request] = deque()
        self.queued_rows = 0
        self.queued_bytes = self.taken_bytes = 0
        self.stopping = False
        self.workers: set[WorkerConnection] = set()
        self._more = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "commit")  # the event loop reads requests while a commit runs

    # -- requests in -----------------------------------------------------------------------------------------------

    def take(self, worker: WorkerConnection, message: Any) -> None:
        """Queue a request, or answer it with the error that keeps it out."""
        _, number, method, params, deadline_ns = message
        size = len(params) + REQUEST_BYTES
        self.taken_bytes += size
        try:
            if self.stopping:
                raise Unavailable("the writer is stopping; send it again")
            if method == "command" and self.commands is not None:
                self.commands.take(params, functools.partial(worker.answer, number))
                return
            if self.queued_bytes + size > LIMITS.queued_bytes:
                raise ResourceExhausted(f"{self.queued_bytes} bytes wait to be written; send it again later")
            edit = self._read(method, params)
            rows = len(edit.batch) if isinstance(edit, Upsert) else count_keys(edit.keys)
            if rows > LIMITS.rows_per_request:
                raise InvalidArgument(
                    f"{rows} rows in one request; at most {LIMITS.rows_per_request} are taken: send it in parts"
                )
            if self.queued_rows + rows > LIMITS.queued_rows:
                raise ResourceExhausted(f"{self.queued_rows} rows wait to be written; send it again later")
        except ShorttailError as error:
            self.counts.refused()
            worker.answer(number, error)
            return
        except Exception as error:
            self.counts.refused()
            self.fault(error)
            worker.answer(number, Internal(f"{method}: {one_line(error)}"))
            return
        self.queue.append(Request(worker, number, edit, rows, size, deadline_ns))
        self.queued_rows += rows
        self.queued_bytes += size
        self._more.set()

    def _read(self, method: str, params: bytes) -> Edit:
        request = read_params(params)
        try:
            self.store.refresh()
            return make_edit(self.store, method, *request)
        except (InvalidArgument, NotFound):
            if not self.store.refresh(force=True):
                raise
            return make_edit(self.store, method, *request)  # the definitions have just changed

    # -- commits ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit requests until `stop` was called and the queue is empty."""
        while not (self.stopping and not self.queue):
            self._more.clear()
            group = self.next_group()
            if group:
                edits = [request.edit for request in group]
                outcomes = await self.commit(edits)
                self.counts.committed(edits, outcomes)
                for request, outcome in zip(group, outcomes, strict=True):
                    request.answer(outcome)
            elif not self.stopping:
                await self._more.wait()
        self._thread.shutdown()

    def stop(self) -> None:
        self.stopping = True
        self._more.set()

    def next_group(self) -> list[Request]:
        """Take the requests of the next commit from the queue. Requests past their deadline are answered instead."""
        now_ns = time.monotonic_ns()
        group: list[Request] = []
        rows = size = 0
        while self.queue:
            request = self.queue[0]
            rows, size = rows + request.rows, size + request.bytes
            if group and (rows > LIMITS.commit_rows or size > LIMITS.commit_bytes):
                break
            self.queue.popleft()
            self.queued_rows -= request.rows
            self.queued_bytes -= request.bytes
            if request.deadline_ns and request.deadline_ns <= now_ns:
                request.answer(DeadlineExceeded("the deadline passed while the request waited; nothing was written"))
                rows, size = rows - request.rows, size - request.bytes
            else:
                group.append(request)
        return group

    async def commit(self, edits: Sequence[Edit]) -> Sequence[Outcome]:
        """Commit all edits together; if that fails and one edit may be the cause, commit each edit by itself."""
        start_ns = time.perf_counter_ns()
        try:
            outcomes = await self.loop.run_in_executor(self._thread, self.store.commit, edits)
            self.counts.took(time.perf_counter_ns() - start_ns)
            return outcomes
        except (ResourceExhausted, Unavailable) as error:
            return [error] * len(edits)
        except Exception as error:
            if len(edits) > 1:
                return [outcome for edit in edits for outcome in await self.commit([edit])]
            if isinstance(error, ShorttailError):
                return [error]
            self.fault(error)
            return [Internal(f"view '{edits[0].view}': {one_line(error)}")]


def read_params(params: bytes) -> tuple[str, dict[Any, Any], dict[Any, Any]]:
    """Return the view's name, the columns and the options. The worker has checked all but the columns."""
    try:
        name, columns, *options = msgpack.unpackb(
            params,
            ext_hook=protocol.unpack_ext,
            object_pairs_hook=_without_repetition,
            strict_map_key=False,
            max_array_len=LIMITS.declared_elements,
            max_map_len=LIMITS.declared_elements,
        )
    except UnicodeDecodeError:
        raise InvalidArgument("a string is not valid UTF-8") from None
    except protocol.UNPACK_ERRORS as error:  # whole, but of no use: a map as a key, a timestamp of 5 bytes
        raise InvalidArgument(f"a map key or ext value that cannot be read: {error}") from None
    return name, columns, (options[0] if options else None) or {}


def _without_repetition(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidArgument(f"column {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def make_edit(store: Store, method: str, name: str, columns: dict[Any, Any], options: dict[Any, Any]) -> Edit:
    view = store.catalog.view(name)
    if method == "push":
        partial = bool(options.get("partial"))
        return Upsert(name, column_batch(view, columns, store.catalog.max_clock_skew_us, partial=partial))
    return Delete(name, key_arrays(view, columns))


def rows_answer(rows: int) -> dict[str, int]:
    """Return the result of a push (whose rows are a RowCount) or a delete, as docs/protocol.md describes it."""
    if not isinstance(rows, RowCount):
        return {"rows": rows}
    return {"rows": int(rows), "older": rows.older} | ({"duplicate": rows.duplicate} if rows.duplicate else {})


class WorkerConnection(asyncio.Protocol):
    """The writer's end of the connection of one worker."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self.transport: asyncio.Transport | None = None
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=LIMITS.frame_bytes + 2 * READ_BYTES, max_bin_len=LIMITS.frame_bytes
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's classes
        self.writer.workers.add(self)
        self.transport.write(msgpack.packb(READY))

    def data_received(self, data: bytes) -> None:
        try:
            for start in range(0, len(data), READ_BYTES):
                self._unpacker.feed(data[start : start + READ_BYTES])
                for message in self._unpacker:
                    self.writer.take(self, message)
        except Exception as error:
            # The start of the next message is not known any more. The worker connects again.
            self.writer.fault(error)
            assert self.transport is not None
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.writer.workers.discard(self)

    def answer(self, number: int, outcome: Outcome | dict[str, Any]) -> None:
        """Answer a request: with the outcome of a push or delete, or with the result of a step of a command."""
        if self.transport is None:
            return  # the worker has died
        if isinstance(outcome, ShorttailError):
            result = failed(outcome)
        else:
            result = NIL + msgpack.packb(outcome if isinstance(outcome, dict) else rows_answer(outcome))
        self.transport.write(b"\x94\x01" + msgpack.packb(number) + result)


async def serve(
    store: Store, listener: socket.socket, control: socket.socket, memory: MetricsMemory, settings: ServerSettings
) -> None:
    """Commit requests until SIGTERM or the end of the supervisor, then those that are left."""
    loop = asyncio.get_running_loop()
    log = settings.log
    faults = ErrorLog(log)
    commands = Commands(str(store.path), settings, loop, faults)
    writer = Writer(store, loop, faults, memory, commands)

    def supervisor_gone() -> None:  # nothing is ever sent on this socket: readable means closed
        loop.remove_reader(control)
        writer.stop()
        with contextlib.suppress(OSError):  # the supervisor would have removed the folder with all private sockets
            shutil.rmtree(Path(listener.getsockname()).parent)

    loop.add_signal_handler(signal.SIGTERM, writer.stop)
    loop.add_reader(control, supervisor_gone)
    server = await loop.create_unix_server(lambda: WorkerConnection(writer), sock=listener, backlog=BACKLOG)

    async def housekeeping() -> None:
        changed, memory = "", SpareMemory(SPARE_BYTES)
        while True:
            await asyncio.sleep(LIMITS.idle_refresh_ms / 1000)
            try:
                before, changed = changed, store.changed
                if changed != before:
                    text = changed or f"store '{store.path}' is at its place again, and takes writes"
                    loop.run_in_executor(None, logs.log_now, log, "error" if changed else "warning", text)
                if not changed:
                    store.refresh(force=True)  # an old snapshot would keep LMDB from using old pages again
            except Exception as error:
                faults(error)
            writer.counts.tick(writer.queued_rows, writer.queued_bytes, faults.total)
            memory.look(writer.taken_bytes - writer.queued_bytes)
            commands.look()
            faults.write(loop)

    chores = asyncio.create_task(housekeeping())
    gc.collect()
    gc.freeze()
    control.sendall(json.dumps({"ready": True}).encode() + b"\n")
    await writer.run()
    commands.close()
    chores.cancel()
    writer.counts.tick(writer.queued_rows, writer.queued_bytes, faults.total)
    server.close()
    await say_goodbye(writer)
    faults.write(loop)


async def say_goodbye(writer: Writer) -> None:
    """Close the connection of each worker when the worker has read its answers."""
    loop = asyncio.get_running_loop()
    cut_at = loop.time() + LAST_WRITES_S
    for worker in list(writer.workers):
        if worker.transport is not None:
            worker.transport.close()
    while writer.workers and loop.time() < cut_at:
        await asyncio.sleep(0.01)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shorttail.server.writer", description="started by the supervisor")
    parser.add_argument("store")
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--metrics-fd", type=int, required=True)
    parser.add_argument("--settings", metavar="JSON", required=True)
    only_sigterm()
    args = parser.parse_args()
    settings = ServerSettings.from_json(args.settings)
    spare_memory.return_memory()
    with contextlib.suppress(OSError):
        os.nice(NICE)
    stderr.log_as_json(settings.log)
    control = socket.socket(fileno=args.control_fd)
    try:
        store = Store.open(args.store)
    except Exception as error:
        reason = error.message if isinstance(error, ShorttailError) else one_line(error)
        control.sendall(json.dumps({"error": reason}).encode() + b"\n")  # the supervisor logs it if no worker does
        return 1
    with store, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        memory = MetricsMemory.attach(args.metrics_fd)
        runner.run(serve(store, socket.socket(fileno=args.listen_fd), control, memory, settings))
    control.detach()  # the supervisor takes a closed control socket for the end of this process: the system closes it
    return 0


if __name__ == "__main__":
    sys.exit(main())
