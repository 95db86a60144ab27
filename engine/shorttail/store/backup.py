"""`shorttail backup`: a copy of a store as of one commit, made while it is served and written to.

The copy is a store: serving it restores it. It gets its name last, so a folder of that name is a whole backup.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from shorttail.define.catalog import Catalog
from shorttail.errors import Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError
from shorttail.store.environment import Environment
from shorttail.store.files import model_path, sync_folder
from shorttail.store.mapping import plan_map
from shorttail.store.opening import LMDB_ENGINE, translated
from shorttail.store.snapshot import Snapshot

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Backup:
    """What was copied. commit: the number of the last commit that the copy holds."""

    path: str
    commit: int
    views: int
    model_versions: int
    bytes: int


def backup(
    store: Snapshot | str | os.PathLike[str], destination: str | os.PathLike[str], *, compact: bool = True
) -> Backup:
    """Copy a store, open or by its path, to a folder that is not there yet. Durable when it returns.

    compact: leave free pages out and put each table's pages in order. Otherwise the file is copied as it is, which
    takes less CPU. Either way the store is served and written to meanwhile; pages that are freed meanwhile are not used
    again until it is done, so the store's file may grow. Raises NotFound (no store), InvalidArgument (the destination),
    ResourceExhausted (its disk), PermissionDenied, Internal (the store is damaged: run verify). Nothing is left then.
    """
    if isinstance(store, Snapshot):
        return _backup(store.environment, Path(destination), compact)
    environment = Environment.open(store)
    try:
        return _backup(environment, Path(destination), compact)
    finally:
        environment.close()


def _backup(environment: Environment, destination: Path, compact: bool) -> Backup:
    _check_destination(environment.path, destination)
    try:
        unfinished = Path(
            tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".unfinished", dir=destination.absolute().parent)
        )
        try:
            done = _copy(environment, unfinished, destination, compact)
            # The folder is as open or as closed as the store's: it holds the same data.
            unfinished.chmod(stat.S_IMODE(environment.path.stat().st_mode))
            sync_folder(unfinished)
            if destination.exists():
                raise _exists(destination)
            unfinished.rename(destination)
            sync_folder(destination.absolute().parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise _of_system(destination, error) from error
    return done


def _check_destination(store: Path, destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise _exists(destination)
    if not destination.absolute().parent.is_dir():
        raise InvalidArgument(f"the folder '{destination.absolute().parent}' for the backup is not there; create it")
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(store)):
        raise InvalidArgument(f"'{destination}' is inside of the store; put the backup outside, best on another disk")


def _exists(destination: Path) -> InvalidArgument:
    return InvalidArgument(f"'{destination}' exists; a backup is never written over anything: choose another name")


def _copy(environment: Environment, folder: Path, destination: Path, compact: bool) -> Backup:
    try:
        with environment.read():  # nobody opens LMDB anew meanwhile
            environment.handle.env.copy(str(folder), compact=compact)
    except lmdb.Error as error:
        number = getattr(error, "code", 0)
        if number in _FULL:
            raise _full(destination) from error
        raise Internal(
            f"store '{environment.path}' cannot be copied ({error}); `shorttail verify` tells whether it is damaged"
        ) from error
    data = folder / "data.mdb"
    data.chmod(stat.S_IMODE((environment.path / "data.mdb").stat().st_mode))
    _sync_file(data)
    commit, catalog = _read_copy(folder)
    n_versions = _copy_models(environment.path, folder, catalog)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Backup(str(destination), commit, len(catalog.views), n_versions, total)


def _read_copy(folder: Path) -> tuple[int, Catalog]:
    """The number of its last commit and its catalog: the copy opens, and says what it holds."""
    with (
        translated(folder),
        lmdb.open(
            str(folder), map_size=plan_map(folder), readonly=True, lock=False, create=False, lib_version=LMDB_ENGINE
        ) as env,
        env.begin() as txn,
    ):
        state: bytes = txn.get(b"state") or b""
        return int.from_bytes(state[:8], "little"), Catalog.from_json(txn.get(b"catalog"))


def _copy_models(store: Path, folder: Path, catalog: Catalog) -> int:
    """The folders of the versions that the copied catalog names. They never change, so they fit it."""
    n = 0
    for name, entry in catalog.models.items():
        for number, info in entry.versions.items():
            source, target = model_path(store, name, number).parent, model_path(folder, name, number).parent
            if not source.is_dir():
                raise NotFound(f"model '{name}': the files of version {number} are gone from store '{store}'")
            shutil.copytree(source, target)
            with (target / "model.onnx").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    raise Internal(f"model '{name}': the file of version {number} is damaged; run `shorttail verify`")
            n += 1
    if n:
        for path in (folder / "models").rglob("*"):
            sync_folder(path) if path.is_dir() else _sync_file(path)
        sync_folder(folder / "models")
    return n


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _full(destination: Path) -> ResourceExhausted:
    return ResourceExhausted(f"the disk of '{destination}' is full or failing; no backup was made")


def _of_system(destination: Path, error: OSError) -> ShorttailError:
    numbers = [error.errno]
    if isinstance(error, shutil.Error):  # of copytree: a list of (from, to, why)
        numbers, text = [], "; ".join(str(item[2]) for item in error.args[0])
        if any(os.strerror(number) in text for number in _FULL):
            return _full(destination)
        return InvalidArgument(f"backup '{destination}': {text}")
    if numbers[0] in _FULL:
        return _full(destination)
    if isinstance(error, PermissionError):
        return PermissionDenied(f"permission denied: {error.filename or destination}; no backup was made")
    return InvalidArgument(f"backup '{destination}': {error.strerror or error}")


def as_json(done: Backup) -> dict[str, Any]:
    return {
        "backup": done.path,
        "commit": done.commit,
        "views": done.views,
        "model_versions": done.model_versions,
        "bytes": done.bytes,
    }
