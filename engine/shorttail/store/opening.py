"""Opening a store's LMDB environment. What is no store, or a damaged one, is refused before LMDB touches it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lmdb

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError
from shorttail.store.lmdb_file import PAGE_BYTES, structure_problems
from shorttail.store.mapping import MAP_VARIABLE, map_full, plan_map

LMDB_ENGINE = 0  # 0.9: page images are sized for its page header of 16 bytes

_OWN_FILES = {"data.mdb", "lock.mdb", "generation", "load.lock", "models"}
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "afs", "ceph")


def _no_store(path: Path) -> NotFound:
    return NotFound(f"no store at '{path}'; create it with `shorttail apply DEFINITIONS --store {path}`")


def check_directory(path: Path, create: bool) -> None:
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
    elif size < 2 * PAGE_BYTES and not (create and size == 0 and "generation" not in names):
        # But a process may have been killed while it made the store: an empty file, and no more than LMDB's lock.
        raise damaged(path, f"data.mdb has {size} bytes")


def open_lmdb(path: Path, create: bool) -> Any:
    env = _lmdb_environment(path, create)
    size, needed = (path / "data.mdb").stat().st_size, (env.info()["last_pgno"] + 1) * PAGE_BYTES
    if size >= needed:
        env.reader_check()  # frees what a killed process held: its slot, and with it old pages
        return env
    # Reading a page that a truncated file lacks kills the process. But maybe only unused pages are missing, see
    # Environment._extend_file. A look at all of the file tells; LMDB must not have it open meanwhile.
    env.close()
    if structure_problems(path):
        raise damaged(path, f"data.mdb has {size} bytes of {needed}")
    return _lmdb_environment(path, create)


def _lmdb_environment(path: Path, create: bool) -> Any:
    try:
        return lmdb.open(
            str(path),
            map_size=plan_map(path),
            max_readers=LIMITS.readers,
            max_spare_txns=8,  # ended read transactions are renewed, not made anew
            create=create,
            lib_version=LMDB_ENGINE,
        )
    except lmdb.Error:
        data = path / "data.mdb"
        if create and data.exists() and data.stat().st_size < 2 * PAGE_BYTES:
            os.truncate(data, 0)  # a full disk took one of the two pages that LMDB begins with
        raise


def map_word(path: Path) -> mmap.mmap:
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


def damaged(path: Path, what: str) -> InvalidArgument:
    return InvalidArgument(f"store '{path}' is truncated or damaged ({what}); restore it from a backup")


def _permission_denied(path: Path) -> PermissionDenied:
    return PermissionDenied(f"permission denied on store '{path}'; this user must be able to read and write its files")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of LMDB and the system into ones that name the store and the remedy."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise map_full(path) from error
    except lmdb.MapResizedError as error:
        raise ResourceExhausted(
            f"store '{path}' has grown beyond what this process mapped of it; open it again, and set {MAP_VARIABLE} "
            "alike for all processes"
        ) from error
    except lmdb.ReadersFullError as error:
        raise ResourceExhausted(f"store '{path}' has {LIMITS.readers} readers already; stop some processes") from error
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise damaged(path, str(error)) from error
    except (lmdb.Error, OSError) as error:
        raise _of_errno(path, error) from error


def _of_errno(path: Path, error: Exception) -> Exception:
    number = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # LMDB reports a short write as EIO
        return ResourceExhausted(f"the disk of store '{path}' is full or failing; nothing was written")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _permission_denied(path)
    if number == errno.ENOMEM:
        return ResourceExhausted(f"store '{path}': no room to map it; raise ulimit -v, or set {MAP_VARIABLE} lower")
    if isinstance(error, OSError):
        return InvalidArgument(f"store '{path}': {error.strerror or error}")
    return ShorttailError(f"store '{path}': {error}")
