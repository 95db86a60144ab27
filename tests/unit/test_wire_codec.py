"""The native MessagePack codec against msgpack: it decodes columns, encodes arrays, and finds the end of a message."""

import math
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as values
from hypothesis.extra import numpy as arrays

from shorttail import Bool, Float64, Int32, Int64, String, Timestamp, Vector, protocol
from shorttail._native import wire
from shorttail._native.columns import Columns
from shorttail.config import LIMITS
from shorttail.define.values import Refused, as_column
from shorttail.errors import InvalidArgument, ResourceExhausted, ShorttailError

DTYPES = {"key": Int64, "amount": Float64, "name": String, "taste": Vector(2), "new": Bool}
GOOD = {"key": 1, "amount": 2.5, "name": "é", "taste": [1.0, 2.0], "new": True}
CODES = {"bool": 1, "int32": 2, "int64": 3, "float32": 4, "float64": 5, "uint8": 9}
TIMES = CODES | {"datetime64[us]": 7}


def columns_of(dtypes=DTYPES):
    return Columns(list(dtypes), list(dtypes.values()))


def tensor(array):
    array = np.asarray(array)
    head = struct.pack(f"<BB{array.ndim}I", TIMES[array.dtype.name], array.ndim, *array.shape)
    return msgpack.ExtType(1, head + array.tobytes())


def untensor(ext):
    code, n_dims = ext.data[0], ext.data[1]
    shape = struct.unpack_from(f"<{n_dims}I", ext.data, 2)
    dtype = next(name for name, known in CODES.items() if known == code)
    return np.frombuffer(ext.data, dtype, offset=2 + 4 * n_dims).reshape(shape)


# -- decoding columns --------------------------------------------------------------------------------------------

int64s = values.integers(-(2**63), 2**63 - 1)
ROW = {
    "key": int64s | values.none(),
    "amount": values.floats(width=32) | int64s | values.booleans() | values.none(),
    "name": values.text(max_size=40) | values.none(),
    # [NaN, NaN] alone means two missing rows, as [null, null] does.
    "taste": values.lists(values.floats(width=32) | values.integers(-9, 9), min_size=2, max_size=2).filter(
        lambda vector: any(number == number for number in vector)
    )
    | values.none(),
    "new": values.booleans() | values.none(),
}


@given(values.lists(values.fixed_dictionaries(ROW), min_size=1, max_size=40), values.booleans())
def test_decoded_columns_equal_appended_python_values(rows, single_floats):
    request = {name: [row[name] for row in rows] for name in DTYPES}
    if all(row["taste"] is None for row in rows):
        request["taste"] = None  # [null, null] could also mean a single vector of nulls
    ours, oracle = columns_of(), columns_of()
    assert wire.read_columns(ours, msgpack.packb(request, use_single_float=single_floats)) == len(rows)
    for row in rows:
        oracle.append(row)
    for name in DTYPES:
        np.testing.assert_array_equal(ours.column(name), oracle.column(name))


@given(values.lists(values.floats(), min_size=1, max_size=30))
def test_doubles_arrive_to_the_last_bit(numbers):
    columns = columns_of({"amount": Float64})
    wire.read_columns(columns, msgpack.packb({"amount": numbers}))
    assert columns.column("amount").tobytes() == np.array(numbers).tobytes()


@given(values.fixed_dictionaries(ROW), values.integers(2, 9))
def test_scalars_beside_an_array_are_repeated(row, n):
    columns, oracle = columns_of(), columns_of()
    assert wire.read_columns(columns, msgpack.packb(row | {"key": list(range(n))})) == n
    assert oracle.append(row | {"key": list(range(n))}) == n
    for name in DTYPES:
        np.testing.assert_array_equal(columns.column(name), oracle.column(name))


@given(values.data())
def test_tensors_are_decoded_as_columns(data):
    n = data.draw(values.integers(1, 20))
    sent = {
        "key": data.draw(arrays.arrays(values.sampled_from(["int32", "int64", "uint8"]), n)),
        "amount": data.draw(arrays.arrays(values.sampled_from(list(CODES)), n)),
        "taste": data.draw(arrays.arrays(values.sampled_from(["float32", "int32"]), (n, 2))),
        "new": data.draw(arrays.arrays("bool", n)),
    }
    columns = columns_of()
    packed = msgpack.packb({name: tensor(array) for name, array in sent.items()} | {"name": "same"})
    assert wire.read_columns(columns, packed) == n
    for name, array in sent.items():
        np.testing.assert_array_equal(columns.column(name), array.astype(columns.column(name).dtype))


def test_a_tensor_without_dimensions_is_a_scalar_and_a_flat_tensor_is_a_single_vector():
    columns = columns_of()
    request = GOOD | {"key": [1, 2], "amount": tensor(np.float32(0.5)), "taste": tensor(np.float32([3, 4]))}
    assert wire.read_columns(columns, msgpack.packb(request)) == 2
    assert columns.column("amount").tolist() == [0.5, 0.5]
    assert columns.column("taste").tolist() == [[3, 4], [3, 4]]


def test_nulls_inside_vectors_and_in_place_of_vectors():
    columns = columns_of()
    request = GOOD | {"key": [1, 2, 3], "taste": [None, [1, None], [2, 3]]}
    assert wire.read_columns(columns, msgpack.packb(request)) == 3
    np.testing.assert_array_equal(columns.column("taste"), [[math.nan] * 2, [1, math.nan], [2, 3]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key": "x"}, "column 'key' takes Int64; got 'x' (str)"),
        ({"key": b"x"}, "column 'key' takes Int64; got b'x' (bytes)"),
        ({"key": 1.5}, "column 'key' takes Int64; got 1.5 (float)"),
        ({"key": True}, "column 'key' takes Int64; got True (bool)"),
        ({"key": 1 << 63}, "column 'key' takes Int64; got 9223372036854775808 (int)"),
        ({"key": [1, "x"]}, "column 'key' takes Int64; got 'x' (str) at row 1"),
        ({"key": [[1]]}, "column 'key' takes Int64; got [1] (list) at row 0"),
        ({"key": {"a": 1}}, "column 'key' takes Int64; got {'a': 1} (dict)"),
        ({"key": 2.0**53 + 2}, "column 'key' takes Int64; got 9007199254740994.0 (float)"),
        ({"key": msgpack.Timestamp(1)}, "column 'key' takes Int64; got "),
        ({"amount": msgpack.Timestamp(1)}, "column 'amount' takes Float64; got "),
        ({"key": tensor(np.array([1.0, 1.5]))}, "column 'key' takes Int64; got 1.5 (float64) at row 1"),
        ({"key": tensor(np.array([True]))}, "column 'key' takes Int64; got True (bool) at row 0"),
        ({"key": tensor(np.array([5], "M8[us]"))}, "column 'key' takes Int64; got 1970-01-01T00:00:00.000005"),
        ({"amount": tensor(np.array([5], "M8[us]"))}, "column 'amount' takes Float64; got 1970-01-01T00:00:00.000005"),
        ({"taste": tensor(np.zeros((1, 2), "M8[us]"))}, "column 'taste' takes Vector(2); got an array of datetime64"),
        ({"key": tensor(np.zeros((2, 2), np.int64))}, "column 'key' takes Int64; got an array of shape (2, 2)"),
        ({"key": tensor(np.zeros(0, np.int64))}, "column 'key' is empty: send at least one value"),
        ({"key": msgpack.ExtType(1, b"")}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x03\x01\xff\xff\xff\xff")}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x04\x09" + bytes(36))}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x06\x00" + bytes(8))}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x03\x08" + b"\xff" * 32)}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(9, b"12")}, "column 'key': ext type 9 is not known"),
        ({"key": [msgpack.ExtType(9, b"12")]}, "column 'key': ext type 9 is not known"),
        ({"amount": "1"}, "column 'amount' takes Float64; got '1' (str)"),
        ({"name": 3}, "column 'name' takes String; got 3 (int)"),
        ({"name": tensor(np.array([1]))}, "column 'name' takes String; got 1 (int64) at row 0"),
        ({"name": "n" * 70_000}, "column 'name' takes String; got text of 70000 bytes, more than 65535"),
        ({"taste": [1, 2, 3]}, "column 'taste' takes Vector(2); got 3 numbers"),
        ({"taste": ["a", "b"]}, "column 'taste' takes Vector(2); got 'a' (str)"),
        ({"taste": [[1, 2], 3]}, "column 'taste' takes Vector(2); got 3 (int) at row 1"),
        ({"taste": 3}, "column 'taste' takes Vector(2); got 3 (int)"),
        ({"taste": []}, "column 'taste' is empty: send at least one value"),
        ({"taste": tensor(np.float32([1, 2, 3]))}, "column 'taste' takes Vector(2); got 3 numbers"),
        ({"new": 2}, "column 'new' takes Bool; got 2 (int)"),
        ({"new": tensor(np.array([1, 2]))}, "column 'new' takes Bool; got 2 (int64) at row 1"),
        ({"key": []}, "column 'key' is empty: send at least one value"),
        ({"key": [1, 2], "amount": [1.0, 2.0, 3.0]}, "column 'key' has 2 values where others have 3"),
        ({"key": list(range(16_385))}, "16385 rows in one request; at most 16384 are taken"),
        ({"kay": 1}, "unknown column 'kay'; columns: key, amount, name, taste, new"),
        ({7: 1}, "unknown column"),
    ],
)
def test_a_wrong_value_is_named_and_the_batch_stays_unchanged(wrong, message):
    columns = columns_of()
    wire.read_columns(columns, msgpack.packb(GOOD))
    with pytest.raises(InvalidArgument) as caught:
        wire.read_columns(columns, msgpack.packb(GOOD | wrong))
    assert caught.value.message.startswith(message)
    assert columns.n_rows == 1
    wire.read_columns(columns, msgpack.packb(GOOD | {"key": 5, "name": "after"}))
    assert columns.column("key").tolist() == [1, 5]
    assert columns.column("name").tolist() == ["é", "after"]


def test_a_missing_and_a_repeated_column_are_named():
    columns = columns_of({"key": Int64, "amount": Float64})
    with pytest.raises(InvalidArgument, match="missing column 'amount'; columns: key, amount"):
        wire.read_columns(columns, msgpack.packb({"key": 1}))
    twice = b"\x83" + b"".join(msgpack.packb(part) for part in ("key", 1, "amount", 1.0, "key", 2))
    with pytest.raises(InvalidArgument, match="column 'key' is given twice"):
        wire.read_columns(columns, twice)
    assert columns.n_rows == 0


# -- the decoder against define/values.py --------------------------------------------------------------------------

COLUMN_TYPES = [Bool, Int32, Int64, Float64, String, Timestamp, Vector(2)]
microseconds = values.integers(-(2**63), 2**63 - 1) | values.integers(-(10**15), 10**15)
times = values.builds(lambda us: msgpack.Timestamp(us // 10**6, us % 10**6 * 1000 + 999), microseconds)
item = (
    values.none()
    | values.booleans()
    | values.integers(-(2**63), 2**64 - 1)
    | values.sampled_from([0, 1, 2**31, -(2**31), 2**53 + 1, 2**63])
    | values.floats()
    | values.sampled_from([0.0, 1.0, -3.0, 2.0**31, 2.0**53, 2.0**53 + 2])
    | values.text(max_size=5)
    | values.sampled_from(["\udcff", "\udcc3\udca9x", "2020-01-01T00:00:00Z", "1969-12-31", "x" * 31])
    | values.binary(max_size=3)
    | times
)
a_column = (
    item
    | values.lists(item, max_size=4)
    | values.sampled_from(
        [values.booleans(), values.integers(-(2**31), 2**31), values.floats(), values.text(), times]
    ).flatmap(lambda alike: values.lists(alike | values.none(), max_size=4))
    | values.lists(values.none() | values.lists(item, min_size=1, max_size=2), max_size=3)
    | values.dictionaries(values.text(max_size=2), item, max_size=1)
)
a_tensor = values.sampled_from(sorted(TIMES)).flatmap(
    lambda kind: arrays.arrays(kind, values.sampled_from([(), 1, 2, 3, (1, 2), (2, 2), (2, 3), (0, 2), 0]))
)


def from_the_wire(message, dtype):
    columns = Columns(["x"], [dtype])
    try:
        rows = wire.read_columns(columns, message)
    except InvalidArgument as error:
        assert columns.n_rows == 0
        return error.message
    assert rows == columns.n_rows
    return columns.column("x")


def by_the_rules(message, dtype):
    """Return the expected column or error: msgpack and define/values.py, without a fast path."""
    given = msgpack.unpackb(message, ext_hook=protocol.unpack_ext, unicode_errors="surrogateescape")["x"]
    try:
        found, nulls, _ = as_column(dtype, given)
    except Refused as error:
        return error.error("column 'x'", dtype).message
    if not len(found):
        return "column 'x' is empty: send at least one value"
    if nulls is not None and not (dtype.is_float or dtype.is_vector):
        found[nulls] = None if dtype == String else 0
    return found


def agree(message, dtype):
    ours, expected = from_the_wire(message, dtype), by_the_rules(message, dtype)
    if isinstance(expected, str) or isinstance(ours, str):
        assert ours == expected
    else:
        np.testing.assert_array_equal(ours, expected)


@given(values.sampled_from(COLUMN_TYPES), a_column)
def test_any_column_gives_the_result_of_define_values(dtype, given):
    agree(msgpack.packb({"x": given}, unicode_errors="surrogateescape"), dtype)


@given(values.sampled_from(COLUMN_TYPES), a_tensor)
def test_any_tensor_gives_the_result_of_define_values(dtype, array):
    agree(msgpack.packb({"x": tensor(array)}), dtype)


@pytest.mark.parametrize(
    ("payload", "microseconds"),
    [
        ("d6ff 00000001", 1_000_000),
        ("d7ff 0000000c 00000001", 1_000_000),  # 3 ns, cut off
        (f"d7ff {(999_999_999 << 34 | 0x3FFFFFFFF):016x}", 0x3FFFFFFFF * 1_000_000 + 999_999),
        (f"c70cff 3b9ac9ff {(-1) % 2**64:016x}", -1),  # 1 ns before 1970
        (f"c70cff 00000000 {(-62_135_596_800) % 2**64:016x}", -62_135_596_800_000_000),
        (f"c70cff {775_807_999:08x} {9_223_372_036_854:016x}", 2**63 - 1),
        (f"c70cff {224_192_000:08x} {(-9_223_372_036_855) % 2**64:016x}", -(2**63)),
    ],
)
def test_the_three_forms_of_a_timestamp(payload, microseconds):
    message = b"\x81\xa1x" + bytes.fromhex(payload)
    assert from_the_wire(message, Timestamp).tolist() == [microseconds]
    assert from_the_wire(b"\x81\xa1x\x92\x07" + bytes.fromhex(payload), Timestamp).tolist() == [7, microseconds]


@pytest.mark.parametrize(
    "payload",
    [
        f"d7ff {(1_000_000_000 << 34):016x}",  # 10**9 ns, one too many
        f"c70cff 3b9aca00 {0:016x}",
        "c705ff 0000000000",  # no timestamp has five bytes
        f"c70cff 00000000 {2**62:016x}",  # more than 64 bits of microseconds
        f"c70cff 00000000 {9_223_372_036_855:016x}",
    ],
)
def test_malformed_and_out_of_range_timestamps_are_refused(payload):
    for message in (b"\x81\xa1x" + bytes.fromhex(payload), b"\x81\xa1x\x91" + bytes.fromhex(payload)):
        assert from_the_wire(message, Timestamp).startswith("column 'x'")


def test_a_tensor_of_times():
    sent = np.array(["1969-12-31T23:59:59.999999", "NaT", "2026-01-31"], "M8[us]")
    columns = columns_of({"at": Timestamp})
    assert wire.read_columns(columns, msgpack.packb({"at": tensor(sent)})) == 3
    assert columns.column("at").tolist() == [-1, 0, sent[2].astype(int)]
    required = Columns(["at"], [Timestamp], required=["at"])
    with pytest.raises(InvalidArgument, match="column 'at' takes Timestamp; got a missing value at row 1"):
        wire.read_columns(required, msgpack.packb({"at": tensor(sent)}))


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\x80", b"12345678\x80"]
)
def test_text_that_is_not_utf8_is_refused(bad):
    message = b"\x81\xa1x\x92\xa1a" + msgpack.packb(bad, use_bin_type=False)
    assert from_the_wire(message, String).startswith("column 'x' takes String; got text that is not UTF-8, ")
    assert from_the_wire(message, String).endswith(" (str) at row 1")
    assert from_the_wire(message, Int64) == "column 'x' takes Int64; got 'a' (str) at row 0"


@pytest.mark.parametrize("nothing", [None, math.nan, tensor(np.float64("nan")), tensor(np.datetime64("NaT", "us"))])
@pytest.mark.parametrize("dtype", [Bool, Int32, Int64, String, Timestamp])
def test_missing_values_are_refused_or_replaced(dtype, nothing):
    if dtype == String and isinstance(nothing, msgpack.ExtType):
        return
    required = Columns(["x"], [dtype], required=["x"])
    with pytest.raises(InvalidArgument, match=r"takes .*; got a missing value: send a value, or let the model say"):
        wire.read_columns(required, msgpack.packb({"x": nothing}))
    good = {Bool: True, String: "n"}.get(dtype, 5)
    replaced = Columns(["x"], [dtype], instead={"x": good})
    assert wire.read_columns(replaced, msgpack.packb({"x": nothing})) == 1
    assert wire.read_columns(replaced, msgpack.packb({"x": [None, good, math.nan]})) == 3
    assert replaced.column("x").tolist() == [good] * 4


# -- encoding arrays ---------------------------------------------------------------------------------------------

anything = arrays.arrays(
    values.sampled_from(["bool", "int32", "int64", "float32", "float64", "uint8", "float16", "int8", "uint32"]),
    arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
)


@given(anything)
def test_an_array_written_as_lists_reads_back(array):
    packed = wire.write_array(array)
    np.testing.assert_equal(msgpack.unpackb(packed), array.tolist())


@given(anything)
def test_integers_and_float32_take_as_few_bytes_as_msgpack_needs(array):
    single = array.dtype.itemsize < 8
    assert len(wire.write_array(array)) == len(msgpack.packb(array.tolist(), use_single_float=single))


@given(anything)
def test_an_array_written_as_a_tensor_reads_back(array):
    back = untensor(msgpack.unpackb(wire.write_array(array, "tensor")))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype or array.dtype.name in ("float16", "int8", "uint32")


@given(values.lists(values.text(max_size=300) | values.none(), max_size=40))
def test_strings_are_lists_in_either_encoding(texts):
    array = np.array([*texts, None], dtype=object)[:-1]
    assert msgpack.unpackb(wire.write_array(array)) == texts
    assert msgpack.unpackb(wire.write_array(array, "tensor")) == texts


def test_rows_marked_missing_are_nil():
    missing = np.array([0, 2, 1], np.uint8)
    assert msgpack.unpackb(wire.write_array(np.float32([1, 2, 3]), "list", missing)) == [1, None, None]
    assert msgpack.unpackb(wire.write_array(np.int64([[1, 2]] * 3), "list", missing)) == [[1, 2], None, None]


def test_arrays_that_are_not_contiguous_are_written():
    array = np.arange(24.0).reshape(4, 6).T[::2]
    assert msgpack.unpackb(wire.write_array(array)) == array.tolist()
    np.testing.assert_array_equal(untensor(msgpack.unpackb(wire.write_array(array, "tensor"))), array)


def test_an_array_that_cannot_be_sent_is_refused():
    with pytest.raises(ShorttailError, match="complex128 cannot be sent"):
        wire.write_array(np.zeros(1, complex))
    with pytest.raises(ShorttailError, match="9 dimensions"):
        wire.write_array(np.zeros((1,) * 9))


# -- the scanner -------------------------------------------------------------------------------------------------

plain = values.recursive(
    values.none()
    | values.booleans()
    | values.integers(-(2**63), 2**64 - 1)
    | values.floats()
    | values.text()
    | values.binary()
    | values.builds(msgpack.ExtType, values.integers(0, 127), values.binary(max_size=20)),
    lambda inner: values.lists(inner, max_size=20) | values.dictionaries(values.text(max_size=5), inner, max_size=20),
    max_leaves=60,
)


def depth(value):
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth, children), default=0)


@given(plain, values.binary(max_size=9))
def test_the_end_of_a_message_is_found_in_any_parts(value, rest):
    message = msgpack.packb(value)
    if depth(value) > LIMITS.nesting_depth:
        with pytest.raises(ResourceExhausted, match="nested more than 8 deep"):
            wire.scan(message)
        return
    assert wire.scan(message + rest) == len(message)
    assert wire.scan(message, range(len(message))) == len(message)
    for end in range(len(message)):
        assert wire.scan(message[:end]) == 0


@given(values.binary(max_size=200), values.lists(values.integers(0, 200), max_size=10))
def test_parts_do_not_change_the_result_for_any_bytes(data, cuts):
    def outcome(*arguments):
        try:
            return wire.scan(*arguments)
        except ShorttailError as error:
            return error.message

    assert outcome(data, sorted(min(cut, len(data)) for cut in cuts)) == outcome(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc1", "not MessagePack"),
        (b"\x91\xc1", "not MessagePack"),
        (b"\xc6" + struct.pack(">I", LIMITS.frame_bytes), "more than 16777216 bytes"),
        (b"\x92\xc6" + struct.pack(">I", LIMITS.frame_bytes - 6) + b"1", "more than 16777216 bytes"),
        (b"\xdd" + struct.pack(">I", LIMITS.declared_elements + 1), "more than 4000000 elements"),
        (b"\xdf\xff\xff\xff\xff", "more than 4000000 elements"),
        (b"\x91" * 9, "nested more than 8 deep"),
        (b"\xdd\x00\x1e\x84\x80" * 3, "more than 4000000 elements"),
    ],
)
def test_limits_apply_before_the_rest_of_a_message_arrives(data, message):
    with pytest.raises(ShorttailError, match=message):
        wire.scan(data)


def test_a_message_just_below_each_limit_is_taken():
    assert wire.scan(b"\xdd" + struct.pack(">I", LIMITS.declared_elements)) == 0
    assert wire.scan(b"\xc6" + struct.pack(">I", LIMITS.frame_bytes - 5)) == 0
    assert wire.scan(b"\x91" * 8) == 0
    whole = b"\xdd" + struct.pack(">I", LIMITS.declared_elements) + bytes(LIMITS.declared_elements)
    assert wire.scan(whole) == len(whole)
