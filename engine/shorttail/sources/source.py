"""The source protocol: rows from outside, in parts that have their own columns and types.

Files (files.py) and Arrow data in memory (arrow.py) are sources. batches.py turns what they read into rows of the
store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from shorttail.define.dtypes import DType

BATCH_ROWS: Final = 65_536
EVENT_TIME: Final = "event_time"  # the default column of event times, in files and in push


class Part(Protocol):
    """Rows with the same columns, which are read batch by batch and in bounded memory: a file, or Arrow data.

    origin: its name in errors, such as a path. names: its columns; a name may be there twice.
    """

    @property
    def origin(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...

    def type_of(self, name: str) -> Any:
        """Return the column's pyarrow.DataType; None if it is unknown, or if the part can be read only once."""

    def read(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
        """Yield these columns as pyarrow.RecordBatches of about `batch_rows` rows; all of them are in `names`.

        Raises InvalidArgument, or an error of Arrow or of the operating system.
        """

    def convert(self, name: str, dtype: DType, column: Any) -> tuple[Any, Any]:
        """Convert a column of a batch to (values, nulls) of a type, as from_arrow of define.values. Raises Refused."""


class Source(Protocol):
    """Parts that are read one after the other.

    origin: the name of the source in errors. rows: the number of rows, or None if it is unknown before they are read.
    """

    @property
    def origin(self) -> str: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def parts(self) -> Sequence[Part]: ...


def column_names(source: Source) -> list[str]:
    """Return the columns of all parts, each name once."""
    return list(dict.fromkeys(name for part in source.parts for name in part.names))


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
