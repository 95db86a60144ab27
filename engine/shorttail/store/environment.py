"""One LMDB environment: opening it, its format version, write transactions with a change log, the generation word.

A store is a directory: data.mdb and lock.mdb (LMDB), generation (8 bytes of shared memory that count commits),
load.lock (held by the one bulk load that may run) and models/. Inside LMDB there is one database, in which the first
byte of a key says what it is: the format version, the catalog and the state; "l": what a commit changed; "t": a page of
a table. docs/format.md has it all.

LMDB must never be opened twice in one process, so environments are shared: see Environment.open.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shorttail._native.pages import GenerationWord, Tree, crc32c
from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument
from shorttail.store.checksums import KEY as SUMS_KEY
from shorttail.store.checksums import Checksums, entry_sum
from shorttail.store.lmdb_file import PAGE_BYTES
from shorttail.store.lmdb_handle import Handle
from shorttail.store.lmdb_handle import Transaction as Transaction
from shorttail.store.mapping import map_full, pages_to_use
from shorttail.store.opening import check_directory, map_word, translated

FORMAT_VERSION = 2
BUCKET_KEY_BYTES = 8
PAGE_HEADER_BYTES = 16
INLINE_BYTES = 2038 - 8 - 9  # the longest value that LMDB keeps in its tree, less a node's header and a log entry's key
ROOT_TRIES = 100  # a snapshot's root is gone once two commits were made since it was taken: take another

_FORMAT, _CATALOG, _STATE_KEY = b"format", b"catalog", b"state"
_STATE = struct.Struct("<QQQ")  # sequence number of the last commit, of the oldest one in the log, bytes of the log
_LOG_KEY = struct.Struct(">cQ")  # big-endian: LMDB then keeps the log in order
_TABLE_KEY = struct.Struct(">cI")
_CATALOG_CHANGE = bytes(4 + BUCKET_KEY_BYTES)  # in the log: table 0 stands for the catalog


def table_prefix(table_id: int) -> bytes:
    """What the keys of that table's pages begin with."""
    return _TABLE_KEY.pack(b"t", table_id)


def page_key(table_id: int, bucket_key: bytes) -> bytes:
    """The key of a page in LMDB."""
    return _TABLE_KEY.pack(b"t", table_id) + bucket_key


def _log_key(sequence: int) -> bytes:
    return _LOG_KEY.pack(b"l", sequence)


class Environment:
    """The LMDB environment of one store, shared by all who open that path in this process.

    Thread-safe. A process that forks must not use it in the child: every use there raises InvalidArgument.
    """

    _registry: dict[str, Environment] = {}  # noqa: RUF012  by real path
    _registry_lock = threading.Lock()

    def __init__(self, handle: Handle, word_map: mmap.mmap) -> None:
        """For open() only."""
        self.path = handle.path
        self.handle = handle
        self.word = GenerationWord(word_map)
        self._word_map = word_map
        self._users = 1
        self._pid = os.getpid()
        self._writing_thread: int | None = None
        self._checked_s = time.monotonic()  # when the table of readers was last rid of dead ones
        self._writer: WriteTransaction | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False) -> Environment:
        """The environment of the store at path; close() it as often as it was opened.

        create: make the store if it is not there. Raises NotFound (no store), InvalidArgument (not a store, damaged, of
        a newer format, opened before a fork), PermissionDenied, ResourceExhausted.
        """
        path = Path(path)
        name = os.path.realpath(path)
        with cls._registry_lock:
            known = cls._registry.get(name)
            if known is not None:
                known.check_process()
                known._users += 1
                return known
            check_directory(path, create)
            with translated(path):
                if create:
                    path.mkdir(parents=True, exist_ok=True)
                handle = Handle(path, create)
                try:
                    environment = cls(handle, map_word(path / "generation"))
                    environment._check_format(create)
                except BaseException:
                    handle.env.close()
                    raise
            cls._registry[name] = environment
            return environment

    def close(self) -> None:
        """End one use. The last one closes LMDB: no transaction may be open then."""
        with self._registry_lock:
            self._users -= 1
            if self._users or os.getpid() != self._pid:
                return
            for name, environment in list(self._registry.items()):
                if environment is self:
                    del self._registry[name]
            self.handle.env.close()
            self.word.release()
            self._word_map.close()

    def check_process(self) -> None:
        """Raise InvalidArgument if this is a child forked after the store was opened."""
        if os.getpid() != self._pid:
            raise InvalidArgument(
                f"store '{self.path}' was opened before this process forked; open it after the fork, or start "
                "processes with multiprocessing's 'spawn' method"
            )

    def _check_format(self, create: bool) -> None:
        version = self._format()
        if version is None and create and not self.handle.env.stat()["entries"]:
            with self.write() as writer:
                writer.txn.put(_FORMAT, str(FORMAT_VERSION).encode(), overwrite=False)
                writer.changed(_CATALOG_CHANGE)
            version = self._format()
        if version is None:
            raise InvalidArgument(
                f"'{self.path}' is an LMDB database but not a shorttail store; choose another path for --store"
            )
        if not version.isdigit():
            raise InvalidArgument(f"store '{self.path}' is damaged; restore it from a backup")
        if int(version) != FORMAT_VERSION:
            remedy = (
                "upgrade shorttail" if int(version) > FORMAT_VERSION else "make a new store, by apply and materialize"
            )
            raise InvalidArgument(
                f"store '{self.path}' has format {int(version)}, and this shorttail reads {FORMAT_VERSION}; {remedy}"
            )

    def _format(self) -> bytes | None:
        with self.read() as txn:
            value = txn.get(_FORMAT)
            return None if value is None else bytes(value)

    # -- read transactions -----------------------------------------------------------------------------------------

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A read transaction for a `with` block; it gives values as memoryviews of the map."""
        if not self.is_writing():
            self.handle.recover()
        txn = self._begin_read()
        try:
            yield txn
        finally:
            self.handle.end_read(txn)

    def read_tree(self) -> tuple[Transaction, Tree]:
        """A read transaction and its B+tree, to be read without LMDB. To be given to handle.end_read().

        Raises Unavailable when handle.recover() must be called first.
        """
        for _ in range(ROOT_TRIES):
            txn = self._begin_read()
            try:
                tree = Tree(txn.get(_FORMAT), txn.id())
            except BaseException:
                self.handle.end_read(txn)
                raise
            if not tree.gone:
                return txn, tree
            self.handle.end_read(txn)
        raise Internal(f"store '{self.path}': commits follow each other too fast to read between them")

    def _begin_read(self) -> Transaction:
        self.check_process()
        return self.handle.begin_read()

    def read_catalog_json(self, txn: Transaction) -> bytes | None:
        """The catalog as of that transaction."""
        value = txn.get(_CATALOG)
        return None if value is None else bytes(value)

    def sequence(self, txn: Transaction) -> int:
        """Number of the last commit as of that transaction."""
        return self._state(txn)[0]

    def changes_since(self, txn: Transaction, sequence: int) -> bytes | None:
        """What commits after that number changed, as Directory.update() takes it; None when the log is too short."""
        last, oldest, _ = self._state(txn)
        if last < sequence or oldest > sequence + 1:
            return None
        entries = [txn.get(_log_key(number)) for number in range(sequence + 1, last + 1)]
        return None if None in entries else b"".join(entries)

    def _state(self, txn: Transaction) -> tuple[int, int, int]:
        value = txn.get(_STATE_KEY)
        return (0, 1, 0) if value is None else _STATE.unpack(value)

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[WriteTransaction]:
        """A write transaction, durable when the block ends; an exception in it undoes everything.

        Waits for the writer that is at work, of whatever process. Raises ResourceExhausted when disk or map are full.
        """
        self.check_process()
        if self.is_writing():
            raise Internal(f"store '{self.path}': a write was started within another one")
        self.handle.recover()
        with self.handle.write_lock, translated(self.path):
            txn = self.handle.begin_write()
            self._writing_thread = threading.get_ident()
            try:
                self._extend_file()
                self._check_readers()
                self._writer = writer = WriteTransaction(self, txn)
                yield writer
                changed = writer.finish()
                self._check_room(writer)
            except BaseException:
                txn.abort()
                raise
            finally:
                self._writing_thread = self._writer = None
            self.handle.commit(txn, writer.n_pages)
        if changed:
            self.word.bump()

    def _check_room(self, writer: WriteTransaction) -> None:
        """Raise ResourceExhausted if the write makes tables larger by what deletes need."""
        if writer.grown_pages() > 0 and count_pages(writer.txn) > pages_to_use(self.handle.env.info()["map_size"]):
            raise map_full(self.path)

    def is_writing(self) -> bool:
        """Whether this thread is within write()."""
        return self._writing_thread == threading.get_ident()

    @property
    def writer(self) -> WriteTransaction | None:
        """What this thread is within, if it is within write()."""
        return self._writer if self.is_writing() else None

    def _check_readers(self) -> None:
        """Free what killed readers hold: a slot each, and the pages of their snapshot, which LMDB cannot use again.

        Opening a store does it too; but a writer may run for days while its readers come and go.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s >= LIMITS.reader_check_ms / 1000:
            self._checked_s = now_s
            self.handle.env.reader_check()

    def _extend_file(self) -> None:
        """Make the file as long as its page count says.

        LMDB does not write pages at the end that a commit took and gave back; with them there, a file that is too short
        is a damaged one. Only under the write lock: truncate() must not race with a writer that makes the file longer.
        """
        needed = (self.handle.env.info()["last_pgno"] + 1) * PAGE_BYTES
        file = self.path / "data.mdb"
        if file.stat().st_size < needed:
            os.truncate(file, needed)


class WriteTransaction:
    """What is done inside Environment.write(). `txn` is the LMDB transaction."""

    def __init__(self, environment: Environment, txn: Transaction) -> None:
        self.txn = txn
        self.n_pages = 0  # put so far, of tables
        self._environment = environment
        self._changes: set[bytes] = set()
        self._many_changes: list[bytes] = []
        self._cursor = txn.cursor()
        self._value_pages: int = txn.stat()["overflow_pages"]

    def get_catalog(self) -> bytes | None:
        return self._environment.read_catalog_json(self.txn)

    def put_catalog(self, document: bytes) -> None:
        self.txn.put(_CATALOG, document)
        self._changes.add(_CATALOG_CHANGE)

    def put_page(self, table_id: int, bucket_key: bytes, image: bytes) -> None:
        """Write a page, and tell readers of it."""
        key = page_key(table_id, bucket_key)
        self.txn.put(key, image)
        self.n_pages += 1
        self.changed(key)

    def put_pages(self, pages: list[tuple[bytes, Any]], changes: bytes) -> None:
        """The same for many, by their keys in LMDB, and in the order of these. changes: the entries of the log."""
        self._cursor.putmulti(pages)
        self.n_pages += len(pages)
        self._many_changes.append(changes)

    @contextmanager
    def committed_tree(self) -> Iterator[Tree]:
        """LMDB's tree as the last commit left it. What this write changed is not in it."""
        txn, tree = self._environment.read_tree()
        try:
            yield tree
        finally:
            self._environment.handle.end_read(txn)

    @property
    def path(self) -> Path:
        return self._environment.path

    @property
    def n_entries(self) -> int:
        """Keys in LMDB: pages of all tables, and a few others."""
        count: int = self.txn.stat()["entries"]
        return count

    def delete_page(self, table_id: int, bucket_key: bytes) -> None:
        """Delete the page of a bucket that was merged into another. Its readers are told of that one."""
        self.txn.delete(page_key(table_id, bucket_key))

    def changed(self, key: bytes) -> None:
        """Tell readers that the page of that key is new. Not needed for a table that no catalog names yet."""
        self._changes.add(key[-len(_CATALOG_CHANGE) :])

    def find_bucket(self, table_id: int, row_hash: bytes) -> tuple[bytes, memoryview | None]:
        """(key, page) of the bucket that the hash belongs to; the page is None in an empty table."""
        cursor, wanted = self._cursor, page_key(table_id, row_hash)
        found = cursor.set_range(wanted)
        if not (found and bytes(cursor.key()) == wanted):
            found = cursor.prev() if found else cursor.last()
        if found:
            key, page = cursor.item()
            key = bytes(key)
            if key.startswith(wanted[:-BUCKET_KEY_BYTES]):
                return key[-BUCKET_KEY_BYTES:], page
        return bytes(BUCKET_KEY_BYTES), None

    def get_page(self, table_id: int, bucket_key: bytes) -> memoryview | None:
        page: memoryview | None = self.txn.get(page_key(table_id, bucket_key))
        return page

    def grown_pages(self) -> int:
        """Pages of tables and the catalog that there are more than before."""
        count: int = self.txn.stat()["overflow_pages"] - self._value_pages
        return count

    def finish(self) -> bool:
        """Write the log; True if there was something for readers to see."""
        if not self._changes and not self._many_changes:
            return False
        last, oldest, log_bytes = self._environment._state(self.txn)
        known = Checksums.unpack(self.txn.get(SUMS_KEY)) or Checksums.of(
            self.get_catalog(), None, log_entries(self.txn)
        )
        entry = b"".join(self._many_changes + sorted(self._changes))
        last += 1
        self.txn.put(_log_key(last), entry)
        self._value_pages += value_pages(entry)
        log_bytes += len(entry)
        log_sum = known.log ^ entry_sum(_log_key(last), entry)
        while oldest <= last and (last - oldest >= LIMITS.change_log_commits or log_bytes > LIMITS.change_log_bytes):
            value = self.txn.get(_log_key(oldest))
            if value is not None:
                self._value_pages -= value_pages(value)
                log_bytes -= len(value)
                log_sum ^= entry_sum(_log_key(oldest), value)
                self.txn.delete(_log_key(oldest))
            oldest += 1
        state = _STATE.pack(last, oldest, log_bytes)
        self.txn.put(_STATE_KEY, state)
        catalog_sum = crc32c(self.get_catalog() or b"") if _CATALOG_CHANGE in self._changes else known.catalog
        self.txn.put(SUMS_KEY, Checksums(catalog_sum, crc32c(state), log_sum).pack())
        return True


def value_pages(value: Any) -> int:
    """Pages of their own that LMDB gives the value of a log entry."""
    return 0 if len(value) <= INLINE_BYTES else (len(value) + PAGE_HEADER_BYTES + PAGE_BYTES - 1) // PAGE_BYTES


def count_pages(txn: Transaction) -> int:
    """Pages in use as of that transaction, but for those that list the free ones."""
    stat = txn.stat()
    total: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return total


def log_entries(txn: Transaction) -> Iterator[tuple[bytes, memoryview]]:
    """Keys and values of the change log, oldest first."""
    cursor = txn.cursor()
    if cursor.set_range(_log_key(0)):
        for key, value in cursor:
            if bytes(key[:1]) != b"l":
                return
            yield bytes(key), value


def table_pages(txn: Transaction, table_id: int) -> Iterator[tuple[bytes, memoryview]]:
    """(bucket key, page) of that table, in order."""
    prefix = table_prefix(table_id)
    cursor = txn.cursor()
    if cursor.set_range(prefix):
        for key, page in cursor:
            name = bytes(key)
            if not name.startswith(prefix):
                return
            yield name[-BUCKET_KEY_BYTES:], page


def table_ids(txn: Transaction) -> list[int]:
    """Ids of the tables that have pages."""
    found: list[int] = []
    cursor = txn.cursor()
    while cursor.set_range(table_prefix(found[-1] + 1 if found else 0)):
        kind, table_id = _TABLE_KEY.unpack_from(cursor.key())
        if kind != b"t":
            break
        found.append(table_id)
    return found


def drop_table(environment: Environment, table_id: int) -> None:
    """Delete the pages of a table that no catalog names any more.

    In commits of LIMITS.drop_commit_pages, so that other writers need not wait for all of a large table.
    """
    prefix, left = table_prefix(table_id), True
    while left:
        with environment.write() as writer:
            cursor = writer.txn.cursor()
            left = cursor.set_range(prefix)
            for _ in range(LIMITS.drop_commit_pages):
                left = left and bytes(cursor.key()).startswith(prefix)
                if not left:
                    break
                left = cursor.delete() and cursor.key() != b""


def _after_fork() -> None:
    """In the child: make whoever looks at the word look closer, and be refused."""
    for environment in Environment._registry.values():
        environment.word.poison()
    Environment._registry_lock = threading.Lock()  # it may have been held by a thread that is not here


os.register_at_fork(after_in_child=_after_fork)
