"""Bulk load: replaces all rows of a view at once by writing a new table beside the old one.

First, every row goes into a partition, chosen by the top bits of its key's hash. Partitions are in memory; rows beyond
the memory budget go to a file. Then each partition is sorted and turned into pages, in the order of the hashes, so that
LMDB can append them. A thread commits finished pages while the next pages are built. A last, small commit replaces the
old table by the new one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from shorttail._native.pages import Directory, Layout, PageImages, RowPartitions, RowRange
from shorttail.config import LIMITS
from shorttail.define import clock
from shorttail.define.catalog import Catalog, TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import Internal, InvalidArgument, ResourceExhausted, ShorttailError
from shorttail.results import RowCount
from shorttail.store import history
from shorttail.store.commits import edit_catalog, is_current
from shorttail.store.environment import Environment, drop_table, table_ids
from shorttail.store.history import Event
from shorttail.store.lmdb_file import PAGE_BYTES
from shorttail.store.opening import translate_errors
from shorttail.store.table import UNTIMED, ColumnBatch, depth_to_grow, make_layout, source_columns, split_batches

ADD_ROWS = 65_536  # rows partitioned between two progress reports
PARTITION_BITS = 8  # 256 partitions: as many write positions as a core's L2 cache and TLB hold
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 4096, 64 << 10  # size of a contiguous piece of one partition
CHUNK_ROWS_MIN = 16
HASH_BITS_MAX = 48  # a partition by more bits that is still too large has many rows with equal keys, not many keys
RANGE_PAGES_MIN = 64  # a range of fewer pages could end up as one bucket, and buckets would be too empty
ROWS_PER_PAGE_MIN = 8
YIELD_S = 0.001

Progress = Callable[[int], object]  # receives the number of rows done since its last call


def load(
    environment: Environment,
    view_name: str,
    batches: Iterable[ColumnBatch],
    progress: Progress | None = None,
    memory_bytes: int | None = None,
    allow_shrink: bool = False,
    event: Event | None = None,
) -> RowCount:
    """Replace all rows of a view by the rows in batches. Returns the number of rows stored, with the other counts.

    Of several rows with equal keys, the row with the latest event time is stored; if the event times are equal too, the
    row that was given last. Rows without event times get the time at which the load began. The rows go into a new
    table, which replaces the old table in one commit at the end: readers see either all new rows or none, and a failed
    load changes nothing. Upserts and deletes during the load go to the old table and are lost. Other writers wait at
    most for one commit of LIMITS.load_commit_bytes at a time. Only one load per store runs at a time; other loads wait.

    memory_bytes: the memory budget (default LIMITS.load_memory_bytes), without the batches themselves. Rows beyond it
    go to an unnamed file in the store's directory. progress: called with numbers of rows whose sum is the number of
    rows given; a row counts half when it has been read and half when it has been written. event: what the history says
    of the load; the numbers of rows are added to it.

    Raises NotFound (the view), InvalidArgument (columns, the budget, or the view was changed meanwhile),
    ResourceExhausted (the disk) and Unavailable (the store at the path is another one).
    """
    budget = Budget.of(memory_bytes)
    environment.handle.check_files()  # before a file is made in a store's folder
    with load_lock(environment):
        drop_leftovers(environment)
        catalog = _committed_catalog(environment)
        view, old = catalog.view(view_name), catalog.tables[view_name]
        shrinking = Shrinking(view_name, 0 if allow_shrink else _count_rows(environment, view, old))
        table = _new_table(environment)
        try:
            with ExitStack() as files:
                counter = _ProgressCounter(progress)
                parts = Partitions(make_layout(view, table), budget, environment.path, view_name, files)
                _partition_rows(parts, view, timed(batches, clock.now_us()), counter)
                shrinking.check(counter.read)  # before anything is written; equal keys are not known yet
                table = _with_page_size(table, parts.rows)
                n_rows = _write_table(environment, view, table, parts, counter)
                shrinking.check(n_rows)
            count = RowCount(n_rows, counter.read, parts.older, counter.read - n_rows - parts.older)
            _replace_table(environment, view, old, table, event and _counted(event, count))
        except BaseException:
            with suppress(ShorttailError):  # on failure the next load deletes the leftovers
                drop_leftovers(environment)  # not drop_table(table.id): a failed commit may have put it in place
            raise
        with suppress(ResourceExhausted):
            drop_table(environment, old.id)
        return count


def _counted(event: Event, count: RowCount) -> Event:
    rows = {"rows": int(count), "given": count.given, "older": count.older, "duplicate": count.duplicate}
    return replace(event, detail={**event.detail, **rows})


@dataclass(frozen=True, slots=True)
class Shrinking:
    """Refuses a load that would leave a view with much fewer rows: such loads often read a file that was cut off.

    A load without rows is refused if any rows are served. A load of less than half of the rows that are served is
    refused if these are LIMITS.shrink_rows_min or more: entities come and go by a few percent from load to load, while
    small tables are edited by hand.
    """

    view_name: str
    served: int

    def check(self, rows: int) -> None:
        """Raise InvalidArgument if a load of so many rows is refused."""
        if (self.served and not rows) or (self.served >= LIMITS.shrink_rows_min and 2 * rows < self.served):
            raise InvalidArgument(
                f"view '{self.view_name}': the load has {rows:,} row{'' if rows == 1 else 's'}, and {self.served:,} "
                "are served; nothing was changed; if so few are right, give allow_shrink=True (--allow-shrink)"
            )


def _count_rows(environment: Environment, view: FeatureView, table: TableInfo) -> int:
    """Return the number of rows of a table; 0 if it is damaged, so that a load can replace it."""
    txn, tree = environment.read_tree()
    try:
        directory = Directory(make_layout(view, table), table.id)
        return directory.count_rows() if directory.build(tree) else 0
    except ValueError:
        return 0
    finally:
        environment.handle.end_read(txn)


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


def _partition_rows(
    parts: Partitions, view: FeatureView, batches: Iterable[ColumnBatch], counter: _ProgressCounter
) -> None:
    """Put all rows into partitions."""
    for piece in split_batches(batches, ADD_ROWS):
        if piece.given is not None:
            raise InvalidArgument(f"feature view '{view.name}': a load replaces whole rows, so give all their features")
        columns, at = source_columns(view, piece), 0
        while at < len(piece):
            try:
                at = parts.rows.add(columns, at, len(piece))
            except ValueError as error:
                raise InvalidArgument(f"feature view '{view.name}': {error}") from None
            if at < len(piece):
                parts.spill()
        counter.read += len(piece)
        counter.report()


def _write_table(
    environment: Environment, view: FeatureView, table: TableInfo, parts: Partitions, counter: _ProgressCounter
) -> int:
    """Write the new table, which the catalog does not name yet, in several commits. Return its number of rows."""
    if not len(parts.rows):
        return 0
    layout = make_layout(view, table)
    depth_grow = depth_to_grow(parts.rows.image_bytes // layout.page_bytes + 1)
    with PageWriter(environment, layout, table.id, parts.budget.commit_bytes, counter) as writer:
        for rows, first, depth in parts.ranges(layout.page_bytes):
            try:
                writer.add(rows, first, depth, depth_grow)
            except ValueError as error:
                raise InvalidArgument(f"feature view '{view.name}': {error}") from None
        writer.finish()
    counter.finish()
    return writer.n_rows


class PageWriter:
    """Builds pages of a table while a thread commits the pages built before: a commit mostly waits for the disk."""

    def __init__(
        self, environment: Environment, layout: Layout, table_id: int, commit_bytes: int, counter: _ProgressCounter
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


class _ProgressCounter:
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


@contextmanager
def load_lock(environment: Environment) -> Iterator[None]:
    """Hold the store's load lock, which only one process can hold. The system releases it if the process dies."""
    with translate_errors(environment.path):
        fd = os.open(environment.path / "load.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # to close it is not enough: a child forked meanwhile has the descriptor too
        os.close(fd)


def drop_leftovers(environment: Environment) -> None:
    """Delete the tables that the catalog does not name: they are left from killed loads or from removed views.

    Waits until the next load can use their pages again, so that loads that fail again and again do not grow the file.
    """
    # A write transaction, although nothing is written: if a writer dies right after its commit, readers miss that
    # commit until the next write transaction starts. A reader could then take the newest table for a leftover.
    with environment.write() as writer:
        present = table_ids(writer.txn)
        used = {table.id for table in Catalog.from_json(writer.get_catalog()).tables.values()}
    leftovers = [table_id for table_id in present if table_id not in used]
    for table_id in leftovers:
        drop_table(environment, table_id)
    if leftovers:
        environment.handle.wait_for_readers(2 * LIMITS.idle_rest_ms / 1000)


def _committed_catalog(environment: Environment) -> Catalog:
    with environment.read() as txn:
        return Catalog.from_json(environment.read_catalog_json(txn))


def _new_table(environment: Environment) -> TableInfo:
    """Reserve a table id in the catalog and return the new table, which belongs to no view yet."""
    with edit_catalog(environment) as catalog:
        table = catalog.reserve_table()
    return table


def _with_page_size(table: TableInfo, rows: RowPartitions) -> TableInfo:
    """Return the table with a page size that fits at least ROWS_PER_PAGE_MIN average rows, strings included."""
    page_bytes = rows.layout.page_bytes
    needed = ROWS_PER_PAGE_MIN * rows.image_bytes // max(1, len(rows)) + 64
    while page_bytes < needed:
        page_bytes += PAGE_BYTES
    return replace(table, page_bytes=page_bytes)


def _replace_table(
    environment: Environment, view: FeatureView, old: TableInfo, table: TableInfo, event: Event | None
) -> None:
    """Give the view its new table in a durable commit. Raises InvalidArgument if the view or its table has changed."""
    with environment.write() as writer:
        catalog = Catalog.from_json(writer.get_catalog())
        if not is_current(catalog, view, old):
            raise InvalidArgument(f"feature view '{view.name}' was changed while it was loaded; load it again")
        before = catalog.copy()
        catalog.tables[view.name] = table
        writer.put_catalog(catalog.to_json())
        if event is not None:
            history.append(writer.txn, event, before, catalog)
