"""Rows in memory become columns of the store: equal rows in every form, wrong values, and arbitrary MessagePack."""

import contextlib
import datetime as dt

import msgpack
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as values

import shorttail as st
from shorttail.client import columns as client_columns
from shorttail.errors import InvalidArgument
from shorttail.server.writer import read_params
from shorttail.sources.rows import column_batch, key_arrays
from shorttail.store.table import UNTIMED

SHOP = st.Entity("shop", keys={"country": st.String, "shop_id": st.Int64})
VIEW = st.FeatureView(
    "shops",
    entity=SHOP,
    features=[
        st.Feature("open", st.Bool),
        st.Feature("floors", st.Int32),
        st.Feature("rent", st.Float64),
        st.Feature("owner", st.String),
        st.Feature("since", st.Timestamp),
        st.Feature("taste", st.Vector(2)),
    ],
)
HOUR_US = 3_600_000_000
START = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)
START_US = 1_767_323_045_678_901
ROWS = {
    "country": ["de", "fr", "a\0"],
    "shop_id": [1, 2, 2**62],
    "open": [True, False, True],
    "floors": [1, -2, 3],
    "rent": [1.5, 2.5, 1e300],
    "owner": ["é", "", "z"],
    "since": [START, START + dt.timedelta(days=1), START],
    "taste": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
    "event_time": [START] * 3,
}


def arrow(rows):
    types = {"taste": pa.list_(pa.float32(), 2), "since": pa.timestamp("us", "UTC"), "floors": pa.int32()}
    return pa.table({name: pa.array(column, types.get(name)) for name, column in rows.items()})


def numpy(rows):
    naive = {name: [t.replace(tzinfo=None) for t in rows[name]] for name in ("since", "event_time")}
    texts = {name: np.array(rows[name], object) for name in ("country", "owner")}
    return {name: np.array(column) for name, column in (rows | naive).items()} | texts


FRAMES = {
    "lists": dict,
    "numpy": numpy,
    "pandas": pd.DataFrame,
    "pyarrow": arrow,
    "polars": lambda rows: pl.from_arrow(arrow(rows)),
}


def over_the_wire(columns):
    """Return the columns that the writer reads from a client's message."""
    return read_params(
        msgpack.packb(["shops", client_columns.encode_columns(columns)], default=client_columns._pack_other)
    )[1]


def content(batch):
    features = [(np.asarray(v).tolist(), None if n is None else n.tolist()) for v, n in batch.features]
    return [key.tolist() for key in batch.keys], batch.event_time_us.tolist(), features


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("frame", FRAMES)
def test_equal_rows_in_every_form_give_the_same_batch(frame, wire):
    rows = FRAMES[frame](ROWS)
    if wire:
        rows = over_the_wire(rows)
    batch = column_batch(VIEW, rows, HOUR_US)
    assert content(batch) == (
        [ROWS["country"], ROWS["shop_id"]],
        [START_US] * 3,
        [
            ([True, False, True], None),
            ([1, -2, 3], None),
            ([1.5, 2.5, 1e300], None),
            (["é", "", "z"], None),
            ([START_US, START_US + 86_400_000_000, START_US], None),
            ([[1, 2], [3, 4], [5, 6]], None),
        ],
    )
    assert [v.dtype for v, _ in batch.features if v.dtype != object] == [bool, "i4", "f8", "i8", "f4"]


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("frame", ["lists", "pandas", "pyarrow", "polars"])
def test_nulls_in_every_form(frame, wire):
    nulls = {name: [*ROWS[name][:2], None] for name in ("open", "floors", "rent", "owner", "since", "taste")}
    rows = FRAMES[frame](ROWS | nulls)
    batch = column_batch(VIEW, over_the_wire(rows) if wire else rows, HOUR_US)
    for feature, (_, null) in zip(VIEW.features, batch.features, strict=True):
        assert null is not None, feature.name
        assert null.tolist() == [False, False, True], feature.name


def test_pandas_missing_values():
    frame = pd.DataFrame(ROWS)
    frame["floors"] = pd.array([1, None, 3], "Int32")
    frame["open"] = pd.array([True, None, False], "boolean")
    frame["owner"] = pd.Series(["a", np.nan, "b"], dtype="category")
    frame["since"] = pd.to_datetime([START, None, START])
    for rows in (frame, over_the_wire(frame)):
        batch = column_batch(VIEW, rows, HOUR_US)
        found = {f.name: n for f, (_, n) in zip(VIEW.features, batch.features, strict=True)}
        assert {name for name, n in found.items() if n is not None and n.tolist() == [False, True, False]} == {
            "floors", "open", "owner", "since",
        }  # fmt: skip


def test_scalars_are_repeated():
    one = {name: column[0] for name, column in ROWS.items()}
    for scalars in (one, over_the_wire(one)):
        alone = column_batch(VIEW, scalars, HOUR_US)
        assert len(alone) == 1
        batch = column_batch(VIEW, scalars | {"shop_id": [7, 8, 9], "floors": None}, HOUR_US)
        keys, times, features = content(batch)
        assert (keys, times) == ([["de"] * 3, [7, 8, 9]], [START_US] * 3)
        assert features[1][1] == [True] * 3
        assert features[5][0] == [[1, 2]] * 3
    assert [array.tolist() for array in key_arrays(VIEW, {"country": "de", "shop_id": np.array([1, 2])})] == [
        ["de", "de"], [1, 2],
    ]  # fmt: skip
    with pytest.raises(InvalidArgument, match="column 'open' has 1 values where others have 3"):
        column_batch(VIEW, ROWS | {"open": [True]}, HOUR_US)


def test_the_store_makes_missing_event_times_and_a_feature_may_be_called_event_time():
    rows = {name: column for name, column in ROWS.items() if name != "event_time"}
    untimed = column_batch(VIEW, rows, HOUR_US)
    timed = st.FeatureView("timed", entity=SHOP, features=[st.Feature("event_time", st.Timestamp)])
    batch = column_batch(timed, {"country": "de", "shop_id": [1, 2], "event_time": [1, None]}, HOUR_US)
    assert batch.features[0][1].tolist() == [False, True]
    assert (untimed.event_time_us.tolist(), batch.event_time_us.tolist()) == ([UNTIMED] * 3, [UNTIMED] * 2)


def test_other_columns_are_ignored_unless_they_seem_to_be_one_that_is_missing():
    more = {"created": [START] * 3, "Rent": ["x"] * 3, "OPEN": 1, "": None}
    for rows in (ROWS | more, over_the_wire(ROWS | more), pd.DataFrame(ROWS).assign(**more)):
        batch = column_batch(VIEW, rows, HOUR_US)
        assert content(batch) == content(column_batch(VIEW, ROWS, HOUR_US))
    renamed = st.FeatureView("v", SHOP, [st.Feature("x", st.Int64, column="größe"), st.Feature("y", st.Int64)])
    keys = {"country": "de", "shop_id": 1}
    for wrong, message in (
        ({"größe": 1, "Y": 1}, "has no column 'Y'; there is 'y', and case matters"),
        ({"größe": 1, "y": 1, "EVENT_TIME": START}, "no column 'EVENT_TIME'; there is 'event_time', and case matters"),
        ({"x": 1, "y": 1}, "has no column 'x'; feature 'x' is read from column 'größe'"),
        ({"gro\u0308ße": 1, "y": 1}, "; write it in Unicode's composed form (NFC): "),
        ({"größe": 1, "z": 1}, "column 'y' is missing from the rows; they need: "),
    ):
        with pytest.raises(InvalidArgument) as caught:
            column_batch(renamed, keys | wrong, HOUR_US)
        assert message in caught.value.message
    complete = keys | {"größe": 1, "x": 2, "y": 3, "event_time": START, "Event_Time": 5}
    assert column_batch(renamed, complete, HOUR_US).features[0][0].tolist() == [1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"country": ["de", 1, "fr"]}, "key 'country' takes String; got 1 (int) at row 1"),
        ({"country": [b"de"] * 3}, "key 'country' takes String; got b'de' (bytes) at row 0"),
        ({"shop_id": [1, 2, 2**63]}, "key 'shop_id' takes Int64; got 9223372036854775808 (int) at row 2"),
        ({"shop_id": [1, 2, 2**70]}, "key 'shop_id' takes Int64; got 1180591620717411303424 (int) at row 2"),
        ({"shop_id": [1, None, 2]}, "key 'shop_id' is null at row 1; a key needs a value"),
        ({"shop_id": [[1], [2], [3]]}, "key 'shop_id' takes Int64; got [1] (list) at row 0"),
        ({"shop_id": np.ones((3, 1))}, "key 'shop_id' takes Int64; got an array of shape (3, 1)"),
        ({"shop_id": {"a": 1}}, "key 'shop_id' takes Int64; got {'a': 1} (dict)"),
        ({"floors": [1, 2, 3e9]}, "column 'floors' takes Int32; got 3000000000.0 (float) at row 2"),
        ({"floors": np.array([1, 2, 3e9])}, "column 'floors' takes Int32; got 3000000000.0 (float64) at row 2"),
        ({"floors": [1, np.inf, 2]}, "column 'floors' takes Int32; got inf (float) at row 1"),
        ({"floors": [True, 2, 3]}, "column 'floors' takes Int32; got True (bool) at row 0"),
        ({"open": [1, 0, 2]}, "column 'open' takes Bool; got 2 (int) at row 2"),
        (
            {"owner": ["a", "b", "\ud800"]},
            "column 'owner' takes String; got text that is not UTF-8, '\\ud800' (str) at row 2",
        ),
        (
            {"owner": ["a", "b", "c" * 65_536]},
            "column 'owner' takes String; got text of 65536 bytes, more than 65535 at row 2",
        ),
        (
            {"rent": ["x" * 99] * 3},
            "column 'rent' takes Float64; got 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... (str) at row 0",
        ),
        ({"since": ["2026", "2026", "2026"]}, "column 'since' takes Timestamp; got '2026' (str) at row 0"),
        ({"taste": [[1, 2], [3], [4, 5]]}, "column 'taste' takes Vector(2); got 1 number at row 1"),
        ({"taste": ["a", "b", "c"]}, "column 'taste' takes Vector(2); got 'a' (str)"),
        ({"taste": 5}, "column 'taste' takes Vector(2); got 5 (int)"),
        ({"taste": "12"}, "column 'taste' takes Vector(2); got '12' (str)"),
        ({"event_time": [1, None, 3]}, "column 'event_time' has no time at row 1; every row needs one"),
        ({"event_time": [[1], [2], [3]]}, "column 'event_time' takes Timestamp; got [1] (list) at row 0"),
    ],
)
def test_wrong_values_are_named(changed, message):
    with pytest.raises(InvalidArgument) as caught:
        column_batch(VIEW, ROWS | changed, HOUR_US)
    assert caught.value.message.startswith(f"view 'shops': {message}")


anything = values.recursive(
    values.none() | values.booleans() | values.integers(-(2**63), 2**64 - 1) | values.floats() | values.text(max_size=5)
    | values.binary(max_size=5) | values.builds(msgpack.ExtType, values.integers(0, 127), values.binary(max_size=20))
    | values.builds(msgpack.Timestamp, values.integers(0, 2**34 - 1)),
    lambda inner: values.lists(inner, max_size=4) | values.dictionaries(values.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)  # fmt: skip


@given(values.fixed_dictionaries({name: anything | values.just(column) for name, column in ROWS.items()}))
def test_arbitrary_messagepack_gives_rows_or_an_error(columns):
    packed = msgpack.packb(["shops", columns], default=client_columns._pack_other)
    with contextlib.suppress(InvalidArgument):
        batch = column_batch(VIEW, read_params(packed)[1], HOUR_US)
        assert len(batch) > 0
        batch.check(VIEW)


@given(values.lists(values.integers(-(2**63), 2**63 - 1), min_size=1), values.lists(values.just(1.0)))
def test_integers_beside_doubles_are_not_rounded(integers, doubles):
    given = integers + doubles
    assert key_arrays(VIEW, {"country": "de", "shop_id": given})[1].tolist() == given


@pytest.mark.parametrize("frame", ["pandas", "pyarrow", "polars"])
def test_a_column_of_numbers_in_a_table_is_no_single_vector(frame):
    """The view's vector has two numbers, and the table two rows: the numbers are those of two rows."""
    table = pd.DataFrame({name: column[:2] for name, column in ROWS.items()} | {"taste": [1.0, 2.0]})
    rows = {"pandas": table, "pyarrow": pa.Table.from_pandas(table), "polars": pl.from_pandas(table)}[frame]
    with pytest.raises(InvalidArgument, match="column 'taste' has numbers where vectors are expected"):
        column_batch(VIEW, rows, HOUR_US)
