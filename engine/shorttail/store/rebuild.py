"""Gives views new tables, beside those that serve: for a load, and for a definition whose rows change.

A table is made in four steps. While it is *filled*, each commit of edits of its view appends them to a list
(pending.py). When its rows are written and the list is worked off, it is *coming*: edits go to both tables. Readers
that use the old table then prepare to look up the new one. A last, small commit swaps the tables of all views that are
rebuilt, with all else that changes in the catalog: readers see all of it or nothing. If the process is killed before,
nothing has changed, and the next writer forgets the new tables (leftovers.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Final

from shorttail._native.pages import Directory
from shorttail.config import LIMITS
from shorttail.define import clock
from shorttail.define.catalog import Catalog
from shorttail.define.identity import Definition
from shorttail.define.tables import Column, Stored, TableInfo
from shorttail.errors import InvalidArgument, ShorttailError
from shorttail.results import RowCount
from shorttail.store import history, pending
from shorttail.store.commits import is_current
from shorttail.store.environment import Environment
from shorttail.store.erased import Erased
from shorttail.store.history import Event
from shorttail.store.leftovers import drop_leftovers, drop_unused, load_lock
from shorttail.store.load import (
    Budget,
    Partitions,
    Piece,
    Progress,
    ProgressCounter,
    given_rows,
    partition_rows,
    with_page_size,
    write_table,
)
from shorttail.store.preparing import wait_until_ready
from shorttail.store.scan import TableScan
from shorttail.store.table import ColumnBatch, Source, make_layout, null_column, widened

PENDING_COMMIT_BYTES: Final = 1 << 20  # edits that one commit works off: other writers wait for it
PENDING_COMMIT_ENTRIES: Final = 256
YIELD_S: Final = 0.001  # the write lock is not fair: without this pause, waiting writers may never get it
READY_PAGES: Final = 4096  # the directory of a smaller table is built in less than a millisecond
READY_WAIT_S: Final = 120.0


def load(
    environment: Environment,
    view_name: str,
    batches: Iterable[ColumnBatch],
    progress: Progress | None = None,
    memory_bytes: int | None = None,
    allow_shrink: bool = False,
    event: Event | None = None,
    read: Definition | None = None,
) -> RowCount:
    """Replace all rows of a view by the rows in batches. Returns the number of rows stored, with the other counts.

    Of several rows with equal keys, the row with the latest event time is stored; if the event times are equal too, the
    row that was given last. Rows without event times get the time at which the load began. Rows whose keys were erased
    (erased.py) after their events are dropped, and counted as older. The rows go into a new table, which replaces the
    old table in one commit at the end: readers see either all new rows or none, and a failed load changes nothing.
    Upserts and deletes during the load are applied to the old table, and to the new one after its rows. Other writers
    wait at most for one commit of LIMITS.load_commit_bytes at a time. Only one load per store runs at a time; other
    loads wait. The old table is kept for `views rollback`, until the next load.

    memory_bytes: the memory budget (default LIMITS.load_memory_bytes), without the batches themselves. Rows beyond it
    go to an unnamed file in the store's directory. progress: called with numbers of rows whose sum is the number of
    rows given; a row counts half when it has been read and half when it has been written. event: what the history says
    of the load; the numbers of rows are added to it. read: the definition whose features the batches have; None: the
    newest.

    Raises NotFound (the view), InvalidArgument (columns, the budget, or the view was changed meanwhile),
    ResourceExhausted (the disk) and Unavailable (the store at the path is another one).
    """
    budget = Budget.of(memory_bytes)
    with rebuilding(environment, budget, progress) as work:
        before = committed_catalog(environment).stored(view_name)
        rows = count_rows(environment, before)
        shrinking = Shrinking(view_name, 0 if allow_shrink or rows is None else rows)
        work.drop_previous(view_name)
        extra = [column for column in before.table.columns if column.number not in before.definition.columns]
        count = work.fill(before, Filling(before.definition, batches, read=read, extra=tuple(extra)), shrinking.check)
        work.make_ready()
        with work.swap(event and _counted(event, count)) as catalog:
            if not is_current(catalog, before):
                raise InvalidArgument(f"feature view '{view_name}' was changed while it was loaded; load it again")
            work.put_in_place(catalog, view_name, keep=bool(rows))
        return count


def _counted(event: Event, count: RowCount) -> Event:
    rows = {"rows": int(count), "given": count.given, "older": count.older, "duplicate": count.duplicate}
    return replace(event, detail={**event.detail, **rows})


@dataclass(frozen=True)
class Filling:
    """What a new table is filled with.

    definition: of the table. carried: the rows of the present table come first. batches: rows that come then, with the
    features of `read` (None: of the definition). extra: columns that the table has beyond those of the definition. was:
    number of a column -> number of the one that it is widened from.
    """

    definition: Definition
    batches: Iterable[ColumnBatch] = ()
    carried: bool = False
    read: Definition | None = None
    extra: tuple[Column, ...] = ()
    was: dict[int, int] = field(default_factory=dict)


@contextmanager
def rebuilding(environment: Environment, budget: Budget, progress: Progress | None = None) -> Iterator[Rebuild]:
    """Yield what rebuilds tables, and hold the load lock. Tables that are not swapped in are dropped at the end."""
    environment.handle.check_files()  # before a file is made in a store's folder
    with load_lock(environment):
        drop_leftovers(environment)
        try:
            yield Rebuild(environment, budget, progress)
        except BaseException:
            with suppress(ShorttailError):  # on failure the next load deletes the leftovers
                drop_leftovers(environment)
            raise


class Rebuild:
    """Fills tables and swaps them in. Made by rebuilding()."""

    def __init__(self, environment: Environment, budget: Budget, progress: Progress | None) -> None:
        self.environment, self.budget, self.progress = environment, budget, progress
        self.counter = ProgressCounter(progress)
        self.tables: dict[str, TableInfo] = {}  # view -> its new table, complete
        self.pages = 0  # of the new tables, about

    def fill(self, before: Stored, rows: Filling, check: Callable[[int], None] = lambda rows: None) -> RowCount:
        """Fill a new table for a view and bring it up to date. Returns its rows when the bulk of them was written.

        before: the view as it is, with its present table. check: gets the number of rows that were read, and then of
        those that differ in their keys, and may raise. Raises what load() raises.
        """
        table, scan = self._begin(before, rows)
        name = before.view.name
        stored, reading = Stored(rows.definition, table), Stored(rows.read or rows.definition, table)
        read_before = self.counter.read
        erased = Erased.newest(self.environment, before.view.entity.name)  # what is erased later is deleted from it
        with ExitStack() as files:
            parts = Partitions(make_layout(stored), self.budget, self.environment.path, name, files)
            if scan is not None:
                with scan:
                    partition_rows(parts, carried_rows(scan, before.table, table), name, self.counter)
            pieces = given_rows(reading, rows.batches, clock.now_us(), erased)
            n_erased = partition_rows(parts, pieces, name, self.counter)
            given = self.counter.read - read_before
            check(given - n_erased)  # before anything is written; equal keys are not known yet
            table = with_page_size(table, parts.rows)
            stored = Stored(rows.definition, table)
            n_rows = write_table(self.environment, stored, parts, self.counter)
            check(n_rows)
            self.pages += parts.rows.image_bytes // table.page_bytes if table.page_bytes else 0
            older = parts.older + n_erased
        self._catch_up(stored)
        self.tables[name] = table
        return RowCount(n_rows, given, older, given - n_rows - older)

    def _begin(self, before: Stored, rows: Filling) -> tuple[TableInfo, TableScan | None]:
        """Enter a new table in the catalog as being filled, so that edits of the view wait for it from now on.

        Return it with a scan of the rows as of just before that, if they are carried.
        """
        name = before.view.name
        with self.environment.write() as writer, ExitStack() as opened:
            catalog = Catalog.from_json(writer.get_catalog())
            if not is_current(catalog, before):
                raise InvalidArgument(f"feature view '{name}' was changed meanwhile; try again")
            table = catalog.new_table(rows.definition, rows.extra)
            columns = tuple(replace(column, was=rows.was.get(column.number, column.was)) for column in table.columns)
            table = replace(table, columns=columns)
            catalog.filling[name] = table
            scan = None
            if rows.carried:
                scan = opened.enter_context(TableScan(self.environment, name, whole=True))
            writer.put_catalog(catalog.to_json())
            opened.pop_all()
        return table, scan

    def _catch_up(self, stored: Stored) -> None:
        """Apply the edits that wait for a table, and let it take edits at once from then on."""
        layout, name = make_layout(stored), stored.view.name
        while True:
            with self.environment.write() as writer:
                pending.take(writer, stored, layout, PENDING_COMMIT_ENTRIES, PENDING_COMMIT_BYTES)
                if pending.is_empty(writer.txn, stored.table.id):
                    catalog = Catalog.from_json(writer.get_catalog())
                    if catalog.filling.pop(name, None) is None:
                        raise InvalidArgument(f"feature view '{name}' was removed meanwhile")
                    catalog.coming[name] = stored.table
                    writer.put_catalog(catalog.to_json())
                    return
            time.sleep(YIELD_S)

    def make_ready(self) -> None:
        """Wait until the readers that use the old tables have built the directories of the new ones, or READY_WAIT_S.

        A reader that was not ready builds the directory at its first lookup, which takes no time for a small table.
        """
        if self.pages >= READY_PAGES:
            wait_until_ready(self.environment, READY_WAIT_S)

    def drop_previous(self, view_name: str) -> None:
        """Drop the table that `views rollback` would return to, so that a load finds its room free."""
        with self.environment.write() as writer:
            before = Catalog.from_json(writer.get_catalog())
            if view_name not in before.previous:
                return
            catalog = before.copy()
            del catalog.previous[view_name]
            writer.put_catalog(catalog.to_json())
        if drop_unused(self.environment, before, catalog) >= READY_PAGES:
            self.environment.handle.wait_for_readers(2 * LIMITS.idle_rest_ms / 1000)

    @contextmanager
    def swap(self, event: Event | None) -> Iterator[Catalog]:
        """Yield a copy of the newest catalog; commit it at the end of the block, and drop the tables that it lacks."""
        with self.environment.write() as writer:
            before = Catalog.from_json(writer.get_catalog())
            catalog = before.copy()
            yield catalog
            catalog.keep_pinned()
            writer.put_catalog(catalog.to_json())
            if event is not None:
                history.append(writer.txn, event, before, catalog)
        drop_unused(self.environment, before, catalog)

    def put_in_place(self, catalog: Catalog, view_name: str, keep: bool) -> None:
        """Give a view its new table. keep: its old one is kept for `views rollback`."""
        old = catalog.tables[view_name]
        catalog.tables[view_name] = catalog.coming.pop(view_name)
        catalog.previous.pop(view_name, None)
        if keep:
            catalog.previous[view_name] = old


def carried_rows(scan: TableScan, old: TableInfo, new: TableInfo) -> Iterator[Piece]:
    """Yield the rows of an old table with the columns of a new one."""
    n_before = len(old.keys) + 1
    for batch in scan:
        n = batch[0].n
        sources = [(column.values, column.ends, column.nulls()) for column in batch]
        columns: list[Source] = sources[:n_before]
        for column in new.columns:
            place = old.place.get(column.number, None if column.was is None else old.place.get(column.was))
            if place is None:
                columns.append(null_column(column.dtype, n))
            else:
                columns.append(widened(sources[n_before + place], column.dtype))
        yield columns, n, None


def committed_catalog(environment: Environment) -> Catalog:
    with environment.read() as txn:
        return Catalog.from_json(environment.read_catalog_json(txn))


def count_rows(environment: Environment, stored: Stored) -> int | None:
    """Return the number of rows of a table; None if it is damaged, so that a load can replace it."""
    txn, tree = environment.read_tree()
    try:
        directory = Directory(make_layout(stored), stored.table.id)
        return directory.count_rows() if directory.build(tree) else 0
    except ValueError:
        return None
    finally:
        environment.handle.end_read(txn)


@dataclass(frozen=True, slots=True)
class Shrinking:
    """Refuses a load that would leave a view with much fewer rows: such loads often read a file that was cut off.

    A load without rows is refused if any rows are served. A load of less than half of the rows that are served is
    refused if these are LIMITS.shrink_rows_min or more: entities come and go by a few percent from load to load, while
    small tables are edited by hand.
    """

    view_name: str
    served: int

    def check(self, rows: int) -> None:
        """Raise InvalidArgument if a load of so many rows is refused."""
        if (self.served and not rows) or (self.served >= LIMITS.shrink_rows_min and 2 * rows < self.served):
            raise InvalidArgument(
                f"view '{self.view_name}': the load has {rows:,} row{'' if rows == 1 else 's'}, and {self.served:,} "
                "are served; nothing was changed; if so few are right, give allow_shrink=True (--allow-shrink)"
            )
