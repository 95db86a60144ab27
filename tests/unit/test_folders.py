"""Files as people have them: folders of many writers, patterns and lists, and columns that differ from file to file."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

import shorttail as st
from shorttail.define.arrow import may_take
from shorttail.define.values import Refused, from_arrow
from shorttail.errors import InvalidArgument, NotFound

pa = pytest.importorskip("pyarrow")
import pyarrow.csv  # noqa: E402
import pyarrow.feather  # noqa: E402
import pyarrow.parquet  # noqa: E402

USER = st.Entity("user", keys={"id": st.Int64})
VIEW = st.FeatureView(
    "v",
    entity=USER,
    features=[
        st.Feature("x", st.Float64),
        st.Feature("n", st.Int64),
        st.Feature("country", st.String),
        st.Feature("at", st.Timestamp),
        st.Feature("taste", st.Vector(2)),
        st.Feature("old", st.Bool),
    ],
)
COLUMNS = {
    "x": [0.1, None],
    "n": [1, None],
    "country": ["DE", None],
    "at": [1_000_000, None],
    "taste": [[1.0, 2.0], None],
    "old": [True, None],
}
ALL = [f"v:{feature.name}" for feature in VIEW.features]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([VIEW])
        yield engine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test; files in it are named by relative paths."""
    made = tmp_path / "work"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


def write(folder: Path | str, *tables: Any, suffix: str = "parquet") -> str:
    """Write a file for each table, whose names are in the order of the tables."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, table in enumerate(tables):
        path = Path(folder) / f"part-{i}.{suffix}"
        if suffix == "csv":
            pyarrow.csv.write_csv(table, path)
        elif suffix == "arrow":
            pyarrow.feather.write_feather(table, path)
        else:
            pyarrow.parquet.write_table(table, path)
    return str(folder)


def table(ids: list[int], without: tuple[str, ...] = (), **changes: Any) -> Any:
    """A table with all columns of VIEW, null in each row, and changes."""
    columns = {name: pa.nulls(len(ids)) for name in COLUMNS} | {"id": pa.array(ids, pa.int64())} | changes
    return pa.table({name: column for name, column in columns.items() if name not in without})


def found(engine: st.Engine, name: str, ids: list[int]) -> list[Any]:
    values: list[Any] = engine.get_online_features([f"v:{name}"], {"id": ids}).to_dict()[f"v:{name}"]
    return values


# -- columns that differ from file to file -----------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[str, list[Any], list[Any]]] = {  # column, its values in each file, what is served
    "all null, then strings": ("country", [pa.nulls(1), pa.array(["DE"])], [None, "DE"]),
    "strings, then all null": ("country", [pa.array(["DE"]), pa.nulls(1)], ["DE", None]),
    "doubles that are all null, then strings": ("country", [pa.nulls(1, pa.float64()), pa.array(["DE"])], [None, "DE"]),
    "strings that are all null, then ints": ("n", [pa.nulls(1, pa.string()), pa.array([7])], [None, 7]),
    "int32, then int64": ("n", [pa.array([1], pa.int32()), pa.array([2**40])], [1, 2**40]),
    "int64, then int8": ("n", [pa.array([2**40]), pa.array([1], pa.int8())], [2**40, 1]),
    "uint64, then double": ("n", [pa.array([2**62], pa.uint64()), pa.array([3.0])], [2**62, 3]),
    "float, then double": ("x", [pa.array([0.5], pa.float32()), pa.array([0.1])], [0.5, 0.1]),
    "double, then float": ("x", [pa.array([0.1]), pa.array([0.5], pa.float32())], [0.1, 0.5]),
    "int, then double": ("x", [pa.array([7]), pa.array([1.5])], [7.0, 1.5]),
    "bool, then int": ("old", [pa.array([True]), pa.array([0])], [True, False]),
    "decimal, then int": ("n", [pa.array([Decimal("12")]), pa.array([3])], [12, 3]),
    "dictionary, then plain": ("country", [pa.array(["a"]).dictionary_encode(), pa.array(["b"])], ["a", "b"]),
    "plain, then dictionary": ("country", [pa.array(["a"]), pa.array(["b"]).dictionary_encode()], ["a", "b"]),
    "string, then large_string": ("country", [pa.array(["a"]), pa.array(["b"], pa.large_string())], ["a", "b"]),
    "naive us, then UTC ns": (
        "at",
        [pa.array([1], pa.timestamp("us")), pa.array([1999], pa.timestamp("ns", "UTC"))],
        [1, 1],
    ),
    "seconds, then another zone": (
        "at",
        [pa.array([1], pa.timestamp("s")), pa.array([2], pa.timestamp("ms", "Europe/Berlin"))],
        [1_000_000, 2_000],
    ),
    "date, then text": (
        "at",
        [pa.array([date(1970, 1, 2)]), pa.array(["1970-01-01 00:00:01"])],
        [86_400_000_000, 10**6],
    ),
    "list, then fixed-size list": (
        "taste",
        [pa.array([[1, 2]]), pa.array([[3.0, 4.0]], pa.list_(pa.float32(), 2))],
        [[1.0, 2.0], [3.0, 4.0]],
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_column_has_another_type_in_another_file(engine: st.Engine, folder: Path, case: str) -> None:
    name, columns, served = DIFFERENT[case]
    tables = [table([i], **{name: column}) for i, column in enumerate(columns)]
    assert engine.load("v", write("rows", *tables)) == len(tables)
    assert found(engine, name, [0, 1]) == served


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_is_added_or_gone_is_null_where_it_lacks(engine: st.Engine, folder: Path, name: str) -> None:
    full, without = table([0], **{name: [COLUMNS[name][0]]}), table([1], without=(name,))
    for path, tables in (("gone", (full, without)), ("added", (without, full))):
        assert engine.load("v", write(path, *tables)) == 2
        assert found(engine, name, [0, 1]) == COLUMNS[name]
        statuses = engine.get_online_features([f"v:{name}"], {"id": [0, 1]}).feature_statuses[f"v:{name}"]
        assert statuses.tolist() == [st.Status.PRESENT, st.Status.NULL]


def test_a_key_has_another_type_in_another_file(engine: st.Engine, folder: Path) -> None:
    tables = [table([0], id=pa.array([5], pa.int32())), table([0], id=pa.array([2**40])), table([0], id=[6.0])]
    assert engine.load("v", write("rows", *tables)) == 3
    assert engine.get_online_features(["v:x"], {"id": [5, 2**40, 6]}).statuses["v"].tolist() == [0, 0, 0]


CANNOT: dict[str, tuple[list[Any], str]] = {  # the tables of a folder, and the end of the message
    "strings for doubles": (
        [table([0]), table([1, 2], x=pa.array([None, "b"]))],
        "rows/part-1.parquet: column 'x' takes Float64; got 'b' (string) at row 1",
    ),
    "ints for strings": (
        [table([0], country=["DE"]), table([1], country=[7])],
        "rows/part-1.parquet: column 'country' takes String; got 7 (int64) at row 0",
    ),
    "numbers for vectors": (
        [table([0], taste=[[1.0, 2.0]]), table([1], taste=[1.0])],
        "rows/part-1.parquet: column 'taste' takes Vector(2); got 1.0 (double) at row 0",
    ),
    "a struct": (
        [table([0]), table([1], x=[{"a": 1}])],
        "rows/part-1.parquet: column 'x' takes Float64; got {'a': 1} (struct<a: int64>) at row 0",
    ),
    "a key that lacks": (
        [table([0]), table([1], without=("id", "x", "n", "at", "taste", "old"))],
        "rows/part-1.parquet: no column 'id' (key of view 'v'); its columns: country",
    ),
    "a column that lacks everywhere": (
        [table([0], without=("x",)), table([1], without=("x",))],
        "rows/part-0.parquet: no column 'x' (feature of view 'v'); its columns: n, country, at, taste, old, id",
    ),
    "event times that lack": (
        [table([0], event_time=[1]), table([1])],
        "rows/part-1.parquet: no column 'event_time' (timestamp of view 'v'); its columns: x, n, country, at, taste,"
        " old, id",
    ),
    "another case": (
        [table([0]), table([1], without=("x",), X=[1.0])],
        "rows/part-1.parquet: no column 'x' (feature of view 'v'); there is 'X', and case matters",
    ),
    "a name that is there twice": (
        [table([0]), table([1]).append_column("x", pa.array([1.0]))],
        "rows/part-1.parquet: column 'x' (feature of view 'v') is there twice",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_does_not_fit_is_refused_before_rows_are_read(engine: st.Engine, folder: Path, case: str) -> None:
    tables, message = CANNOT[case]
    engine.load("v", table([9], x=[9.0]))
    seen: list[int] = []
    with pytest.raises(InvalidArgument) as caught:
        engine.load("v", write("rows", *tables), lambda done, total: seen.append(done))
    assert caught.value.message == message
    assert seen == []
    assert found(engine, "x", [9]) == [9.0]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_that_nobody_needs_may_be_anything(engine: st.Engine, folder: Path, suffix: str) -> None:
    other = table([0], z=[{"a": 1}]).append_column("z", pa.array([1]))
    assert engine.load("v", write("rows", other, table([1], z=["text"]), table([2]), suffix=suffix)) == 3


def test_of_equal_event_times_the_row_of_the_last_file_stays(engine: st.Engine, folder: Path) -> None:
    tables = [table([0], x=[float(i)], event_time=[5]) for i in range(8)]
    count = engine.load("v", write("rows", *tables))
    assert (count, count.given, count.older, count.duplicate) == (1, 8, 0, 7)
    assert found(engine, "x", [0]) == [7.0]


SAME: dict[str, list[Any]] = {  # Arrow types that hold the integers 0 to 99 exactly
    "n": [pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64(), pa.decimal128(5, 1)],
    "x": [pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.decimal128(5, 1)],
    "at": [pa.int32(), pa.int64(), pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.float64()],
}  # fmt: skip
VALUES = hs.lists(hs.none() | hs.integers(0, 99), min_size=0, max_size=5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=hs.data())
def test_any_types_of_equal_values_are_served_equally(engine: st.Engine, folder: Path, data: hs.DataObject) -> None:
    """A folder, of files with columns of any types or none, serves what a push of the plain values serves."""
    place, wanted, start = folder / f"rows-{len(list(folder.iterdir()))}", {}, 0
    tables: list[Any] = []
    for _ in range(data.draw(hs.integers(1, 4))):
        values = data.draw(VALUES)
        ids = list(range(start, start + len(values)))
        start += len(values)
        columns, lacks = {}, []
        for name, types in SAME.items():
            kind = data.draw(hs.sampled_from([None, pa.null(), *types]))
            if kind is None and tables:  # the first file has all columns
                lacks.append(name)
            elif kind is None or kind == pa.null():
                columns[name] = pa.nulls(len(values))
            elif pa.types.is_decimal(kind):
                columns[name] = pa.array([None if v is None else Decimal(v) for v in values], kind)
            else:
                columns[name] = pa.array(values).cast(pa.int64()).cast(kind)
            for key, value in zip(ids, values, strict=True):
                wanted[name, key] = None if name not in columns or kind in (None, pa.null()) else value
        tables.append(table(ids, without=tuple(lacks), **columns))
    assert engine.load("v", write(place, *tables), allow_shrink=True) == start
    for name in SAME:
        asked = [*range(start), start]  # the last one is not there
        assert found(engine, name, asked) == [wanted.get((name, key)) for key in asked]


NUMBERS = [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(5), pa.date32()]
TIMES = [pa.timestamp("s"), pa.timestamp("ns", "UTC"), pa.duration("s"), pa.time32("s")]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary()]
LISTS = [pa.list_(pa.float32()), pa.large_list(pa.int8()), pa.list_(pa.int64(), 2)]
KINDS = [
    *(pa.array([1], kind) for kind in [*NUMBERS, *TIMES]),
    *(pa.array(["1970-01-01"], kind) for kind in TEXTS),
    *(pa.array([[1.0, 2.0]], kind) for kind in LISTS),
    pa.array(["a"]).dictionary_encode(),
    pa.RunEndEncodedArray.from_arrays([1], pa.array([1.5])),
    pa.array([True]),
    pa.array([{"a": 1}]),
    pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    pa.nulls(1),
    pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1], pa.int8())),
]
DTYPES = [st.Bool, st.Int32, st.Int64, st.Float32, st.Float64, st.String, st.Timestamp, st.Vector(2)]


@pytest.mark.parametrize("column", KINDS, ids=lambda column: str(column.type))
def test_types_that_cannot_fit_are_those_that_are_not_converted(column: Any) -> None:
    for dtype in DTYPES:
        try:
            from_arrow(dtype, column)
            taken = True
        except (Refused, pa.ArrowException):
            taken = False
        assert may_take(dtype, column.type) or not taken, dtype
        from_arrow(dtype, pa.nulls(2, column.type))  # only nulls fit always


# -- folders that give columns ----------------------------------------------------------------------------------------


def test_folders_of_pandas_give_columns(engine: st.Engine, folder: Path) -> None:
    texts = ["DE", "a b/c=d%", "größe", "", "__x", None]
    frame = table([0, 1, 2, 3, 4, 5], country=texts).to_pandas()
    frame["country"] = pd.Series(texts, dtype=object)
    frame.to_parquet("rows", partition_cols=["country"])
    assert engine.load("v", "rows") == 6
    assert found(engine, "country", [0, 1, 2, 4, 5]) == ["DE", "a b/c=d%", "größe", "__x", None]


@pytest.mark.parametrize(
    ("name", "values", "served"),
    [
        ("n", ["7", "-3"], [7, -3]),
        ("x", ["0.1", "1e3"], [0.1, 1000.0]),
        ("country", ["0042", "true"], ["0042", "true"]),
        ("old", ["true", "0"], [True, False]),
        ("at", ["2026-01-02", "1970-01-01 00%3A00%3A01.5"], [1_767_312_000_000_000, 1_500_000]),
        ("taste", ["1,2", "3,4"], [[1.0, 2.0], [3.0, 4.0]]),
        ("n", ["__HIVE_DEFAULT_PARTITION__", "1"], [None, 1]),
        ("country", ["__HIVE_DEFAULT_PARTITION__", "x"], [None, "x"]),
        ("taste", ["__HIVE_DEFAULT_PARTITION__", "3,4"], [None, [3.0, 4.0]]),
    ],
)
def test_the_value_of_a_folder_is_read_as_text(
    engine: st.Engine, folder: Path, name: str, values: list[str], served: list[Any]
) -> None:
    for i, value in enumerate(values):
        write(f"rows/{name}={value}/deep", table([i, i + 10], without=(name,)))
    assert engine.load("v", "rows") == 4
    assert found(engine, name, [0, 10, 1, 11]) == [served[0], served[0], served[1], served[1]]


def test_a_folder_may_give_the_key(engine: st.Engine, folder: Path) -> None:
    for key in (7, 2**40):
        write(f"rows/id={key}", table([0], x=[float(key)], without=("id",)))
    assert engine.load("v", "rows") == 2
    assert found(engine, "x", [7, 2**40]) == [7.0, float(2**40)]


@pytest.mark.parametrize("give", [
    lambda folder: "rows/country=DE/part-0.parquet",
    lambda folder: folder / "rows" / "country=DE",
    lambda folder: str(folder / "rows" / "*" / "*.parquet"),
    lambda folder: "../work/rows/country=DE/*",
])  # fmt: skip
def test_any_path_to_a_file_gives_the_same_columns(
    engine: st.Engine, folder: Path, give: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("rows/country=DE", table([0], without=("country",)))
    assert engine.load("v", give(folder)) == 1
    assert found(engine, "country", [0]) == ["DE"]
    monkeypatch.chdir(folder / "rows" / "country=DE")
    assert engine.load("v", "part-0.parquet") == 1
    assert found(engine, "country", [0]) == ["DE"]


def test_a_column_of_the_file_goes_before_that_of_its_folder(engine: st.Engine, folder: Path) -> None:
    frame = pl.DataFrame({"id": [0, 1], "x": [0.1, 0.2], "country": ["DE", "FR"]})
    rest = [pl.lit(None).alias(name) for name in COLUMNS if name not in frame.columns]
    for (country,), part in frame.with_columns(rest).group_by("country"):
        write(f"rows/country={country}", part.to_arrow())  # as polars writes: the files have the column too
    assert engine.load("v", "rows") == 2
    assert found(engine, "country", [0, 1]) == ["DE", "FR"]


def test_a_wrong_value_of_a_folder_is_named(engine: st.Engine, folder: Path) -> None:
    write("rows/n=1", table([0], without=("n",)))
    write("rows/n=many", table([1], without=("n",)))
    with pytest.raises(InvalidArgument, match=r"rows/n=many/part-0.parquet: column 'n' takes Int64; got 'many'"):
        engine.load("v", "rows")


# -- patterns, lists, and files beside the rows -----------------------------------------------------------------------


def test_marks_of_writers_are_no_rows(engine: st.Engine, folder: Path) -> None:
    write("rows/sub", table([0]), table([1]))
    write("rows/_temporary/0", table([2]))
    write("rows/.hidden", table([3]))
    for name in ("_SUCCESS", ".part-0.parquet.crc", "sub/_metadata", "sub/._SUCCESS.crc"):
        (folder / "rows" / name).write_bytes(b"mark")
    write("rows/_n=4", table([4]))
    for path in ("rows", "rows/*", "rows/**", "rows/sub/*", ["rows/*", "rows/sub/part-0.parquet"]):
        rows = 2 if path == "rows/sub/*" else 3
        assert engine.load("v", path).given == rows, path


@pytest.mark.parametrize("name", ["README.txt", "part.parquet.tmp", "rows.csv.gz", "empty.parquet"])
def test_a_stray_file_is_named(engine: st.Engine, folder: Path, name: str) -> None:
    write("rows", table([0]))
    content = gzip.compress(b"id\n1\n") if name.endswith(".gz") else b"" if name.startswith("empty") else b"hello"
    (folder / "rows" / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=rf"^rows/{name}: cannot be read as parquet: ") as caught:
        engine.load("v", "rows")
    assert "\n" not in caught.value.message


def test_files_of_several_kinds_are_read_together(engine: st.Engine, folder: Path) -> None:
    flat = tuple(name for name in COLUMNS if name != "x")
    write("rows/a", table([0], x=[0.5]))
    write("rows/b", table([1], x=[1.5]), suffix="arrow")
    write("rows/c", table([2], without=flat, x=[2.5]), table([3], without=flat, x=[None]), suffix="csv")
    assert engine.load("v", "rows") == 4
    assert found(engine, "x", [0, 1, 2, 3]) == [0.5, 1.5, 2.5, None]


def test_lists_and_patterns(engine: st.Engine, folder: Path) -> None:
    write("rows", *(table([i], x=[float(i)], event_time=[1]) for i in range(12)))
    (folder / "odd[1].parquet").write_bytes((folder / "rows" / "part-3.parquet").read_bytes())
    for given_paths, rows in [
        ("rows/part-?.parquet", 10),
        ("rows/part-[01].parquet", 2),
        (folder / "rows" / "part-1*.parquet", 3),
        (["rows/part-0.parquet", Path("rows") / "part-1.parquet"], 2),
        (("rows/part-1?.parquet", "rows/part-0.parquet"), 3),
        (["rows", "rows"], 12),
        ("odd[1].parquet", 1),  # there is a file of this name
    ]:
        seen: list[int | None] = []
        count = engine.load("v", given_paths, lambda done, total, seen=seen: seen.append(total))
        assert (count, count.given, set(seen)) == (rows, rows, {rows}), given_paths


def test_the_order_of_a_list_is_kept(engine: st.Engine, folder: Path) -> None:
    write("rows", *(table([0], x=[float(i)], event_time=[1]) for i in range(3)))
    engine.load("v", ["rows/part-2.parquet", "rows/part-0.parquet"])
    assert found(engine, "x", [0]) == [0.0]


def test_no_files_are_refused(engine: st.Engine, folder: Path) -> None:
    (folder / "none").mkdir()
    write("delta/_delta_log", table([0]))
    write("delta", table([0]))
    for path, kind, message in [
        ("gone.parquet", NotFound, "view 'v': there is no file gone.parquet"),
        ("rows/*.parquet", NotFound, r"view 'v': no file matches rows/\*.parquet"),
        (["none/x.parquet"], NotFound, "view 'v': there is no file none/x.parquet"),
        ("none", InvalidArgument, "^none: there is no file in this folder"),
        ("delta", InvalidArgument, "^delta: a Delta table, whose folder also holds rows that were deleted"),
    ]:
        with pytest.raises(kind, match=message):
            engine.load("v", path)


def test_materialize_reads_a_pattern_and_a_folder(tmp_path: Path, folder: Path) -> None:
    write("rows", table([0]), table([1]))
    (folder / "definitions.py").write_text(
        "import shorttail as st\n"
        "e = st.Entity('e', keys={'id': st.Int64})\n"
        "a = st.FeatureView('a', entity=e, features=[st.Feature('x', st.Float64)], source=st.ParquetSource('rows'))\n"
        "b = st.FeatureView('b', entity=e, features=[st.Feature('x', st.Float64)],\n"
        "                   source=st.ParquetSource('rows/*-1.parquet'))\n"
    )
    with st.Engine.open(tmp_path / "other", create=True) as engine:
        engine.apply("definitions.py")
        assert (engine.materialize("a"), engine.materialize("b")) == (2, 1)


# -- rows in memory, as push takes them -------------------------------------------------------------------------------

ROWS: dict[str, Any] = {
    "id": [1, 2, 3],
    "x": [0.1, None, 3.0],
    "n": [1, None, 3],
    "country": ["DE", None, "größe"],
    "at": [datetime(2026, 1, 2, tzinfo=UTC), None, datetime(1970, 1, 1, tzinfo=UTC)],
    "taste": [[1.0, 2.0], None, [3.0, 4.0]],
    "old": [True, None, False],
    "event_time": [1, 2, 3],
}
FORMS: dict[str, Callable[[], Any]] = {
    "dict": lambda: ROWS,
    "dict of arrays": lambda: ROWS | {"id": np.array([1, 2, 3]), "x": pa.array(ROWS["x"])},
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas of objects": lambda: pd.DataFrame({name: pd.Series(c, dtype=object) for name, c in ROWS.items()}),
    "pandas of Arrow": lambda: pa.table(ROWS).to_pandas(types_mapper=pd.ArrowDtype),
    "pandas with the key as its index": lambda: pd.DataFrame(ROWS).set_index("id"),
    "polars": lambda: pl.DataFrame(ROWS),
    "polars with objects": lambda: pl.DataFrame(ROWS).with_columns(pl.Series("z", [object()] * 3, dtype=pl.Object)),
    "table": lambda: pa.table(ROWS),
    "record batch": lambda: pa.RecordBatch.from_pydict(ROWS),
    "reader": lambda: pa.table(ROWS).to_reader(2),
    "generator of record batches": lambda: iter(pa.table(ROWS).to_batches(2)),
}


@pytest.mark.parametrize("form", FORMS)
def test_load_takes_what_push_takes(engine: st.Engine, form: str) -> None:
    engine.push("v", ROWS)
    pushed = engine.get_online_features(ALL, {"id": [1, 2, 3]}).to_dict()
    engine.push("v", {**ROWS, "id": [7, 8, 9]})
    seen: list[tuple[int, int | None]] = []
    count = engine.load("v", FORMS[form](), lambda done, total: seen.append((done, total)))
    assert (count, count.given, seen[-1][0]) == (3, 3, 3)
    assert engine.get_online_features(ALL, {"id": [1, 2, 3]}).to_dict() == pushed
    assert engine.store.count("v") == 3


def test_load_of_rows_in_memory_ignores_other_columns_and_repeats_scalars(engine: st.Engine) -> None:
    assert engine.load("v", {**ROWS, "country": "FR", "more": [1, 2], 7: ["?"], None: 1}) == 3
    assert found(engine, "country", [1, 2, 3]) == ["FR"] * 3
    assert engine.load("v", pd.DataFrame({**ROWS, "more": [1, 2, 3]})) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"id": [1]}, "view 'v': column 'x' is missing from the rows; they need: "),
        ({**ROWS, "n": [1, "two", 3]}, "view 'v': column 'n' takes Int64; got 'two' (str) at row 1"),
        ({**ROWS, "id": [1, None, 3]}, "view 'v': key 'id' is null at row 1"),
        ({name.replace("id", "ID"): c for name, c in ROWS.items()}, "no column 'ID'; there is 'id', and case matters"),
        (pd.DataFrame(ROWS).rename(columns={"x": "X"}), "no column 'X'; there is 'x', and case matters"),
        (pl.DataFrame(ROWS).rename({"x": "X"}), "no column 'x' (feature of view 'v'); there is 'X', and case matters"),
        (pa.table(ROWS).append_column("x", pa.array([1, 2, 3])), "column 'x' (feature of view 'v') is there twice"),
        (pd.concat([pd.DataFrame(ROWS), pd.DataFrame({"x": [1, 2, 3]})], axis=1), "column 'x' is there twice"),
        ([ROWS], "got dict; give a path, a list of paths, a dict of columns, pandas, polars or pyarrow data"),
        (pl.LazyFrame(ROWS), "got LazyFrame; give a path"),
        (5, "got int; give a path"),
    ],
)  # fmt: skip
def test_wrong_rows_in_memory_are_named(engine: st.Engine, rows: Any, message: str) -> None:
    engine.push("v", ROWS)
    with pytest.raises(InvalidArgument) as caught:
        engine.load("v", rows)
    assert message in caught.value.message
    assert engine.store.count("v") == 3
