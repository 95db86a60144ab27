"""An open LMDB environment that can be closed and reopened while the store stays in use.

When a write of LMDB's meta page fails, nobody knows what other processes see of that page. LMDB then refuses every
transaction until its environment is reopened. Closing it unmaps all memory that it gave out, so no read may be active.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import lmdb

from shorttail._native.pages import Map, Tree, Writeback
from shorttail.errors import ResourceExhausted, ShorttailError, Unavailable
from shorttail.store.lmdb_file import FORMAT_KEY, Damaged, find_map
from shorttail.store.open_files import OpenFiles, Overwritten, changed_store
from shorttail.store.opening import damaged_store, open_lmdb, translate_errors

EARLY_PAGES = 128  # a commit with at least this many pages uses a Writeback thread, which starts disk writes early
POLL_S = 0.005
ROOT_TRIES = 100  # two commits after a snapshot was taken, the meta page that names its root is overwritten: try again
REOPEN_WAIT_S = 0.1  # wait for active reads: they take milliseconds, except a scan that its caller left open

Transaction = Any  # lmdb.Transaction: py-lmdb's stubs are not used


class Reader(Protocol):
    """An object that holds a read transaction for longer than a call: a Snapshot."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Return a context in which no thread uses memory of the transaction or begins to."""

    @property
    def is_reading(self) -> bool:
        """Whether the object holds a transaction."""

    def release(self) -> None:
        """End the transaction and forget every address from it. Call it inside exclusive()."""

    def release_if_stale(self) -> None:
        """End the transaction if there is a later commit and no thread uses memory of it."""


class LmdbHandle:
    """An LMDB environment and its open read transactions. `env` is the lmdb.Environment. Thread-safe."""

    def __init__(self, path: Path, create: bool) -> None:
        """Open LMDB. Raises what open_lmdb() raises."""
        self.path = path
        self.pid = os.getpid()  # of the process that may use it
        self.env = open_lmdb(path, create)
        self.files = OpenFiles(path, "data.mdb", "lock.mdb")
        self.write_lock = threading.Lock()  # held by the one thread of this process that writes
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._n_reads = 0  # open read transactions
        self._reads = threading.Condition()  # guards _readers, _n_reads, and env while it is replaced
        self._broken = False  # LMDB refuses all transactions until it is reopened
        self._map: Map | None = None  # LMDB's, once it was found
        self._checked = False  # LMDB may follow all pages

    def watch(self, reader: Reader) -> None:
        """Register a reader, whose transaction is released when LMDB must be reopened."""
        with self._reads:
            self._readers.add(reader)

    def begin_read(self) -> Transaction:
        """Begin a read transaction; end it by end_read(). Raises Unavailable if recover() must be called first."""
        with translate_errors(self.path), self._reads:
            self._check_usable()
            try:
                txn = self.env.begin(buffers=True)
            except lmdb.PanicError:
                self._broken = True
                self._check_usable()
            self._n_reads += 1
            return txn

    def read_tree(self) -> tuple[Transaction, Tree]:
        """Begin a read transaction; return it and its B+tree, which native code reads without LMDB.

        End the transaction by end_read(). Raises what begin_read() raises, Overwritten if the map does not hold this
        store any more, and InvalidArgument for a damaged file.
        """
        if self.files.change() != "overwritten":
            for _ in range(ROOT_TRIES):
                txn = self.begin_read()
                try:
                    tree = self._tree(txn)
                except BaseException:
                    self.end_read(txn)
                    raise
                if tree is not None:
                    return txn, tree
                self.end_read(txn)
        # So many commits do not follow each other that fast, and every store has a format.
        raise changed_store(self.path, "overwritten")

    def _tree(self, txn: Transaction) -> Tree | None:
        """Return the tree of a read transaction; None if it is gone, or not that of a store."""
        was_sound = self._map is not None
        with self.damage():
            if self._map is None:
                self._map = find_map(self.path, txn, self.env.info()["map_size"])
            if self._map is None:
                return None
            try:
                tree = Tree(self._map, txn.id())
                return None if tree.gone or tree.get(FORMAT_KEY) is None else tree
            except ValueError:
                if was_sound:
                    return None
                raise

    # -- the files -------------------------------------------------------------------------------------------------

    @property
    def changed(self) -> str:
        """The message of the error that each write raises because the store at the path is another one, or ""."""
        what = self.files.change() or ("overwritten" if self.is_overwritten else "")
        return changed_store(self.path, what).message if what else ""

    @property
    def is_overwritten(self) -> bool:
        """Whether somebody wrote other content into the file, so that the map does not hold the last commit."""
        try:
            self.check_content()
        except ShorttailError as error:  # or LMDB must be reopened
            return isinstance(error, Overwritten)
        return False

    def check_files(self) -> None:
        """Raise Unavailable if the files at the path are not those that are open."""
        if what := self.files.change():
            raise changed_store(self.path, what)

    def check_content(self) -> None:
        """Raise Overwritten if the map does not hold the last commit."""
        txn, _ = self.read_tree()
        self.end_read(txn)

    # -- readers ---------------------------------------------------------------------------------------------------

    def wait_for_readers(self, wait_s: float) -> bool:
        """Wait until no reader of any process is at an earlier commit than the last, or until wait_s have passed.

        Return whether they all are. This process's own readers are moved. Then LMDB can use the pages again that
        earlier commits freed.
        """
        end_s = time.monotonic() + wait_s
        with translate_errors(self.path):
            last = self.env.info()["last_txnid"]
            while True:
                with self._reads:
                    readers = list(self._readers)
                for reader in readers:
                    reader.release_if_stale()
                if min(self._snapshots(), default=last) >= last:
                    return True
                if time.monotonic() >= end_s:
                    return False
                time.sleep(POLL_S)

    def other_processes(self) -> set[int]:
        """Return the ids of the other processes that have the store open."""
        return {pid for pid, _ in self._slots()} - {self.pid}

    def _snapshots(self) -> list[int]:
        """Return the number of the LMDB commit that each reader of any process is at."""
        return [int(commit) for _, commit in self._slots() if commit.isdigit()]

    def _slots(self) -> list[tuple[int, str]]:
        """Return the process of each reader, and the number of the LMDB commit that it is at, "-" for none."""
        with self._reads:
            lines = [line.split() for line in self.env.readers().splitlines()]
        return [(int(fields[0]), fields[2]) for fields in lines if len(fields) == 3 and fields[0].isdigit()]

    def end_read(self, txn: Transaction) -> None:
        """End a read transaction. In a forked child, nothing: the transaction is its parent's, in shared memory."""
        if os.getpid() != self.pid:
            return
        txn.abort()
        with self._reads:
            self._n_reads -= 1
            self._reads.notify_all()

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Translate errors about damaged pages to InvalidArgument, and others as translate_errors() does."""
        with translate_errors(self.path):
            try:
                yield
            except (Damaged, ValueError) as error:
                raise damaged_store(self.path, str(error)) from None

    def check_structure(self, values: bool = False) -> None:
        """Check all pages of LMDB's trees, unless that was done before. LMDB must not walk through them otherwise.

        It reads about one page per hundred pages of tables. values: also check the header of each value, whatever was
        done before. Raises InvalidArgument for a damaged file.
        """
        if (self._checked and not values) or not self.env.stat()["entries"]:
            return
        txn, tree = self.read_tree()
        try:
            with self.damage():
                tree.check(values)
        finally:
            self.end_read(txn)
        self._checked = True

    def may_free(self, value: Any, key: bytes) -> bool:
        """Return whether LMDB may free the pages of the value of a key. False: they are damaged."""
        return self._map is None or self._map.may_free(value, len(key))  # no map: the store is being made

    def begin_write(self) -> Transaction:
        """Begin a write transaction. The caller holds write_lock until the transaction ends."""
        self._check_usable()
        return self.env.begin(write=True, buffers=True)

    def commit(self, txn: Transaction, n_pages: int) -> None:
        """Commit a write transaction. If the commit fails so that LMDB refuses all transactions, reopen LMDB.

        n_pages: the approximate number of pages that the transaction wrote. Raises lmdb.Error if the commit failed, and
        ResourceExhausted if it is unknown whether it failed.
        """
        try:
            with Writeback(self.path / "data.mdb") if n_pages >= EARLY_PAGES else nullcontext():
                txn.commit()
        except lmdb.Error as error:
            try:
                self.env.begin().abort()
            except lmdb.PanicError:
                self._broken = True
                with suppress(ShorttailError, lmdb.Error, OSError):  # recover() tries again later
                    self._reopen()
                raise ResourceExhausted(
                    f"the disk of store '{self.path}' is full or failing; it is unknown whether the last write is in "
                    "the store: check, or write it again"
                ) from error
            raise

    def sync(self) -> None:
        """Flush the last commit to the disk, which LMDB does itself unless the store's durability is "system"."""
        with translate_errors(self.path):
            self.env.sync(True)

    @property
    def is_broken(self) -> bool:
        """Whether recover() must be called. Open read transactions stay usable."""
        return self._broken

    def recover(self) -> None:
        """Reopen LMDB if it is broken. The caller must hold neither write_lock nor an unwatched read transaction.

        Raises Unavailable if such a read transaction is open elsewhere or the store at the path is another one, and
        what open_lmdb() raises.
        """
        if self._broken:
            with self.write_lock, translate_errors(self.path):
                if self._broken:
                    self._reopen()

    def _check_usable(self) -> None:
        if self._broken:
            raise Unavailable(
                f"store '{self.path}' must be reopened because its disk failed; end all scans of it and try again"
            )

    def _reopen(self) -> None:
        """Close and open LMDB. The caller holds write_lock. Raises what recover() raises."""
        with self._reads:
            readers = list(self._readers)
        with ExitStack() as blocked:
            for reader in readers:
                blocked.enter_context(reader.exclusive())
            n_held = sum(reader.is_reading for reader in readers)
            with self._reads:
                if not self._reads.wait_for(lambda: self._n_reads == n_held, REOPEN_WAIT_S):
                    self._check_usable()
                if what := self.files.change():
                    raise changed_store(self.path, what)
                if not all(os.access(self.path / name, os.W_OK) for name in ("data.mdb", "lock.mdb")):
                    self._check_usable()  # the file system became read-only: keep the snapshots, which still serve
                for reader in readers:
                    reader.release()
                self.env.close()
                self._map, self._checked = None, False
                self.env = open_lmdb(self.path, create=False)
                self._broken = False
