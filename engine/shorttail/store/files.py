"""The files beside LMDB's in a store's folder: the path of a model's file, and writes that survive a crash."""

from __future__ import annotations

import os
from pathlib import Path

from shorttail.define.names import check_path_name


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


def sync_folder(path: Path) -> None:
    """Fsync a folder, which makes new, renamed and deleted names in it durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
