"""Turns what a source reads into what the store takes: batches of rows, and batches of keys.

The columns of all parts of a source are checked before the first row is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import first_bad_string
from shorttail.config import LIMITS
from shorttail.define.dtypes import DType, String, Timestamp
from shorttail.define.event_times import ImpossibleTime, check_event_times
from shorttail.define.refusal import described_text
from shorttail.define.values import Refused
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.sources.rows import PUSH_PARTIAL, check_partial, names_of, time_column
from shorttail.sources.source import BATCH_ROWS, Part, Source, column_names, first_line
from shorttail.store import ColumnBatch
from shorttail.store.table import UNTIMED, Texts

try:
    import pyarrow as pa

    from shorttail.define.arrow import may_take, null_texts
    from shorttail.sources.arrow import ArrowSource
    from shorttail.sources.files import FileSource
except ImportError:
    raise InvalidArgument("reading files needs PyArrow; install it with `pip install shorttail[arrow]`") from None

__all__ = ["FileSource", "first_line", "key_batches", "open_source", "row_batches"]

Nulls = NDArray[np.bool_]


def open_source(data: Any, view: FeatureView) -> Source:
    """Return the source of a view's rows: files, or Arrow data. Raises NotFound, InvalidArgument.

    data: the path of a file or a folder, or a pattern such as "rows/*.parquet", or a list of these; or a Table, a
    RecordBatch, a RecordBatchReader, RecordBatches of the same schema, or any object with `__arrow_c_stream__`.
    """
    listed = data if isinstance(data, list | tuple) else [data]
    if listed and all(isinstance(item, str | os.PathLike) for item in listed):
        times = time_column(view)
        return FileSource(data, [*view.keys, *view.source_columns, *([times] if times else [])], f"view '{view.name}'")
    return ArrowSource(data, f"rows for view '{view.name}'")


def row_batches(
    source: Source,
    view: FeatureView,
    timestamp: str | None,
    max_clock_skew_us: int | None,
    partial: bool | None = None,
    needed_features: int | None = None,
) -> Iterator[ColumnBatch]:
    """Return the rows of a source for a view, batch by batch.

    timestamp: the column of event times, of any type that a Timestamp takes. With None, the event times come from
    `event_time` if the source has it, else the store makes them. max_clock_skew_us: how far event times may be ahead of
    the clock; None if a server judges that. Other columns are ignored. NaN is null. Where a part lacks a feature that
    other parts have, it is null.

    partial: True: a part gives only the features that it has, and may have no other columns; False: a push of whole
    rows; None: a load. needed_features: so many of the view's features, the first, must be in a part; the others are
    null where they are in none; None: all. Raises InvalidArgument, at once for a missing or repeated column and for a
    type that cannot fit, and while iterating for a wrong value.
    """
    if not source.parts:
        return iter(())
    if timestamp is None and (found := time_column(view)) is not None:
        if found in column_names(source):
            timestamp = found
        else:
            check_no_similar(source, NeededColumn(found, Timestamp, f"event times of view '{view.name}'", False))
    needed = key_columns(view)
    for part in source.parts if partial else ():
        check_partial(view, part.names, f"{part.origin}: ")
    for number, feature in enumerate(view.features):
        may_lack = bool(partial) or (needed_features is not None and number >= needed_features)
        role = f"feature '{feature.name}'" if feature.column else "feature"
        text = f"{role} of view '{view.name}'"
        hint = PUSH_PARTIAL if partial is False else ""
        needed.append(NeededColumn(feature.source_column, feature.dtype, text, False, may_lack, hint))
    if timestamp is not None:
        needed.append(NeededColumn(timestamp, Timestamp, f"timestamp of view '{view.name}'", True))
    check_columns(source, needed)
    columns = [column.name for column in needed]
    read = read_batches(source, columns, BATCH_ROWS)
    return (column_batch(rows, view, timestamp, max_clock_skew_us, partial) for rows in read)


def key_batches(source: Source, view: FeatureView, batch_rows: int) -> Iterator[list[list[Any]]]:
    """Return the keys of a source, batch by batch: a list with the values of each key column of the view.

    Other columns are ignored. Raises InvalidArgument as `row_batches` does.
    """
    check_columns(source, key_columns(view))
    return (
        [rows.required(name, dtype, "key").tolist() for name, dtype in view.keys.items()]
        for rows in read_batches(source, list(view.keys), batch_rows)
    )


@dataclass(frozen=True, slots=True)
class NeededColumn:
    """A column that is read. role: for errors. everywhere: every part must have it; else it is null in some parts.

    optional: parts may lack it, which then do not give it. hint: the end of the error if it is absent.
    """

    name: str
    dtype: DType
    role: str
    everywhere: bool
    optional: bool = False
    hint: str = ""


def key_columns(view: FeatureView) -> list[NeededColumn]:
    return [NeededColumn(name, dtype, f"key of view '{view.name}'", True) for name, dtype in view.keys.items()]


def check_columns(source: Source, needed: Sequence[NeededColumn]) -> None:
    """Check the columns of all parts, before rows are read. Raises InvalidArgument that names the part and column."""
    known = set(column_names(source))
    for part in source.parts:
        counts = Counter(part.names)
        for column in needed:
            if counts[column.name]:
                check_present(part, column, counts[column.name])
            else:
                check_absent(part, column, column.name in known, set(counts) - {column.name for column in needed})


def check_no_similar(source: Source, column: NeededColumn) -> None:
    """Raise InvalidArgument if a column that no part has, and none must have, is there in upper or lower case."""
    for part in source.parts:
        check_absent(part, column, True, set(part.names))


def check_present(part: Part, column: NeededColumn, count: int) -> None:
    """Raise InvalidArgument if the column is there twice, or has values that do not fit."""
    if count > 1:
        raise InvalidArgument(f"{part.origin}: column '{column.name}' ({column.role}) is there twice")
    kind = part.type_of(column.name)
    if kind is not None and not may_take(column.dtype, kind):
        for rows in read_part(part, [column.name], BATCH_ROWS):
            rows.column(column.name, column.dtype)  # raises with the first value; a column of nulls fits


def check_absent(part: Part, column: NeededColumn, elsewhere: bool, others: set[str]) -> None:
    """Raise InvalidArgument if the part must have the column. others: the columns of the part that nothing needs."""
    name = column.name
    if similar := sorted(other for other in others if other.casefold() == name.casefold()):
        hint = f"there is '{similar[0]}', and case matters"
    elif column.optional or (elsewhere and not column.everywhere):
        return
    else:
        hint = f"its columns: {', '.join(part.names)}{column.hint}"
    raise InvalidArgument(f"{part.origin}: no column '{name}' ({column.role}); {hint}")


def read_batches(source: Source, columns: Sequence[str], batch_rows: int) -> Iterator[BatchReader]:
    """Yield each batch of a source that holds rows. Raises InvalidArgument if the source cannot be read."""
    for part in source.parts:
        yield from read_part(part, columns, batch_rows)


def read_part(part: Part, columns: Sequence[str], batch_rows: int) -> Iterator[BatchReader]:
    first, own = 0, [name for name in dict.fromkeys(columns) if name in part.names]
    try:
        for batch in part.read(own, batch_rows):
            if batch.num_rows:
                yield BatchReader(part, batch, first)
            first += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{part.origin}: cannot be read: {first_line(error)}") from None


def column_batch(
    rows: BatchReader, view: FeatureView, timestamp: str | None, max_clock_skew_us: int | None, partial: bool | None
) -> ColumnBatch:
    keys = [rows.required(name, dtype, "key") for name, dtype in view.keys.items()]
    if timestamp is None:
        times = np.full(rows.batch.num_rows, UNTIMED, np.int64)
    else:
        times = rows.event_times(timestamp, max_clock_skew_us)
    given = [feature for feature in view.features if not partial or feature.source_column in rows.part.names]
    features = [rows.column(feature.source_column, feature.dtype) for feature in given]
    names = None if partial is None else names_of(given)
    return ColumnBatch(keys=keys, event_time_us=times, features=features, given=names)


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Converts the columns of a record batch. first: the row number, in the whole part, of its first row."""

    part: Part
    batch: Any
    first: int

    def column(self, name: str, dtype: DType) -> tuple[Any, Nulls | None]:
        """Return a column in the form the store takes for the type, and nulls. Raises InvalidArgument.

        A column that the batch lacks is null. The result shares Arrow's memory where both types have the same layout.
        """
        try:
            if name in self.batch.schema.names:
                values, nulls = self.part.convert(name, dtype, self.batch.column(name))
            else:
                values, nulls = all_null(dtype, self.batch.num_rows)
            if dtype == String:
                values = text_buffers(values)
                check_texts(values, nulls)
        except Refused as error:
            row = None if error.row is None else self.first + error.row
            raise Refused(error.got, row).error(f"{self.part.origin}: column '{name}'", dtype) from None
        return values, nulls

    def required(self, name: str, dtype: DType, role: str) -> Any:
        """Return the values of a column. Raises InvalidArgument if a value is missing. role: what the column is for."""
        values, nulls = self.column(name, dtype)
        if nulls is not None:
            row = self.first + int(np.argmax(nulls))
            raise InvalidArgument(f"{self.part.origin}: column '{name}' is null at row {row}; every row needs a {role}")
        return values

    def event_times(self, name: str, max_clock_skew_us: int | None) -> NDArray[np.int64]:
        """Return a column of event times, microseconds since 1970 UTC. Raises InvalidArgument for a wrong time."""
        times: NDArray[np.int64] = self.required(name, Timestamp, "timestamp")
        try:
            check_event_times(times, self.batch.column(name), max_clock_skew_us)
        except ImpossibleTime as error:
            row = self.first + error.row
            raise InvalidArgument(f"{self.part.origin}: column '{name}' at row {row}: {error}") from None
        return times


def all_null(dtype: DType, count: int) -> tuple[Any, Nulls]:
    """Return a column of nulls in the form of from_arrow of define.values."""
    if dtype == String:
        return null_texts(count), np.ones(count, np.bool_)
    shape = (count, dtype.width) if dtype.is_vector else count
    return np.zeros(shape, dtype.numpy), np.ones(count, np.bool_)


def text_buffers(column: Any) -> Texts:
    """Return the buffers of an Arrow array of texts, which may be a slice, without copying them."""
    _, offsets, data = column.buffers()
    width = np.int64 if pa.types.is_large_string(column.type) else np.int32
    if offsets is None:
        return Texts(np.zeros(1, width), b"")
    return Texts(np.frombuffer(offsets, width, len(column) + 1, column.offset * np.dtype(width).itemsize), data or b"")


def check_texts(texts: Texts, nulls: Nulls | None) -> None:
    """Check that every text is UTF-8 and at most LIMITS.string_bytes long. Raises Refused."""
    row = first_bad_string(texts.data, texts.offsets, nulls, len(texts), LIMITS.string_bytes)
    if row is not None:
        raise Refused(described_text(int(texts.offsets[row + 1] - texts.offsets[row])), row)
