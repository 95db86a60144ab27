"""What a call returns, the same for embedded use and over the wire."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas
    import pyarrow

Statuses = NDArray[np.uint8]


class Status(IntEnum):
    """How a value came to be. Only a PRESENT value was read from the store; others are the default, or null."""

    PRESENT = 0
    NULL = 1  # the row is there, the value is null
    NOT_FOUND = 2  # no row of that key
    STALE = 3  # the row's event time is older than the view's TTL


class Prediction:
    """The outputs of one model for the rows of one request.

    outputs: name -> array whose first axis is the rows; version: the model version that answered;
    statuses: view -> uint8 [rows] of `Status` (empty when the server was not asked for them).
    """

    __slots__ = ("model", "outputs", "statuses", "version")

    def __init__(self, model: str, version: int, outputs: dict[str, NDArray[Any]], statuses: dict[str, Statuses]):
        self.model = model
        self.version = version
        self.outputs = outputs
        self.statuses = statuses

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "model": self.model,
            "version": self.version,
            "outputs": {name: array.tolist() for name, array in self.outputs.items()},
            "statuses": {view: [Status(code).name for code in codes] for view, codes in self.statuses.items()},
        }

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in self.outputs.items())
        return f"Prediction({self.model!r}, version={self.version}, outputs: {shapes})"


class Features:
    """Columns of feature values for the rows of one request.

    feature_names: the references asked for, in order; values: one array a feature ([rows], or [rows, n] for a
    vector; str or None for strings); feature_statuses: uint8 [features, rows] of `Status`. A value that is not
    PRESENT is the feature's default; where it has none, NaN in float arrays, 0 in integer and bool arrays, None for
    strings.
    """

    __slots__ = ("_status_rows", "_values", "feature_names", "has_default")

    def __init__(
        self,
        feature_names: Sequence[str],
        values: Sequence[NDArray[Any]],
        feature_statuses: Sequence[Statuses] | NDArray[np.uint8],
        has_default: Sequence[bool] | None = None,
    ):
        self.feature_names = list(feature_names)
        self._values = values
        self._status_rows = feature_statuses
        self.has_default = has_default if has_default is not None else [False] * len(values)

    @property
    def feature_statuses(self) -> dict[str, Statuses]:
        """Feature reference -> uint8 [rows] of `Status`."""
        return {name: np.asarray(row) for name, row in zip(self.feature_names, self._status_rows, strict=True)}

    @property
    def statuses(self) -> dict[str, Statuses]:
        """View -> uint8 [rows]: PRESENT, NOT_FOUND or STALE."""
        by_view: dict[str, Statuses] = {}
        for name, row in self.feature_statuses.items():
            view = name.partition(":")[0]
            if view not in by_view:
                by_view[view] = np.where(row == Status.NULL, np.uint8(Status.PRESENT), row)
        return by_view

    def __len__(self) -> int:
        return len(self._values[0]) if self._values else 0

    def __getitem__(self, feature: str) -> NDArray[Any]:
        return self._values[self.feature_names.index(feature)]

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Feature reference -> array, as described above."""
        return dict(zip(self.feature_names, self._values, strict=True))

    def to_dict(self) -> dict[str, list[Any]]:
        """Feature reference -> plain Python values; None where there is neither a value nor a default."""
        columns: dict[str, list[Any]] = {}
        rows = zip(self.feature_names, self._values, self._status_rows, self.has_default, strict=True)
        for name, values, statuses, has_default in rows:
            plain = values.tolist()
            if not has_default:
                plain = [v if s == Status.PRESENT else None for v, s in zip(plain, np.asarray(statuses), strict=True)]
            columns[name] = plain
        return columns

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with one column a feature; null where there is neither a value nor a default."""
        import pandas

        return pandas.DataFrame(self.to_dict())

    def to_arrow(self) -> pyarrow.Table:
        """An Arrow table with one column a feature; null where there is neither a value nor a default."""
        import pyarrow

        return pyarrow.table(self.to_dict())

    def __repr__(self) -> str:
        return f"Features({len(self)} rows: {', '.join(self.feature_names)})"
