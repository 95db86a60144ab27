"""Edits of tables: upserts and deletes, which are encoded before the write lock is taken and applied under the lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from shorttail._native.pages import Layout, SortedRows, join
from shorttail.define.tables import Stored, TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import Internal, InvalidArgument, ShorttailError
from shorttail.results import RowCount
from shorttail.store.environment import WriteTransaction
from shorttail.store.erased import Erased
from shorttail.store.table import (
    Array,
    ColumnBatch,
    count_keys,
    depth_to_grow,
    encode_keys,
    encode_rows,
    given_columns,
    join_batches,
    key_sources,
    make_layout,
)

SMALL_ROWS = 256  # upserts of up to this many rows are encoded together with their neighbours
PAGES_AT_ONCE = 256  # new page images that are held in memory before they are given to LMDB


@dataclass(frozen=True, slots=True)
class Upsert:
    """Insert rows into a view, or replace rows with equal keys. Features that the batch does not give are kept."""

    view: str
    batch: ColumnBatch


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove rows from a view. keys: one array [n] per key column; none for the only row of a view without keys."""

    view: str
    keys: Sequence[Array]


Edit = Upsert | Delete


class TableDamaged(Exception):
    """Raised when edits find a damaged table. The write transaction must be aborted. numbers: these edits."""

    def __init__(self, numbers: list[int], error: Internal) -> None:
        super().__init__(numbers)
        self.numbers = numbers
        self.error = error


@dataclass(slots=True)
class EditRun:
    """One delete, or one or more consecutive upserts whose rows are sorted and merged as one batch."""

    upsert: bool
    numbers: list[int]
    sizes: list[int]  # rows of each edit, without those that are erased
    erased: list[int]  # rows of each edit that are left out because their keys were erased after their events
    given: list[bytes | None]  # the columns that each edit gives, a bit for each; None: all, or no upsert
    parts: list[tuple[Any, bytes]]  # (rows, string arena) of one or more edits

    def extend(self, later: EditRun) -> None:
        """Append the edits of a later run."""
        self.numbers += later.numbers
        self.sizes += later.sizes
        self.erased += later.erased
        self.given += later.given
        self.parts += later.parts


@dataclass(slots=True)
class TableEdits:
    """The edits of one table, in the order given."""

    stored: Stored
    layout: Layout
    erased: Erased  # the keys of the view's entity
    steps: list[EditRun] = field(default_factory=list)

    @classmethod
    def of(cls, stored: Stored, erased: Erased) -> TableEdits:
        return cls(stored, make_layout(stored), erased)

    @property
    def view(self) -> FeatureView:
        return self.stored.view

    @property
    def table(self) -> TableInfo:
        return self.stored.table

    def encode(self, edits: Sequence[tuple[int, Edit]], separately: bool) -> dict[int, ShorttailError]:
        """Encode numbered edits into steps. Return the errors of edits with wrong columns, by number.

        separately: encode each edit on its own. Otherwise small consecutive upserts are encoded as one: the cost of
        encoding is mostly per column, not per row.
        """
        errors: dict[int, ShorttailError] = {}
        for joinable, group in groupby(edits, key=lambda numbered: _joinable(numbered[1], separately)):
            run = list(group)
            if joinable and self._encode_joined(run):
                continue
            for number, edit in run:
                try:
                    self._add(self._encode(number, edit), separately)
                except ShorttailError as error:
                    errors[number] = error
        return errors

    def _encode_joined(self, run: Sequence[tuple[int, Edit]]) -> bool:
        """Encode consecutive upserts as one. Return False, without any change, if that is not possible."""
        batches = [edit.batch for _, edit in run if isinstance(edit, Upsert)]
        joined = join_batches(batches) if len(batches) > 1 else None
        if joined is None:
            return False
        try:
            step = self._upserts([number for number, _ in run], joined, list(map(len, batches)))
        except InvalidArgument:
            return False  # the caller encodes each edit on its own and so finds the wrong one
        self._add(step, False)
        return True

    def _upserts(self, numbers: list[int], batch: ColumnBatch, sizes: list[int]) -> EditRun:
        """Encode a batch with the rows of several edits, without those that are erased. sizes: rows of each edit."""
        rows, arena = encode_rows(self.layout, self.stored, batch)
        lost = [0] * len(sizes)
        if (mask := self._erased_rows(batch)) is not None:
            lost = [int(part.sum()) for part in np.split(mask, np.cumsum(sizes)[:-1])]
            rows, sizes = rows[~mask], [size - gone for size, gone in zip(sizes, lost, strict=True)]
        return EditRun(True, numbers, sizes, lost, [self._given(batch)] * len(sizes), [(rows, arena)])

    def _erased_rows(self, batch: ColumnBatch) -> Array | None:
        if self.erased.is_empty:
            return None
        keys = dict(zip(self.view.keys, key_sources(self.view, batch.keys), strict=True))
        return self.erased.mask(keys, batch.event_time_us)

    def _given(self, batch: ColumnBatch) -> bytes | None:
        """Return a bit for each column that the batch gives, as in a row's null bitmap; None if it gives all."""
        given = given_columns(self.stored, batch)
        return None if given is None else np.packbits(given, bitorder="little").tobytes()

    def _encode(self, number: int, edit: Edit) -> EditRun:
        if isinstance(edit, Upsert):
            return self._upserts([number], edit.batch, [len(edit.batch)])
        part = _encode_keys(self.layout, self.view, edit.keys)
        return EditRun(False, [number], [len(part[0])], [0], [None], [part])

    def _add(self, run: EditRun, separately: bool) -> None:
        if run.upsert and not separately and self.steps and self.steps[-1].upsert:
            self.steps[-1].extend(run)
        else:
            self.steps.append(run)

    @property
    def numbers(self) -> Iterable[int]:
        return (number for step in self.steps for number in step.numbers)

    def apply(self, writer: WriteTransaction, now_us: int, first: bool = True) -> dict[int, int]:
        """Apply all steps to the table. Raises TableDamaged.

        now_us: for rows without event times, taken under the write lock, so that later commits have later times. first:
        whether the transaction has changed no page of the table yet. Returns for each edit, by number, what became of
        the rows of an Upsert, or how many rows a Delete removed.
        """
        outcomes: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            rows = SortedRows(self.layout, step.parts, step.sizes, now_us, step.given, writer.commit_number)
            try:
                if not step.upsert:
                    outcomes[step.numbers[0]] = self._remove(writer, rows)
                    continue
                if i == 0 and first:
                    self._merge_into_committed(writer, rows)
                else:
                    self._merge(writer, rows)
            except ValueError as error:
                raise TableDamaged(step.numbers, damaged_table(writer.path, self.view.name, error)) from None
            outcomes |= _row_counts(step, rows.lost())
        return outcomes

    def _merge_into_committed(self, writer: WriteTransaction, rows: SortedRows) -> None:
        """Merge the rows of the first step, reading buckets from the committed tree without a call to LMDB per bucket.

        Only the first step of a transaction can do this: later steps must see the pages that earlier steps wrote.
        """
        depth_grow, at = self._depth_to_grow(writer, rows), 0
        with writer.committed_tree() as tree:
            while at < len(rows):
                at, images, changes = rows.merge_all(tree, at, PAGES_AT_ONCE, self.table.id, depth_grow)
                writer.put_pages(images, changes)

    def _merge(self, writer: WriteTransaction, rows: SortedRows) -> None:
        depth_grow, at, table_id = self._depth_to_grow(writer, rows), 0, self.table.id
        while at < len(rows):
            key, page = writer.find_bucket(table_id, rows.hash(at))
            at, images = rows.merge(at, key, page, table_id, depth_grow)
            for new_key, image in images:
                writer.put_page(table_id, new_key, image)

    def _depth_to_grow(self, writer: WriteTransaction, rows: SortedRows) -> int:
        # LMDB counts the entries of all tables together, so a small table beside large ones may become deeper than
        # necessary. That is harmless.
        return depth_to_grow(writer.n_entries + rows.image_bytes() // rows.layout.page_bytes + 1)

    def _remove(self, writer: WriteTransaction, rows: SortedRows) -> int:
        at = removed_in_all = 0
        while at < len(rows):
            key, page = writer.find_bucket(self.table.id, rows.hash(at))
            if page is None:
                return 0
            at, removed, image = rows.remove(at, key, page, self.table.id)
            if image is not None:
                writer.put_page(self.table.id, key, image)
                self._join_siblings(writer, key, image)
            removed_in_all += removed
        return removed_in_all

    def _join_siblings(self, writer: WriteTransaction, key: bytes, page: bytes) -> None:
        """Merge the bucket with its sibling, repeatedly, while the two together are small. So tables also shrink."""
        table_id, commit = self.table.id, writer.commit_number
        while depth := page[4]:
            sibling_key = (int.from_bytes(key) ^ (1 << (64 - depth))).to_bytes(8)
            sibling = writer.get_page(table_id, sibling_key)
            if sibling is None:
                return
            (first, lower), (last, upper) = sorted([(key, page), (sibling_key, sibling)], key=lambda pair: pair[0])
            joined = join(self.layout, table_id, commit, first, lower, last, upper)
            if joined is None:
                return
            writer.delete_page(table_id, last)
            writer.put_page(table_id, first, joined)
            key, page = first, joined


def _row_counts(step: EditRun, lost: bytearray | None) -> Iterator[tuple[int, RowCount]]:
    """Yield (number, count of rows) of each edit of a step. lost: see SortedRows.lost()."""
    at = 0
    for number, size, erased in zip(step.numbers, step.sizes, step.erased, strict=True):
        part = lost[at : at + size] if lost else b""
        yield number, RowCount.pushed(size + erased, part.count(1) + erased, part.count(2))
        at += size


def _joinable(edit: Edit, separately: bool) -> tuple[tuple[str, ...] | None] | None:
    """Return what an edit shares with its neighbours that are encoded with it; None if it is encoded on its own."""
    if separately or not isinstance(edit, Upsert) or len(edit.batch) > SMALL_ROWS:
        return None
    return (edit.batch.given,)


def damaged_table(path: object, view_name: str, error: ValueError) -> Internal:
    """Return the error for a damaged page that native code found, with the view's name."""
    return Internal(f"store '{path}': the table of view '{view_name}' is damaged ({error}); load it again")


def _encode_keys(layout: Layout, view: FeatureView, keys: Sequence[Array]) -> tuple[Any, bytes]:
    if len(keys) != len(view.keys) or any(len(column) != count_keys(keys) for column in keys):
        raise InvalidArgument(
            f"feature view '{view.name}': give its {len(view.keys)} key columns ({', '.join(view.keys)}), of one length"
        )
    rows, arena = encode_keys(layout, view, keys)
    return rows, b"".join(arena.parts)
