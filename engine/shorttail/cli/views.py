"""`shorttail views`: lists views, shows what they hold, and reads their rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shorttail.cli.caller import OutputFile
from shorttail.cli.options import by_option, json_option, opened
from shorttail.cli.output import echo_line, print_json, print_table
from shorttail.cli.where import store_or_server, subcommands_of, where_options

if TYPE_CHECKING:
    from shorttail.store import Store

TABLE_ROWS = 20  # of `views scan` without --limit, if a table is printed
FORMATS = ("table", "csv", "json", "parquet")
SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet"}


@click.group(invoke_without_command=True)
@where_options
@json_option
@click.pass_context
def views(context: click.Context, store: str | None, server: str | None, as_json: bool) -> None:
    """List views, show what they hold, and read their rows.

    Without a subcommand: list the views.

    \b
    Example:
      shorttail views --store store
      shorttail views show user_stats --store store
      shorttail views get user_stats user_id=3 --store store
      shorttail views scan user_stats --where tier=gold --limit 20 --store store
      shorttail views scan user_stats --output rows.parquet --store store
    """
    if context.invoked_subcommand is None:
        context.invoke(views_list, store=store, server=server, as_json=as_json)


views_command = subcommands_of(views)


@views_command("list")
def views_list(store: str, as_json: bool) -> None:
    """List the views.

    `last event` is the latest event time of the rows of a view.

    \b
    Example:
      shorttail views list --store store
    """
    from shorttail.registry.inside import list_views

    with opened(store) as target:
        listed = list_views(target)
    if as_json:
        return print_json(listed)
    if not listed:
        click.echo("no views; register some with `shorttail apply`")
        return
    header = ["view", "entity", "features", "rows", "owner", "last event"]
    print_table(header, [[v["name"], v["entity"], v["features"], v["rows"], v["owner"], v["newest"]] for v in listed])


@views_command("show")
@click.argument("view")
def views_show(store: str, as_json: bool, view: str) -> None:
    """Show what VIEW holds.

    Shows its features with their types, defaults and descriptions, its source, the number and the size of
    its rows, their oldest and newest event time, the share that is STALE, and a few rows.

    \b
    Example:
      shorttail views show user_stats --store store
    """
    from shorttail.registry.inside import describe_view, feature_table, show_lines

    with opened(store) as target:
        shown = describe_view(target, view)
    if as_json:
        return print_json(shown)
    for label, value in show_lines(shown):
        echo_line(f"{label + ':':<13}{value}")
    click.echo("")
    print_table(*feature_table(shown))
    if shown["sample"]:
        click.echo("")
        print_table(list(shown["sample"][0]), [list(row.values()) for row in shown["sample"]])


@views_command("get")
@click.argument("view")
@click.argument("values", nargs=-1, required=True, metavar="KEY=VALUE...")
def views_get(store: str, as_json: bool, view: str, values: tuple[str, ...]) -> None:
    """Show the stored rows of VIEW with these keys.

    KEY=a,b,c shows three rows. A row has its event time, and a status: PRESENT, STALE (older than the
    view's ttl), or NOT_FOUND. Defaults are not filled in.

    \b
    Example:
      shorttail views get user_stats user_id=3 --store store
      shorttail views get user_stats user_id=1,2,3 --store store --json
    """
    from shorttail.define.text import parse_columns
    from shorttail.sources.rows import key_arrays
    from shorttail.store.rows import get_rows, times_as_text

    with opened(store) as target:
        definition = target.catalog.view(view)
        types = {name: dtype.name for name, dtype in definition.keys.items()}
        columns = parse_columns(values, types, f"view '{view}'")
        found = [
            (status.name, times_as_text(definition, row))
            for status, row in get_rows(target, view, key_arrays(definition, columns))
        ]
    if as_json:
        return print_json([{"status": status, "row": row} for status, row in found])
    print_table([*found[0][1], "status"], [[*row.values(), status] for status, row in found])


@views_command("scan")
@click.argument("view")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only rows that satisfy it: column=value, or one of != < <= > >=. Several are joined by `and`.",
)
@click.option("--columns", metavar="A,B,...", help="Columns to write, in this order; without it, all.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help=f"Most rows; of a table, {TABLE_ROWS} without it.")
@click.option("--format", "kind", type=click.Choice(FORMATS), help="Default: that of --output's suffix, else table.")
@click.option("--output", type=OutputFile(), metavar="FILE", help="Write to this file instead of stdout.")
def views_scan(
    store: str,
    as_json: bool,
    view: str,
    where: tuple[str, ...],
    columns: str | None,
    limit: int | None,
    kind: str | None,
    output: str | None,
) -> None:
    """Write the rows of VIEW, in no order, as of one commit.

    A value in a condition is written as for `features`; `column=` alone finds rows in which it is
    missing. Rows are streamed: any number of them needs little memory. A scan from which no rows are taken
    for 30 s is ended, because it keeps the store's old pages from being used again.

    \b
    Example:
      shorttail views scan user_stats --where tier=gold --where 'age>=30' --store store
      shorttail views scan user_stats --columns user_id,age --format csv --store store
      shorttail views scan user_stats --output rows.parquet --store store
    """
    from shorttail.cli.row_output import write_rows
    from shorttail.define.text import csv_row
    from shorttail.store.rows import ViewRows

    if as_json and kind not in (None, "json"):
        raise click.UsageError(f"--json and --format {kind} contradict each other", click.get_current_context())
    if kind is None:
        kind = "json" if as_json else SUFFIXES.get(Path(output).suffix.lower(), "table") if output else "table"
    names = None if columns is None else [name or "" for name in csv_row("--columns", columns)]
    most = TABLE_ROWS if limit is None and kind == "table" and output is None else limit
    with opened(store) as target, ViewRows(target, view, names, where, most) as rows:
        count = write_rows(rows, kind, output)
    if most != limit and count == most:
        click.echo(f"at most {most} rows are shown; --limit N shows N")
    if output is not None:
        click.echo(f"{output}: {count:,} row{'' if count == 1 else 's'}")


@click.command()
@click.argument("word")
@store_or_server
@json_option
def search(word: str, store: str, as_json: bool) -> None:
    """Find entities, views, features and models by WORD.

    WORD is any part of a name, a tag, an owner or a description, in upper or lower case.

    \b
    Example:
      shorttail search fraud --store store
    """
    from shorttail.registry.search import search as find

    with opened(store) as target:
        found = find(target.catalog, word)
    if as_json:
        return print_json(found)
    if not found:
        return echo_line(f"nothing in {store} has {word!r} in its name, tags, owner or description")
    header = ["kind", "name", "matched", "owner", "tags", "description"]
    print_table(header, [[", ".join(i[n]) if isinstance(i[n], list) else i[n] for n in header] for i in found])


@views_command("rollback")
@click.argument("view")
@by_option
def views_rollback(view: str, store: str, as_json: bool) -> None:
    """Go back to the table that a view had before its last load.

    That table was kept, with the deletes but without the pushes that came since. The table that serves now
    is kept in its place until the next load, so a second rollback undoes the first.

    \b
    Example:
      shorttail views rollback user_stats --store store
    """
    with opened(store) as target:
        since = [event for event in target.history() if (event.action, event.subject) == ("loaded", f"view {view}")]
        loaded_us = since[-1].time_us if since else 0
        target.catalog.view(view)
        newer = rows_since(target, view, loaded_us)
        then, now = target.rollback(view)
    if as_json:
        return print_json({"view": view, "rows": then, "rows_before": now, "newer_rows_left_out": newer})
    click.echo(f"{view}: {then:,} rows instead of {now:,}")
    if newer:
        what = f"{newer:,} row{'s' * (newer != 1)}"
        click.echo(f"{what} with event times after that load left out; what was pushed since is to be pushed again")


def rows_since(store: Store, view: str, time_us: int) -> int:
    """Return how many rows of a view have event times after a time."""
    with store.open_scan(view, lambda found: [len(found.keys)]) as scan:
        return sum(int((times.values > time_us).sum()) for (times,) in scan)
