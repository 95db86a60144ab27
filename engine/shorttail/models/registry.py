"""Versions of models: files under STORE/models/NAME/VERSION/, entries in the catalog.

A version's folder is complete before the catalog names it, and never changes afterwards. A folder that no catalog
names was left by a crash; the version that takes its number replaces it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shorttail.definitions import Model, column_label
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted
from shorttail.models.signature import ModelFile, check_inputs, request_columns, select_outputs
from shorttail.store.catalog import Catalog, ModelEntry, VersionInfo

if TYPE_CHECKING:
    from shorttail.store import Store


def model_path(store_path: str | Path, name: str, version: int) -> Path:
    """Where the ONNX file of a version is."""
    return Path(store_path) / "models" / name / str(version) / "model.onnx"


def inspect(catalog: Catalog, model: Model, file: ModelFile, known: VersionInfo | None = None) -> VersionInfo:
    """The version that this definition and file make, fully checked against the catalog.

    known: a version of the same model; if its file and outputs are the same, ONNX Runtime is not asked again.
    Raises NotFound, InvalidArgument.
    """
    if known is not None and known.sha256 == file.sha256 and known.model.outputs == model.outputs:
        inputs, outputs = known.inputs, known.outputs
    else:
        all_inputs, all_outputs = file.tensors
        inputs, outputs = tuple(all_inputs), select_outputs(model, all_outputs, file.path.name)
    check_inputs(catalog, model, inputs, file.path.name)
    return VersionInfo(model, file.sha256, time.time_ns() // 1000, inputs, outputs)


def next_version(entry: ModelEntry | None) -> int:
    return max(entry.versions) + 1 if entry else 1


def with_version(entry: ModelEntry | None, number: int, info: VersionInfo, promote: bool = True) -> ModelEntry:
    """The entry with one more version, which serves from then on if `promote`."""
    if entry is None:
        return ModelEntry(number, None, {number: info})
    grown = replace(entry, versions={**entry.versions, number: info})
    return grown.serving(number) if promote else grown


def write_version(store_path: str | Path, number: int, info: VersionInfo, file: ModelFile) -> None:
    """Put a version's folder in place, durably. Call it inside the catalog's transaction: that is the lock."""
    folder = model_path(store_path, info.model.name, number).parent
    unfinished = folder.with_name(f".{number}.unfinished")
    try:
        for leftover in (unfinished, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_durably(unfinished / "model.onnx", file.data)
        write_durably(unfinished / "manifest.json", manifest(number, info, file))
        sync_folder(unfinished)
        unfinished.rename(folder)
        for parent in (folder.parent, folder.parent.parent, Path(store_path)):
            sync_folder(parent)
    except OSError as error:
        raise ResourceExhausted(f"model '{info.model.name}': cannot write {folder}: {error.strerror}") from error


def manifest(number: int, info: VersionInfo, file: ModelFile) -> bytes:
    document = {
        "name": info.model.name,
        "version": number,
        "created": iso_time(info.created_us),
        "file": file.path.name,
        "sha256": info.sha256,
        "columns": [column_label(column) for column in info.model.columns],
        "features": [reference for reference in info.model.references if not reference.startswith("request:")],
        "inputs": [tensor.to_json() for tensor in info.inputs],
        "outputs": [tensor.to_json() for tensor in info.outputs],
    }
    return (json.dumps(document, indent=2) + "\n").encode()


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


def iso_time(time_us: int) -> str:
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def deploy(store: Store, name: str, path: str | Path, promote: bool = True) -> int:
    """Register an ONNX file as the model's next version, fed as the current one is. Returns its number.

    promote: it serves from now on. A file that the current version has already makes no new version.
    Raises NotFound (no such model: apply its definition first), InvalidArgument.
    """
    refresh(store)
    source = str(Path(path).absolute())
    model = replace(store.catalog.model(name).model, path=source)
    file = ModelFile.read(source, name)
    inspect(store.catalog, model, file)
    with store.edit_catalog() as catalog:
        entry = catalog.model(name)
        number = entry.current
        if entry.version().sha256 != file.sha256:
            number = next_version(entry)
            info = inspect(catalog, replace(entry.model, path=source), file)
            write_version(store.path, number, info, file)
            catalog.models[name] = with_version(entry, number, info, promote)
    refresh(store)
    return number


def promote(store: Store, name: str, version: int) -> int:
    """Make a version of the model the one that serves. Returns the version that served before.

    Raises NotFound, or InvalidArgument if the views have changed so that it no longer fits.
    """
    with store.edit_catalog() as catalog:
        entry = catalog.model(name)
        info = entry.version(version)
        check_inputs(catalog, info.model, info.inputs, f"version {version}")
        if not model_path(store.path, name, version).is_file():
            raise NotFound(f"model '{name}': the file of version {version} is gone from the store")
        catalog.models[name] = entry.serving(version)
    refresh(store)
    return entry.current


def rollback(store: Store, name: str) -> int:
    """Make the version that served before the current one serve again. Returns its number."""
    refresh(store)
    previous = store.catalog.model(name).previous
    if previous is None:
        raise InvalidArgument(f"model '{name}' has no earlier version to go back to")
    promote(store, name, previous)
    return previous


def refresh(store: Store) -> None:
    store.refresh()


def list_versions(catalog: Catalog) -> list[dict[str, Any]]:
    """Every version of every model, as plain values, newest first within a model."""
    return [
        {
            "name": name,
            "version": number,
            "serving": number == entry.current,
            "created": iso_time(info.created_us),
            "columns": [column_label(column) for column in info.model.columns],
            "outputs": [tensor.name for tensor in info.outputs],
            "sha256": info.sha256,
            "description": info.model.description,
        }
        for name, entry in catalog.models.items()
        for number, info in sorted(entry.versions.items(), reverse=True)
    ]


def describe(catalog: Catalog, name: str, version: int | None = None) -> dict[str, Any]:
    """One version (None: the current one) as plain values: its definition, and what a request for it must give."""
    entry = catalog.model(name)
    number = entry.current if version is None else version
    info = entry.version(number)
    by_name = info.model.inputs_by_name([tensor.name for tensor in info.inputs])
    columns = request_columns(catalog, info.model, info.inputs)
    return {
        "name": name,
        "version": number,
        "serving": number == entry.current,
        "versions": sorted(entry.versions),
        "created": iso_time(info.created_us),
        "sha256": info.sha256,
        "description": info.model.description,
        "owner": info.model.owner,
        "inputs": {tensor: [column_label(column) for column in entries] for tensor, entries in by_name.items()},
        "outputs": {tensor.name: tensor.dtype for tensor in info.outputs},
        "features": [reference for reference in info.model.references if not reference.startswith("request:")],
        "columns": {column: dtype.name for column, dtype in columns.items()},
    }
