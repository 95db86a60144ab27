"""Reads all rows of a view, a batch of columns at a time, from a read transaction of its own.

LMDB cannot reuse the pages of a snapshot while its transaction is open, so a scan whose caller takes no batch for
LIMITS.scan_idle_s is ended; its next batch raises DeadlineExceeded.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import Scan, SortedRows
from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog
from shorttail.define.dtypes import DType, Timestamp
from shorttail.define.views import FeatureView
from shorttail.errors import DeadlineExceeded, ShorttailError
from shorttail.store.edits import damaged_table
from shorttail.store.environment import Environment
from shorttail.store.mapping import PAGE_HEADER_BYTES
from shorttail.store.table import Array, ColumnBatch, encode_keys, make_layout

Choose = Callable[[FeatureView], Sequence[int]]
"""Chooses columns of a view by number: keys, the event time and features have numbers in this order, from 0."""

BATCH_ROWS: Final = 65_536
BATCH_BYTES: Final = 16 << 20  # of page images; a batch has at least one page


@dataclass(frozen=True, slots=True)
class ScannedColumn:
    """n values of a column in Arrow's layout.

    values: an array [n] of the NumPy type of `dtype`, or [n, width] for vectors. Of strings it is the UTF-8 bytes as
    uint8, and value i is values[ends[i]:ends[i + 1]]; ends is int32 [n + 1], otherwise None. valid: a bit for each
    value, the lowest first, 0 where the value is null, in uint8; None if no value is null.
    """

    dtype: DType
    n: int
    values: Array
    ends: NDArray[np.int32] | None
    valid: NDArray[np.uint8] | None

    def nulls(self) -> NDArray[np.bool_] | None:
        """Return bool [n], True where the value is null; None if no value is null."""
        if self.valid is None:
            return None
        nulls: NDArray[np.bool_] = np.unpackbits(self.valid, count=self.n, bitorder="little") == 0
        return nulls

    def array(self) -> Array:
        """Return the values as an array; strings as an object array of str, None where the value is null."""
        return self.values if self.ends is None else self._texts(self.ends[:-1], self.ends[1:], self.nulls())

    def take(self, rows: NDArray[np.intp]) -> Array:
        """Return the same as array() of these rows alone."""
        if self.ends is None:
            return self.values[rows]
        nulls = self.nulls()
        return self._texts(self.ends[rows], self.ends[rows + 1], None if nulls is None else nulls[rows])

    def _texts(self, starts: Array, ends: Array, nulls: NDArray[np.bool_] | None) -> Array:
        data, texts = self.values.data, np.empty(len(starts), np.object_)
        texts[:] = [str(data[start:end], "utf-8") for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        if nulls is not None:
            texts[nulls] = None
        return texts


class TableScan:
    """All rows of a view as of one commit, in no order. An iterator of batches, each a list of ScannedColumn.

    Every page is checked in full. `view` is the view as of that commit. A context manager; threads may share a scan.
    Iteration raises Internal for a damaged table, DeadlineExceeded if no batch was taken for LIMITS.scan_idle_s, and
    InvalidArgument if the store was closed.
    """

    def __init__(
        self,
        environment: Environment,
        view_name: str,
        choose: Choose | None = None,
        batch_rows: int = BATCH_ROWS,
        *,
        whole: bool = False,
    ) -> None:
        """Called by Snapshot.open_scan(), which ends it, and by loads.

        whole: yield keys, event time and all columns of the table in its order, also those that no feature has. Raises
        NotFound for an unknown view, and what `choose` raises.
        """
        self._environment = environment
        self._batch_rows = batch_rows
        self._lock = threading.Lock()  # held while a batch is read, and while the transaction ends
        self._why: ShorttailError | None = None  # why there is no further batch; None at the end of the table
        self._txn: Any = None
        with environment.read():
            pass  # this reopens LMDB if its disk failed, and checks its structure, which a Tree relies on
        self._txn, tree = environment.read_tree()
        try:
            with environment.handle.damage():
                catalog = Catalog.from_json(environment.read_catalog_json(tree))
            stored = catalog.stored(view_name)
            self.view, layout, before = stored.view, make_layout(stored), len(stored.view.keys) + 1
            columns = [column.dtype for column in stored.table.columns]
            places = range(len(columns)) if whole else [stored.place(feature.name) for feature in self.view.features]
            types = [*self.view.keys.values(), Timestamp, *(columns[place] for place in places)]
            numbers = [*range(before), *(before + place for place in places)]
            chosen = range(len(numbers)) if choose is None else choose(self.view)
            if not set(chosen) <= set(range(len(numbers))):
                raise IndexError(f"view '{view_name}' has columns 0 to {len(numbers) - 1}, not {list(chosen)}")
            self._dtypes = [types[number] for number in chosen]
            self._scan = Scan(layout, tree, stored.table.id, [numbers[number] for number in chosen])
        except BaseException:
            self._end()
            raise
        self._layout = layout
        self._taken_s = time.monotonic()  # when the last batch was taken

    @property
    def rows(self) -> int:
        """The number of rows that were read."""
        return self._scan.rows

    @property
    def file_bytes(self) -> int:
        """The size in the file of the pages that were read."""
        return self._scan.image_bytes + self._scan.pages * PAGE_HEADER_BYTES

    @property
    def is_open(self) -> bool:
        """Whether the scan holds its read transaction."""
        return self._txn is not None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[ScannedColumn]:
        while (batch := self._read(lambda: self._scan.read(self._batch_rows, BATCH_BYTES))) is not None:
            if batch and batch[0].n:
                return batch
        self.close()
        raise StopIteration

    def bucket(self, key: Sequence[Array]) -> list[ScannedColumn] | None:
        """Return the rows that share a bucket with a key, None for an empty table.

        key: an array of one value per key column. Raises InvalidArgument for a wrong one, and what iteration raises.
        """
        rows, arena = encode_keys(self._layout, self.view, key)
        row_hash = SortedRows(self._layout, [(rows, b"".join(arena.parts))]).hash(0)
        return self._read(lambda: self._scan.read_bucket(row_hash))

    def _read(self, read: Callable[[], tuple[int, list[Any]] | None]) -> list[ScannedColumn] | None:
        self._environment.check_process()  # before the lock, which may be held for ever in a forked child
        with self._lock:
            if self._txn is None:
                if self._why is not None:
                    raise self._why
                return None
            try:
                found = read()
            except ValueError as error:
                self._why = damaged_table(str(self._environment.path), self.view.name, error)
                self._end()
                raise self._why from None
            self._taken_s = time.monotonic()
        if found is None:
            return None
        n, columns = found
        return [ScannedColumn(dtype, n, *column) for dtype, column in zip(self._dtypes, columns, strict=True)]

    def end_if_idle(self) -> bool:
        """End the scan if no batch was taken for LIMITS.scan_idle_s. Return whether it has ended. Never waits."""
        is_idle = time.monotonic() - self._taken_s >= LIMITS.scan_idle_s
        if self.is_open and is_idle and self._lock.acquire(blocking=False):
            try:
                self._why = DeadlineExceeded(
                    f"a scan of feature view '{self.view.name}' was ended, because no rows were taken from it for "
                    f"{LIMITS.scan_idle_s:g} s and its snapshot kept the store's old pages; scan again, and read faster"
                )
                self._end()
            finally:
                self._lock.release()
        return not self.is_open

    def close(self, why: ShorttailError | None = None) -> None:
        """End the scan. why: what iteration raises from now on; None: it just ends."""
        if os.getpid() != self._environment.handle.pid:
            return  # the transaction is its parent's, and the lock may be held for ever
        with self._lock:
            if self.is_open:
                self._why = why
                self._end()

    def _end(self) -> None:
        """End the read transaction. After this, native code must not read its pages."""
        self._environment.handle.end_read(self._txn)
        self._txn = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def as_batch(columns: Sequence[ScannedColumn], n_keys: int) -> ColumnBatch:
    """Return all columns of a view, of which n_keys are keys, as a ColumnBatch."""
    keys, time_us, features = columns[:n_keys], columns[n_keys], columns[n_keys + 1 :]
    return ColumnBatch(
        [column.array() for column in keys], time_us.values, [(column.array(), column.nulls()) for column in features]
    )
