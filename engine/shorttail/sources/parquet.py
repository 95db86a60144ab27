"""Files of rows (Parquet; also Arrow IPC and CSV) and Arrow data into what the store takes, a batch at a time.

What can be known from a schema is checked before the first row is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.define.dtypes import Bool, DType, Float32, Float64, Int32, Int64, String, Timestamp
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, NotFound
from shorttail.store import ColumnBatch
from shorttail.store.table import Texts

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.dataset
except ImportError:
    raise InvalidArgument("reading files needs PyArrow; install it with `pip install shorttail[arrow]`") from None

Nulls = NDArray[np.bool_]

BATCH_ROWS = 65_536
FORMATS = {".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc", ".csv": "csv"}  # others are Parquet
EVENT_TIME = "event_time"  # the column of event times where a view names none, as in push

ARROW_TYPES = {
    Bool: pa.bool_(),
    Int32: pa.int32(),
    Int64: pa.int64(),
    Float32: pa.float32(),
    Float64: pa.float64(),
    String: pa.string(),
}


def parquet_batches(
    path: str | Path, view: FeatureView, timestamp: str | None = None
) -> tuple[int | None, Iterator[ColumnBatch]]:
    """(rows in all, batches of them) of a file, or of a folder of Parquet files, for that view.

    timestamp: the column of event times: timestamps, dates, or integers in microseconds since 1970 UTC. None takes
    `event_time` if the file has it, else now. Other columns of the file are ignored. Null and NaN are null.
    The number of rows is None where only reading would tell it (CSV).
    Raises NotFound, InvalidArgument: for columns at once, for values while iterating.
    """
    path = Path(path)
    dataset, total = open_dataset(path, view)
    timestamp = timestamp_column(view, timestamp, dataset.schema)
    columns = check_columns(path, view, timestamp, dataset.schema)
    return total, read_batches(path, view, timestamp, record_batches(dataset, columns))


def open_dataset(path: Path, view: FeatureView) -> tuple[Any, int | None]:
    """A file of rows or keys of that view, and its rows where that is known. Raises NotFound, InvalidArgument."""
    if not path.exists():
        raise NotFound(f"view '{view.name}': there is no file {path}")
    kind = FORMATS.get(path.suffix.lower(), "parquet")
    try:
        dataset = pyarrow.dataset.dataset(path, format=csv_format(view) if kind == "csv" else kind)
        return dataset, None if kind == "csv" else dataset.count_rows()
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


def csv_format(view: FeatureView) -> Any:
    """Types from the view, because a CSV file has none: a key "0042" must stay text."""
    dtypes = {**view.keys, **{feature.name: feature.dtype for feature in view.features}}
    options = pyarrow.csv.ConvertOptions(
        column_types={name: ARROW_TYPES[dtype] for name, dtype in dtypes.items() if dtype in ARROW_TYPES},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return pyarrow.dataset.CsvFileFormat(convert_options=options)


def check_columns(path: Path | str, view: FeatureView, timestamp: str | None, schema: Any) -> list[str]:
    """The columns to read. Raises InvalidArgument if one is missing or of a type that cannot become the view's."""
    roles = {name: (dtype, f"key of view '{view.name}'") for name, dtype in view.keys.items()}
    roles |= {feature.name: (feature.dtype, f"feature of view '{view.name}'") for feature in view.features}
    if timestamp is not None:
        roles.setdefault(timestamp, (Timestamp, f"timestamp of view '{view.name}'"))
    for name, (dtype, role) in roles.items():
        if name not in schema.names:
            raise InvalidArgument(f"{path}: no column '{name}' ({role}); its columns: {', '.join(schema.names)}")
        found = schema.field(name).type
        if not readable(found, dtype):
            raise InvalidArgument(f"{path}: column '{name}' is {found}, but as {role} it must be {dtype}")
    return list(roles)


def readable(found: Any, dtype: DType) -> bool:
    """Whether values of an Arrow type can become ours; whether each one does is seen when it is read."""
    types = pa.types
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_null(found):
        return True
    if dtype == String:
        return bool(types.is_string(found) or types.is_large_string(found) or types.is_string_view(found))
    if dtype == Bool:
        return bool(types.is_boolean(found))
    if dtype == Timestamp:
        return bool(types.is_timestamp(found) or types.is_date(found) or types.is_integer(found))
    if dtype.is_vector:
        lists = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        return bool(lists and readable(found.value_type, Float32))
    return bool(types.is_integer(found) or types.is_floating(found) or types.is_decimal(found))


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
    path: Path | str, view: FeatureView, timestamp: str | None, batches: Iterator[Any]
) -> Iterator[ColumnBatch]:
    now_us = time.time_ns() // 1000
    try:
        for batch in batches:
            if batch.num_rows:
                yield column_batch(path, view, timestamp, batch, now_us)
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {first_line(error)}") from None


def column_batch(path: Path | str, view: FeatureView, timestamp: str | None, batch: Any, now_us: int) -> ColumnBatch:
    keys = [without_nulls(path, name, dtype, batch.column(name), "key") for name, dtype in view.keys.items()]
    if timestamp is None:
        times = np.full(batch.num_rows, now_us, np.int64)
    else:
        times = without_nulls(path, timestamp, Timestamp, batch.column(timestamp), "timestamp")
    features = [
        values_and_nulls(f"{path}: column '{feature.name}'", feature.dtype, batch.column(feature.name))
        for feature in view.features
    ]
    return ColumnBatch(keys=keys, event_time_us=times, features=features)


def without_nulls(path: Path | str, name: str, dtype: DType, column: Any, role: str) -> Any:
    values, nulls = values_and_nulls(f"{path}: column '{name}'", dtype, column)
    if nulls is not None:
        count = int(nulls.sum())
        raise InvalidArgument(
            f"{path}: column '{name}' is null in {count:,} of {len(nulls):,} rows read; every row needs a {role}"
        )
    return values


def values_and_nulls(where: str, dtype: DType, column: Any) -> tuple[NDArray[Any] | Texts, Nulls | None]:
    """An Arrow array as what the store takes for the type, and which values are null (None: none is).

    Shares Arrow's memory where the types are alike. NaN in floats is left to the store, for which it is null.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type) and not dtype.is_float:
        column = pc.if_else(pc.is_nan(column), None, column)
    nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    try:
        if dtype == String:
            return texts(column), nulls
        if dtype.is_vector:
            return vectors(where, dtype, column, nulls), nulls
        return numbers(dtype, column), nulls
    except pa.ArrowInvalid as error:
        raise InvalidArgument(f"{where} cannot become {dtype}: {first_line(error)}") from None


def texts(column: Any) -> Texts:
    large = pa.types.is_large_string(column.type)
    if not large:
        column = column.cast(pa.string())
    _, offsets, data = column.buffers()
    return Texts(elements(offsets, np.int64 if large else np.int32, column, len(column) + 1), data or b"")


def numbers(dtype: DType, column: Any) -> NDArray[Any]:
    """Safe casts but to floats, which may round. What stands for nulls does not matter."""
    if dtype == Bool:  # bits in Arrow
        values: NDArray[Any] = column.fill_null(False).to_numpy(zero_copy_only=False)
        return values
    if dtype == Timestamp:
        if not pa.types.is_integer(column.type):
            zone = column.type.tz if pa.types.is_timestamp(column.type) else None
            column = column.cast(pa.timestamp("us", zone), safe=False)  # drops nanoseconds
        column = column.cast(pa.int64())
    else:
        column = column.cast(ARROW_TYPES[dtype], safe=not dtype.is_float)
    return elements(column.buffers()[1], dtype.numpy, column, len(column))


def elements(buffer: Any, numpy_type: Any, column: Any, count: int) -> NDArray[Any]:
    """The part of an Arrow array's buffer that the array, which may be a slice, uses."""
    return np.frombuffer(buffer, numpy_type, count, column.offset * np.dtype(numpy_type).itemsize)


def vectors(where: str, dtype: DType, column: Any, nulls: Nulls | None) -> NDArray[np.float32]:
    """Lists as the rows of a matrix; null lists and null elements become NaN."""
    present = column if nulls is None else column.drop_null()
    lengths = pc.list_value_length(present).to_numpy(zero_copy_only=False)
    if (lengths != dtype.width).any():
        wrong = int(lengths[lengths != dtype.width][0])
        raise InvalidArgument(f"{where} has a list of {wrong} values, but the feature is {dtype}")
    values = present.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    matrix: NDArray[np.float32] = values.reshape(-1, dtype.width)
    if nulls is None:
        return matrix
    out = np.full((len(column), dtype.width), np.nan, np.float32)
    out[~nulls] = matrix
    return out


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
