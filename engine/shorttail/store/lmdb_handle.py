"""An open LMDB environment that can be opened again under those who use it.

When the write of its meta page fails, LMDB begins no transaction any more until it is opened again, as what other
processes see of that page is unsure. Closing it takes away all memory that it gave, so nobody may be reading then.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import lmdb

from shorttail._native.pages import Writeback
from shorttail.errors import ResourceExhausted, ShorttailError, Unavailable
from shorttail.store.opening import open_lmdb, translated

EARLY_PAGES = 128  # of a commit that is worth a thread which has them written while LMDB hands over the rest
REOPEN_WAIT_S = 0.1  # for reads that are at work: they take milliseconds, but for a scan that its owner left open

Transaction = Any  # lmdb.Transaction: py-lmdb's stubs are not used


class Reader(Protocol):
    """What holds a read transaction for longer than a call: a Snapshot."""

    def alone(self) -> AbstractContextManager[None]:
        """A block in which nobody uses what the transaction gave, and none begins."""

    @property
    def is_reading(self) -> bool:
        """Whether it holds a transaction."""

    def let_go(self) -> None:
        """End the transaction and forget every address. Within alone()."""


class Handle:
    """`env` is the lmdb.Environment. Thread-safe."""

    def __init__(self, path: Path, create: bool) -> None:
        """Raises what open_lmdb() raises."""
        self.path = path
        self.env = open_lmdb(path, create)
        self.write_lock = threading.Lock()  # of the one thread of this process that may write
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._n_reads = 0  # read transactions that are open
        self._reads = threading.Condition()  # of the two above, and of env while it is replaced
        self._broken = False  # LMDB refuses all transactions until it is opened again

    def watch(self, reader: Reader) -> None:
        """Let that reader go when LMDB must be opened again."""
        with self._reads:
            self._readers.add(reader)

    def begin_read(self) -> Transaction:
        """A read transaction. To be given to end_read(). Raises Unavailable when recover() must be called first."""
        with translated(self.path), self._reads:
            self._check_usable()
            try:
                txn = self.env.begin(buffers=True)
            except lmdb.PanicError:
                self._broken = True
                self._check_usable()
            self._n_reads += 1
            return txn

    def end_read(self, txn: Transaction) -> None:
        txn.abort()
        with self._reads:
            self._n_reads -= 1
            self._reads.notify_all()

    def begin_write(self) -> Transaction:
        """A write transaction. With the write lock held until its end."""
        self._check_usable()
        return self.env.begin(write=True, buffers=True)

    def commit(self, txn: Transaction, n_pages: int) -> None:
        """Commit the write transaction, and make LMDB usable again if that fails in the way that leaves it unusable.

        n_pages: that it wrote, about.
        """
        try:
            with Writeback(self.path / "data.mdb") if n_pages >= EARLY_PAGES else nullcontext():
                txn.commit()
        except lmdb.Error as error:
            try:
                self.env.begin().abort()
            except lmdb.PanicError:
                self._broken = True
                with suppress(ShorttailError, lmdb.Error, OSError):  # then recover() tries again
                    self._reopen()
                raise ResourceExhausted(
                    f"the disk of store '{self.path}' is full or failing; whether the last write is in the store is "
                    "not known: look, or write it again"
                ) from error
            raise

    @property
    def is_broken(self) -> bool:
        """Whether recover() has something to do. Read transactions that are open go on."""
        return self._broken

    def recover(self) -> None:
        """Make LMDB usable again. Not for one that holds a read transaction, but by watch(), or the write lock.

        Raises Unavailable when others hold one, and what open_lmdb() raises.
        """
        if self._broken:
            with self.write_lock, translated(self.path):
                if self._broken:
                    self._reopen()

    def _check_usable(self) -> None:
        if self._broken:
            raise Unavailable(
                f"store '{self.path}' must be opened again, as its disk failed; end the scans of it, and try again"
            )

    def _reopen(self) -> None:
        """With the write lock held."""
        with self._reads:
            readers = list(self._readers)
        with ExitStack() as all_alone:
            for reader in readers:
                all_alone.enter_context(reader.alone())
            n_held = sum(reader.is_reading for reader in readers)
            with self._reads:
                if not self._reads.wait_for(lambda: self._n_reads == n_held, REOPEN_WAIT_S):
                    self._check_usable()
                if not all(os.access(self.path / name, os.W_OK) for name in ("data.mdb", "lock.mdb")):
                    self._check_usable()  # a file system that is read-only now: what snapshots hold still serves
                for reader in readers:
                    reader.let_go()
                self.env.close()
                self.env = open_lmdb(self.path, create=False)
                self._broken = False
