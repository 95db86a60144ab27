"""What Python clients send (columns and tensors), and the addresses that they take."""

from __future__ import annotations

import datetime
import math
import subprocess
import sys
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pytest

from shorttail import errors, protocol
from shorttail.client import columns as client_columns


@pytest.mark.parametrize("address", ["", "host:", "host:x", "host:0", "host:70000", "unix:", "a:b:c", "http://x:1"])
def test_wrong_addresses_are_refused(address: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="address"):
        protocol.parse_address(address)


def test_addresses_are_parsed() -> None:
    texts = ["10.0.0.1:80", ":80", "host", "[::1]:80", "unix:/a/b"]
    assert [str(protocol.parse_address(text)) for text in texts] == [
        *("10.0.0.1:80", "127.0.0.1:80", "host:7711", "[::1]:80", "unix:/a/b")
    ]


def as_sent(value: Any) -> Any:
    """Return the column that a server decodes."""
    request = client_columns.pack_request(0, "predict", ["m", client_columns.encode_columns({"x": value})])
    unpacker = protocol.new_unpacker()
    unpacker.feed(request)
    return unpacker.unpack()[3][1]["x"]


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0,), (5,), (4, 3), (2, 0)])
def test_arrays_are_sent_as_tensors(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    for form in (array, np.asfortranarray(array), array.astype(array.dtype.newbyteorder(">"))):
        sent = as_sent(form)
        assert sent.dtype == dtype
        np.testing.assert_array_equal(sent, array)


@pytest.mark.parametrize(
    ("given", "sent"),
    [(np.int8, np.int32), (np.uint8, np.int32), (np.uint32, np.int64), (np.uint64, np.int64), (np.float16, np.float32)],
)
def test_other_numbers_are_widened(given: Any, sent: Any) -> None:
    assert as_sent(np.array([1, 2], given)).dtype == sent


def test_plain_values_are_sent_unchanged() -> None:
    for value in (1, 2.5, True, "text", None, [1, None, 3], ["a", None], [[1.0, 2.0]]):
        assert as_sent(value) == value
    assert as_sent((1, 2)) == [1, 2]
    assert as_sent(range(3)) == [0, 1, 2]
    for scalar, plain in ((np.int32(7), 7), (np.float32(0.5), 0.5), (np.bool_(True), True), (np.array(3), 3)):
        assert as_sent(scalar) == plain
        assert type(as_sent(scalar)) is type(plain)
    assert as_sent([np.int64(1), np.float64(2.0)]) == [1, 2.0]
    assert as_sent([np.zeros(2), np.ones(2)]) == [[0.0, 0.0], [1.0, 1.0]]
    assert as_sent(np.array(["a", "b"])) == ["a", "b"]
    assert as_sent(np.array(["a", None, np.float32("nan")], object)) == ["a", None, None]
    assert as_sent([np.str_("a"), np.datetime64("NaT"), np.ma.masked]) == ["a", None, None]


def test_numbers_are_sent_without_rounding_where_the_protocol_allows_it() -> None:
    assert as_sent([2**53 + 1, 2**63, -(2**63)]) == [2**53 + 1, 2**63, -(2**63)]
    assert as_sent(np.array([1, 2**63], np.uint64)) == [1, 2**63]
    assert as_sent([2**70, -(2**70), 2**2000, -(2**2000)]) == [2.0**70, -(2.0**70), math.inf, -math.inf]
    assert as_sent(2**70) == 2.0**70
    assert as_sent([Decimal("1.5"), Decimal(2**53 + 1), Decimal("1e30"), Decimal("NaN")]) == [
        1.5,
        2**53 + 1,
        1e30,
        None,
    ]
    assert as_sent(np.array([1.5], np.longdouble)).dtype == np.float64


def test_masked_elements_are_sent_as_missing() -> None:
    mask = [False, True]
    assert as_sent(np.ma.array([1, 2], mask=mask)) == [1, None]
    assert as_sent(np.ma.array([True, False], mask=mask)) == [True, None]
    assert as_sent(np.ma.array(["a", "b"], mask=mask)) == ["a", None]
    np.testing.assert_array_equal(as_sent(np.ma.array([1.5, 2.5], np.float32, mask=mask)), np.float32([1.5, math.nan]))
    np.testing.assert_array_equal(as_sent(np.ma.array([1, 2], "M8[s]", mask=mask)), np.array([10**6, "NaT"], "M8[us]"))
    assert as_sent(np.ma.array([[1, 2], [3, 4]], mask=[mask, mask])) == [[1, None], [3, None]]


SENT = "column 'x' takes numbers, bools, text, times or vectors; got "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x", "b'x' (bytes)"),
        ([1, 1j], "1j (complex) at row 1"),
        (["a", object], "<class 'object'> (type) at row 1"),
        ([[1.0], [1j]], "1j (complex) at row 1"),
        ([["\ud800"]], "text that is not UTF-8, '\\ud800' (str) at row 0"),
        (np.array([b"x"]), "b'x' (|S1) at row 0"),
        (datetime.timedelta(1), "datetime.timedelta(days=1) (timedelta)"),
        (np.array([1, 2], "m8[s]"), "1 seconds (timedelta64[s]) at row 0"),
        (["a", np.timedelta64(1, "s")], "1 seconds (timedelta64) at row 1"),
        (1j, "1j (complex)"),
        (np.array([1j]), "1j (complex128) at row 0"),
        ({"a": 1}, "{'a': 1} (dict)"),
        (object, "<class 'object'> (type)"),
        ("\udcff", "text that is not UTF-8, '\\udcff' (str)"),
        (["a", "\ud800"], "text that is not UTF-8, '\\ud800' (str) at row 1"),
        (np.array(["a", "\ud800"]), "text that is not UTF-8, '\\ud800' (str) at row 1"),
        (np.array([300_000 - 1970], "M8[Y]"), "300000 (datetime64[Y]) at row 0"),
        ([np.datetime64(2**62, "s")], "146138514283-06-19T07:45:04 (datetime64[s]) at row 0"),
        (np.zeros((1,) * 9), "an array of 9 dimensions, more than 8"),
    ],
)
def test_a_client_refuses_values_that_cannot_be_sent(value: Any, message: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        as_sent(value)
    assert caught.value.message == SENT + message


def test_times_are_sent_as_times() -> None:
    day = msgpack.Timestamp(86_400)
    for unit in ("D", "h", "m", "s", "ms", "us", "ns"):
        sent = as_sent(np.array(["1970-01-02", "NaT"], f"datetime64[{unit}]"))
        assert sent.dtype == "M8[us]"
        np.testing.assert_array_equal(sent, np.array(["1970-01-02", "NaT"], "M8[us]"))
    assert as_sent(np.datetime64("1970-01-02")) == day
    assert as_sent(datetime.datetime(1970, 1, 2)) == day
    assert as_sent(datetime.date(1970, 1, 2)) == day
    zone = datetime.timezone(datetime.timedelta(hours=1))
    assert as_sent(datetime.datetime(1970, 1, 2, 1, tzinfo=zone)) == day
    assert as_sent([datetime.datetime(1970, 1, 2), None, 7, "x"]) == [day, None, 7, "x"]
    assert as_sent(np.datetime64(-1, "ns")) == msgpack.Timestamp(-1, 999_999_000)  # rounded towards the past
    assert as_sent(np.array([-1], "M8[ns]")).astype(int).tolist() == [-1]
    assert as_sent(np.datetime64("NaT")) is None
    far = np.datetime64("20000-01-01")  # datetime ends with the year 9999
    assert as_sent(far) == msgpack.Timestamp(int(far.astype("M8[s]").astype(int)))


def test_pandas_and_arrow_columns() -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    assert as_sent(pandas.Series([1, 2])).dtype == np.int64
    assert as_sent(pandas.Series([1, None], dtype="Int64")) == [1, None]
    assert as_sent(pandas.Series([2**63, None], dtype="UInt64")) == [2**63, None]
    assert as_sent(pandas.Series([True, None], dtype="boolean")) == [True, None]
    np.testing.assert_array_equal(as_sent(pandas.Series([0.5, None], dtype="Float64")), [0.5, math.nan])
    assert as_sent(pandas.Series(["a", None], dtype="string")) == ["a", None]
    assert as_sent(pandas.Series(["a", "b"], dtype="category")) == ["a", "b"]
    assert as_sent(pandas.Series([1, None], dtype="int64[pyarrow]")) == [1, None]
    assert as_sent(pandas.DataFrame({"a": [1], "b": [2]})).tolist() == [[1, 2]]
    assert as_sent([pandas.NA, pandas.NaT, 1]) == [None, None, 1]
    assert as_sent(pandas.Timestamp("1970-01-01T00:00:01Z")) == msgpack.Timestamp(1)
    times = pandas.Series(pandas.to_datetime(["1970-01-01T01:00:00+01:00", None], utc=True))
    np.testing.assert_array_equal(as_sent(times), np.array([0, "NaT"], "M8[us]"))
    assert as_sent(pyarrow.array([1, 2])).dtype == np.int64
    assert as_sent(pyarrow.array([1, None])) == [1, None]
    assert as_sent(pyarrow.scalar(3)) == 3
    for text in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        assert as_sent(pyarrow.array(["a", None], text)) == ["a", None]
    assert as_sent(pyarrow.array(["a", "b", "a"]).dictionary_encode()) == ["a", "b", "a"]
    assert as_sent(pyarrow.chunked_array([[1], [2]])).tolist() == [1, 2]
    assert as_sent(pyarrow.nulls(2)) == [None, None]
    assert as_sent(pyarrow.array([Decimal("1.50"), None])) == [1.5, None]
    for kind in (pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.float32(), 2)):
        assert as_sent(pyarrow.array([[1, 2], [3, 4]], kind)).tolist() == [[1, 2], [3, 4]]
    for kind in (pyarrow.list_view(pyarrow.int64()), pyarrow.large_list(pyarrow.int64())):
        assert as_sent(pyarrow.array([[1, None], None], kind)) == [[1, None], None]
    for kind in (pyarrow.date32(), pyarrow.date64(), pyarrow.timestamp("ns"), pyarrow.timestamp("s", "Asia/Tokyo")):
        sent = as_sent(pyarrow.array([datetime.datetime(1970, 1, 2), None], kind))
        np.testing.assert_array_equal(sent, np.array(["1970-01-02", "NaT"], "M8[us]"))
    for refused in (pyarrow.array([1], pyarrow.duration("s")), pyarrow.array([b"x"]), pyarrow.array([{"a": 1}])):
        with pytest.raises(errors.InvalidArgument, match=r"column 'x' takes numbers, .* at row 0"):
            as_sent(refused)
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    sent = client_columns.encode_columns(frame)
    assert protocol.unpack_tensor(sent["a"].data).tolist() == [1, 2]
    assert sent["b"] == ["x", "y"]


def test_polars_columns() -> None:
    polars = pytest.importorskip("polars")
    assert as_sent(polars.Series([1, None])) == [1, None]
    assert as_sent(polars.Series(["a", None])) == ["a", None]
    assert as_sent(polars.Series(["a", "b"], dtype=polars.Categorical)) == ["a", "b"]
    assert as_sent(polars.Series([[1.0, 2.0]], dtype=polars.Array(polars.Float32, 2))).tolist() == [[1, 2]]
    times = as_sent(polars.Series([datetime.datetime(1970, 1, 2), None]))
    np.testing.assert_array_equal(times, np.array(["1970-01-02", "NaT"], "M8[us]"))
    with pytest.raises(errors.InvalidArgument, match=r"column 'x' takes numbers, .* at row 0"):
        as_sent(polars.Series([datetime.timedelta(1)]))


def test_a_client_imports_no_store_models_or_table_libraries() -> None:
    script = """
import sys
import shorttail as st
from shorttail.client.columns import encode_columns
try:
    st.Client("127.0.0.1:1", timeout_s=0.1).predict("m", {"a": [1, None], "b": "x"})
except st.ShorttailError:
    pass
encode_columns({"a": [1.5, None], "b": "x"})
print(*{"lmdb", "onnxruntime", "pandas", "pyarrow", "polars", "shorttail.store"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_tensors_have_the_bytes_of_the_format() -> None:
    """The expected bytes follow docs/protocol.md."""
    tensor = protocol.pack_tensor(np.array([[1.0, 2.0]], np.float32))
    assert tensor.code == 1
    assert tensor.data == bytes.fromhex("0402 01000000 02000000 0000803f 00000040")
    times = protocol.pack_tensor(np.array(["1970-01-01T00:00:01", "NaT"], "M8[us]"))
    assert times.data == bytes.fromhex("0701 02000000 40420f0000000000 0000000000000080")
    np.testing.assert_array_equal(protocol.unpack_tensor(times.data), np.array([10**6, "NaT"], "M8[us]"))


def test_any_byte_but_zero_is_true_in_a_tensor() -> None:
    assert protocol.unpack_tensor(bytes.fromhex("0101 03000000 000107")).astype(np.uint8).tolist() == [0, 1, 1]


def test_ext_values_of_other_types_are_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="ext type 9 is not known"):
        protocol.unpack_ext(9, b"12")


@pytest.mark.parametrize(
    "payload",
    [
        *("", "04", "0601000000", "0001000000", "0a01000000", "04090000"),
        "040101000000",  # shape [1], no data
        "0401010000000000803f00",  # one byte too long
        "0402ffffffffffffffff",  # shape of almost 2**64 elements
    ],
)
def test_malformed_tensors_are_refused(payload: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="tensor"):
        protocol.unpack_tensor(bytes.fromhex(payload))
