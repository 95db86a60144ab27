"""Files of rows (Parquet; also Arrow IPC and CSV) and Arrow data into what the store takes, a batch at a time.

That all columns are there is checked before the first row is read.
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
from shorttail.define.refusal import said_of_text
from shorttail.define.values import Refused, of_arrow
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, NotFound
from shorttail.store import ColumnBatch
from shorttail.store.table import Texts

try:
    import pyarrow as pa
    import pyarrow.dataset

    from shorttail.sources.csv import csv_format, of_texts
except ImportError:
    raise InvalidArgument("reading files needs PyArrow; install it with `pip install shorttail[arrow]`") from None

Nulls = NDArray[np.bool_]

BATCH_ROWS = 65_536
FORMATS = {".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc", ".csv": "csv"}  # others are Parquet
EVENT_TIME = "event_time"  # the column of event times where a view names none, as in push

# Times of 96 bits as microseconds: as nanoseconds, the year 9999 would become 1816.
PARQUET = pyarrow.dataset.ParquetFileFormat(coerce_int96_timestamp_unit="us")

Read = Callable[[DType, Any], tuple[Any, Nulls | None]]


def parquet_batches(
    path: str | Path, view: FeatureView, timestamp: str | None = None
) -> tuple[int | None, Iterator[ColumnBatch]]:
    """(rows in all, batches of them) of a file, or of a folder of Parquet files, for that view.

    timestamp: the column of event times, of whatever a Timestamp takes. None takes `event_time` if the file has it,
    else now. Other columns of the file are ignored. Null and NaN are null.
    The number of rows is None where only reading would tell it (CSV).
    Raises NotFound, InvalidArgument: for columns at once, for values while iterating.
    """
    path = Path(path)
    names = [*view.keys, *view.feature_index, timestamp or EVENT_TIME]
    dataset, total, read = open_dataset(path, names, f"view '{view.name}'")
    timestamp = timestamp_column(view, timestamp, dataset.schema)
    columns = check_columns(path, view, timestamp, dataset.schema)
    return total, read_batches(path, view, timestamp, record_batches(dataset, columns), read)


def open_dataset(path: Path, names: Iterable[str], owner: str) -> tuple[Any, int | None, Read]:
    """A file with these columns, its rows where that is known, and what makes our values of one of its columns.

    owner: what wants the rows, for messages. Raises NotFound, InvalidArgument.
    """
    if not path.exists():
        raise NotFound(f"{owner}: there is no file {path}")
    kind = FORMATS.get(path.suffix.lower(), "parquet")
    try:
        if kind == "csv":
            return pyarrow.dataset.dataset(path, format=csv_format(names)), None, of_texts
        dataset = pyarrow.dataset.dataset(path, format=PARQUET if kind == "parquet" else kind)
        return dataset, dataset.count_rows(), of_arrow
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{path}: cannot be read as {kind}: {first_line(error)}") from None


def arrow_batches(
    data: Any, view: FeatureView, timestamp: str | None = None
) -> tuple[int | None, Iterator[ColumnBatch]]:
    """The same of Arrow data: a Table, a RecordBatch, a RecordBatchReader, or RecordBatches of one schema.

    Also of whatever gives an Arrow stream (`__arrow_c_stream__`), such as frames of polars and pandas.
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
    if timestamp is None and EVENT_TIME in schema.names and EVENT_TIME not in view.feature_index:
        return EVENT_TIME
    return timestamp


def check_columns(path: Path | str, view: FeatureView, timestamp: str | None, schema: Any) -> list[str]:
    """The columns to read. Raises InvalidArgument if one is missing."""
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
    # Rows are used as fast as they are read. So that memory stays flat: little readahead, and of a Parquet file, whose
    # row groups may be of any size, only the pages that the next batch needs.
    options: dict[str, Any] = {"batch_size": BATCH_ROWS, "batch_readahead": 2, "fragment_readahead": 1}
    if dataset.format.default_extname == "parquet":
        options["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(
            pre_buffer=False, use_buffered_stream=True
        )
    batches: Iterator[Any] = dataset.to_batches(columns=columns, **options)
    return batches


def same_schema(origin: str, batches: Iterable[Any], schema: Any, columns: list[str]) -> Iterator[Any]:
    for batch in batches:
        if not isinstance(batch, pa.RecordBatch) or batch.schema != schema:
            raise InvalidArgument(f"{origin}: the batches are not all record batches of one schema")
        yield batch.select(columns)


def read_batches(
    path: Path | str, view: FeatureView, timestamp: str | None, batches: Iterator[Any], read: Read = of_arrow
) -> Iterator[ColumnBatch]:
    """read: what makes our values of an Arrow array."""
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
    """A record batch of a file or of other Arrow data. first: the number of its first row in there."""

    origin: str
    batch: Any
    first: int
    read: Read

    def column(self, name: str, dtype: DType) -> tuple[Any, Nulls | None]:
        """A column as what the store takes for the type, and which values are missing. Raises InvalidArgument.

        Shares Arrow's memory where the types are alike.
        """
        try:
            values, nulls = self.read(dtype, self.batch.column(name))
            if dtype == String:
                values = texts(values)
                check_texts(values, nulls)
        except Refused as error:
            row = None if error.row is None else self.first + error.row
            raise Refused(error.got, row).error(f"{self.origin}: column '{name}'", dtype) from None
        return values, nulls

    def required(self, name: str, dtype: DType, role: str) -> Any:
        """The values of a column of which none may be missing."""
        values, nulls = self.column(name, dtype)
        if nulls is not None:
            row = self.first + int(np.argmax(nulls))
            raise InvalidArgument(f"{self.origin}: column '{name}' is null at row {row}; every row needs a {role}")
        return values


def texts(column: Any) -> Texts:
    """An Arrow array of texts, which may be a slice, without copying."""
    _, offsets, data = column.buffers()
    width = np.int64 if pa.types.is_large_string(column.type) else np.int32
    if offsets is None:
        return Texts(np.zeros(1, width), b"")
    return Texts(np.frombuffer(offsets, width, len(column) + 1, column.offset * np.dtype(width).itemsize), data or b"")


def check_texts(texts: Texts, nulls: Nulls | None) -> None:
    """That texts are UTF-8 and not too long. Raises Refused."""
    row = first_bad_string(texts.data, texts.offsets, nulls, len(texts), LIMITS.string_bytes)
    if row is not None:
        raise Refused(said_of_text(int(texts.offsets[row + 1] - texts.offsets[row])), row)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
