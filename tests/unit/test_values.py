"""Conversion of values to the types of columns: a column gives the result of each single value, and text is parsed."""

from __future__ import annotations

import datetime as dt
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as some

import shorttail as st
from shorttail.define import types_page
from shorttail.define.dtypes import SCALARS, DType, Float64, Int64, String, Timestamp, Vector
from shorttail.define.refusal import Refused, described
from shorttail.define.scalar import as_value
from shorttail.define.text import csv_rows, parse_text, parse_time
from shorttail.define.values import as_column, exact_column

pa = pytest.importorskip("pyarrow")
from shorttail.sources.csv import from_texts  # noqa: E402

TYPES = [*SCALARS.values(), Vector(2)]
dtypes = some.sampled_from(TYPES)
EPOCH = dt.datetime(1970, 1, 1)


def outcome(call: Any, *arguments: Any) -> Any:
    """Return the repr of a call's result, in which NaN equals NaN, or the refusal."""
    try:
        return repr(call(*arguments))
    except Refused as error:
        return f"refused: {error.got}"


# -- a column gives the result of its values ---------------------------------------------------------------------------

whole = some.integers(-(2**70), 2**70) | some.sampled_from([2**31 - 1, 2**31, -(2**31) - 1, 2**53, 2**53 + 1, 2**63])
real = some.floats() | some.sampled_from([3.4028235677973366e38, 3.4028234663852886e38, -0.0, 2.0**53, 2.0**63])
times = some.datetimes() | some.dates() | some.datetimes(timezones=some.just(dt.UTC))
odd = (
    some.decimals() | some.timedeltas() | some.binary(max_size=3) | some.just(pd.NaT) | some.just(pd.NA) | some.just(1j)
)
single = some.none() | some.booleans() | whole | real | some.text(max_size=5) | times | odd
lists = some.lists(single, min_size=1) | some.lists(some.none() | whole) | some.lists(some.none() | real)
lists |= some.lists(some.none() | some.text()) | some.lists(some.none() | some.booleans()) | some.lists(times)
arrays = some.sampled_from(
    ["i1", ">i2", "i4", ">i8", "u8", "f2", ">f4", "f8", "?", "M8[s]", "M8[ns]", "M8[D]", "m8[s]"]
)


def by_value(dtype: DType, values: list[Any]) -> list[Any]:
    return [as_value(dtype, value) for value in values]


def by_column(dtype: DType, values: Any) -> list[Any]:
    column, nulls, is_scalar = as_column(dtype, values)
    assert not is_scalar
    assert column.dtype == (object if dtype == String else dtype.numpy)
    rows: list[Any] = column.tolist()
    return rows if nulls is None else [None if null else row for row, null in zip(rows, nulls.tolist(), strict=True)]


def as_the_type_holds(dtype: DType, values: list[Any]) -> list[Any]:
    if not dtype.is_float:
        return values
    with np.errstate(over="ignore"):
        return [None if value is None else np.array(value, np.float64).astype(dtype.numpy).tolist() for value in values]


@given(some.sampled_from(list(SCALARS.values())), lists)
def test_a_list_gives_the_result_of_each_value(dtype: DType, values: list[Any]) -> None:
    alone = outcome(lambda: as_the_type_holds(dtype, by_value(dtype, values)))
    assert outcome(by_column, dtype, values) == alone
    objects = np.empty(len(values), object)
    objects[:] = values
    assert outcome(by_column, dtype, objects) == alone


@given(some.sampled_from(list(SCALARS.values())), arrays, some.binary(min_size=16, max_size=80), some.booleans())
def test_an_array_gives_the_result_of_each_value(dtype: DType, numpy: str, data: bytes, masked: bool) -> None:
    size = np.dtype(numpy).itemsize
    array = np.frombuffer(data[: len(data) // size * size], numpy)
    if numpy == "?":
        array = array.view(np.uint8) > 100
    values = list(array)
    if masked:
        array = np.ma.array(array, mask=np.arange(len(array)) % 3 == 0)
        values = [None if row % 3 == 0 else value for row, value in enumerate(values)]
    alone = outcome(lambda: as_the_type_holds(dtype, by_value(dtype, values)))
    column = outcome(by_column, dtype, array)
    assert column == alone or (column.startswith("refused") and alone.startswith("refused"))


@given(
    some.sampled_from(list(SCALARS.values())), arrays.filter(lambda name: name[0] not in ">m"), some.binary(min_size=16)
)
def test_an_arrow_array_gives_the_result_of_each_value(dtype: DType, numpy: str, data: bytes) -> None:
    size = np.dtype(numpy).itemsize
    array = np.frombuffer(data[: len(data) // size * size], numpy)
    if numpy == "?":
        array = array.view(np.uint8) > 100
    if numpy == "M8[D]":
        array = array.view(np.int64).astype(np.int32).astype("M8[D]")
    mask = np.arange(len(array)) % 4 == 1
    column = pa.array(array, mask=mask)
    alone = outcome(lambda: as_the_type_holds(dtype, by_value(dtype, [None if m else v for v, m in zip(array, mask)])))  # noqa: B905
    found = outcome(by_column, dtype, column)
    assert found == alone or (found.startswith("refused") and alone.startswith("refused"))
    values = outcome(lambda: as_the_type_holds(dtype, by_value(dtype, list(column))))
    assert found == values or (found.startswith("refused") and values.startswith("refused"))


@given(dtypes, single)
def test_the_fast_path_of_a_single_value_gives_the_result_of_as_column(dtype: DType, value: Any) -> None:
    short = exact_column(dtype, value)
    if short is None:
        return
    long, nulls, _ = as_column(dtype, [value])
    assert nulls is None
    assert (short.dtype, short.shape) == (long.dtype, (1,))
    assert short.tobytes() == long.tobytes() if short.dtype != object else short.tolist() == long.tolist()


@pytest.mark.parametrize(("name", "value"), [("Float32", 1.5), ("Int64", -7), ("Bool", True), ("String", "a")])
def test_the_fast_path_applies_to_exact_types(name: str, value: Any) -> None:
    assert exact_column(SCALARS[name], value) is not None


@given(some.lists(some.none() | some.lists(some.none() | real | whole, min_size=2, max_size=2), min_size=1))
def test_a_column_of_vectors_gives_the_result_of_each_vector(rows: list[Any]) -> None:
    column, nulls, is_scalar = as_column(Vector(2), rows)
    assert not is_scalar
    assert column.dtype == np.float32
    assert (np.zeros(len(rows), bool) if nulls is None else nulls).tolist() == [row is None for row in rows]
    for found, row in zip(column.tolist(), rows, strict=True):
        wanted = [math.nan] * 2 if row is None else as_the_type_holds(st.Float32, list(as_value(Vector(2), row)))
        assert repr(found) == repr(wanted)


@pytest.mark.parametrize("unit", ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"])
@given(
    ticks=some.integers(-(2**63) + 1, 2**63 - 1) | some.integers(-(10**9), 10**9),
    count=some.sampled_from([1, 1, 7, 25]),
)
def test_times_are_never_wrapped(unit: str, ticks: int, count: int) -> None:
    """Compare with exact integer arithmetic; years and months with Python's calendar, for the years 1 to 9999."""
    array = np.array([ticks], f"M8[{count}{unit}]")
    per_us = {
        "W": 604_800 * 10**6,
        "D": 86_400 * 10**6,
        "h": 3600 * 10**6,
        "m": 60 * 10**6,
        "s": 10**6,
        "ms": 1000,
        "us": 1,
    }
    if unit in "YM":
        months = ticks * count * (12 if unit == "Y" else 1)
        year, month = divmod(months, 12)
        if not 1 <= year + 1970 <= 9999:
            if abs(months) > 12 * 300_000:
                assert outcome(as_column, Timestamp, array).startswith("refused")
            return
        exact = (dt.datetime(year + 1970, month + 1, 1) - EPOCH) // dt.timedelta(microseconds=1)
    elif unit in per_us:
        exact = ticks * count * per_us[unit]
    else:
        exact = ticks * count // {"ns": 10**3, "ps": 10**6, "fs": 10**9, "as": 10**12}[unit]
    if -(2**63) < exact < 2**63:
        assert as_column(Timestamp, array)[0].tolist() == [exact]
        assert as_value(Timestamp, array[0]) == exact
    else:
        assert outcome(as_column, Timestamp, array).startswith("refused")


@given(single)
def test_every_refusal_is_a_short_line(value: Any) -> None:
    for dtype in TYPES:
        try:
            as_value(dtype, value)
        except Refused as error:
            message = error.error("column 'x'", dtype).message
            assert message.startswith(f"column 'x' takes {dtype}; got ")
            assert len(message) < 140
            assert message.isprintable()


def test_messages_name_column_type_value_and_row() -> None:
    error = Refused(described(3.5), 2).error("column 'x'", Int64)
    assert error.message == "column 'x' takes Int64; got 3.5 (float) at row 2"
    assert described(np.float32(3.5)) == "3.5 (float32)"
    with pytest.raises(Refused) as caught:
        as_column(Int64, np.array([1, 3.5]))
    assert caught.value.error("column 'x'", Int64).message == "column 'x' takes Int64; got 3.5 (float64) at row 1"
    assert described(10**5000) == "2**16609... (int)"
    assert described("x" * 10**6).endswith("xxx... (str)")


def test_huge_numbers_are_refused_or_become_infinity() -> None:
    for value in (Decimal("1e999999999"), 10**5000, -(10**5000)):
        for dtype in (st.Bool, st.Int32, Int64, String, Timestamp):
            assert outcome(as_value, dtype, value).startswith("refused"), dtype
            assert outcome(as_column, dtype, [value, value]).startswith("refused"), dtype
        assert as_value(Float64, value) == (math.inf if value > 0 else -math.inf)
    assert as_value(Float64, Decimal("1e-999999999")) == 0
    assert as_value(Int64, Decimal("sNaN")) is None


# -- text --------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
digits = some.text("0123456789", min_size=1, max_size=22)
numbers = some.from_regex(NUMBER, fullmatch=True).filter(lambda text: len(text) < 60)
fractions = some.sampled_from(["", ".5", ".123456", ".1234567", ".", ",5"])
zones = some.sampled_from(["", "Z", "+05:30", "-0800", "+01", "z", " Z"])
isoish = some.builds(
    lambda time, between, fraction, zone: f"{time:%Y-%m-%d}{between}{time:%H:%M:%S}{fraction}{zone}",
    some.datetimes(min_value=dt.datetime(1000, 1, 1)),
    some.sampled_from(["T", " ", "t", "_"]),
    fractions,
    zones,
)
typed = some.sampled_from(
    ["true", "False", "TRUE", "1", "0", "nan", "-inf", "Infinity", "1_0", " 1", "+1", "1e400", "2024-02-30"]
)
field = numbers | digits | isoish | typed | some.text(max_size=8)


@given(numbers)
def test_numbers_are_read_as_python_reads_them(text: str) -> None:
    assert repr(parse_text(Float64, text)) == repr(float(text))
    if re.fullmatch(r"-?[0-9]+", text) and abs(int(text)) < 2**63:
        assert parse_text(Int64, text) == int(text)


@given(some.text(max_size=12))
def test_text_that_is_not_a_number_is_refused(text: str) -> None:
    if NUMBER.fullmatch(text) is None:
        assert outcome(parse_text, Int64, text).startswith("refused")
        if text.lower() not in ("nan", "inf", "-inf", "infinity", "-infinity"):
            assert outcome(parse_text, Float64, text).startswith("refused")


@given(some.datetimes(timezones=some.none() | some.timezones()))
def test_times_are_read_as_python_reads_them(time: dt.datetime) -> None:
    if time.utcoffset() is not None and time.utcoffset().seconds % 60:  # type: ignore[union-attr]
        return  # ISO 8601 has no seconds in an offset
    for text in (time.isoformat(), time.isoformat(" "), time.isoformat(timespec="milliseconds")):
        read = dt.datetime.fromisoformat(text)
        aware = read if read.tzinfo else read.replace(tzinfo=dt.UTC)
        assert parse_time(text) == (aware - EPOCH.replace(tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)
        assert parse_text(Timestamp, text) == as_value(Timestamp, text) == parse_time(text)


@given(dtypes, some.lists(some.none() | field.filter(lambda text: text != ""), min_size=1))
def test_a_column_of_texts_gives_the_result_of_each_text(dtype: DType, texts: list[Any]) -> None:
    """Arrow converts a column of texts as parse_text converts each text."""
    try:
        column = pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return

    def alone() -> list[Any]:
        values = [None if text is None else parse_text(dtype, text) for text in texts]
        if dtype.is_vector:
            return [None if value is None else as_the_type_holds(st.Float32, list(value)) for value in values]
        return as_the_type_holds(dtype, values)

    def at_once() -> list[Any]:
        values, nulls = from_texts(dtype, column)
        rows = values.to_pylist() if dtype == String else values.tolist()
        return (
            rows if nulls is None else [None if null else row for row, null in zip(rows, nulls.tolist(), strict=True)]
        )

    assert outcome(at_once) == outcome(alone)


@given(some.lists(some.lists(some.none() | some.text(max_size=5), min_size=1, max_size=4), min_size=1, max_size=5))
def test_written_csv_reads_back(rows: list[list[Any]]) -> None:
    def written(text: str | None) -> str:
        return "" if text is None else '"' + text.replace('"', '""') + '"'

    for end in ("\n", "\r\n"):
        body = "".join(",".join(map(written, row)) + end for row in rows)
        assert list(csv_rows(body)) == rows
    assert list(csv_rows(body.removesuffix("\r\n"))) == rows or rows[-1] == [None]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", []),
        ("\n", [[None]]),
        ("1\n\n2", [["1"], [None], ["2"]]),
        ("a,\n,b\n", [["a", None], [None, "b"]]),
        (' a , b"c \n', [[" a ", ' b"c ']]),
        ('"",""""\n', [["", '"']]),
        ('"a\nb",c\r\n', [["a\nb", "c"]]),
    ],
)
def test_csv_fields_and_rows(text: str, rows: list[Any]) -> None:
    assert list(csv_rows(text)) == rows


@pytest.mark.parametrize("text", ['a\n"b', 'a\n"b"c\n', 'a\n"b" ,c\n'])
def test_a_wrong_quote_in_csv_names_its_line(text: str) -> None:
    with pytest.raises(ValueError, match="line 2: a field in quotes must end with a quote"):
        list(csv_rows(text))


def test_vectors_are_parsed_from_text() -> None:
    assert repr(parse_text(Vector(3), "1,,-2.5")) == "(1.0, nan, -2.5)"
    for text in ("1,2", "1,a,2", "1;2;3", ""):
        assert outcome(parse_text, Vector(3), text).startswith("refused"), text


def test_the_page_of_types_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "types.md"
    assert page.read_text() == types_page.page(), "run: python -m shorttail.define.types_page > docs/types.md"
