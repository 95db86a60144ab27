"""Files as sources: Parquet, Arrow IPC and CSV files, one or many, also in folders whose names hold values."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from shorttail.define.dtypes import DType
from shorttail.define.inputs import check_regular
from shorttail.define.values import from_arrow
from shorttail.errors import InvalidArgument, NotFound
from shorttail.sources.csv import csv_format, from_texts
from shorttail.sources.source import BATCH_ROWS, first_line

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

FORMATS: Final = {".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc", ".csv": "csv"}  # every other suffix is Parquet
BINARY: Final = {
    "ipc": pyarrow.dataset.IpcFileFormat(),
    # Read 96-bit times as microseconds: as nanoseconds of 64 bits, the year 9999 would become 1816.
    "parquet": pyarrow.dataset.ParquetFileFormat(coerce_int96_timestamp_unit="us"),
}
NULL_FOLDER: Final = "__HIVE_DEFAULT_PARTITION__"  # the value of a null in the name of a folder
LOCAL: Final = pyarrow.fs.LocalFileSystem()


class FileSource:
    """A file, the files of a folder, of a pattern such as "rows/*.parquet", or of a list of all these.

    names: the columns that may be read; CSV has no types, so these are read as text. owner: the view or option that
    needs the files, named in errors. Raises NotFound, and InvalidArgument that names the file.
    """

    def __init__(self, paths: Paths, names: Iterable[str], owner: str):
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        # A pattern may match a folder and also the files in it.
        found = list(dict.fromkeys(file for path in given for file in find_files(os.fspath(path), owner)))
        columns = list(names)
        self.parts = [FilePart(path, columns) for path in found]
        self.origin = str(given[0]) if len(given) == 1 else f"the {len(found)} files"
        counts = [part.rows for part in self.parts if part.rows is not None]
        self.rows: int | None = sum(counts) if len(counts) == len(self.parts) else None


def find_files(path: str, owner: str) -> Iterator[Path]:
    """Yield the files of a path, which is a file, a folder or a pattern, in the order of their names.

    Raises NotFound, InvalidArgument (a folder without files, or a Delta table).
    """
    place = Path(path)
    if place.is_dir():
        yield from folder_files(place)
    elif place.exists():
        yield place
    elif not glob.has_magic(path):
        raise NotFound(f"{owner}: there is no file {path}")
    else:
        found = glob.glob(path, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
        named = set(place.parts)
        matches = sorted(match for match in found if not any(map(is_mark, set(Path(match).parts) - named)))
        if not matches:
            raise NotFound(f"{owner}: no file matches {path}")
        for match in matches:
            yield from find_files(match, owner)


def folder_files(folder: Path) -> list[Path]:
    """Return the files in a folder and in its folders, sorted by name, without the marks of those who write folders."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        if "_delta_log" in folders:
            raise InvalidArgument(
                f"{place}: a Delta table, whose folder also holds rows that were deleted; give its Arrow data, or the "
                "list of its present files"
            )
        folders[:] = [name for name in folders if not is_mark(name)]
        found += [Path(place, name) for name in files if not is_mark(name)]
    if not found:
        raise InvalidArgument(f"{folder}: there is no file in this folder")
    return sorted(found)


def is_mark(name: str) -> bool:
    """Return whether a file or folder holds no rows, by the custom of Spark: _SUCCESS, _temporary, .part-0.crc."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def folder_values(path: Path) -> dict[str, str]:
    """Return the columns that the folders of a path give, such as {"country": "DE"} for rows/country=DE/0.parquet."""
    folders = Path(os.path.normpath(path.absolute())).parent.parts
    parts = [folder.partition("=") for folder in folders]
    return {unquote(name): unquote(value) for name, equals, value in parts if name and equals}


class FilePart:
    """A file with its own columns and types. Columns that only its folders give come last, as text.

    names: see FileSource. rows: None if their number is unknown before they are read. Raises InvalidArgument for a file
    that cannot be read.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self.origin = str(path)
        self.kind = FORMATS.get(path.suffix.lower(), "parquet")
        self._format = csv_format(names) if self.kind == "csv" else BINARY[self.kind]
        try:
            check_regular(path)  # it is read twice: for its columns, and for its rows
        except OSError as error:
            raise InvalidArgument(f"{path}: {error.strerror}") from None
        try:
            fragment = self._fragment()
            self._schema = fragment.physical_schema
            own = self._schema.names
            self.rows: int | None = None
            if self.kind == "parquet":
                self.rows = fragment.metadata.num_rows
            elif self.kind == "ipc" and len(set(own)) == len(own):  # otherwise Arrow cannot count
                self.rows = fragment.count_rows()
        except (pa.ArrowException, OSError) as error:
            raise InvalidArgument(f"{path}: cannot be read as {self.kind}: {first_line(error)}") from None
        self._folders = {name: value for name, value in folder_values(path).items() if name not in own}
        self.names = [*own, *self._folders]

    def _fragment(self) -> Any:
        # Made for each use: a fragment keeps the metadata of its file, and there may be many files.
        return self._format.make_fragment(self.origin, LOCAL)

    def type_of(self, name: str) -> Any:
        if name in self._folders:
            return pa.string()
        return None if self.kind == "csv" else self._schema.field(name).type

    def read(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
        # Rows are used as fast as they are read, so much readahead only costs memory. The row groups of a Parquet file
        # may have any size, so read only the pages that the next batch needs.
        options: dict[str, Any] = {"batch_size": batch_rows, "batch_readahead": 2, "fragment_readahead": 1}
        if self.kind == "parquet":
            options["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(
                pre_buffer=False, use_buffered_stream=True
            )
        own = [name for name in columns if name not in self._folders]
        texts = [self._folders[name] for name in columns if name in self._folders]
        for batch in self._fragment().to_batches(columns=own, **options):
            if not texts:
                yield batch
                continue
            added = [pa.repeat(pa.scalar(None if t == NULL_FOLDER else t, pa.string()), batch.num_rows) for t in texts]
            names = [*own, *(name for name in columns if name in self._folders)]
            yield pa.RecordBatch.from_arrays([*batch.columns, *added], names=names)

    def convert(self, name: str, dtype: DType, column: Any) -> tuple[Any, Any]:
        if name in self._folders and len(column):  # all values are equal
            values, nulls = from_texts(dtype, column.slice(0, 1))
            first = np.zeros(len(column), np.intp)
            same = values[first] if isinstance(values, np.ndarray) else values.take(pa.array(first))
            return same, None if nulls is None else nulls[first]
        return from_texts(dtype, column) if self.kind == "csv" else from_arrow(dtype, column)
