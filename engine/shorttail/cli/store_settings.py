"""`shorttail settings`: lists and changes the settings that a store keeps for all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from shorttail.cli.options import by_option, json_option, opened
from shorttail.cli.output import print_json, print_table
from shorttail.cli.where import store_or_server
from shorttail.define.durations import duration_text, parse_duration

if TYPE_CHECKING:
    from shorttail.define.catalog import Catalog
    from shorttail.registry.apply import Change
    from shorttail.store import Store

NAMES: Final = {"max_clock_skew": "how far event times may be ahead of the clock of the process that takes them"}


def as_duration(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Return a value of the command line, such as "5m", in microseconds. Raises InvalidArgument."""
    return None if value is None else parse_duration(value, "max_clock_skew", "'1h' or '5m'")


@click.group()
def settings() -> None:
    """List or change the settings of a store.

    A setting holds for all processes that use the store, from their next request on.

    \b
    Example:
      shorttail settings list --store store
      shorttail settings set max_clock_skew 5m --store store
    """


@settings.command("list")
@store_or_server
@json_option
def settings_list(store: str, as_json: bool) -> None:
    """List the settings of a store.

    \b
    Example:
      shorttail settings list --store store
    """
    with opened(store) as target:
        found = values(target)
    if as_json:
        return print_json(found)
    print_table(["setting", "value", "meaning"], [[name, value, NAMES[name]] for name, value in found.items()])


@settings.command("set")
@click.argument("name", type=click.Choice(list(NAMES)), metavar="NAME")
@click.argument("value", callback=as_duration)
@store_or_server
@by_option
@json_option
def settings_set(name: str, value: int, store: str, as_json: bool) -> None:
    """Change the setting NAME of a store to VALUE.

    \b
    Example:
      shorttail settings set max_clock_skew 5m --store store
    """
    with opened(store) as target:
        before = values(target)[name]
        target.set_max_clock_skew(value)
        after = values(target)[name]
    if as_json:
        return print_json({name: after})
    click.echo(f"{name}: {after}" if before == after else f"{name}: {before} -> {after}")


def skew_change(before: Catalog, skew_us: int) -> Change:
    """Return the line of the report of `apply` that says how it sets max_clock_skew."""
    from shorttail.registry.apply import Change

    old, new = duration_text(before.max_clock_skew_us), duration_text(skew_us)
    return (
        Change("=", "setting max_clock_skew", new)
        if old == new
        else Change("~", "setting max_clock_skew", f"{old} -> {new}")
    )


def values(store: Store) -> dict[str, str]:
    """Return {setting: value as text}."""
    return {"max_clock_skew": duration_text(store.catalog.max_clock_skew_us)}
