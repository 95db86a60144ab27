"""Changes of the catalog, and the test whether what was encoded before a commit still fits the view."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shorttail.define.catalog import Catalog
from shorttail.define.tables import Stored
from shorttail.store import history
from shorttail.store.environment import Environment
from shorttail.store.history import Event
from shorttail.store.leftovers import drop_unused


@contextmanager
def edit_catalog(environment: Environment, event: Event | None = None) -> Iterator[Catalog]:
    """Yield a copy of the newest catalog; commit the changed copy when the `with` block ends without an exception.

    event: what the history says of the change; None for a change that only this process needs to know. Tables that the
    catalog no longer names are deleted afterwards. Other writers wait while the block runs, so it must be short. Raises
    what Environment.write() raises.
    """
    with environment.write() as writer:
        before = Catalog.from_json(writer.get_catalog())
        catalog = before.copy()
        yield catalog
        catalog.keep_pinned()
        document = catalog.to_json()
        if document == before.to_json():
            return
        writer.put_catalog(document)
        if event is not None:
            history.append(writer.txn, event, before, catalog)
    drop_unused(environment, before, catalog)


def is_current(catalog: Catalog, stored: Stored) -> bool:
    """Whether the catalog still gives the view this table, and the same keys and features (names, types, columns)."""
    name = stored.view.name
    if name not in catalog.views:
        return False
    now = catalog.stored(name)
    return now.table == stored.table and _rows(now) == _rows(stored)


def _rows(stored: Stored) -> object:
    view, columns = stored.view, stored.definition.columns
    return list(view.keys.items()), [(f.name, f.dtype) for f in view.features], columns
