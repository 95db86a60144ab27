"""Converts rows in memory (a dict of columns, pandas, polars or pyarrow) to the form the store takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.define.dtypes import DType, Timestamp
from shorttail.define.entities import Entity
from shorttail.define.event_times import ImpossibleTime, check_event_times
from shorttail.define.names import decomposed, quoted, suggestion
from shorttail.define.values import Refused, as_column
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import InvalidArgument
from shorttail.sources.source import EVENT_TIME
from shorttail.store import ColumnBatch
from shorttail.store.table import UNTIMED

Nulls = NDArray[np.bool_]

# The end of the error for a feature that a push does not give.
PUSH_PARTIAL: Final = ", or push with partial=True (--partial), which keeps what is stored"


@dataclass(slots=True)
class PushedColumn:
    """The values of a column, and nulls (None if no value is null). is_scalar: a single value, to be repeated."""

    name: str
    values: NDArray[Any]
    nulls: Nulls | None
    is_scalar: bool


def time_column(view: FeatureView) -> str | None:
    """Return the column that may hold event times: the view's timestamp column, else `event_time`.

    None if the view has no timestamp column, and a feature is read from `event_time`.
    """
    return view.timestamp or (None if EVENT_TIME in view.source_columns else EVENT_TIME)


def column_batch(
    view: FeatureView, rows: Any, max_clock_skew_us: int, may_be_empty: bool = False, partial: bool = False
) -> ColumnBatch:
    """Convert the rows of a push: every key and feature of the view, and event times if the rows have them.

    A feature comes from its source column. Event times come from the view's timestamp column, else from `event_time`;
    without either column the store makes them. Other columns are ignored. None and NaN are null. A scalar beside longer
    columns is repeated. max_clock_skew_us: how far event times may be ahead of the clock. may_be_empty: take no rows at
    all, as a load does. partial: take the keys and some features, and no other columns, among which a wrong name would
    hide. Raises InvalidArgument naming the view and column.
    """
    given = as_columns(view, rows)
    timestamp = time_column(view)
    needed = [*view.keys, *view.source_columns]
    known = needed if timestamp is None or timestamp in needed else [*needed, timestamp]
    absent = [name for name in known if name not in given]
    for name in given if absent else ():
        if name not in known and (hint := _mistaken(view, name, absent)):
            raise InvalidArgument(f"view '{view.name}' has no column {quoted(name)}; {hint}")
    features = view.features
    if partial:
        check_partial(view, given)
        features = [feature for feature in features if feature.source_column in given]
    for name in () if partial else needed:
        if name not in given:
            hint = "" if may_be_empty or name in view.keys else PUSH_PARTIAL
            raise InvalidArgument(
                f"view '{view.name}': column '{name}' is missing from the rows; they need: {needed}{hint}"
            )
    columns = _key_columns(view, given)
    for feature in features:
        name = feature.source_column
        columns.append(read_column(f"view '{view.name}': column", name, feature.dtype, given[name]))
    if timestamp is not None and timestamp in given:
        columns.append(_times(view, timestamp, given[timestamp], max_clock_skew_us))
    if not isinstance(rows, Mapping):
        check_rows(view, columns)
    count = align(view, columns)
    if not count and not may_be_empty:
        raise InvalidArgument(f"view '{view.name}': no rows; send at least one")
    n_keys = len(view.keys)
    return ColumnBatch(
        keys=[column.values for column in columns[:n_keys]],
        event_time_us=columns[-1].values if timestamp in given else np.full(count, UNTIMED, np.int64),
        features=[(column.values, column.nulls) for column in columns[n_keys : n_keys + len(features)]],
        given=None if may_be_empty else names_of(features),
    )


def names_of(features: Sequence[Feature]) -> tuple[str, ...]:
    """Return the names of features, as ColumnBatch.given.

    A push names them even if they are all of the view: another definition may be in force when it is committed.
    """
    return tuple(feature.name for feature in features)


def check_partial(view: FeatureView, columns: Iterable[str], origin: str = "") -> None:
    """Raise InvalidArgument unless the columns of partial rows are those of the view, with a feature among them.

    Whole rows may have other columns: a wrong name then leaves a feature out, which is an error. Partial rows may leave
    features out. origin: the start of the message, such as a file.
    """
    columns = list(columns)
    known = dict.fromkeys([*view.keys, *view.source_columns])
    if (timestamp := time_column(view)) is not None:
        known[timestamp] = None
    for name in columns:
        if name not in known:
            raise InvalidArgument(
                f"{origin}view '{view.name}' has no column {quoted(name)}, and a partial push takes no others"
                f"{suggestion(name, known, 'columns')}"
            )
    if not any(name in view.source_columns for name in columns):
        raise InvalidArgument(
            f"{origin}view '{view.name}': the rows have no feature; "
            f"give at least one of: {', '.join(dict.fromkeys(view.source_columns))}"
        )


def _mistaken(view: FeatureView, name: str, absent: Sequence[str]) -> str:
    """Return which absent column a given one that the view does not take was meant to be, as a hint; "" if none."""
    if name in view.feature_index:
        column = view.features[view.feature_index[name]].source_column
        return f"feature '{name}' is read from column '{column}'" if column in absent else ""
    if len(name) > LIMITS.name_bytes:
        return ""  # a stranger's name of megabytes is not compared
    for other in absent:
        if other.casefold() == name.casefold():
            return f"there is '{other}', and case matters"
    return decomposed(name, absent).removeprefix("; ")


def key_arrays(owner: FeatureView | Entity, keys: Mapping[str, Any]) -> list[NDArray[Any]]:
    """Return an array [n] for each key column of a view or an entity: int64, or objects (str).

    Raises InvalidArgument.
    """
    given = as_columns(owner, keys)
    for name in given:
        if name not in owner.keys:
            known = ", ".join(owner.keys) or "none"
            raise InvalidArgument(f"{_shown(owner)} has no key {quoted(name)}; keys: {known}")
    columns = _key_columns(owner, given)
    if not align(owner, columns):
        raise InvalidArgument(f"{_shown(owner)}: no rows; send at least one")
    return [column.values for column in columns]


def _shown(owner: FeatureView | Entity) -> str:
    return f"{'entity' if isinstance(owner, Entity) else 'view'} '{owner.name}'"


def _key_columns(owner: FeatureView | Entity, given: Mapping[str, Any]) -> list[PushedColumn]:
    columns = []
    for name, dtype in owner.keys.items():
        if name not in given:
            raise InvalidArgument(f"{_shown(owner)}: key column '{name}' is missing; keys: {', '.join(owner.keys)}")
        column = read_column(f"{_shown(owner)}: key", name, dtype, given[name])
        if column.nulls is not None:
            raise InvalidArgument(
                f"{_shown(owner)}: key '{name}' is null at row {int(np.argmax(column.nulls))}; a key needs a value"
            )
        columns.append(column)
    return columns


def _times(view: FeatureView, name: str, value: Any, max_clock_skew_us: int) -> PushedColumn:
    column = read_column(f"view '{view.name}': column", name, Timestamp, value)
    if column.nulls is not None:
        bad = int(np.argmax(column.nulls))
        raise InvalidArgument(f"view '{view.name}': column '{name}' has no time at row {bad}; every row needs one")
    try:
        check_event_times(column.values, value, max_clock_skew_us)
    except ImpossibleTime as error:
        raise InvalidArgument(f"view '{view.name}': column '{name}' at row {error.row}: {error}") from None
    return column


def check_rows(view: FeatureView, columns: Sequence[PushedColumn]) -> None:
    """Refuse a column of a table that is a single vector: a table has one value per row. Raises InvalidArgument."""
    for column in columns:
        if column.is_scalar:
            raise InvalidArgument(f"view '{view.name}': column '{column.name}' has numbers where vectors are expected")


def align(owner: FeatureView | Entity, columns: Sequence[PushedColumn]) -> int:
    """Repeat the scalars, so that all columns have the same length, and return that length. Raises InvalidArgument."""
    count = next((len(column.values) for column in columns if not column.is_scalar), 1)
    for column in columns:
        if column.is_scalar and count != 1:
            column.values = np.repeat(column.values, count, axis=0)
            column.nulls = None if column.nulls is None else np.repeat(column.nulls, count)
        elif len(column.values) != count:
            raise InvalidArgument(
                f"{_shown(owner)}: column '{column.name}' has {len(column.values)} values where others have {count}"
            )
    return count


def as_columns(owner: FeatureView | Entity, rows: Any) -> Mapping[str, Any]:
    """Return {name: column} of rows, in the forms that `as_column` takes. Raises InvalidArgument."""
    if isinstance(rows, Mapping):
        return by_name(owner, ((str(name), column) for name, column in rows.items()))
    if hasattr(rows, "column_names"):  # pyarrow.Table, RecordBatch
        return by_name(owner, zip(rows.column_names, rows.columns, strict=True))
    if hasattr(rows, "get_columns"):  # polars
        return by_name(owner, ((column.name, column) for column in rows.get_columns()))
    if is_pandas(rows):
        columns = {str(name) for name in rows.columns}
        levels = [name for name in rows.index.names if name in owner.keys and name not in columns]
        frame = ((str(name), rows.iloc[:, i]) for i, name in enumerate(rows.columns))
        return by_name(owner, [*((name, rows.index.get_level_values(name)) for name in levels), *frame])
    raise InvalidArgument(
        f"{_shown(owner)}: rows of type {type(rows).__name__}; give a dict of columns, pandas, polars or pyarrow"
    )


def is_pandas(rows: Any) -> bool:
    return hasattr(rows, "iloc") and hasattr(rows, "columns")


def may_hold_objects(rows: Any) -> bool:
    """Return whether rows are a dict or a frame whose columns may hold any Python objects, which Arrow cannot take."""
    if isinstance(rows, Mapping) or is_pandas(rows):
        return True
    return hasattr(rows, "get_columns") and any(str(kind) == "Object" for kind in rows.dtypes)


def by_name(owner: FeatureView | Entity, columns: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return {name: column}. Raises InvalidArgument if a name occurs twice."""
    found: dict[str, Any] = {}
    for name, column in columns:
        if name in found:
            raise InvalidArgument(f"{_shown(owner)}: column '{name}' is there twice")
        found[name] = column
    return found


def read_column(what: str, name: str, dtype: DType, value: Any) -> PushedColumn:
    """Convert a column. what: names it in errors, such as "view 'x': column". Raises InvalidArgument."""
    try:
        return PushedColumn(name, *as_column(dtype, value))
    except Refused as error:
        raise error.error(f"{what} '{name}'", dtype) from None
