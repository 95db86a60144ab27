"""Writes rows of a view as a table, CSV, JSON or Parquet, a batch at a time, to stdout or to a file."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shorttail.cli.caller import caller
from shorttail.cli.output import plain, print_table, terminal_columns
from shorttail.define.dtypes import DType, String, Timestamp
from shorttail.define.times import time_text
from shorttail.errors import InvalidArgument
from shorttail.store.rows import RowBatch, ViewRows
from shorttail.store.scan import BATCH_ROWS

if TYPE_CHECKING:
    from shorttail.store.scan import ScannedColumn

TABLE_ROWS: Final = 1000  # rows whose widths a table is aligned to; its header is repeated after them


def write_rows(rows: ViewRows, kind: str, output: str | None) -> int:
    """Write all rows and return their number. kind: a key of WRITERS. output: a file; None: stdout.

    The file appears under its name when it is whole. Raises InvalidArgument, OSError, and what iterating `rows` does.
    """
    if output is None:
        if kind == "parquet" and terminal_columns() is not None:
            raise InvalidArgument("Parquet is binary and stdout is a terminal; give --output FILE")
        stream: Any = sys.stdout.buffer if kind == "parquet" else sys.stdout
        count = WRITERS[kind](rows, stream)
        stream.flush()
        return count
    with output_file(output) as file:
        if kind == "parquet":
            return WRITERS[kind](rows, file)
        with io.TextIOWrapper(file, "utf-8", newline="") as text:
            return WRITERS[kind](rows, text)


@contextmanager
def output_file(output: str) -> Iterator[Any]:
    """Open the file of --output for writing. It appears when it is whole; that of a client is sent there.

    Raises InvalidArgument.
    """
    client = caller()
    if client is not None:
        with os.fdopen(client.output_fd, "wb") as file:
            yield file
        return
    with replacement(Path(output)) as path, opened_for(output, path) as file:
        yield file


def opened_for(output: str, path: Path) -> Any:
    """Open `path` for writing. It is renamed to `output` when it is whole. Raises InvalidArgument."""
    try:
        return path.open("wb")
    except OSError as error:
        raise InvalidArgument(f"--output {output}: {error.strerror}") from None


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that gets the name `path` at the end, and is deleted after an error.

    A path that is no regular file, such as a pipe, is written itself.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    made = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield made
        made.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            made.unlink()
        raise


def write_table(rows: ViewRows, stream: Any) -> int:
    """Print aligned rows. A table wider than the terminal becomes records."""
    count, waiting = 0, list[list[Any]]()
    with redirect_stdout(stream):
        for batch in rows:
            columns = [shown(dtype, v) for dtype, v in zip(rows.dtypes, batch.to_lists().values(), strict=True)]
            waiting += (list(row) for row in zip(*columns, strict=True))
            count += len(batch)
            while len(waiting) > TABLE_ROWS:
                print_table(rows.names, waiting[:TABLE_ROWS])
                del waiting[:TABLE_ROWS]
        if waiting or not count:
            print_table(rows.names, waiting)
    return count


def shown(dtype: DType, values: list[Any]) -> list[Any]:
    """Return the values of a column for people: times as text."""
    return [None if v is None else time_text(v) for v in values] if dtype == Timestamp else values


def write_json(rows: ViewRows, stream: Any) -> int:
    """Write an array of objects, a line for each row. A missing value is null, a time is ISO 8601 text."""
    count, before = 0, "[\n"
    for batch in rows:
        lines = []
        columns = [json_values(batch, column) for column in batch.columns.values()]
        for row in zip(*columns, strict=True):
            lines.append(f"{before}{json.dumps(dict(zip(rows.names, row, strict=True)), allow_nan=False)}")
            before = ",\n"
        stream.write("".join(lines))
        count += len(batch)
    stream.write("\n]\n" if count else "[]\n")
    return count


def json_values(batch: RowBatch, column: ScannedColumn) -> list[Any]:
    """Return the values of a column for JSON. A Float32 is the shortest number that it is nearest to: 0.1."""
    values, nulls = batch.arrays(column)
    if values.dtype == np.float32:
        values = values.astype(str).astype(np.float64)
    found = shown(column.dtype, values.tolist())
    if column.dtype.is_float or column.dtype.is_vector:
        found = plain(found)
    return found if nulls is None else [None if null else v for v, null in zip(found, nulls.tolist(), strict=True)]


def write_csv(rows: ViewRows, stream: Any) -> int:
    """Write CSV as docs/loading.md describes it: a missing value is an empty field, and the empty text is \"\"."""
    import pyarrow as pa
    from pyarrow import csv

    def encoded(table: Any) -> str:
        sink = io.BytesIO()
        csv.write_csv(table, sink, csv.WriteOptions(include_header=False))
        return sink.getvalue().decode()

    header = pa.record_batch([pa.array([name]) for name in rows.names], names=[str(i) for i in range(len(rows.names))])
    stream.write(encoded(header))
    count = 0
    for batch in rows:
        made = batch.to_arrow()
        arrays = [
            pa.array(write(batch, column), pa.string()) if (write := csv_writer(column.dtype)) else array
            for column, array in zip(batch.columns.values(), made.columns, strict=True)
        ]
        stream.write(encoded(pa.RecordBatch.from_arrays(arrays, names=rows.names)))
        count += len(batch)
    return count


def csv_writer(dtype: DType) -> Callable[[RowBatch, ScannedColumn], list[str | None]] | None:
    """Return what makes texts of values that Arrow's CSV does not have: vectors, and times of any year."""
    return vector_texts if dtype.is_vector else time_texts if dtype == Timestamp else None


def time_texts(batch: RowBatch, column: ScannedColumn) -> list[str | None]:
    values, nulls = batch.arrays(column)
    plain: list[int | None] = values.tolist()
    if nulls is not None:
        plain = [None if null else value for value, null in zip(plain, nulls.tolist(), strict=True)]
    return shown(column.dtype, plain)


def vector_texts(batch: RowBatch, column: ScannedColumn) -> list[str | None]:
    """Return each vector as its numbers with commas between them; an element that is missing is empty."""
    values, nulls = batch.arrays(column)
    texts = np.where(np.isnan(values), "", values.astype(str)).tolist()
    missing = [False] * len(texts) if nulls is None else nulls.tolist()
    return [None if null else ",".join(row) for row, null in zip(texts, missing, strict=True)]


def write_parquet(rows: ViewRows, stream: Any) -> int:
    """Write Parquet, with row groups of BATCH_ROWS rows or fewer."""
    import pyarrow as pa
    from pyarrow import parquet

    schema, count = rows.arrow_schema(), 0
    waiting, n = list[Any](), 0
    # Arrow would make a dictionary of the numbers of each row group too, which takes longer and more room.
    texts = [name for name, dtype in zip(rows.names, rows.dtypes, strict=True) if dtype == String]
    with parquet.ParquetWriter(stream, schema, use_dictionary=texts or False) as writer:
        for batch in rows:
            if waiting and n + len(batch) > BATCH_ROWS:
                writer.write_table(pa.Table.from_batches(waiting, schema))
                waiting, n = [], 0
            waiting.append(batch.to_arrow())
            n += len(batch)
            count += len(batch)
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))
    return count


WRITERS: Final[dict[str, Callable[[ViewRows, Any], int]]] = {
    "table": write_table,
    "csv": write_csv,
    "json": write_json,
    "parquet": write_parquet,
}
