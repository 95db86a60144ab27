"""One LMDB environment: opening it, its format version, write transactions with a change log, the generation word.

A store is a directory: data.mdb and lock.mdb (LMDB), generation (8 bytes of shared memory that count commits),
load.lock (held by the one bulk load that may run) and models/. Inside LMDB there is one database, in which the first
byte of a key says what it is: the format version, the catalog and the state; "l": what a commit changed; "t": a page of
a table. docs/format.md has it all.

LMDB must never be opened twice in one process, so environments are shared: see Environment.open.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb
from lmdb.verify import VerifyError, verify

from shorttail._native.pages import GenerationWord, Tree
from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError

FORMAT_VERSION = 2
LMDB_ENGINE = 0  # 0.9: page images are sized for its page header of 16 bytes
PAGE_BYTES = 4096
BUCKET_KEY_BYTES = 8
ROOT_TRIES = 100  # a snapshot's root is gone once two commits were made since it was taken: take another

_FORMAT, _CATALOG, _STATE_KEY = b"format", b"catalog", b"state"
_STATE = struct.Struct("<QQQ")  # sequence number of the last commit, of the oldest one in the log, bytes of the log
_LOG_KEY = struct.Struct(">cQ")  # big-endian: LMDB then keeps the log in order
_TABLE_KEY = struct.Struct(">cI")
_CATALOG_CHANGE = bytes(4 + BUCKET_KEY_BYTES)  # in the log: table 0 stands for the catalog
_OWN_FILES = {"data.mdb", "lock.mdb", "generation", "load.lock", "models"}
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "afs", "ceph")

Transaction = Any  # lmdb.Transaction: py-lmdb's stubs are not used


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

    def __init__(self, path: Path, env: Any, word_map: mmap.mmap) -> None:
        """For open() only."""
        self.path = path
        self.word = GenerationWord(word_map)
        self._word_map = word_map
        self._env = env
        self._users = 1
        self._pid = os.getpid()
        self._write_lock = threading.Lock()
        self._writing_thread: int | None = None
        self._writer: Writer | None = None

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
            _check_directory(path, create)
            with translated(path):
                if create:
                    path.mkdir(parents=True, exist_ok=True)
                env = _open_lmdb(path, create)
                try:
                    environment = cls(path, env, _map_word(path / "generation"))
                    environment._check_format(create)
                except BaseException:
                    env.close()
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
            self._env.close()
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
        if version is None and create and not self._env.stat()["entries"]:
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

    def read(self) -> Transaction:
        """A read transaction, which gives values as memoryviews of the map. End it by abort() or `with`."""
        self.check_process()
        with translated(self.path):
            return self._env.begin(buffers=True)

    def read_tree(self) -> tuple[Transaction, Tree]:
        """A read transaction and its B+tree, to be read without LMDB. End the transaction by abort()."""
        for _ in range(ROOT_TRIES):
            txn = self.read()
            try:
                tree = Tree(txn.get(_FORMAT), txn.id())
            except BaseException:
                txn.abort()
                raise
            if not tree.gone:
                return txn, tree
            txn.abort()
        raise Internal(f"store '{self.path}': commits follow each other too fast to read between them")

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
    def write(self) -> Iterator[Writer]:
        """A write transaction, durable when the block ends; an exception in it undoes everything.

        Waits for the writer that is at work, of whatever process. Raises ResourceExhausted when disk or map are full.
        """
        self.check_process()
        if self.is_writing():
            raise Internal(f"store '{self.path}': a write was started within another one")
        with self._write_lock, translated(self.path):
            txn = self._env.begin(write=True, buffers=True)
            self._writing_thread = threading.get_ident()
            try:
                self._extend_file()
                self._writer = writer = Writer(self, txn)
                yield writer
                changed = writer.finish()
            except BaseException:
                txn.abort()
                raise
            finally:
                self._writing_thread = self._writer = None
            txn.commit()
        if changed:
            self.word.bump()

    def is_writing(self) -> bool:
        """Whether this thread is within write()."""
        return self._writing_thread == threading.get_ident()

    @property
    def writer(self) -> Writer | None:
        """What this thread is within, if it is within write()."""
        return self._writer if self.is_writing() else None

    def _extend_file(self) -> None:
        """Make the file as long as its page count says.

        LMDB does not write pages at the end that a commit took and gave back; with them there, a file that is too short
        is a damaged one. Only under the write lock: truncate() must not race with a writer that makes the file longer.
        """
        needed = (self._env.info()["last_pgno"] + 1) * PAGE_BYTES
        file = self.path / "data.mdb"
        if file.stat().st_size < needed:
            os.truncate(file, needed)


class Writer:
    """What is done inside Environment.write(). `txn` is the LMDB transaction."""

    def __init__(self, environment: Environment, txn: Transaction) -> None:
        self.txn = txn
        self._environment = environment
        self._changes: set[bytes] = set()
        self._cursor = txn.cursor()

    def get_catalog(self) -> bytes | None:
        return self._environment.read_catalog_json(self.txn)

    def put_catalog(self, document: bytes) -> None:
        self.txn.put(_CATALOG, document)
        self._changes.add(_CATALOG_CHANGE)

    def put_page(self, table_id: int, bucket_key: bytes, image: bytes) -> None:
        """Write a page, and tell readers of it."""
        key = page_key(table_id, bucket_key)
        self.txn.put(key, image)
        self.changed(key)

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

    def finish(self) -> bool:
        """Write the log; True if there was something for readers to see."""
        if not self._changes:
            return False
        last, oldest, log_bytes = self._environment._state(self.txn)
        entry = b"".join(sorted(self._changes))
        last += 1
        self.txn.put(_log_key(last), entry)
        log_bytes += len(entry)
        while oldest <= last and (last - oldest >= LIMITS.change_log_commits or log_bytes > LIMITS.change_log_bytes):
            value = self.txn.get(_log_key(oldest))
            log_bytes -= 0 if value is None else len(value)
            self.txn.delete(_log_key(oldest))
            oldest += 1
        self.txn.put(_STATE_KEY, _STATE.pack(last, oldest, log_bytes))
        return True


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


# -- opening -------------------------------------------------------------------------------------------------------


def _no_store(path: Path) -> NotFound:
    return NotFound(f"no store at '{path}'; create it with `shorttail apply DEFINITIONS --store {path}`")


def _check_directory(path: Path, create: bool) -> None:
    """Raise a clear error for what is not a store, before LMDB makes one of it."""
    data = path / "data.mdb"
    try:
        if not path.exists():
            if create:
                return
            raise _no_store(path)
        if not path.is_dir():
            raise InvalidArgument(f"'{path}' is a file, not a store; a store is a directory")
        names = {entry.name for entry in path.iterdir()}
        size = data.stat().st_size if "data.mdb" in names else None
    except PermissionError as error:
        raise _permission_denied(path) from error
    if filesystem := _network_filesystem(path):
        raise InvalidArgument(f"store '{path}' is on {filesystem}, where LMDB is not safe; put it on a local disk")
    if size is None:
        if not create:
            raise _no_store(path)
        if others := sorted(names - _OWN_FILES):
            raise InvalidArgument(
                f"'{path}' holds other files ('{others[0]}') and is no store; choose an empty directory"
            )
    elif size < 2 * PAGE_BYTES:
        raise _damaged(path, f"data.mdb has {size} bytes")


def _open_lmdb(path: Path, create: bool) -> Any:
    env = _lmdb_environment(path, create)
    size, needed = (path / "data.mdb").stat().st_size, (env.info()["last_pgno"] + 1) * PAGE_BYTES
    if size >= needed:
        env.reader_check()  # frees what a killed process held: its slot, and with it old pages
        return env
    # Reading a page that a truncated file lacks kills the process. But maybe only unused pages are missing, see
    # Environment._extend_file. The verifier tells; it opens the file, so LMDB must not have it open.
    env.close()
    try:
        problems: list[str] = verify(str(path))  # type: ignore[no-untyped-call]
    except (VerifyError, OSError) as error:
        problems = [str(error)]
    if problems:
        raise _damaged(path, f"data.mdb has {size} bytes of {needed}")
    return _lmdb_environment(path, create)


def _lmdb_environment(path: Path, create: bool) -> Any:
    return lmdb.open(
        str(path),
        map_size=LIMITS.map_bytes,
        max_readers=LIMITS.readers,
        max_spare_txns=8,  # ended read transactions are renewed, not made anew
        create=create,
        lib_version=LMDB_ENGINE,
    )


def _map_word(path: Path) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(fd).st_size < 8:
            os.ftruncate(fd, 8)
        return mmap.mmap(fd, 8)
    finally:
        os.close(fd)


def _network_filesystem(path: Path) -> str | None:
    """The type of the file system that holds path if it is a network one."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), Path("/proc/self/mountinfo").open(errors="replace") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            filesystem = after.split(" ", 1)[0]
            if before.split(" ")[2] == wanted and filesystem.startswith(_NETWORK_FILESYSTEMS):
                return filesystem
    return None


# -- errors --------------------------------------------------------------------------------------------------------


def _damaged(path: Path, what: str) -> InvalidArgument:
    return InvalidArgument(f"store '{path}' is truncated or damaged ({what}); restore it from a backup")


def _permission_denied(path: Path) -> PermissionDenied:
    return PermissionDenied(f"permission denied on store '{path}'; this user must be able to read and write its files")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of LMDB and the system into ones that name the store and the remedy."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise ResourceExhausted(f"store '{path}' has reached its limit of {LIMITS.map_bytes >> 30} GiB") from error
    except lmdb.ReadersFullError as error:
        raise ResourceExhausted(f"store '{path}' has {LIMITS.readers} readers already; stop some processes") from error
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise _damaged(path, str(error)) from error
    except (lmdb.Error, OSError) as error:
        raise _of_errno(path, error) from error


def _of_errno(path: Path, error: Exception) -> Exception:
    number = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # LMDB reports a short write as EIO
        return ResourceExhausted(f"the disk of store '{path}' is full or failing; nothing was written")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _permission_denied(path)
    if isinstance(error, OSError):
        return InvalidArgument(f"store '{path}': {error.strerror or error}")
    return ShorttailError(f"store '{path}': {error}")


def _after_fork() -> None:
    """In the child: make whoever looks at the word look closer, and be refused."""
    for environment in Environment._registry.values():
        environment.word.poison()
    Environment._registry_lock = threading.Lock()  # it may have been held by a thread that is not here


os.register_at_fork(after_in_child=_after_fork)
