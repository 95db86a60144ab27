"""Declares entities: the users, items, ... that the rows of feature views describe, and their key columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shorttail.define.dtypes import DType, Int64, String, parse_dtype
from shorttail.define.names import check_name, check_text
from shorttail.errors import InvalidArgument

Json = dict[str, Any]


def check_dtype(dtype: object, what: str) -> DType:
    """Return `dtype` if it is a type. what: the beginning of the message. Raises InvalidArgument."""
    if not isinstance(dtype, DType):
        raise InvalidArgument(
            f"{what}: {dtype!r} is not a type; use st.Float32, st.Int64, st.String, st.Vector(n), ..."
        )
    return dtype


@dataclass(frozen=True)
class Entity:
    """An entity, such as a user: the subject of the rows of feature views.

    keys: key column -> type, Int64 or String; together they identify a row. Without keys ({}) each view of the entity
    has a single row, such as the exchange rate of today. Raises InvalidArgument.
    """

    name: str
    keys: dict[str, DType]
    description: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "entity")
        check_text(self.description, f"entity '{self.name}': description")
        if not isinstance(self.keys, Mapping):
            raise InvalidArgument(f"entity '{self.name}': keys must map column names to types: {{'user_id': st.Int64}}")
        for key, dtype in self.keys.items():
            check_name(key, f"entity '{self.name}': key column")
            if check_dtype(dtype, f"entity '{self.name}': key '{key}'") not in (Int64, String):
                raise InvalidArgument(f"entity '{self.name}': key '{key}' is {dtype}; a key is Int64 or String")
        object.__setattr__(self, "keys", dict(self.keys))

    def to_json(self) -> Json:
        # A list of pairs, because the order of the keys is part of the table format.
        return {
            "name": self.name,
            "keys": [[key, dtype.name] for key, dtype in self.keys.items()],
            "description": self.description,
        }

    @classmethod
    def from_json(cls, data: Json) -> Entity:
        return cls(data["name"], {key: parse_dtype(name) for key, name in data["keys"]}, data["description"])
