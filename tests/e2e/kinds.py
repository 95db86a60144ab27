"""Every kind of value, and what becomes of it in a column of every type: said once, for all ways in (test_types.py).

A kind's outcomes are the values that a stored feature has afterwards, None where it is NULL. A type that a kind does
not name refuses it. Float stands for Float32 and Float64, Int for Int32 and Int64, Whole for these and Timestamp.
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa

TYPES = ("Bool", "Int32", "Int64", "Float32", "Float64", "String", "Timestamp", "Vector(2)")
GROUPS = {"Int": ("Int32", "Int64"), "Float": ("Float32", "Float64"), "Whole": ("Int32", "Int64", "Timestamp")}
ALL = ("Bool", "Int", "Float", "String", "Timestamp")
BIG = 2**53 + 1
INF = math.inf
NAN = math.nan

NAIVE = dt.datetime(2024, 1, 2, 3, 4, 5, 678901)
US = 1_704_164_645_678_901
DAY_US = 1_704_153_600_000_000
NEW_YEAR_US = 1_704_067_200_000_000
BEFORE = dt.datetime(1969, 12, 31, 23, 59, 59, 999_999)
INDIA = dt.timezone(dt.timedelta(hours=5, minutes=30))
AWARE = NAIVE.replace(tzinfo=dt.UTC).astimezone(INDIA)


@dataclass
class Kind:
    """value: what a caller hands over. outcomes: by type, what is stored; a type that is not there refuses it."""

    name: str
    value: Any
    outcomes: dict[str, list[Any]] = field(default_factory=dict)


def kind(name: str, value: Any, **outcomes: list[Any]) -> Kind:
    """Vector: the outcome for Vector(2)."""
    found = {}
    for group, rows in outcomes.items():
        for dtype in GROUPS.get(group, (group,)):
            found["Vector(2)" if dtype == "Vector" else dtype] = rows
    return Kind(name, value, found)


def missing(name: str, value: Any, count: int = 1) -> Kind:
    """Missing values alone."""
    return kind(name, value, Vector=[None] * count, **dict.fromkeys(ALL, [None] * count))


def numbers(name: str, value: Any) -> Kind:
    """0 and 1."""
    return kind(name, value, Bool=[False, True], Whole=[0, 1], Float=[0.0, 1.0], Vector=[[0.0, 1.0]])


def halves(name: str, value: Any) -> Kind:
    """0.5 and -1.5."""
    return kind(name, value, Float=[0.5, -1.5], Vector=[[0.5, -1.5]])


def one_and_null(name: str, value: Any, vector: bool = True) -> Kind:
    """1 and a missing value."""
    rest = {"Vector": [[1.0, NAN]]} if vector else {}
    return kind(name, value, Bool=[True, None], Whole=[1, None], Float=[1.0, None], **rest)


def texts(name: str, value: Any) -> Kind:
    return kind(name, value, String=["a", "é"])


def text_and_null(name: str, value: Any) -> Kind:
    return kind(name, value, String=["a", None])


def time_and_null(name: str, value: Any, us: int = US) -> Kind:
    return kind(name, value, Timestamp=[us, None])


def vectors(name: str, value: Any) -> Kind:
    return kind(name, value, Vector=[[1.5, 2.0], [3.0, -4.0]])


def vector_and_null(name: str, value: Any) -> Kind:
    return kind(name, value, Vector=[[1.5, 2.0], None])


def refused(name: str, value: Any) -> Kind:
    return kind(name, value)


ROWS = [[1.5, 2.0], [3.0, -4.0]]
SOME = [[1.5, 2.0], None]

SCALARS = [
    missing("None", None),
    missing("NaN", NAN),
    missing("numpy.nan of float32", np.float32("nan")),
    missing("pandas.NA", pd.NA),
    missing("pandas.NaT", pd.NaT),
    missing("datetime64 NaT", np.datetime64("NaT", "us")),
    missing("Decimal NaN", Decimal("NaN")),
    missing("masked", np.ma.masked),
    missing("Arrow null", pa.scalar(None, pa.int64())),
    kind("int", 7, Whole=[7], Float=[7.0]),
    kind("int 1", 1, Bool=[True], Whole=[1], Float=[1.0]),
    kind("negative int", -7, Whole=[-7], Float=[-7.0]),
    kind("2**31", 2**31, Int64=[2**31], Timestamp=[2**31], Float=[2.0**31]),
    kind("2**53 + 1", BIG, Int64=[BIG], Timestamp=[BIG], Float=[2.0**53]),
    kind("2**63 - 1", 2**63 - 1, Int64=[2**63 - 1], Timestamp=[2**63 - 1], Float=[2.0**63]),
    kind("-2**63", -(2**63), Int64=[-(2**63)], Timestamp=[-(2**63)], Float=[-(2.0**63)]),
    kind("2**63", 2**63, Float=[2.0**63]),
    kind("2**70", 2**70, Float=[2.0**70]),
    kind("10**400", 10**400, Float=[INF]),
    kind("3.0", 3.0, Whole=[3], Float=[3.0]),
    kind("-0.0", -0.0, Bool=[False], Whole=[0], Float=[-0.0]),
    kind("3.5", 3.5, Float=[3.5]),
    kind("2.0**53", 2.0**53, Int64=[2**53], Timestamp=[2**53], Float=[2.0**53]),
    kind("2.0**60", 2.0**60, Float=[2.0**60]),
    kind("1e300", 1e300, Float32=[INF], Float64=[1e300]),
    kind("infinity", INF, Float=[INF]),
    kind("True", True, Bool=[True], Float=[1.0]),
    kind("False", False, Bool=[False], Float=[0.0]),
    kind("numpy bool", np.bool_(True), Bool=[True], Float=[1.0]),
    kind("numpy int8", np.int8(-7), Whole=[-7], Float=[-7.0]),
    kind("numpy uint64 of 2**63", np.uint64(2**63), Float=[2.0**63]),
    kind("numpy float16", np.float16(1.5), Float=[1.5]),
    kind("numpy longdouble", np.longdouble(1.5), Float=[1.5]),
    kind("array of no dimensions", np.array(7), Whole=[7], Float=[7.0]),
    kind("Decimal 3", Decimal("3.0"), Whole=[3], Float=[3.0]),
    kind("Decimal 3.5", Decimal("3.5"), Float=[3.5]),
    kind("Decimal 2**53 + 1", Decimal(BIG), Int64=[BIG], Timestamp=[BIG], Float=[2.0**53]),
    kind("Decimal 1e400", Decimal("1e400"), Float=[INF]),
    refused("complex", 1j),
    refused("numpy complex", np.complex64(1)),
    kind("str", "é\0", String=["é\0"]),
    kind("empty str", "", String=[""]),
    kind("str of digits", "12", String=["12"]),
    kind("numpy str", np.str_("a"), String=["a"]),
    kind("long str", "é" * 30_000, String=["é" * 30_000]),
    refused("str of more than 65,535 bytes", "é" * 32_768),
    refused("lone surrogate", "\ud800"),
    refused("bytes", b"a"),
    refused("numpy bytes", np.bytes_(b"a")),
    kind("naive datetime", NAIVE, Timestamp=[US]),
    kind("aware datetime", AWARE, Timestamp=[US]),
    kind("datetime before 1970", BEFORE, Timestamp=[-1]),
    kind("datetime of year 1", dt.datetime(1, 1, 1), Timestamp=[-62_135_596_800_000_000]),
    kind("datetime of year 9999", dt.datetime(9999, 12, 31), Timestamp=[253_402_214_400_000_000]),
    kind("date", dt.date(2024, 1, 2), Timestamp=[DAY_US]),
    refused("time of day", dt.time(1)),
    refused("timedelta", dt.timedelta(days=1)),
    refused("pandas Timedelta", pd.Timedelta("1D")),
    refused("timedelta64", np.timedelta64(1, "D")),
    kind("pandas Timestamp", pd.Timestamp(NAIVE), Timestamp=[US]),
    kind("pandas Timestamp with a zone", pd.Timestamp(AWARE), Timestamp=[US]),
    kind("pandas Timestamp of ns before 1970", pd.Timestamp(-1), Timestamp=[-1]),
    refused("pandas Period", pd.Period("2024-01")),
    kind("datetime64 of ns", np.datetime64(US * 1000 + 999, "ns"), Timestamp=[US]),
    kind("datetime64 of D", np.datetime64("2024-01-02", "D"), Timestamp=[DAY_US]),
    refused("datetime64 out of range", np.datetime64(2**62, "s")),
    kind("ISO date", "2024-01-02", String=["2024-01-02"], Timestamp=[DAY_US]),
    kind("ISO time", "2024-01-02T03:04:05.6789019Z", String=["2024-01-02T03:04:05.6789019Z"], Timestamp=[US]),
    kind("ISO time with an offset", "2024-01-02 08:34:05.678901+05:30",
         String=["2024-01-02 08:34:05.678901+05:30"], Timestamp=[US]),
    kind("30th of February", "2024-02-30", String=["2024-02-30"]),
    kind("time in other words", "20240102", String=["20240102"]),
    kind("Arrow int", pa.scalar(7, pa.int16()), Whole=[7], Float=[7.0]),
    kind("Arrow timestamp", pa.scalar(NAIVE, pa.timestamp("us")), Timestamp=[US]),
    kind("Arrow string", pa.scalar("a", pa.large_string()), String=["a"]),
    refused("dict", {"a": 1}),
    refused("set", {1}),
    refused("object", object()),
]  # fmt: skip

LISTS = [
    numbers("list of ints", [0, 1]),
    numbers("list of whole floats", [0.0, 1.0]),
    numbers("tuple", (0, 1)),
    numbers("range", range(2)),
    halves("list of floats", [0.5, -1.5]),
    halves("list of Decimals", [Decimal("0.5"), Decimal("-1.5")]),
    halves("list of numpy floats", [np.float32(0.5), np.float64(-1.5)]),
    kind("int and 2.5", [1, 2.5], Float=[1.0, 2.5], Vector=[[1.0, 2.5]]),
    kind("True and 2", [True, 2], Float=[1.0, 2.0], Vector=[[1.0, 2.0]]),
    kind("1 and True", [1, True], Bool=[True, True], Float=[1.0, 1.0], Vector=[[1.0, 1.0]]),
    kind("list of bools", [False, True], Bool=[False, True], Float=[0.0, 1.0], Vector=[[0.0, 1.0]]),
    kind("bool and None", [True, None], Bool=[True, None], Float=[1.0, None], Vector=[[1.0, NAN]]),
    one_and_null("int and None", [1, None]),
    one_and_null("int and NaN", [1, NAN]),
    one_and_null("float and pandas.NA", [1.0, pd.NA]),
    kind("2**53 + 1 and None", [BIG, None], Int64=[BIG, None], Timestamp=[BIG, None], Float=[2.0**53, None],
         Vector=[[2.0**53, NAN]]),
    kind("int and 2**70", [1, 2**70], Float=[1.0, 2.0**70], Vector=[[1.0, 2.0**70]]),
    missing("Nones", [None, None], 2),
    texts("list of str", ["a", "é"]),
    text_and_null("str and None", ["a", None]),
    text_and_null("str and NaN", ["a", NAN]),
    refused("str and int", ["a", 1]),
    refused("str and a lone surrogate", ["a", "\udfff"]),
    refused("list of bytes", [b"a", b"b"]),
    kind("datetimes", [NAIVE, AWARE], Timestamp=[US, US]),
    kind("datetime and int", [NAIVE, 5], Timestamp=[US, 5]),
    kind("datetime and ISO text", [NAIVE, "2024-01-02"], Timestamp=[US, DAY_US]),
    time_and_null("pandas Timestamp and NaT", [pd.Timestamp(NAIVE), pd.NaT]),
    refused("datetime and timedelta", [NAIVE, dt.timedelta(1)]),
    vectors("list of lists", ROWS),
    vectors("list of arrays", [np.array(row) for row in ROWS]),
    vectors("list of tuples", [tuple(row) for row in ROWS]),
    vector_and_null("list and None", SOME),
    kind("list with a None in it", [[1.5, None], [3, 4]], Vector=[[1.5, NAN], [3.0, 4.0]]),
    kind("lists of bools", [[True, False], [1, 0]], Vector=[[1.0, 0.0], [1.0, 0.0]]),
    refused("lists of another length", [[1.0, 2.0], [3.0]]),
    refused("lists of text", [["1", "2"], ["3", "4"]]),
]  # fmt: skip

ARRAYS = [
    *(numbers(f"numpy {name}", np.array([0, 1], name)) for name in (
        "i1", "<i2", ">i2", "<i4", ">i4", "<i8", ">i8", "u1", "<u2", ">u2", "<u4", ">u4", "<u8", ">u8",
        "<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "longdouble",
    )),
    *(halves(f"numpy fractions {name}", np.array([0.5, -1.5], name)) for name in ("f2", ">f4", "f8", "longdouble")),
    kind("numpy bool array", np.array([False, True]), Bool=[False, True], Float=[0.0, 1.0], Vector=[[0.0, 1.0]]),
    kind("numpy uint64 of 2**63", np.array([1, 2**63], "u8"), Float=[1.0, 2.0**63], Vector=[[1.0, 2.0**63]]),
    kind("numpy 2**53 + 1", np.array([1, BIG]), Int64=[1, BIG], Timestamp=[1, BIG], Float=[1.0, 2.0**53],
         Vector=[[1.0, 2.0**53]]),
    kind("numpy 2.0**60", np.array([1, 2.0**60]), Float=[1.0, 2.0**60], Vector=[[1.0, 2.0**60]]),
    one_and_null("numpy NaN", np.array([1.0, NAN])),
    one_and_null("strided", np.array([1.0, 5.0, NAN])[::2]),
    one_and_null("masked int64", np.ma.array([1, 2], mask=[False, True])),
    one_and_null("masked int32, not of the machine's byte order", np.ma.array([1, 2], ">i4", mask=[False, True])),
    one_and_null("masked float", np.ma.array([1.0, 2.0], mask=[False, True])),
    kind("masked bool", np.ma.array([True, True], mask=[False, True]), Bool=[True, None], Float=[1.0, None],
         Vector=[[1.0, NAN]]),
    text_and_null("masked text", np.ma.array(["a", "b"], mask=[False, True])),
    time_and_null("masked datetime64", np.ma.array([US, 1], mask=[False, True]).view("M8[us]")),
    numbers("nothing masked", np.ma.array([0, 1])),
    kind("masked matrix", np.ma.array(ROWS, mask=[[False, True], [False, False]]), Vector=[[1.5, NAN], [3.0, -4.0]]),
    one_and_null("object array with None", np.array([1, None], object)),
    one_and_null("object array with pandas.NA", np.array([1.0, pd.NA], object)),
    texts("numpy U", np.array(["a", "é"])),
    texts("numpy T", np.array(["a", "é"], np.dtypes.StringDType())),
    text_and_null("object array of str", np.array(["a", None], object)),
    kind("NULs at the end", np.array(["a\0", "é"], object), String=["a\0", "é"]),
    refused("numpy S", np.array([b"a", b"b"])),
    refused("numpy complex array", np.array([1j, 2])),
    refused("numpy void", np.array([(1, 2.0)], "i4,f8")),
    *(time_and_null(f"datetime64[{unit}]", np.array(["2024-01-01", "NaT"], f"M8[{unit}]"), NEW_YEAR_US)
      for unit in ("Y", "M", "D", "h", "m", "s", "ms", "us", "ns")),
    kind("datetime64[W]", np.array(["2024-01-04", "NaT"], "M8[W]"), Timestamp=[1_704_326_400_000_000, None]),
    *(kind(f"datetime64[{unit}]", np.array([-1, 10**15], f"M8[{unit}]"), Timestamp=[-1, us])
      for unit, us in (("ps", 10**9), ("fs", 10**6), ("as", 1000))),
    kind("datetime64[ns] before 1970", np.array([-1, -1000], "M8[ns]"), Timestamp=[-1, -1]),
    kind("datetime64[25s]", np.array([1, 2], "M8[25s]"), Timestamp=[25_000_000, 50_000_000]),
    kind("datetime64 of the other byte order", np.array([US, 1]).astype(">M8[us]"), Timestamp=[US, 1]),
    refused("datetime64[s] of the year 300000", np.array(["300000-01-01", "2024-01-01"], "M8[s]")),
    refused("datetime64[Y] out of range", np.array([2**60, 1], "M8[Y]")),
    refused("datetime64[h] out of range", np.array([-(2**60), 1], "M8[h]")),
    *(refused(f"timedelta64[{unit}]", np.array([1, 2], f"m8[{unit}]"))
      for unit in ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as")),
    missing("array of NaT", np.array(["NaT", "NaT"], "M8[us]"), 2),
    vectors("numpy matrix", np.array(ROWS)),
    vectors("numpy matrix, by columns", np.array(ROWS, ">f4", order="F")),
    vector_and_null("object array of arrays", pd.Series([np.array([1.5, 2.0]), None]).to_numpy()),
    refused("numpy matrix of another width", np.ones((2, 3))),
    refused("three dimensions", np.ones((2, 2, 2))),
]  # fmt: skip

PANDAS = [
    numbers("pandas int64", pd.Series([0, 1])),
    numbers("pandas Index", pd.Index([0, 1])),
    *(one_and_null(f"pandas {name}", pd.Series([1, None], dtype=name))
      for name in ("Int8", "Int64", "UInt32", "Float32", "Float64", "int64[pyarrow]", "double[pyarrow]")),
    kind("pandas Int64 of 2**53 + 1", pd.Series([BIG, None], dtype="Int64"), Int64=[BIG, None], Timestamp=[BIG, None],
         Float=[2.0**53, None], Vector=[[2.0**53, NAN]]),
    one_and_null("pandas float with NaN", pd.Series([1, None])),
    one_and_null("pandas object with NA", pd.Series([1, pd.NA], dtype=object)),
    kind("pandas boolean", pd.Series([True, None], dtype="boolean"), Bool=[True, None], Float=[1.0, None],
         Vector=[[1.0, NAN]]),
    text_and_null("pandas string", pd.Series(["a", None], dtype="string")),
    text_and_null("pandas str", pd.Series(["a", None], dtype="str")),
    text_and_null("pandas string of Arrow", pd.Series(["a", None], dtype=pd.ArrowDtype(pa.string()))),
    text_and_null("pandas object of str", pd.Series(["a", None], dtype=object)),
    text_and_null("pandas category", pd.Series(["a", None], dtype="category")),
    numbers("pandas category of ints", pd.Series([0, 1], dtype="category")),
    time_and_null("pandas datetime64[ns]", pd.Series([NAIVE, None], dtype="datetime64[ns]")),
    time_and_null("pandas datetime64[s]", pd.Series([NAIVE, None], dtype="datetime64[s]"), US // 10**6 * 10**6),
    time_and_null("pandas datetime64 with a zone", pd.Series([AWARE, None], dtype="datetime64[us, Asia/Kolkata]")),
    time_and_null("pandas of Arrow", pd.Series([AWARE, None], dtype=pd.ArrowDtype(pa.timestamp("us", "UTC")))),
    refused("pandas timedelta", pd.Series([dt.timedelta(1), dt.timedelta(2)])),
    refused("pandas period", pd.Series([pd.Period("2024-01"), pd.Period("2024-02")])),
    vector_and_null("pandas column of arrays", pd.Series([np.array([1.5, 2.0]), None])),
    vector_and_null("pandas column of lists", pd.Series([[1.5, 2.0], None])),
]  # fmt: skip

DECIMALS = [Decimal("1.00"), None]
ARROW = [
    *(one_and_null(f"Arrow {name}", pa.array([1, None], getattr(pa, name)())) for name in (
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64",
    )),
    one_and_null("Arrow float16", pa.array([np.float16(1), None], pa.float16())),
    one_and_null("Arrow decimal128", pa.array(DECIMALS, pa.decimal128(10, 2))),
    one_and_null("Arrow decimal256", pa.array(DECIMALS, pa.decimal256(40, 2))),
    one_and_null("Arrow dictionary of ints", pa.array([1, None]).dictionary_encode()),
    one_and_null("Arrow chunks", pa.chunked_array([[1], [None]], pa.int64())),
    one_and_null("Arrow slice", pa.array([7, 1, None, 8]).slice(1, 2)),
    halves("Arrow decimals", pa.array([Decimal("0.5"), Decimal("-1.5")])),
    kind("Arrow 2**53 + 1 and null", pa.array([BIG, None]), Int64=[BIG, None], Timestamp=[BIG, None],
         Float=[2.0**53, None], Vector=[[2.0**53, NAN]]),
    kind("Arrow uint64 of 2**63", pa.array([1, 2**63], pa.uint64()), Float=[1.0, 2.0**63], Vector=[[1.0, 2.0**63]]),
    kind("Arrow bool", pa.array([True, None]), Bool=[True, None], Float=[1.0, None], Vector=[[1.0, NAN]]),
    missing("Arrow null type", pa.nulls(2), 2),
    text_and_null("Arrow string", pa.array(["a", None])),
    text_and_null("Arrow large_string", pa.array(["a", None], pa.large_string())),
    text_and_null("Arrow string_view", pa.array(["a", None], pa.string_view())),
    text_and_null("Arrow dictionary", pa.array(["a", None]).dictionary_encode()),
    refused("Arrow binary", pa.array([b"a", None])),
    refused("Arrow string that is not UTF-8", pa.array([b"\xff", b"a"]).view(pa.string())),
    kind("Arrow texts of times", pa.array(["2024-01-02", None]), String=["2024-01-02", None], Timestamp=[DAY_US, None]),
    *(time_and_null(f"Arrow timestamp[{unit}]", pa.array([US * 1000 // per_ns, None]).view(pa.timestamp(unit)), us)
      for unit, per_ns, us in (
          ("s", 10**9, US // 10**6 * 10**6), ("ms", 10**6, US // 1000 * 1000), ("us", 1000, US), ("ns", 1, US),
      )),
    time_and_null("Arrow timestamp with a zone", pa.array([AWARE, None], pa.timestamp("us", "Asia/Kolkata"))),
    kind("Arrow ns before 1970", pa.array([-1, -1000], pa.timestamp("ns")), Timestamp=[-1, -1]),
    refused("Arrow timestamp[s] of the year 300000", pa.array([9_400_000_000_000, 1], pa.timestamp("s"))),
    time_and_null("Arrow date32", pa.array([dt.date(2024, 1, 2), None]), DAY_US),
    time_and_null("Arrow date64", pa.array([dt.date(2024, 1, 2), None], pa.date64()), DAY_US),
    refused("Arrow time", pa.array([dt.time(1), None])),
    *(refused(f"Arrow duration[{unit}]", pa.array([1, None], pa.duration(unit))) for unit in ("s", "us", "ns")),
    refused("Arrow struct", pa.array([{"a": 1}, None])),
    vector_and_null("Arrow list", pa.array(SOME)),
    vector_and_null("Arrow large_list", pa.array(SOME, pa.large_list(pa.float32()))),
    vector_and_null("Arrow fixed_size_list", pa.array(SOME, pa.list_(pa.float64(), 2))),
    vector_and_null("Arrow list_view", pa.array(SOME, pa.list_view(pa.float64()))),
    vector_and_null("Arrow list, sliced", pa.array([[9.0, 9.0], *SOME]).slice(1)),
    kind("Arrow list with nulls in it", pa.array([[1, None], [3, 4]]), Vector=[[1.0, NAN], [3.0, 4.0]]),
    refused("Arrow list of another length", pa.array([[1.0, 2.0, 3.0], None])),
    refused("Arrow list of text", pa.array([["a", "b"], None])),
]  # fmt: skip

POLARS = [
    one_and_null("polars Int64", pl.Series([1, None])),
    one_and_null("polars UInt8", pl.Series([1, None], dtype=pl.UInt8)),
    one_and_null("polars Float32", pl.Series([1.0, None], dtype=pl.Float32)),
    one_and_null("polars Decimal", pl.Series(DECIMALS)),
    kind("polars Boolean", pl.Series([True, None]), Bool=[True, None], Float=[1.0, None], Vector=[[1.0, NAN]]),
    text_and_null("polars String", pl.Series(["a", None])),
    text_and_null("polars Categorical", pl.Series(["a", None], dtype=pl.Categorical)),
    text_and_null("polars Enum", pl.Series(["a", None], dtype=pl.Enum(["a"]))),
    time_and_null("polars Datetime", pl.Series([NAIVE, None])),
    time_and_null("polars Datetime with a zone", pl.Series([AWARE, None], dtype=pl.Datetime("us", "Asia/Kolkata"))),
    time_and_null("polars Date", pl.Series([dt.date(2024, 1, 2), None]), DAY_US),
    refused("polars Duration", pl.Series([dt.timedelta(1), None])),
    refused("polars Binary", pl.Series([b"a", None])),
    refused("polars Time", pl.Series([dt.time(1), None])),
    missing("polars Null", pl.Series([None, None]), 2),
    vector_and_null("polars List", pl.Series(SOME)),
    vector_and_null("polars Array", pl.Series(SOME, dtype=pl.Array(pl.Float64, 2))),
]  # fmt: skip

IN_LISTS = [Kind(f"[{scalar.name}]", [scalar.value], scalar.outcomes) for scalar in SCALARS]
KINDS = [*SCALARS, *IN_LISTS, *LISTS, *ARRAYS, *PANDAS, *ARROW, *POLARS]

# -- text --------------------------------------------------------------------------------------------------------------

# Fields of CSV, as they are written there. A vector takes two fields of a CSV body, and one in a file.
TEXTS = [
    kind("empty field", "", Bool=[None], Whole=[None], Float=[None], String=[None], Timestamp=[None]),
    kind("empty text", '""', String=[""]),
    kind("1", "1", Bool=[True], Whole=[1], Float=[1.0], String=["1"]),
    kind("0", "0", Bool=[False], Whole=[0], Float=[0.0], String=["0"]),
    kind("-7", "-7", Whole=[-7], Float=[-7.0], String=["-7"]),
    kind("007", "007", Whole=[7], Float=[7.0], String=["007"]),
    kind("3.0", "3.0", Whole=[3], Float=[3.0], String=["3.0"]),
    kind("1.0", "1.0", Bool=[True], Whole=[1], Float=[1.0], String=["1.0"]),
    kind("3.5", "3.5", Float=[3.5], String=["3.5"]),
    kind("-.5", "-.5", Float=[-0.5], String=["-.5"]),
    kind("5.", "5.", Whole=[5], Float=[5.0], String=["5."]),
    kind("1e3", "1e3", Whole=[1000], Float=[1000.0], String=["1e3"]),
    kind("1E-2", "1E-2", Float=[0.01], String=["1E-2"]),
    kind("0.1", "0.1", Float=[0.1], String=["0.1"]),
    kind("2**53 + 1", str(BIG), Int64=[BIG], Timestamp=[BIG], Float=[2.0**53], String=[str(BIG)]),
    kind("2**63", str(2**63), Float=[2.0**63], String=[str(2**63)]),
    kind("1e400", "1e400", Float=[INF], String=["1e400"]),
    kind("nan", "NaN", Float=[None], String=["NaN"]),
    kind("inf", "-Inf", Float=[-INF], String=["-Inf"]),
    kind("infinity", "infinity", Float=[INF], String=["infinity"]),
    kind("true", "True", Bool=[True], String=["True"]),
    kind("false", "false", Bool=[False], String=["false"]),
    kind("a", "a", String=["a"]),
    *(kind(f"{text!r}, which is no number", text, String=[text])
      for text in ("1_0", "+1", " 1", "1 ", "0x1F", "1e", ".", "-", "١", "1f", "None", "null")),
    kind("spaces are kept", " a ", String=[" a "]),
    kind("a comma in quotes", '"a,b"', String=["a,b"]),
    kind("a quote in quotes", '"a""b"', String=['a"b']),
    kind("date", "2024-01-02", Timestamp=[DAY_US], String=["2024-01-02"]),
    kind("time", "2024-01-02T03:04:05.678901", Timestamp=[US], String=["2024-01-02T03:04:05.678901"]),
    kind("time with more digits", "2024-01-02 03:04:05.6789019Z", Timestamp=[US],
         String=["2024-01-02 03:04:05.6789019Z"]),
    kind("time with an offset", "2024-01-02T08:34:05.678901+05:30", Timestamp=[US],
         String=["2024-01-02T08:34:05.678901+05:30"]),
    kind("no such day", "2024-02-30", String=["2024-02-30"]),
    kind("no such time", "2024-01-02T25:00", String=["2024-01-02T25:00"]),
]  # fmt: skip
