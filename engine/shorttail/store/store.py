"""Store: a Snapshot with bulk loads, upserts, deletes and catalog changes. Each is durable when it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from shorttail.define import clock
from shorttail.define.catalog import Catalog
from shorttail.define.durations import duration_text
from shorttail.define.identity import Definition
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.results import RowCount
from shorttail.store import commits, history
from shorttail.store.edits import Delete, Edit, TableDamaged, Upsert
from shorttail.store.environment import Environment, count_pages, table_pages
from shorttail.store.erased import Erased
from shorttail.store.erasing import Erasure, erase
from shorttail.store.history import Event
from shorttail.store.leftovers import forget_dead
from shorttail.store.lmdb_file import PAGE_BYTES, SETTINGS_KEY
from shorttail.store.load import Progress
from shorttail.store.mapping import size_text, usable_pages
from shorttail.store.rebuild import load
from shorttail.store.settings import StoreSettings
from shorttail.store.snapshot import Snapshot
from shorttail.store.table import (
    Array,
    ColumnBatch,
    count_keys,
    count_rows,
    split_batches,
)
from shorttail.store.view_edits import ViewEdits

COMMIT_ROWS = 65_536  # rows in one commit: longer upserts and deletes are split, so that dirty pages fit LMDB's list


class Store(Snapshot):
    """One store directory with its feature views, for reading and writing.

    Any number of Stores may be open on one path, in this and other processes; writers take turns. Thread-safe; for
    lookups see Snapshot.enter(). A write does not move the snapshot: the next enter() or refresh() shows its rows.
    """

    def __init__(self, environment: Environment) -> None:
        """Called by open() only."""
        super().__init__(environment)
        self._erased: dict[str, Erased] = {}  # entity -> the list as of its last upsert

    def upsert(self, view_name: str, batch: ColumnBatch) -> RowCount:
        """Insert rows. A stored row with an equal key is replaced unless its event time is later. Returns their count.

        Features that the batch does not give keep the values of the row that is replaced. Up to COMMIT_ROWS rows are
        written atomically; a longer batch takes several commits of COMMIT_ROWS. Raises NotFound (view), InvalidArgument
        (columns), ResourceExhausted (disk) and Internal (damaged table).
        """
        if not len(batch):
            self.newest_catalog().view(view_name)  # an unknown view is an error even without rows
        pieces = split_batches([batch], COMMIT_ROWS)
        return RowCount.total([self._commit_one(Upsert(view_name, piece)) for piece in pieces])

    def delete(self, view_name: str, keys: Sequence[Array]) -> int:
        """Remove the rows with the given keys. Returns the number of rows removed.

        keys: one array [n] per key column; none for the only row of a view without keys. Up to COMMIT_ROWS keys are
        removed atomically; more take several commits. Raises what upsert() raises.
        """
        removed, n_keys = 0, count_keys(keys)
        if not n_keys:
            self.newest_catalog().view(view_name)
        for start in range(0, n_keys, COMMIT_ROWS):
            removed += self._commit_one(Delete(view_name, [column[start : start + COMMIT_ROWS] for column in keys]))
        return removed

    def delete_entity(self, entity: str, keys: Mapping[str, Array]) -> Erasure:
        """Delete the rows of these keys in every view of an entity, and keep them away: see erasing.erase()."""
        erasure = erase(self.environment, entity, keys, self.event("deleted", f"entity {entity}"))
        self.release_if_stale()
        return erasure

    def _commit_one(self, edit: Edit) -> Any:
        (outcome,) = self.commit([edit])
        if isinstance(outcome, ShorttailError):
            raise outcome
        return outcome

    def commit(self, edits: Sequence[Edit]) -> list[int | ShorttailError]:
        """Apply all edits, in the order given, in one durable commit.

        Returns per edit the RowCount of an Upsert or the number of rows that a Delete removed, or its error: an edit
        that cannot be applied (unknown view, wrong columns, damaged table) is left out and does not affect the others.
        Counts are those of edits applied one after the other. Raises errors that concern all edits, such as
        ResourceExhausted; then nothing was written.
        """
        outcomes: dict[int, int | ShorttailError] = {}
        waiting, separately = list(range(len(edits))), False
        while waiting:
            views = self._encode(edits, waiting, separately, outcomes)
            waiting = []
            try:
                with self.environment.write() as writer:
                    catalog, now_us = forget_dead(writer, self._parse(writer.get_catalog())), clock.now_us()
                    for view in views:
                        if view.is_current(catalog, writer):
                            outcomes |= view.apply(writer, now_us)
                        else:
                            waiting += view.numbers  # it has another table, or keys were erased: encode again
            except TableDamaged as fault:
                # The whole transaction is aborted and repeated: without the edit that found the damage or, if a step of
                # several edits found it, with every edit encoded separately.
                separately = len(fault.numbers) > 1
                if not separately:
                    outcomes[fault.numbers[0]] = fault.error
                waiting = [i for view in views for i in view.numbers if separately or i != fault.numbers[0]]
            waiting.sort()
        self.release_if_stale()  # a process that only writes must not hold on to its first snapshot
        return [outcomes[i] for i in range(len(edits))]

    def _encode(
        self, edits: Sequence[Edit], numbers: list[int], separately: bool, outcomes: dict[int, int | ShorttailError]
    ) -> list[ViewEdits]:
        """Encode the numbered edits, grouped by view, before the write lock is taken. Adds errors to outcomes."""
        catalog = self.newest_catalog()
        by_view: dict[str, list[tuple[int, Edit]]] = {}
        for number in numbers:
            by_view.setdefault(edits[number].view, []).append((number, edits[number]))
        views = []
        for name, numbered in by_view.items():
            try:
                view, errors = ViewEdits.encode(
                    catalog, name, numbered, separately, self._newest_erased(catalog.view(name))
                )
                outcomes |= errors
                views.append(view)
            except ShorttailError as error:
                outcomes |= {number: error for number, _ in numbered}
        return [view for view in views if view.numbers]

    def _newest_erased(self, view: FeatureView) -> Erased:
        name = view.entity.name
        self._erased[name] = Erased.newest(self.environment, name, self._erased.get(name))
        return self._erased[name]

    def newest_catalog(self) -> Catalog:
        """Return the catalog as of the last commit of any process. The caller must not change it."""
        handle = self.environment.handle
        with self.environment.read():  # reopens LMDB if its disk failed
            txn, tree = handle.read_tree()  # raises that the file was overwritten, where LMDB would follow it
            try:
                with handle.damage():
                    return self._parse(self.environment.read_catalog_json(tree))
            finally:
                handle.end_read(txn)

    # -- the catalog -----------------------------------------------------------------------------------------------

    def edit_catalog(
        self, action: str = "changed", subject: str = "", detail: dict[str, Any] | None = None
    ) -> AbstractContextManager[Catalog]:
        """Return a context that yields a copy of the newest catalog and commits it: see commits.edit_catalog().

        action, subject, detail: as in history.Event. The detail may be filled within the context.
        """
        return commits.edit_catalog(self.environment, self.event(action, subject, detail))

    def event(self, action: str, subject: str, detail: dict[str, Any] | None = None) -> Event:
        """Return an event for the history, of this store's user."""
        return Event(action, subject, self.by, detail={} if detail is None else detail)

    def history(self) -> list[Event]:
        """Return all events of the history, oldest first. Raises Internal if one is damaged."""
        with self.environment.read() as txn:
            return list(history.read(txn))

    def set_max_clock_skew(self, skew_us: int) -> None:
        """Set how far event times may be ahead of the clock, for all processes. A commit, unless it is so already."""
        with self.edit_catalog("set", "max_clock_skew", {"to": duration_text(skew_us)}) as catalog:
            catalog.max_clock_skew_us = skew_us
        self.refresh()

    def rollback(self, view_name: str) -> tuple[int, int]:
        """Let lookups read the table that a view had before its last load. Returns its rows, and those of the other.

        The other table is kept instead, so that a second call undoes the first. Raises NotFound, and InvalidArgument if
        there is no such table.
        """
        detail: dict[str, Any] = {}
        with self.edit_catalog("rolled back", f"view {view_name}", detail) as catalog:
            stored = catalog.stored(view_name)
            table = catalog.previous.get(view_name)
            if table is None:
                raise InvalidArgument(
                    f"feature view '{view_name}' has no earlier table: one is kept from a load until the next load, or"
                    " until the view's rows change"
                )
            if not set(stored.definition.columns) <= table.place.keys():
                raise InvalidArgument(
                    f"feature view '{view_name}' has features that its earlier table lacks; apply the definitions of"
                    " that time first"
                )
            now = self.count(view_name)
            catalog.tables[view_name], catalog.previous[view_name] = table, stored.table
            detail["rows"] = self._count_table(table.id)
        self.refresh()
        return detail["rows"], now

    def _count_table(self, table_id: int) -> int:
        writer = self.environment.writer
        assert writer is not None
        return sum(count_rows(page) for _, page in table_pages(writer.txn, table_id))

    def set_setting(self, name: str, text: str) -> None:
        """Change a setting of StoreSettings for all processes. text: as a user writes it; "default" unsets it.

        Raises InvalidArgument for a wrong value, and a map_size that the store has passed already.
        """
        with self.environment.write() as writer:
            before = StoreSettings.of(writer.txn)
            changed = before.with_value(name, text)
            if changed == before:
                return
            used = count_pages(writer.txn)
            if changed.map_size is not None and used > usable_pages(changed.map_size):
                raise InvalidArgument(
                    f"map_size {text!r}: {size_text(used * PAGE_BYTES)} of store '{self.path}' are in use, and deletes "
                    "need some room; give more, or delete rows first"
                )
            writer.txn.put(SETTINGS_KEY, changed.encode())
            catalog = self._parse(writer.get_catalog())
            event = self.event("set", name, {"to": changed.shown()[name]})
            history.append(writer.txn, event, catalog, catalog)
        self.environment.handle.sync()

    def settings(self) -> StoreSettings:
        """Return the settings that the catalog does not have, as of the last commit."""
        with self.environment.read() as txn:
            return StoreSettings.of(txn)

    # -- bulk load -------------------------------------------------------------------------------------------------

    def load(
        self,
        view_name: str,
        batches: Iterable[ColumnBatch],
        progress: Progress | None = None,
        memory_bytes: int | None = None,
        allow_shrink: bool = False,
        detail: dict[str, Any] | None = None,
        read: Definition | None = None,
    ) -> RowCount:
        """Replace all rows of a view by the rows in batches, at once for every reader. Returns the rows stored.

        rebuild.load() describes equal keys, concurrent upserts, memory_bytes, allow_shrink, progress and errors.
        detail: what the history says of the load beside the numbers of rows. read: the definition whose features the
        batches have; None: the newest.
        """
        event = self.event("loaded", f"view {view_name}", detail)
        return load(self.environment, view_name, batches, progress, memory_bytes, allow_shrink, event, read)
