"""Files beside the LMDB file in a store's folder: where a model's file lies, and writes that survive a crash."""

from __future__ import annotations

import os
from pathlib import Path


def model_path(store_path: str | Path, name: str, version: int) -> Path:
    """Where the ONNX file of a version is."""
    return Path(store_path) / "models" / name / str(version) / "model.onnx"


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
