"""One LMDB environment: opening it, its format version, write transactions with a change log, the generation word.

A store is a directory: data.mdb and lock.mdb (LMDB), generation (8 bytes of shared memory that count commits),
load.lock (held by the one bulk load that may run) and models/. Inside LMDB there are the databases "meta" (format
version, state, catalog), "log" (what each commit changed) and one a table. docs/format.md has it all.

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

from shorttail._native.pages import GenerationWord
from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError

FORMAT_VERSION = 1
LMDB_ENGINE = 0  # 0.9: page images are sized for its page header of 16 bytes
PAGE_BYTES = 4096
LOG_BYTES = 64 << 20  # the change log is trimmed to so much, whatever the number of commits
CATALOG_TABLE_ID = 0  # stands for the catalog in the change log
CHANGE_BYTES = 12  # of one entry: u32 table id, 8-byte bucket key

_STATE = struct.Struct("<QQQ")  # sequence number of the last commit, of the oldest one in the log, bytes of the log
_CHANGE = struct.Struct("<I8s")
_SEQUENCE = struct.Struct(">Q")  # big-endian: LMDB then keeps the log in order
_NO_KEY = bytes(8)
_OWN_FILES = {"data.mdb", "lock.mdb", "generation", "load.lock", "models"}
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "afs", "ceph")

Transaction = Any  # lmdb.Transaction: py-lmdb's stubs are not used
Database = Any


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
        self._handles: dict[bytes, Database] = {}
        self._handles_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._writing_thread: int | None = None
        self.meta: Database = None
        self.log: Database = None

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
                    environment._open_meta(create)
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

    def _open_meta(self, create: bool) -> None:
        self.meta, self.log = self.handle(b"meta", create), self.handle(b"log", create)
        if self.meta is None or self.log is None:
            raise InvalidArgument(
                f"'{self.path}' is an LMDB database but not a shorttail store; choose another path for --store"
            )
        with self.read() as txn:
            version = txn.get(b"format", db=self.meta)
            version = None if version is None else bytes(version)
        if version is None and create:
            with self.write() as writer:
                writer.txn.put(b"format", str(FORMAT_VERSION).encode(), db=self.meta, overwrite=False)
                writer.changed(CATALOG_TABLE_ID)
            version = str(FORMAT_VERSION).encode()
        if version is None or not version.isdigit():
            raise InvalidArgument(f"'{self.path}' is not a shorttail store, or it is damaged; restore it from a backup")
        if int(version) > FORMAT_VERSION:
            raise InvalidArgument(
                f"store '{self.path}' has format {int(version)}, and this shorttail reads up to {FORMAT_VERSION}; "
                "upgrade shorttail"
            )

    # -- databases and read transactions ---------------------------------------------------------------------------

    def handle(self, name: bytes, create: bool = False) -> Database | None:
        """The database of that name, or None if it does not exist. Transactions begun before cannot use a new handle.

        The first time that a name is asked for this waits for writers, and not every py-lmdb call lets go of the GIL
        meanwhile: ask has_database() first. Within write() only known handles are given.
        """
        known = self._handles.get(name)
        if known is not None or self.is_writing():
            return known
        # py-lmdb keeps a handle only if a write transaction opened it, and waits for that one holding the GIL: a writer
        # of this process must be done before.
        with self._handles_lock, self._write_lock:
            if name not in self._handles:
                try:
                    self._handles[name] = self._env.open_db(name, create=create)
                except lmdb.NotFoundError:
                    return None
            return self._handles[name]

    def handles(self) -> set[bytes]:
        """Names of the databases that transactions begun from now on can use."""
        return set(self._handles)

    def has_database(self, name: bytes) -> bool:
        """Whether there is a database of that name. Waits for nobody."""
        return name in self._handles or name in self.database_names()

    def database_names(self) -> list[bytes]:
        return [bytes(name) for name in self._env.dbs()]

    def read(self) -> Transaction:
        """A read transaction, which gives values as memoryviews of the map. End it by abort() or `with`."""
        self.check_process()
        with translated(self.path):
            return self._env.begin(buffers=True)

    def read_catalog_json(self, txn: Transaction) -> bytes | None:
        """The catalog as of that transaction."""
        value = txn.get(b"catalog", db=self.meta)
        return None if value is None else bytes(value)

    def sequence(self, txn: Transaction) -> int:
        """Number of the last commit as of that transaction."""
        return self._state(txn)[0]

    def changes_since(self, txn: Transaction, sequence: int) -> dict[int, set[bytes]] | None:
        """Bucket keys by table id that commits after that number changed; None when the log no longer reaches back."""
        last, oldest, _ = self._state(txn)
        if last == sequence:
            return {}
        if last < sequence or oldest > sequence + 1:
            return None
        changes: dict[int, set[bytes]] = {}
        for number in range(sequence + 1, last + 1):
            entry = txn.get(_SEQUENCE.pack(number), db=self.log)
            if entry is None:
                return None
            for table_id, key in _CHANGE.iter_unpack(entry):
                changes.setdefault(table_id, set()).add(key)
        return changes

    def _state(self, txn: Transaction) -> tuple[int, int, int]:
        value = txn.get(b"state", db=self.meta)
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
                writer = Writer(self, txn)
                yield writer
                changed = writer.finish()
            except BaseException:
                txn.abort()
                raise
            finally:
                self._writing_thread = None
            txn.commit()
        if changed:
            self.word.bump()

    def is_writing(self) -> bool:
        """Whether this thread is within write()."""
        return self._writing_thread == threading.get_ident()

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

    def get_catalog(self) -> bytes | None:
        return self._environment.read_catalog_json(self.txn)

    def put_catalog(self, document: bytes) -> None:
        self.txn.put(b"catalog", document, db=self._environment.meta)
        self.changed(CATALOG_TABLE_ID)

    def changed(self, table_id: int, bucket_key: bytes = _NO_KEY) -> None:
        """Tell readers that this bucket has a new page. Not needed for a table that no catalog names yet."""
        self._changes.add(_CHANGE.pack(table_id, bucket_key))

    def finish(self) -> bool:
        """Write the log; True if there was something for readers to see."""
        if not self._changes:
            return False
        environment = self._environment
        last, oldest, log_bytes = environment._state(self.txn)
        entry = b"".join(sorted(self._changes))
        last += 1
        self.txn.put(_SEQUENCE.pack(last), entry, db=environment.log, append=True)
        log_bytes += len(entry)
        while oldest <= last and (last - oldest >= LIMITS.change_log_commits or log_bytes > LOG_BYTES):
            value = self.txn.get(_SEQUENCE.pack(oldest), db=environment.log)
            log_bytes -= 0 if value is None else len(value)
            self.txn.delete(_SEQUENCE.pack(oldest), db=environment.log)
            oldest += 1
        self.txn.put(b"state", _STATE.pack(last, oldest, log_bytes), db=environment.meta)
        return True


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
        max_dbs=2 * LIMITS.views + 2,  # while a view is loaded it has two tables
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
