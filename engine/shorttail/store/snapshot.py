"""A store as seen by one reader: a snapshot that moves forward, and the directories of its tables.

A snapshot is one LMDB read transaction. The page addresses in its directories are valid as long as that transaction
lives, so whoever looks rows up does it between enter() and leave(). Several threads may be in there at once; the
snapshot moves on when none is. A snapshot that is out of date and not in use gives its transaction back, within
LIMITS.idle_rest_ms: LMDB cannot use the pages of a snapshot again while somebody reads it, and the file would grow.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from shorttail._native.pages import Directory, Gate, Layout
from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog
from shorttail.errors import InvalidArgument, ShorttailError, Unavailable
from shorttail.store.edits import damaged
from shorttail.store.environment import Environment, table_pages
from shorttail.store.memory import Residence
from shorttail.store.opening import translated
from shorttail.store.table import ColumnBatch, decode_page, make_layout, row_dtype

_NOTHING_SEEN = -1  # generations: real ones count up from 0
_CLOSED = -2


class Snapshot:
    """The reading half of a Store."""

    def __init__(self, environment: Environment) -> None:
        """For open() only."""
        self.environment = environment
        self.gate = Gate(environment.word, _NOTHING_SEEN)  # threads between enter() and leave() are inside
        # Of views, None of an empty table. Only ever added to: when one is no more, another dict takes its place, so
        # that whoever has taken directories out of this one can tell whether they still are the ones.
        self.directories: dict[str, Directory | None] = {}
        self._lock = threading.Lock()  # held for moments, but while the snapshot moves
        self._empty = threading.Condition(self._lock)  # nobody is inside
        self._build_lock = threading.Lock()
        self.catalog = Catalog()
        self.catalog_version = 0  # grows whenever the catalog, and so what plans were made from, changes
        self._parsed: tuple[bytes | None, Catalog] = (b"", self.catalog)  # the catalog and the JSON that it was
        self._word = environment.word
        self._sequence: int | None = None  # of the commit that the directories are of
        self._txn: Any = None  # None while it rests
        self._tree: Any = None  # Tree
        self._residence = Residence(environment.path)
        self._layouts: dict[str, Layout] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], create: bool = False) -> Self:
        """The store at path. Raises what Environment.open raises."""
        store = cls(Environment.open(path, create=create))
        try:
            store.environment.handle.watch(store)
            store.refresh(force=True)
        except BaseException:
            store.close()
            raise
        _idle.watch(store)
        return store

    def close(self) -> None:
        """Give up the snapshot, once nobody looks rows up any more."""
        with self.alone():
            if self.gate.generation == _CLOSED:
                return
            self.gate.generation = _CLOSED
            self.directories = {}
            if self._txn is not None and self._same_process():
                self.environment.handle.end_read(self._txn)
            self._txn = self._tree = None
            self.environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """The commits that this snapshot has seen, as the store counts them; below 0 while there is none."""
        return self.gate.generation

    @property
    def is_newest(self) -> bool:
        return self._word.load() == self.gate.generation

    @property
    def is_open(self) -> bool:
        return self.gate.generation != _CLOSED

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
        if not self.gate.try_enter():
            with self._lock:
                self._catch_up()
                self.gate.inside += 1

    def leave(self) -> None:
        if self.gate.leave():
            self.wake()

    def wake(self) -> None:
        """The last one has left, and somebody waits for that."""
        with self._lock:
            self._empty.notify_all()

    def _catch_up(self) -> None:
        while self.gate.waiting or self._word.load() != self.gate.generation:
            if self.gate.inside or self.gate.waiting:
                self._sleep()
                continue
            try:
                self._advance()
                return
            except Unavailable:
                if self._txn is not None:
                    return  # the snapshot that is there is as good as before
            self._lock.release()  # whoever recovers the environment takes it
            try:
                self.environment.handle.recover()
            finally:
                self._lock.acquire()

    def _sleep(self) -> None:
        self.gate.sleeping += 1
        try:
            if self.gate.inside or self.gate.waiting:  # not gone since that was asked
                self._empty.wait()
        finally:
            self.gate.sleeping -= 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """enter() and leave() for a `with` block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is inside, nor comes in."""
        with self._lock:
            self.gate.waiting += 1
            try:
                while self.gate.inside:
                    self._sleep()
                yield
            finally:
                self.gate.waiting -= 1
                self._empty.notify_all()

    def refresh(self, force: bool = False) -> bool:
        """Move on to the newest commit; True if there was one. Not between enter() and leave().

        force: ask LMDB even when nothing was counted, which also notices the commit of a process that was killed before
        it could count it; worth doing now and then, as by an idle timer.
        """
        if self._word.load() == self.gate.generation and not force:
            return False
        if self.environment.handle.is_broken:
            self.environment.handle.recover()
        with self.alone():
            return self._advance()

    def _advance(self) -> bool:
        environment = self.environment
        if self.gate.generation == _CLOSED:
            raise InvalidArgument(f"store '{self.path}' is closed; open it again")
        generation = self._word.load()  # before the snapshot: a commit in between is found again, never missed
        with translated(environment.path):
            txn, tree = environment.read_tree()
        try:
            sequence = environment.sequence(txn)
            if self._txn is not None and sequence == self._sequence:
                environment.handle.end_read(txn)
                self.gate.generation = generation
                return False
            catalog_json = environment.read_catalog_json(txn)
            catalog = self._parse(catalog_json)
            changes = None if self._sequence is None else environment.changes_since(txn, self._sequence)
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
        self.gate.generation = generation  # last: with it others come in
        return moved

    def rest(self) -> None:
        """Give the read transaction back if it is out of date and nobody is inside; the next enter() takes a new one.

        That costs no more than it would have to move the old one on.
        """
        with self._lock:
            if self.environment.handle.is_broken:
                return  # there may be no new one
            if not self.gate.inside and self._txn is not None and self._word.load() != self.gate.generation:
                self.environment.handle.end_read(self._txn)
                self._txn = self._tree = None
                self.gate.generation = _NOTHING_SEEN

    @property
    def is_reading(self) -> bool:
        return self._txn is not None

    def let_go(self) -> None:
        """Give up the transaction and all page addresses; the next enter() begins anew. Within alone()."""
        if self._txn is not None:
            self.environment.handle.end_read(self._txn)
        self._txn = self._tree = self._sequence = None
        self._residence.forget()
        self.directories = {}
        if self.is_open:
            self.gate.generation = _NOTHING_SEEN

    def _parse(self, document: bytes | None) -> Catalog:
        """The catalog, from memory if it is the one of the snapshot. Not to be changed."""
        known_document, known = self._parsed  # a pair, so that no lock is needed: a writer must not wait for a reader
        return known if document == known_document else Catalog.from_json(document)

    def _take_catalog(self, catalog: Catalog, catalog_json: bytes | None) -> None:
        if catalog_json == self._parsed[0]:
            return
        before = self.catalog
        for name in list(self._layouts):
            same_table = catalog.tables.get(name) == before.tables[name]
            if not same_table or catalog.views[name].features != before.views[name].features:
                self._layouts.pop(name)
                self._drop_directory(name)
        self.catalog, self._parsed = catalog, (catalog_json, catalog)
        self.catalog_version += 1

    def _patch(self, changes: bytes | None) -> None:
        """Bring the directories to the present snapshot: the changed buckets, or all when changes is None."""
        if changes is None:
            self.directories = {}  # each is built again when it is asked for
            return
        for name, directory in list(self.directories.items()):
            if directory is None:  # of an empty table: quickly built
                self._drop_directory(name)
                continue
            try:
                directory.update(self._tree, changes)
            except ValueError:
                self._drop_directory(name)  # building it says what is wrong, to whoever asks for this view

    def _drop_directory(self, view_name: str) -> None:
        self.directories = {name: held for name, held in self.directories.items() if name != view_name}

    def pretouch(self, lock: bool = False) -> None:
        """Map the file into this process and build all directories now, rather than as lookups come to need them.

        lock: keep the file in memory, also as it grows. Raises ResourceExhausted when the system refuses that.
        """
        with self.reading():
            self._tree.populate()
            for view_name in self.catalog.views:
                with suppress(ShorttailError):  # a damaged table is the matter of those who look rows up in it
                    self.directory(view_name)
            if lock:
                self._residence.lock(self._tree)

    def lock_growth(self) -> None:
        """Lock what the file has grown by since pretouch(lock=True); for an idle timer, as it takes its time."""
        tree = self._tree
        if tree is not None:
            self._residence.follow(tree)

    @contextmanager
    def _sound(self, view_name: str) -> Iterator[None]:
        """Name the table in what native code says about a page."""
        try:
            yield
        except ValueError as error:
            raise damaged(self.path, view_name, error) from None

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
            return self.directories[view_name]
        except KeyError:
            with self._build_lock:
                if view_name not in self.directories:
                    self.directories[view_name] = self._build(view_name)
            return self.directories[view_name]

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


class _Idle:
    """Lets snapshots rest that are not in use: one thread for all of this process, while there are any."""

    def __init__(self) -> None:
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._snapshots.add(snapshot)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="shorttail-idle", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(LIMITS.idle_rest_ms / 1000)
            with self._lock:
                snapshots = [snapshot for snapshot in self._snapshots if snapshot.is_open]
                if not snapshots:
                    self._thread = None
                    return
            for snapshot in snapshots:
                snapshot.rest()
                snapshot.lock_growth()
            del snapshot, snapshots  # or the last ones seen would live on here


_idle = _Idle()


def _after_fork() -> None:
    _idle.__init__()  # type: ignore[misc]  # its thread is not in the child, and its lock may be held for good


os.register_at_fork(after_in_child=_after_fork)
