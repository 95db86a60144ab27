"""The ids of the definition of a view: hashes of what determines its rows, and of what determines its answers.

Two definitions with one rows id can be served from one table. Two definitions with one id give the same answers. What
only people read (descriptions, owner) and where a file is are in neither. Names of features are in the answers alone:
a renamed feature is the same column of the same table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from shorttail.define.dtypes import parse_dtype
from shorttail.define.views import Feature, FeatureView

Json = dict[str, Any]

SHOWN: Final = 4  # the fewest digits of an id that are shown


@dataclass(frozen=True)
class Definition:
    """A view as it is defined, with the column of its table that each feature is stored in.

    columns: the number of the column of each feature, in the order of view.features. The numbers of a view's columns
    are never used again, so they name the same values in every table of the view.
    """

    view: FeatureView
    columns: tuple[int, ...]

    @cached_property
    def rows_id(self) -> str:
        """The hash of what determines the rows, 64 hexadecimal digits."""
        features = sorted(zip(self.columns, self.view.features, strict=True), key=lambda pair: pair[0])
        return _hash(
            {
                "keys": [dtype.name for dtype in self.view.keys.values()],
                "columns": [[number, feature.dtype.name, feature.column] for number, feature in features],
                "timestamp": self.view.timestamp,
            }
        )

    @cached_property
    def id(self) -> str:
        """The hash of what determines the answers, 64 hexadecimal digits."""
        return _hash(
            {
                "rows": self.rows_id,
                "keys": list(self.view.keys),
                "features": [
                    [number, feature.name, feature.to_json()["default"]]
                    for number, feature in zip(self.columns, self.view.features, strict=True)
                ],
                "ttl_us": self.view.ttl_us,
            }
        )

    def column_of(self, feature: str) -> int:
        """Return the number of the column of a feature, by its name. Raises KeyError."""
        return self.columns[self.view.feature_index[feature]]

    def to_json(self) -> Json:
        return {"view": self.view.to_json(), "columns": list(self.columns)}

    @classmethod
    def from_json(cls, data: Json) -> Definition:
        return cls(FeatureView.from_json(data["view"]), tuple(data["columns"]))


def define(view: FeatureView, before: Definition | None, next_column: int) -> Definition:
    """Give each feature of a view its column.

    A feature that `before` has, under its name or under the one that it is renamed from, keeps its column if its type
    is the same. The others get new ones, from next_column on.
    """
    numbers = []
    for feature in view.features:
        column = None if before is None else _kept(before, feature)
        if column is None:
            column, next_column = next_column, next_column + 1
        numbers.append(column)
    return Definition(view, tuple(numbers))


def _kept(before: Definition, feature: Feature) -> int | None:
    index = before.view.feature_index.get(feature.name)
    if index is None or before.view.features[index].dtype != feature.dtype:
        return None
    return before.columns[index]


def widens(old: str, new: str) -> bool:
    """Whether each value of a type is a value of another one, so that models can take the new one for the old."""
    return new in WIDER.get(parse_dtype(old).name, ())


WIDER: Final = {
    "Bool": ("Int32", "Int64", "Float32", "Float64"),
    "Int32": ("Int64", "Float64"),
    "Float32": ("Float64",),
}


def shown(ids: Iterable[str]) -> dict[str, str]:
    """Return each id as it is shown: so many of its first digits as tell it from all others, and SHOWN at least."""
    known = sorted(set(ids))
    length = SHOWN
    while len({each[:length] for each in known}) < len(known):
        length += 1
    return {each: each[:length] for each in known}


def _hash(document: Json) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()
