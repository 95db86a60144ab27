"""Changes of the catalog, and the test whether edits that were encoded before a commit still fit the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shorttail.define.catalog import Catalog, TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import ResourceExhausted
from shorttail.store import history
from shorttail.store.environment import Environment, drop_table
from shorttail.store.history import Event


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
        document = catalog.to_json()
        if document == before.to_json():
            return
        writer.put_catalog(document)
        if event is not None:
            history.append(writer.txn, event, before, catalog)
    kept = {table.id for table in catalog.tables.values()}
    for table in before.tables.values():
        if table.id not in kept:
            with suppress(ResourceExhausted):  # the catalog is already committed; the next load deletes the rest
                drop_table(environment, table.id)


def is_current(catalog: Catalog, view: FeatureView, table: TableInfo) -> bool:
    """Return whether the catalog still gives the view this table, and the same keys and features (names and types)."""
    now = catalog.views.get(view.name)
    return now is not None and _same_columns(now, view) and catalog.tables[view.name] == table


def _same_columns(a: FeatureView, b: FeatureView) -> bool:
    return list(a.keys.items()) == list(b.keys.items()) and [(f.name, f.dtype) for f in a.features] == [
        (f.name, f.dtype) for f in b.features
    ]
