"""Pages of format 2 rewritten in format 3: the same rows in the same buckets, and what does not fit any more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_tables import layout_of
from test_pages import COMMIT, PAGE_FORMATS, Table, assert_same, make_view, tables

from shorttail._native.pages import Layout, PageImages, PageRewrite, crc32c
from shorttail.define import dtypes
from shorttail.define.views import Feature
from shorttail.store.table import count_rows

DEPTH_GROW = 40


def rewritten(table: Table, layout: Layout, capacity_bytes: int = 1 << 20, depth_grow: int = DEPTH_GROW) -> Any:
    """Return the pages of a table in another layout, as (bucket key, image), and how often the images were full."""
    images = PageImages(layout, 2, capacity_bytes, COMMIT + 1)
    rewrite = PageRewrite(table.layout, 1, table.stored.tree(), depth_grow)
    pages, full, done = [], 0, False
    while not done:
        done = rewrite.fill(images)
        full += not done
        assert all(bytes(key[:5]) == b"t\0\0\0\2" for key, _ in images)
        pages += [(key[5:], bytes(image)) for key, image in images]
        images.clear()
    return pages, full


def in_format(table: Table, page_format: int) -> Layout:
    return Layout(table.layout.key_codes, table.layout.features, table.seed, page_format=page_format)


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from([1, 8192, 1 << 20]))
def test_rewritten_pages_answer_as_before(table_and_keys: tuple[Table, list[tuple[Any, ...]]], capacity: int) -> None:
    table, keys = table_and_keys
    layout = in_format(table, 3)
    pages, _ = rewritten(table, layout, capacity)
    for key, page in pages:
        layout.check(page, key, 2)
        assert layout.commit(page) == COMMIT + 1
    assert sum(count_rows(memoryview(page)) for _, page in pages) == len(table.rows)
    table.move(layout, 2, dict(pages))
    for dtype in (np.float64, object):
        assert_same(table, keys, dtype, now_us=100_000_000)


def test_buckets_stay_as_they_are_unless_they_are_full() -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64), Feature("b", dtypes.Int64)])
    table = Table(view, {(k,): (k, [k, -k]) for k in range(28_000)}, page_format=2)
    layout = in_format(table, 3)
    assert layout.rows_per_page == table.layout.rows_per_page - 1
    pages, full = rewritten(table, layout, 40 * 4096)
    assert full > 2
    before, after = dict(table.pages), dict(pages)
    assert before.keys() <= after.keys()
    overfull = [key for key, page in before.items() if count_rows(memoryview(page)) > layout.rows_per_page]
    assert overfull
    assert len(after) == len(before) + len(overfull)
    for key, page in before.items():
        if key not in overfull:
            assert (page[:5], page[8:-24]) == (after[key][:5], after[key][8:-24])
    table.move(layout, 2, after)
    for start in range(0, 28_100, 10_000):
        assert_same(table, [(k,) for k in range(start, start + 10_000)], np.int64)


@pytest.mark.parametrize("depth_grow", [0, DEPTH_GROW])
def test_a_full_bucket_is_split_or_gets_a_longer_page(depth_grow: int) -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64), Feature("b", dtypes.Int64)])
    n = layout_of(view, 7, page_format=2).rows_per_page
    table = Table(view, {(k,): (0, [k, k + 1]) for k in range(n)}, page_format=2)
    assert len(table.pages) == 1
    layout = in_format(table, 3)
    pages, _ = rewritten(table, layout, 1, depth_grow)
    assert [len(page) for _, page in pages] == ([2 * 4096 - 16] if depth_grow == 0 else [4080, 4080])
    table.move(layout, 2, dict(pages))
    assert_same(table, [(k,) for k in range(n + 10)], np.int64)


def test_pages_may_become_longer_for_all() -> None:
    view = make_view([dtypes.Int64], [Feature("v", dtypes.Vector(1018))])
    table = Table(view, {(k,): (0, [[float(k)] * 1018]) for k in range(40)}, page_format=2)
    layout = in_format(table, 3)
    assert layout.page_bytes == table.layout.page_bytes + 4096
    pages, _ = rewritten(table, layout)
    assert [key for key, _ in pages] == [key for key, _ in table.pages]
    table.move(layout, 2, dict(pages))
    assert_same(table, [(k,) for k in range(50)], np.float32)


def test_damage_and_layouts_that_do_not_fit_are_refused() -> None:
    view = make_view([dtypes.Int64], [Feature("a", dtypes.Int64)])
    table = Table(view, {(k,): (0, [k]) for k in range(2000)}, page_format=2)
    good = PageImages(in_format(table, 3), 2, 1 << 20)
    for layout, match in (
        (Layout(b"\3", [(4, 1)], 7), "other columns"),
        (Layout(b"\3", [(3, 1)], 8), "another seed"),
    ):
        with pytest.raises(ValueError, match=match):
            PageRewrite(table.layout, 1, table.stored.tree(), 40).fill(PageImages(layout, 2, 1 << 20))
    pages = dict(table.pages)
    key = list(pages)[3]
    for wrong, match in (
        ({**pages, key: pages[key][:-1] + bytes([pages[key][-1] ^ 1])}, f"bucket {key.hex()}: its checksum"),
        ({k: page for k, page in pages.items() if k != key}, f"bucket {key.hex()}: it is missing"),
    ):
        table.stored.write(wrong)
        with pytest.raises(ValueError, match=match):
            PageRewrite(table.layout, 1, table.stored.tree(), 40).fill(good)
        good.clear()
    table.stored.write(pages)
    small = PageImages(in_format(table, 3), 2, 4096)
    rewrite = PageRewrite(table.layout, 1, table.stored.tree(), 40)
    assert not rewrite.fill(small)
    with pytest.raises(ValueError, match="another layout"):
        rewrite.fill(PageImages(in_format(table, 3), 2, 1 << 20))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(PAGE_FORMATS))
def test_pages_of_any_bytes_are_refused_or_rewritten_to_sound_ones(data: st.DataObject, page_format: int) -> None:
    """Damage that the checksum does not show, as a page would have that somebody made on purpose."""
    view = make_view([dtypes.String], [Feature("a", dtypes.Int64), Feature("s", dtypes.String)])
    table = Table(view, {(f"k{i}",): (i, [i, f"value {i}"]) for i in range(20)}, page_format=page_format)
    ((key, page),) = table.pages
    damaged, n = bytearray(page), int.from_bytes(page[2:4], "little")
    near = st.integers(0, 8 + n + 20 * table.layout.row_bytes) | st.integers(len(page) - 60, len(page) - 5)
    for at, value in data.draw(st.lists(st.tuples(near, st.integers(0, 255)), min_size=1, max_size=4)):
        damaged[at] = value
    damaged[-4:] = crc32c(damaged[:-4]).to_bytes(4, "little")
    layout = in_format(table, 3)
    table.stored.write({key: damaged})
    try:
        pages, _ = rewritten(table, layout)
    except ValueError:
        with pytest.raises(ValueError, match=r"\w"):
            table.layout.check(damaged, key, 1)
        return
    for bucket, image in pages:
        layout.check(image, bucket, 2)


@pytest.mark.parametrize("page_format", PAGE_FORMATS)
def test_an_empty_table_has_no_pages(page_format: int) -> None:
    table = Table(make_view([dtypes.Int64], [Feature("a", dtypes.Int64)]), {}, page_format=page_format)
    assert rewritten(table, in_format(table, 3)) == ([], 0)
