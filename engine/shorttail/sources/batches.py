"""Turns what a source reads into what the store takes: batches of rows, and batches of keys.

Missing columns are found before the first row is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import first_bad_string
from shorttail.config import LIMITS
from shorttail.define.dtypes import DType, String, Timestamp
from shorttail.define.refusal import described_text
from shorttail.define.values import Refused
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.sources.source import BATCH_ROWS, EVENT_TIME, Source, first_line
from shorttail.store import ColumnBatch
from shorttail.store.table import Texts

try:
    import pyarrow as pa

    from shorttail.sources.arrow import ArrowSource
    from shorttail.sources.files import FileSource
except ImportError:
    raise InvalidArgument("reading files needs PyArrow; install it with `pip install shorttail[arrow]`") from None

__all__ = ["FileSource", "first_line", "key_batches", "open_source", "row_batches"]

Nulls = NDArray[np.bool_]


def open_source(data: Any, view: FeatureView) -> Source:
    """Return the source of a view's rows: a file, a folder, or Arrow data. Raises NotFound, InvalidArgument.

    data: a path; or a Table, a RecordBatch, a RecordBatchReader, RecordBatches of the same schema, or any object with
    `__arrow_c_stream__`, such as a polars or pandas frame.
    """
    if isinstance(data, str | Path):
        return FileSource(data, [*view.keys, *view.feature_index, view.timestamp or EVENT_TIME], f"view '{view.name}'")
    return ArrowSource(data, f"rows for view '{view.name}'")


def row_batches(source: Source, view: FeatureView, timestamp: str | None = None) -> Iterator[ColumnBatch]:
    """Return the rows of a source for a view, batch by batch.

    timestamp: the column of event times, of any type that a Timestamp takes. With None, the event times come from
    `event_time` if the source has it, else they are now. Other columns are ignored. NaN is null.
    Raises InvalidArgument, at once for a missing or repeated column, and while iterating for a wrong value.
    """
    schema = source.schema()
    if schema is None:
        return iter(())
    timestamp = timestamp_column(view, timestamp, schema)
    roles = dict.fromkeys(view.keys, f"key of view '{view.name}'")
    roles |= {feature.name: f"feature of view '{view.name}'" for feature in view.features}
    if timestamp is not None:
        roles.setdefault(timestamp, f"timestamp of view '{view.name}'")
    check_columns(source.origin, roles, schema)
    now_us = time.time_ns() // 1000
    return (column_batch(rows, view, timestamp, now_us) for rows in read_batches(source, list(roles), BATCH_ROWS))


def key_batches(source: Source, view: FeatureView, batch_rows: int) -> Iterator[list[list[Any]]]:
    """Return the keys of a source, batch by batch: a list with the values of each key column of the view.

    Other columns are ignored. Raises InvalidArgument as `row_batches` does.
    """
    check_columns(source.origin, dict.fromkeys(view.keys, f"key of view '{view.name}'"), source.schema())
    return (
        [rows.required(name, dtype, "key").tolist() for name, dtype in view.keys.items()]
        for rows in read_batches(source, list(view.keys), batch_rows)
    )


def timestamp_column(view: FeatureView, timestamp: str | None, schema: Any) -> str | None:
    """Return the column of event times, or None if event times are now."""
    if timestamp is None and EVENT_TIME in schema.names and EVENT_TIME not in view.feature_index:
        return EVENT_TIME
    return timestamp


def check_columns(origin: str, roles: dict[str, str], schema: Any) -> None:
    """Check that each column is there once. roles: column -> what it is for. Raises InvalidArgument."""
    for name, role in roles.items():
        if name not in schema.names:
            raise InvalidArgument(f"{origin}: no column '{name}' ({role}); its columns: {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise InvalidArgument(f"{origin}: column '{name}' ({role}) is there twice")


def read_batches(source: Source, columns: list[str], batch_rows: int) -> Iterator[BatchReader]:
    """Yield each record batch of a source that holds rows. Raises InvalidArgument if the source cannot be read."""
    first = 0
    try:
        for batch in source.read(columns, batch_rows):
            if batch.num_rows:
                yield BatchReader(source, batch, first)
            first += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{source.origin}: cannot be read: {first_line(error)}") from None


def column_batch(rows: BatchReader, view: FeatureView, timestamp: str | None, now_us: int) -> ColumnBatch:
    keys = [rows.required(name, dtype, "key") for name, dtype in view.keys.items()]
    if timestamp is None:
        times = np.full(rows.batch.num_rows, now_us, np.int64)
    else:
        times = rows.required(timestamp, Timestamp, "timestamp")
    features = [rows.column(feature.name, feature.dtype) for feature in view.features]
    return ColumnBatch(keys=keys, event_time_us=times, features=features)


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Converts the columns of a record batch. first: the row number, in the whole source, of its first row."""

    source: Source
    batch: Any
    first: int

    def column(self, name: str, dtype: DType) -> tuple[Any, Nulls | None]:
        """Return a column in the form the store takes for the type, and nulls. Raises InvalidArgument.

        The result shares Arrow's memory where both types have the same layout.
        """
        try:
            values, nulls = self.source.convert(dtype, self.batch.column(name))
            if dtype == String:
                values = text_buffers(values)
                check_texts(values, nulls)
        except Refused as error:
            row = None if error.row is None else self.first + error.row
            raise Refused(error.got, row).error(f"{self.source.origin}: column '{name}'", dtype) from None
        return values, nulls

    def required(self, name: str, dtype: DType, role: str) -> Any:
        """Return the values of a column. Raises InvalidArgument if a value is missing. role: what the column is for."""
        values, nulls = self.column(name, dtype)
        if nulls is not None:
            row = self.first + int(np.argmax(nulls))
            raise InvalidArgument(
                f"{self.source.origin}: column '{name}' is null at row {row}; every row needs a {role}"
            )
        return values


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
