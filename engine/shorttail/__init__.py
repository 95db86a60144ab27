"""shorttail: features from a memory-mapped store and predictions of their models, in one process and one hop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shorttail.config import VERSION
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
    from shorttail.define.dtypes import Bool, Float32, Float64, Int32, Int64, String, Timestamp, Vector
    from shorttail.define.entities import Entity
    from shorttail.define.models import Model
    from shorttail.define.ondemand import on_demand
    from shorttail.define.sources import ParquetSource
    from shorttail.define.views import Feature, FeatureView
    from shorttail.engine import Engine
    from shorttail.results import Features, Prediction, Status

__version__ = VERSION

# Imported when first used: a client process needs neither LMDB nor ONNX Runtime, and a command should start at once.
_LAZY = {
    **dict.fromkeys(("Bool", "Float32", "Float64", "Int32", "Int64", "String", "Timestamp", "Vector"), "define.dtypes"),
    "AsyncClient": "client",
    "Client": "client",
    "Engine": "engine",
    "Entity": "define.entities",
    "Feature": "define.views",
    "FeatureView": "define.views",
    "Features": "results",
    "Model": "define.models",
    "ParquetSource": "define.sources",
    "Prediction": "results",
    "Status": "results",
    "on_demand": "define.ondemand",
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


def __dir__() -> list[str]:
    """The public names, imported or not: a notebook completes from this list."""
    return sorted([*__all__, "__version__"])
