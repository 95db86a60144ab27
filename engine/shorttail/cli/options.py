"""Options that several commands share, and the opening of a store for one command."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from shorttail.client import Client
    from shorttail.engine import Engine
    from shorttail.store import Store

F = TypeVar("F", bound=Callable[..., Any])


def store_option(command: F) -> F:
    return click.option("--store", required=True, metavar="STORE", help="Folder of the online store.")(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def source_options(command: F) -> F:
    """--store or --server: who answers. What a server wants to see is kept for connect()."""
    for name, metavar, text in (
        ("--tls-ca", "PEM", "Speak TLS to the server, whose certificate this CA has signed."),
        ("--token-file", "FILE", "Show the server the token in this file."),
    ):
        command = click.option(name, metavar=metavar, help=text, expose_value=False, callback=_keep)(command)
    command = click.option("--server", metavar="ADDR", help="Ask a server: host:port or unix:/path.sock.")(command)
    return click.option("--store", metavar="STORE", help="Use a store in this process.")(command)


def _keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    ctx.meta[f"shorttail.{param.name}"] = value


def connect(server: str, timeout_s: float = 5.0) -> Client:
    """A client with the credentials that the current command was given."""
    from shorttail.client import Client
    from shorttail.server.security import client_token

    given = click.get_current_context().meta
    token_file = given.get("shorttail.token_file")
    token = None if token_file is None else client_token(token_file)
    return Client(server, timeout_s=timeout_s, token=token, tls=given.get("shorttail.tls_ca"))


@contextlib.contextmanager
def opened(path: str, create: bool = False) -> Iterator[Store]:
    from shorttail.store import Store

    store = Store.open(path, create=create)
    try:
        store.refresh()
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def answerer(store: str | None, server: str | None) -> Iterator[Engine | Client]:
    """Who answers: an engine on the store, or a client of the server."""
    if (store is None) == (server is None):
        raise click.UsageError("give either --store STORE or --server ADDR", click.get_current_context())
    if store is not None:
        from shorttail.engine import Engine

        with Engine.open(store) as engine:
            yield engine
    else:
        assert server is not None
        with connect(server) as client:
            yield client


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr while it is a terminal; yields progress(rows done, rows in all if known)."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=" rows", unit_scale=True, leave=False, disable=None) as bar:

        def progress(done: int, total: int | None = None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
