"""The source protocol: rows from outside, read as Arrow record batches.

Files (files.py) and Arrow data in memory (arrow.py) are sources. batches.py turns what they read into rows of the
store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from shorttail.define.dtypes import DType

BATCH_ROWS: Final = 65_536
EVENT_TIME: Final = "event_time"  # the default column of event times, in files and in push


class Source(Protocol):
    """Rows with named columns, which are read batch by batch and in bounded memory.

    kind: such as "parquet" or "arrow". origin: the name of the source in errors, such as a path. rows: the number of
    rows, or None if it is unknown before they are read.
    """

    @property
    def kind(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def rows(self) -> int | None: ...

    def schema(self) -> Any:
        """Return the columns as a pyarrow.Schema, or None if there are no rows that could tell them."""

    def read(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
        """Yield these columns as pyarrow.RecordBatches of about `batch_rows` rows.

        Raises InvalidArgument, or an error of Arrow or of the operating system.
        """

    def convert(self, dtype: DType, column: Any) -> tuple[Any, Any]:
        """Convert a column of a batch to (values, nulls) of a type, as from_arrow of define.values. Raises Refused."""


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
