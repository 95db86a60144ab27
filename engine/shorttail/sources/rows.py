"""Rows handed over in memory (a dict of columns, pandas, polars or pyarrow) into what the store takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.define.dtypes import Bool, DType, String, Timestamp
from shorttail.define.times import microseconds
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.store import ColumnBatch

Nulls = NDArray[np.bool_]

FLOAT32_MAX = float(np.finfo(np.float32).max)
INT32_LIMIT = 2**31
EVENT_TIME = "event_time"  # the column of event times where a view names none


@dataclass(slots=True)
class Column:
    """Values of one column, and which are null (None: none is). A scalar is one value, to be repeated."""

    name: str
    values: NDArray[Any]
    nulls: Nulls | None
    is_scalar: bool


def time_column(view: FeatureView) -> str | None:
    """The column that holds event times, if the rows have it; None: a feature has taken its name."""
    return view.timestamp or (None if EVENT_TIME in view.feature_index else EVENT_TIME)


def column_batch(view: FeatureView, rows: Any) -> ColumnBatch:
    """The rows of one push: every key and feature of the view, and event times if the rows have them.

    Event times come from the view's timestamp column, else from `event_time`; without either they are now. None and
    NaN are null. A scalar beside columns is repeated. Raises InvalidArgument naming the view and column.
    """
    given = as_columns(view, rows)
    timestamp = time_column(view)
    needed = [*view.keys, *(feature.name for feature in view.features)]
    known = needed if timestamp is None or timestamp in needed else [*needed, timestamp]
    for name in given:
        if name not in known:
            raise InvalidArgument(f"view '{view.name}' has no column '{name}'; columns: {', '.join(known)}")
    for name in needed:
        if name not in given:
            raise InvalidArgument(f"view '{view.name}': column '{name}' is missing from the rows; they need: {needed}")
    columns = _key_columns(view, given)
    for feature in view.features:
        columns.append(read_column(f"view '{view.name}': column", feature.name, feature.dtype, given[feature.name]))
    if timestamp is not None and timestamp in given:
        columns.append(_times(view, timestamp, given[timestamp]))
    count = align(view, columns)
    keys, features = columns[: len(view.keys)], columns[len(view.keys) : len(needed)]
    return ColumnBatch(
        keys=[column.values for column in keys],
        event_time_us=columns[-1].values if timestamp in given else np.full(count, time.time_ns() // 1000, np.int64),
        features=[(column.values, column.nulls) for column in features],
    )


def key_arrays(view: FeatureView, keys: Mapping[str, Any]) -> list[NDArray[Any]]:
    """One array for each key column of the view (int64, or object of str). Raises InvalidArgument."""
    given = as_columns(view, keys)
    for name in given:
        if name not in view.keys:
            raise InvalidArgument(f"view '{view.name}' has no key '{name}'; keys: {', '.join(view.keys)}")
    columns = _key_columns(view, given)
    align(view, columns)
    return [column.values for column in columns]


def _key_columns(view: FeatureView, given: Mapping[str, Any]) -> list[Column]:
    columns = []
    for name, dtype in view.keys.items():
        if name not in given:
            raise InvalidArgument(f"view '{view.name}': key column '{name}' is missing; keys: {', '.join(view.keys)}")
        column = read_column(f"view '{view.name}': key", name, dtype, given[name])
        if column.nulls is not None:
            raise InvalidArgument(
                f"view '{view.name}': key '{name}' is null at row {int(np.argmax(column.nulls))}; a key needs a value"
            )
        columns.append(column)
    return columns


def _times(view: FeatureView, name: str, value: Any) -> Column:
    column = read_column(f"view '{view.name}': column", name, Timestamp, value)
    if column.nulls is not None:
        bad = int(np.argmax(column.nulls))
        raise InvalidArgument(f"view '{view.name}': column '{name}' has no time at row {bad}; every row needs one")
    return column


def align(view: FeatureView, columns: Sequence[Column]) -> int:
    """Repeat the scalars, so that all columns have the length that is returned. Raises InvalidArgument."""
    count = next((len(column.values) for column in columns if not column.is_scalar), 1)
    for column in columns:
        if column.is_scalar and count != 1:
            column.values = np.repeat(column.values, count, axis=0)
            column.nulls = None if column.nulls is None else np.repeat(column.nulls, count)
        elif len(column.values) != count:
            raise InvalidArgument(
                f"view '{view.name}': column '{column.name}' has {len(column.values)} values where others have {count}"
            )
    if count == 0:
        raise InvalidArgument(f"view '{view.name}': no rows; send at least one")
    return count


def as_columns(view: FeatureView, rows: Any) -> Mapping[str, Any]:
    if isinstance(rows, Mapping):
        return rows
    if hasattr(rows, "column_names"):  # pyarrow.Table, RecordBatch
        return {name: arrow_values(rows.column(name)) for name in rows.column_names}
    if hasattr(rows, "to_arrow"):  # polars
        return as_columns(view, rows.to_arrow())
    if hasattr(rows, "columns") and hasattr(rows, "iloc"):  # pandas
        return {str(name): rows[name].to_numpy() for name in rows.columns}
    raise InvalidArgument(
        f"view '{view.name}': rows of type {type(rows).__name__}; give a dict of columns, pandas, polars or pyarrow"
    )


def arrow_values(column: Any) -> Any:
    # Nulls in integer columns survive only as Python values; a column without nulls goes the short way.
    nested = hasattr(column.type, "value_type")
    return column.to_pylist() if column.null_count or nested else column.to_numpy()


def is_scalar(value: Any) -> bool:
    """Whether this is one value of a column that is not of vectors."""
    return isinstance(value, str | bytes | int | float | datetime | np.generic | None) or np.ndim(value) == 0


def read_column(what: str, name: str, dtype: DType, value: Any) -> Column:
    """One column. what: "view 'x': column", for messages. Raises InvalidArgument."""
    where = f"{what} '{name}'"
    if dtype.is_vector:
        values, nulls, one = vectors(where, dtype, value)
        return Column(name, values, nulls, one)
    if isinstance(value, list | tuple):  # np.ndim of a ragged one raises
        return Column(name, *typed(where, dtype, value), False)
    if (single := plain(dtype, value)) is not None:
        return Column(name, single, None, True)
    if is_scalar(value):
        return Column(name, *typed(where, dtype, [value[()] if isinstance(value, np.ndarray) else value]), True)
    return Column(name, *typed(where, dtype, value), False)


def plain(dtype: DType, value: Any) -> NDArray[Any] | None:
    """[value], if it is of the very type, as in most pushes of one row; None: it has to be looked at more closely."""
    kind = type(value)
    if dtype.is_float:
        is_exact = kind is float and abs(value) <= FLOAT32_MAX  # neither NaN nor infinite
    elif dtype.is_integer:
        is_exact = kind is int and -INT32_LIMIT <= value < INT32_LIMIT
    else:
        is_exact = kind is (str if dtype is String else bool)
    return np.array([value], object if dtype is String else dtype.numpy) if is_exact else None


def typed(where: str, dtype: DType, values: Any) -> tuple[NDArray[Any], Nulls | None]:
    """Values as the array the store takes for that type, and which of them are null (None: none is)."""
    given = values if isinstance(values, list | tuple) else None
    if given is not None and dtype is String:
        return from_objects(where, dtype, given)  # np.asarray would make strings of numbers
    try:
        array = np.asarray(values)
    except ValueError:  # arrays of several lengths where values should be
        return from_objects(where, dtype, list(values))
    if array.ndim != 1:
        raise InvalidArgument(f"{where} takes one {dtype} a row; got an array of shape {array.shape}")
    if len(array) == 0 or array.dtype.kind not in "biufM":
        return from_objects(where, dtype, array.tolist() if given is None else given)
    if given is not None and dtype.is_integer and array.dtype.kind == "f" and not (abs(array) < 2**53).all():
        return from_objects(where, dtype, given)  # as doubles, large integers have been rounded
    nulls: Nulls | None = None
    if dtype is Timestamp and array.dtype.kind == "M":
        missing = np.isnat(array)
        microseconds_since = np.where(missing, np.int64(0), array.astype("datetime64[us]").view(np.int64))
        return microseconds_since, missing if missing.any() else None
    if array.dtype.kind == "f" and (missing := np.isnan(array)).any():
        nulls = missing
        array = np.where(missing, 0, array)
    if dtype is String or array.dtype.kind == "M" or (dtype is Bool) != (array.dtype.kind == "b"):
        raise InvalidArgument(f"{where} takes {dtype}; got an array of {array.dtype}")
    with np.errstate(all="ignore"):  # what does not fit is found by comparing
        converted = array.astype(dtype.numpy)
    if dtype.is_integer and not np.array_equal(converted, array):
        bad = int(np.argmax(converted != array))
        raise InvalidArgument(f"{where} takes {dtype}; got {array[bad]} at row {bad}")
    return converted, nulls


def is_null(value: Any) -> bool:
    """None, NaN, and what pandas has instead."""
    is_nan = isinstance(value, float | np.floating) and bool(value != value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def from_objects(where: str, dtype: DType, values: Sequence[Any]) -> tuple[NDArray[Any], Nulls | None]:
    """Python values, one by one: the way for strings and for columns with None."""
    nulls = np.fromiter(map(is_null, values), np.bool_, len(values))
    out = np.full(len(values), None, object) if dtype is String else np.zeros(len(values), dtype.numpy)
    for row, value in enumerate(values):
        if nulls[row]:
            continue
        if dtype is Timestamp and isinstance(value, datetime):
            value = microseconds(value)
        if not fits(dtype, value):
            raise InvalidArgument(f"{where} takes {dtype}; got {shown(value)} ({type(value).__name__}) at row {row}")
        try:
            with np.errstate(over="ignore"):  # a double that is infinite as a float
                out[row] = int(value) if dtype.is_integer else value
        except OverflowError:
            raise InvalidArgument(f"{where} takes {dtype}; {shown(value)} at row {row} does not fit") from None
    return out, nulls if nulls.any() else None


def fits(dtype: DType, value: Any) -> bool:
    if dtype is String:
        return isinstance(value, str)
    if dtype is Bool:
        return isinstance(value, bool | np.bool_)
    if isinstance(value, int | np.integer):
        return not isinstance(value, bool)
    is_number = isinstance(value, float | np.floating)
    return is_number and (dtype.is_float or bool(np.isfinite(value) and value == int(value)))


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def vectors(where: str, dtype: DType, values: Any) -> tuple[NDArray[np.float32], Nulls | None, bool]:
    """Vectors as a matrix, which of them are null, and whether it was one vector alone."""
    wrong = InvalidArgument(f"{where} takes {dtype}; got values that are not {dtype.width} numbers each")
    if values is None:
        return np.zeros((1, dtype.width), np.float32), np.ones(1, np.bool_), True
    nulls: Nulls | None = None
    if not isinstance(values, np.ndarray) or values.dtype == object:
        if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
            raise wrong
        rows = list(values)
        missing = np.array([row is None for row in rows], np.bool_)
        # One vector may hold nulls too; a column of vectors has no numbers.
        if missing.any() and not any(isinstance(row, int | float) for row in rows):
            nulls = missing
            rows = [np.zeros(dtype.width) if row is None else row for row in rows]
        values = rows
    try:
        if np.asarray(values).dtype.kind not in "biufO":
            raise wrong
        with np.errstate(over="ignore"):
            array = np.asarray(values, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    one = array.ndim == 1 and dtype.width == len(array)
    if one:
        array = array.reshape(1, -1)
    if array.ndim != 2 or array.shape[1] != dtype.width:
        raise InvalidArgument(f"{where} takes {dtype}; got values of shape {array.shape}")
    return np.ascontiguousarray(array), nulls, one
