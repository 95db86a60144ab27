"""Converts rows in memory (a dict of columns, pandas, polars or pyarrow) to the form the store takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.define.dtypes import DType, Timestamp
from shorttail.define.names import decomposed, quoted
from shorttail.define.values import Refused, as_column
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.sources.source import EVENT_TIME
from shorttail.store import ColumnBatch

Nulls = NDArray[np.bool_]


@dataclass(slots=True)
class PushedColumn:
    """The values of a column, and nulls (None if no value is null). is_scalar: a single value, to be repeated."""

    name: str
    values: NDArray[Any]
    nulls: Nulls | None
    is_scalar: bool


def time_column(view: FeatureView) -> str | None:
    """Return the column that may hold event times: the view's timestamp column, else `event_time`.

    None if the view has no timestamp column, and a feature is called `event_time`.
    """
    return view.timestamp or (None if EVENT_TIME in view.feature_index else EVENT_TIME)


def column_batch(view: FeatureView, rows: Any) -> ColumnBatch:
    """Convert the rows of a push: every key and feature of the view, and event times if the rows have them.

    Event times come from the view's timestamp column, else from `event_time`; without either column they are now. None
    and NaN are null. A scalar beside longer columns is repeated. Raises InvalidArgument naming the view and column.
    """
    given = as_columns(view, rows)
    timestamp = time_column(view)
    needed = [*view.keys, *(feature.name for feature in view.features)]
    known = needed if timestamp is None or timestamp in needed else [*needed, timestamp]
    for name in given:
        if name not in known:
            named = f"{quoted(name)}{decomposed(name, known)}"
            raise InvalidArgument(f"view '{view.name}' has no column {named}; columns: {', '.join(known)}")
    for name in needed:
        if name not in given:
            raise InvalidArgument(f"view '{view.name}': column '{name}' is missing from the rows; they need: {needed}")
    columns = _key_columns(view, given)
    for feature in view.features:
        columns.append(read_column(f"view '{view.name}': column", feature.name, feature.dtype, given[feature.name]))
    if timestamp is not None and timestamp in given:
        columns.append(_times(view, timestamp, given[timestamp]))
    if not isinstance(rows, Mapping):
        check_rows(view, columns)
    count = align(view, columns)
    keys, features = columns[: len(view.keys)], columns[len(view.keys) : len(needed)]
    return ColumnBatch(
        keys=[column.values for column in keys],
        event_time_us=columns[-1].values if timestamp in given else np.full(count, time.time_ns() // 1000, np.int64),
        features=[(column.values, column.nulls) for column in features],
    )


def key_arrays(view: FeatureView, keys: Mapping[str, Any]) -> list[NDArray[Any]]:
    """Return an array [n] for each key column of the view: int64, or objects (str). Raises InvalidArgument."""
    given = as_columns(view, keys)
    for name in given:
        if name not in view.keys:
            raise InvalidArgument(f"view '{view.name}' has no key {quoted(name)}; keys: {', '.join(view.keys)}")
    columns = _key_columns(view, given)
    align(view, columns)
    return [column.values for column in columns]


def _key_columns(view: FeatureView, given: Mapping[str, Any]) -> list[PushedColumn]:
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


def _times(view: FeatureView, name: str, value: Any) -> PushedColumn:
    column = read_column(f"view '{view.name}': column", name, Timestamp, value)
    if column.nulls is not None:
        bad = int(np.argmax(column.nulls))
        raise InvalidArgument(f"view '{view.name}': column '{name}' has no time at row {bad}; every row needs one")
    return column


def check_rows(view: FeatureView, columns: Sequence[PushedColumn]) -> None:
    """Refuse a column of a table that is a single vector: a table has one value per row. Raises InvalidArgument."""
    for column in columns:
        if column.is_scalar:
            raise InvalidArgument(f"view '{view.name}': column '{column.name}' has numbers where vectors are expected")


def align(view: FeatureView, columns: Sequence[PushedColumn]) -> int:
    """Repeat the scalars, so that all columns have the same length, and return that length. Raises InvalidArgument."""
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
    """Return {name: column} of rows, in the forms that `as_column` takes. Raises InvalidArgument."""
    if isinstance(rows, Mapping):
        return by_name(view, ((str(name), column) for name, column in rows.items()))
    if hasattr(rows, "column_names"):  # pyarrow.Table, RecordBatch
        return by_name(view, zip(rows.column_names, rows.columns, strict=True))
    if hasattr(rows, "get_columns"):  # polars
        return by_name(view, ((column.name, column) for column in rows.get_columns()))
    if hasattr(rows, "columns") and hasattr(rows, "iloc"):  # pandas
        return by_name(view, ((str(name), rows.iloc[:, i]) for i, name in enumerate(rows.columns)))
    raise InvalidArgument(
        f"view '{view.name}': rows of type {type(rows).__name__}; give a dict of columns, pandas, polars or pyarrow"
    )


def by_name(view: FeatureView, columns: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return {name: column}. Raises InvalidArgument if a name occurs twice."""
    found: dict[str, Any] = {}
    for name, column in columns:
        if name in found:
            raise InvalidArgument(f"view '{view.name}': column '{name}' is there twice")
        found[name] = column
    return found


def read_column(what: str, name: str, dtype: DType, value: Any) -> PushedColumn:
    """Convert a column. what: names it in errors, such as "view 'x': column". Raises InvalidArgument."""
    try:
        return PushedColumn(name, *as_column(dtype, value))
    except Refused as error:
        raise error.error(f"{what} '{name}'", dtype) from None
