"""The files of a store's folder: the path of a model's file, writes that survive a crash, and files to be mapped."""

from __future__ import annotations

import os
from pathlib import Path

from shorttail.define.inputs import kind_text
from shorttail.define.names import check_path_name
from shorttail.errors import InvalidArgument

BLOCK_BYTES = 512  # the unit of st_blocks


def model_path(store_path: str | Path, name: str, version: int) -> Path:
    """Return the path of the ONNX file of a model version. Raises InvalidArgument for a name that is not a model's."""
    check_path_name(name, "model")  # no path is made of a name that could lead elsewhere, whatever the caller checked
    return Path(store_path) / "models" / name / str(version) / "model.onnx"


def make_folder(path: Path) -> None:
    """Make a folder, and those that lead to it, in which only this user can write, whatever the umask is."""
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o755, exist_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file, which only this user can change, and fsync it. Call sync_folder() if the file is new."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_own(path: Path) -> None:
    """Raise InvalidArgument if there is anything but a file or a folder at a path in a store, such as a symbolic link.

    A store is written only in its own folder, and a copy of the folder is a copy of the store.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
        what = kind_text(path.lstat().st_mode)
        raise InvalidArgument(f"{path} is {what}; a store holds only files and folders of its own")


def open_reserved(path: Path, size_bytes: int) -> int:
    """Open a file that processes map and write, and reserve disk space for its first size_bytes bytes.

    A file that is missing is made. Without the reservation a write through the map would end in SIGBUS when the disk is
    full. Returns the descriptor. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        held = os.fstat(fd)
        if held.st_size < size_bytes or held.st_blocks * BLOCK_BYTES < size_bytes:
            os.posix_fallocate(fd, 0, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sync_folder(path: Path) -> None:
    """Fsync a folder, which makes new, renamed and deleted names in it durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
