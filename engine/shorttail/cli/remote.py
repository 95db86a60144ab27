"""Runs the command of this process on a server: sends its words and files, and prints what the server prints."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import secrets
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO, cast

import click

from shorttail.cli.caller import DefinitionsFile, InputFile, OutputFile
from shorttail.cli.options import connect, given_token, progress_bar
from shorttail.cli.output import terminal_columns
from shorttail.config import COMMANDS_VERSION, LIMITS
from shorttail.errors import DeadlineExceeded, NotFound, ResourceExhausted, ShorttailError, Unavailable
from shorttail.store.history import login

if TYPE_CHECKING:
    from shorttail.client import Client

TIMEOUT_S: Final = 60.0  # of a step; the server may be writing to a slow disk
ALIVE_S: Final = 4.0  # how often the server hears that the client is there
STDOUT, STDERR, FILE = 1, 2, 3
CUT: Final = "it was done as a whole or not at all: `shorttail history` shows which"


def run_on_server(server: str, context: click.Context) -> None:
    """Run the command of the context on a server, with the words of the command line. A failed one exits like there.

    Raises what reading its files raises, and every error that the server reports.
    """
    files = files_of(context)
    paths = [path for path in files if path]
    request = {
        "words": sys.argv[1:],
        "folder": str(Path.cwd()),
        "files": [[path, str(number)] for number, path in enumerate(paths)],
        "encoding": getattr(sys.stdout, "encoding", None) or "utf-8",
        "columns": terminal_columns(),
        "progress_columns": shutil.get_terminal_size().columns if sys.stderr.isatty() else None,
    }
    sent = {str(number): files[path] for number, path in enumerate(paths)}
    sent["request"] = json.dumps(request).encode()
    if "" in files:
        sent["definitions"] = files[""]
    outputs = [context.params.get(param.name or "") for param in typed(context, OutputFile)]
    with connect(server, TIMEOUT_S) as client, RemoteCommand(client) as command:
        sums = command.send(sent)
        command.follow(sums, next(filter(None, outputs), None))


def typed(context: click.Context, kind: type[click.types.StringParamType]) -> list[click.Parameter]:
    return [param for param in context.command.params if isinstance(param.type, kind)]


def files_of(context: click.Context) -> dict[str, bytes]:
    """Return {whole path: content} of the files that the command reads. The definitions have the path ""."""
    files: dict[str, bytes] = {}
    for param in typed(context, DefinitionsFile):
        files |= definitions_of(context.params[param.name or ""])
    for param in typed(context, InputFile):
        value = context.params[param.name or ""]
        if value is not None:
            path = str(Path(value).absolute())
            files[path] = content_of(cast(InputFile, param.type).reads, path, context.params["name"])
    return files


def definitions_of(path: str) -> dict[str, bytes]:
    """Run a definitions file, make all checks of it that need no store, and return its document and its files."""
    from shorttail.registry.apply import prepare

    prepared = prepare(path)
    files = {"": prepared.definitions.to_json()}
    for name, model in prepared.definitions.models.items():
        files[model.path] = prepared.files[name].data
        if model.examples is not None:
            files[model.examples] = content_of("examples", model.examples, name)
    return files


def content_of(reads: str, path: str, model_name: str) -> bytes:
    """Return what a server has to read in place of a file: a model file comes with all of its weights."""
    if reads == "model":
        from shorttail.models.signature import ModelFile

        return ModelFile.read(path, model_name).data
    from shorttail.registry import examples

    return examples.content(path, model_name)


class RemoteCommand:
    """A command on a server: a context manager, which ends the command there when it is left before its end."""

    def __init__(self, client: Client):
        self.client = client
        self._id = secrets.token_hex(16)
        self._left = threading.Event()

    def step(self, name: str, **given: Any) -> dict[str, Any]:
        return self.client.command(name, {"id": self._id, **given})

    def __enter__(self) -> Self:
        self.step("begin", token=given_token() or "", version=COMMANDS_VERSION, login=login())
        threading.Thread(target=self._stay_alive, daemon=True).start()
        return self

    def _stay_alive(self) -> None:
        """Tell the server that this client is there, also while a pager does not read what it prints."""
        while not self._left.wait(ALIVE_S):
            with contextlib.suppress(ShorttailError):
                self.step("alive")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        with contextlib.suppress(ShorttailError):
            self.step("end")

    def send(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """Send the files, and return the SHA-256 of each."""
        total = sum(map(len, files.values()))
        with progress_bar("send", "B") as progress:
            done = 0
            for name, content in files.items():
                for offset in range(0, max(1, len(content)), LIMITS.command_piece_bytes):
                    piece = content[offset : offset + LIMITS.command_piece_bytes]
                    self.step("send", file=name, offset=offset, data=piece)
                    done += len(piece)
                    progress(done, total)
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def follow(self, sums: Mapping[str, str], output: str | None) -> None:
        """Start the command with the files that were sent, and print what it prints. output: the file that it writes.

        Raises SystemExit with its exit code if that is not 0, and ResourceExhausted if its process was killed.
        """
        from shorttail.cli.row_output import output_file
        from shorttail.server.children import how_it_ended

        seen, code = 0, None
        sinks: dict[int, Any] = {STDOUT: Printer(sys.stdout), STDERR: Printer(sys.stderr)}
        with contextlib.ExitStack() as stack:
            self._running("run", sums=dict(sums))
            while code is None:
                answer = self._running("output", seen=seen)
                for stream, data in answer["pieces"]:
                    if stream == FILE and FILE not in sinks and output is not None:
                        sinks[FILE] = stack.enter_context(output_file(output))
                    sinks[stream].write(data)
                seen = answer["first"] + len(answer["pieces"])
                code = answer["code"]
            if code < 0:
                raise ResourceExhausted(
                    f"the command was killed on the server, {how_it_ended(code)}; it may need more memory than there is"
                    f" ({CUT})"
                )
            if code:
                sys.exit(code)
            if output is not None and FILE not in sinks:
                stack.enter_context(output_file(output))

    def _running(self, name: str, **given: Any) -> dict[str, Any]:
        """Take a step of a command that may have been done already."""
        try:
            return self.step(name, **given)
        except (DeadlineExceeded, NotFound, Unavailable) as error:
            raise type(error)(f"{error.message} ({CUT})") from None


class Printer:
    """Writes bytes to a text stream. They are in its encoding."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: bytes) -> None:
        binary = getattr(self.stream, "buffer", None)
        if binary is None:
            self.stream.write(self._decoder.decode(data))
        else:
            self.stream.flush()
            binary.write(data)
            binary.flush()
