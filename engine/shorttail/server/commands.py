"""Commands that clients run on the server's store: `shorttail apply definitions.py --server ADDR` and others.

A client whose token is an admin token takes these steps, which docs/protocol.md describes: `begin`; `send`, for each
piece of the files that the command needs; `run`; `output`, until the command has ended; `end`. `alive` says that the
client is still there. Each step is a request of the method `command`, and it may come twice: a client sends it again if
the answer was lost.

The command is a process of its own (`shorttail.cli.served`), which this module starts in the writer process. It knows
nothing of what a command does. The files lie in a folder that only the server's user may enter. The folder goes when
the command ends, and the folder of a server that was killed when the next one starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import msgpack

from shorttail.config import COMMANDS_VERSION, LIMITS
from shorttail.errors import (
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ShorttailError,
    printable,
)
from shorttail.protocol import UNPACK_ERRORS
from shorttail.server.errorlog import ErrorLog, one_line
from shorttail.server.security import ADMIN, Tokens
from shorttail.server.settings import ServerSettings

T = TypeVar("T")
Step = dict[str, Any]
Answer = Callable[[Step | ShorttailError], object]

PREFIX: Final = "shorttail-command-"
READ_BYTES: Final = 64 << 10  # of output at once
POLL_S: Final = 0.5  # how long `output` waits for some
INTERRUPT_S: Final = 2.0  # from the interrupt of a command until it is killed
STDOUT, STDERR, FILE = 1, 2, 3  # the streams of a command; FILE is what it writes to --output
_ID: Final = re.compile(r"[0-9a-f]{32}")
_NAME: Final = re.compile(r"[a-z0-9]{1,16}")


class Commands:
    """The commands of one server, which are running or being prepared.

    store: its path. fault: called with every exception that is not a ShorttailError.
    """

    def __init__(self, store: str, settings: ServerSettings, loop: asyncio.AbstractEventLoop, fault: ErrorLog):
        self.store = store
        self.settings = settings
        self.loop = loop
        self.fault = fault
        self.commands: dict[str, ServedCommand] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        sweep()

    def take(self, params: bytes, answer: Answer) -> None:
        """Take a step, given as the encoded params of its request, and call `answer` with its result or its error."""
        self._start(self._answer(params, answer))

    async def _answer(self, params: bytes, answer: Answer) -> None:
        try:
            answer(await self._step(*read_step(params)))
        except ShorttailError as error:
            answer(error)
        except Exception as error:
            self.fault(error)
            answer(Internal(f"command: {one_line(error)}"))

    async def _step(self, step: str, given: Step) -> Step:
        number = value_of(given, "id", str)
        if step == "begin":
            return self._begin(number, given)
        command = self.commands.get(number)
        if command is None:
            if step == "end":
                return {}
            raise NotFound(
                "the server does not know this command any more: it was started again, or did not hear of you for"
                f" {LIMITS.command_silence_s:g} s; `shorttail history` shows what was done"
            )
        command.heard_s = self.loop.time()
        if step == "send":
            await command.receive(
                value_of(given, "file", str), value_of(given, "offset", int), value_of(given, "data", bytes)
            )
        elif step == "run":
            await command.run(value_of(given, "sums", dict))
        elif step == "output":
            return await command.output.take(value_of(given, "seen", int))
        elif step == "end":
            await self._end(number)
        elif step != "alive":
            raise InvalidArgument(f"command has no step {step!r}; its steps: begin, send, run, output, alive, end")
        return {}

    def _begin(self, number: str, given: Step) -> Step:
        if not self.settings.commands:
            raise PermissionDenied("this server runs no commands: it was started with --no-commands")
        if self.settings.token_file is None:
            raise PermissionDenied(
                "commands need an admin token, on the server's own machine too, and this server has no tokens: start it"
                " with `shorttail serve --token-file FILE`"
            )
        token = Tokens.read(self.settings.token_file).find(value_of(given, "token", str))
        if token.level < ADMIN:
            raise PermissionDenied("commands need an admin token: give --token-file")
        if given.get("version") != COMMANDS_VERSION:
            raise InvalidArgument("this server is of another version of shorttail; use a client of its version")
        if number in self.commands:
            return {}
        if _ID.fullmatch(number) is None:
            raise InvalidArgument(f"command: the id must be 32 hexadecimal digits, not {number!r:.80}")
        if len(self.commands) >= LIMITS.commands:
            running = ", ".join(f"{command.who} since {command.began}" for command in self.commands.values())
            raise ResourceExhausted(
                f"this server runs {len(self.commands)} commands already: {running}; try again later"
            )
        login = printable(value_of(given, "login", str))[:100]
        who = f"{login} ({token.label})" if token.label else login
        self.commands[number] = ServedCommand(self.loop, self.store, who)
        return {}

    def look(self) -> None:
        """End commands whose clients are gone. Call it several times a second."""
        silent_s = self.loop.time() - LIMITS.command_silence_s
        for number in [number for number, command in self.commands.items() if command.heard_s < silent_s]:
            self._start(self._end(number))

    async def _end(self, number: str) -> None:
        command = self.commands.pop(number, None)
        if command is None:
            return
        try:
            await command.interrupt()
        finally:  # also when the server stops meanwhile
            await self.loop.run_in_executor(None, command.close)

    def _start(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Kill all commands: the server stops."""
        while self.commands:
            self.commands.popitem()[1].close()


class ServedCommand:
    """A command of one client.

    who: the client, for the history. heard_s: when the client was heard last, by the loop's clock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, store: str, who: str):
        self.loop = loop
        self.store = store
        self.who = who
        self.began = datetime.now(UTC).strftime("%H:%M:%SZ")
        self.heard_s = loop.time()
        self.output = Output(loop)
        self._files: dict[str, ReceivedFile] = {}
        self._changing = asyncio.Lock()  # of the files: steps that come twice must not mix
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._has_ended = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        try:
            self._folder, self._held = make_folder()
        except OSError as error:
            raise ResourceExhausted(f"the server cannot make a folder for a command: {error.strerror}") from None

    async def receive(self, name: str, offset: int, data: bytes) -> None:
        """Add a piece to a file. Raises InvalidArgument, ResourceExhausted."""
        if _NAME.fullmatch(name) is None:
            raise InvalidArgument(f"command: {name!r:.80} is not the name of a file: letters a to z and digits")
        if len(data) > LIMITS.command_piece_bytes:
            raise InvalidArgument(
                f"command: a piece of {len(data)} bytes; at most {LIMITS.command_piece_bytes} are taken"
            )
        async with self._changing:
            if self._process is not None:
                return
            if name not in self._files and len(self._files) >= LIMITS.command_files:
                raise ResourceExhausted(f"command: more than {LIMITS.command_files} files")
            file = self._files.get(name) or ReceivedFile(self._folder / name)
            if offset != file.size:
                if offset + len(data) <= file.size:
                    return  # it came twice
                raise InvalidArgument(f"command: file {name} has {file.size} bytes, and a piece begins at {offset}")
            if sum(each.size for each in self._files.values()) + len(data) > LIMITS.command_bytes:
                raise ResourceExhausted(
                    f"the files of a command have more than {LIMITS.command_bytes >> 20} MiB; copy them to the server,"
                    " and run the command there"
                )
            try:
                await self.loop.run_in_executor(None, file.append, data)
            except OSError as error:
                raise ResourceExhausted(f"the server cannot keep the files of a command: {error.strerror}") from None
            self._files[name] = file

    async def run(self, sums: Step) -> None:
        """Start the process. sums: file -> its SHA-256 in hexadecimal. Raises InvalidArgument, ResourceExhausted."""
        async with self._changing:
            if self._process is not None:
                return
            for name in sorted(map(str, sums.keys() | self._files.keys())):
                file = self._files.get(name)
                if file is None or file.digest.hexdigest() != sums.get(name):
                    raise InvalidArgument(f"command: file {name} did not arrive as it was sent; run the command again")
            try:
                self._process = self._spawn()
            except OSError as error:
                raise ResourceExhausted(f"no process can be started for the command: {error.strerror}") from None
            self._watch = self.loop.create_task(self._wait(self._process))

    def _spawn(self) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            reads, writes = [], []
            for _ in (STDOUT, STDERR, FILE):
                read, write = os.pipe()
                ours.callback(os.close, read)
                theirs.callback(os.close, write)
                reads.append(read)
                writes.append(write)
            lifeline, held = os.pipe()
            theirs.callback(os.close, lifeline)
            ours.callback(os.close, held)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "shorttail.cli.served", f"--store={self.store}", f"--who={self.who}"),
                    *(f"--lifeline-fd={lifeline}", f"--output-fd={writes[2]}", str(self._folder)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=writes[0],
                stderr=writes[1],
                pass_fds=[lifeline, writes[2]],
                process_group=0,
            )
            ours.pop_all()
        self._lifeline = held
        for stream, fd in zip((STDOUT, STDERR, FILE), reads, strict=True):
            self.output.watch(stream, fd)
        return process

    async def _wait(self, process: subprocess.Popen[bytes]) -> None:
        # There are fewer commands at a time than the executor has threads, so that files are still written.
        code = await self.loop.run_in_executor(None, process.wait)
        self._has_ended.set()
        self.output.end(code)

    async def interrupt(self) -> None:
        """Interrupt the process as Ctrl-C does, if it runs, so that it can remove what it has begun."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_ended.wait(), INTERRUPT_S)

    def close(self) -> None:
        """Kill the process if it runs, and remove the folder."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            os.close(self._lifeline)  # ends what it has started
        self.loop.call_soon_threadsafe(self.output.close)
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._held)


class ReceivedFile:
    """A file that arrives in pieces. size: its bytes so far. digest: their SHA-256."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self.digest = hashlib.sha256()

    def append(self, data: bytes) -> None:
        """Write the next bytes. Raises OSError, and then the file is as before."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb", buffering=0) as file:
            file.seek(self.size)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        self.size += len(data)
        self.digest.update(data)


class Output:
    """The output of a process: pieces in the order in which they were read, which are kept until the client has them.

    While the client does not take them, no more is read, and the process waits.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.code: int | None = None  # the exit code of the process
        self._first = 0  # the number of the first piece that is kept
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._open: dict[int, int] = {}  # file descriptor -> stream
        self._reads = False
        self._news = asyncio.Event()

    def watch(self, stream: int, fd: int) -> None:
        """Read a stream of the process. The descriptor is closed at its end."""
        os.set_blocking(fd, False)
        self._open[fd] = stream
        self._reads = True
        self.loop.add_reader(fd, self._read, fd)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self._pieces.append((self._open[fd], data))
            self._bytes += len(data)
            if self._bytes >= LIMITS.command_output_bytes:
                self._reads = False
                for each in self._open:
                    self.loop.remove_reader(each)
        else:
            self._close(fd)
        self._news.set()

    def _close(self, fd: int) -> None:
        self.loop.remove_reader(fd)
        del self._open[fd]
        os.close(fd)

    async def take(self, seen: int) -> Step:
        """Return the pieces from number `seen` on, and the exit code when they are the last ones.

        Waits a moment if there is none. Raises InvalidArgument for pieces that are gone.
        """
        self._drop(seen)
        if not self._pieces and not self._is_whole:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_S)
        pieces = [[stream, data] for stream, data in self._pieces]
        return {"first": self._first, "pieces": pieces, "code": self.code if self._is_whole else None}

    @property
    def _is_whole(self) -> bool:
        return self.code is not None and not self._open

    def _drop(self, seen: int) -> None:
        if not self._first <= seen <= self._first + len(self._pieces):
            raise InvalidArgument(f"command: output from piece {seen} on is not kept; it begins at {self._first}")
        while self._first < seen:
            self._bytes -= len(self._pieces.popleft()[1])
            self._first += 1
        if not self._reads and self._bytes < LIMITS.command_output_bytes:
            self._reads = True
            for fd in self._open:
                self.loop.add_reader(fd, self._read, fd)

    def end(self, code: int) -> None:
        """The process has ended. What it wrote last may still be in the pipes."""
        self.code = code
        self._news.set()

    def close(self) -> None:
        """Read no more."""
        for fd in list(self._open):
            self._close(fd)
        self._news.set()


def read_step(params: bytes) -> tuple[str, Step]:
    """Return the step and what was given to it. The worker has checked that these are a string and a map."""
    try:
        step, given, *_ = msgpack.unpackb(params, strict_map_key=False)
    except UNPACK_ERRORS as error:
        raise InvalidArgument(f"command: it cannot be read: {error}") from None
    return step, given


def value_of(given: Step, name: str, kind: type[T]) -> T:
    """Return a value of a step. Raises InvalidArgument if it is missing or of another type."""
    value = given.get(name)
    if type(value) is not kind:
        raise InvalidArgument(f"command: {name!r} must be {kind.__name__}, not {type(value).__name__}")
    return value


def make_folder() -> tuple[Path, int]:
    """Make a folder for the files of a command. Returns it and a file descriptor, which holds it until it is closed."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # only this user may enter
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_EX)
    return folder, held


def sweep() -> None:
    """Remove the folders of servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(held).st_uid == os.geteuid():
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the server runs
                    shutil.rmtree(folder)
            finally:
                os.close(held)
