"""A store as one reader sees it: a snapshot that moves forward, and the directories of its tables.

A snapshot is one LMDB read transaction. The page addresses in its directories are valid as long as that transaction is
open, so lookups must happen between enter() and leave(). Several threads may be inside at once; the snapshot moves
forward when no thread is inside. A stale snapshot that is not in use is released within about LIMITS.idle_rest_ms,
because LMDB cannot reuse the pages of a snapshot while its transaction is open, and the file would grow.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from shorttail._native.pages import Directory, Gate, Layout
from shorttail.define.catalog import Catalog
from shorttail.define.tables import Stored
from shorttail.errors import InvalidArgument, ShorttailError, Unavailable
from shorttail.store.edits import damaged_table
from shorttail.store.environment import Environment, table_pages
from shorttail.store.idle import IdleThread
from shorttail.store.memory import PageLock
from shorttail.store.open_files import Overwritten
from shorttail.store.opening import translate_errors
from shorttail.store.preparing import prepare
from shorttail.store.scan import BATCH_ROWS, Choose, TableScan, as_batch
from shorttail.store.table import ColumnBatch, make_layout

_NOTHING_SEEN = -1  # special values of Gate.generation; real generations count up from 0
_CLOSED = -2
TRY_WAIT_S = 0.01


class Snapshot:
    """The reading half of a Store: a snapshot of the newest commit. Thread-safe."""

    def __init__(self, environment: Environment) -> None:
        """Called by open() only."""
        self.environment = environment
        self.gate = Gate(environment.word, _NOTHING_SEEN)  # counts the threads between enter() and leave()
        # By the table's id, None for an empty table. Entries are only added, never replaced. Dropping one replaces the
        # dict, so a holder of directories compares the dict's identity to know whether they are valid.
        self.directories: dict[int, Directory | None] = {}
        self._make_locks()
        self.runs_code, self.by = True, ""
        self.catalog = Catalog()
        self.catalog_version = 0  # grows with every change of the catalog, which makes plans stale
        self._parsed: tuple[bytes | None, Catalog] = (b"", self.catalog)  # the catalog with its JSON
        self._word = environment.word
        self._sequence: int | None = None  # number of the commit of the directories
        self._txn: Any = None  # None while the snapshot is released
        self._tree: Any = None  # Tree
        self._page_lock = PageLock(environment.path)
        self._layouts: dict[int, Layout] = {}
        self._tables: dict[int, str] = {}  # the view of each table that is looked up, or is about to be
        self._scans: set[TableScan] = set()

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # held briefly, and while the snapshot moves
        self._empty = threading.Condition(self._lock)  # notified when no thread is inside, or fewer wait for that
        self._build_lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], create: bool = False, *, code: bool = True, by: str = "") -> Self:
        """Open the store at path. Raises what Environment.open raises.

        code: its on-demand functions may run. by: who makes changes, for the history; "" is the user of the process.
        """
        store = cls(Environment.open(path, create=create))
        store.runs_code, store.by = code, by
        try:
            store.environment.handle.watch(store)
            store.refresh(force=True)
        except BaseException:
            store.close()
            raise
        _idle.watch(store)
        return store

    def close(self) -> None:
        """Wait until no thread is inside, then release the snapshot and close the environment."""
        with self.exclusive():
            if self.gate.generation == _CLOSED:
                return
            self.gate.generation = _CLOSED
            for scan in list(self._scans):  # their memory is LMDB's map
                scan.close(self._closed())
            self.directories = {}
            if self._txn is not None:
                self.environment.handle.end_read(self._txn)
            self._txn = self._tree = None
            self.environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """The store's count of commits when this snapshot was taken; below 0 while there is no snapshot."""
        return self.gate.generation

    @property
    def is_newest(self) -> bool:
        """Whether no commit has been counted since this snapshot was taken."""
        return self._word.load() == self.gate.generation

    @property
    def is_open(self) -> bool:
        return self.gate.generation != _CLOSED

    @property
    def path(self) -> str:
        return str(self.environment.path)

    def _closed(self) -> InvalidArgument:
        return InvalidArgument(f"store '{self.path}' is closed; open it again")

    def disown(self) -> None:
        """Free all locks, in a forked child: no thread that held one, or was inside, exists there.

        The environment refuses every use of the store; without this, a use could wait for ever instead.
        """
        self._make_locks()
        self._scans = set()
        self.gate.inside = self.gate.waiting = self.gate.sleeping = 0

    # -- the snapshot ----------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Move to the newest commit and allow the use of page addresses until leave(). Do not write in between.

        Without a new commit, this costs one load from shared memory. Otherwise it waits until all threads inside have
        left (lookups are short) and moves the snapshot forward. Raises InvalidArgument (closed store), Unavailable
        (LMDB must be reopened and cannot be) and what Environment.read_tree() raises.
        """
        if not self.gate.try_enter():
            with self._lock:
                self._catch_up()
                self.gate.inside += 1

    def leave(self) -> None:
        """End the use of page addresses that enter() began."""
        if self.gate.leave():
            self.wake()

    def wake(self) -> None:
        """Notify the waiting threads that the last thread has left. For callers of Gate.leave()."""
        with self._lock:
            self._empty.notify_all()

    def _catch_up(self) -> None:
        """Move to the newest commit as soon as no thread is inside. The caller holds _lock."""
        while self.gate.waiting or self._word.load() != self.gate.generation:
            if self.gate.inside or self.gate.waiting:
                self._wait_for_change()
                continue
            try:
                self._advance()
                return
            except Overwritten:
                raise
            except Unavailable:
                if self._txn is not None:
                    return  # the present snapshot stays usable
            self._lock.release()  # recover() takes it through exclusive()
            try:
                self.environment.handle.recover()
            finally:
                self._lock.acquire()

    def _wait_for_change(self) -> None:
        """Wait until a thread notifies _empty. The caller holds _lock and checks its condition again."""
        self.gate.sleeping += 1
        try:
            # leave() runs without _lock: the last thread may have left before it could see `sleeping`.
            if self.gate.inside or self.gate.waiting:
                self._empty.wait()
        finally:
            self.gate.sleeping -= 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Call enter() before a `with` block and leave() after it."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no thread is inside, and let none enter during the `with` block."""
        with self._lock:
            self.gate.waiting += 1
            try:
                while self.gate.inside:
                    self._wait_for_change()
                yield
            finally:
                self.gate.waiting -= 1
                self._empty.notify_all()

    def refresh(self, force: bool = False) -> bool:
        """Move to the newest commit. Return whether there was a new one. Do not call between enter() and leave().

        force: ask LMDB even if the generation word has not changed. This also finds the commit of a process that was
        killed before it could raise the word, so an idle timer should use it from time to time.
        """
        if self._word.load() == self.gate.generation and not force:
            return False
        if self.environment.handle.is_broken:
            self.environment.handle.recover()
        with self.exclusive():
            return self._advance()

    def _advance(self) -> bool:
        """Replace the read transaction by a new one and update the directories. Return whether there was a new commit.

        The caller holds _lock and no thread is inside. Raises InvalidArgument (closed) and what read_tree() raises.
        """
        environment = self.environment
        if self.gate.generation == _CLOSED:
            raise self._closed()
        generation = self._word.load()  # before the snapshot is taken, so that a commit in between is not missed
        try:
            with translate_errors(environment.path):
                txn, tree = environment.read_tree()
        except Overwritten:
            self.release()  # its addresses lead to other content
            raise
        try:
            with environment.handle.damage():
                sequence = environment.sequence(tree)
                if self._txn is not None and sequence == self._sequence:
                    environment.handle.end_read(txn)
                    self.gate.generation = generation
                    return False
                catalog_json = environment.read_catalog_json(tree)
                changes = None if self._sequence is None else environment.changes_since(tree, self._sequence)
            catalog = self._parse(catalog_json)
        except BaseException:
            environment.handle.end_read(txn)
            raise
        old, self._txn, self._tree = self._txn, txn, tree
        moved = sequence != self._sequence
        self._take_catalog(catalog, catalog_json)
        self._sequence = sequence
        self._patch(changes)
        if old is not None:
            environment.handle.end_read(old)
        self.gate.generation = generation  # last: it lets other threads enter
        return moved

    @property
    def changed(self) -> str:
        """Why each write fails: the store was deleted, replaced or overwritten at its path while it was open. Or ""."""
        self.environment.check_process()
        with self._lock:  # keeps the environment open
            return self.environment.handle.changed if self.is_open else ""

    def release_if_stale(self) -> None:
        """End the read transaction if it is stale and no thread is inside. The next enter() begins a new one.

        The next enter() costs no more than moving the old transaction forward would have.
        """
        with self._lock:
            if self.environment.handle.is_broken:
                return  # LMDB may refuse a new transaction
            if not self.gate.inside and self._txn is not None and self._word.load() != self.gate.generation:
                self.environment.handle.end_read(self._txn)
                self._txn = self._tree = None
                self.gate.generation = _NOTHING_SEEN

    def release_if_overwritten(self) -> None:
        """Release the snapshot if other content was written into the store's file: the next enter() raises that."""
        with self._lock:
            overwritten = self.is_open and self.environment.handle.is_overwritten
        if overwritten:
            with self.exclusive():
                self.release()

    @property
    def is_reading(self) -> bool:
        """Whether the snapshot holds a read transaction."""
        return self._txn is not None

    def release(self) -> None:
        """End the transaction and drop all page addresses, for lmdb_handle.Reader. Call it inside exclusive()."""
        if self._txn is not None:
            self.environment.handle.end_read(self._txn)
        self._txn = self._tree = self._sequence = None
        self._page_lock.reset()
        self.directories = {}
        if self.is_open:
            self.gate.generation = _NOTHING_SEEN

    def _parse(self, document: bytes | None) -> Catalog:
        """Return the parsed catalog, cached if it is the snapshot's. The caller must not change it."""
        known_document, known = self._parsed  # one tuple, so no lock is needed: a writer must not wait for a reader
        return known if document == known_document else Catalog.from_json(document)

    def _take_catalog(self, catalog: Catalog, catalog_json: bytes | None) -> None:
        """Set the snapshot's catalog. Drop the layouts and directories of tables that it does not name any more."""
        if catalog_json == self._parsed[0]:
            return
        new = {name: table for name, table in catalog.coming.items() if table.id not in self._tables}
        used = [Stored(catalog.definition(n), t) for n, t in new.items() if catalog.tables[n].id in self.directories]
        self._tables = {table.id: name for role in (catalog.tables, catalog.coming) for name, table in role.items()}
        for table_id in self._layouts.keys() - self._tables.keys():
            del self._layouts[table_id]
            self._drop_directory(table_id)
        self.catalog, self._parsed = catalog, (catalog_json, catalog)
        self.catalog_version += 1
        if used:
            prepare(self.environment, used, self.take_directory)

    def take_directory(self, table_id: int, directory: Directory, sequence: int) -> bool:
        """Take a directory that was built elsewhere as of that commit. Return whether it could be brought up to date.

        Raises ValueError for a damaged table, and what enter() raises.
        """
        while not self.environment.handle.is_broken:  # LMDB is reopened once the caller has ended its transaction
            with self._exclusive_now() as alone:
                if not alone:
                    time.sleep(TRY_WAIT_S / 10)
                    continue
                self._advance()
                changes = self.environment.changes_since(self._tree, sequence)
                # One that is in use already stays: its holders would not learn that another one took its place.
                if changes is not None and table_id in self._tables and table_id not in self.directories:
                    directory.update(self._tree, changes)
                    self._layouts.setdefault(table_id, directory.layout)
                    self.directories[table_id] = directory
                return changes is not None
        return False

    @contextmanager
    def _exclusive_now(self) -> Iterator[bool]:
        """As exclusive(), but do not wait for long: yield False if threads are still inside."""
        if not self._lock.acquire(timeout=TRY_WAIT_S):
            yield False
            return
        self.gate.waiting += 1
        try:
            yield not self.gate.inside
        finally:
            self.gate.waiting -= 1
            self._empty.notify_all()
            self._lock.release()

    def _patch(self, changes: bytes | None) -> None:
        """Move the directories to the present snapshot by the log entries in `changes`; None drops all directories."""
        if changes is None:
            self.directories = {}  # each directory is built again at the next lookup
            return
        for table_id, directory in list(self.directories.items()):
            if directory is None:  # an empty table's directory is quick to build
                self._drop_directory(table_id)
                continue
            try:
                directory.update(self._tree, changes)
            except ValueError:
                self._drop_directory(table_id)  # the next lookup in this table builds it and raises the error

    def _drop_directory(self, table_id: int) -> None:
        self.directories = {held: directory for held, directory in self.directories.items() if held != table_id}

    def pretouch(self, lock: bool = False) -> None:
        """Map all pages of the file and build all directories now, so that the first lookups need not.

        lock: also lock the file in memory, including its later growth. Raises ResourceExhausted if the system refuses.
        """
        with self.reading():
            self._tree.populate()
            for view_name in self.catalog.views:
                with suppress(ShorttailError):  # a damaged table fails the lookups in it, and no others
                    self.directory(view_name)
            if lock:
                self._page_lock.lock(self._tree)

    def lock_growth(self) -> None:
        """Lock the growth of the file since pretouch(lock=True). May be slow, so an idle timer calls it."""
        if (tree := self._tree) is not None:
            self._page_lock.follow(tree)

    @contextmanager
    def _name_table_in_errors(self, view_name: str) -> Iterator[None]:
        """Translate a ValueError of native code about a damaged page to an Internal error that names the view."""
        try:
            yield
        except ValueError as error:
            raise damaged_table(self.path, view_name, error) from None

    def layout(self, view_name: str) -> Layout:
        """Return the row layout of a view's table. Raises NotFound."""
        stored = self.catalog.stored(view_name)
        layout = self._layouts.get(stored.table.id)
        if layout is None:
            layout = self._layouts[stored.table.id] = make_layout(stored)
        return layout

    def directory(self, view_name: str) -> Directory | None:
        """Return the directory of a view's table: see table_directory(). Raises NotFound too."""
        self.catalog.view(view_name)
        return self.table_directory(self.catalog.tables[view_name].id)

    def table_directory(self, table_id: int) -> Directory | None:
        """Return the directory of a table that the catalog looks up, in the present snapshot; None if it is empty.

        Call it between enter() and leave(). The first call for a table reads the header of each of its pages. Raises
        Internal if the table is damaged.
        """
        try:
            return self.directories[table_id]
        except KeyError:
            with self._build_lock:
                if table_id not in self.directories:
                    self.directories[table_id] = self._build(table_id)
            return self.directories[table_id]

    def _build(self, table_id: int) -> Directory | None:
        view_name = self._tables[table_id]
        directory = Directory(self.layout(view_name), table_id)
        with self._name_table_in_errors(view_name):
            return directory if directory.build(self._tree) else None

    # -- reading all of a view -------------------------------------------------------------------------------------

    def count(self, view_name: str) -> int:
        """Return the number of rows of a view as of the newest commit; inside a write, as of that write."""
        if (writer := self.environment.writer) is not None:
            table = Catalog.from_json(writer.get_catalog()).tables[view_name]
            return sum(int.from_bytes(page[:2], "little") for _, page in table_pages(writer.txn, table.id))
        with self.reading():
            directory = self.directory(view_name)
            return directory.count_rows() if directory is not None else 0

    def open_scan(self, view_name: str, choose: Choose | None = None, batch_rows: int = BATCH_ROWS) -> TableScan:
        """Begin to read all rows of a view as of the newest commit. choose: which columns; None: all of them.

        batch_rows: the most rows of a batch, but a batch has at least the rows of one page. Close the scan when done.
        Raises NotFound; for other errors see TableScan.
        """
        if not self.is_open:
            raise self._closed()
        scan = TableScan(self.environment, view_name, choose, batch_rows)
        with self._lock:
            self._scans.add(scan)
            if not self.is_open:  # closed meanwhile
                scan.close(self._closed())
        return scan

    def scan(self, view_name: str, batch_rows: int = BATCH_ROWS) -> Iterator[ColumnBatch]:
        """Yield all rows of a view, unordered, as of the newest commit when iteration starts: see open_scan()."""
        with self.open_scan(view_name, batch_rows=batch_rows) as scan:
            for columns in scan:
                yield as_batch(columns, len(scan.view.keys))

    def end_idle_scans(self) -> None:
        """End the scans from which no batch is taken: see TableScan.end_if_idle()."""
        for scan in list(self._scans):
            if scan.end_if_idle():
                self._scans.discard(scan)


_idle: IdleThread[Snapshot] = IdleThread()


def _after_fork() -> None:
    for snapshot in _idle.snapshots():
        snapshot.disown()
    _idle.__init__()  # type: ignore[misc]  # its thread does not exist in the child, and its lock may be held


os.register_at_fork(after_in_child=_after_fork)
