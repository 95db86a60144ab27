"""Store: bulk loads, upserts, deletes and changes of the catalog, each durable when it returns."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

from shorttail._native.pages import Layout, SortedRows, join
from shorttail.config import LIMITS
from shorttail.definitions import FeatureView
from shorttail.errors import Internal, InvalidArgument, ShorttailError
from shorttail.store.catalog import Catalog, TableInfo
from shorttail.store.environment import PAGE_BYTES, Writer, drop_table, page_key, table_ids, translated
from shorttail.store.snapshot import Snapshot
from shorttail.store.table import (
    Array,
    ColumnBatch,
    depth_to_grow,
    encode_keys,
    encode_rows,
    make_layout,
    pieces,
)

LOAD_ROWS = 65_536  # rows that are encoded at a time
COMMIT_ROWS = 65_536  # a longer upsert or delete takes several commits, so that its dirty pages fit LMDB's list
ROWS_PER_PAGE_MIN = 8

Progress = Callable[[int], object]  # is given the number of rows read since its last call


@dataclass(frozen=True, slots=True)
class Upsert:
    """Rows to put into a view."""

    view: str
    batch: ColumnBatch


@dataclass(frozen=True, slots=True)
class Delete:
    """Rows to remove from a view: one column [n] for each key."""

    view: str
    keys: Sequence[Array]


Edit = Upsert | Delete


class _Encoded(NamedTuple):
    view: FeatureView
    table: TableInfo
    rows: SortedRows


class _Damaged(Exception):
    """The edit of that number met a damaged table."""

    def __init__(self, number: int, error: Internal) -> None:
        super().__init__(number)
        self.number = number
        self.error = error


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
        for piece in pieces([batch], COMMIT_ROWS):
            self._commit_one(Upsert(view_name, piece))
        return len(batch)

    def delete(self, view_name: str, keys: Sequence[Array]) -> int:
        """Remove the rows of these keys, given as one column [n] for each key. Returns how many there were.

        All or nothing up to COMMIT_ROWS keys. Raises what upsert() raises.
        """
        removed = 0
        for start in range(0, len(keys[0]) if keys else 0, COMMIT_ROWS):
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
        outcomes: list[int | ShorttailError] = [0] * len(edits)
        waiting = list(range(len(edits)))
        while waiting:
            # Encoded before the write lock is taken, for the tables as they are now.
            encoded = [self._encode(edits[i]) for i in waiting]
            again: list[int] = []
            try:
                with self.environment.write() as writer:
                    for i, rows in zip(waiting, encoded, strict=True):
                        if isinstance(rows, ShorttailError):
                            outcomes[i] = rows
                        elif not self._is_current(writer, rows.view, rows.table):
                            again.append(i)  # a load has put another table in its place: encode again for that one
                        else:
                            outcomes[i] = self._apply(writer, i, edits[i], rows)
            except _Damaged as damaged:
                # What this edit had written is undone with all the rest: the others are applied again, without it.
                outcomes[damaged.number] = damaged.error
                again = [i for i in waiting if i != damaged.number]
            waiting = again
        return outcomes

    def _committed(self, view_name: str) -> tuple[FeatureView, TableInfo]:
        """That view and its table as of the last commit, of whatever process. Raises NotFound."""
        with self.environment.read() as txn:
            catalog = self._parse(self.environment.read_catalog_json(txn))
        return catalog.view(view_name), catalog.tables[view_name]

    def _is_current(self, writer: Writer, view: FeatureView, table: TableInfo) -> bool:
        catalog = self._parse(writer.get_catalog())
        now = catalog.views.get(view.name)
        return now is not None and _same_columns(now, view) and catalog.tables[view.name] == table

    def _encode(self, edit: Edit) -> _Encoded | ShorttailError:
        """The rows of an edit, or only their keys, for the view's table as of the last commit."""
        try:
            view, table = self._committed(edit.view)
            layout = make_layout(view, table)
            parts = (
                encode_rows(layout, view, edit.batch)
                if isinstance(edit, Upsert)
                else _key_rows(layout, view, edit.keys)
            )
            return _Encoded(view, table, SortedRows(layout, [parts]))
        except ShorttailError as error:
            return error

    def _apply(self, writer: Writer, number: int, edit: Edit, encoded: _Encoded) -> int:
        apply = self._merge if isinstance(edit, Upsert) else self._remove
        try:
            with self._sound(edit.view):
                return apply(writer, encoded.table, encoded.rows)
        except Internal as error:
            raise _Damaged(number, error) from None

    def _merge(self, writer: Writer, table: TableInfo, rows: SortedRows) -> int:
        # LMDB counts the entries of all tables: a table among large ones is allowed to be deeper, which is harmless.
        n_buckets = writer.txn.stat()["entries"] + rows.image_bytes() // rows.layout.page_bytes + 1
        depth_grow = depth_to_grow(n_buckets)
        at = 0
        while at < len(rows):
            key, page = writer.find_bucket(table.id, rows.hash(at))
            at, images = rows.merge(at, key, page, table.id, depth_grow)
            for new_key, image in images:
                writer.put_page(table.id, new_key, image)
        return len(rows)

    def _remove(self, writer: Writer, table: TableInfo, rows: SortedRows) -> int:
        at = removed_in_all = 0
        while at < len(rows):
            key, page = writer.find_bucket(table.id, rows.hash(at))
            if page is None:
                return 0
            at, removed, image = rows.remove(at, key, page, table.id)
            if image is not None:
                writer.put_page(table.id, key, image)
                _join_siblings(writer, table, rows.layout, key, image)
            removed_in_all += removed
        return removed_in_all

    # -- the catalog -----------------------------------------------------------------------------------------------

    @contextmanager
    def edit_catalog(self) -> Iterator[Catalog]:
        """A copy of the newest catalog to change; it is committed when the block ends, unless by an exception.

        Tables that it no longer names are deleted afterwards. Writers wait meanwhile: be quick.
        """
        with self.environment.write() as writer:
            before = Catalog.from_json(writer.get_catalog())
            catalog = before.copy()
            yield catalog
            document = catalog.to_json()
            if document == before.to_json():
                return
            writer.put_catalog(document)
        kept = {table.id for table in catalog.tables.values()}
        for table in before.tables.values():
            if table.id not in kept:
                drop_table(self.environment, table.id)

    # -- bulk load -------------------------------------------------------------------------------------------------

    def load(self, view_name: str, batches: Iterable[ColumnBatch], progress: Progress | None = None) -> int:
        """Replace all rows of the view by these. Of rows with equal keys that of the latest event time stays.

        The rows are sorted in memory and written to a new table, which takes the place of the old one in one commit at
        the end: readers see all of it or nothing, and a load that fails changes nothing. Rows that are upserted
        meanwhile are replaced too. One load runs at a time; others wait. Returns the rows
        stored. Raises what upsert() raises.
        """
        with self._loading():
            self._drop_leftovers()
            view, old = self._committed(view_name)
            table = self._new_table()
            layout = make_layout(view, table)
            rows = _read_all(layout, view, batches, progress)
            layout, table = _with_page_size(view, table, rows)
            self._write_table(layout, table, rows)
            with self.environment.write() as writer:
                if not self._is_current(writer, view, old):
                    raise InvalidArgument(f"feature view '{view_name}' was changed while it was loaded; load it again")
                catalog = Catalog.from_json(writer.get_catalog())
                catalog.tables[view_name] = table
                writer.put_catalog(catalog.to_json())
            drop_table(self.environment, old.id)
            return len(rows)

    def _write_table(self, layout: Layout, table: TableInfo, rows: SortedRows) -> None:
        """Write the table, which no catalog names yet, in several commits."""
        if not len(rows):
            return
        depth_grow = depth_to_grow(rows.image_bytes() // layout.page_bytes + 1)
        pages = rows.buckets(layout, table.id, depth_grow)
        pages_per_commit = max(1, LIMITS.load_commit_bytes // (layout.page_bytes + PAGE_BYTES))
        while (first := next(pages, None)) is not None:
            with self.environment.write() as writer:
                some = chain((first,), islice(pages, pages_per_commit - 1))
                writer.txn.cursor().putmulti((page_key(table.id, key), image) for key, image in some)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Hold the lock of the one load that may run, in whatever process. A process that dies lets it go."""
        with translated(self.environment.path):
            fd = os.open(self.environment.path / "load.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _drop_leftovers(self) -> None:
        """Delete the tables that no catalog names: of a load that was killed, or of views that were removed."""
        with self.environment.read() as txn:
            used = {table.id for table in self._parse(self.environment.read_catalog_json(txn)).tables.values()}
            leftovers = [table_id for table_id in table_ids(txn) if table_id not in used]
        for table_id in leftovers:
            drop_table(self.environment, table_id)

    def _new_table(self) -> TableInfo:
        """A table whose id nobody else gets, and which no view has yet."""
        with self.edit_catalog() as catalog:
            table = TableInfo(catalog.next_table_id, secrets.randbits(63))
            catalog.next_table_id += 1
        return table


def _read_all(
    layout: Layout, view: FeatureView, batches: Iterable[ColumnBatch], progress: Progress | None
) -> SortedRows:
    parts = []
    for piece in pieces(batches, LOAD_ROWS):
        parts.append(encode_rows(layout, view, piece))
        if progress is not None:
            progress(len(piece))
    return SortedRows(layout, parts)


def _join_siblings(writer: Writer, table: TableInfo, layout: Layout, key: bytes, page: bytes) -> None:
    """Merge the bucket with its sibling while both together are small, so that a table shrinks as it grew."""
    while depth := page[4]:
        at = int.from_bytes(key)
        sibling_at = at ^ (1 << (64 - depth))
        sibling_key = sibling_at.to_bytes(8)
        sibling = writer.get_page(table.id, sibling_key)
        if sibling is None:
            return
        first, second = (
            ((key, page), (sibling_key, sibling)) if at < sibling_at else ((sibling_key, sibling), (key, page))
        )
        joined = join(layout, table.id, *first, *second)
        if joined is None:
            return
        writer.delete_page(table.id, second[0])
        writer.put_page(table.id, first[0], joined)
        key, page = first[0], joined


def _key_rows(layout: Layout, view: FeatureView, keys: Sequence[Array]) -> tuple[Any, bytes]:
    if len(keys) != len(view.keys) or any(len(column) != len(keys[0]) for column in keys):
        raise InvalidArgument(
            f"feature view '{view.name}': give its {len(view.keys)} key columns ({', '.join(view.keys)}), of one length"
        )
    rows, arena = encode_keys(layout, view, keys)
    return rows, b"".join(arena.parts)


def _same_columns(a: FeatureView, b: FeatureView) -> bool:
    return list(a.keys.items()) == list(b.keys.items()) and [(f.name, f.dtype) for f in a.features] == [
        (f.name, f.dtype) for f in b.features
    ]


def _with_page_size(view: FeatureView, table: TableInfo, rows: SortedRows) -> tuple[Layout, TableInfo]:
    """The table with pages that hold at least ROWS_PER_PAGE_MIN rows with the strings that they have."""
    page_bytes = rows.layout.page_bytes
    needed = ROWS_PER_PAGE_MIN * rows.image_bytes() // max(1, len(rows)) + 64
    while page_bytes < needed:
        page_bytes += PAGE_BYTES
    table = replace(table, page_bytes=page_bytes)
    return make_layout(view, table), table
