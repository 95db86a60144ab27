"""Files as sources: Parquet files and folders of them, Arrow IPC files, CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset

from shorttail.define.dtypes import DType
from shorttail.define.values import from_arrow
from shorttail.errors import InvalidArgument, NotFound
from shorttail.sources.csv import csv_format, from_texts
from shorttail.sources.source import BATCH_ROWS, first_line

FORMATS: Final = {".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc", ".csv": "csv"}  # every other suffix is Parquet
# Read 96-bit times as microseconds: as nanoseconds of 64 bits, the year 9999 would become 1816.
PARQUET: Final = pyarrow.dataset.ParquetFileFormat(coerce_int96_timestamp_unit="us")


class FileSource:
    """A file, or a folder of Parquet files. `rows` is None for CSV.

    names: the columns that may be read; CSV has no types, so these are read as text. owner: the view or option that
    needs the file, named in errors. Raises NotFound, InvalidArgument.
    """

    def __init__(self, path: str | Path, names: Iterable[str], owner: str):
        self.path = Path(path)
        self.origin = str(path)
        if not self.path.exists():
            raise NotFound(f"{owner}: there is no file {path}")
        self.kind = FORMATS.get(self.path.suffix.lower(), "parquet")
        formats = {"csv": csv_format(names), "parquet": PARQUET, "ipc": "ipc"}
        try:
            self.dataset = pyarrow.dataset.dataset(self.path, format=formats[self.kind])
            self.rows: int | None = None if self.kind == "csv" else self.dataset.count_rows()
        except (pa.ArrowException, OSError) as error:
            raise InvalidArgument(f"{path}: cannot be read as {self.kind}: {first_line(error)}") from None

    def schema(self) -> Any:
        return self.dataset.schema

    def read(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
        # Rows are used as fast as they are read, so much readahead only costs memory. The row groups of a Parquet file
        # may have any size, so read only the pages that the next batch needs.
        options: dict[str, Any] = {"batch_size": batch_rows, "batch_readahead": 2, "fragment_readahead": 1}
        if self.kind == "parquet":
            options["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(
                pre_buffer=False, use_buffered_stream=True
            )
        batches: Iterator[Any] = self.dataset.to_batches(columns=list(columns), **options)
        return batches

    def head(self, columns: Sequence[str], rows: int) -> Any:
        """Return the first rows as a pyarrow.Table. Raises an error of Arrow or of the operating system."""
        return self.dataset.head(rows, columns=list(columns))

    def convert(self, dtype: DType, column: Any) -> tuple[Any, Any]:
        return from_texts(dtype, column) if self.kind == "csv" else from_arrow(dtype, column)
