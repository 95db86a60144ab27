"""Store: bulk loads, upserts, deletes and changes of the catalog, each durable when it returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from shorttail.define.catalog import Catalog
from shorttail.errors import ShorttailError
from shorttail.store import commits
from shorttail.store.edits import DamagedBy, Delete, Edit, TableEdits, Upsert
from shorttail.store.load import Progress, load
from shorttail.store.snapshot import Snapshot
from shorttail.store.table import (
    Array,
    ColumnBatch,
    pieces,
)

COMMIT_ROWS = 65_536  # a longer upsert or delete takes several commits, so that its dirty pages fit LMDB's list


class Store(Snapshot):
    """The feature views of one store directory, for reading and writing.

    Many may be open on one path, in this and other processes; writers take turns. Thread-safe: see Snapshot.enter() for
    lookups. Writing does not move the snapshot: enter() and refresh() show what was written.
    """

    def upsert(self, view_name: str, batch: ColumnBatch) -> int:
        """Insert the rows, or replace those of equal key unless their event time is later. Returns the rows given.

        All or nothing up to COMMIT_ROWS rows; more are committed so many at a time. Raises NotFound (view),
        InvalidArgument (columns), ResourceExhausted (disk), Internal (damaged table).
        """
        if not len(batch):
            self._committed_catalog().view(view_name)  # nothing to do, but a name that is wrong is wrong
        for piece in pieces([batch], COMMIT_ROWS):
            self._commit_one(Upsert(view_name, piece))
        return len(batch)

    def delete(self, view_name: str, keys: Sequence[Array]) -> int:
        """Remove the rows of these keys, given as one column [n] for each key. Returns how many there were.

        All or nothing up to COMMIT_ROWS keys. Raises what upsert() raises.
        """
        removed, n_keys = 0, len(keys[0]) if keys else 0
        if not n_keys:
            self._committed_catalog().view(view_name)
        for start in range(0, n_keys, COMMIT_ROWS):
            removed += self._commit_one(Delete(view_name, [column[start : start + COMMIT_ROWS] for column in keys]))
        return removed

    def _commit_one(self, edit: Edit) -> int:
        (outcome,) = self.commit([edit])
        if isinstance(outcome, ShorttailError):
            raise outcome
        return outcome

    def commit(self, edits: Sequence[Edit]) -> list[int | ShorttailError]:
        """Apply all edits, in their order, in one durable commit.

        Gives for each edit the rows given (Upsert) or removed (Delete), or its error: an edit that cannot be applied
        (unknown view, wrong columns, damaged table) is left out and disturbs no other. Raises what concerns them all,
        ResourceExhausted for one; then nothing was written.
        """
        outcomes: dict[int, int | ShorttailError] = {}
        waiting, apart = list(range(len(edits))), False
        while waiting:
            tables = self._encode(edits, waiting, apart, outcomes)
            waiting = []
            try:
                with self.environment.write() as writer:
                    for table in tables:
                        if commits.is_current(self._parse(writer.get_catalog()), table.view, table.table):
                            given = {i: len(e.batch) for i in table.numbers if isinstance(e := edits[i], Upsert)}
                            outcomes |= given | table.apply(writer)
                        else:
                            waiting += table.numbers  # a load has put another table in its place: encode for that one
            except DamagedBy as fault:
                # All that was written is undone, so all is done again: without the edit that met the damage, or, if it
                # may have been one of several, with each apart.
                apart = len(fault.numbers) > 1
                if not apart:
                    outcomes[fault.numbers[0]] = fault.error
                waiting = [i for table in tables for i in table.numbers if apart or i != fault.numbers[0]]
            waiting.sort()
        self.rest()  # whoever only writes must not keep the pages of the snapshot that it opened the store with
        return [outcomes[i] for i in range(len(edits))]

    def _encode(
        self, edits: Sequence[Edit], numbers: list[int], apart: bool, outcomes: dict[int, int | ShorttailError]
    ) -> list[TableEdits]:
        """Those edits by table, encoded before the write lock is taken; the errors of some go to outcomes."""
        catalog = self._committed_catalog()
        by_view: dict[str, list[tuple[int, Edit]]] = {}
        for number in numbers:
            by_view.setdefault(edits[number].view, []).append((number, edits[number]))
        tables = []
        for view, numbered in by_view.items():
            try:
                table = TableEdits.of(catalog.view(view), catalog.tables[view])
                outcomes |= table.encode(numbered, apart)
                tables.append(table)
            except ShorttailError as error:
                outcomes |= {number: error for number, _ in numbered}
        return [table for table in tables if table.steps]

    def _committed_catalog(self) -> Catalog:
        """The catalog as of the last commit, by any process."""
        with self.environment.read() as txn:
            return self._parse(self.environment.read_catalog_json(txn))

    # -- the catalog -----------------------------------------------------------------------------------------------

    def edit_catalog(self) -> AbstractContextManager[Catalog]:
        """A copy of the newest catalog to change: see commits.edit_catalog()."""
        return commits.edit_catalog(self.environment)

    # -- bulk load -------------------------------------------------------------------------------------------------

    def load(
        self,
        view_name: str,
        batches: Iterable[ColumnBatch],
        progress: Progress | None = None,
        memory_bytes: int | None = None,
    ) -> int:
        """Replace all rows of the view by these, at once for every reader. Returns the rows stored.

        See load.load() for what happens to equal keys, to what is upserted meanwhile, and for memory and progress.
        Raises NotFound (view), InvalidArgument (columns; or the view was changed), ResourceExhausted (disk).
        """
        return load(self.environment, view_name, batches, progress, memory_bytes)
