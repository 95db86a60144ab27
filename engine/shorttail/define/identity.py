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

from shorttail.define.dtypes import DType
from shorttail.define.names import quoted, suggestion
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import NotFound

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
    and what it is read from are the same. The others get new ones, from next_column on. Raises NotFound for a feature
    that is renamed from one that there is not.
    """
    numbers = []
    for feature in view.features:
        old = None if before is None else predecessor(before, feature)
        if old is not None and before is not None and same_rows(old, feature, view.source is not None):
            numbers.append(before.column_of(old.name))
        else:
            numbers.append(next_column)
            next_column += 1
    return Definition(view, tuple(numbers))


def predecessor(before: Definition, feature: Feature) -> Feature | None:
    """Return the feature of the definition before that a feature continues; None for a new one. Raises NotFound."""
    view = before.view
    for name in (feature.name, feature.renamed_from):
        if name in view.feature_index:
            return view.features[view.feature_index[name]]
    if feature.renamed_from is not None:
        known = suggestion(feature.renamed_from, view.feature_index, "features")
        raise NotFound(
            f"feature view '{view.name}': feature '{feature.name}' is renamed from {quoted(feature.renamed_from)},"
            f" which is not in the store{known}"
        )
    return None


def same_rows(old: Feature, new: Feature, is_loaded: bool) -> bool:
    """Whether two features can share a column of a table. is_loaded: the view has a source, which gives it values."""
    same_source = old.column == new.column or old.source_column == new.source_column
    return old.dtype == new.dtype and (same_source or not is_loaded)


def widens(old: DType, new: DType) -> bool:
    """Whether each value of a type is a value of another one, so that models can take the new one for the old."""
    return new.name in WIDER.get(old.name, ())


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
