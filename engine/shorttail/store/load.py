"""Bulk load: all rows of a view replaced at once, by a table that is written beside the old one.

First every row is put into a partition by the top bits of its key's hash, in memory or, beyond that, in a file. Then
one partition after the other is sorted and becomes pages, in the order in which LMDB keeps them, so that they are
appended. A thread commits pages while the next ones are built. The new table takes the old one's place in a last, small
commit.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from shorttail._native.pages import Layout, PageImages, RowPartitions, RowRange
from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog, TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import Internal, InvalidArgument, ResourceExhausted, ShorttailError
from shorttail.store.commits import edit_catalog, is_current
from shorttail.store.environment import Environment, drop_table, table_ids
from shorttail.store.lmdb_file import PAGE_BYTES
from shorttail.store.opening import translated
from shorttail.store.table import ColumnBatch, depth_to_grow, make_layout, pieces, source_columns

ADD_ROWS = 65_536  # rows that are put into partitions between two reports of progress
PARTITION_BITS = 8  # 256 partitions: as many as a core's second-level cache and TLB can write to at a time
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 4096, 64 << 10  # of rows of one partition that lie together
CHUNK_ROWS_MIN = 16
HASH_BITS_MAX = 48  # partitions by more bits than that have too many rows of equal keys, not too many keys
RANGE_PAGES_MIN = 64  # with fewer, a range of hashes could be one bucket by itself, and buckets would be too small
ROWS_PER_PAGE_MIN = 8
YIELD_S = 0.001

Progress = Callable[[int], object]  # is given the number of rows done since its last call


def load(
    environment: Environment,
    view_name: str,
    batches: Iterable[ColumnBatch],
    progress: Progress | None = None,
    memory_bytes: int | None = None,
) -> int:
    """Replace all rows of the view by these. Of rows with equal keys that of the latest event time stays.

    Of equal event times too the row given last stays. The rows go into a new table, which takes the place of the old
    one in one commit at the end: readers see all of it or nothing, and a load that fails changes nothing. Rows that are
    upserted or deleted meanwhile are part of the old table, and so are lost. Other writers wait for one commit of at
    most LIMITS.load_commit_bytes at a time. One load runs at a time; others wait.

    memory_bytes: what the load may take (default LIMITS.load_memory_bytes), beside the batches that it is given. Rows
    that do not fit wait in a file without a name in the store's directory. progress: is given numbers of rows which add
    up to the rows given; each counts half when it was read and half when it was written. Returns the rows stored.
    Raises NotFound (view), InvalidArgument (columns; or the view was changed), ResourceExhausted (disk).
    """
    budget = Budget.of(memory_bytes)
    with _loading(environment):
        _drop_leftovers(environment)
        catalog = _committed_catalog(environment)
        view, old = catalog.view(view_name), catalog.tables[view_name]
        table = _new_table(environment)
        try:
            with ExitStack() as files:
                done = _Done(progress)
                parts = Partitions(make_layout(view, table), budget, environment.path, view_name, files)
                _read(parts, view, batches, done)
                table = _with_page_size(table, parts.rows)
                n_rows = _write(environment, view, table, parts, done)
            _switch(environment, view, old, table)
        except BaseException:
            with suppress(ShorttailError):  # or the next load does it
                _drop_leftovers(environment)  # not by its id: when a commit fails it may be in place nevertheless
            raise
        with suppress(ResourceExhausted):
            drop_table(environment, old.id)
        return n_rows


@dataclass(frozen=True, slots=True)
class Budget:
    """How a load divides the memory that it may take."""

    commit_bytes: int  # pages in one commit. LMDB holds them, and two such lots are built and waiting
    rows_bytes: int  # rows in memory; with more of them, they go to the file
    range_bytes: int  # rows from the file that are sorted at a time

    @classmethod
    def of(cls, memory_bytes: int | None) -> Budget:
        if memory_bytes is None:
            memory_bytes = LIMITS.load_memory_bytes
        if memory_bytes < LIMITS.load_memory_bytes_min:
            raise InvalidArgument(
                f"memory_bytes={memory_bytes} is too little for a load; give it {LIMITS.load_memory_bytes_min} or more"
            )
        commit_bytes = max(PAGE_BYTES, min(LIMITS.load_commit_bytes, memory_bytes // 8))
        return cls(commit_bytes, memory_bytes - 3 * commit_bytes - memory_bytes // 8, memory_bytes // 4)


class Partitions:
    """The rows of a load, or of a partition of one, by the bits of their hashes that follow the first `skip_bits`."""

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
        """prefix: the first skip_bits, in which all hashes agree. files: closes the file that may be needed."""
        self.layout, self.budget, self.path, self.view_name = layout, budget, path, view_name
        self.skip_bits, self.prefix = skip_bits, prefix
        self.bits = PARTITION_BITS
        rows_bytes = budget.rows_bytes if skip_bits == 0 else budget.range_bytes
        # Every partition fills its last chunk by half: all of those together must leave room for rows.
        chunk_bytes_min = max(CHUNK_BYTES_MIN, CHUNK_ROWS_MIN * layout.row_bytes)
        while self.bits > 1 and rows_bytes >> self.bits + 2 < chunk_bytes_min:
            self.bits -= 1
        chunk_bytes = min(max(rows_bytes >> self.bits + 2, CHUNK_BYTES_MIN), CHUNK_BYTES_MAX) // PAGE_BYTES * PAGE_BYTES
        self.rows_bytes = rows_bytes
        self.rows = RowPartitions(layout, self.bits, skip_bits, chunk_bytes, rows_bytes)
        self.fd = -1
        self._files = files

    def spill(self) -> None:
        """Move all rows that are in memory to the file."""
        if self.fd < 0:
            with translated(self.path):
                self.fd = _nameless_file(self.path)
            self._files.callback(os.close, self.fd)
        with self._file_errors():
            self.rows.spill(self.fd)

    def ranges(self, page_bytes: int) -> Iterator[tuple[RowRange, int, int]]:
        """All rows, sorted, as (rows, first hash, depth): all those whose hashes agree with it in the top `depth` bits.

        Ranges are in the order of hashes and leave no hash out. page_bytes: of the table.
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
        """The rows of one partition, in parts again if they do not fit in memory."""
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

    def _hash(self, p: int) -> int:
        """The first hash of a partition."""
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
    """A new file that is gone with its last use, however this process ends."""
    flags = os.O_RDWR | os.O_CLOEXEC
    with suppress(OSError):  # not every file system can
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    name = folder / "load.rows"
    fd = os.open(name, flags | os.O_CREAT | os.O_TRUNC, 0o600)
    name.unlink()
    return fd


def _read(parts: Partitions, view: FeatureView, batches: Iterable[ColumnBatch], done: _Done) -> None:
    for piece in pieces(batches, ADD_ROWS):
        columns, at = source_columns(view, piece), 0
        while at < len(piece):
            try:
                at = parts.rows.add(columns, at, len(piece))
            except ValueError as error:
                raise InvalidArgument(f"feature view '{view.name}': {error}") from None
            if at < len(piece):
                parts.spill()
        done.read += len(piece)
        done.report()


def _write(environment: Environment, view: FeatureView, table: TableInfo, parts: Partitions, done: _Done) -> int:
    """Write the table, which no catalog names yet, in several commits. Returns its rows."""
    if not len(parts.rows):
        return 0
    layout = make_layout(view, table)
    depth_grow = depth_to_grow(parts.rows.image_bytes // layout.page_bytes + 1)
    with PageWriter(environment, layout, table.id, parts.budget.commit_bytes, done) as writer:
        for rows, first, depth in parts.ranges(layout.page_bytes):
            try:
                writer.add(rows, first, depth, depth_grow)
            except ValueError as error:
                raise InvalidArgument(f"feature view '{view.name}': {error}") from None
        writer.finish()
    done.finish()
    return writer.n_rows


class PageWriter:
    """Builds the pages of a table, while a thread commits those that are ready: a commit mostly waits for the disk."""

    def __init__(self, environment: Environment, layout: Layout, table_id: int, commit_bytes: int, done: _Done) -> None:
        self.n_rows = 0
        self._environment = environment
        self._done = done
        self._building = PageImages(layout, table_id, commit_bytes)
        self._writing = PageImages(layout, table_id, commit_bytes)
        self._thread = ThreadPoolExecutor(1, "shorttail-load")
        self._commit: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown()  # waits for the commit: it reads memory that is freed after this

    def add(self, rows: RowRange, first: int, depth: int, depth_grow: int) -> None:
        """Pages of a range of hashes; see Partitions.ranges() and PageImages.fill()."""
        while not self._building.fill(rows, first, depth, depth_grow):
            self._flush()

    def finish(self) -> None:
        """Commit what is left. Raises what a commit raised."""
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
            self._done.written += self._writing.rows
            self._done.report()

    def _put(self, images: PageImages) -> None:
        with self._environment.write() as writer:
            cursor = writer.txn.cursor()
            first_key, _ = next(iter(images))
            # Tables that are made later have higher keys; the view of one may have been given rows by now.
            append = not cursor.last() or bytes(cursor.key()) < first_key
            _, added = cursor.putmulti(images, append=append)
            if added != len(images):
                raise Internal(f"store '{self._environment.path}' took {added} of {len(images)} pages of a load")
            writer.n_pages += added
        time.sleep(YIELD_S)  # locks are not fair: without it, writers that wait may be passed over again and again


class _Done:
    """Tells of progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.read = self.written = 0
        self._progress = progress
        self._reported = 0

    def report(self) -> None:
        self._report((self.read + min(self.written, self.read)) // 2)

    def finish(self) -> None:
        """Rows that gave way to others of equal keys are done as well."""
        self._report(self.read)

    def _report(self, rows: int) -> None:
        if self._progress is not None and rows > self._reported:
            self._progress(rows - self._reported)
            self._reported = rows


@contextmanager
def _loading(environment: Environment) -> Iterator[None]:
    """Hold the lock of the one load that may run, in whatever process. A process that dies lets it go."""
    with translated(environment.path):
        fd = os.open(environment.path / "load.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _drop_leftovers(environment: Environment) -> None:
    """Delete the tables that no catalog names: of a load that was killed, or of views that were removed."""
    # In a write, though it changes nothing: of a commit whose writer was killed at once LMDB tells nobody before the
    # next writer begins. To readers the table that a load has put in place would not be in use yet.
    with environment.write() as writer:
        present = table_ids(writer.txn)
        used = {table.id for table in Catalog.from_json(writer.get_catalog()).tables.values()}
    for table_id in present:
        if table_id not in used:
            drop_table(environment, table_id)


def _committed_catalog(environment: Environment) -> Catalog:
    with environment.read() as txn:
        return Catalog.from_json(environment.read_catalog_json(txn))


def _new_table(environment: Environment) -> TableInfo:
    """A table whose id nobody else gets, and which no view has yet."""
    with edit_catalog(environment) as catalog:
        table = TableInfo(catalog.next_table_id, secrets.randbits(63))
        catalog.next_table_id += 1
    return table


def _with_page_size(table: TableInfo, rows: RowPartitions) -> TableInfo:
    """The table with pages that hold at least ROWS_PER_PAGE_MIN rows with the strings that they have."""
    page_bytes = rows.layout.page_bytes
    needed = ROWS_PER_PAGE_MIN * rows.image_bytes // max(1, len(rows)) + 64
    while page_bytes < needed:
        page_bytes += PAGE_BYTES
    return replace(table, page_bytes=page_bytes)


def _switch(environment: Environment, view: FeatureView, old: TableInfo, table: TableInfo) -> None:
    """Put the table in the place of the old one, durably."""
    with environment.write() as writer:
        catalog = Catalog.from_json(writer.get_catalog())
        if not is_current(catalog, view, old):
            raise InvalidArgument(f"feature view '{view.name}' was changed while it was loaded; load it again")
        catalog.tables[view.name] = table
        writer.put_catalog(catalog.to_json())
