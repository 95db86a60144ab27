"""`python -m shorttail.cli.served`: the process in which a server runs a command for a client (server/commands.py).

FOLDER holds what the client has sent: `request`, a JSON object of REQUEST's keys; `definitions`, if the command takes a
definitions file; and the other files under the names that `request` gives them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

from shorttail.cli import fail, main
from shorttail.cli.caller import COMMANDS, RemoteCaller, serve_caller
from shorttail.define.collect import Definitions
from shorttail.define.inputs import use_copies
from shorttail.errors import InvalidArgument
from shorttail.models.trial import end_with_parent

NICE: Final = 10
# Key -> its types. words: the command line. files: [path on the client, name in FOLDER] of each file that it names.
REQUEST: Final[dict[str, tuple[type, ...]]] = {
    "words": (list,),
    "folder": (str,),
    "files": (list,),
    "encoding": (str,),
    "columns": (int, type(None)),
    "progress_columns": (int, type(None)),
}


def run() -> None:
    """Run the command of the folder. Its exit code, and what it prints, are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m shorttail.cli.served", description="started by a server")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--who", required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True, help="a pipe that closes when the server ends")
    parser.add_argument("--output-fd", type=int, required=True, help="takes what is written to --output")
    args = parser.parse_args()
    end_with_parent(args.lifeline_fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server's processes ignore these
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    os.set_inheritable(args.output_fd, False)
    try:
        request = read_request(args.folder / "request")
        print_as(request["encoding"])
        lay_out(args.folder, request["files"])
        sent = args.folder / "definitions"
        definitions = Definitions.from_json(sent.read_bytes()) if sent.exists() else None
    except InvalidArgument as error:
        fail(error.message, 1)
    name = next(iter(request["words"]), "")
    if name not in COMMANDS:
        fail(f"a server does not run {name!r:.80}; it runs {', '.join(COMMANDS)}", 2)
    columns, progress = request["columns"], request["progress_columns"]
    serve_caller(RemoteCaller(args.store, args.who, request["folder"], definitions, args.output_fd, columns, progress))
    sys.argv = ["shorttail", *request["words"]]
    main()


def read_request(path: Path) -> dict[str, Any]:
    """Return the content of `request`. Raises InvalidArgument."""
    try:
        request: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"command: its request cannot be read: {error}") from None
    for key, types in REQUEST.items():
        if not isinstance(request, dict) or not isinstance(request.get(key), types):
            raise InvalidArgument(f"command: {key!r} of its request is missing or of another type")
    words, files = request["words"], request["files"]
    pairs = all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in files)
    if not pairs or not all(type(word) is str and "\0" not in word for word in words):
        raise InvalidArgument("command: 'words' of its request must be strings, and 'files' pairs of strings")
    return request


def print_as(encoding: str) -> None:
    """Write text in the encoding of the client's terminal, a line at a time."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(LookupError):
                stream.reconfigure(encoding=encoding)
            stream.reconfigure(line_buffering=True)


def lay_out(folder: Path, files: list[list[str]]) -> None:
    """Give each file its whole path below a folder, from which it is read then. Raises InvalidArgument."""
    copies = folder / "copies"
    for path, name in files:
        copy = Path(str(copies) + os.path.normpath(path))
        if not path.startswith("/") or not name.isalnum():
            raise InvalidArgument(f"command: {path!r:.80} is not the whole path of a file")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(copy)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidArgument(f"command: {path}: the server cannot keep a copy: {reason}") from None
    use_copies(copies)


if __name__ == "__main__":
    run()
