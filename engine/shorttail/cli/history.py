"""`shorttail history`: what was changed in a store, by whom and when, and what answered at a time."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from shorttail.cli.options import json_option, opened
from shorttail.cli.output import echo_line, print_json, print_table
from shorttail.cli.where import store_or_server


def as_time(context: click.Context, parameter: click.Parameter, value: str | None) -> datetime | None:
    """Return a time in ISO 8601 of the command line. Raises BadParameter."""
    try:
        return None if value is None else datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a time; write 2026-11-20T10:00") from None


@click.command()
@click.argument("name", required=False)
@store_or_server
@click.option("--at", metavar="TIME", callback=as_time, help="Show what answered at this time, in UTC.")
@click.option("--limit", metavar="N", type=click.IntRange(1), default=50, show_default=True, help="Newest events.")
@json_option
def history(name: str | None, store: str, at: datetime | None, limit: int, as_json: bool) -> None:
    """Show what was changed: applied, deployed, promoted, rolled back, loaded, set, backed up or deleted.

    NAME is a view, a model or an entity; without it, all is shown. The newest event is the last line.

    \b
    Example:
      shorttail history fraud --store store
      shorttail history --at 2026-11-20T10:00 --store store
    """
    from shorttail.registry.history import History, line, when

    with opened(store) as target:
        events = History(target.history()).of(name)
    if at is not None:
        answers = events.at(at)
        if name is not None:
            answers = {what: state for what, state in answers.items() if what.partition(" ")[2] == name}
        if as_json:
            return print_json(answers)
        return print_table(["what", "answered"], [[what, _state(state)] for what, state in sorted(answers.items())])
    found = events[-limit:]
    if as_json:
        return print_json([_document(event) for event in found])
    for event in found:
        echo_line(f"{when(event.time_us)}  {event.who}  {line(event)}")


def _document(event: Any) -> dict[str, Any]:
    names = ("number", "time_us", "who", "action", "subject", "detail", "answers")
    return {name: getattr(event, name) for name in names}


def _state(state: dict[str, Any]) -> str:
    """Return what answered as text: "version 3 (sha256 1f3a...), canary version 4 at 5%"."""
    if "table" in state:
        return f"table {state['table']}"
    parts = [f"version {state['version']} (sha256 {state['sha256'][:12]})"]
    shares = [(kind, state[kind]) for kind in ("canary", "shadow") if kind in state]
    parts += [f"{kind} version {share['version']} at {share['percent']:g}%" for kind, share in shares]
    return ", ".join(parts)
