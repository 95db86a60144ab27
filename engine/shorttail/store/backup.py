"""`shorttail backup`: copies a store as of one commit while the store is served and written.

The copy is itself a store: to restore a backup, serve it. The copy is made in a temporary folder that is renamed last,
so a folder with the destination's name always holds a complete backup.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmdb

from shorttail.define.catalog import Catalog
from shorttail.errors import Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, ShorttailError
from shorttail.store import history
from shorttail.store.environment import Environment
from shorttail.store.files import check_own, make_folder, model_path, sync_folder
from shorttail.store.history import BACKED_UP, Event
from shorttail.store.mapping import plan_map
from shorttail.store.opening import LMDB_ENGINE, translate_errors
from shorttail.store.snapshot import Snapshot

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Backup:
    """The result of a backup. commit: the number of the last commit in the copy. bytes: the size of all its files.

    unnoted: why the store's history does not tell of the backup, such as a full disk; "" if it does.
    """

    path: str
    commit: int
    views: int
    model_versions: int
    bytes: int
    unnoted: str = ""


def backup(
    store: Snapshot | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    compact: bool = True,
    by: str = "",
) -> Backup:
    """Copy a store to a new folder. The copy is durable on disk when this function returns.

    store: an open store or a path. destination: a path that does not exist yet. compact: True leaves free pages out and
    writes each table's pages in order; False copies the file as it is, which takes less CPU. by: who makes the backup,
    for the history; "" is who changes the open store, or the user of the process.

    When the copy is made, the store's history tells of it, so that `delete-entity` knows which copies may still hold a
    row. The history in the copy does not.

    Other processes can serve and write the store during the copy. LMDB cannot reuse pages that are freed during the
    copy, so the store's file may grow.

    Raises NotFound (no store), InvalidArgument (the destination), ResourceExhausted (the destination's disk),
    PermissionDenied, Unavailable (the store at its path is another one), and Internal (the store is damaged; run
    verify). After an error no file is left behind.
    """
    if isinstance(store, Snapshot):
        return _backup(store.environment, Path(destination), compact, by or store.by)
    environment = Environment.open(store)
    try:
        return _backup(environment, Path(destination), compact, by)
    finally:
        environment.close()


def _backup(environment: Environment, destination: Path, compact: bool, by: str) -> Backup:
    environment.handle.check_files()  # LMDB copies the file that is open, and models come from the path
    _check_destination(environment.path, destination)
    try:
        unfinished = Path(
            tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".unfinished", dir=destination.absolute().parent)
        )
        try:
            done = _copy(environment, unfinished, destination, compact)
            environment.handle.check_files()
            # mkdtemp makes the folder private; give it the store's mode because it holds the same data.
            unfinished.chmod(stat.S_IMODE(environment.path.stat().st_mode))
            sync_folder(unfinished)
            if destination.exists():
                raise _destination_exists(destination)
            unfinished.rename(destination)
            sync_folder(destination.absolute().parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise _translate_os_error(destination, error) from error
    try:
        _note(
            environment, Event(BACKED_UP, "", by, detail={"path": str(destination.absolute()), "commit": done.commit})
        )
    except ShorttailError as error:  # a store whose disk is full needs its backup all the more
        return replace(done, unnoted=error.message)
    return done


def _note(environment: Environment, event: Event) -> None:
    with environment.write() as writer:
        catalog = Catalog.from_json(writer.get_catalog())
        history.append(writer.txn, event, catalog, catalog)


def _check_destination(store: Path, destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise _destination_exists(destination)
    if not destination.absolute().parent.is_dir():
        raise InvalidArgument(f"the folder '{destination.absolute().parent}' for the backup does not exist; create it")
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(store)):
        raise InvalidArgument(f"'{destination}' is inside the store; put the backup outside, best on another disk")


def _destination_exists(destination: Path) -> InvalidArgument:
    return InvalidArgument(f"'{destination}' exists; a backup never overwrites anything, so choose another name")


def _copy(environment: Environment, folder: Path, destination: Path, compact: bool) -> Backup:
    environment.handle.check_structure(values=True)  # LMDB copies what it finds, and trusts each page
    try:
        with environment.read():  # an open read transaction keeps LmdbHandle from reopening LMDB during the copy
            environment.handle.env.copy(str(folder), compact=compact)
    except lmdb.Error as error:
        number = getattr(error, "code", 0)
        if number in _FULL:
            raise _disk_full(destination) from error
        raise Internal(
            f"store '{environment.path}' cannot be copied ({error}); check it with `shorttail verify`"
        ) from error
    data = folder / "data.mdb"
    data.chmod(stat.S_IMODE((environment.path / "data.mdb").stat().st_mode))
    _sync_file(data)
    commit, catalog = _read_copy(folder)
    n_versions = _copy_models(environment.path, folder, catalog)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Backup(str(destination), commit, len(catalog.views), n_versions, total)


def _read_copy(folder: Path) -> tuple[int, Catalog]:
    """Open the copy and return the number of its last commit and its catalog."""
    with (
        translate_errors(folder),
        lmdb.open(
            str(folder), map_size=plan_map(folder), readonly=True, lock=False, create=False, lib_version=LMDB_ENGINE
        ) as env,
        env.begin() as txn,
    ):
        state: bytes = txn.get(b"state") or b""
        return int.from_bytes(state[:8], "little"), Catalog.from_json(txn.get(b"catalog"))


def _copy_models(store: Path, folder: Path, catalog: Catalog) -> int:
    """Copy the folder of each model version in the copied catalog. Return the number of versions.

    A version's folder never changes, so copying it later than the LMDB file is safe.
    """
    n = 0
    for name, entry in catalog.models.items():
        for number, info in entry.versions.items():
            source, target = model_path(store, name, number).parent, model_path(folder, name, number).parent
            if not source.is_dir():
                raise NotFound(
                    f"model '{name}': store '{store}' lacks the files of version {number}; run `shorttail verify`"
                )
            for path in (source.parent, source, *source.rglob("*")):
                check_own(path)
            make_folder(target.parent)
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


def _disk_full(destination: Path) -> ResourceExhausted:
    return ResourceExhausted(f"the disk of '{destination}' is full or failing; no backup was made")


def _translate_os_error(destination: Path, error: OSError) -> ShorttailError:
    numbers = [error.errno]
    if isinstance(error, shutil.Error):  # from copytree: args[0] is a list of (source, target, reason)
        numbers, text = [], "; ".join(str(item[2]) for item in error.args[0])
        if any(os.strerror(number) in text for number in _FULL):
            return _disk_full(destination)
        return InvalidArgument(f"backup '{destination}': {text}")
    if numbers[0] in _FULL:
        return _disk_full(destination)
    if isinstance(error, PermissionError):
        return PermissionDenied(f"permission denied: {error.filename or destination}; no backup was made")
    return InvalidArgument(f"backup '{destination}': {error.strerror or error}")


def as_json(done: Backup) -> dict[str, Any]:
    """Return the result as plain values for JSON."""
    return {
        "backup": done.path,
        "commit": done.commit,
        "views": done.views,
        "model_versions": done.model_versions,
        "bytes": done.bytes,
    }
