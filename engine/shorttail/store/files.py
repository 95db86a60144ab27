"""The files of a store's folder: the path of a model's file, writes that survive a crash, and files to be mapped."""

from __future__ import annotations

import os
from pathlib import Path

from shorttail.define.names import check_path_name

BLOCK_BYTES = 512  # the unit of st_blocks


def model_path(store_path: str | Path, name: str, version: int) -> Path:
    """Return the path of the ONNX file of a model version. Raises InvalidArgument for a name that is not a model's."""
    check_path_name(name, "model")  # no path is made of a name that could lead elsewhere, whatever the caller checked
    return Path(store_path) / "models" / name / str(version) / "model.onnx"


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and fsync it. Call sync_folder() on its folder if the file is new."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
