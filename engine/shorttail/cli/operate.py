"""`shorttail stat`, `verify` and `backup`: commands to operate a store, also while it is served and written to."""

from __future__ import annotations

import time
from typing import Any

import click

from shorttail.cli.options import by_option, changed_by, json_option, opened, progress_bar, store_option
from shorttail.cli.output import print_json, print_table
from shorttail.cli.where import store_or_server


@click.command()
@store_or_server
@json_option
def stat(store: str, as_json: bool) -> None:
    """Show rows, sizes and readers of a store.

    `fill` is the used percentage of a view's pages.

    \b
    Example:
      shorttail stat --store store
    """
    from shorttail.define.durations import duration_text
    from shorttail.store.format import FORMAT_VERSION
    from shorttail.store.mapping import size_text
    from shorttail.store.stat import store_stats

    with opened(store) as target:
        found = store_stats(target)
    if as_json:
        return print_json(found)
    if found["views"]:
        print_table(
            ["view", "keys", "features", "rows", "fill", "size", "depth"],
            [
                [
                    view["view"],
                    ", ".join(view["keys"]) or "-",
                    view["features"],
                    view["rows"],
                    "-" if view["fill"] is None else f"{view['fill']:.0%}",
                    size_text(view["bytes"]),
                    view["depth"],
                ]
                for view in found["views"]
            ],
        )
    else:
        click.echo("no views; register some with `shorttail apply`")
    file, free, room = (size_text(found[name]) for name in ("file_bytes", "free_bytes", "map_bytes"))
    click.echo(f"file: {file}, {free} of it free; may grow to {room}")
    if found["format"] < FORMAT_VERSION:
        click.echo(f"format: {found['format']}, which is only read; run `shorttail migrate --store {store}`")
    log = found["change_log"]
    since = "" if log["oldest_commit"] is None else f", the log of changes from {log['oldest_commit']} on"
    click.echo(f"commit: {found['commit']}{since} ({size_text(log['bytes'])})")
    click.echo(f"max_clock_skew: {duration_text(found['max_clock_skew_us'])}")
    click.echo(f"readers: {readers_text(found)}")
    for table in found["leftover_tables"]:
        pages = counted(table["pages"], "page")
        click.echo(f"table {table['table']}: {pages} of no view; a load is running, or one was killed")


def readers_text(found: dict[str, Any]) -> str:
    """Return "2 processes (11, 12), 1 snapshot; the oldest, of process 12, is 3 commits behind"."""
    readers = found["readers"]
    if not readers:
        return "none"
    pids = ", ".join(str(reader["pid"]) for reader in readers)
    held = sum(reader["snapshots"] for reader in readers)
    text = f"{counted(len(readers), 'process', 'processes')} ({pids}), {counted(held, 'snapshot')}"
    behind = found["oldest_snapshot_commits_behind"]
    if behind:
        oldest = next(reader["pid"] for reader in readers if reader["commits_behind"] == behind)
        text += f"; the oldest, of process {oldest}, is {counted(behind, 'commit')} behind"
    return text


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """Return "1 row" or "2 rows"."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


@click.command()
@store_or_server
@json_option
def verify(store: str, as_json: bool) -> int:
    """Check a store completely.

    Checks the file, LMDB's structure, the checksum of every page, that every row is found by its key,
    and the models' files. Exit code 0: the store is sound; 1: it is damaged, with a line for each problem.

    \b
    Example:
      shorttail verify --store store
    """
    from shorttail.store import verify as verifying

    start_s = time.perf_counter()
    with progress_bar("verify", " pages") as progress:
        report = verifying.verify(store, progress)
    if as_json:
        print_json(verifying.as_json(report))
        return 0 if report.ok else 1
    for note in report.notes:
        click.echo(f"note: {note}")
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    if not report.ok:
        n = counted(len(report.problems), "problem")
        click.echo(f"error: store '{store}' is damaged ({n}); restore it from a backup", err=True)
        return 1
    checked = [
        counted(report.tables, "view"),
        counted(report.rows, "row"),
        counted(report.pages, "page"),
        counted(report.model_versions, "model version"),
    ]
    seconds = time.perf_counter() - start_s
    click.echo(f"{store}: sound as of commit {report.commit}; {', '.join(checked)} in {seconds:.1f} s")
    return 0


@click.command()
@click.argument("destination")
@store_option
@click.option("--as-is", is_flag=True, help="Copy free pages too: a larger file, and less CPU time.")
@by_option
@json_option
def backup(destination: str, store: str, as_is: bool, as_json: bool) -> None:
    """Copy a store to a new folder.

    The copy holds a single commit, also if the store is written meanwhile. It is a store itself: to
    restore it, serve it. DESTINATION appears only when the whole copy is on disk.

    \b
    Example:
      shorttail backup /backups/store-2026-01-31 --store store
    """
    from shorttail.store import backup as backing_up
    from shorttail.store.mapping import size_text

    start_s = time.perf_counter()
    done = backing_up.backup(store, destination, compact=not as_is, by=changed_by())
    seconds = time.perf_counter() - start_s
    if done.unnoted:
        click.echo(f"warning: the history of {store} does not tell of this backup: {done.unnoted}", err=True)
    if as_json:
        return print_json({**backing_up.as_json(done), "seconds": round(seconds, 6)})
    held = f"{counted(done.views, 'view')}, {counted(done.model_versions, 'model version')}"
    click.echo(f"{destination}: {held}, {size_text(done.bytes)} as of commit {done.commit} in {seconds:.1f} s")
