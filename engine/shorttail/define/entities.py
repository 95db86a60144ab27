"""Declares entities: the users, items, ... that the rows of feature views describe, and their key columns.

An alias looks up the views of an entity by other columns of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shorttail.define.dtypes import DType, Int64, String, parse_dtype
from shorttail.define.names import check_name, check_not_request, check_path_name, check_tags, check_text, suggestion
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
    has a single row, such as the exchange rate of today. tags: words by which people find it. Raises InvalidArgument.
    """

    name: str
    keys: dict[str, DType]
    description: str = ""
    tags: Sequence[str] = ()  # stored as a tuple

    def __post_init__(self) -> None:
        check_name(self.name, "entity")
        object.__setattr__(self, "tags", check_tags(self.tags, f"entity '{self.name}'"))
        check_text(self.description, f"entity '{self.name}': description")
        if not isinstance(self.keys, Mapping):
            raise InvalidArgument(f"entity '{self.name}': keys must map column names to types: {{'user_id': st.Int64}}")
        for key, dtype in self.keys.items():
            check_name(key, f"entity '{self.name}': key column")
            if check_dtype(dtype, f"entity '{self.name}': key '{key}'") not in (Int64, String):
                raise InvalidArgument(f"entity '{self.name}': key '{key}' is {dtype}; a key is Int64 or String")
        object.__setattr__(self, "keys", dict(self.keys))

    def alias(self, name: str, /, **columns: str) -> Alias:
        """Return an alias of the entity: `buyer = user.alias("buyer", user_id="buyer_id")`.

        columns: key column -> column of the request; other keys keep their names. A reference "buyer:profile:age" then
        is the feature "profile:age" of the user whose key is in `buyer_id`. Raises InvalidArgument.
        """
        return Alias(name, self, columns)

    def to_json(self) -> Json:
        # A list of pairs, because the order of the keys is part of the table format.
        return {
            "name": self.name,
            "keys": [[key, dtype.name] for key, dtype in self.keys.items()],
            "description": self.description,
            "tags": list(self.tags),
        }

    @classmethod
    def from_json(cls, data: Json) -> Entity:
        keys = {key: parse_dtype(name) for key, name in data["keys"]}
        return cls(data["name"], keys, data["description"], data.get("tags", ()))  # stores of older versions have none


@dataclass(frozen=True)
class Alias:
    """An entity under another name: its views are looked up by other columns of a request.

    columns: key column -> column of the request, for the keys whose columns have other names. Raises InvalidArgument.
    """

    name: str
    entity: Entity
    columns: dict[str, str]

    def __post_init__(self) -> None:
        check_path_name(self.name, "alias")
        where = f"alias '{self.name}'"
        check_not_request(self.name, where)
        keys = self.entity.keys
        if not keys:
            raise InvalidArgument(
                f"{where}: entity '{self.entity.name}' has no keys, so there is nothing to look up by"
            )
        if not self.columns:
            raise InvalidArgument(
                f"{where}: name the request column of a key: {self.entity.name}.alias('{self.name}', "
                f"{next(iter(keys))}='{self.name}_id')"
            )
        for key, column in self.columns.items():
            if key not in keys:
                raise InvalidArgument(
                    f"{where}: entity '{self.entity.name}' has no key '{key}'{suggestion(key, keys, 'keys')}"
                )
            check_name(column, f"{where}: the request column of key '{key}'")
        object.__setattr__(self, "columns", dict(self.columns))
        types: dict[str, str] = {}  # request column -> the first key that it gives
        for key, column in self.request_columns(keys).items():
            first = types.setdefault(column, key)
            if keys[first] != keys[key]:
                raise InvalidArgument(
                    f"{where}: request column '{column}' cannot be both key '{first}', {keys[first]}, and key '{key}',"
                    f" {keys[key]}; name different columns"
                )

    def fits(self, entity: Entity) -> bool:
        """Return whether the alias is of that entity. A view may hold an older one of its name, with other keys."""
        return entity.name == self.entity.name and self.columns.keys() <= entity.keys.keys()

    def request_columns(self, keys: Iterable[str]) -> dict[str, str]:
        """Return each of these key columns, in order -> the column of the request that holds it."""
        return {key: self.columns.get(key, key) for key in keys}

    def to_json(self) -> Json:
        # The entity is in the catalog under its name.
        return {"name": self.name, "entity": self.entity.name, "columns": self.columns}

    @classmethod
    def from_json(cls, data: Json, entities: Mapping[str, Entity]) -> Alias:
        return cls(data["name"], entities[data["entity"]], data["columns"])
