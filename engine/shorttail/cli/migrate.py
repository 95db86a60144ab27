"""`shorttail migrate`: rewrites a store of an older format."""

from __future__ import annotations

import time

import click

from shorttail.cli.operate import counted
from shorttail.cli.options import by_option, changed_by, json_option, opened, progress_bar, store_option
from shorttail.cli.output import print_json


@click.command()
@store_option
@by_option
@json_option
def migrate(store: str, as_json: bool) -> None:
    """Rewrite a store of an older format.

    All tables are written once more beside the old ones, so the disk needs as much room again as the store
    has; the room is free for new rows afterwards. The store can be served meanwhile. A command that is
    killed or fails leaves it as it was: run it again.

    \b
    Example:
      shorttail migrate --store store
    """
    from shorttail.store import migrate as migrating
    from shorttail.store.format import FORMAT_VERSION

    start_s = time.perf_counter()
    with opened(store) as target, progress_bar("migrate") as bar:
        done = migrating.migrate(target.environment, changed_by(), bar)
    seconds = time.perf_counter() - start_s
    if as_json:
        found = {"store": done.path, "from_format": done.from_format, "format": FORMAT_VERSION}
        return print_json({**found, "tables": done.tables, "rows": done.rows, "seconds": round(seconds, 6)})
    if done.from_format == FORMAT_VERSION:
        return click.echo(f"{store}: has format {FORMAT_VERSION}; there is nothing to do")
    held = f"{counted(done.tables, 'table')}, {counted(done.rows, 'row')}"
    click.echo(f"{store}: format {done.from_format} is now {FORMAT_VERSION}; {held} in {seconds:.1f} s")
