"""Arrow data in memory as a source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from shorttail.define.dtypes import DType
from shorttail.define.values import from_arrow
from shorttail.errors import InvalidArgument
from shorttail.sources.source import BATCH_ROWS


class ArrowSource:
    """A Table, a RecordBatch, a RecordBatchReader, RecordBatches of the same schema, or what gives an Arrow stream.

    It can be read once. origin: its name in errors. Raises InvalidArgument for data of another kind.
    """

    def __init__(self, data: Any, origin: str):
        self.origin = origin
        self.rows: int | None = getattr(data, "num_rows", None)
        self.names: list[str] = []
        if isinstance(data, pa.Table):
            self._batches: Iterable[Any] = data.to_batches(BATCH_ROWS)
            self._schema = data.schema
        elif isinstance(data, pa.RecordBatch):
            self._batches, self._schema = [data], data.schema
        elif hasattr(data, "__arrow_c_stream__"):
            reader = pa.RecordBatchReader.from_stream(data)
            self._batches, self._schema = reader, reader.schema
        else:
            batches = iter(data if isinstance(data, Iterable) and not isinstance(data, bytes) else [data])
            first = next(batches, None)
            if first is None:
                self.rows, self._batches, self._schema = 0, [], None
                return
            if not isinstance(first, pa.RecordBatch):
                raise InvalidArgument(
                    f"{origin}: got {type(first).__name__}; give a path, a list of paths, a dict of columns, pandas, "
                    "polars or pyarrow data, or record batches"
                )
            self._batches, self._schema = chain([first], batches), first.schema
        self.names = self._schema.names

    @property
    def parts(self) -> Sequence[ArrowSource]:
        """The data itself; nothing if there is no record batch that could tell its columns."""
        return [] if self._schema is None else [self]

    def type_of(self, name: str) -> Any:
        return None

    def read(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
        for batch in self._batches:
            if not isinstance(batch, pa.RecordBatch) or batch.schema != self._schema:
                raise InvalidArgument(f"{self.origin}: the batches are not all record batches of one schema")
            yield batch.select(list(columns))

    def convert(self, name: str, dtype: DType, column: Any) -> tuple[Any, Any]:
        return from_arrow(dtype, column)
