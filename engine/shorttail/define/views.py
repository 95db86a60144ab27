"""Declares feature views: features of an entity that are stored, loaded and looked up together.

A definition checks itself when it is made, so an error is reported at its own line of the definitions file. Every
definition has to_json() and from_json(), because the store's catalog keeps it for the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from shorttail.define.dtypes import DType, parse_dtype
from shorttail.define.durations import parse_duration
from shorttail.define.entities import Entity, check_dtype
from shorttail.define.names import check_name, check_not_request, check_path_name, check_tags, check_text
from shorttail.define.refusal import Refused
from shorttail.define.scalar import as_value
from shorttail.define.sources import ParquetSource
from shorttail.errors import InvalidArgument

Json = dict[str, Any]


@dataclass(frozen=True)
class Feature:
    """A column of a view. `default` is the value where the row or its value is missing.

    `column` is its column in rows that are loaded or pushed, any text; without it, `name`. References and answers use
    `name`. `tags` are words by which people find it. `renamed_from` is its name in the store until the definition is
    applied; it keeps its values. Raises InvalidArgument.
    """

    name: str
    dtype: DType
    default: Any = None
    description: str = ""
    column: str | None = None
    tags: Sequence[str] = ()  # stored as a tuple
    renamed_from: str | None = field(default=None, compare=False)  # it is not stored

    def __post_init__(self) -> None:
        check_name(self.name, "feature")
        if self.renamed_from is not None:
            check_name(self.renamed_from, f"feature '{self.name}': renamed_from")
        object.__setattr__(self, "tags", check_tags(self.tags, f"feature '{self.name}'"))
        check_dtype(self.dtype, f"feature '{self.name}'")
        check_text(self.description, f"feature '{self.name}': description")
        object.__setattr__(self, "default", check_default(self.name, self.dtype, self.default))
        if self.column is not None and not is_column(self.column):
            raise InvalidArgument(f"feature '{self.name}': column must be the name of a column, not {self.column!r}")

    @property
    def source_column(self) -> str:
        """The column that the feature is read from."""
        return self.column or self.name

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "dtype": self.dtype.name,
            "default": list(self.default) if isinstance(self.default, tuple) else self.default,
            "description": self.description,
            "column": self.column,
            "tags": list(self.tags),
        }

    @classmethod
    def from_json(cls, data: Json) -> Feature:
        column, tags = data.get("column"), data.get("tags", ())  # stores of older versions have none
        return cls(data["name"], parse_dtype(data["dtype"]), data["default"], data["description"], column, tags)


def is_column(name: object) -> bool:
    """Return whether a value is a text that UTF-8 can encode, and not empty."""
    return isinstance(name, str) and name != "" and name == name.encode(errors="ignore").decode()


def check_default(name: str, dtype: DType, value: Any) -> Any:
    """The default as define.values.as_value gives it, which JSON and the lookup take. Raises InvalidArgument."""
    try:
        return as_value(dtype, value)
    except Refused as error:
        raise error.error(f"feature '{name}': the default", dtype) from None


@dataclass(frozen=True)
class FeatureView:
    """Features of an entity that are stored, loaded and looked up together. A view is a table of the online store.

    `ttl` is the time to live: a row with an older event time is STALE. It is "2d", "12h", "30m", "45s" or a timedelta;
    with None rows never become stale. `ttl_us` is the same in microseconds, 0 for None. Raises InvalidArgument.
    """

    name: str
    entity: Entity
    features: Sequence[Feature]  # stored as a tuple
    ttl: str | timedelta | None = field(default=None, compare=False)  # ttl_us is compared
    source: ParquetSource | None = None
    description: str = ""
    owner: str = ""
    tags: Sequence[str] = ()  # stored as a tuple
    ttl_us: int = field(init=False)
    feature_index: dict[str, int] = field(init=False, compare=False, repr=False)
    source_columns: list[str] = field(init=False, compare=False, repr=False)  # of the features; some may share one

    def __post_init__(self) -> None:
        check_path_name(self.name, "feature view")
        where = f"feature view '{self.name}'"
        check_not_request(self.name, where)
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
        for feature in self.features:
            if feature.renamed_from in index:
                raise InvalidArgument(
                    f"{where}: feature '{feature.name}' is renamed from '{feature.renamed_from}', which is still there"
                )
        if self.source is not None and not isinstance(self.source, ParquetSource):
            raise InvalidArgument(f"{where}: source must be an st.ParquetSource, not {self.source!r}")
        check_text(self.description, f"{where}: description")
        check_text(self.owner, f"{where}: owner")
        object.__setattr__(self, "tags", check_tags(self.tags, where))
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "ttl_us", parse_ttl(self.ttl, where))
        object.__setattr__(self, "feature_index", index)
        object.__setattr__(self, "source_columns", [feature.source_column for feature in self.features])

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    @property
    def keys(self) -> dict[str, DType]:
        """The entity's key columns, in the order that the table stores them in."""
        return self.entity.keys

    @property
    def timestamp(self) -> str | None:
        """The name of the source's column of event times, None if it has none."""
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
            "tags": list(self.tags),
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
            tags=data.get("tags", ()),
        )


def parse_ttl(ttl: object, where: str) -> int:
    """Return a ttl in microseconds, 0 for None. where: the beginning of the message. Raises InvalidArgument."""
    return 0 if ttl is None else parse_duration(ttl, f"{where}: ttl", "'2d', '12h', '30m', '45s' or '500ms'")
