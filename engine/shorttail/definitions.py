"""What users declare: entities, feature views, models and on-demand features, and the file that holds them.

Objects check themselves when they are made, so a wrong definition is reported at its own line. Everything has
to_json() / from_json(), because the store's catalog keeps the definitions that a server needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from shorttail.dtypes import Bool, DType, Int32, Int64, String, Timestamp, parse_dtype
from shorttail.errors import InvalidArgument
from shorttail.names import check_name, check_text, split_reference
from shorttail.ondemand import OnDemand, OnDemandFeature, on_demand

__all__ = [
    "Column",
    "Entity",
    "Feature",
    "FeatureView",
    "Model",
    "OnDemand",
    "OnDemandFeature",
    "ParquetSource",
    "on_demand",
    "split_reference",
]

Json = dict[str, Any]
Column = str | OnDemandFeature
"""One entry of a model's inputs: "view:feature", "request:column" or an on-demand feature of such."""

TTL = re.compile(r"(\d+)\s*(ms|s|m|h|d|w)")
TTL_UNITS_US = {
    "ms": 1_000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def check_dtype(dtype: object, what: str) -> DType:
    if not isinstance(dtype, DType):
        raise InvalidArgument(
            f"{what}: {dtype!r} is not a type; use st.Float32, st.Int64, st.String, st.Vector(n), ..."
        )
    return dtype


@dataclass(frozen=True)
class Entity:
    """What rows are about: one or more key columns, each Int64 or String."""

    name: str
    keys: dict[str, DType]
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "entity")
        check_text(self.description, f"entity '{self.name}': description")
        if not isinstance(self.keys, Mapping) or not self.keys:
            raise InvalidArgument(f"entity '{self.name}': keys must map column names to types: {{'user_id': st.Int64}}")
        for key, dtype in self.keys.items():
            check_name(key, f"entity '{self.name}': key column")
            if check_dtype(dtype, f"entity '{self.name}': key '{key}'") not in (Int64, String):
                raise InvalidArgument(f"entity '{self.name}': key '{key}' is {dtype}; a key is Int64 or String")
        object.__setattr__(self, "keys", dict(self.keys))

    def to_json(self) -> Json:
        # A list of pairs: the order of the keys is part of the table format.
        return {
            "name": self.name,
            "keys": [[key, dtype.name] for key, dtype in self.keys.items()],
            "description": self.description,
        }

    @classmethod
    def from_json(cls, data: Json) -> Entity:
        return cls(data["name"], {key: parse_dtype(name) for key, name in data["keys"]}, data["description"])


@dataclass(frozen=True)
class Feature:
    """One column of a view. `default` stands in where the row or the value is missing."""

    name: str
    dtype: DType
    default: Any = None
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "feature")
        check_dtype(self.dtype, f"feature '{self.name}'")
        check_text(self.description, f"feature '{self.name}': description")
        if self.default is not None:
            object.__setattr__(self, "default", check_default(self.name, self.dtype, self.default))

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "dtype": self.dtype.name,
            "default": list(self.default) if isinstance(self.default, tuple) else self.default,
            "description": self.description,
        }

    @classmethod
    def from_json(cls, data: Json) -> Feature:
        return cls(data["name"], parse_dtype(data["dtype"]), data["default"], data["description"])


def check_default(name: str, dtype: DType, value: Any) -> Any:
    """The default as the plain Python value that JSON and the lookup take; a vector's is a tuple of floats."""
    wrong = InvalidArgument(f"feature '{name}': default {value!r} is not a {dtype}")
    if isinstance(value, np.generic):
        value = value.item()
    if dtype == Timestamp and isinstance(value, datetime):
        return microseconds(value)
    if dtype == Bool:
        if isinstance(value, bool):
            return value
    elif dtype == String:
        if isinstance(value, str):
            return value
    elif dtype.is_vector:
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) == dtype.width:
            try:
                return tuple(float(item) for item in value)
            except (TypeError, ValueError):
                raise wrong from None
    elif isinstance(value, bool):
        pass
    elif dtype.is_integer:
        bits = 31 if dtype == Int32 else 63
        if isinstance(value, int) and -(1 << bits) <= value < 1 << bits:
            return value
    elif isinstance(value, int | float):
        return float(value)
    raise wrong


def microseconds(value: datetime) -> int:
    """Microseconds since 1970-01-01 UTC; a datetime without a zone is taken as UTC."""
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True)
class ParquetSource:
    """Where a view's rows come from: a Parquet file or folder. Relative to the definitions file.

    `timestamp` names the column of event times (timestamps, or integers in microseconds since 1970 UTC). Without it
    a row's event time is the moment it is loaded.
    """

    path: str
    timestamp: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise InvalidArgument(f"ParquetSource({self.path!r}): give the path of a Parquet file or folder")
        object.__setattr__(self, "path", str(self.path))
        if self.timestamp is not None and (not isinstance(self.timestamp, str) or not self.timestamp):
            raise InvalidArgument(f"ParquetSource({self.path!r}): timestamp must be the name of a column")

    def to_json(self) -> Json:
        return {"kind": "parquet", "path": self.path, "timestamp": self.timestamp}

    @classmethod
    def from_json(cls, data: Json) -> ParquetSource:
        return cls(data["path"], data["timestamp"])


@dataclass(frozen=True)
class FeatureView:
    """Features of one entity that are stored, loaded and looked up together: one table of the online store.

    `ttl` is the age of an event time beyond which a row is STALE: "2d", "12h", "30m", "45s" or a timedelta; None is
    for ever. `ttl_us` is the same in microseconds, 0 for none.
    """

    name: str
    entity: Entity
    features: Sequence[Feature]  # a tuple once made
    ttl: str | timedelta | None = field(default=None, compare=False)  # ttl_us is compared
    source: ParquetSource | None = None
    description: str = ""
    owner: str = ""
    ttl_us: int = field(init=False)
    feature_index: dict[str, int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_name(self.name, "feature view")
        where = f"feature view '{self.name}'"
        if self.name == "request":
            raise InvalidArgument(f"{where}: the name 'request' stands for request columns; choose another")
        if not isinstance(self.entity, Entity):
            raise InvalidArgument(f"{where}: entity must be an st.Entity, not {self.entity!r}")
        if isinstance(self.features, str) or not isinstance(self.features, Sequence) or not self.features:
            raise InvalidArgument(f"{where}: features must be a list of at least one st.Feature")
        index: dict[str, int] = {}
        for feature in self.features:
            if not isinstance(feature, Feature):
                raise InvalidArgument(f"{where}: {feature!r} is not an st.Feature")
            if feature.name in index:
                raise InvalidArgument(f"{where}: feature '{feature.name}' is named twice")
            if feature.name in self.entity.keys:
                raise InvalidArgument(
                    f"{where}: '{feature.name}' is a key of entity '{self.entity.name}' and cannot also be a feature"
                )
            index[feature.name] = len(index)
        if self.source is not None and not isinstance(self.source, ParquetSource):
            raise InvalidArgument(f"{where}: source must be an st.ParquetSource, not {self.source!r}")
        check_text(self.description, f"{where}: description")
        check_text(self.owner, f"{where}: owner")
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "ttl_us", parse_ttl(self.ttl, where))
        object.__setattr__(self, "feature_index", index)

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    @property
    def keys(self) -> dict[str, DType]:
        """The entity's key columns, in the order of the table format."""
        return self.entity.keys

    @property
    def timestamp(self) -> str | None:
        """The source's column of event times."""
        return self.source.timestamp if self.source else None

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "entity": self.entity.to_json(),
            "features": [feature.to_json() for feature in self.features],
            "ttl_us": self.ttl_us,
            "source": self.source.to_json() if self.source else None,
            "description": self.description,
            "owner": self.owner,
        }

    @classmethod
    def from_json(cls, data: Json) -> FeatureView:
        return cls(
            data["name"],
            Entity.from_json(data["entity"]),
            [Feature.from_json(item) for item in data["features"]],
            ttl=timedelta(microseconds=data["ttl_us"]) if data["ttl_us"] else None,
            source=ParquetSource.from_json(data["source"]) if data["source"] else None,
            description=data["description"],
            owner=data["owner"],
        )


def parse_ttl(ttl: object, where: str) -> int:
    """Microseconds of a ttl, 0 for None."""
    if ttl is None:
        return 0
    ttl_us = 0
    if isinstance(ttl, timedelta):
        ttl_us = ttl // timedelta(microseconds=1)
    elif isinstance(ttl, str) and (match := TTL.fullmatch(ttl.strip())):
        ttl_us = int(match[1]) * TTL_UNITS_US[match[2]]
    if not 0 < ttl_us < 1 << 62:
        raise InvalidArgument(
            f"{where}: ttl {ttl!r} is not a positive time; write '2d', '12h', '30m', '45s' or '500ms'"
        )
    return ttl_us


@dataclass(frozen=True)
class Model:
    """An ONNX model and what feeds it.

    `inputs` is a list of columns for a model with one input (a matrix whose columns they are, in order; a vector
    feature fills as many columns as it is long), or a dict from the model's input names to such lists.
    `outputs` names the model's outputs to return; None is all of them. `path` is relative to the definitions file.
    `run` is a link to the training run ("mlflow:..." or any URL), `metrics` what it was measured at: {name: number}.
    """

    name: str
    path: str
    inputs: Sequence[Column] | Mapping[str, Sequence[Column]]
    outputs: Sequence[str] | None = None
    description: str = ""
    owner: str = ""
    run: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "model")
        where = f"model '{self.name}'"
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise InvalidArgument(f"{where}: path must be the path of an ONNX file")
        object.__setattr__(self, "path", str(self.path))
        if isinstance(self.inputs, Mapping):
            if not self.inputs:
                raise InvalidArgument(f"{where}: inputs is empty")
            for name in self.inputs:
                check_text(name, f"{where}: the name of an input")
            checked: Any = {
                name: check_columns(columns, f"{where}: input '{name}'") for name, columns in self.inputs.items()
            }
        else:
            checked = check_columns(self.inputs, f"{where}: inputs")
        object.__setattr__(self, "inputs", checked)
        if self.outputs is not None:
            if isinstance(self.outputs, str) or not self.outputs or len(set(self.outputs)) != len(self.outputs):
                raise InvalidArgument(f"{where}: outputs must be a list of different output names")
            object.__setattr__(self, "outputs", tuple(self.outputs))
        check_text(self.description, f"{where}: description")
        check_text(self.owner, f"{where}: owner")
        check_run(self.run, where)
        object.__setattr__(self, "metrics", check_metrics(self.metrics, where))

    __hash__ = None  # type: ignore[assignment]  # it may hold a dict

    @property
    def columns(self) -> list[Column]:
        """Every column of every input, in order."""
        if isinstance(self.inputs, Mapping):
            return [column for columns in self.inputs.values() for column in columns]
        return list(self.inputs)

    @property
    def references(self) -> list[str]:
        """Every "view:feature" and "request:column" the model reads, arguments included, once each, in order."""
        found: dict[str, None] = {}
        for column in self.columns:
            for reference in column.references if isinstance(column, OnDemandFeature) else (column,):
                found[reference] = None
        return list(found)

    def inputs_by_name(self, input_names: Sequence[str]) -> dict[str, tuple[Column, ...]]:
        """The columns of each of the ONNX file's inputs; a list belongs to its only one."""
        if isinstance(self.inputs, Mapping):
            return {name: tuple(columns) for name, columns in self.inputs.items()}
        return {input_names[0]: tuple(self.inputs)}

    def to_json(self) -> Json:
        inputs: Any
        if isinstance(self.inputs, Mapping):
            # Pairs, because the order of inputs is the order of their columns in requests and messages.
            inputs = {"named": [[name, [column_json(c) for c in columns]] for name, columns in self.inputs.items()]}
        else:
            inputs = {"only": [column_json(column) for column in self.inputs]}
        return {
            "name": self.name,
            "path": self.path,
            "inputs": inputs,
            "outputs": list(self.outputs) if self.outputs is not None else None,
            "description": self.description,
            "owner": self.owner,
            "run": self.run,
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_json(cls, data: Json) -> Model:
        inputs: Any
        if "named" in data["inputs"]:
            inputs = {name: [column_from_json(c) for c in columns] for name, columns in data["inputs"]["named"]}
        else:
            inputs = [column_from_json(column) for column in data["inputs"]["only"]]
        return cls(
            data["name"],
            data["path"],
            inputs,
            data["outputs"],
            data["description"],
            data["owner"],
            data.get("run", ""),
            data.get("metrics", {}),
        )


def check_run(run: object, where: str) -> None:
    """A link: "mlflow:RUN", "https://...", whatever a scheme stands before."""
    check_text(run, f"{where}: run")
    if run and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]+", str(run)):
        raise InvalidArgument(f"{where}: run must be a link such as 'mlflow:3f2a' or 'https://...', not {run!r}")


def check_metrics(metrics: object, where: str) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise InvalidArgument(f"{where}: metrics must be {{name: number}}, not {type(metrics).__name__}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InvalidArgument(f"{where}: metrics: {name!r} is not a name")
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise InvalidArgument(f"{where}: metric '{name}' must be a finite number, not {value!r}")
    return {name: float(value) for name, value in metrics.items()}


def check_columns(columns: object, where: str) -> tuple[Column, ...]:
    if isinstance(columns, str | OnDemandFeature) or not isinstance(columns, Sequence) or not columns:
        raise InvalidArgument(f"{where} must be a list of 'view:feature', 'request:column' or on-demand features")
    for column in columns:
        if isinstance(column, OnDemand):
            raise InvalidArgument(f"{where}: call {column.name} with the references that are its arguments")
        if not isinstance(column, OnDemandFeature):
            try:
                split_reference(column)
            except InvalidArgument as error:
                raise InvalidArgument(f"{where}: {error.message}") from None
    return tuple(columns)


def column_json(column: Column) -> Any:
    return column.to_json() if isinstance(column, OnDemandFeature) else column


def column_from_json(data: Any) -> Column:
    return data if isinstance(data, str) else OnDemandFeature.from_json(data)


def column_label(column: Column) -> str:
    """A column as the user wrote it: a reference, or function(reference, ...)."""
    return column if isinstance(column, str) else column.label
