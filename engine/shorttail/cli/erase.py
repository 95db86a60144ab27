"""`shorttail delete-entity`: deletes the rows of an entity's keys in all of its views, and keeps them away."""

from __future__ import annotations

import click

from shorttail.cli.options import by_option, changed_by, json_option, store_option
from shorttail.cli.output import echo_line, print_json


@click.command("delete-entity")
@click.argument("entity")
@click.argument("values", nargs=-1, metavar="KEY=VALUE...")
@store_option
@by_option
@json_option
def delete_entity(entity: str, values: tuple[str, ...], store: str, as_json: bool) -> None:
    """Delete the rows of ENTITY with these keys in all of its views.

    KEY=a,b,c deletes the rows of three keys; give every key column of the entity. All is done in a single commit.
    Rows of these keys whose events are not after the deletion do not come back: loads and pushes drop
    them. The receipt says what was removed, and which backups may still hold it.

    \b
    Example:
      shorttail delete-entity user user_id=3 --store store
      shorttail delete-entity user user_id=3,4 --store store --json
    """
    from shorttail.define.text import parse_columns
    from shorttail.define.times import time_text
    from shorttail.engine import Engine

    with Engine.open(store, by=changed_by(), code=False) as engine:
        types = {name: dtype.name for name, dtype in engine.store.newest_catalog().entity(entity).keys.items()}
        receipt = engine.delete_entity(entity, parse_columns(values, types, f"entity '{entity}'"))
    if as_json:
        return print_json(receipt.to_dict())
    keys = f"{receipt.keys:,} key{'' if receipt.keys == 1 else 's'}"
    echo_line(f"{entity}: {keys} erased at {time_text(receipt.time_us)} in commit {receipt.commit}")
    width = max(map(len, receipt.rows))
    for view, rows in receipt.rows.items():
        echo_line(f"  {view:<{width}}  {rows:,} row{'' if rows == 1 else 's'} removed")
    echo_line("loads and pushes drop rows of these keys with events up to that time")
    for event in receipt.backups:
        made = f"{time_text(event.time_us)}, commit {event.detail['commit']}"
        echo_line(f"made before, may hold it: backup {event.detail['path']} ({made})")
