"""One LMDB environment: opening it, its format version, transactions, the change log and the generation word.

docs/format.md describes the files of a store and the keys in LMDB.

One process must never open the same LMDB environment twice, so environments are shared: see Environment.open.
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
from shorttail.errors import Internal, InvalidArgument, Unavailable
from shorttail.store.checksums import KEY as CHECKSUMS_KEY
from shorttail.store.checksums import Checksums, entry_checksum
from shorttail.store.files import make_folder
from shorttail.store.format import FORMAT_VERSION, check_writable, read_format
from shorttail.store.lmdb_file import CATALOG_KEY, FORMAT_KEY, PAGE_BYTES, STATE_KEY
from shorttail.store.lmdb_handle import LmdbHandle
from shorttail.store.lmdb_handle import Transaction as Transaction
from shorttail.store.mapping import map_full_error, usable_pages, value_pages
from shorttail.store.opening import (
    check_directory,
    damaged_store,
    map_generation,
    no_store,
    other_database,
    translate_errors,
)
from shorttail.store.settings import StoreSettings

BUCKET_KEY_BYTES = 8

_STATE = struct.Struct("<QQQ")  # number of the last commit, number of the oldest commit in the log, bytes of the log
_LOG_KEY = struct.Struct(">cQ")  # big-endian, so that LMDB orders the log by commit number
_TABLE_KEY = struct.Struct(">cI")
CATALOG_CHANGE = bytes(4 + BUCKET_KEY_BYTES)  # a log entry with table id 0 says that the catalog changed


def table_prefix(table_id: int) -> bytes:
    """Return the prefix of the keys of all pages of a table."""
    return _TABLE_KEY.pack(b"t", table_id)


def page_key(table_id: int, bucket_key: bytes) -> bytes:
    """Return the LMDB key of a page."""
    return _TABLE_KEY.pack(b"t", table_id) + bucket_key


def _log_key(sequence: int) -> bytes:
    return _LOG_KEY.pack(b"l", sequence)


class Environment:
    """The LMDB environment of one store. All users of one path in this process share one Environment.

    Thread-safe. A forked child must not use its parent's Environment: every use there raises InvalidArgument.
    """

    _registry: list[Environment] = []  # noqa: RUF012  the open environments
    _registry_lock = threading.Lock()

    def __init__(self, handle: LmdbHandle, word_map: mmap.mmap) -> None:
        """Called by open() only."""
        self.path = handle.path
        self.handle = handle
        handle.files.add("generation")
        self.word = GenerationWord(word_map)
        self._word_map = word_map
        self._users = 1
        self._is_store = False  # until _check_format() has found that it is one, or made it one
        self._writing_thread: int | None = None
        self._checked_s = time.monotonic()  # time of the last clean-up of LMDB's reader table
        self._writer: WriteTransaction | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False) -> Environment:
        """Return the environment of the store at path. Each open() needs one close().

        create: make the store if it does not exist. Raises NotFound (no store), InvalidArgument (not a store, damaged,
        another format version, or opened before a fork), PermissionDenied and ResourceExhausted.
        """
        path = Path(path)
        with cls._registry_lock:
            for known in cls._registry:
                if not known.handle.files.are_at(path):
                    continue
                known.check_process()
                if known.handle.files.change():
                    raise Unavailable(
                        f"store '{path}' is open in this process as '{known.path}', where it is not any more; close "
                        "it first"
                    )
                known._users += 1
                return known
            check_directory(path, create)
            with translate_errors(path):
                if create:
                    make_folder(path)
                handle = LmdbHandle(path, create)
                try:
                    environment = cls(handle, map_generation(path / "generation"))
                    environment._check_format(create)
                except BaseException:
                    handle.env.close()
                    raise
            cls._registry.append(environment)
            return environment

    def close(self) -> None:
        """Undo one open(). The last close() closes LMDB; no transaction may be open then."""
        with self._registry_lock:
            self._users -= 1
            if self._users or os.getpid() != self.handle.pid:
                return
            self._registry.remove(self)
            self.handle.env.close()
            self.word.release()
            self._word_map.close()

    def check_process(self) -> None:
        """Raise InvalidArgument in a child process that was forked after the store was opened."""
        if os.getpid() != self.handle.pid:
            raise InvalidArgument(
                f"store '{self.path}' was opened before this process forked; open it after the fork, or start "
                "processes with multiprocessing's 'spawn' method"
            )

    def _check_format(self, create: bool) -> None:
        version = self._value(FORMAT_KEY)
        if version is None and create and not self.handle.env.stat()["entries"]:
            with self.write() as writer:
                writer.txn.put(FORMAT_KEY, str(FORMAT_VERSION).encode(), overwrite=False)
                writer.changed(CATALOG_CHANGE)
            version = self._value(FORMAT_KEY)
        if version is None and not self.handle.env.stat()["entries"]:
            raise no_store(self.path)  # it was being made when the disk was full, or the process was killed
        if version is None and self._value(STATE_KEY) is None:
            raise other_database(self.path)
        read_format(self.path, version)
        self._is_store = True

    def _value(self, key: bytes) -> bytes | None:
        """Return the value of a key, the path to which was checked before LMDB was opened."""
        txn = self.handle.begin_read()
        try:
            value = txn.get(key)
            return None if value is None else bytes(value)
        finally:
            self.handle.end_read(txn)

    # -- read transactions -----------------------------------------------------------------------------------------

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Yield a read transaction for the `with` block; values are memoryviews. The first one checks the structure."""
        self.check_process()  # before recover(), which takes a lock that may be held for ever in a forked child
        if not self.is_writing():
            self.handle.recover()
        self.handle.check_structure()
        txn = self.handle.begin_read()
        try:
            yield txn
        finally:
            self.handle.end_read(txn)

    def read_tree(self) -> tuple[Transaction, Tree]:
        """Begin a read transaction and return it with its tree: see LmdbHandle.read_tree()."""
        self.check_process()
        return self.handle.read_tree()

    def read_catalog_json(self, txn: Transaction | Tree) -> bytes | None:
        """Return the JSON of the catalog as of a transaction; None in a store without a catalog."""
        value = txn.get(CATALOG_KEY)
        return None if value is None else bytes(value)

    def sequence(self, txn: Transaction | Tree) -> int:
        """Return the number of the last commit as of a transaction."""
        return self._state(txn)[0]

    def changes_since(self, txn: Transaction | Tree, sequence: int) -> bytes | None:
        """Return the log entries of all commits after `sequence`, joined as Directory.update() takes them.

        Returns None if the log no longer holds them all.
        """
        last, oldest, _ = self._state(txn)
        if last < sequence or oldest > sequence + 1:
            return None
        entries: list[Any] = [txn.get(_log_key(number)) for number in range(sequence + 1, last + 1)]
        return None if None in entries else b"".join(entries)

    def _state(self, txn: Transaction | Tree) -> tuple[int, int, int]:
        value = txn.get(STATE_KEY)
        if value is not None and len(value) != _STATE.size:
            raise damaged_store(self.path, "the state of the change log has a wrong length")
        return (0, 1, 0) if value is None else _STATE.unpack(value)

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def write(self) -> Iterator[WriteTransaction]:
        """Yield a write transaction, which is durable when the `with` block has ended. An exception in it undoes all.

        Waits until the current writer, in any process, has finished. Raises ResourceExhausted when the disk or the map
        is full, Unavailable when the store at the path is another one, InvalidArgument for a damaged file and for a
        store of an older format, and Internal when this thread is already in write().
        """
        self.check_process()
        if self.is_writing():
            raise Internal(f"store '{self.path}': a write was started within another one")
        self.handle.recover()
        with self.handle.write_lock, translate_errors(self.path):
            self.handle.check_files()
            self.handle.check_structure()
            txn = self.handle.begin_write()
            self._writing_thread = threading.get_ident()
            try:
                if self._is_store:
                    self.handle.check_content()
                    check_writable(self.path, txn.get(FORMAT_KEY))
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
        self.handle.check_files()  # before the write is acknowledged

    def _check_room(self, writer: WriteTransaction) -> None:
        """Raise ResourceExhausted if the write makes tables larger and leaves too few free pages for later deletes."""
        if writer.grown_pages() <= 0:
            return
        map_bytes, map_size = self.handle.env.info()["map_size"], StoreSettings.of(writer.txn).map_size
        if count_pages(writer.txn) > usable_pages(map_bytes, map_size):
            raise map_full_error(self.path, map_size if map_size and map_size < map_bytes else None)

    def is_writing(self) -> bool:
        """Return whether this thread is inside write()."""
        return self._writing_thread == threading.get_ident()

    @property
    def writer(self) -> WriteTransaction | None:
        """The write transaction that this thread is inside of; None outside write()."""
        return self._writer if self.is_writing() else None

    def _check_readers(self) -> None:
        """Free the reader slots of killed processes, at most every LIMITS.reader_check_ms.

        As long as a dead reader holds its slot, LMDB cannot reuse the pages of its snapshot. Opening a store frees the
        slots as well, but a writer may run for days while reader processes start and die.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s >= LIMITS.reader_check_ms / 1000:
            self._checked_s = now_s
            self.handle.env.reader_check()

    def _extend_file(self) -> None:
        """Make the file as long as the page count in its meta page says.

        LMDB never writes pages at the end of the file that a commit allocated and freed again. After this call a file
        that is too short is a damaged one. Needs the write lock, because truncate() must not race with another writer.
        """
        needed = (self.handle.env.info()["last_pgno"] + 1) * PAGE_BYTES
        file = self.handle.files.folder / "data.mdb"
        if file.stat().st_size < needed:
            os.truncate(file, needed)


class WriteTransaction:
    """A write transaction, yielded by Environment.write(). `txn` is the LMDB transaction."""

    def __init__(self, environment: Environment, txn: Transaction) -> None:
        self.txn = txn
        self.n_pages = 0  # table pages written so far
        self._environment = environment
        self._changes: set[bytes] = set()
        self._many_changes: list[bytes] = []
        self._cursor = txn.cursor()
        self._value_pages: int = txn.stat()["overflow_pages"]

    def get_catalog(self) -> bytes | None:
        return self._environment.read_catalog_json(self.txn)

    def put_catalog(self, document: bytes) -> None:
        self._take(CATALOG_KEY)
        self.txn.put(CATALOG_KEY, document)
        self._changes.add(CATALOG_CHANGE)

    def put_page(self, table_id: int, bucket_key: bytes, image: bytes) -> None:
        """Write a page and enter it in the change log."""
        key = page_key(table_id, bucket_key)
        before = self._take(key)
        if before is not None and len(before) > len(image):
            self.txn.delete(key)  # otherwise LMDB keeps all pages of a value that was written in this transaction
        self.txn.put(key, image)
        self.n_pages += 1
        self.changed(key)

    def put_pages(self, pages: list[tuple[bytes, Any]], changes: bytes) -> None:
        """Write many pages. pages: (LMDB key, image), in the order of the keys. changes: their change log entries."""
        self._cursor.putmulti(pages)
        self.n_pages += len(pages)
        self._many_changes.append(changes)

    @contextmanager
    def committed_tree(self) -> Iterator[Tree]:
        """Yield LMDB's tree as of the last commit, without the changes of this transaction."""
        txn, tree = self._environment.read_tree()
        try:
            yield tree
        finally:
            self._environment.handle.end_read(txn)

    @property
    def path(self) -> Path:
        return self._environment.path

    @property
    def commit_number(self) -> int:
        """The number of this commit, which the pages that it writes get."""
        return self._environment.sequence(self.txn) + 1

    @property
    def n_entries(self) -> int:
        """The number of entries in LMDB: the pages of all tables and a few others."""
        count: int = self.txn.stat()["entries"]
        return count

    def put_value(self, key: bytes, value: bytes) -> None:
        """Write an entry that no reader follows."""
        self._take(key)
        self.txn.put(key, value)

    def delete_value(self, key: bytes) -> None:
        self._take(key)
        self.txn.delete(key)

    def delete_page(self, table_id: int, bucket_key: bytes) -> None:
        """Delete the page of a bucket that was merged into its sibling. The sibling's log entry tells readers."""
        key = page_key(table_id, bucket_key)
        self._take(key)
        self.txn.delete(key)

    def changed(self, key: bytes) -> None:
        """Enter a changed page in the change log. Not needed for a table that the catalog does not name yet."""
        self._changes.add(key[-len(CATALOG_CHANGE) :])

    def find_bucket(self, table_id: int, row_hash: bytes) -> tuple[bytes, memoryview | None]:
        """Return (bucket key, page) of the bucket that a row's hash belongs to; the page is None in an empty table.

        row_hash: 8 bytes, big-endian.
        """
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

    def _take(self, key: bytes) -> memoryview | None:
        """Return the value of a key whose pages LMDB may free now. Raises InvalidArgument for a damaged file."""
        value: memoryview | None = self.txn.get(key)
        if value is not None and not self._environment.handle.may_free(value, key):
            raise damaged_store(self.path, f"the pages of the value of {key!r} are not its own")
        return value

    def grown_pages(self) -> int:
        """Return by how many pages this transaction has made the tables and the catalog larger."""
        count: int = self.txn.stat()["overflow_pages"] - self._value_pages
        return count

    def finish(self) -> bool:
        """Write the change log entry of this commit. Return False if nothing changed for readers."""
        if not self._changes and not self._many_changes:
            return False
        last, oldest, log_bytes = self._environment._state(self.txn)
        known = Checksums.unpack(self.txn.get(CHECKSUMS_KEY)) or Checksums.of(
            self.get_catalog(), None, log_entries(self.txn)
        )
        entry = b"".join(self._many_changes + sorted(self._changes))
        last += 1
        self.txn.put(_log_key(last), entry)
        self._value_pages += value_pages(entry)
        log_bytes += len(entry)
        log_sum = known.log ^ entry_checksum(_log_key(last), entry)
        settings = StoreSettings.of(self.txn)
        commits_most = settings.log_commits or LIMITS.change_log_commits
        bytes_most = settings.log_bytes or LIMITS.change_log_bytes
        while oldest <= last and (last - oldest >= commits_most or log_bytes > bytes_most):
            value = self._take(_log_key(oldest))
            if value is not None:
                self._value_pages -= value_pages(value)
                log_bytes -= len(value)
                log_sum ^= entry_checksum(_log_key(oldest), value)
                self.txn.delete(_log_key(oldest))
            oldest += 1
        state = _STATE.pack(last, oldest, log_bytes)
        self.txn.put(STATE_KEY, state)
        catalog_sum = crc32c(self.get_catalog() or b"") if CATALOG_CHANGE in self._changes else known.catalog
        self.txn.put(CHECKSUMS_KEY, Checksums(catalog_sum, crc32c(state), log_sum).pack())
        return True


def count_pages(txn: Transaction) -> int:
    """Return the pages in use as of a transaction, without the pages that hold LMDB's free list."""
    stat = txn.stat()
    total: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return total


def log_entries(txn: Transaction) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (key, value) of each entry of the change log, oldest first."""
    cursor = txn.cursor()
    if cursor.set_range(_log_key(0)):
        for key, value in cursor:
            if bytes(key[:1]) != b"l":
                return
            yield bytes(key), value


def table_pages(txn: Transaction, table_id: int) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (bucket key, page) of each page of a table, in the order of the bucket keys."""
    prefix = table_prefix(table_id)
    cursor = txn.cursor()
    if cursor.set_range(prefix):
        for key, page in cursor:
            name = bytes(key)
            if not name.startswith(prefix):
                return
            yield name[-BUCKET_KEY_BYTES:], page


def table_ids(txn: Transaction) -> list[int]:
    """Return the ids of all tables that have pages, in ascending order."""
    found: list[int] = []
    cursor = txn.cursor()
    while cursor.set_range(table_prefix(found[-1] + 1 if found else 0)):
        kind, table_id = _TABLE_KEY.unpack_from(cursor.key())
        if kind != b"t":
            break
        found.append(table_id)
    return found


def _after_fork() -> None:
    """Make all open environments refuse further use in a forked child.

    A poisoned generation word always reads as changed, so each reader looks for a new snapshot and check_process()
    raises.
    """
    for environment in Environment._registry:
        environment.word.poison()
    Environment._registry_lock = threading.Lock()  # a thread that does not exist in the child may hold the old lock


os.register_at_fork(after_in_child=_after_fork)
