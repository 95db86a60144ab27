"""`shorttail settings`: lists and changes the settings that a store keeps for all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from shorttail.cli.options import by_option, json_option, opened
from shorttail.cli.output import print_json, print_table
from shorttail.cli.where import store_or_server
from shorttail.config import LIMITS
from shorttail.define.durations import duration_text, parse_duration

if TYPE_CHECKING:
    from shorttail.define.catalog import Catalog
    from shorttail.registry.changes import Change
    from shorttail.store import Store

NAMES: Final = {
    "max_clock_skew": "how far event times may be ahead of the clock of the process that takes them",
    "map_size": "how large the store may grow, such as 64GB; default: as its map",
    "log_bytes": "size of the log by which readers follow commits; those further behind read all page headers again",
    "log_commits": "the same as a number of commits",
    "durability": "commit: each commit is on disk when it returns; system: a crash of the machine may undo the last",
}


def as_duration(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Return a value of the command line, such as "5m", in microseconds. Raises InvalidArgument."""
    return None if value is None else as_skew_us(value)


def as_skew_us(value: str) -> int:
    return parse_duration(value, "max_clock_skew", "'1h' or '5m'")


@click.group()
def settings() -> None:
    """List or change the settings of a store.

    A setting holds for all processes that use the store. The durability is that with which a process opened
    the store, the others hold from the next commit on.

    \b
    Example:
      shorttail settings list --store store
      shorttail settings set max_clock_skew 5m --store store
      shorttail settings set map_size 64GB --store store
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
@click.argument("value")
@store_or_server
@by_option
@json_option
def settings_set(name: str, value: str, store: str, as_json: bool) -> None:
    """Change the setting NAME of a store to VALUE.

    NAME is max_clock_skew, map_size, log_bytes, log_commits or durability. VALUE is a time such as 5m, a size
    such as 64GB, a number, or commit or system; or default.

    \b
    Example:
      shorttail settings set max_clock_skew 5m --store store
    """
    with opened(store) as target:
        before = values(target)[name]
        if name == "max_clock_skew":
            skew_us = LIMITS.max_clock_skew_us if value == "default" else as_skew_us(value)
            target.set_max_clock_skew(skew_us)
        else:
            target.set_setting(name, value)
        after = values(target)[name]
    if as_json:
        return print_json({name: after})
    click.echo(f"{name}: {after}" if before == after else f"{name}: {before} -> {after}")


def skew_change(before: Catalog, skew_us: int) -> Change:
    """Return the line of the report of `apply` that says how it sets max_clock_skew."""
    from shorttail.registry.changes import Change

    old, new = duration_text(before.max_clock_skew_us), duration_text(skew_us)
    return (
        Change("=", "setting max_clock_skew", new)
        if old == new
        else Change("~", "setting max_clock_skew", f"{old} -> {new}")
    )


def values(store: Store) -> dict[str, str]:
    """Return {setting: value as text}."""
    return {"max_clock_skew": duration_text(store.catalog.max_clock_skew_us), **store.settings().shown()}
