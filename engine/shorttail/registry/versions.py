"""Registers, promotes and describes versions of models: files in STORE/models/NAME/VERSION/, entries in the catalog.

A version's folder is complete before the catalog names it, and never changes afterwards. A folder that the catalog
does not name was left by a crash; the next version with that number replaces it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from shorttail.define import clock
from shorttail.define.catalog import Catalog, ModelEntry, Share, VersionInfo
from shorttail.define.dtypes import DType
from shorttail.define.models import Model, column_label, missing_reference
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted
from shorttail.models.golden import FILE as EXAMPLES_FILE
from shorttail.models.golden import GoldenRows
from shorttail.models.missing import find_replacements, required_columns
from shorttail.models.signature import (
    ModelFile,
    check_inputs,
    request_columns,
    select_outputs,
)
from shorttail.models.trial import trial_limit_s
from shorttail.models.vetting import vet, with_findings
from shorttail.ondemand.trust import check_code
from shorttail.registry.examples import digest, read_examples
from shorttail.store import Store
from shorttail.store.files import check_own, make_folder, model_path, sync_folder, write_durably


def inspect(catalog: Catalog, model: Model, file: ModelFile, known: VersionInfo | None = None) -> VersionInfo:
    """Check a definition and its file against the catalog, and return the version that they make.

    known: a version of the same model. If it has the same file and outputs, its inputs and outputs are reused, and
    ONNX Runtime does not load the file again. Raises NotFound, InvalidArgument.
    """
    # A model that takes tensors may have outputs of types that one with columns may not.
    same_kind = known is not None and known.model.is_raw == model.is_raw
    if known is not None and same_kind and known.sha256 == file.sha256 and known.model.outputs == model.outputs:
        inputs, outputs = known.inputs, known.outputs
    else:
        all_inputs, all_outputs = file.tensors
        inputs, outputs = tuple(all_inputs), select_outputs(model, all_outputs, file.path.name)
    check_inputs(catalog, model, inputs, file.path.name)
    replacements = find_replacements(catalog, model, inputs, file.data)
    model = replace(model, missing={name: replacements[missing_reference(name)] for name in model.missing})
    return catalog.pin(
        VersionInfo(
            model,
            file.sha256,
            clock.now_us(),
            inputs,
            outputs,
            replacements=replacements,
            examples_sha256=digest(model.examples, model.name),
        )
    )


def next_version(entry: ModelEntry | None) -> int:
    return max(entry.versions) + 1 if entry else 1


def with_version(entry: ModelEntry | None, number: int, info: VersionInfo, promote: bool = True) -> ModelEntry:
    """Return the entry with another version. promote: that version becomes the current one."""
    if entry is None:
        return ModelEntry(number, None, {number: info})
    grown = entry.with_version(number, info)
    return grown.with_current(number) if promote else grown


def write_version(
    store_path: str | Path, number: int, info: VersionInfo, file: ModelFile, golden: GoldenRows | None = None
) -> None:
    """Write a version's folder durably: its file, its manifest and its examples.

    The caller is inside the catalog's transaction, which keeps other processes out. Raises ResourceExhausted, and
    InvalidArgument if the model's folder is a symbolic link.
    """
    folder = model_path(store_path, info.model.name, number).parent
    check_own(folder.parent)
    unfinished = folder.with_name(f".{number}.unfinished")
    try:
        for leftover in (unfinished, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(folder.parent)
        unfinished.mkdir(mode=0o755)
        write_durably(unfinished / "model.onnx", file.data)
        write_durably(unfinished / "manifest.json", manifest(number, info, file))
        if golden is not None:
            write_durably(unfinished / EXAMPLES_FILE, golden.to_bytes())
        sync_folder(unfinished)
        unfinished.rename(folder)
        for parent in (folder.parent, folder.parent.parent, Path(store_path)):
            sync_folder(parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ResourceExhausted(f"model '{info.model.name}': cannot write {folder}: {error.strerror}") from error


def remove_files(store_path: str | Path, name: str) -> None:
    """Remove the folder of a model that the catalog names no more. What cannot be removed stays; it does no harm."""
    folder = model_path(store_path, name, 1).parent.parent
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def manifest(number: int, info: VersionInfo, file: ModelFile) -> bytes:
    """Return the content of a version's manifest.json."""
    document = {
        "name": info.model.name,
        "version": number,
        "created": iso_time(info.created_us),
        "file": file.path.name,
        "sha256": info.sha256,
        **documentation(info.model),
        "columns": [column_label(column) for column in info.model.columns],
        "features": [reference for reference in info.model.references if not reference.startswith("request:")],
        "inputs": [tensor.to_json() for tensor in info.inputs],
        "outputs": [tensor.to_json() for tensor in info.outputs],
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def iso_time(time_us: int) -> str:
    """Return microseconds since 1970 as "2026-01-31T12:00:00Z"."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def deploy(
    store: Store,
    name: str,
    path: str | Path,
    promote: bool = True,
    *,
    owner: str | None = None,
    description: str | None = None,
    tags: Sequence[str] | None = None,
    run: str = "",
    metrics: Mapping[str, float] | None = None,
    canary_percent: float | None = None,
    examples: str | Path | None = None,
    vet_timeout: str | timedelta | None = None,
) -> int:
    """Register an ONNX file as the model's next version, with the current version's inputs. Returns its number.

    promote: the new version becomes the current one. canary_percent: it becomes a canary instead, which answers this
    percentage of requests, and the current version answers the rest. owner, description, tags: None keeps those of the
    current version. run, metrics, examples: belong to this version alone. vet_timeout: as for `apply`. If the current
    version has the same file already, no version is made and the current number is returned. A version is registered
    only if it loads, runs and fits the views. Raises NotFound (no such model: apply its definition first),
    InvalidArgument, Internal (it fails to run).
    """
    store.refresh()
    source = str(Path(path).absolute())
    given = {"owner": owner, "description": description, "tags": tags}
    expected = None if examples is None else str(Path(examples).absolute())
    changes: Any = {"path": source, "run": run, "metrics": metrics or {}, "examples": expected}
    changes |= {field: text for field, text in given.items() if text is not None}
    file = ModelFile.read(source, name, trial_limit_s(vet_timeout))
    entry = store.catalog.model(name)
    info = inspect(store.catalog, replace(entry.model, **changes), file)
    if canary_percent is not None:
        check_percent(canary_percent, f"model '{name}': canary")
        check_canary(store.catalog, entry, info, next_version(entry))
    vetted, golden = info, None
    if entry.version().sha256 != file.sha256:
        if info.model.examples is not None:  # they are put together with the model's functions
            check_code(info.model, store.runs_code)
        golden = read_examples(store.catalog, info)
        with file.on_disk() as copy:
            vetted = vet(store.catalog, info, next_version(entry), copy, golden=golden, limit_s=file.vet_s)
    detail: dict[str, Any] = {"file": source, "sha256": file.sha256, "run": run}
    with store.edit_catalog("deployed", f"model {name}", detail) as catalog:
        entry = catalog.model(name)
        number = entry.current
        if entry.version().sha256 != file.sha256:
            number = detail["version"] = next_version(entry)
            info = with_findings(inspect(catalog, replace(entry.model, **changes), file), vetted)
            write_version(store.path, number, info, file, golden)
            grown = with_version(entry, number, info, promote and canary_percent is None)
            if canary_percent is not None:
                grown = replace(grown, canary=Share(number, canary_percent))
            catalog.models[name] = grown
    store.refresh()
    return number


def promote(
    store: Store,
    name: str,
    version: int | None = None,
    vet_timeout: str | timedelta | None = None,
    action: str = "promoted",
) -> int:
    """Make a version the current one, and end a canary. version: None takes the canary, else the newest version.

    vet_timeout: as for `apply`. action: what the history calls it. Returns the version that was current before. Raises
    NotFound; InvalidArgument or Internal if the version does not load or run, or does not fit the views.
    """
    store.refresh()
    number = version if version is not None else candidate(store.catalog.model(name))
    vetted = vet_stored(store, name, number, vet_timeout)
    with store.edit_catalog(action, f"model {name}", {"version": number}) as catalog:
        entry = with_examined(catalog.model(name), number, vetted)
        check_version(store, catalog, entry, number)
        catalog.models[name] = entry.with_current(number)
    store.refresh()
    return entry.current


def candidate(entry: ModelEntry) -> int:
    """Return the version to try next: the canary, else the newest. Raises InvalidArgument if it is the current one."""
    number = entry.canary.version if entry.canary else max(entry.versions)
    if number <= entry.current and entry.canary is None:
        raise InvalidArgument(
            f"model '{entry.model.name}' has no version newer than the current one, {entry.current};"
            " name a version, or deploy one with --no-promote"
        )
    return number


def rollback(store: Store, name: str, vet_timeout: str | timedelta | None = None) -> int:
    """Make the previous version the current one again. Returns its number. Raises the errors of `promote`."""
    store.refresh()
    previous = store.catalog.model(name).previous
    if previous is None:
        raise InvalidArgument(f"model '{name}' has no earlier version to go back to")
    promote(store, name, previous, vet_timeout, "rolled back")
    return previous


def set_canary(
    store: Store,
    name: str,
    percent: float,
    version: int | None = None,
    vet_timeout: str | timedelta | None = None,
) -> Share | None:
    """Let a version answer a percentage of the requests, chosen by their entity keys. percent: 0 ends the canary.

    version: None takes the present canary, else the newest version. vet_timeout: as for `apply`. Returns the canary,
    None if it was ended.
    Raises NotFound; InvalidArgument or Internal if the version cannot serve or takes other request columns than the
    current version.
    """
    store.refresh()
    if percent == 0:
        with store.edit_catalog("ended the canary of", f"model {name}") as catalog:
            catalog.models[name] = replace(catalog.model(name), canary=None)
        store.refresh()
        return None
    check_percent(percent, f"model '{name}': canary")
    number = version if version is not None else candidate(store.catalog.model(name))
    vetted = vet_stored(store, name, number, vet_timeout)
    detail = {"version": number, "percent": percent}
    with store.edit_catalog("set a canary of", f"model {name}", detail) as catalog:
        entry = with_examined(catalog.model(name), number, vetted)
        check_version(store, catalog, entry, number)
        check_canary(catalog, entry, entry.version(number), number)
        share = Share(number, percent)
        catalog.models[name] = replace(entry, canary=share)
    store.refresh()
    return share


def set_shadow(
    store: Store,
    name: str,
    version: int | None,
    percent: float = 100.0,
    vet_timeout: str | timedelta | None = None,
) -> Share | None:
    """Run a version on a percentage of the current version's requests and compare the answers. version: None ends it.

    vet_timeout: as for `apply`. Returns the shadow, None if it was ended. Raises the errors of `set_canary`.
    """
    store.refresh()
    if version is None:
        with store.edit_catalog("ended the shadow of", f"model {name}") as catalog:
            catalog.models[name] = replace(catalog.model(name), shadow=None)
        store.refresh()
        return None
    check_percent(percent, f"model '{name}': shadow")
    vetted = vet_stored(store, name, version, vet_timeout)
    with store.edit_catalog("set a shadow of", f"model {name}", {"version": version, "percent": percent}) as catalog:
        entry = with_examined(catalog.model(name), version, vetted)
        check_version(store, catalog, entry, version)
        check_shadow(catalog, entry, entry.version(version), version)
        share = Share(version, percent)
        catalog.models[name] = replace(entry, shadow=share)
    store.refresh()
    return share


def check_percent(percent: float, where: str) -> None:
    if not 0 < percent <= 100:
        raise InvalidArgument(f"{where}: the share must be above 0% and at most 100%, not {percent:g}%")


def check_version(store: Store, catalog: Catalog, entry: ModelEntry, number: int) -> None:
    """Check that a version and its file exist and fit the present views. Raises NotFound, InvalidArgument."""
    info = entry.version(number)
    check_inputs(catalog.as_pinned(info), info.model, info.inputs, f"version {number}")
    if not model_path(store.path, info.model.name, number).is_file():
        raise NotFound(f"model '{info.model.name}': the file of version {number} is gone from the store")


def check_canary(catalog: Catalog, entry: ModelEntry, info: VersionInfo, number: int) -> None:
    """Check that this version takes the same request columns as the current one. Raises InvalidArgument."""
    if info.model.is_raw:
        raise InvalidArgument(
            f"model '{entry.model.name}' takes tensors, and has no keys by which a canary gets its share of requests;"
            " try the version as a shadow, or promote it"
        )
    current, other = columns_of_both(catalog, entry, info, number, "canary")
    if not current and not other:
        raise InvalidArgument(
            f"model '{entry.model.name}' takes no columns of the request, so all requests are the same and a canary"
            " cannot get a share of them; try the version as a shadow, or promote it"
        )
    if current != other:
        names = ", ".join(sorted(name for name in {*current, *other} if current.get(name) != other.get(name)))
        raise InvalidArgument(
            f"model '{entry.model.name}': version {number} takes other request columns than version {entry.current}"
            f" ({names}), so it cannot answer the same requests as a canary"
        )
    serving = entry.version()
    needed = set(required_columns(catalog, info))
    if refused := sorted(needed.difference(required_columns(catalog, serving))):
        raise InvalidArgument(
            f"model '{entry.model.name}': version {number} refuses a missing value of {', '.join(refused)}, for which"
            f" version {entry.current} takes another; give it the same Model(missing=...) to make it a canary"
        )


def check_shadow(catalog: Catalog, entry: ModelEntry, info: VersionInfo, number: int) -> None:
    """Check that requests for the current version have the columns that this version needs, and that the two versions
    have an output in common to compare. Raises InvalidArgument.
    """
    current, other = columns_of_both(catalog, entry, info, number, "shadow")
    where = f"model '{entry.model.name}': version {number}"
    serving = entry.version()
    if (info.model.is_raw or serving.model.is_raw) and not same_tensors(info, serving):
        raise InvalidArgument(f"{where} and version {entry.current} must take the same tensors, or both columns")
    if lacking := [name for name, dtype in other.items() if current.get(name) != dtype]:
        raise InvalidArgument(f"{where} needs {', '.join(lacking)}, which requests for version {entry.current} lack")
    if not {tensor.name for tensor in info.outputs} & {tensor.name for tensor in serving.outputs}:
        raise InvalidArgument(f"{where} and version {entry.current} have no output in common to compare")


def same_tensors(a: VersionInfo, b: VersionInfo) -> bool:
    """Return whether two versions take tensors, and the same: by name, type and shape."""
    return a.model.is_raw and b.model.is_raw and a.inputs == b.inputs


def columns_of_both(
    catalog: Catalog, entry: ModelEntry, info: VersionInfo, number: int, what: str
) -> tuple[dict[str, DType], dict[str, DType]]:
    """Return the request columns of the current version and of version `number`. what: "canary" or "shadow"."""
    if number == entry.current:
        raise InvalidArgument(
            f"model '{entry.model.name}': version {number} is the current one; name another version as the {what}"
        )
    current = entry.version()
    ours, other = (request_columns(catalog.as_pinned(each), each.model, each.inputs) for each in (current, info))
    return ours, other


def vet_stored(store: Store, name: str, number: int, vet_timeout: str | timedelta | None) -> VersionInfo:
    """Load, warm, check and examine a version of the store. Returns what `vet` returns, and raises its errors."""
    info = store.catalog.with_kept_pins(store.catalog.model(name).version(number))
    check_inputs(store.catalog.as_pinned(info), info.model, info.inputs, f"version {number}")
    path = model_path(store.path, name, number)
    return vet(store.catalog, info, number, path, limit_s=trial_limit_s(vet_timeout))


def with_examined(entry: ModelEntry, number: int, vetted: VersionInfo) -> ModelEntry:
    """Return the entry with what `vet` found out about a version of it, and the definitions that it was tried with."""
    return entry.with_version(number, replace(with_findings(entry.version(number), vetted), pins=vetted.pins))


def list_versions(catalog: Catalog) -> list[dict[str, Any]]:
    """Return every version of every model as a dict of JSON values, newest first within a model."""
    return [
        {
            "name": name,
            "version": number,
            **role(entry, number),
            "created": iso_time(info.created_us),
            "columns": [column_label(column) for column in info.model.columns],
            "outputs": [tensor.name for tensor in info.outputs],
            "sha256": info.sha256,
            "batching": info.batching,
            "batching_why": info.batching_why or None,
            **documentation(info.model),
        }
        for name, entry in catalog.models.items()
        for number, info in sorted(entry.versions.items(), reverse=True)
    ]


def role(entry: ModelEntry, number: int) -> dict[str, Any]:
    """Return whether a version serves, served before, and its percentage as canary and as shadow (None: it is not)."""
    shares = {"canary": entry.canary, "shadow": entry.shadow}
    percents = {what: share.percent if share and share.version == number else None for what, share in shares.items()}
    return {"serving": number == entry.current, "previous": number == entry.previous, **percents}


def documentation(model: Model) -> dict[str, Any]:
    """Return the fields of a version that only people read."""
    return {
        "description": model.description,
        "owner": model.owner,
        "tags": list(model.tags),
        "run": model.run,
        "metrics": dict(model.metrics),
    }


def describe(catalog: Catalog, name: str, version: int | None = None) -> dict[str, Any]:
    """Return a version (None: the current one) as a dict of JSON values: its definition and the request's columns.

    Raises NotFound.
    """
    entry = catalog.model(name)
    number = entry.current if version is None else version
    info = entry.version(number)
    by_name = info.model.inputs_by_name([tensor.name for tensor in info.inputs])
    inputs = {tensor: [column_label(column) for column in entries] for tensor, entries in by_name.items()}
    if info.model.is_raw:
        inputs = {tensor.name: [f"tensor {tensor.text}"] for tensor in info.inputs}
    columns = request_columns(catalog.as_pinned(info), info.model, info.inputs)
    return {
        "name": name,
        "version": number,
        **role(entry, number),
        "versions": sorted(entry.versions),
        "created": iso_time(info.created_us),
        "sha256": info.sha256,
        **documentation(info.model),
        "inputs": inputs,
        "outputs": {tensor.name: tensor.dtype for tensor in info.outputs},
        "features": [reference for reference in info.model.references if not reference.startswith("request:")],
        "columns": {column: dtype.name for column, dtype in columns.items()},
        "missing": dict(info.model.missing),
        "replacements": dict(info.replacements),
        "batching": info.batching,
        "batching_why": info.batching_why or None,
    }
