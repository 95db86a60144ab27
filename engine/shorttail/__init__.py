"""shorttail: features from a memory-mapped store and predictions of their models, in one process and one hop."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from shorttail.dtypes import Bool, Float32, Float64, Int32, Int64, String, Timestamp, Vector
from shorttail.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ShorttailError,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from shorttail.client import AsyncClient, Client
    from shorttail.definitions import Entity, Feature, FeatureView, Model, ParquetSource
    from shorttail.engine import Engine
    from shorttail.ondemand import on_demand
    from shorttail.results import Features, Prediction, Status

try:
    __version__ = version("shorttail")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0"

# Imported when first used: a client process needs neither LMDB nor ONNX Runtime, and a command should start at once.
_LAZY = {
    "AsyncClient": "client",
    "Client": "client",
    "Engine": "engine",
    "Entity": "definitions",
    "Feature": "definitions",
    "FeatureView": "definitions",
    "Features": "results",
    "Model": "definitions",
    "ParquetSource": "definitions",
    "Prediction": "results",
    "Status": "results",
    "on_demand": "ondemand",
}

__all__ = [
    "AsyncClient",
    "Bool",
    "Client",
    "DeadlineExceeded",
    "Engine",
    "Entity",
    "Feature",
    "FeatureView",
    "Features",
    "Float32",
    "Float64",
    "Int32",
    "Int64",
    "Internal",
    "InvalidArgument",
    "Model",
    "NotFound",
    "ParquetSource",
    "PermissionDenied",
    "Prediction",
    "ResourceExhausted",
    "ShorttailError",
    "Status",
    "String",
    "Timestamp",
    "Unauthenticated",
    "Unavailable",
    "Vector",
    "on_demand",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"shorttail.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'shorttail' has no attribute {name!r}")
