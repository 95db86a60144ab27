"""Edits of tables: rows to insert or to remove, encoded before the write lock is taken and applied under it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from shorttail._native.pages import Layout, SortedRows, join
from shorttail.define.catalog import TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import Internal, InvalidArgument, ShorttailError
from shorttail.store.environment import WriteTransaction
from shorttail.store.table import Array, ColumnBatch, depth_to_grow, encode_keys, encode_rows, join_batches, make_layout

SMALL_ROWS = 256  # an upsert of no more is encoded with others
PAGES_AT_ONCE = 256  # pages whose new images are in memory before LMDB has them


@dataclass(frozen=True, slots=True)
class Upsert:
    """Rows to put into a view."""

    view: str
    batch: ColumnBatch


@dataclass(frozen=True, slots=True)
class Delete:
    """Rows to remove from a view: one column [n] for each key."""

    view: str
    keys: Sequence[Array]


Edit = Upsert | Delete


class DamagedBy(Exception):
    """Edits that met a damaged table; what they wrote must be undone."""

    def __init__(self, numbers: list[int], error: Internal) -> None:
        super().__init__(numbers)
        self.numbers = numbers
        self.error = error


@dataclass(slots=True)
class EditRun:
    """One edit, or several upserts that follow each other: their rows are sorted and merged as one batch."""

    upsert: bool
    numbers: list[int]
    parts: list[tuple[Any, bytes]]  # rows and arena, of one edit or of several


@dataclass(slots=True)
class TableEdits:
    """The edits of one table, in their order."""

    view: FeatureView
    table: TableInfo
    layout: Layout
    steps: list[EditRun] = field(default_factory=list)

    @classmethod
    def of(cls, view: FeatureView, table: TableInfo) -> TableEdits:
        return cls(view, table, make_layout(view, table))

    def encode(self, edits: Sequence[tuple[int, Edit]], apart: bool) -> dict[int, ShorttailError]:
        """Make steps of edits with their numbers. Returns the errors of those that have wrong columns.

        apart: each for itself. Encoding costs far more by the column than by the row, so small upserts that follow
        each other are encoded as one.
        """
        errors: dict[int, ShorttailError] = {}
        for alike, group in groupby(edits, key=lambda numbered: _is_small(numbered[1]) and not apart):
            run = list(group)
            if alike and self._encode_joined(run):
                continue
            for number, edit in run:
                try:
                    self._add(isinstance(edit, Upsert), [number], self._encode(edit), apart)
                except ShorttailError as error:
                    errors[number] = error
        return errors

    def _encode_joined(self, run: Sequence[tuple[int, Edit]]) -> bool:
        """Whether it could be done."""
        batches = [edit.batch for _, edit in run if isinstance(edit, Upsert)]
        joined = join_batches(batches) if len(batches) > 1 else None
        if joined is None:
            return False
        try:
            part = encode_rows(self.layout, self.view, joined)
        except InvalidArgument:
            return False  # which of them it is shows when each is encoded for itself
        self._add(True, [number for number, _ in run], part, False)
        return True

    def _encode(self, edit: Edit) -> tuple[Any, bytes]:
        if isinstance(edit, Upsert):
            return encode_rows(self.layout, self.view, edit.batch)
        return _encode_keys(self.layout, self.view, edit.keys)

    def _add(self, upsert: bool, numbers: list[int], part: tuple[Any, bytes], apart: bool) -> None:
        if upsert and not apart and self.steps and self.steps[-1].upsert:
            self.steps[-1].numbers += numbers
            self.steps[-1].parts.append(part)
        else:
            self.steps.append(EditRun(upsert, numbers, [part]))

    @property
    def numbers(self) -> Iterable[int]:
        return (number for step in self.steps for number in step.numbers)

    def apply(self, writer: WriteTransaction) -> dict[int, int]:
        """Write what the edits make of the table. Returns the rows removed by each Delete. Raises DamagedBy."""
        removed = {}
        for i, step in enumerate(self.steps):
            rows = SortedRows(self.layout, step.parts)
            try:
                if not step.upsert:
                    removed[step.numbers[0]] = self._remove(writer, rows)
                elif i == 0:
                    self._merge_into_committed(writer, rows)
                else:
                    self._merge(writer, rows)
            except ValueError as error:
                raise DamagedBy(step.numbers, damaged(writer.path, self.view.name, error)) from None
        return removed

    def _merge_into_committed(self, writer: WriteTransaction, rows: SortedRows) -> None:
        """For the first step, which finds the table as the last commit left it: without LMDB for each bucket."""
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
        # LMDB counts the pages of all tables: one among larger ones may become deeper than it needs, which is harmless.
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
        """Merge the bucket with its sibling while both together are small, so that a table shrinks as it grew."""
        table_id = self.table.id
        while depth := page[4]:
            at = int.from_bytes(key)
            sibling_at = at ^ (1 << (64 - depth))
            sibling_key = sibling_at.to_bytes(8)
            sibling = writer.get_page(table_id, sibling_key)
            if sibling is None:
                return
            if at < sibling_at:
                first, last, joined = key, sibling_key, join(self.layout, table_id, key, page, sibling_key, sibling)
            else:
                first, last, joined = sibling_key, key, join(self.layout, table_id, sibling_key, sibling, key, page)
            if joined is None:
                return
            writer.delete_page(table_id, last)
            writer.put_page(table_id, first, joined)
            key, page = first, joined


def _is_small(edit: Edit) -> bool:
    return isinstance(edit, Upsert) and len(edit.batch) <= SMALL_ROWS


def damaged(path: object, view_name: str, error: ValueError) -> Internal:
    """What native code says about a page, with the table's name."""
    return Internal(f"store '{path}': the table of view '{view_name}' is damaged ({error}); load it again")


def _encode_keys(layout: Layout, view: FeatureView, keys: Sequence[Array]) -> tuple[Any, bytes]:
    if len(keys) != len(view.keys) or any(len(column) != len(keys[0]) for column in keys):
        raise InvalidArgument(
            f"feature view '{view.name}': give its {len(view.keys)} key columns ({', '.join(view.keys)}), of one length"
        )
    rows, arena = encode_keys(layout, view, keys)
    return rows, b"".join(arena.parts)
