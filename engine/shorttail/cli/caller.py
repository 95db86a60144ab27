"""Who called the command of this process: a user of this machine, or a client of the server for which it runs.

A command with --server runs on the server, in a process of its own (cli/served.py), which reads the same command line.
What differs there is in `RemoteCaller`: where the store is, who changes it, how wide the client's terminal is, and what
the files hold that the command line names. Options and arguments that name files have a type of this module, by which
the client finds the files that it has to send (cli/remote.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from shorttail.define.collect import Definitions

# The commands that a server runs for a client. They take --server by `where.store_or_server`.
COMMANDS: Final = (
    "apply",
    "history",
    "materialize",
    "models",
    "plan",
    "search",
    "settings",
    "stat",
    "tune",
    "verify",
    "views",
)


@dataclass(frozen=True)
class RemoteCaller:
    """The client for which this process runs a command.

    store: the server's. who: the client, for the history. folder: the working folder of the client. definitions: what a
    definitions file on the command line holds. output_fd: takes what is written to --output. columns: the width of the
    client's terminal, None if its stdout is none. progress_columns: the same of its stderr.
    """

    store: str
    who: str
    folder: str
    definitions: Definitions | None
    output_fd: int
    columns: int | None
    progress_columns: int | None


_caller: RemoteCaller | None = None


def caller() -> RemoteCaller | None:
    """Return the client, None in a command of this machine."""
    return _caller


def serve_caller(client: RemoteCaller) -> None:
    """This process runs a command for this client, from now on."""
    global _caller
    _caller = client


class DefinitionsFile(click.types.StringParamType):
    """A file of definitions. It runs on the client's machine alone; the server gets the definitions that it makes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        client = caller()
        if client is None:
            return value
        if client.definitions is None:
            self.fail("the client has sent no definitions", param, ctx)
        return client.definitions


class InputFile(click.types.StringParamType):
    """A file that a command reads for the model of its argument NAME. reads: "model" or "examples"."""

    def __init__(self, reads: str):
        self.reads = reads

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        client = caller()
        return value if client is None else os.fspath(Path(client.folder, value))


class OutputFile(click.types.StringParamType):
    """A file that a command writes; `row_output.output_file` opens it."""
