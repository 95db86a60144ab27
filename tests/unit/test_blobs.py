"""Blobs: strings of any bytes in a row, which pages keep, and which lookups and scans pass over."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pages import Pages

from shorttail._native.columns import Columns
from shorttail._native.pages import (
    Directory,
    Layout,
    Lookup,
    PageImages,
    PageRewrite,
    RowPartitions,
    Scan,
    SortedRows,
    crc32c,
    lookup,
)
from shorttail.define import dtypes
from shorttail.store.table import row_dtype

BLOB = 10
FEATURES = [(3, 1), (BLOB, 1), (6, 1), (BLOB, 1)]  # a, blob, text, other blob
NULL_OTHER = 0b1000
Row = tuple[int, bytes, bytes, bytes | None]  # a, blob, text, other blob

blobs = st.binary(max_size=300)
rows_of_blobs = st.dictionaries(
    st.integers(-50, 50), st.tuples(st.integers(0, 9), blobs, st.just(b"text"), st.none() | blobs), min_size=1
)


def make_layout(page_format: int = 3) -> Layout:
    return Layout(b"\3", FEATURES, 99, page_format=page_format)


def encoded(layout: Layout, rows: dict[int, Row]) -> tuple[Any, bytes]:
    """Return (rows in the row format, arena) for SortedRows."""
    made, arena = np.zeros(len(rows), row_dtype(layout)), b""
    for record, (key, (a, *strings)) in zip(made, rows.items(), strict=True):
        record["k0"], record["time"], record["f0"] = key, 7, a
        for f, string in enumerate(strings, 1):
            record[f"f{f}"] = (len(arena), len(string or b""))
            arena += string or b""
        record["nulls"] = NULL_OTHER if strings[-1] is None else 0
    return made, arena


def built(layout: Layout, rows: dict[int, Row]) -> dict[bytes, bytes]:
    return dict(SortedRows(layout, [encoded(layout, rows)]).merge(0, bytes(8), None, 1, 40)[1])


def read(layout: Layout, pages: dict[bytes, bytes], table_id: int = 1) -> dict[int, Row]:
    """Decode the rows of pages as docs/format.md describes them."""
    found: dict[int, Row] = {}
    for key, page in pages.items():
        layout.check(page, key, table_id)
        n, tags = (int.from_bytes(page[at : at + 2], "little") for at in (0, 2))
        for record in np.frombuffer(page, row_dtype(layout), n, 8 + tags):
            blob, text, other = (page[at : at + length] for at, length in (record[f"f{f}"].tolist() for f in (1, 2, 3)))
            null = record["nulls"][0] & NULL_OTHER
            found[int(record["k0"])] = int(record["f0"]), blob, text, None if null else other
    return found


@settings(max_examples=60, deadline=None)
@given(rows_of_blobs, rows_of_blobs, st.sampled_from([2, 3]))
def test_blobs_are_merged_and_removed_like_strings(old: dict[int, Row], new: dict[int, Row], page_format: int) -> None:
    layout = make_layout(page_format)
    pages = built(layout, old)
    assert read(layout, pages) == old
    rows, at = SortedRows(layout, [encoded(layout, new)]), 0
    while at < len(rows):
        key = max(k for k in pages if k <= rows.hash(at))
        at, images = rows.merge(at, key, pages[key], 1, 40)
        pages.update(images)
    assert read(layout, pages) == old | new
    rows, at = SortedRows(layout, [encoded(layout, old)]), 0
    while at < len(rows):
        key = max(k for k in pages if k <= rows.hash(at))
        at, _, image = rows.remove(at, key, pages[key], 1)
        pages[key] = pages[key] if image is None else image
    assert read(layout, pages) == {key: row for key, row in new.items() if key not in old}


def test_a_row_that_does_not_give_a_blob_keeps_it() -> None:
    layout = make_layout()
    pages = built(layout, {1: (5, b"\xff\0", b"old", b"\x80")})
    part = encoded(layout, {1: (6, b"", b"new", b"given")})
    ((key, page),) = pages.items()
    _, images = SortedRows(layout, [part], [1], given=[bytes([0b1101])]).merge(0, key, page, 1, 40)
    assert read(layout, dict(images)) == {1: (6, b"\xff\0", b"new", b"given")}


def test_a_bulk_load_takes_bytes_that_are_no_text() -> None:
    layout, random = make_layout(), np.random.default_rng(3)
    rows: dict[int, Row] = {k: (k % 7, os.urandom(random.integers(0, 400)), b"t", None) for k in range(2000)}
    parts = RowPartitions(layout, 2, 0, 4096, 1 << 24)
    columns: list[Any] = [
        (np.array(list(rows), np.int64), None, None),
        (np.zeros(len(rows), np.int64), None, None),
        (np.array([a for a, *_ in rows.values()], np.int64), None, None),
    ]
    for f in (1, 2, 3):
        strings = [row[f] or b"" for row in rows.values()]
        offsets = np.cumsum([0, *map(len, strings)]).astype(np.int32)
        nulls = np.array([row[f] is None for row in rows.values()])
        columns.append((b"".join(strings), offsets, nulls if nulls.any() else None))
    assert parts.add(columns, 0, len(rows)) == len(rows)
    images = PageImages(layout, 1, 1 << 24)
    assert images.fill(parts.take(0, 4, -1), 0, 0, 40)
    pages = {key[5:]: bytes(image) for key, image in images}
    assert read(layout, pages) == rows


def test_pages_of_format_2_with_blobs_are_rewritten() -> None:
    rows: dict[int, Row] = {k: (k, os.urandom(k % 400), b"text", None) for k in range(1000)}
    stored, old, new = Pages(), make_layout(2), make_layout(3)
    stored.write(built(old, rows))
    images = PageImages(new, 2, 1 << 24)
    assert PageRewrite(old, 1, stored.tree(), 40).fill(images)
    assert read(new, {key[5:]: bytes(image) for key, image in images}, 2) == rows


def test_lookups_pass_over_blobs_and_read_none() -> None:
    layout = make_layout()
    rows: dict[int, Row] = {k: (k, b"\xff" * k, f"text {k}".encode(), b"") for k in range(200)}
    stored, directory = Pages(), Directory(layout, 1)
    stored.write(built(layout, rows))
    directory.build(stored.tree())
    columns = Columns(["k"], [dtypes.Int64])
    columns.append({"k": [3, 199, 500]})
    numbers, texts, status = np.empty(3, np.int64), np.empty(3, object), np.empty((1, 3), np.uint8)
    plan = Lookup(layout, [0], [(0, 0, 0, -1), (2, 1, 0, "none")], 0)
    lookup([directory], [plan], columns, [numbers, texts], status, 0)
    assert (numbers.tolist(), texts.tolist()) == ([3, 199, -1], ["text 3", "text 199", "none"])
    for f in (1, 3):
        with pytest.raises(ValueError, match=f"feature number {f} is a blob, which no lookup reads"):
            Lookup(layout, [0], [(0, 0, 0, None), (f, 1, 0, None)], 0)


def test_scans_pass_over_blobs_and_read_none() -> None:
    layout, stored = make_layout(), Pages()
    rows: dict[int, Row] = {k: (k, b"\xff" * k, f"text {k}".encode(), b"") for k in range(200)}
    stored.write(built(layout, rows))
    tree = stored.tree()
    scan, found = Scan(layout, tree, 1, [0, 2, 4]), {}
    while (batch := scan.read(50, 1 << 20)) is not None:
        n, ((keys, _, _), (a, _, _), (text, ends, _)) = batch
        assert ends is not None
        for i in range(n):
            found[int(keys[i])] = int(a[i]), bytes(text[ends[i] : ends[i + 1]])
    assert found == {key: (a, text) for key, (a, _, text, _) in rows.items()}
    for column in (3, 5):
        with pytest.raises(ValueError, match=f"column number {column} is a blob, which no scan reads"):
            Scan(layout, tree, 1, [0, column])


def test_a_blob_outside_its_heap_is_found() -> None:
    layout = make_layout()
    ((key, page),) = built(layout, {1: (5, b"\xff\0", b"text", b"\x80")}).items()
    at = 8 + int.from_bytes(page[2:4], "little") + layout.feature_offsets[1]
    for offset, length in ((0, 4), (len(page) - 20, 4), (len(page) - 25, 2)):
        damaged = bytearray(page)
        damaged[at : at + 8] = offset.to_bytes(4, "little") + length.to_bytes(4, "little")
        damaged[-4:] = crc32c(damaged[:-4]).to_bytes(4, "little")
        with pytest.raises(ValueError, match="a string lies outside its heap"):
            layout.check(damaged, key, 1)
