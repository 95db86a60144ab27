"""Files of keys (Parquet, Arrow IPC, CSV): the rows to delete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument
from shorttail.sources.parquet import first_line, open_dataset, readable, without_nulls


def key_batches(path: str | Path, view: FeatureView, batch_rows: int) -> tuple[int | None, Iterator[list[list[Any]]]]:
    """(keys in all, batches of them) of a file: for each key column of the view its values. Other columns are ignored.

    The number of keys is None where only reading would tell it (CSV). Raises NotFound, InvalidArgument: for columns at
    once, for values while iterating.
    """

    path = Path(path)
    dataset, total = open_dataset(path, view)
    for name, dtype in view.keys.items():
        if name not in dataset.schema.names:
            raise InvalidArgument(
                f"{path}: no column '{name}' (key of view '{view.name}'); "
                f"its columns: {', '.join(dataset.schema.names)}"
            )
        if not readable(found := dataset.schema.field(name).type, dtype):
            raise InvalidArgument(
                f"{path}: column '{name}' is {found}, but as key of view '{view.name}' it must be {dtype}"
            )
    return total, _read(path, view, dataset, batch_rows)


def _read(path: Path, view: FeatureView, dataset: Any, batch_rows: int) -> Iterator[list[list[Any]]]:
    import pyarrow as pa

    try:
        for batch in dataset.to_batches(columns=list(view.keys), batch_size=batch_rows, batch_readahead=2):
            if batch.num_rows:
                yield [
                    without_nulls(path, name, dtype, batch.column(name), "key").tolist()
                    for name, dtype in view.keys.items()
                ]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {first_line(error)}") from None
