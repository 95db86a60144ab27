"""Edits of tables: upserts and deletes, which are encoded before the write lock is taken and applied under the lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from shorttail._native.pages import Layout, SortedRows, join
from shorttail.define import clock
from shorttail.define.catalog import TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import Internal, InvalidArgument, ShorttailError
from shorttail.results import RowCount
from shorttail.store.environment import WriteTransaction
from shorttail.store.table import (
    Array,
    ColumnBatch,
    count_keys,
    depth_to_grow,
    encode_keys,
    encode_rows,
    given_features,
    join_batches,
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
    sizes: list[int]  # rows of each edit
    given: list[bytes | None]  # the features that each edit gives, a bit for each; None: all, or no upsert
    parts: list[tuple[Any, bytes]]  # (rows, string arena) of one or more edits

    def extend(self, later: EditRun) -> None:
        """Append the edits of a later run."""
        self.numbers += later.numbers
        self.sizes += later.sizes
        self.given += later.given
        self.parts += later.parts


@dataclass(slots=True)
class TableEdits:
    """The edits of one table, in the order given."""

    view: FeatureView
    table: TableInfo
    layout: Layout
    steps: list[EditRun] = field(default_factory=list)

    @classmethod
    def of(cls, view: FeatureView, table: TableInfo) -> TableEdits:
        return cls(view, table, make_layout(view, table))

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
            part = encode_rows(self.layout, self.view, joined)
        except InvalidArgument:
            return False  # the caller encodes each edit on its own and so finds the wrong one
        given = [self._given(joined)] * len(run)
        self._add(EditRun(True, [number for number, _ in run], list(map(len, batches)), given, [part]), False)
        return True

    def _given(self, batch: ColumnBatch) -> bytes | None:
        """Return a bit for each feature that the batch gives, as in a row's null bitmap; None if it gives all."""
        given = given_features(self.view, batch)
        return None if given is None else np.packbits(given, bitorder="little").tobytes()

    def _encode(self, number: int, edit: Edit) -> EditRun:
        if isinstance(edit, Upsert):
            part = encode_rows(self.layout, self.view, edit.batch)
            return EditRun(True, [number], [len(edit.batch)], [self._given(edit.batch)], [part])
        part = _encode_keys(self.layout, self.view, edit.keys)
        return EditRun(False, [number], [len(part[0])], [None], [part])

    def _add(self, run: EditRun, separately: bool) -> None:
        if run.upsert and not separately and self.steps and self.steps[-1].upsert:
            self.steps[-1].extend(run)
        else:
            self.steps.append(run)

    @property
    def numbers(self) -> Iterable[int]:
        return (number for step in self.steps for number in step.numbers)

    def apply(self, writer: WriteTransaction) -> dict[int, int]:
        """Apply all steps to the table. Raises TableDamaged.

        Returns for each edit, by number, what became of the rows of an Upsert, or how many rows a Delete removed. Rows
        without event times get them here, under the write lock, so that later commits have later times.
        """
        now_us = clock.now_us()
        outcomes: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            rows = SortedRows(self.layout, step.parts, step.sizes, now_us, step.given, writer.commit_number)
            try:
                if not step.upsert:
                    outcomes[step.numbers[0]] = self._remove(writer, rows)
                    continue
                if i == 0:
                    self._merge_into_committed(writer, rows)
                else:
                    self._merge(writer, rows)
            except ValueError as error:
                raise TableDamaged(step.numbers, damaged_table(writer.path, self.view.name, error)) from None
            outcomes |= _row_counts(step, rows.lost())
        return outcomes

    def _merge_into_committed(self, writer: WriteTransaction, rows: SortedRows) -> None:
        """Merge the rows of the first step, reading buckets from the committed tree without a call to LMDB per bucket.

        Only the first step can do this: later steps must see the pages that earlier steps wrote.
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
    for number, size in zip(step.numbers, step.sizes, strict=True):
        part = lost[at : at + size] if lost else b""
        yield number, RowCount.pushed(size, part.count(1), part.count(2))
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
