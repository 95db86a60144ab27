"""Questions to the history of a store: what happened to a view or a model, and what answered at a time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from shorttail.define.names import quoted, suggestion
from shorttail.errors import InvalidArgument, NotFound
from shorttail.store.history import Event

KINDS = ("view", "model", "entity")


class History(list[Event]):
    """Events of a store, oldest first."""

    def of(self, name: str | None) -> History:
        """Return the events that concern a view, a model or an entity; all for None. Raises NotFound for no events."""
        if name is None:
            return self
        wanted = {f"{kind} {name}" for kind in KINDS}
        found = [event for event in self if event.subject in wanted or wanted & event.answers.keys()]
        if not found:
            known = {what.partition(" ")[2] for event in self for what in (event.subject, *event.answers)} - {""}
            raise NotFound(f"the history has nothing of {quoted(name)}{suggestion(name, sorted(known), 'names')}")
        return History(found)

    def at(self, time: datetime) -> dict[str, dict[str, Any]]:
        """Return what answered at a time: "model NAME" and "view NAME" -> what store.history.answers_of says of it.

        time: without a time zone it is in UTC. Raises InvalidArgument for a time before the first event.
        """
        time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
        time_us = int(time.timestamp() * 1e6)
        if not self or time_us < self[0].time_us:
            first = f"; the first event is of {when(self[0].time_us)}" if self else ": it is empty"
            raise InvalidArgument(f"the history does not reach back to {time.isoformat(timespec='seconds')}{first}")
        answers: dict[str, dict[str, Any]] = {}
        for event in self:
            if event.time_us > time_us:
                break
            for name, state in event.answers.items():
                if state is None:
                    answers.pop(name, None)
                else:
                    answers[name] = state
        return answers


def when(time_us: int) -> str:
    """Return a time in microseconds since 1970 UTC as text, to the second."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def line(event: Event) -> str:
    """Return what an event did, in one line without its time and its author."""
    detail = event.detail
    said = []
    if "version" in detail:
        said.append(f"version {detail['version']}")
    if "to" in detail:
        said.append(detail["to"])
    if "percent" in detail:
        said.append(f"{detail['percent']:g}%")
    if "path" in detail:
        said.append(f"commit {detail['commit']} to {detail['path']}")
    if "keys" in detail:
        said.append(f"{detail['keys']:,} key{'' if detail['keys'] == 1 else 's'}")
    if "rows" in detail:
        lost = [f"{detail[kind]:,} {kind}" for kind in ("older", "duplicate") if detail.get(kind)]
        rows = f"{detail['rows']:,} row{'' if detail['rows'] == 1 else 's'}"
        said.append(f"{rows} ({', '.join(lost)})" if lost else rows)
    if detail.get("changes"):
        said.append("; ".join(f"{kind} {what}" for kind, what, _ in detail["changes"]))
    source = detail.get("file") or ", ".join(detail.get("from", ()))
    if source:
        said.append(f"from {source}")
    if detail.get("run"):
        said.append(f"run {detail['run']}")
    text = " ".join(part for part in (event.action, event.subject) if part)
    return f"{text}: {', '.join(said)}" if said else text
