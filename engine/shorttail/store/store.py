"""Store: bulk loads, upserts, deletes and changes of the catalog, each durable when it returns."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from shorttail._native.pages import Layout, SortedRows
from shorttail.config import LIMITS
from shorttail.definitions import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.store.catalog import Catalog, TableInfo
from shorttail.store.environment import PAGE_BYTES, Writer, translated
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
FIRST_BUCKET = bytes(8)

Progress = Callable[[int], object]  # is given the number of rows read since its last call


class Store(Snapshot):
    """The feature views of one store directory, for reading and writing.

    Many may be open on one path, in this and other processes; writers take turns. Thread-safe, but page addresses are
    in use during a lookup: hold `lock` around refresh() and the lookup that follows. Writing does not move the
    snapshot: refresh() shows what was written.
    """

    def upsert(self, view_name: str, batch: ColumnBatch) -> int:
        """Insert the rows, or replace those of equal key unless their event time is later. Returns the rows given.

        All or nothing up to COMMIT_ROWS rows; more are committed so many at a time. Raises NotFound (view),
        InvalidArgument (columns), ResourceExhausted (disk), Internal (damaged table).
        """
        for piece in pieces([batch], COMMIT_ROWS):
            self._edit(view_name, piece, self._merge)
        return len(batch)

    def delete(self, view_name: str, keys: Sequence[Array]) -> int:
        """Remove the rows of these keys, given as one column [n] for each key. Returns how many there were.

        All or nothing up to COMMIT_ROWS keys. Raises what upsert() raises.
        """
        removed = 0
        for start in range(0, len(keys[0]) if keys else 0, COMMIT_ROWS):
            columns = [column[start : start + COMMIT_ROWS] for column in keys]
            removed += self._edit(view_name, columns, self._remove)
        return removed

    def _edit(
        self,
        view_name: str,
        what: ColumnBatch | Sequence[Array],
        apply: Callable[[Writer, Any, TableInfo, SortedRows], int],
    ) -> int:
        """Encode rows, or only their keys, for the view's table, then apply them to it in a write transaction."""
        while True:
            view, table = self._committed(view_name)
            layout = make_layout(view, table)
            encoded = (
                encode_rows(layout, view, what) if isinstance(what, ColumnBatch) else _key_rows(layout, view, what)
            )
            rows = SortedRows(layout, [encoded])
            handle = self.environment.handle(table.database, create=True)
            with self.environment.write() as writer:
                if self._is_current(writer, view, table):
                    with self._sound(view_name):
                        return apply(writer, handle, table, rows)
            # A load has put another table in its place in between: encode again for that one.

    def _committed(self, view_name: str) -> tuple[FeatureView, TableInfo]:
        """That view and its table as of the last commit, of whatever process. Raises NotFound."""
        with self.environment.read() as txn:
            catalog = self._parse(self.environment.read_catalog_json(txn))
        return catalog.view(view_name), catalog.tables[view_name]

    def _is_current(self, writer: Writer, view: FeatureView, table: TableInfo) -> bool:
        catalog = self._parse(writer.get_catalog())
        now = catalog.views.get(view.name)
        return now is not None and _same_columns(now, view) and catalog.tables[view.name] == table

    def _merge(self, writer: Writer, handle: Any, table: TableInfo, rows: SortedRows) -> int:
        txn = writer.txn
        n_buckets = txn.stat(handle)["entries"] + rows.image_bytes() // rows.layout.page_bytes + 1
        depth_grow = depth_to_grow(n_buckets)
        cursor = txn.cursor(db=handle)
        at = 0
        while at < len(rows):
            key, page = _find_bucket(cursor, rows.hash(at))
            at, images = rows.merge(at, key, page, table.id, depth_grow)
            for new_key, image in images:
                txn.put(new_key, image, db=handle)
                writer.changed(table.id, new_key)
        return len(rows)

    def _remove(self, writer: Writer, handle: Any, table: TableInfo, rows: SortedRows) -> int:
        cursor = writer.txn.cursor(db=handle)
        at = removed_in_all = 0
        while at < len(rows):
            key, page = _find_bucket(cursor, rows.hash(at))
            if page is None:
                return 0
            at, removed, image = rows.remove(at, key, page, table.id)
            if image is not None:
                writer.txn.put(key, image, db=handle)
                writer.changed(table.id, key)
            removed_in_all += removed
        return removed_in_all

    # -- the catalog -----------------------------------------------------------------------------------------------

    @contextmanager
    def edit_catalog(self) -> Iterator[Catalog]:
        """A copy of the newest catalog to change; it is committed when the block ends, unless by an exception.

        Tables that it no longer names are emptied in the same commit. Writers wait meanwhile: be quick.
        """
        environment = self.environment
        with environment.read() as txn:
            known = self._parse(environment.read_catalog_json(txn))
        handles = {table.id: self._handle_if_any(table) for table in known.tables.values()}
        # Its lock before the writer's, as in refresh(): the block may ask for counts.
        with self.lock, environment.write() as writer:
            before = Catalog.from_json(writer.get_catalog())
            catalog = before.copy()
            yield catalog
            document = catalog.to_json()
            if document == before.to_json():
                return
            writer.put_catalog(document)
            kept = {table.id for table in catalog.tables.values()}
            for table in before.tables.values():
                # One that was made a moment ago has no handle here; the next load empties it.
                if table.id not in kept and handles.get(table.id) is not None:
                    writer.txn.drop(handles[table.id], delete=False)

    def _handle_if_any(self, table: TableInfo) -> Any:
        environment = self.environment
        return environment.handle(table.database) if environment.has_database(table.database) else None

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
            table = TableInfo(self._free_table_id(), secrets.randbits(63), 0)
            layout = make_layout(view, table)
            rows = _read_all(layout, view, batches, progress)
            layout, table = _with_page_size(view, table, rows)
            handle = self.environment.handle(table.database, create=True)
            old_handle = self._handle_if_any(old)
            self._write_table(handle, layout, table, rows)
            with self.environment.write() as writer:
                if not self._is_current(writer, view, old):
                    raise InvalidArgument(f"feature view '{view_name}' was changed while it was loaded; load it again")
                catalog = Catalog.from_json(writer.get_catalog())
                catalog.tables[view_name] = table
                writer.put_catalog(catalog.to_json())
                if old_handle is not None:
                    writer.txn.drop(old_handle, delete=False)
            return len(rows)

    def _write_table(self, handle: Any, layout: Layout, table: TableInfo, rows: SortedRows) -> None:
        """Write the table, which no catalog names yet, in several commits."""
        if not len(rows):
            return
        depth_grow = depth_to_grow(rows.image_bytes() // layout.page_bytes + 1)
        pages = rows.buckets(layout, table.id, depth_grow)
        pages_per_commit = max(1, LIMITS.load_commit_bytes // (layout.page_bytes + PAGE_BYTES))
        while (first := next(pages, None)) is not None:
            with self.environment.write() as writer:
                some = chain((first,), islice(pages, pages_per_commit - 1))
                writer.txn.cursor(db=handle).putmulti(some, append=True)

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
        """Empty the tables that no catalog names: of a load that was killed, or of views that were removed."""
        environment = self.environment
        names = [name for name in environment.database_names() if name[:1] == b"t"]
        handles = {name: environment.handle(name) for name in names}
        with environment.write() as writer:
            catalog = Catalog.from_json(writer.get_catalog())
            used = {table.database for table in catalog.tables.values()}
            for name, handle in handles.items():
                if name not in used and handle is not None and writer.txn.stat(handle)["entries"]:
                    # The name stays and is used again: LMDB handles cannot be closed, so new names would add up.
                    writer.txn.drop(handle, delete=False)

    def _free_table_id(self) -> int:
        """The lowest table id that is not in use. The load lock keeps it for us."""
        with self.edit_catalog() as catalog:
            used = {table.id for table in catalog.tables.values()}
            table_id = next(number for number in range(1, catalog.next_table_id + 1) if number not in used)
            catalog.next_table_id = max(catalog.next_table_id, table_id + 1)  # others take their ids from there
        return table_id


def _read_all(
    layout: Layout, view: FeatureView, batches: Iterable[ColumnBatch], progress: Progress | None
) -> SortedRows:
    parts = []
    for piece in pieces(batches, LOAD_ROWS):
        parts.append(encode_rows(layout, view, piece))
        if progress is not None:
            progress(len(piece))
    return SortedRows(layout, parts)


def _find_bucket(cursor: Any, row_hash: bytes) -> tuple[bytes, memoryview | None]:
    """(key, page) of the bucket that the hash belongs to; the page is None in an empty table."""
    found = cursor.set_range(row_hash)
    if not (found and bytes(cursor.key()) == row_hash):
        found = cursor.prev() if found else cursor.last()
    if not found:
        return FIRST_BUCKET, None
    key, page = cursor.item()
    return bytes(key), page


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
