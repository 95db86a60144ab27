"""Reads files of keys (Parquet, Arrow IPC, CSV): the rows that a delete removes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.sources.parquet import BatchReader, ReadColumn, first_line, open_dataset


def key_batches(path: str | Path, view: FeatureView, batch_rows: int) -> tuple[int | None, Iterator[list[list[Any]]]]:
    """Return (number of keys, batches of keys) of a file.

    A batch is a list with the values of each key column of the view. Other columns are ignored. The number of keys is
    None for CSV, where it is unknown before the file is read. Raises NotFound; InvalidArgument, at once for a missing
    or repeated column, and while iterating for a wrong value.
    """
    path = Path(path)
    dataset, total, read = open_dataset(path, view.keys, f"view '{view.name}'")
    for name in view.keys:
        if dataset.schema.names.count(name) != 1:
            found = "is there twice" if name in dataset.schema.names else "is missing"
            raise InvalidArgument(
                f"{path}: column '{name}' (key of view '{view.name}') {found}; "
                f"its columns: {', '.join(dataset.schema.names)}"
            )
    return total, _read(path, view, dataset, batch_rows, read)


def _read(path: Path, view: FeatureView, dataset: Any, batch_rows: int, read: ReadColumn) -> Iterator[list[list[Any]]]:
    import pyarrow as pa

    first = 0
    try:
        for batch in dataset.to_batches(columns=list(view.keys), batch_size=batch_rows, batch_readahead=2):
            if batch.num_rows:
                rows = BatchReader(str(path), batch, first, read)
                yield [rows.required(name, dtype, "key").tolist() for name, dtype in view.keys.items()]
            first += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {first_line(error)}") from None
