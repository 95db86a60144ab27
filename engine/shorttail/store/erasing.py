"""Erases keys of an entity: one commit deletes their rows in every view and enters them in the list of erased keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from shorttail.config import LIMITS
from shorttail.define import clock
from shorttail.define.catalog import Catalog
from shorttail.define.entities import Entity
from shorttail.define.times import time_text
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.store import erased, history
from shorttail.store.edits import Delete, TableDamaged
from shorttail.store.environment import Environment, WriteTransaction
from shorttail.store.erased import HASH_BYTES, Erased
from shorttail.store.history import BACKED_UP, Event
from shorttail.store.table import Array, count_keys, key_sources
from shorttail.store.view_edits import ViewEdits

HASHES_SHOWN: Final = 20  # in the event of the history; the list has all of them


@dataclass(frozen=True)
class Erasure:
    """The receipt of keys that were erased.

    keys: how many. rows: view -> the number of its rows that were removed. time_us: events up to this time do not come
    back. commit: its number. event: its number in the history. hashes: of the keys, in hexadecimal, in their order.
    backups: the events of the backups that were made before, and so may still hold the rows.
    """

    entity: str
    keys: int
    rows: dict[str, int]
    time_us: int
    commit: int
    event: int
    hashes: list[str]
    backups: list[Event]

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain values, ready for JSON."""
        backups = [{"time": time_text(event.time_us), **event.detail} for event in self.backups]
        return {
            "entity": self.entity,
            "keys": self.keys,
            "rows": self.rows,
            "time": time_text(self.time_us),
            "commit": self.commit,
            "event": self.event,
            "hashes": self.hashes,
            "backups": backups,
        }


def erase(environment: Environment, name: str, keys: Mapping[str, Array], event: Event) -> Erasure:
    """Erase keys of an entity, in one commit. event: what the history says of it; numbers and hashes are added.

    keys: key column -> array [n], as ColumnBatch has them; empty for an entity without keys. Raises NotFound (entity),
    InvalidArgument (no views, a view with other keys, too many keys), ResourceExhausted (disk) and Internal (a damaged
    table, or a damaged list); then nothing is erased.
    """
    while True:
        with environment.read() as txn:
            catalog = Catalog.from_json(environment.read_catalog_json(txn))
        entity = catalog.entity(name)
        views = views_to_erase(catalog, entity)
        n = count_keys(list(keys.values()))
        if n * len(views) > LIMITS.commit_rows:
            most = LIMITS.commit_rows // len(views)
            raise InvalidArgument(f"entity '{name}': {n:,} keys; give at most {most:,} at once, which fit one commit")
        known = Erased.newest(environment, name)
        deletes = [_deletes(view, catalog, keys, known) for view in views]
        sources = dict(zip(views[0].keys, key_sources(views[0], [keys[key] for key in views[0].keys]), strict=True))
        with environment.write() as writer:
            now = Catalog.from_json(writer.get_catalog())
            unchanged = all(view.is_current(now, writer) for view in deletes)
            if not unchanged or len(views_of(now, entity)) != len(views):
                continue
            hashes = erased.hash_keys(erased.secret_of(writer.txn), sources, n).tobytes()
            time_us = max(clock.now_us(), known.last_us + 1)
            rows = {view.stored.view.name: _removed(view, writer, time_us) for view in deletes}
            erased.append(writer.txn, known, hashes, time_us)
            shown = [hashes[at : at + HASH_BYTES].hex() for at in range(0, len(hashes), HASH_BYTES)]
            detail = {"keys": n, "rows": sum(rows.values()), "views": rows, "hashes": shown[:HASHES_SHOWN]}
            history.append(writer.txn, replace(event, detail=detail), now, now)
            number = history.last_number(writer.txn)
            writer.put_catalog(now.to_json())  # the same: so that the commit counts also if there were no rows
            commit = environment.sequence(writer.txn) + 1
        environment.handle.sync()  # a receipt is not undone, whatever the store's durability
        with environment.read() as txn:
            earlier = (found for found in history.read(txn) if found.number < number)
            backups = [found for found in earlier if found.action == BACKED_UP]
        return Erasure(name, n, rows, time_us, commit, number, shown, backups)


def views_of(catalog: Catalog, entity: Entity) -> list[FeatureView]:
    """Return the views of an entity, also those that were defined with an older one of its name."""
    return [view for view in catalog.views.values() if view.entity.name == entity.name]


def views_to_erase(catalog: Catalog, entity: Entity) -> list[FeatureView]:
    """Return the views of an entity. Raises InvalidArgument if there are none, or one has other keys."""
    views = views_of(catalog, entity)
    if not views:
        raise InvalidArgument(f"entity '{entity.name}' has no feature views, so there is nothing to delete")
    for view in views:
        if view.keys != entity.keys:
            raise InvalidArgument(
                f"feature view '{view.name}' has the keys of an older entity '{entity.name}' "
                f"({', '.join(view.keys) or 'none'}); apply its definition again first"
            )
    return views


def _deletes(view: FeatureView, catalog: Catalog, keys: Mapping[str, Array], known: Erased) -> ViewEdits:
    edit = Delete(view.name, [keys[key] for key in view.keys])
    edits, errors = ViewEdits.encode(catalog, view.name, [(0, edit)], True, known)
    for error in errors.values():
        raise error
    return edits


def _removed(view: ViewEdits, writer: WriteTransaction, now_us: int) -> int:
    """Delete the rows in all tables of a view. Return how many of them lookups found. Raises Internal (damage)."""
    try:
        return view.apply(writer, now_us)[0]
    except TableDamaged as fault:
        raise fault.error from None
