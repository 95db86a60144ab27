"""The results of calls, which are the same for the embedded engine and for clients of a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas
    import pyarrow

Statuses = NDArray[np.uint8]
Mask = NDArray[np.bool_]  # [rows], True where a value is missing

TIMESTAMP: Final = "Timestamp"  # int64 microseconds since 1970 UTC: the dtype alone does not tell it from Int64
# The types of arrays from a server that does not send types.
_TYPES_BY_DTYPE: Final = {
    "bool": "Bool",
    "int32": "Int32",
    "int64": "Int64",
    "float32": "Float32",
    "float64": "Float64",
    "object": "String",
}


class Status(IntEnum):
    """Where a value comes from. Only a PRESENT value was read from the store; others are the default, or null."""

    PRESENT = 0
    NULL = 1  # the row exists, its value is null
    NOT_FOUND = 2  # there is no row with that key
    STALE = 3  # the row's event time is older than the view's TTL


class RowCount(int):
    """The number of rows that a load or a push took; and, of all the rows it was given, what became of the others.

    The number itself is: of a load, the rows loaded; of a push, the rows given that were not older. given: all rows.
    older: rows that were dropped because a row of the same key has a later event time, in the store (push only) or
    among the rows given, or because the key was erased after the event (Engine.delete_entity). duplicate: rows whose
    key and event time were given again after them. loaded: the others.
    """

    given: int
    older: int
    duplicate: int

    def __new__(cls, rows: int, given: int, older: int, duplicate: int) -> Self:
        count = super().__new__(cls, rows)
        count.given, count.older, count.duplicate = given, older, duplicate
        return count

    def __reduce__(self) -> tuple[Any, ...]:  # for copies and pickles
        return type(self), (int(self), self.given, self.older, self.duplicate)

    @classmethod
    def pushed(cls, given: int, older: int, duplicate: int) -> Self:
        return cls(given - older, given, older, duplicate)

    @classmethod
    def total(cls, pushes: Iterable[RowCount]) -> Self:
        """Return the count of several pushes together."""
        given = older = duplicate = 0
        for push in pushes:
            given, older, duplicate = given + push.given, older + push.older, duplicate + push.duplicate
        return cls.pushed(given, older, duplicate)

    @property
    def loaded(self) -> int:
        return self.given - self.older - self.duplicate


class Prediction:
    """The outputs of one model for the rows of one request.

    outputs: name -> array, whose first axis is the rows; version: of the model that answered; statuses: lookup ("view"
    or "alias:view") -> uint8 [rows] of `Status`, empty if the request to a server did not ask for statuses. The outputs
    of a model that takes tensors have the shapes that the model gave them.
    """

    __slots__ = ("model", "outputs", "statuses", "version")

    def __init__(self, model: str, version: int, outputs: dict[str, NDArray[Any]], statuses: dict[str, Statuses]):
        self.model = model
        self.version = version
        self.outputs = outputs
        self.statuses = statuses

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain Python values, ready for JSON."""
        return {
            "model": self.model,
            "version": self.version,
            "outputs": {name: array.tolist() for name, array in self.outputs.items()},
            "statuses": {view: [Status(code).name for code in codes] for view, codes in self.statuses.items()},
        }

    def to_pandas(self) -> pandas.DataFrame:
        """Return the outputs as a DataFrame, with a row for each row of the request. Raises ImportError without pandas,
        and ValueError if the outputs of a model that takes tensors have no common rows.

        An output [rows] or [rows, 1] is a column with the output's name. An output [rows, n] is n columns:
        name_0, name_1, ... An output with more dimensions is an object column of arrays. Column types are those of
        `Features.to_pandas`.
        """
        pandas = import_extra("pandas", "to_pandas")
        _check_rows(self.outputs, "to_pandas")
        names: list[str] = []
        columns: list[Any] = []
        for name, array in self.outputs.items():
            parts = {f"{name}_{i}": array[:, i] for i in range(array.shape[1])} if array.ndim == 2 else {name: array}
            if array.shape[1:] == (1,):
                parts = {name: array[:, 0]}
            names += parts
            columns += [pandas_column(part) for part in parts.values()]
        frame = pandas.DataFrame(dict(enumerate(columns)))
        frame.columns = names  # set afterwards: if two outputs give the same name, both columns stay
        return frame

    def to_arrow(self) -> pyarrow.Table:
        """Return the outputs as an Arrow table, with a column for each output. Raises ImportError without pyarrow, and
        ValueError as `to_pandas` does.

        A column has the type of its array, such as float or int64. An output [rows, 1] is a column of single values, an
        output [rows, n] a column of fixed_size_list[n]. Numbers may share memory with `outputs`.
        """
        pyarrow = import_extra("pyarrow", "to_arrow")
        _check_rows(self.outputs, "to_arrow")
        arrays = [array[:, 0] if array.shape[1:] == (1,) else array for array in self.outputs.values()]
        return pyarrow.table([_arrow_column(array) for array in arrays], names=list(self.outputs))

    def __repr__(self) -> str:
        arrays = {name: np.atleast_1d(array) for name, array in self.outputs.items()}
        rows = len(next(iter(arrays.values()), ()))
        lines = [(name, f"{a.dtype}{list(a.shape[1:]) or ''}", _first_values(a)) for name, a in arrays.items()]
        notes = [f"{view} {note}" for view, codes in self.statuses.items() if (note := _status_counts(codes))]
        head = f"Prediction({self.model!r}, version={self.version}, {_count(rows, 'row')})"
        return "\n".join([head, *_aligned(lines), *([f"  statuses: {'; '.join(notes)}"] if notes else [])])


class Features:
    """The feature values for the rows of one request, by column.

    feature_names: the references of the request, in its order. values: an array for each feature: [rows], or [rows, n]
    for a vector; strings are object arrays of str or None. feature_statuses: uint8 [features, rows] of `Status`. Where
    a status is not PRESENT, the value is the feature's default; if the feature has no default, it is NaN in float
    arrays, 0 in integer and bool arrays, and None for strings. A Timestamp is int64 microseconds since 1970-01-01 00:00
    UTC. has_default: bool for each feature. types: the name of each feature's type.
    """

    __slots__ = ("_names", "_status_rows", "_types", "_values", "has_default")

    def __init__(
        self,
        feature_names: Sequence[str],
        values: Sequence[NDArray[Any]],
        feature_statuses: Sequence[Statuses] | NDArray[np.uint8],
        has_default: Sequence[bool] | None = None,
        types: Sequence[str] | None = None,
    ):
        # Every lookup makes such an object, so derive nothing here; the properties do it when they are read.
        self._names = feature_names
        self._values = values
        self._status_rows = feature_statuses
        self.has_default = has_default if has_default is not None else [False] * len(values)
        self._types = types

    @property
    def feature_names(self) -> list[str]:
        """The references of the request, in its order."""
        return list(self._names)

    @property
    def feature_statuses(self) -> dict[str, Statuses]:
        """Feature reference -> uint8 [rows] of `Status`."""
        return {name: np.asarray(row) for name, row in zip(self._names, self._status_rows, strict=True)}

    @property
    def feature_types(self) -> dict[str, str]:
        """Feature reference -> the name of its type, such as "Float32" or "Vector(8)".

        If the server did not send types, they are derived from the arrays; then a Timestamp is "Int64".
        """
        types = self._types if self._types is not None else [_type_of(values) for values in self._values]
        return dict(zip(self._names, types, strict=True))

    @property
    def statuses(self) -> dict[str, Statuses]:
        """Lookup ("view" or "alias:view") -> uint8 [rows]: PRESENT, NOT_FOUND or STALE."""
        by_view: dict[str, Statuses] = {}
        for name, row in self.feature_statuses.items():
            view = name.rpartition(":")[0]
            if view not in by_view:
                by_view[view] = np.where(row == Status.NULL, np.uint8(Status.PRESENT), row)
        return by_view

    def __len__(self) -> int:
        return len(self._values[0]) if self._values else 0

    def __getitem__(self, feature: str) -> NDArray[Any]:
        return self._values[self._names.index(feature)]

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Return feature reference -> array, as the class describes."""
        return dict(zip(self._names, self._values, strict=True))

    def to_dict(self) -> dict[str, list[Any]]:
        """Return feature reference -> plain Python values; None where there is neither a value nor a default."""
        columns: dict[str, list[Any]] = {}
        for name, values, missing, _ in self._columns():
            plain = values.tolist()
            if missing is not None:
                plain = [None if absent else value for value, absent in zip(plain, missing.tolist(), strict=True)]
            columns[name] = plain
        return columns

    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with a column for each feature; null where there is neither a value nor a default.

        A column's type depends only on the feature's type, and not on whether there are nulls, so code that works for
        one result works for the next, and integers next to a null stay exact. Int32, Int64 and Bool are pandas'
        nullable Int32, Int64 and boolean. String is string. Timestamp is datetime64[us, UTC]. Float32 and Float64 are
        float32 and float64, with NaN for null. Vector(n) is an object column of float32 arrays [n] or None, Vector(n,
        Float64) of float64 arrays. Raises ImportError without pandas.
        """
        pandas = import_extra("pandas", "to_pandas")
        columns = self._columns()
        return pandas.DataFrame({name: pandas_column(values, nulls, kind) for name, values, nulls, kind in columns})

    def to_arrow(self) -> pyarrow.Table:
        """Return an Arrow table with a column for each feature; null where there is neither a value nor a default.

        Types are those of the features: bool, int32, int64, float (32 bits), double, string, timestamp[us, tz=UTC], and
        fixed_size_list<float>[n] for Vector(n), of double for Vector(n, Float64). Numbers may share memory with the
        arrays of `to_numpy`. Raises ImportError without pyarrow.
        """
        pyarrow = import_extra("pyarrow", "to_arrow")
        columns = self._columns()
        return pyarrow.table({name: _arrow_column(values, nulls, kind) for name, values, nulls, kind in columns})

    def _columns(self) -> Iterable[tuple[str, NDArray[Any], Mask | None, str]]:
        """Return (name, values, missing, name of the type) of each feature.

        missing: a mask, True where there is neither a value nor a default; None if no value is missing.
        """
        rows = zip(self.feature_types.items(), self._values, self._status_rows, self.has_default, strict=True)
        for (name, type_name), values, statuses, has_default in rows:
            missing = None if has_default else np.asarray(statuses) != Status.PRESENT
            yield name, values, missing if missing is not None and missing.any() else None, type_name

    def __repr__(self) -> str:
        lines = []
        columns = zip(self._columns(), self._status_rows, strict=True)
        for (name, values, missing, type_name), statuses in islice(columns, COLUMNS_SHOWN):
            note = _status_counts(np.asarray(statuses))
            lines.append((name, type_name, _first_values(values, missing, type_name) + (f"  ({note})" if note else "")))
        left = len(self._names) - len(lines)
        more = [f"  … and {_count(left, 'more feature')}"] if left else []
        return "\n".join([f"Features({_count(len(self), 'row')})", *_aligned(lines), *more])


def _check_rows(outputs: dict[str, NDArray[Any]], method: str) -> None:
    """Raise ValueError unless all outputs have the same number of rows."""
    rows = {array.shape[:1] for array in outputs.values()}
    if len(rows) > 1 or () in rows:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        raise ValueError(f"{method}: the outputs have no common rows ({shapes}); read `outputs`")


def _type_of(values: NDArray[Any]) -> str:
    """Return the type name that fits an array."""
    if values.ndim > 1:
        return f"Vector({values.shape[1]}{', Float64' * (values.dtype == np.float64)})"
    return _TYPES_BY_DTYPE.get(values.dtype.name, values.dtype.name)


# Conversion of arrays to columns of pandas and Arrow


def import_extra(package: str, method: str) -> Any:
    """Import an optional package. Raises ImportError with the command that installs it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        extra = "arrow" if package == "pyarrow" else package
        raise ImportError(f"{method} needs {package}: pip install 'shorttail[{extra}]'") from None


def pandas_column(values: NDArray[Any], missing: Mask | None = None, type_name: str = "") -> Any:
    """Convert an array to a pandas array. Floats stay a NumPy array: a missing value is NaN already."""
    import pandas

    if values.ndim > 1:
        rows = list(values.copy())
        if missing is not None:
            rows = [None if absent else row for row, absent in zip(rows, missing.tolist(), strict=True)]
        return pandas.Series(rows, dtype=object)
    mask = np.zeros(len(values), np.bool_) if missing is None else missing
    if type_name == TIMESTAMP:
        times = values.astype("datetime64[us]")
        times[mask] = np.datetime64("NaT")
        return pandas.DatetimeIndex(times).tz_localize("UTC").array
    if values.dtype.kind in "iu":
        return pandas.arrays.IntegerArray(values, mask, copy=True)
    if values.dtype.kind == "b":
        return pandas.arrays.BooleanArray(values, mask, copy=True)
    return pandas.array(values, dtype="string") if values.dtype.kind in "OU" else values


def _arrow_column(values: NDArray[Any], missing: Mask | None = None, type_name: str = "") -> Any:
    """Convert an array to an Arrow array; an array [rows, n] to a fixed-size list array."""
    import pyarrow

    if values.ndim > 1:
        items = _arrow_column(values.reshape(-1, *values.shape[2:]))
        nulls = None if missing is None else pyarrow.array(missing)
        return pyarrow.FixedSizeListArray.from_arrays(items, values.shape[1], mask=nulls)
    kind = pyarrow.string() if values.dtype.kind in "OU" else pyarrow.from_numpy_dtype(values.dtype)
    column = pyarrow.array(values, kind, mask=missing)
    return column.cast(pyarrow.timestamp("us", "UTC")) if type_name == TIMESTAMP else column


# The text of a repr: the first values of each column, shortened

COLUMNS_SHOWN: Final = 20
ROWS_SHOWN: Final = 5
ITEMS_SHOWN: Final = 4  # of a vector
TEXT_CHARS: Final = 24  # of a string
VALUES_CHARS: Final = 64  # of the values of a column


def _first_values(values: NDArray[Any], missing: Mask | None = None, type_name: str = "") -> str:
    """Return the first values of a column as text: "20, None, 1.5, …"."""
    parts: list[str] = []
    for row in range(min(len(values), ROWS_SHOWN)):
        part = "None" if missing is not None and missing[row] else _text(values[row], type_name)
        if parts and sum(len(part) + 2 for part in parts) + len(part) > VALUES_CHARS:
            break
        parts.append(_shorten(part, VALUES_CHARS))
    return ", ".join([*parts, "…"] if len(parts) < len(values) else parts)


def _text(value: Any, type_name: str = "") -> str:
    if isinstance(value, np.ndarray):
        return f"[{', '.join([*map(_text, value[:ITEMS_SHOWN]), *(['…'] if len(value) > ITEMS_SHOWN else [])])}]"
    if type_name == TIMESTAMP:
        return str(np.datetime64(int(value), "us")).removesuffix(".000000")
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    return repr(_shorten(str(value), TEXT_CHARS)) if isinstance(value, str) else str(value)


def _shorten(text: str, chars: int) -> str:
    return text if len(text) <= chars else f"{text[: chars - 1]}…"


def _status_counts(codes: Statuses) -> str:
    """Count the rows of each status except PRESENT: "1 NULL, 2 NOT_FOUND"; "" if all are PRESENT."""
    counts = [(status.name, np.count_nonzero(codes == status)) for status in Status if status != Status.PRESENT]
    return ", ".join(f"{count:,} {name}" for name, count in counts if count)


def _aligned(lines: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max((len(line[i]) for line in lines), default=0) for i in (0, 1)]
    return [f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {values}" for name, kind, values in lines]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
