"""A store as seen by one reader: a snapshot that moves forward, and the directories of its tables.

A snapshot is one LMDB read transaction. The page addresses in its directories are valid as long as that transaction
lives, so whoever looks rows up does it between enter() and leave(). Several threads may be in there at once; the
snapshot moves on when none is.
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
from shorttail.store.environment import Environment, table_pages, translated
from shorttail.store.table import ColumnBatch, decode_page, make_layout, row_dtype

_NOTHING_SEEN = -1  # generations: real ones count up from 0
_CLOSED = -2


class Snapshot:
    """The reading half of a Store."""

    def __init__(self, environment: Environment) -> None:
        """For open() only."""
        self.environment = environment
        self._lock = threading.Lock()  # of what follows; held for moments, but while the snapshot moves
        self._gate = threading.Condition(self._lock)
        self._inside = 0  # threads between enter() and leave()
        self._waiting = 0  # threads that want to be alone
        self._sleeping = 0  # threads in _gate.wait()
        self._build_lock = threading.Lock()
        self.catalog = Catalog()
        self.catalog_version = 0  # grows whenever the catalog, and so what plans were made from, changes
        self._parsed: tuple[bytes | None, Catalog] = (b"", self.catalog)  # the catalog and the JSON that it was
        self._word = environment.word
        self._generation = _NOTHING_SEEN
        self._sequence = 0
        self._txn: Any = None
        self._tree: Any = None  # Tree
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
        """Give up the snapshot, once nobody looks rows up any more."""
        with self._alone():
            if self._generation == _CLOSED:
                return
            self._generation = _CLOSED
            self._directories.clear()
            if self._txn is not None and self._same_process():
                self._txn.abort()
            self._txn = self._tree = None
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

    def enter(self) -> None:
        """Begin to use page addresses, of the newest commit; leave() ends it. Between them call nothing that writes.

        Costs one load from shared memory when there is nothing new. Otherwise it moves the snapshot on, and for that
        waits until every thread that is inside has left: lookups are short.
        """
        with self._lock:
            if self._waiting or self._word.load() != self._generation:
                self._catch_up()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._sleeping and not self._inside:
                self._gate.notify_all()

    def _catch_up(self) -> None:
        while self._waiting or self._word.load() != self._generation:
            if not self._inside and not self._waiting:
                self._advance()
                return
            self._sleep()

    def _sleep(self) -> None:
        self._sleeping += 1
        try:
            self._gate.wait()
        finally:
            self._sleeping -= 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """enter() and leave() for a `with` block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else is inside, nor comes in."""
        with self._lock:
            self._waiting += 1
            try:
                while self._inside:
                    self._sleep()
                yield
            finally:
                self._waiting -= 1
                self._gate.notify_all()

    def refresh(self, force: bool = False) -> bool:
        """Move on to the newest commit; True if there was one. Not between enter() and leave().

        force: ask LMDB even when nothing was counted, which also notices the commit of a process that was killed before
        it could count it; worth doing now and then, as by an idle timer.
        """
        if self._word.load() == self._generation and not force:
            return False
        with self._alone():
            return self._advance()

    def _advance(self) -> bool:
        environment = self.environment
        if self._generation == _CLOSED:
            raise InvalidArgument(f"store '{self.path}' is closed; open it again")
        generation = self._word.load()  # before the snapshot: a commit in between is found again, never missed
        with translated(environment.path):
            txn, tree = environment.read_tree()
        try:
            sequence = environment.sequence(txn)
            if self._txn is not None and sequence == self._sequence:
                txn.abort()
                self._generation = generation
                return False
            catalog_json = environment.read_catalog_json(txn)
            catalog = self._parse(catalog_json)
            changes = environment.changes_since(txn, self._sequence) if self._txn is not None else None
        except BaseException:
            txn.abort()
            raise
        old, self._txn, self._tree = self._txn, txn, tree
        self._take_catalog(catalog, catalog_json)
        self._sequence, self._generation = sequence, generation
        self._patch(changes)
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

    def _patch(self, changes: bytes | None) -> None:
        """Bring the directories to the present snapshot: the changed buckets, or all when changes is None."""
        if changes is None:
            self._directories.clear()  # each is built again when it is asked for
            return
        for name, directory in list(self._directories.items()):
            if directory is None:  # of an empty table: quickly built
                del self._directories[name]
                continue
            try:
                directory.update(self._tree, changes)
            except ValueError:
                del self._directories[name]  # building it says what is wrong, to whoever asks for this view

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

        For use between enter() and leave(). The first call for a view reads the header of each of its pages.
        """
        try:
            return self._directories[view_name]
        except KeyError:
            with self._build_lock:
                if view_name not in self._directories:
                    self._directories[view_name] = self._build(view_name)
            return self._directories[view_name]

    def _build(self, view_name: str) -> Directory | None:
        directory = Directory(self.layout(view_name), self.catalog.tables[view_name].id)
        with self._sound(view_name):
            return directory if directory.build(self._tree) else None

    # -- reading all of a view -------------------------------------------------------------------------------------

    def count(self, view_name: str) -> int:
        """Rows of that view as of the newest commit; within a write as of that write."""
        writer = self.environment.writer
        if writer is not None:
            table = Catalog.from_json(writer.get_catalog()).tables[view_name]
            pages = table_pages(writer.txn, table.id)
            return sum(int.from_bytes(page[:2], "little") for _, page in pages)
        self.enter()
        try:
            directory = self.directory(view_name)
            return directory.count_rows() if directory is not None else 0
        finally:
            self.leave()

    def scan(self, view_name: str) -> Iterator[ColumnBatch]:
        """The rows of that view, a page at a time and in no order, as of the newest commit when the iteration starts.

        Every page is checked in full. Has a snapshot of its own, so the caller may take its time between batches.
        Raises NotFound, and Internal if the table is damaged.
        """
        with self.environment.read() as txn:
            catalog = Catalog.from_json(self.environment.read_catalog_json(txn))
            view, table = catalog.view(view_name), catalog.tables[view_name]
            layout = make_layout(view, table)
            dtype = row_dtype(layout)
            for key, page in table_pages(txn, table.id):
                with self._sound(view_name):
                    layout.check(page, key, table.id)
                batch = decode_page(layout, dtype, page)
                if len(batch):
                    yield batch
