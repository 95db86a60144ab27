"""Where a command runs: on a store in this process (--store), or on a server, which has the store (--server)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from shorttail.cli.caller import caller
from shorttail.cli.options import ADDRESS_HELP, STORE_HELP, F, credentials, json_option


def store_or_server(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --store and --server, of which a command takes exactly one, and the credentials that connect() uses.

    With --server the server runs the command, whose first word must be in caller.COMMANDS; else it gets `store`. Users
    may write the options of a subcommand before its name too.
    """

    @functools.wraps(command)
    def run(*args: Any, store: str | None, server: str | None, **given: Any) -> Any:
        client = caller()
        if (store is None) == (server is None) or (client is not None and store is not None):
            raise click.UsageError("give either --store STORE or --server ADDR", click.get_current_context())
        if client is not None:
            return command(*args, store=client.store, **given)
        if store is not None:
            return command(*args, store=store, **given)
        from shorttail.cli.remote import run_on_server

        return run_on_server(str(server), click.get_current_context())

    return where_options(run)


def where_options(command: F) -> F:
    """Add --store, --server and the credentials that connect() uses, to a command or to a group of commands."""
    server = click.option("--server", callback=_inherited, metavar="ADDR", help="Let a server do it: " + ADDRESS_HELP)
    store = click.option("--store", callback=_inherited, metavar="STORE", help=STORE_HELP)
    return store(server(credentials(command)))


def _inherited(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value or (context.parent.params.get(parameter.name or "") if context.parent else None)


def subcommands_of(group: click.Group) -> Callable[[str], Callable[[F], click.Command]]:
    """Return a decorator that takes a name and makes a function the subcommand of that name.

    It has --json and the options of `store_or_server`.
    """

    def command(name: str) -> Callable[[F], click.Command]:
        def decorate(function: F) -> click.Command:
            return group.command(name)(store_or_server(json_option(function)))

        return decorate

    return command
