"""Reads rows from files (Parquet, Arrow IPC, CSV) and from Arrow data, batch by batch, in the form the store takes.

Missing columns are found before the first row is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import first_bad_string
from shorttail.config import LIMITS
from shorttail.define.dtypes import DType, String, Timestamp
from shorttail.define.refusal import described_text
from shorttail.define.values import Refused, from_arrow
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, NotFound
from shorttail.store import ColumnBatch
from shorttail.store.table import Texts

try:
    import pyarrow as pa
    import pyarrow.dataset

    from shorttail.sources.csv import csv_format, from_texts
except ImportError:
    raise InvalidArgument("reading files needs PyArrow; install it with `pip install shorttail[arrow]`") from None

Nulls = NDArray[np.bool_]

BATCH_ROWS = 65_536
FORMATS = {".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc", ".csv": "csv"}  # every other suffix is Parquet
EVENT_TIME = "event_time"  # the default column of event times, as in push

# Read 96-bit times as microseconds: as nanoseconds of 64 bits, the year 9999 would become 1816.
PARQUET = pyarrow.dataset.ParquetFileFormat(coerce_int96_timestamp_unit="us")

ReadColumn = Callable[[DType, Any], tuple[Any, Nulls | None]]


def parquet_batches(
    path: str | Path, view: FeatureView, timestamp: str | None = None
) -> tuple[int | None, Iterator[ColumnBatch]]:
    """Return (number of rows, batches of rows) of a file, or of a folder of Parquet files, for a view.

    timestamp: the column of event times, of any type that a Timestamp takes. With None, the event times come from
    `event_time` if the file has it, else they are now. Other columns are ignored. NaN is null.
    The number of rows is None for CSV, where it is unknown before the file is read.
    Raises NotFound; InvalidArgument, at once for a missing or repeated column, and while iterating for a wrong value.
    """
    path = Path(path)
    names = [*view.keys, *view.feature_index, timestamp or EVENT_TIME]
    dataset, total, read = open_dataset(path, names, f"view '{view.name}'")
    timestamp = timestamp_column(view, timestamp, dataset.schema)
    columns = check_columns(path, view, timestamp, dataset.schema)
    return total, read_batches(path, view, timestamp, record_batches(dataset, columns), read)


def open_dataset(path: Path, names: Iterable[str], owner: str) -> tuple[Any, int | None, ReadColumn]:
    """Return (dataset, number of rows, function that converts a column) of a file with the columns `names`.

    The number of rows is None for CSV. owner: the view or option that needs the file, named in errors.
    Raises NotFound, InvalidArgument.
    """
    if not path.exists():
        raise NotFound(f"{owner}: there is no file {path}")
    kind = FORMATS.get(path.suffix.lower(), "parquet")
    try:
        if kind == "csv":
            return pyarrow.dataset.dataset(path, format=csv_format(names)), None, from_texts
        dataset = pyarrow.dataset.dataset(path, format=PARQUET if kind == "parquet" else kind)
        return dataset, dataset.count_rows(), from_arrow
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{path}: cannot be read as {kind}: {first_line(error)}") from None


def arrow_batches(
    data: Any, view: FeatureView, timestamp: str | None = None
) -> tuple[int | None, Iterator[ColumnBatch]]:
    """Return (number of rows, batches of rows) of Arrow data for a view, as `parquet_batches` does for a file.

    data: a Table, a RecordBatch, a RecordBatchReader, RecordBatches of the same schema, or any object with
    `__arrow_c_stream__`, such as a polars or pandas frame. The number of rows is None if `data` does not tell it.
    """
    origin = f"rows for view '{view.name}'"
    total = getattr(data, "num_rows", None)
    if isinstance(data, pa.Table):
        batches: Iterator[Any] = iter(data.to_batches(BATCH_ROWS))
        schema = data.schema
    elif isinstance(data, pa.RecordBatch):
        batches, schema = iter([data]), data.schema
    elif hasattr(data, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(data)
        batches, schema = iter(reader), reader.schema
    else:
        batches = iter(data if isinstance(data, Iterable) and not isinstance(data, str | bytes) else [data])
        first = next(batches, None)
        if first is None:
            return 0, iter(())
        if not isinstance(first, pa.RecordBatch):
            raise InvalidArgument(
                f"{origin}: got {type(first).__name__}; give a file's path, Arrow data, or record batches"
            )
        batches, schema = chain([first], batches), first.schema
    timestamp = timestamp_column(view, timestamp, schema)
    columns = check_columns(origin, view, timestamp, schema)
    return total, read_batches(origin, view, timestamp, same_schema(origin, batches, schema, columns))


def timestamp_column(view: FeatureView, timestamp: str | None, schema: Any) -> str | None:
    """Return the column of event times, or None if event times are now."""
    if timestamp is None and EVENT_TIME in schema.names and EVENT_TIME not in view.feature_index:
        return EVENT_TIME
    return timestamp


def check_columns(path: Path | str, view: FeatureView, timestamp: str | None, schema: Any) -> list[str]:
    """Return the columns to read. Raises InvalidArgument if a column is missing or is there twice."""
    roles = dict.fromkeys(view.keys, f"key of view '{view.name}'")
    roles |= {feature.name: f"feature of view '{view.name}'" for feature in view.features}
    if timestamp is not None:
        roles.setdefault(timestamp, f"timestamp of view '{view.name}'")
    for name, role in roles.items():
        if name not in schema.names:
            raise InvalidArgument(f"{path}: no column '{name}' ({role}); its columns: {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise InvalidArgument(f"{path}: column '{name}' ({role}) is there twice")
    return list(roles)


def record_batches(dataset: Any, columns: list[str]) -> Iterator[Any]:
    # The store takes rows as fast as they are read, so much readahead only costs memory. The row groups of a Parquet
    # file may have any size, so read only the pages that the next batch needs.
    options: dict[str, Any] = {"batch_size": BATCH_ROWS, "batch_readahead": 2, "fragment_readahead": 1}
    if dataset.format.default_extname == "parquet":
        options["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(
            pre_buffer=False, use_buffered_stream=True
        )
    batches: Iterator[Any] = dataset.to_batches(columns=columns, **options)
    return batches


def same_schema(origin: str, batches: Iterable[Any], schema: Any, columns: list[str]) -> Iterator[Any]:
    """Yield the columns of each batch. Raises InvalidArgument for a batch of another schema."""
    for batch in batches:
        if not isinstance(batch, pa.RecordBatch) or batch.schema != schema:
            raise InvalidArgument(f"{origin}: the batches are not all record batches of one schema")
        yield batch.select(columns)


def read_batches(
    path: Path | str, view: FeatureView, timestamp: str | None, batches: Iterator[Any], read: ReadColumn = from_arrow
) -> Iterator[ColumnBatch]:
    """Yield the batches in the form the store takes. read: converts an Arrow column to a type."""
    now_us = time.time_ns() // 1000
    first = 0
    try:
        for batch in batches:
            if batch.num_rows:
                yield column_batch(BatchReader(str(path), batch, first, read), view, timestamp, now_us)
            first += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {first_line(error)}") from None


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
    """Converts the columns of a record batch. first: the row number, in the whole file or data, of its first row."""

    origin: str
    batch: Any
    first: int
    read: ReadColumn

    def column(self, name: str, dtype: DType) -> tuple[Any, Nulls | None]:
        """Return a column in the form the store takes for the type, and nulls. Raises InvalidArgument.

        The result shares Arrow's memory where both types have the same layout.
        """
        try:
            values, nulls = self.read(dtype, self.batch.column(name))
            if dtype == String:
                values = text_buffers(values)
                check_texts(values, nulls)
        except Refused as error:
            row = None if error.row is None else self.first + error.row
            raise Refused(error.got, row).error(f"{self.origin}: column '{name}'", dtype) from None
        return values, nulls

    def required(self, name: str, dtype: DType, role: str) -> Any:
        """Return the values of a column. Raises InvalidArgument if a value is missing. role: what the column is for."""
        values, nulls = self.column(name, dtype)
        if nulls is not None:
            row = self.first + int(np.argmax(nulls))
            raise InvalidArgument(f"{self.origin}: column '{name}' is null at row {row}; every row needs a {role}")
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


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
