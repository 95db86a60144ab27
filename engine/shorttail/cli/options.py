"""Options that several commands share, and helpers that open a store or connect to a server for a command."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from shorttail.cli.caller import caller
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument

if TYPE_CHECKING:
    from shorttail.client import Client
    from shorttail.engine import Engine
    from shorttail.store import Store


class Seconds(click.types.StringParamType):
    """A length of time such as 90s or 10m, in seconds. A number alone is seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from shorttail.define.durations import parse_duration

        text = f"{value}s" if str(value).isdecimal() else str(value)
        try:
            return parse_duration(text, "", "90s or 10m") / 1e6
        except InvalidArgument:
            self.fail(f"{value!r} is not a time; write 90s or 10m", param, ctx)


MICROSECONDS: Final = re.compile(r"-?[0-9]{1,30}")

F = TypeVar("F", bound=Callable[..., Any])
STORE_HELP: Final = "Folder of the online store."
ADDRESS_HELP: Final = "host:port or unix:/path.sock."


def store_option(command: F) -> F:
    """Add the required option --store."""
    return click.option("--store", required=True, metavar="STORE", help=STORE_HELP)(command)


def json_option(command: F) -> F:
    """Add the option --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def vet_option(command: F) -> F:
    """Add --vet-timeout, of commands that try a model's file."""
    return click.option(
        "--vet-timeout",
        metavar="TIME",
        callback=lambda context, parameter, value: f"{value}s" if value and value.isdecimal() else value,
        show_default=f"{LIMITS.vet_s:g}s",
        help="Time that a trial of a model's file may take, such as 10m; it is ended then.",
    )(command)


def by_option(command: F) -> F:
    """Add --by, of commands that change a store. `opened` and `changed_by` use it."""
    return click.option(
        "--by",
        metavar="LABEL",
        expose_value=False,
        callback=_keep,
        help="Who changes the store, for its history, such as ci; without it, the user that runs the command.",
    )(command)


def changed_by() -> str:
    """Return what --by says; without it, the client of a server, and "" for a user of this machine."""
    client = caller()
    return click.get_current_context().meta.get("shorttail.by") or (client.who if client is not None else "")


def code_option(command: F) -> F:
    """Add --no-code, of commands that run the on-demand functions of a store."""
    return click.option(
        "--no-code",
        is_flag=True,
        help="Run no Python code that the store holds; models that need its on-demand functions are unavailable.",
    )(command)


def as_of_option(command: F) -> F:
    """Add --as-of, of commands that look features up. Its value is what `as_of` of the engine and the clients takes."""
    return click.option(
        "--as-of",
        metavar="TIME",
        callback=lambda context, parameter, value: int(value) if value and MICROSECONDS.fullmatch(value) else value,
        help="Judge TTLs at this time, in UTC, such as 2026-11-20T10:00; newer rows are not found.",
    )(command)


def load_options(command: F) -> F:
    """Add --memory-mib and --allow-shrink, of commands that replace the rows of a view."""
    command = click.option(
        "--allow-shrink",
        is_flag=True,
        help="Also load if no row is left, or less than half of 1,000 or more rows; without it, refuse.",
    )(command)
    return click.option(
        "--memory-mib",
        metavar="N",
        default=LIMITS.load_memory_bytes >> 20,
        show_default=True,
        type=click.IntRange(LIMITS.load_memory_bytes_min >> 20),
        help="Memory in MiB for the rows of a view; the other rows wait in a temporary file in STORE.",
    )(command)


def source_options(command: F) -> F:
    """Add --store and --server, of which a command takes exactly one, and the credentials that connect() uses."""
    command = click.option("--server", metavar="ADDR", help="Use a running server: " + ADDRESS_HELP)(
        credentials(command)
    )
    return click.option("--store", metavar="STORE", help="Use the store in this folder, without a server.")(command)


def credentials(command: F) -> F:
    """Add the options that connect() uses."""
    for name, metavar, text in (
        ("--tls-ca", "PEM", "Use TLS to the server, whose certificate the CA in this file has signed."),
        ("--token-file", "FILE", "Send the token in this file to the server."),
    ):
        command = click.option(name, metavar=metavar, help=text, expose_value=False, callback=_keep)(command)
    return command


def _keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:  # of a subcommand without the option, the option of its group holds
        ctx.meta[f"shorttail.{param.name}"] = value


def given_token() -> str | None:
    """Return the token in the file of --token-file, which is read once: it may be a pipe."""
    from shorttail.server.security import client_token

    given = click.get_current_context().meta
    token_file = given.get("shorttail.token_file")
    if token_file is not None and "shorttail.token" not in given:
        given["shorttail.token"] = client_token(token_file)
    token: str | None = given.get("shorttail.token")
    return token


def connect(server: str, timeout_s: float = 5.0) -> Client:
    """Return a client of the server, with the credentials among the current command's options."""
    from shorttail.client import Client

    tls = click.get_current_context().meta.get("shorttail.tls_ca")
    return Client(server, timeout_s=timeout_s, token=given_token(), tls=tls)


@contextlib.contextmanager
def opened(path: str, create: bool = False) -> Iterator[Store]:
    """Open a store for a command, at its latest commit, and close it afterwards."""
    from shorttail.store import Store

    store = Store.open(path, create=create, by=changed_by())
    try:
        store.refresh()
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def answerer(store: str | None, server: str | None, code: bool = True) -> Iterator[Engine | Client]:
    """Yield an engine on the store, or a client of the server. Both have the methods of queries.

    code: as for Engine.open.
    """
    if (store is None) == (server is None):
        raise click.UsageError("give either --store STORE or --server ADDR", click.get_current_context())
    if store is not None:
        from shorttail.engine import Engine

        with Engine.open(store, code=code) as engine:
            yield engine
    else:
        assert server is not None
        with connect(server) as client:
            yield client


@contextlib.contextmanager
def progress_bar(name: str, unit: str = " rows") -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar if stderr is a terminal. Yields a function progress(units done, all units if known)."""
    from tqdm import tqdm

    client = caller()
    disable, columns = None, None  # as stderr is
    if client is not None:
        disable, columns = client.progress_columns is None, client.progress_columns
    with tqdm(desc=name, unit=unit, unit_scale=True, leave=False, disable=disable, ncols=columns) as bar:

        def progress(done: int, total: int | None = None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
