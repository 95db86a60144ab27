"""The key hash, which is part of the table format, compared with docs/format.md written in Python."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_tables import layout_of

from shorttail._native.pages import SortedRows
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.store.table import encode_keys

WORD = (1 << 64) - 1


def fold(a: int, b: int) -> int:
    product = a * b
    return (product & WORD) ^ (product >> 64)


def key_hash(seed: int, key: list[int | str]) -> int:
    second = fold(seed ^ 0x2545F4914F6CDD1D, 0xD6E8FEB86659FD93) | 1
    h = seed
    for value in key:
        if isinstance(value, int):
            h = fold((value & WORD) ^ h, second ^ 0x9E3779B97F4A7C15)
            continue
        text = value.encode()
        h = fold(h ^ len(text), second ^ 0xD1B54A32D192ED03)
        for at in range(0, len(text), 16):
            block = text[at : at + 16].ljust(16, b"\0")
            h = fold(int.from_bytes(block[:8], "little") ^ h, int.from_bytes(block[8:], "little") ^ second)
    return fold(h ^ second, 0x8BB84B93962EACC9 ^ seed)


parts = st.one_of(
    st.integers(-(1 << 63), (1 << 63) - 1), st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
)


@settings(max_examples=400, print_blob=True)
@given(st.integers(0, (1 << 63) - 1), st.lists(parts, min_size=1, max_size=4))
@example(1, ["".join(chr(33 + i % 90) for i in range(n)) for n in (0, 1, 2, 3)])
@example(2, ["".join(chr(33 + i % 90) for i in range(n)) for n in (4, 7, 8, 9)])
@example(3, ["".join(chr(33 + i % 90) for i in range(n)) for n in (15, 16, 17, 20)])
@example(4, ["".join(chr(33 + i % 90) for i in range(n)) for n in (24, 31, 32, 35)])
def test_hash_is_the_documented_one(seed: int, key: list[int | str]) -> None:
    names = {f"k{i}": dtypes.Int64 if isinstance(value, int) else dtypes.String for i, value in enumerate(key)}
    view = FeatureView("v", entity=Entity("e", keys=names), features=[Feature("x", dtypes.Float32)])
    layout = layout_of(view, seed)
    columns = [np.array([value], np.int64 if isinstance(value, int) else object) for value in key]
    rows, arena = encode_keys(layout, view, columns)
    sorted_rows = SortedRows(layout, [(rows, b"".join(arena.parts))])
    assert sorted_rows.hash(0) == key_hash(seed, key).to_bytes(8, "big")
