"""Rows handed over in memory (a dict of columns, pandas, polars or pyarrow) into what the store takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.definitions import FeatureView, microseconds
from shorttail.dtypes import Bool, DType, String, Timestamp
from shorttail.errors import InvalidArgument
from shorttail.store import ColumnBatch

Nulls = NDArray[np.bool_]


def column_batch(view: FeatureView, rows: Any) -> ColumnBatch:
    """The rows of one push: every key and feature of the view, and event times if the rows have them.

    Event times come from the view's timestamp column, else from `event_time`; without either they are now. None and
    NaN are null. Raises InvalidArgument naming the view and column.
    """
    columns = as_columns(view, rows)
    timestamp = view.timestamp or "event_time"
    known = [*view.keys, *(feature.name for feature in view.features), timestamp]
    for name in columns:
        if name not in known:
            raise InvalidArgument(f"view '{view.name}' has no column '{name}'; columns: {', '.join(known)}")
    for name in known[:-1]:
        if name not in columns:
            raise InvalidArgument(
                f"view '{view.name}': column '{name}' is missing from the rows; they need: {known[:-1]}"
            )
    keys = key_arrays(view, {name: columns[name] for name in view.keys})
    count = len(keys[0])
    features = []
    for feature in view.features:
        values, nulls = typed(f"view '{view.name}': column '{feature.name}'", feature.dtype, columns[feature.name])
        check_length(view, feature.name, len(values), count)
        features.append((values, nulls))
    if timestamp in columns:
        times = event_times(f"view '{view.name}': column '{timestamp}'", columns[timestamp])
        check_length(view, timestamp, len(times), count)
    else:
        times = np.full(count, time.time_ns() // 1000, np.int64)
    return ColumnBatch(keys=keys, event_time_us=times, features=features)


def key_arrays(view: FeatureView, keys: Mapping[str, Any]) -> list[NDArray[Any]]:
    """One array for each key column of the view (int64, or object of str). Raises InvalidArgument."""
    for name in keys:
        if name not in view.keys:
            raise InvalidArgument(f"view '{view.name}' has no key '{name}'; keys: {', '.join(view.keys)}")
    arrays: list[NDArray[Any]] = []
    for name, dtype in view.keys.items():
        if name not in keys:
            raise InvalidArgument(f"view '{view.name}': key column '{name}' is missing; keys: {', '.join(view.keys)}")
        values, nulls = typed(f"view '{view.name}': key '{name}'", dtype, keys[name])
        if nulls is not None:
            raise InvalidArgument(
                f"view '{view.name}': key '{name}' is null at row {int(np.argmax(nulls))}; a key needs a value"
            )
        arrays.append(values)
        check_length(view, name, len(values), len(arrays[0]))
    if len(arrays[0]) == 0:
        raise InvalidArgument(f"view '{view.name}': no rows; send at least one")
    return arrays


def check_length(view: FeatureView, name: str, length: int, rows: int) -> None:
    if length != rows:
        raise InvalidArgument(f"view '{view.name}': column '{name}' has {length} values where others have {rows}")


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


def typed(where: str, dtype: DType, values: Any) -> tuple[NDArray[Any], Nulls | None]:
    """Values as the array the store takes for that type, and which of them are null (None: none is)."""
    if dtype.is_vector:
        return vectors(where, dtype, values)
    if isinstance(values, str | int | float | bool | datetime | None):
        values = [values]
    array = np.asarray(values)
    if array.ndim == 0:
        array = array.reshape(1)
    if array.ndim != 1:
        raise InvalidArgument(f"{where} takes one {dtype} a row; got an array of shape {array.shape}")
    if len(array) == 0 or array.dtype.kind not in "biufM":
        return from_objects(where, dtype, array.tolist())
    if dtype is Timestamp:
        return event_times(where, array), None
    nulls: Nulls | None = None
    if array.dtype.kind == "f" and (missing := np.isnan(array)).any():
        nulls = missing
        array = np.where(missing, 0, array)
    if dtype is String or array.dtype.kind == "M" or (dtype is Bool) != (array.dtype.kind == "b"):
        raise InvalidArgument(f"{where} takes {dtype}; got an array of {array.dtype}")
    converted = array.astype(dtype.numpy)
    if dtype.is_integer and not np.array_equal(converted, array):
        bad = int(np.argmax(converted != array))
        raise InvalidArgument(f"{where} takes {dtype}; got {array[bad]} at row {bad}")
    return converted, nulls


def from_objects(where: str, dtype: DType, values: Sequence[Any]) -> tuple[NDArray[Any], Nulls | None]:
    """Python values, one by one: the way for strings and for columns with None."""
    nulls = np.array([value is None or value != value for value in values], np.bool_)
    out = np.full(len(values), None, object) if dtype is String else np.zeros(len(values), dtype.numpy)
    for row, value in enumerate(values):
        if nulls[row]:
            continue
        if dtype is Timestamp and isinstance(value, datetime):
            value = microseconds(value)
        if dtype is String:
            fits = isinstance(value, str)
        elif dtype is Bool:
            fits = isinstance(value, bool)
        else:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            fits = fits and (dtype.is_float or value == int(value))
        if not fits:
            raise InvalidArgument(f"{where} takes {dtype}; got {value!r} ({type(value).__name__}) at row {row}")
        try:
            out[row] = value
        except OverflowError:
            raise InvalidArgument(f"{where} takes {dtype}; {value!r} at row {row} does not fit") from None
    return out, nulls if nulls.any() else None


def vectors(where: str, dtype: DType, values: Any) -> tuple[NDArray[np.float32], Nulls | None]:
    nulls: Nulls | None = None
    if not isinstance(values, np.ndarray) or values.dtype == object:
        rows = list(values)
        missing = np.array([row is None for row in rows], np.bool_)
        if missing.any():
            nulls = missing
            rows = [np.zeros(dtype.width) if row is None else row for row in rows]
        values = rows
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{where} takes {dtype}; got values that are not {dtype.width} numbers each") from None
    if array.ndim == 1 and dtype.width == len(array):
        array = array.reshape(1, -1)
    if array.ndim != 2 or array.shape[1] != dtype.width:
        raise InvalidArgument(f"{where} takes {dtype}; got values of shape {array.shape}")
    return np.ascontiguousarray(array), nulls


def event_times(where: str, values: Any) -> NDArray[np.int64]:
    """Event times in microseconds since 1970 UTC, from datetimes, datetime64 or integers of microseconds."""
    if isinstance(values, int | datetime):
        values = [values]
    array = np.asarray(values)
    if array.dtype.kind == "M":
        if np.isnat(array).any():
            raise InvalidArgument(f"{where} has no time at row {int(np.argmax(np.isnat(array)))}; every row needs one")
        return array.astype("datetime64[us]").view(np.int64)
    if array.dtype.kind == "i":
        return array.astype(np.int64)
    times, nulls = from_objects(where, Timestamp, array.tolist())
    if nulls is not None:
        raise InvalidArgument(f"{where} has no time at row {int(np.argmax(nulls))}; every row needs one")
    return times
