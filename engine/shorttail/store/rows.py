"""The stored rows of a view, for people and for files: some columns, the rows that satisfy conditions, at most so many.

Rows are read by a scan (store/scan.py). Each batch is converted to Arrow, or to plain Python values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shorttail.define import clock
from shorttail.define.conditions import Condition, parse_condition
from shorttail.define.dtypes import Bool, DType, String, Timestamp
from shorttail.define.names import quoted, suggestion
from shorttail.define.times import time_text
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, NotFound
from shorttail.results import Status, import_extra, pandas_column
from shorttail.store.scan import BATCH_ROWS, ScannedColumn
from shorttail.store.snapshot import Snapshot

if TYPE_CHECKING:
    import pandas
    import pyarrow

EVENT_TIME: Final = "event_time"
COMPARE: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def time_name(view: FeatureView) -> str:
    """Return the name of the column of event times: the view's timestamp column, else event_time.

    If a key or a feature bears that name, `_` is appended.
    """
    name = view.timestamp or EVENT_TIME
    while name in view.keys or name in view.feature_index:
        name += "_"
    return name


def row_columns(view: FeatureView) -> dict[str, tuple[int, DType]]:
    """Return {name: (number for Choose, type)} of the columns of rows: keys, features, and the event time last."""
    types = [*view.keys.items(), (time_name(view), Timestamp), *((f.name, f.dtype) for f in view.features)]
    found = {name: (number, dtype) for number, (name, dtype) in enumerate(types)}
    found[time_name(view)] = found.pop(time_name(view))
    return found


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of a view. columns: by name. chosen: the numbers of those rows of `columns` that are meant; None: all."""

    columns: dict[str, ScannedColumn]
    chosen: NDArray[np.intp] | None
    n: int

    def __len__(self) -> int:
        return self.n

    def to_lists(self) -> dict[str, list[Any]]:
        """Return column -> Python values: None where a value is null, microseconds since 1970 for a Timestamp."""
        return {name: self._list(column) for name, column in self.columns.items()}

    def _list(self, column: ScannedColumn) -> list[Any]:
        values, nulls = self.arrays(column)
        plain: list[Any] = values.tolist()
        return plain if nulls is None else [None if null else v for v, null in zip(plain, nulls.tolist(), strict=True)]

    def arrays(self, column: ScannedColumn) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return the values of the rows, strings as objects, and bool [n], True where a value is null, or None."""
        if self.chosen is None:
            return column.array(), column.nulls()
        nulls = column.nulls()
        nulls = None if nulls is None else nulls[self.chosen]
        return column.take(self.chosen), nulls if nulls is not None and nulls.any() else None

    def to_arrow(self) -> pyarrow.RecordBatch:
        """Return the rows as an Arrow record batch, of the types of `arrow_type`. Numbers are not copied."""
        import pyarrow as pa

        arrays = [arrow_array(column) for column in self.columns.values()]
        batch = pa.RecordBatch.from_arrays(arrays, names=list(self.columns))
        return batch if self.chosen is None else batch.take(pa.array(self.chosen))


def arrow_type(dtype: DType) -> Any:
    """Return the Arrow type of a column, which is that of `Features.to_arrow`."""
    import pyarrow as pa

    if dtype.is_vector:
        return pa.list_(pa.from_numpy_dtype(dtype.numpy), dtype.width)
    if dtype == String:
        return pa.string()
    return pa.timestamp("us", "UTC") if dtype == Timestamp else pa.from_numpy_dtype(dtype.numpy)


def arrow_array(column: ScannedColumn) -> Any:
    """Return a column as an Arrow array that shares its memory, but for Bool, of which Arrow stores bits."""
    import pyarrow as pa

    kind, valid = arrow_type(column.dtype), None if column.valid is None else pa.py_buffer(column.valid)
    if column.dtype.is_vector:
        items = pa.array(column.values.reshape(-1))
        return pa.Array.from_buffers(kind, column.n, [valid], children=[items])
    if column.ends is not None:
        return pa.Array.from_buffers(kind, column.n, [valid, pa.py_buffer(column.ends), pa.py_buffer(column.values)])
    values = np.packbits(column.values, bitorder="little") if column.dtype == Bool else column.values
    return pa.Array.from_buffers(kind, column.n, [valid, pa.py_buffer(values)])


class ViewRows:
    """A pass over the rows of a view as of the newest commit, in no order: an iterator of RowBatch.

    columns: names; None: all of `row_columns`. where: conditions (define/conditions.py), all of which a row satisfies.
    limit: the most rows. names, dtypes: of the columns of each batch. A context manager. Raises NotFound,
    InvalidArgument; iteration raises what TableScan does.
    """

    def __init__(
        self,
        store: Snapshot,
        view: str,
        columns: Sequence[str] | None = None,
        where: str | Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise InvalidArgument(f"limit must be a number of rows, not {limit!r}")
        self._columns = None if columns is None else [columns] if isinstance(columns, str) else list(columns)
        self._where = [where] if isinstance(where, str) else list(where)
        self._left = limit
        self._conditions: list[Condition] = []
        rows = BATCH_ROWS if where or limit is None else min(BATCH_ROWS, max(limit, 1))
        self._scan = store.open_scan(view, self._choose, rows)
        self.view = self._scan.view

    def _choose(self, view: FeatureView) -> list[int]:
        known = row_columns(view)
        self.names = list(known) if self._columns is None else list(dict.fromkeys(self._columns))
        if not self.names:
            raise InvalidArgument(f"view '{view.name}': name at least one column")
        for name in self.names:
            if name not in known:
                raise NotFound(
                    f"feature view '{view.name}' has no column {quoted(name)}{suggestion(name, known, 'columns')}"
                )
        self.dtypes = [known[name][1] for name in self.names]
        types = {name: dtype for name, (_, dtype) in known.items()}
        self._conditions = [parse_condition(text, types, f"feature view '{view.name}'") for text in self._where]
        self._read = list(dict.fromkeys([*self.names, *(condition.column for condition in self._conditions)]))
        return [known[name][0] for name in self._read]

    def __iter__(self) -> Iterator[RowBatch]:
        while self._left != 0 and (columns := next(self._scan, None)) is not None:
            chosen = self._satisfying(dict(zip(self._read, columns, strict=True)))
            n = columns[0].n if chosen is None else len(chosen)
            if self._left is not None:
                if n > self._left:
                    chosen = np.arange(self._left) if chosen is None else chosen[: self._left]
                    n = self._left
                self._left -= n
            if n:
                yield RowBatch(dict(zip(self.names, columns, strict=False)), chosen, n)
        self.close()

    def _satisfying(self, columns: Mapping[str, ScannedColumn]) -> NDArray[np.intp] | None:
        """Return the numbers of the rows that satisfy the conditions; None without conditions."""
        found = [satisfying(condition, columns[condition.column]) for condition in self._conditions]
        return np.flatnonzero(np.logical_and.reduce(found)) if found else None

    def close(self) -> None:
        self._scan.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def arrow_schema(self) -> Any:
        """Return the Arrow schema of the batches. Raises ImportError without pyarrow."""
        pa = import_extra("pyarrow", "to_arrow")
        return pa.schema(list(zip(self.names, map(arrow_type, self.dtypes), strict=True)))

    def to_arrow(self) -> pyarrow.Table:
        """Return the rows that are left as an Arrow table. Raises ImportError without pyarrow."""
        schema = self.arrow_schema()
        pa = import_extra("pyarrow", "to_arrow")
        return pa.Table.from_batches([batch.to_arrow() for batch in self], schema)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows that are left as a DataFrame, of the types of `Features.to_pandas`. Raises ImportError."""
        pandas = import_extra("pandas", "to_pandas")
        parts: list[list[tuple[NDArray[Any], NDArray[np.bool_] | None]]] = [[] for _ in self.names]
        for batch in self:
            for part, column in zip(parts, batch.columns.values(), strict=True):
                part.append(batch.arrays(column))
        frame = {}
        for name, dtype, part in zip(self.names, self.dtypes, parts, strict=True):
            values, missing = joined(dtype, part)
            if dtype.is_float and missing is not None:
                values[missing] = np.nan
            frame[name] = pandas_column(values, missing, dtype.name)
        return pandas.DataFrame(frame)


def joined(
    dtype: DType, parts: Sequence[tuple[NDArray[Any], NDArray[np.bool_] | None]]
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return the values and the nulls of a column in several batches as one array each."""
    if not parts:
        return np.empty((0, dtype.width) if dtype.is_vector else 0, dtype.numpy), None
    values = np.concatenate([values for values, _ in parts])
    if all(nulls is None for _, nulls in parts):
        return values, None
    return values, np.concatenate([np.zeros(len(v), np.bool_) if nulls is None else nulls for v, nulls in parts])


def satisfying(condition: Condition, column: ScannedColumn) -> NDArray[np.bool_]:
    """Return bool [n]: whether each value satisfies a condition on this column."""
    nulls = column.nulls()
    there = np.ones(column.n, np.bool_) if nulls is None else ~nulls
    if condition.value is None:
        return ~there if condition.operator == "=" else there
    if column.ends is not None:
        return there & _text_satisfying(condition, column)
    # A Float32 column is compared with the Float32 next to the value: 0.1 finds what was stored as 0.1.
    value = np.asarray(condition.value, column.dtype.numpy)
    return there & np.asarray(COMPARE[condition.operator](column.values, value), np.bool_)


def _text_satisfying(condition: Condition, column: ScannedColumn) -> NDArray[np.bool_]:
    """Compare strings by their UTF-8 bytes, whose order is that of the characters' code points."""
    value: bytes = condition.value.encode()
    ends: Any = column.ends
    if condition.operator in ("=", "!="):
        equal: NDArray[np.bool_] = np.diff(ends) == len(value)
        for at, byte in enumerate(value):
            rows = np.flatnonzero(equal)
            equal[rows] = column.values[ends[rows] + at] == byte
        return equal if condition.operator == "=" else ~equal
    data, compare = column.values.tobytes(), COMPARE[condition.operator]
    texts = (data[start:end] for start, end in pairwise(ends.tolist()))
    return np.fromiter((compare(text, value) for text in texts), np.bool_, column.n)


def times_as_text(view: FeatureView, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Python values with its times, microseconds since 1970, as ISO 8601 text."""
    times = [name for name, (_, dtype) in row_columns(view).items() if dtype == Timestamp and row.get(name) is not None]
    return row | {name: time_text(row[name]) for name in times}


# -- rows by their keys ------------------------------------------------------------------------------------------------


def get_rows(store: Snapshot, view_name: str, keys: Sequence[NDArray[Any]]) -> list[tuple[Status, dict[str, Any]]]:
    """Return per key the status of its row, PRESENT, STALE or NOT_FOUND, and {column: value} of `row_columns`.

    keys: an array [n] per key column. Values are those of RowBatch.to_lists; of a NOT_FOUND row, all but the keys
    are None. Raises NotFound (view), InvalidArgument and Internal (damaged table).
    """
    found: list[tuple[Status, dict[str, Any]]] = []
    with store.open_scan(view_name) as scan:
        view = scan.view
        names = [name for name, _ in sorted(row_columns(view).items(), key=lambda item: item[1][0])]
        oldest_us = clock.now_us() - view.ttl_us if view.ttl_us else None
        for i in range(len(keys[0])):
            key = [column[i] for column in keys]
            bucket = scan.bucket([column[i : i + 1] for column in keys])
            row: dict[str, Any] = dict.fromkeys(row_columns(view)) | dict(zip(view.keys, map(_plain, key), strict=True))
            status = Status.NOT_FOUND
            at = None if bucket is None else _row_of(key, bucket)
            if at is not None:
                assert bucket is not None
                one = RowBatch(dict(zip(names, bucket, strict=True)), np.array([at]), 1)
                row |= {name: values[0] for name, values in one.to_lists().items()}
                is_stale = oldest_us is not None and row[time_name(view)] < oldest_us
                status = Status.STALE if is_stale else Status.PRESENT
            found.append((status, row))
    return found


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _row_of(key: Sequence[Any], bucket: Sequence[ScannedColumn]) -> int | None:
    """Return the number of the row with that key, None if there is none."""
    same = np.ones(bucket[0].n, np.bool_)
    for value, column in zip(key, bucket, strict=False):
        same &= column.array() == value
    return int(np.argmax(same)) if same.any() else None
