"""A store as seen by one reader: a snapshot that moves forward, and the directories of its tables.

A snapshot is one LMDB read transaction. The page addresses in its directories are valid as long as that transaction
lives, so whoever looks rows up holds `lock` from refresh() until the lookup is done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from shorttail._native.pages import Directory, Layout
from shorttail.errors import Internal, InvalidArgument
from shorttail.store.catalog import Catalog
from shorttail.store.environment import Environment, translated
from shorttail.store.table import ColumnBatch, decode_page, make_layout, row_dtype

_NOTHING_SEEN = -1  # generations: real ones count up from 0
_CLOSED = -2


class Snapshot:
    """The reading half of a Store."""

    def __init__(self, environment: Environment) -> None:
        """For open() only."""
        self.environment = environment
        self.lock = threading.RLock()  # held while page addresses are in use
        self.catalog = Catalog()
        self.catalog_version = 0  # grows whenever the catalog, and so what plans were made from, changes
        self._parsed: tuple[bytes | None, Catalog] = (b"", self.catalog)  # the catalog and the JSON that it was
        self._word = environment.word
        self._generation = _NOTHING_SEEN
        self._sequence = 0
        self._txn: Any = None
        self._usable: set[bytes] = set()  # databases that the snapshot's transaction can read
        self._layouts: dict[str, Layout] = {}
        self._directories: dict[str, Directory | None] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], create: bool = False) -> Self:
        """The store at path. Raises what Environment.open raises."""
        store = cls(Environment.open(path, create=create))
        try:
            store.refresh(force=True)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give up the snapshot. Directories must not be used any more."""
        with self.lock:
            if self._generation == _CLOSED:
                return
            self._generation = _CLOSED
            self._directories.clear()
            if self._txn is not None and self._same_process():
                self._txn.abort()
            self._txn = None
            self.environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def path(self) -> str:
        return str(self.environment.path)

    def _same_process(self) -> bool:
        try:
            self.environment.check_process()
        except InvalidArgument:
            return False
        return True

    # -- the snapshot ----------------------------------------------------------------------------------------------

    def refresh(self, force: bool = False) -> bool:
        """Move on to the newest commit; True if there was one. Hold `lock`: addresses of before become invalid.

        Costs one load from shared memory when there is nothing new. force: ask LMDB even then, which also notices the
        commit of a process that was killed before it could count it; worth doing now and then, as by an idle timer.
        """
        if self._word.load() == self._generation and not force:
            return False
        if self.environment.is_writing():
            return False  # handles cannot be opened now, and the caller reads through its own transaction
        with self.lock:
            return self._advance()

    def _advance(self) -> bool:
        environment = self.environment
        if self._generation == _CLOSED:
            raise InvalidArgument(f"store '{self.path}' is closed; open it again")
        generation = self._word.load()  # before the snapshot: a commit in between is found again, never missed
        txn = environment.read()
        try:
            sequence = environment.sequence(txn)
            if self._txn is not None and sequence == self._sequence:
                txn.abort()
                self._generation = generation
                return False
            catalog_json = environment.read_catalog_json(txn)
            catalog = self._parse(catalog_json)
            for table in catalog.tables.values():
                if environment.has_database(table.database):
                    environment.handle(table.database)
            usable = environment.handles()
            if usable != self._usable:
                # Handles were opened after this transaction began, so it cannot use them. Nothing is lost by taking a
                # newer one: its catalog may name still newer tables, but then the word has moved and we come again.
                txn.abort()
                txn = environment.read()
                self._usable = usable
                sequence = environment.sequence(txn)
                catalog_json = environment.read_catalog_json(txn)
                catalog = self._parse(catalog_json)
            old, self._txn = self._txn, txn
            changes = environment.changes_since(txn, self._sequence) if old is not None else None
            self._take_catalog(catalog, catalog_json)
            self._sequence = sequence
            self._patch(changes)
        except BaseException:
            if txn is not self._txn:
                txn.abort()
            raise
        self._generation = generation
        if old is not None:
            old.abort()
        return True

    def _parse(self, document: bytes | None) -> Catalog:
        """The catalog, from memory if it is the one of the snapshot. Not to be changed."""
        known_document, known = self._parsed  # a pair, so that no lock is needed: a writer must not wait for a reader
        return known if document == known_document else Catalog.from_json(document)

    def _take_catalog(self, catalog: Catalog, catalog_json: bytes | None) -> None:
        if catalog_json == self._parsed[0]:
            return
        before = self.catalog
        for name in list(self._layouts):
            # A table is known by its id and seed: ids are used again, seeds are random.
            same_table = catalog.tables.get(name) == before.tables[name]
            if not same_table or catalog.views[name].features != before.views[name].features:
                self._layouts.pop(name)
                self._directories.pop(name, None)
        self.catalog, self._parsed = catalog, (catalog_json, catalog)
        self.catalog_version += 1

    def _patch(self, changes: dict[int, set[bytes]] | None) -> None:
        """Bring the directories to the present snapshot: the changed buckets, or all when changes is None."""
        for name, directory in list(self._directories.items()):
            table = self.catalog.tables[name]
            keys = None if changes is None else changes.get(table.id, set())
            if keys is None or (keys and directory is None):
                self._directories.pop(name)  # built again when it is asked for
                continue
            if directory is None or not keys:
                continue
            handle, get = self.environment.handle(table.database), self._txn.get
            with self._sound(name):
                for key in sorted(keys):  # in the order in which LMDB has them
                    directory.put(key, get(key, db=handle))

    @contextmanager
    def _sound(self, view_name: str) -> Iterator[None]:
        """Name the table in what native code says about a page."""
        try:
            yield
        except ValueError as error:
            raise Internal(
                f"store '{self.path}': the table of view '{view_name}' is damaged ({error}); load it again"
            ) from None

    def layout(self, view_name: str) -> Layout:
        """Where things lie in the rows of that view's table. Raises NotFound."""
        layout = self._layouts.get(view_name)
        if layout is None:
            view = self.catalog.view(view_name)
            layout = self._layouts[view_name] = make_layout(view, self.catalog.tables[view_name])
        return layout

    def directory(self, view_name: str) -> Directory | None:
        """The directory of that view's table in the present snapshot; None if the table is empty. Raises NotFound.

        The first call for a view reads the header of each of its pages.
        """
        try:
            return self._directories[view_name]
        except KeyError:
            with self.lock:
                layout = self.layout(view_name)
                directory = Directory(layout, self.catalog.tables[view_name].id)
                with self._sound(view_name), translated(self.environment.path):
                    n_buckets = directory.rebuild(self._pages(view_name))
                self._directories[view_name] = directory if n_buckets else None
                return self._directories[view_name]

    def _pages(self, view_name: str) -> Iterator[tuple[memoryview, memoryview]]:
        """(bucket key, page) of the view's table in the present snapshot."""
        database = self.catalog.tables[view_name].database
        if database not in self._usable:
            return iter(())
        pages: Iterator[tuple[memoryview, memoryview]] = iter(
            self._txn.cursor(db=self.environment.handle(database)).iternext()
        )
        return pages

    # -- reading all of a view -------------------------------------------------------------------------------------

    def count(self, view_name: str) -> int:
        """Rows of that view as of the newest commit; moves the snapshot there (unless within a write)."""
        with self.lock:
            self.refresh()
            directory = self.directory(view_name)
            return directory.count_rows() if directory is not None else 0

    def scan(self, view_name: str) -> Iterator[ColumnBatch]:
        """The rows of that view, a page at a time and in no order, as of the newest commit when the iteration starts.

        Every page is checked in full. Has a snapshot of its own, so the caller may take its time between batches.
        Raises NotFound, and Internal if the table is damaged.
        """
        environment = self.environment
        while True:
            with environment.read() as txn:
                catalog = Catalog.from_json(environment.read_catalog_json(txn))
            view, table = catalog.view(view_name), catalog.tables[view_name]
            if not environment.has_database(table.database):
                return
            handle = environment.handle(table.database)
            with environment.read() as txn:  # begun after the handle was opened, as it must be
                now = Catalog.from_json(environment.read_catalog_json(txn))
                if now.tables.get(view_name) != table or now.view(view_name).features != view.features:
                    continue
                layout = make_layout(view, table)
                dtype = row_dtype(layout)
                for key, page in txn.cursor(db=handle):
                    with self._sound(view_name):
                        layout.check(page, bytes(key), table.id)
                    batch = decode_page(layout, dtype, page)
                    if len(batch):
                        yield batch
                return
