"""Bulk load: turns any number of rows into the pages of a new table, within a memory budget.

First, every row goes into a partition, chosen by the top bits of its key's hash. Partitions are in memory; rows beyond
the memory budget go to a file. Then each partition is sorted and turned into pages, in the order of the hashes, so that
LMDB can append them. A thread commits finished pages while the next pages are built. rebuild.py gives the table to its
view.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shorttail._native.pages import Layout, PageImages, RowPartitions, RowRange
from shorttail.config import LIMITS
from shorttail.define.tables import Stored, TableInfo
from shorttail.errors import Internal, InvalidArgument, ResourceExhausted
from shorttail.store.environment import Environment
from shorttail.store.erased import Erased
from shorttail.store.lmdb_file import PAGE_BYTES
from shorttail.store.opening import translate_errors
from shorttail.store.table import UNTIMED, ColumnBatch, Source, depth_to_grow, make_layout, split_batches, table_columns

ADD_ROWS = 65_536  # rows partitioned between two progress reports
PARTITION_BITS = 8  # 256 partitions: as many write positions as a core's L2 cache and TLB hold
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 4096, 64 << 10  # size of a contiguous piece of one partition
CHUNK_ROWS_MIN = 16
HASH_BITS_MAX = 48  # a partition by more bits that is still too large has many rows with equal keys, not many keys
RANGE_PAGES_MIN = 64  # a range of fewer pages could end up as one bucket, and buckets would be too empty
ROWS_PER_PAGE_MIN = 8
YIELD_S = 0.001

Progress = Callable[[int], object]  # receives the number of rows done since its last call
Piece = tuple[Sequence[Source], int, NDArray[np.bool_] | None]
"""Rows for a table: their columns in its order (keys, event time, columns), how many, and which are erased, if any."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How a load divides its memory budget."""

    commit_bytes: int  # pages of one commit. There are three such sets: in LMDB, waiting, and being built
    rows_bytes: int  # rows in memory; beyond it they are written to the file
    range_bytes: int  # rows that are read from the file and sorted at a time

    @classmethod
    def of(cls, memory_bytes: int | None) -> Budget:
        if memory_bytes is None:
            memory_bytes = LIMITS.load_memory_bytes
        if memory_bytes < LIMITS.load_memory_bytes_min:
            raise InvalidArgument(
                f"memory_bytes={memory_bytes} is too small for a load; give {LIMITS.load_memory_bytes_min} or more"
            )
        commit_bytes = max(PAGE_BYTES, min(LIMITS.load_commit_bytes, memory_bytes // 8))
        return cls(commit_bytes, memory_bytes - 3 * commit_bytes - memory_bytes // 8, memory_bytes // 4)


class Partitions:
    """The rows of a load, or of one partition of it, partitioned by the hash bits after the first `skip_bits`."""

    def __init__(
        self,
        layout: Layout,
        budget: Budget,
        path: Path,
        view_name: str,
        files: ExitStack,
        skip_bits: int = 0,
        prefix: int = 0,
    ) -> None:
        """prefix: the first skip_bits of all hashes. files: closes the file if there is one."""
        self.layout, self.budget, self.path, self.view_name = layout, budget, path, view_name
        self.skip_bits, self.prefix = skip_bits, prefix
        self.bits = PARTITION_BITS
        rows_bytes = budget.rows_bytes if skip_bits == 0 else budget.range_bytes
        # The last chunk of every partition is half empty on average. All these chunks must leave memory for rows.
        chunk_bytes_min = max(CHUNK_BYTES_MIN, CHUNK_ROWS_MIN * layout.row_bytes)
        while self.bits > 1 and rows_bytes >> self.bits + 2 < chunk_bytes_min:
            self.bits -= 1
        chunk_bytes = min(max(rows_bytes >> self.bits + 2, CHUNK_BYTES_MIN), CHUNK_BYTES_MAX) // PAGE_BYTES * PAGE_BYTES
        self.rows_bytes = rows_bytes
        self.rows = RowPartitions(layout, self.bits, skip_bits, chunk_bytes, rows_bytes)
        self.fd = -1
        self._files = files
        self._older_below = 0  # in partitions of partitions

    @property
    def older(self) -> int:
        """The rows dropped so far because a row of the same key has a later event time."""
        return self.rows.older + self._older_below

    def spill(self) -> None:
        """Move all rows from memory to the file. Raises ResourceExhausted (the disk)."""
        if self.fd < 0:
            with translate_errors(self.path):
                self.fd = _nameless_file(self.path)
            self._files.callback(os.close, self.fd)
        with self._file_errors():
            self.rows.spill(self.fd)

    def ranges(self, page_bytes: int) -> Iterator[tuple[RowRange, int, int]]:
        """Yield all rows, sorted, in ranges: (rows, first hash, depth).

        A range holds all rows whose hashes share the top `depth` bits of its first hash. The ranges are in hash order
        and cover all hashes. page_bytes: the page size of the table.
        """
        n_ranges_max = self.rows.image_bytes // page_bytes // RANGE_PAGES_MIN
        depth = min(self.bits, max(0, n_ranges_max.bit_length() - 1))
        largest = max(map(self.rows.partition_bytes, range(1 << self.bits)))
        if self.rows.file_bytes or largest > self.budget.range_bytes:
            self.spill()
        group = 1 << (self.bits - depth)
        for first in range(0, 1 << self.bits, group):
            group_bytes = sum(map(self.rows.partition_bytes, range(first, first + group)))
            if group_bytes <= self.budget.range_bytes or self.fd < 0:
                yield self._take(first, first + group), self._hash(first), self.skip_bits + depth
                continue
            for p in range(first, first + group):
                yield from self._range(p, page_bytes)

    def _range(self, p: int, page_bytes: int) -> Iterator[tuple[RowRange, int, int]]:
        """Yield the rows of one partition; partition it again if it is larger than the memory for a range."""
        if self.rows.partition_bytes(p) <= self.budget.range_bytes or self.skip_bits + 2 * self.bits > HASH_BITS_MAX:
            yield self._take(p, p + 1), self._hash(p), self.skip_bits + self.bits
            return
        with ExitStack() as files:
            skip_bits, prefix = self.skip_bits + self.bits, self.prefix << self.bits | p
            parts = Partitions(self.layout, self.budget, self.path, self.view_name, files, skip_bits, prefix)
            with self._file_errors():
                for _ in self.rows.move(p, self.fd, parts.rows, self.budget.range_bytes // 4):
                    if parts.rows.memory_bytes >= parts.rows_bytes:
                        parts.spill()
            yield from parts.ranges(page_bytes)
            self._older_below += parts.older

    def _hash(self, p: int) -> int:
        """Return the first hash of a partition."""
        return (self.prefix << self.bits | p) << (64 - self.skip_bits - self.bits)

    def _take(self, first: int, last: int) -> RowRange:
        with self._file_errors():
            return self.rows.take(first, last, self.fd)

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceExhausted(
                f"store '{self.path}': the disk has no room for the {len(self.rows):,} rows that were read for view "
                f"'{self.view_name}' and do not fit in memory ({error.strerror}); free some, or allow more memory"
            ) from error


def _nameless_file(folder: Path) -> int:
    """Open a new file without a name. The system deletes it when it is closed, however this process ends."""
    flags = os.O_RDWR | os.O_CLOEXEC
    with suppress(OSError):  # some file systems lack O_TMPFILE
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    name = folder / "load.rows"
    fd = os.open(name, flags | os.O_CREAT | os.O_TRUNC, 0o600)
    name.unlink()
    return fd


def timed(batches: Iterable[ColumnBatch], now_us: int) -> Iterator[ColumnBatch]:
    """Yield the batches; rows without event times have now_us."""
    for batch in batches:
        untimed = batch.event_time_us == UNTIMED
        yield replace(batch, event_time_us=np.where(untimed, now_us, batch.event_time_us)) if untimed.any() else batch


def partition_rows(parts: Partitions, pieces: Iterable[Piece], view_name: str, counter: ProgressCounter) -> int:
    """Put all rows into partitions that are not erased. Return the number of those that are."""
    n_erased = 0
    for columns, n_rows, erased in pieces:
        at, gone = 0, [] if erased is None else np.flatnonzero(erased).tolist()
        for stop in (*gone, n_rows):
            while at < stop:
                try:
                    at = parts.rows.add(columns, at, n_rows, stop)
                except ValueError as error:
                    raise InvalidArgument(f"feature view '{view_name}': {error}") from None
                if at < stop:
                    parts.spill()
            at = stop + 1
        n_erased += len(gone)
        counter.read += n_rows
        counter.report()
    return n_erased


def given_rows(stored: Stored, batches: Iterable[ColumnBatch], now_us: int, erased: Erased) -> Iterator[Piece]:
    """Yield the rows of batches. Those without event times have now_us. erased: the keys of the view's entity.

    Raises InvalidArgument for partial rows and wrong columns.
    """
    for piece in split_batches(timed(batches, now_us), ADD_ROWS):
        if piece.given is not None:
            raise InvalidArgument(
                f"feature view '{stored.view.name}': a load replaces whole rows, so give all their features"
            )
        columns, keys = table_columns(stored, piece), list(stored.view.keys)
        yield columns, len(piece), erased.mask(dict(zip(keys, columns, strict=False)), columns[len(keys)][0])


def write_table(environment: Environment, stored: Stored, parts: Partitions, counter: ProgressCounter) -> int:
    """Write the new table in several commits. Return its number of rows."""
    if not len(parts.rows):
        return 0
    layout, name = make_layout(stored), stored.view.name
    depth_grow = depth_to_grow(parts.rows.image_bytes // layout.page_bytes + 1)
    with PageWriter(environment, layout, stored.table.id, parts.budget.commit_bytes, counter) as writer:
        for rows, first, depth in parts.ranges(layout.page_bytes):
            try:
                writer.add(rows, first, depth, depth_grow)
            except ValueError as error:
                raise InvalidArgument(f"feature view '{name}': {error}") from None
        writer.finish()
    counter.finish()
    return writer.n_rows


def with_page_size(table: TableInfo, rows: RowPartitions) -> TableInfo:
    """Return the table with a page size that fits at least ROWS_PER_PAGE_MIN average rows, strings included."""
    page_bytes = rows.layout.page_bytes
    needed = ROWS_PER_PAGE_MIN * rows.image_bytes // max(1, len(rows)) + 64
    while page_bytes < needed:
        page_bytes += PAGE_BYTES
    return replace(table, page_bytes=page_bytes)


class PageWriter:
    """Builds pages of a table while a thread commits the pages built before: a commit mostly waits for the disk."""

    def __init__(
        self, environment: Environment, layout: Layout, table_id: int, commit_bytes: int, counter: ProgressCounter
    ) -> None:
        self.n_rows = 0
        self._environment = environment
        self._counter = counter
        commit = last_commit(environment)
        self._building = PageImages(layout, table_id, commit_bytes, commit)
        self._writing = PageImages(layout, table_id, commit_bytes, commit)
        self._thread = ThreadPoolExecutor(1, "shorttail-load")
        self._commit: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown()  # waits for the commit, which reads memory that is freed after this

    def add(self, rows: RowRange, first: int, depth: int, depth_grow: int) -> None:
        """Build the pages of a range of hashes. For the arguments see Partitions.ranges() and PageImages.fill()."""
        while not self._building.fill(rows, first, depth, depth_grow):
            self._flush()

    def finish(self) -> None:
        """Commit the remaining pages and wait. Raises the exception of a commit that failed."""
        if len(self._building):
            self._flush()
        self._wait()

    def _flush(self) -> None:
        self._wait()
        self._building, self._writing = self._writing, self._building
        self._commit = self._thread.submit(self._put, self._writing)
        self._building.clear()

    def _wait(self) -> None:
        if self._commit is not None:
            self._commit.result()
            self._commit = None
            self.n_rows += self._writing.rows
            self._counter.written += self._writing.rows
            self._counter.report()

    def _put(self, images: PageImages) -> None:
        put_images(self._environment, images)


def put_images(environment: Environment, images: PageImages) -> None:
    """Commit pages of a table that the catalog does not name yet."""
    with environment.write() as writer:
        cursor = writer.txn.cursor()
        first_key, _ = next(iter(images))
        # Appending is possible only at the end of LMDB's keys. A table that was made later has higher keys and may
        # already have rows.
        append = not cursor.last() or bytes(cursor.key()) < first_key
        _, added = cursor.putmulti(images, append=append)
        if added != len(images):
            raise Internal(f"store '{environment.path}' took {added} of {len(images)} pages of a new table")
        writer.n_pages += added
    time.sleep(YIELD_S)  # the write lock is not fair: without this pause, waiting writers may never get it


def last_commit(environment: Environment) -> int:
    """Return the number of the last commit."""
    with environment.read() as txn:
        return environment.sequence(txn)


class ProgressCounter:
    """Counts rows that were read and written, and reports them to the caller's progress function."""

    def __init__(self, progress: Progress | None) -> None:
        self.read = self.written = 0
        self._progress = progress
        self._reported = 0

    def report(self) -> None:
        self._report((self.read + min(self.written, self.read)) // 2)

    def finish(self) -> None:
        """Report all rows as done, including rows that were replaced by others with equal keys."""
        self._report(self.read)

    def _report(self, rows: int) -> None:
        if self._progress is not None and rows > self._reported:
            self._progress(rows - self._reported)
            self._reported = rows
