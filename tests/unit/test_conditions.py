"""Conditions on rows: how their text is read, and which values satisfy them, for each type."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as hs
from test_load import batch_of, make_store
from test_scan import ALL

from shorttail.define import dtypes
from shorttail.define.conditions import Condition, parse_condition
from shorttail.errors import InvalidArgument, NotFound
from shorttail.store.rows import ViewRows, row_columns, satisfying
from shorttail.store.scan import ScannedColumn

TYPES = {
    "tier": dtypes.String,
    "age": dtypes.Int32,
    "score": dtypes.Float32,
    "at": dtypes.Timestamp,
    "new": dtypes.Bool,
    "taste": dtypes.Vector(2),
    "a<b": dtypes.Int64,
    "a": dtypes.Int64,
    "x =": dtypes.Int64,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tier=gold", ("tier", "=", "gold")),
        ("tier==gold", ("tier", "=", "gold")),
        ("tier!=gold", ("tier", "!=", "gold")),
        ('tier="a, b"', ("tier", "=", "a, b")),
        ('tier="=x"', ("tier", "=", "=x")),
        ('tier=""', ("tier", "=", "")),
        ('tier=" x"', ("tier", "=", " x")),
        ("tier=", ("tier", "=", None)),
        ("tier!=", ("tier", "!=", None)),
        ("taste!=", ("taste", "!=", None)),
        ("age >= 30", ("age", ">=", 30)),
        ("age<-1", ("age", "<", -1)),
        ("score<=0.5", ("score", "<=", 0.5)),
        ("new=true", ("new", "=", True)),
        ("at>2026-01-01", ("at", ">", 1_767_225_600_000_000)),
        ("a<b<3", ("a<b", "<", 3)),
        ("a<3", ("a", "<", 3)),
        ("x ==3", ("x =", "=", 3)),
    ],
)
def test_text_of_a_condition(text: str, expected: tuple[str, str, Any]) -> None:
    assert parse_condition(text, TYPES, "view 'v'") == Condition(*expected)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tier", InvalidArgument, "'tier' is not a condition; write 'column=value' with one of = != < <= > >="),
        ("tiar=gold", NotFound, "view 'v' has no column 'tiar'; did you mean 'tier'?"),
        ("=gold", NotFound, "view 'v' has no column ''; columns: tier, age"),
        ("age=old", InvalidArgument, "column 'age' takes Int32; got 'old'"),
        ("age=1.5", InvalidArgument, "column 'age' takes Int32; got '1.5'"),
        ("age=3000000000", InvalidArgument, "column 'age' takes Int32"),
        ("new=yes", InvalidArgument, "column 'new' takes Bool"),
        ("at=yesterday", InvalidArgument, "column 'at' takes Timestamp"),
        ("tier=gold,silver", InvalidArgument, "give one value; put a text that holds a comma into quotes"),
        ("tier<", InvalidArgument, "a missing value has no order; use tier= or tier!="),
        ("score>nan", InvalidArgument, "a missing value has no order"),
        ("taste=1,2", InvalidArgument, "'taste' is a vector; taste= and taste!= tell whether it is missing"),
        ('tier="x', InvalidArgument, "must end with a quote"),
    ],
)
def test_a_wrong_condition_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        parse_condition(text, TYPES, "view 'v'")
    assert message in str(raised.value)


COMPARE = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip
VALUES: dict[Any, Any] = {
    dtypes.Bool: hs.booleans(),
    dtypes.Int32: hs.integers(-5, 5) | hs.integers(-(2**31), 2**31 - 1),
    dtypes.Int64: hs.integers(-5, 5) | hs.integers(-(2**63), 2**63 - 1),
    dtypes.Float32: hs.sampled_from([0.0, -0.0, 0.1, 1.5, -2.0, float("inf")]) | hs.floats(allow_nan=False, width=32),
    dtypes.Float64: hs.sampled_from([0.0, -0.0, 0.1, float("-inf")]) | hs.floats(allow_nan=False),
    dtypes.String: hs.sampled_from(["", "a", "ab", "é", "日本", "b", "aa"]) | hs.text(max_size=4),
    dtypes.Timestamp: hs.integers(-(2**62), 2**62),
}


def column_of(dtype: dtypes.DType, values: list[Any]) -> ScannedColumn:
    """Return values, of which None is a missing one, as a scan gives them."""
    there = np.array([value is not None for value in values], np.bool_)
    valid = None if there.all() else np.packbits(there, bitorder="little")
    if dtype != dtypes.String:
        numbers = np.array([0 if value is None else value for value in values], dtype.numpy)
        return ScannedColumn(dtype, len(values), numbers, None, valid)
    texts = [(value or "").encode() for value in values]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return ScannedColumn(dtype, len(values), np.frombuffer(b"".join(texts), np.uint8), ends, valid)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@given(data=hs.data())
def test_conditions_agree_with_python(dtype: dtypes.DType, data: hs.DataObject) -> None:
    values = data.draw(hs.lists(hs.none() | VALUES[dtype], max_size=20))
    given_value = data.draw(VALUES[dtype] | hs.sampled_from([v for v in values if v is not None] or [None]))
    sign = data.draw(hs.sampled_from(list(COMPARE)))
    if given_value is None:
        sign = "=" if sign == "=" else "!="
        expected = [(value is None) == (sign == "=") for value in values]
    else:
        compared = [np.float32(v) if dtype == dtypes.Float32 and v is not None else v for v in [given_value, *values]]
        if dtype == dtypes.String:
            compared = [v if v is None else v.encode() for v in compared]
        expected = [value is not None and bool(COMPARE[sign](value, compared[0])) for value in compared[1:]]
    assert satisfying(Condition("c", sign, given_value), column_of(dtype, values)).tolist() == expected


@given(texts=hs.lists(hs.text(hs.characters(codec="utf-8"))), value=hs.text(hs.characters(codec="utf-8")))
@example(texts=["\ud7ff", "\ue000", "𐀀", "z"], value="\uffff")
def test_the_order_of_texts_is_that_of_their_characters(texts: list[str], value: str) -> None:
    found = satisfying(Condition("c", "<", value), column_of(dtypes.String, texts)).tolist()
    assert found == [text < value for text in texts]


def test_rows_of_a_store_that_satisfy_conditions(tmp_path: Path) -> None:
    from test_scan import rows_of_every_type

    with make_store(tmp_path / "store", ALL) as store:
        rows = rows_of_every_type(np.random.default_rng(4), 3000)
        store.load("all", [batch_of(ALL, rows)])
        with ViewRows(store, "all") as everything:
            whole = [row for batch in everything for row in zip(*batch.to_lists().values(), strict=True)]
        names = list(row_columns(ALL))
        assert everything.names == names
        sites = names.index("site")
        year = 31_556_952_000_000
        tests: list[tuple[list[str], Any]] = [
            (["site=a"], lambda row: row["site"] == "a"),
            (['site=""', "user_id>0"], lambda row: row["site"] == "" and row["user_id"] > 0),
            (["int32="], lambda row: row["int32"] is None),
            (["text!=", "bool=true"], lambda row: row["text"] is not None and row["bool"] is True),
            (["vector="], lambda row: row["vector"] is None),
            (["float32>0.5"], lambda row: row["float32"] is not None and row["float32"] > 0.5),
            (["string>=x"], lambda row: row["string"] is not None and row["string"] >= "x"),
            ([f"timestamp<{year}"], lambda row: row["timestamp"] is not None and row["timestamp"] < year),
            (["event_time=1970-01-01T00:00:00.000002Z"], lambda row: row["event_time"] == 2),
        ]
        for where, holds in tests:
            expected = [row for row in whole if holds(dict(zip(names, row, strict=True)))]
            assert 0 < len(expected) < len(whole), where
            with ViewRows(store, "all", where=where) as some:
                found = [row for batch in some for row in zip(*batch.to_lists().values(), strict=True)]
            assert found == expected, where
            with ViewRows(store, "all", ["site", "user_id"], where, limit=3) as some:
                assert [list(batch.to_lists()) for batch in some] == [["site", "user_id"]]
            with ViewRows(store, "all", ["site"], where, limit=3) as some:
                assert [v for batch in some for v in batch.to_lists()["site"]] == [r[sites] for r in expected[:3]]


def test_limits_and_columns(tmp_path: Path) -> None:
    with make_store(tmp_path / "store", ALL) as store:
        for limit in (None, 0, 5):
            with ViewRows(store, "all", limit=limit) as rows:
                assert list(rows) == []
        for limit in (-1, True, 1.5, "3"):
            with pytest.raises(InvalidArgument, match="limit must be a number of rows"):
                ViewRows(store, "all", limit=limit)  # type: ignore[arg-type]
        with pytest.raises(NotFound, match="feature view 'all' has no column 'strin'; did you mean 'string'"):
            ViewRows(store, "all", ["strin"])
        with pytest.raises(InvalidArgument, match="name at least one column"):
            ViewRows(store, "all", [])
