"""Tables and their columns: how a table stores the features of a view.

A column has a number, which its view never uses for another one. A definition maps features to columns, so a feature
can be renamed, moved, or removed without a change of the table. A table may have more columns than the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from shorttail.define.dtypes import DType, parse_dtype
from shorttail.define.identity import Definition
from shorttail.define.views import FeatureView

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. was: the number of the column whose values it takes in a wider type, None for a new one."""

    number: int
    dtype: DType
    was: int | None = None

    def to_json(self) -> list[Any]:
        return [self.number, self.dtype.name, self.was]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Self:
        number, name, was = data
        return cls(number, parse_dtype(name), was)


@dataclass(frozen=True)
class TableInfo:
    """A table that holds rows of a view. It has no pages until its first row is written.

    id: from 1 on, never reused (in the change log 0 stands for the catalog). seed: of the hash of keys. keys: the types
    of its keys. columns: in the order of its rows. page_bytes: size of a page, 0 to let the layout choose it.
    page_format: of its pages (docs/format.md).
    """

    id: int
    seed: int
    keys: tuple[DType, ...]
    columns: tuple[Column, ...]
    page_bytes: int = 0
    page_format: int = 2  # of a table whose entry says nothing

    @classmethod
    def of(cls, definition: Definition, table_id: int, seed: int, page_bytes: int = 0, page_format: int = 2) -> Self:
        """Return a table with the columns of a definition, in the order of its features."""
        features = zip(definition.columns, definition.view.features, strict=True)
        columns = tuple(Column(number, feature.dtype) for number, feature in features)
        return cls(table_id, seed, tuple(definition.view.keys.values()), columns, page_bytes, page_format)

    @cached_property
    def place(self) -> dict[int, int]:
        """The place in a row of each column, by its number."""
        return {column.number: place for place, column in enumerate(self.columns)}

    def places(self, number: int) -> tuple[int, ...]:
        """Return the places that take the values of a column: its own, and those of columns that are widened from it.

        () if the table has none.
        """
        return tuple(place for place, column in enumerate(self.columns) if number in (column.number, column.was))

    def to_json(self) -> list[Any]:
        keys, columns = [dtype.name for dtype in self.keys], [column.to_json() for column in self.columns]
        return [self.id, self.seed, self.page_bytes, keys, columns, self.page_format]

    @classmethod
    def from_json(cls, data: Sequence[Any], definition: Definition) -> Self:
        """Return the table. definition: of its view, whose columns a table of an older version has."""
        table_id, seed, page_bytes, *rest = data
        if not rest:
            return cls.of(definition, table_id, seed, page_bytes)
        keys, columns, page_format = rest
        types = tuple(map(parse_dtype, keys))
        return cls(table_id, seed, types, tuple(map(Column.from_json, columns)), page_bytes, page_format)


@dataclass(frozen=True)
class Stored:
    """A definition of a view, and a table that stores its rows."""

    definition: Definition
    table: TableInfo
    places: tuple[tuple[int, ...], ...] = field(init=False, compare=False)  # per feature: see TableInfo.places
    is_whole: bool = field(init=False, compare=False)  # whether the features give every column of the table

    def __post_init__(self) -> None:
        places = tuple(map(self.table.places, self.definition.columns))
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "is_whole", len({p for each in places for p in each}) == len(self.table.columns))

    @property
    def view(self) -> FeatureView:
        return self.definition.view

    def place(self, feature: str) -> int:
        """Return the place in a row of a feature's column. Raises KeyError if the table lacks it."""
        return self.table.place[self.definition.column_of(feature)]
