"""Opening a store's LMDB environment. Damaged stores and other directories are refused before LMDB opens them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError
from shorttail.store.files import check_own, open_reserved
from shorttail.store.lmdb_file import PAGE_BYTES, opening_problems
from shorttail.store.mapping import MAP_VARIABLE, map_full_error, plan_map
from shorttail.store.settings import StoreSettings

LMDB_ENGINE = 0  # LMDB 0.9: the size of page images depends on its page header of 16 bytes
_LOCK_BYTES = 128 + 64 * LIMITS.readers  # of lock.mdb: LMDB's mutexes and counters, and a cache line for each reader

LOCK_MAGIC, LOCK_BYTES_PER_READER = 0xBEEFC0DE, 64  # of lock.mdb: struct MDB_txninfo, MDB_reader

_OWN_FILES = {"data.mdb", "lock.mdb", "generation", "load.lock", "ready.lock", "models"}
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "afs", "ceph")


def no_store(path: Path) -> NotFound:
    return NotFound(f"no store at '{path}'; create it with `shorttail apply DEFINITIONS --store {path} --create`")


def other_database(path: Path) -> InvalidArgument:
    return InvalidArgument(f"'{path}' is an LMDB database but not a shorttail store; choose another path for --store")


def check_directory(path: Path, create: bool) -> None:
    """Raise NotFound, InvalidArgument or PermissionDenied if path is not a store.

    LMDB itself would turn any directory into an environment. create: an empty or missing directory is accepted.
    """
    data = path / "data.mdb"
    try:
        if not path.exists():
            if create:
                return
            raise no_store(path)
        if not path.is_dir():
            raise InvalidArgument(f"'{path}' is a file, not a store; a store is a directory")
        names = {entry.name for entry in path.iterdir()}
        check_own_files(path)
        size = data.stat().st_size if "data.mdb" in names else None
    except PermissionError as error:
        raise _permission_denied(path) from error
    if filesystem := _network_filesystem(path):
        raise InvalidArgument(f"store '{path}' is on {filesystem}, where LMDB is not safe; put it on a local disk")
    if size is None:
        if not create:
            raise no_store(path)
        if others := sorted(names - _OWN_FILES):
            raise InvalidArgument(
                f"'{path}' is not a store and holds other files ('{others[0]}'); choose an empty directory"
            )
    elif size < 2 * PAGE_BYTES and not (create and size == 0 and "generation" not in names):
        # The exception: a process that was killed while it made the store leaves an empty file and LMDB's lock.
        raise damaged_store(path, f"data.mdb has {size} bytes")


def check_own_files(path: Path) -> None:
    """Raise InvalidArgument if one of a store's files is a symbolic link, a FIFO, a device or a socket."""
    for name in sorted(_OWN_FILES):
        check_own(path / name)


def open_lmdb(path: Path, create: bool) -> Any:
    """Return the open lmdb.Environment of a store. Raises InvalidArgument if the file is damaged, and lmdb.Error.

    LMDB follows what the file says, wherever that leads, so all that opening reads is checked before LMDB opens it.
    """
    data = path / "data.mdb"
    if data.exists() and data.stat().st_size and (problems := opening_problems(path)):
        raise damaged_store(path, problems[0])
    check_lock_file(path)
    env = _lmdb_environment(path, create, StoreSettings())
    try:
        env.reader_check()  # frees the reader slots of killed processes, so that their pages can be reused
        with env.begin() as txn:
            settings = StoreSettings.of(txn)
    except BaseException:
        env.close()
        raise
    if settings.durability == "system" or (settings.map_size or 0) > env.info()["map_size"]:
        env.close()  # only an open store tells its settings, and LMDB takes these when it opens it
        env = _lmdb_environment(path, create, settings)
    return env


def check_lock_file(path: Path) -> None:
    """Raise InvalidArgument if LMDB's lock file is damaged while other processes use it. Otherwise LMDB makes it anew.

    Call it only while this process does not have LMDB open on the store: closing the file releases LMDB's locks.
    """
    with suppress(FileNotFoundError), (path / "lock.mdb").open("rb") as file:
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)  # struct flock: LMDB's users share byte 0
        kind = struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_GETLK, wanted))[0]
        if kind == fcntl.F_UNLCK:
            return
        magic = int.from_bytes(file.read(4), "little")
        if magic != LOCK_MAGIC or os.fstat(file.fileno()).st_size < LIMITS.readers * LOCK_BYTES_PER_READER:
            raise InvalidArgument(
                f"store '{path}': lock.mdb is truncated or damaged, and other processes use it; stop all processes "
                "that have the store open, then open it again"
            )


def reserve_lock_file(path: Path) -> None:
    """Reserve the disk space of lock.mdb, which LMDB itself makes without any and then writes through a map.

    This process must not have LMDB open on the store: closing a descriptor of the file releases LMDB's lock on it.
    Raises OSError.
    """
    lock = path / "lock.mdb"
    # A file that is there keeps its size: only LMDB knows whether other processes have mapped it in that size.
    size_bytes = lock.stat().st_size if lock.exists() else 0
    os.close(open_reserved(lock, size_bytes or _LOCK_BYTES))


def _lmdb_environment(path: Path, create: bool, settings: StoreSettings) -> Any:
    reserve_lock_file(path)
    try:
        return lmdb.open(
            str(path),
            map_size=plan_map(path, settings.map_size),
            metasync=settings.durability != "system",
            max_readers=LIMITS.readers,
            max_spare_txns=8,  # py-lmdb renews ended read transactions, which is cheaper than a new one
            create=create,
            lib_version=LMDB_ENGINE,
        )
    except lmdb.Error:
        data = path / "data.mdb"
        if create and data.exists() and data.stat().st_size < 2 * PAGE_BYTES:
            os.truncate(data, 0)  # the disk was full after the first of two pages: leave a file that open() accepts
        raise


def map_generation(path: Path) -> mmap.mmap:
    """Map the file of the generation word; make it if it is missing."""
    fd = open_reserved(path, 8)
    try:
        return mmap.mmap(fd, 8)
    finally:
        os.close(fd)


def _network_filesystem(path: Path) -> str | None:
    """Return the type of the network file system that holds path; None if path is on a local file system."""
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


def damaged_store(path: Path, what: str) -> InvalidArgument:
    """Return the error for a store whose LMDB file is damaged."""
    return InvalidArgument(f"store '{path}' is truncated or damaged ({what}); restore it from a backup")


def _permission_denied(path: Path) -> PermissionDenied:
    return PermissionDenied(f"permission denied on store '{path}'; this user must be able to read and write its files")


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Translate errors of LMDB and of the system to ShorttailErrors that name the store and the remedy."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise map_full_error(path) from error
    except lmdb.MapResizedError as error:
        raise ResourceExhausted(
            f"store '{path}' has grown beyond this process's map; reopen it, and set {MAP_VARIABLE} to the same value "
            "for all processes"
        ) from error
    except lmdb.ReadersFullError as error:
        raise ResourceExhausted(f"store '{path}' has reached {LIMITS.readers} readers; stop some processes") from error
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise damaged_store(path, str(error)) from error
    except (lmdb.Error, OSError) as error:
        raise _translate_errno(path, error) from error


def _translate_errno(path: Path, error: Exception) -> Exception:
    number = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # LMDB reports a short write as EIO
        return ResourceExhausted(f"the disk of store '{path}' is full or failing; nothing was written")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _permission_denied(path)
    if number == errno.ENOMEM:
        return ResourceExhausted(
            f"store '{path}': no address space left to map it; raise ulimit -v, or set {MAP_VARIABLE} lower"
        )
    if isinstance(error, OSError):
        return InvalidArgument(f"store '{path}': {error.strerror or error}")
    return ShorttailError(f"store '{path}': {error}")
