"""What Python clients put on the wire: columns, tensors, addresses."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest

from shorttail import errors, protocol
from shorttail.client import columns as client_columns


@pytest.mark.parametrize("address", ["", "host:", "host:x", "host:0", "host:70000", "unix:", "a:b:c", "http://x:1"])
def test_addresses_that_are_not(address: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="address"):
        protocol.parse_address(address)


def test_addresses_are_parsed() -> None:
    texts = ["10.0.0.1:80", ":80", "host", "[::1]:80", "unix:/a/b"]
    assert [str(protocol.parse_address(text)) for text in texts] == [
        *("10.0.0.1:80", "127.0.0.1:80", "host:7711", "[::1]:80", "unix:/a/b")
    ]


def as_sent(value: Any) -> Any:
    """What a server gets for a column."""
    request = client_columns.pack_request(0, "predict", ["m", client_columns.encode_columns({"x": value})])
    unpacker = protocol.new_unpacker()
    unpacker.feed(request)
    return unpacker.unpack()[3][1]["x"]


@pytest.mark.parametrize("dtype", [np.bool_, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0,), (5,), (4, 3), (2, 0)])
def test_arrays_travel_as_tensors(dtype: Any, shape: tuple[int, ...]) -> None:
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


def test_plain_values_travel_as_they_are() -> None:
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
    assert as_sent(np.array(["a", None, float("nan")], object)) == ["a", None, None]


def test_times_travel_as_microseconds() -> None:
    day = 86_400_000_000
    assert as_sent(np.array(["1970-01-02"], "datetime64[D]")).tolist() == [day]
    assert as_sent(np.array(["1970-01-02", "NaT"], "datetime64[ns]")) == [day, None]
    assert as_sent(np.datetime64("1970-01-02")) == day
    assert as_sent(datetime.datetime(1970, 1, 2)) == day
    zone = datetime.timezone(datetime.timedelta(hours=1))
    assert as_sent(datetime.datetime(1970, 1, 2, 1, tzinfo=zone)) == day


def test_pandas_and_arrow_columns() -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    assert as_sent(pandas.Series([1, 2])).dtype == np.int64
    assert as_sent(pandas.Series([1, None], dtype="Int64")) == [1, None]
    assert as_sent(pandas.Series(["a", None])) == ["a", None]
    assert as_sent([pandas.NA, pandas.NaT, 1]) == [None, None, 1]
    assert as_sent(pandas.Timestamp("1970-01-01T00:00:01Z")) == 1_000_000
    assert as_sent(pyarrow.array([1, 2])).dtype == np.int64
    assert as_sent(pyarrow.array([1, None])) == [1, None]
    assert as_sent(pyarrow.array(["a", "b"])) == ["a", "b"]
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    sent = client_columns.encode_columns(frame)
    assert protocol.unpack_tensor(sent["a"].data).tolist() == [1, 2]
    assert sent["b"] == ["x", "y"]


def test_tensors_are_the_bytes_of_the_format() -> None:
    """The bytes of docs/protocol.md."""
    tensor = protocol.pack_tensor(np.array([[1.0, 2.0]], np.float32))
    assert tensor.code == 1
    assert tensor.data == bytes.fromhex("0402 01000000 02000000 0000803f 00000040")


@pytest.mark.parametrize(
    "payload",
    [
        *("", "04", "0701000000", "0001000000", "0a01000000", "04090000"),
        "040101000000",  # one float32 announced, none there
        "0401010000000000803f00",  # a byte too many
        "0402ffffffffffffffff",  # 2**64 elements
    ],
)
def test_tensors_that_are_not(payload: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="tensor"):
        protocol.unpack_tensor(bytes.fromhex(payload))
