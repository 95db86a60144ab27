"""Describes the models and views of a store, as `Engine.models()` and `Engine.views()` return them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shorttail.errors import InvalidArgument, NotFound
from shorttail.models.signature import request_columns

if TYPE_CHECKING:
    from shorttail.define.catalog import Catalog, ModelEntry
    from shorttail.models.serving import Versions


def models(catalog: Catalog, versions: Versions) -> list[dict[str, Any]]:
    """Return what StoredModels returns when it is called."""
    return [_model(catalog, versions, name, entry) for name, entry in catalog.models.items()]


def _model(catalog: Catalog, versions: Versions, name: str, entry: ModelEntry) -> dict[str, Any]:
    serving = versions.serving_now(name)
    number = serving.current.version if serving and serving.current.version in entry.versions else entry.current
    info = entry.version(number)
    runner = versions.runners.get(serving.current) if serving else None
    canary, shadow = (serving.canary, serving.shadow) if serving else (None, None)
    try:
        columns = request_columns(catalog.as_pinned(info), info.model, info.inputs)
    except (NotFound, InvalidArgument):  # it served until the views changed, and what comes next is being loaded
        columns = {}
    takes: dict[str, Any] = {"columns": {column: dtype.name for column, dtype in columns.items()}}
    if info.model.is_raw:
        takes["tensors"] = {tensor.name: tensor.text for tensor in info.inputs}
    return {
        "name": name,
        "version": number,
        **takes,
        "outputs": [tensor.name for tensor in info.outputs],
        "runs": runner.description if runner else None,
        "batching": info.batching,
        "batching_why": info.batching_why or None,
        "canary": {"version": canary[0].version, "percent": canary[1]} if canary else None,
        "shadow": {"version": shadow[0].version, "percent": shadow[1]} if shadow else None,
        "problem": versions.problem(name),
    }


def views(catalog: Catalog) -> list[dict[str, Any]]:
    """Return the views of a catalog as a list of dicts, whose keys StoredViews.__call__ describes."""
    return [
        {
            "name": view.name,
            "keys": {key: dtype.name for key, dtype in view.keys.items()},
            "features": {feature.name: feature.dtype.name for feature in view.features},
            "columns": {feature.name: feature.column for feature in view.features if feature.column},
            "timestamp": view.timestamp,
            "aliases": {
                alias.name: alias.request_columns(view.keys)
                for alias in catalog.aliases.values()
                if alias.fits(view.entity)
            },
        }
        for view in catalog.views.values()
    ]
