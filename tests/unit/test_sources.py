"""Files become batches of columns: every type, nulls, and errors that name the file, the column and the types."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, ShorttailError
from shorttail.store import ColumnBatch
from shorttail.store.table import UNTIMED

pa = pytest.importorskip("pyarrow")
import pyarrow.csv  # noqa: E402
import pyarrow.feather  # noqa: E402
import pyarrow.parquet  # noqa: E402

from shorttail.sources.arrow import ArrowSource  # noqa: E402
from shorttail.sources.batches import FileSource, key_batches, open_source, row_batches  # noqa: E402

AT = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
AT_US = 1_767_323_045_000_006

VIEW = st.FeatureView(
    "v",
    entity=st.Entity("e", keys={"id": st.Int64, "code": st.String}),
    features=[
        st.Feature("b", st.Bool),
        st.Feature("i", st.Int32),
        st.Feature("l", st.Int64),
        st.Feature("f", st.Float32),
        st.Feature("d", st.Float64),
        st.Feature("s", st.String),
        st.Feature("t", st.Timestamp),
        st.Feature("x", st.Vector(2)),
    ],
)
ROWS: dict[str, Any] = {
    "id": [1, 2, 3],
    "code": ["a", "b", "0042"],
    "b": [True, None, False],
    "i": [1, None, -3],
    "l": [1 << 40, None, 3],
    "f": [0.5, None, float("nan")],
    "d": [0.5, None, 2.0],
    "s": ["gold", None, ""],
    "t": [AT, None, AT],
    "x": [[1.0, 2.0], None, [3.0, None]],
    "at": [AT, AT, AT],
    "not used": [1, 2, 3],
}


def file_batches(path: Path, view: st.FeatureView, timestamp: str | None = None) -> tuple[int | None, Any]:
    """Return (number of rows, batches of rows) of a file."""
    source = FileSource(path, [*view.keys, *view.feature_index, timestamp or "event_time"], f"view '{view.name}'")
    return source.rows, row_batches(source, view, timestamp, LIMITS.max_clock_skew_us)


def arrow_batches(data: Any, view: st.FeatureView, timestamp: str | None = None) -> tuple[int | None, Any]:
    """Return (number of rows, batches of rows) of Arrow data."""
    source = ArrowSource(data, f"rows for view '{view.name}'")
    return source.rows, row_batches(source, view, timestamp, LIMITS.max_clock_skew_us)


def table(**changes: Any) -> Any:
    return pa.table({**ROWS, **changes})


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[ColumnBatch]]:
    """Return read(table, timestamp), which writes a Parquet file and reads it for VIEW."""

    def through_file(rows: Any, timestamp: str | None = "at") -> list[ColumnBatch]:
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(rows, path)
        total, batches = file_batches(path, VIEW, timestamp)
        assert total == rows.num_rows
        return list(batches)

    return through_file


def check(batch: ColumnBatch) -> None:
    """Check that a batch holds ROWS."""
    assert [key.tolist() for key in batch.keys] == [[1, 2, 3], ["a", "b", "0042"]]
    assert batch.keys[0].dtype == np.int64
    assert batch.event_time_us.tolist() == [AT_US] * 3
    expected_dtypes = [np.bool_, np.int32, np.int64, np.float32, np.float64, object, np.int64, np.float32]
    assert [getattr(values, "dtype", object) for values, _ in batch.features] == expected_dtypes
    for feature, (values, nulls) in zip(VIEW.features, batch.features, strict=True):
        assert nulls is not None, feature
        assert nulls.tolist() == [False, True, feature.name == "f"], feature  # its last value is NaN
        assert feature.dtype == st.String or values.flags.c_contiguous, feature
    assert batch.features[2][0][0] == 1 << 40
    np.testing.assert_array_equal(batch.features[3][0][[0, 2]], [0.5, np.nan])
    assert batch.features[5][0].tolist() == ["gold", "", ""]
    assert batch.features[6][0][0] == AT_US
    np.testing.assert_array_equal(batch.features[7][0], [[1, 2], [np.nan, np.nan], [3, np.nan]])


def test_every_type_with_nulls(read: Callable[..., list[ColumnBatch]]) -> None:
    (batch,) = read(table())
    check(batch)


@pytest.mark.parametrize("name", ["rows.arrow", "rows.feather", "rows.ipc"])
@pytest.mark.parametrize("compression", ["uncompressed", "lz4"])
def test_arrow_files_give_the_same_batch(tmp_path: Path, name: str, compression: str) -> None:
    pyarrow.feather.write_feather(table(), tmp_path / name, compression=compression)
    total, batches = file_batches(tmp_path / name, VIEW, "at")
    assert total == 3
    check(next(batches))


@pytest.mark.parametrize(
    "give",
    [
        lambda: table(),
        lambda: table().to_batches()[0],
        lambda: table().to_reader(),
        lambda: table().to_batches(),
        lambda: iter(table().to_batches()),
        lambda: pytest.importorskip("polars").from_arrow(table()),
    ],
)
def test_arrow_data_gives_the_same_batch(give: Callable[[], Any]) -> None:
    data = give()
    _, batches = arrow_batches(data, VIEW, "at")
    check(next(batches))
    assert not list(batches)


def test_slices_and_other_layouts_of_arrow() -> None:
    """A slice gives only its own rows, though its buffers hold more."""
    both = pa.concat_tables([table(), table()]).combine_chunks().slice(2, 4).to_batches()[0]
    assert both.column("s").offset == 2
    _, batches = arrow_batches(both.slice(1), VIEW, "at")
    check(next(batches))
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        column = pa.array(["gold", None, ""], pa.string())
        cast = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
        _, batches = arrow_batches(table(s=cast), VIEW, "at")
        check(next(batches))


def test_other_data_is_refused() -> None:
    for data, message in [
        (3, "rows for view 'v': got int; give a path, a list of paths, a dict"),
        ("rows", "got str"),
        ([{"id": 1}], "got dict"),
        (table().drop_columns("x"), "rows for view 'v': no column 'x'"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            arrow_batches(data, VIEW, "at")
    _, batches = arrow_batches([*table().to_batches(), *table().drop_columns("x").to_batches()], VIEW, "at")
    with pytest.raises(InvalidArgument, match="not all record batches of one schema"):
        list(batches)
    assert [*arrow_batches([], VIEW, "at")[1]] == []


def test_csv_takes_its_types_from_the_view(tmp_path: Path) -> None:
    view = st.FeatureView(
        "v", entity=VIEW.entity, features=[f for f in VIEW.features if f.name in "bild" or f.name == "s"]
    )
    path = tmp_path / "rows.csv"
    path.write_text(
        "id,code,b,i,l,d,s,event_time\n1,0042,true,1,2,1,x,2026-01-02T03:04:05.000006Z\n2,b,,,,,,2026-01-02T03:04:05.000006Z\n"
    )
    total, batches = file_batches(path, view)
    batch = next(batches)
    assert total is None
    assert batch.keys[1].tolist() == ["0042", "b"]
    assert batch.event_time_us.tolist() == [AT_US] * 2
    assert all(nulls is not None and nulls.tolist() == [False, True] for _, nulls in batch.features)


def one_column(dtype: Any) -> st.FeatureView:
    return st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=[st.Feature("x", dtype)])


def test_times_of_96_bits_do_not_overflow(tmp_path: Path) -> None:
    """Read as nanoseconds of 64 bits, the year 9999 would become 1816."""
    times = [datetime(9999, 12, 31, 23, 59, 59, 999_999), datetime(1, 1, 1), AT.replace(tzinfo=None), None]
    rows = pa.table({"id": range(4), "x": pa.array(times, pa.timestamp("us"))})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(rows, path, use_deprecated_int96_timestamps=True)
    assert pyarrow.parquet.ParquetFile(path).schema.column(1).physical_type == "INT96"
    (batch,) = file_batches(path, one_column(st.Timestamp))[1]
    values, nulls = batch.features[0]
    assert values[:3].tolist() == [253_402_300_799_999_999, -62_135_596_800_000_000, AT_US]
    assert nulls is not None
    assert nulls.tolist() == [False, False, False, True]


def read_csv(path: Path, view: st.FeatureView, text: str) -> list[ColumnBatch]:
    path.write_text(text)
    return list(file_batches(path, view)[1])


def test_every_line_of_csv_is_a_row(tmp_path: Path) -> None:
    path, view = tmp_path / "rows.csv", one_column(st.String)
    (batch,) = read_csv(path, view, 'id,x\n1," a,\nb "\n2, c \n3,""\n4,\n')
    values, nulls = batch.features[0]
    assert values.tolist() == [" a,\nb ", " c ", "", ""]
    assert nulls is not None
    assert nulls.tolist() == [False, False, False, True]
    with pytest.raises(InvalidArgument, match="column 'id' is null at row 1"):
        read_csv(path, view, "id,x\n1,a\n\n2,b\n")
    alone = st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=[st.Feature("id2", st.Int64)])
    for text, message in [
        ("id,id2\n1,1\n 2,2\n", "column 'id' takes Int64; got ' 2' (text) at row 1"),
        ("id,id2\n1,1\n2,1_0\n", "column 'id2' takes Int64; got '1_0' (text) at row 1"),
        ("id,id2\n1,1\n,2\n", "column 'id' is null at row 1; every row needs a key"),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            read_csv(path, alone, text)
        assert message in caught.value.message


def test_an_empty_line_in_a_file_of_keys_is_a_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.csv"
    path.write_text("id\n1\n\n2\n")
    with pytest.raises(InvalidArgument, match="column 'id' is null at row 1; every row needs a key"):
        list(key_batches(open_source(path, one_column(st.Int64)), one_column(st.Int64), 100))
    path.write_text("id\n1\n2\n")
    assert list(key_batches(open_source(path, one_column(st.Int64)), one_column(st.Int64), 100)) == [[[1, 2]]]


def test_other_types_are_converted_to_those_of_the_view(read: Callable[..., list[ColumnBatch]]) -> None:
    (batch,) = read(
        table(
            code=pa.array(["a", "b", "c"]).dictionary_encode(),
            i=pa.array([1.0, 2.0, None]),
            f=pa.array([1 << 25, 2, 3]),
            t=pa.array([AT_US, None, 5]),
            x=pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
            at=pa.array([AT_US * 1000 + 7] * 3, pa.timestamp("ns", "Europe/Paris")),
        )
    )
    assert batch.keys[1].tolist() == ["a", "b", "c"]
    assert batch.features[1][0].tolist() == [1, 2, 0]
    assert batch.features[3][0].tolist() == [1 << 25, 2, 3]
    assert batch.features[6][0][0] == AT_US
    assert batch.features[7][0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert batch.event_time_us.tolist() == [AT_US] * 3


def test_the_store_makes_missing_event_times(read: Callable[..., list[ColumnBatch]]) -> None:
    (batch,) = read(table(), None)
    assert batch.event_time_us.tolist() == [UNTIMED] * 3
    with pytest.raises(InvalidArgument, match=r"no column 'event_time' .*; there is 'EVENT_TIME', and case matters"):
        read(table(EVENT_TIME=[1, 2, 3]), None)


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table(), tmp_path / f"{name}.parquet")
    total, batches = file_batches(tmp_path, VIEW, "at")
    assert total == 6
    assert sum(len(batch.event_time_us) for batch in batches) == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: table().drop_columns("s"), "rows.parquet: no column 's' (feature of view 'v'); its columns: id, code"),
        (lambda: table().drop_columns("at"), "no column 'at' (timestamp of view 'v')"),
        (lambda: table(code=[1, 2, 3]), "column 'code' takes String; got 1 (int64) at row 0"),
        (lambda: table(d=[None, "b", "c"]), "column 'd' takes Float64; got 'b' (string) at row 1"),
        (lambda: table(x=[None, [1.0, 2.0], [3.0]]), "column 'x' takes Vector(2); got 1 number at row 2"),
        (lambda: table(x=[None, ["1", "2"], ["3", "4"]]), "column 'x' takes Vector(2); got '1' (string) at row 1"),
        (lambda: table(i=[1, 2, 1 << 31]), "column 'i' takes Int32; got 2147483648 (int64) at row 2"),
        (lambda: table(l=[1.5, 2.0, 3.0]), "column 'l' takes Int64; got 1.5 (double) at row 0"),
        (
            lambda: table(t=pa.array([1, 2, 3], pa.duration("s"))),
            "column 't' takes Timestamp; got 1 seconds (duration[s])",
        ),
        (lambda: table(id=[1, None, None]), "column 'id' is null at row 1; every row needs a key"),
        (lambda: table(at=[AT, None, AT]), "column 'at' is null at row 1; every row needs a timestamp"),
    ],
)
def test_wrong_columns_and_values_are_named(read: Callable[..., list[ColumnBatch]], rows: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(rows())
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_number_out_of_range_is_named_as_the_text_of_the_file(tmp_path: Path) -> None:
    view = st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=[st.Feature("x", st.Int32)])
    (tmp_path / "rows.csv").write_text("id,x\n1,2\n2,2200000000\n")
    with pytest.raises(InvalidArgument, match=r"column 'x' takes Int32; got '2200000000' \(text\) at row 1"):
        list(file_batches(tmp_path / "rows.csv", view)[1])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="view 'v': there is no file"):
        file_batches(tmp_path / "gone.parquet", VIEW)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ShorttailError, match="cannot be read as parquet") as caught:
        file_batches(tmp_path / "text.parquet", VIEW)
    assert "\n" not in caught.value.message


# -- through the engine ----------------------------------------------------------------------------------------------


def folder_of_parquet(table: Any, path: Path) -> Path:
    path.mkdir()
    for part in range(3):
        pyarrow.parquet.write_table(table.slice(part * 100, 100), path / f"{part}.parquet", row_group_size=40)
    return path


def file_of(write: Callable[[Any, Path], object], name: str) -> Callable[[Any, Path], Path]:
    def made(table: Any, folder: Path) -> Path:
        write(table, folder / name)
        return folder / name

    return made


SOURCES: dict[str, Callable[[Any, Path], Any]] = {
    "parquet": file_of(pyarrow.parquet.write_table, "rows.parquet"),
    "folder": lambda table, folder: folder_of_parquet(table, folder / "rows"),
    "arrow": file_of(lambda table, path: pyarrow.feather.write_feather(table, path, chunksize=70), "rows.arrow"),
    "csv": file_of(pyarrow.csv.write_csv, "rows.csv"),
    "path as text": lambda table, folder: str(file_of(pyarrow.parquet.write_table, "x.parquet")(table, folder)),
    "table": lambda table, _: table,
    "reader": lambda table, _: table.to_reader(50),
    "batches": lambda table, _: table.to_batches(50),
}


@pytest.mark.parametrize("source", SOURCES)
def test_engine_loads_files_and_arrow_data(tmp_path: Path, source: str) -> None:
    view = st.FeatureView(
        "v",
        entity=st.Entity("e", keys={"id": st.Int64, "code": st.String}),
        features=[st.Feature("x", st.Float32), st.Feature("s", st.String)],
    )
    n = 300
    columns: dict[str, list[Any]] = {
        "id": list(range(n)),
        "code": [f"é{i:03}" for i in range(n)],
        "x": [None if i % 7 == 0 else i / 2 for i in range(n)],
        "s": [None if i % 5 == 0 else "s" * (i % 9 + 1) for i in range(n)],
        "event_time": [1_700_000_000_000_000 + i for i in range(n)],
    }
    seen: list[tuple[int, int | None]] = []
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view])
        data = SOURCES[source](pa.table(columns), tmp_path)
        assert engine.load("v", data, lambda done, total: seen.append((done, total))) == n
        found = engine.get_online_features(["v:x", "v:s"], {name: columns[name] for name in ("id", "code")})
        assert found.to_dict() == {"v:x": columns["x"], "v:s": columns["s"]}
        assert (
            sorted(time_us for batch in engine.store.scan("v") for time_us in batch.event_time_us.tolist())
            == (columns["event_time"])
        )
        with pytest.raises(InvalidArgument, match="view 'v': got int"):
            engine.load("v", 5)
        assert engine.store.count("v") == n
    assert seen[-1] == (n, None if source in ("csv", "reader", "batches") else n)
