"""Options that several commands share, and the opening of a store for one command."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from shorttail.store import Store

F = TypeVar("F", bound=Callable[..., Any])


def store_option(command: F) -> F:
    return click.option("--store", required=True, metavar="STORE", help="Folder of the online store.")(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def source_options(command: F) -> F:
    """--store or --server: where a question is put."""
    command = click.option("--server", metavar="ADDR", help="Ask a server: host:port or unix:/path.sock.")(command)
    return click.option("--store", metavar="STORE", help="Answer from a store in this process.")(command)


@contextlib.contextmanager
def opened(path: str, create: bool = False) -> Iterator[Store]:
    from shorttail.store import Store

    store = Store.open(path, create=create)
    try:
        store.refresh()
        yield store
    finally:
        store.close()
