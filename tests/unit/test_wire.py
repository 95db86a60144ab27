"""The wire codec and protocol, against msgpack, without sockets: a fake engine and a transport that only remembers."""

import math
import struct
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as values
from hypothesis.extra import numpy as arrays

from shorttail import Bool, Float64, Int64, String, Vector
from shorttail._native import wire
from shorttail._native.columns import Columns
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted, ShorttailError
from shorttail.server.batcher import Batcher

DTYPES = {"key": Int64, "amount": Float64, "name": String, "taste": Vector(2), "new": Bool}
GOOD = {"key": 1, "amount": 2.5, "name": "é", "taste": [1.0, 2.0], "new": True}
CODES = {"bool": 1, "int32": 2, "int64": 3, "float32": 4, "float64": 5, "uint8": 9}


def columns_of(dtypes=DTYPES):
    return Columns(list(dtypes), list(dtypes.values()))


def tensor(array):
    array = np.asarray(array)
    head = struct.pack(f"<BB{array.ndim}I", CODES[array.dtype.name], array.ndim, *array.shape)
    return msgpack.ExtType(1, head + array.tobytes())


def untensor(ext):
    code, n_dims = ext.data[0], ext.data[1]
    shape = struct.unpack_from(f"<{n_dims}I", ext.data, 2)
    dtype = next(name for name, known in CODES.items() if known == code)
    return np.frombuffer(ext.data, dtype, offset=2 + 4 * n_dims).reshape(shape)


# -- columns in --------------------------------------------------------------------------------------------------

int64s = values.integers(-(2**63), 2**63 - 1)
ROW = {
    "key": int64s | values.none(),
    "amount": values.floats(width=32) | int64s | values.booleans() | values.none(),
    "name": values.text(max_size=40) | values.none(),
    "taste": values.lists(values.floats(width=32) | values.integers(-9, 9), min_size=2, max_size=2) | values.none(),
    "new": values.booleans() | values.none(),
}


@given(values.lists(values.fixed_dictionaries(ROW), min_size=1, max_size=40), values.booleans())
def test_columns_from_the_wire_are_those_of_the_same_values_in_python(rows, single_floats):
    request = {name: [row[name] for row in rows] for name in DTYPES}
    if all(row["taste"] is None for row in rows):
        request["taste"] = None  # an array of nothing but nulls could as well be one vector of them
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
def test_tensors_are_taken_as_columns(data):
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


def test_a_tensor_without_dimensions_is_a_scalar_and_one_of_a_vectors_width_is_one_row():
    columns = columns_of()
    request = GOOD | {"key": [1, 2], "amount": tensor(np.float32(0.5)), "taste": tensor(np.float32([3, 4]))}
    assert wire.read_columns(columns, msgpack.packb(request)) == 2
    assert columns.column("amount").tolist() == [0.5, 0.5]
    assert columns.column("taste").tolist() == [[3, 4], [3, 4]]


def test_nulls_within_vectors_and_between_them():
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
        ({"key": tensor(np.array([1.0]))}, "column 'key' takes Int64; got a tensor of float64"),
        (
            {"key": tensor(np.zeros((2, 2), np.int64))},
            "column 'key' takes one value a row; got an array of shape (2, 2)",
        ),
        ({"key": tensor(np.zeros(0, np.int64))}, "column 'key' is empty: send at least one value"),
        ({"key": msgpack.ExtType(1, b"")}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x03\x01\xff\xff\xff\xff")}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x04\x09" + bytes(36))}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x07\x00" + bytes(8))}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(1, b"\x03\x08" + b"\xff" * 32)}, "column 'key': not a tensor"),
        ({"key": msgpack.ExtType(9, b"12")}, "column 'key': ext type 9 is not known"),
        ({"key": [msgpack.ExtType(9, b"12")]}, "column 'key' takes Int64; got ExtType(code=9, data=b'12') (ExtType)"),
        ({"amount": "1"}, "column 'amount' takes Float64; got '1' (str)"),
        ({"name": 3}, "column 'name' takes String; got 3 (int)"),
        ({"name": tensor(np.array([1]))}, "column 'name' takes String; got a tensor of int64"),
        ({"name": "n" * 70_000}, "column 'name': a string of 70000 bytes; at most 65535 are taken"),
        ({"taste": [1, 2, 3]}, "column 'taste' takes Vector(2); got values of shape (3,)"),
        ({"taste": ["a", "b"]}, "column 'taste' takes Vector(2); got ['a', 'b'] (list)"),
        ({"taste": [[1, 2], 3]}, "column 'taste' takes Vector(2); got 3 (int) at row 1"),
        ({"taste": 3}, "column 'taste' takes Vector(2); got 3 (int)"),
        ({"taste": []}, "column 'taste' is empty: send at least one value"),
        ({"taste": tensor(np.float32([1, 2, 3]))}, "column 'taste' takes Vector(2); got values of shape (3,)"),
        ({"new": 2}, "column 'new' takes Bool; got 2 (int)"),
        ({"new": tensor(np.array([1]))}, "column 'new' takes Bool; got a tensor of int64"),
        ({"key": []}, "column 'key' is empty: send at least one value"),
        ({"key": [1, 2], "amount": [1.0, 2.0, 3.0]}, "column 'key' has 2 values where others have 3"),
        ({"key": list(range(16_385))}, "16385 rows in one request; at most 16384 are taken"),
        ({"kay": 1}, "unknown column 'kay'; columns: key, amount, name, taste, new"),
        ({7: 1}, "unknown column"),
    ],
)
def test_a_wrong_value_is_named_and_leaves_the_batch_as_it_was(wrong, message):
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


# -- arrays out --------------------------------------------------------------------------------------------------

anything = arrays.arrays(
    values.sampled_from(["bool", "int32", "int64", "float32", "float64", "uint8", "float16", "int8", "uint32"]),
    arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
)


@given(anything)
def test_lists_read_back_by_msgpack_are_the_array(array):
    packed = wire.write_array(array)
    np.testing.assert_equal(msgpack.unpackb(packed), array.tolist())


@given(anything)
def test_integers_and_float32_take_as_few_bytes_as_msgpack_needs(array):
    single = array.dtype.itemsize < 8
    assert len(wire.write_array(array)) == len(msgpack.packb(array.tolist(), use_single_float=single))


@given(anything)
def test_tensors_read_back_are_the_array(array):
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


def test_arrays_are_written_whatever_their_memory_looks_like():
    array = np.arange(24.0).reshape(4, 6).T[::2]
    assert msgpack.unpackb(wire.write_array(array)) == array.tolist()
    np.testing.assert_array_equal(untensor(msgpack.unpackb(wire.write_array(array, "tensor"))), array)


def test_what_cannot_travel_is_said():
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
def test_a_message_ends_where_msgpack_says_however_it_is_cut(value, rest):
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
def test_cuts_do_not_change_what_is_found_in_any_bytes(data, cuts):
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
def test_limits_hold_before_anything_has_arrived(data, message):
    with pytest.raises(ShorttailError, match=message):
        wire.scan(data)


def test_just_under_each_limit():
    assert wire.scan(b"\xdd" + struct.pack(">I", LIMITS.declared_elements)) == 0
    assert wire.scan(b"\xc6" + struct.pack(">I", LIMITS.frame_bytes - 5)) == 0
    assert wire.scan(b"\x91" * 8) == 0
    whole = b"\xdd" + struct.pack(">I", LIMITS.declared_elements) + bytes(LIMITS.declared_elements)
    assert wire.scan(whole) == len(whole)


# -- the protocol ------------------------------------------------------------------------------------------------


class FakePlan(SimpleNamespace):
    def new_columns(self):
        return Columns(self.names, self.dtypes)


class FakeEngine:
    """Model 'double' gives twice its key; model 'broken' raises; features are the key itself, status 2 if negative."""

    def __init__(self):
        self.store = SimpleNamespace(catalog_version=1)
        self.batches = []
        self.compiled = []

    def plan_for_model(self, name, version=None):
        if name not in ("double", "broken") or version not in (None, 1, 2):
            raise NotFound(f"unknown model {name!r} version {version}")
        self.compiled.append((name, version))
        names, dtypes = ("key", "amount"), (Int64, Float64)
        return FakePlan(kind="predict", model=name, version=version or 2, names=names, dtypes=dtypes,
                        view_names=("stats",), feature_names=(), has_default=(),
                        runner=None, split=None, shadow=None)  # fmt: skip

    def plan_for_features(self, references):
        self.compiled.append(references)
        if "v:none" in references:
            raise NotFound("unknown feature 'v:none'")
        return FakePlan(kind="features", model="", version=0, names=("key",), dtypes=(Int64,), view_names=("v",),
                        feature_names=references, has_default=tuple(r == "v:given" for r in references),
                        runner=None, split=None, shadow=None)  # fmt: skip

    @property
    def plans_version(self):
        return self.store.catalog_version

    def follow(self):
        pass

    def prepare(self, plan, columns):
        return plan, self.run(plan, columns)

    def run(self, plan, columns):
        keys = columns.column("key")
        self.batches.append((plan.model, len(keys)))
        if plan.model == "broken":
            raise RuntimeError("first line\nsecond line")
        missing = np.where(keys < 0, 2, 0).astype(np.uint8)
        if plan.kind == "predict":
            outputs = [("label", keys * 2), ("p", np.stack([keys, -keys], 1).astype(np.float32))]
            return SimpleNamespace(outputs=outputs, view_statuses=missing[None], feature_statuses=None,
                                   version=plan.version)  # fmt: skip
        return SimpleNamespace(
            outputs=[(name, keys.astype(np.float64)) for name in plan.feature_names],
            view_statuses=missing[None], feature_statuses=np.stack([missing] * len(plan.feature_names)), version=0,
        )  # fmt: skip


class FakeLoop:
    def __init__(self):
        self.soon, self.later = [], []

    def call_soon(self, callback):
        self.soon.append(callback)

    def call_later(self, delay_s, callback):
        self.later.append(callback)

    def turn(self):
        due, self.soon = self.soon, []
        for callback in due:
            callback()


class FakeTransport:
    def __init__(self):
        self.written, self.closed, self.eof, self.reading = [], False, False, True

    def set_write_buffer_limits(self, high, low):
        self.limits = (high, low)

    def write(self, data):
        assert not self.closed
        self.written.append(data)

    def write_eof(self):
        self.eof = True

    def close(self):
        self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


class Served:
    """A router with a fake engine, and peers."""

    def __init__(self):
        self.loop, self.engine, self.faults = FakeLoop(), FakeEngine(), []
        self.transport_of = {}
        self.router = wire.Router(
            self.loop, self.engine, {"ping": lambda params: "pong", "echo": lambda params: params}
        )
        Batcher(self.router, self.engine, self.faults.append)

    def connect(self):
        connection = wire.Connection(self.router)
        self.transport_of[connection] = FakeTransport()
        connection.connection_made(self.transport_of[connection])
        return connection

    def ask(self, *messages, connection=None):
        connection = connection or self.connect()
        connection.data_received(b"".join(map(msgpack.packb, messages)))
        self.loop.turn()
        return self.replies(connection)

    def replies(self, connection):
        transport = self.transport_of[connection]
        unpacker = msgpack.Unpacker()
        unpacker.feed(b"".join(transport.written))
        transport.written.clear()
        return list(unpacker)


@pytest.fixture
def served():
    return Served()


PREDICT = [0, 7, "predict", ["double", {"key": 3, "amount": 1.0}]]
PREDICTED = [1, 7, None, {"outputs": {"label": [6], "p": [[3.0, -3.0]]}, "version": 2}]
FEATURES = [0, 8, "get_online_features", [["v:a", "v:given"], {"key": [4, -1]}]]
FEATURED = [1, 8, None, {
    "feature_names": ["v:a", "v:given"], "values": [[4.0, None], [4.0, -1.0]],
    "has_default": [False, True], "statuses": [[0, 2], [0, 2]],
}]  # fmt: skip


def test_predict_and_features(served):
    assert served.ask(PREDICT, FEATURES) == [PREDICTED, FEATURED]


def test_all_requests_of_a_turn_are_one_batch_and_one_write(served):
    one, other = served.connect(), served.connect()
    for msgid in range(100):
        for connection in (one, other):
            connection.data_received(msgpack.packb([0, msgid, "predict", ["double", {"key": msgid, "amount": 0}]]))
    served.loop.turn()
    assert served.engine.batches == [("double", 200)]
    for connection in (one, other):
        assert len(served.transport_of[connection].written) == 1
        replies = served.replies(connection)
        assert [(r[1], r[3]["outputs"]["label"]) for r in replies] == [(msgid, [2 * msgid]) for msgid in range(100)]
        assert connection.in_flight == 0


def test_a_full_batch_is_closed_and_the_next_opened(served):
    n = LIMITS.batch_rows // 2
    message = [0, 1, "predict", ["double", {"key": list(range(n)), "amount": 0}]]
    replies = served.ask(message, message, message)
    assert served.engine.batches == [("double", 2 * n), ("double", n)]
    assert [reply[3]["outputs"]["label"][-1] for reply in replies] == [2 * (n - 1)] * 3


@settings(max_examples=30, deadline=None)
@given(
    values.lists(values.sampled_from([PREDICT, FEATURES, [0, 9, "ping", []]]), min_size=1, max_size=5), values.data()
)
def test_replies_are_the_same_however_the_bytes_are_cut(messages, data):
    served = Served()
    stream = b"".join(map(msgpack.packb, messages))
    cuts = sorted(data.draw(values.lists(values.integers(0, len(stream)), max_size=20)))
    connection = served.connect()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        if start < end:
            connection.data_received(stream[start:end])
    served.loop.turn()
    expected = {7: PREDICTED, 8: FEATURED, 9: [1, 9, None, "pong"]}
    replies = served.replies(connection)
    assert sorted(map(repr, replies)) == sorted(repr(expected[message[1]]) for message in messages)


def test_one_message_cut_at_every_byte_and_sent_byte_by_byte(served):
    stream = msgpack.packb(PREDICT)
    connection = served.connect()
    for cut in range(1, len(stream)):
        connection.data_received(stream[:cut])
        connection.data_received(stream[cut:])
    for k in range(len(stream)):
        connection.data_received(stream[k : k + 1])
    served.loop.turn()
    assert served.replies(connection) == [PREDICTED] * len(stream)


def test_options(served):
    def ask(options):
        return served.ask([0, 7, "predict", ["double", {"key": [3, -1], "amount": 1.0}, options]])[0]

    assert ask({"statuses": True})[3]["statuses"] == {"stats": [0, 2]}
    assert "statuses" not in ask({"statuses": False})[3]
    assert ask({"version": 1})[3]["version"] == 1
    assert ask({"version": 2})[3]["version"] == 2
    assert ask({})[3]["version"] == ask(None)[3]["version"] == 2
    assert ask({"deadline_ms": 1000})[2] is None
    assert ask({"encoding": "list"}) == ask({})
    answer = ask({"encoding": "tensor", "statuses": True})[3]
    np.testing.assert_array_equal(untensor(answer["outputs"]["p"]), np.float32([[3, -3], [-1, 1]]))
    assert untensor(answer["outputs"]["label"]).tolist() == [6, -2]
    assert untensor(answer["statuses"]["stats"]).tolist() == [0, 2]
    features = served.ask([*FEATURES[:3], [*FEATURES[3], {"encoding": "tensor"}]])[0][3]
    assert [untensor(column).tolist() for column in features["values"]] == [[4.0, -1.0]] * 2


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("predict", [], "INVALID_ARGUMENT", "predict takes [model"),
        ("predict", ["double"], "INVALID_ARGUMENT", "predict takes [model"),
        ("predict", ["double", {}, {}, {}], "INVALID_ARGUMENT", "predict takes [model"),
        ("predict", [3, {}], "INVALID_ARGUMENT", "predict takes [model"),
        ("predict", ["double", [1]], "INVALID_ARGUMENT", "predict takes [model"),
        ("predict", {"model": "double"}, "INVALID_ARGUMENT", "params of 'predict' must be an array"),
        ("predict", ["double", {"key": 1}], "INVALID_ARGUMENT", "missing column 'amount'"),
        ("predict", ["none", {"key": 1}], "NOT_FOUND", "unknown model 'none'"),
        ("predict", ["double", {}, 3], "INVALID_ARGUMENT", "options must be a map"),
        ("predict", ["double", {}, {"speed": 1}], "INVALID_ARGUMENT", "unknown option 'speed'; options: deadline_ms"),
        ("predict", ["double", {}, {3: 1}], "INVALID_ARGUMENT", "unknown option 3"),
        ("predict", ["double", {}, {"deadline_ms": "1"}], "INVALID_ARGUMENT", "option 'deadline_ms' must be a number"),
        ("predict", ["double", {}, {"deadline_ms": math.nan}], "INVALID_ARGUMENT", "option 'deadline_ms' must be"),
        ("predict", ["double", {}, {"deadline_ms": 0}], "DEADLINE_EXCEEDED", "deadline_ms 0"),
        ("predict", ["double", {}, {"deadline_ms": -2.5}], "DEADLINE_EXCEEDED", "deadline_ms -2.5"),
        ("predict", ["double", {}, {"version": "1"}], "INVALID_ARGUMENT", "option 'version' must be"),
        ("predict", ["double", {}, {"version": 0}], "INVALID_ARGUMENT", "option 'version' must be"),
        ("predict", ["double", {}, {"version": 9}], "NOT_FOUND", "unknown model 'double' version 9"),
        ("predict", ["double", {}, {"encoding": "json"}], "INVALID_ARGUMENT", "option 'encoding' must be"),
        ("predict", ["double", {}, {"statuses": 1}], "INVALID_ARGUMENT", "option 'statuses' must be"),
        ("get_online_features", ["v:a", {"key": 1}], "INVALID_ARGUMENT", "get_online_features takes [[feature"),
        ("get_online_features", [["v:a"]], "INVALID_ARGUMENT", "get_online_features takes [[feature"),
        ("get_online_features", [[3], {"key": 1}], "INVALID_ARGUMENT", "features must be an array of references"),
        ("get_online_features", [["v:none"], {"key": 1}], "NOT_FOUND", "unknown feature 'v:none'"),
        ("get_online_features", [["v" * 70_000], {"key": 1}], "INVALID_ARGUMENT", "a list of features of 70006 bytes"),
        ("get_online_features", [["v:a"], {"key": 1}, {"version": 1}], "INVALID_ARGUMENT", "unknown option 'version'"),
        ("echo", [{(1,): 2}], "INVALID_ARGUMENT", "a map key or ext value that cannot be read"),
        ("fly", [], "NOT_FOUND", "unknown method 'fly'; methods: predict, get_online_features, ping, echo"),
        (3, [], "INVALID_ARGUMENT", "method must be a string"),
        ("ping", None, "INVALID_ARGUMENT", "params of 'ping' must be an array"),
    ],
)
def test_a_wrong_request_is_answered_and_the_next_served(served, method, params, code, message):
    wrong, good = served.ask([0, 5, method, params], PREDICT)
    wrong, good = (wrong, good) if wrong[1] == 5 else (good, wrong)
    assert wrong[:2] == [1, 5]
    assert wrong[3] is None
    assert wrong[2]["code"] == code
    assert wrong[2]["message"].startswith(message)
    assert good == PREDICTED


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "INVALID_ARGUMENT"),
        (b"\xc1", "INVALID_ARGUMENT"),
        (msgpack.packb({"method": "ping"}), "INVALID_ARGUMENT"),
        (msgpack.packb([]), "INVALID_ARGUMENT"),
        (msgpack.packb([0, 1, "ping"]), "INVALID_ARGUMENT"),
        (msgpack.packb([1, 1, None, "pong"]), "INVALID_ARGUMENT"),
        (msgpack.packb([0, -1, "ping", []]), "INVALID_ARGUMENT"),
        (msgpack.packb([0, 1 << 32, "ping", []]), "INVALID_ARGUMENT"),
        (msgpack.packb([0, "a", "ping", []]), "INVALID_ARGUMENT"),
        (b"\x91" * 100, "RESOURCE_EXHAUSTED"),
        (b"\xdd\xff\xff\xff\xff", "RESOURCE_EXHAUSTED"),
        (b"\xc6\xff\xff\xff\xff", "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_is_no_request_is_answered_after_those_before_it_and_ends_the_connection(served, data, code):
    connection, other = served.connect(), served.connect()
    connection.data_received(msgpack.packb(PREDICT) + data + msgpack.packb(PREDICT))
    served.loop.turn()
    replies = served.replies(connection)
    assert PREDICTED in replies
    [refused] = [reply for reply in replies if reply != PREDICTED]
    assert refused[:2] == [1, None]
    assert refused[2]["code"] == code
    transport = served.transport_of[connection]
    assert transport.eof
    assert not transport.closed  # so that the reply is not destroyed by a reset
    connection.data_received(msgpack.packb(PREDICT))
    served.loop.turn()
    assert served.replies(connection) == []
    served.loop.later[0]()
    assert transport.closed
    assert served.ask(PREDICT, connection=other) == [PREDICTED]


def test_notifications_are_run_and_never_answered(served):
    connection = served.connect()
    for method, params in [("predict", PREDICT[3]), ("predict", []), ("ping", []), ("none", []), (3, 4)]:
        connection.data_received(msgpack.packb([2, method, params]))
    served.loop.turn()
    assert served.replies(connection) == []
    assert served.engine.batches == [("double", 1)]


def test_an_exception_of_the_engine_is_answered_by_one_line_and_told(served):
    broken = [0, 1, "predict", ["broken", {"key": 1, "amount": 1}]]
    replies = served.ask(broken, broken, PREDICT)
    assert [reply[2] and reply[2]["code"] for reply in replies] == ["INTERNAL", "INTERNAL", None]
    assert replies[0][2]["message"] == "model 'broken': RuntimeError: first line"
    assert len(served.faults) == 1


def test_an_output_of_another_length_than_the_batch_is_an_error(served):
    served.engine.run = lambda plan, columns: SimpleNamespace(
        outputs=[("loss", np.zeros(3))], view_statuses=np.zeros((1, 1), np.uint8), feature_statuses=None, version=1
    )
    [reply] = served.ask(PREDICT)
    assert reply[2] == {"code": "INTERNAL", "message": "'loss' has 3 rows for a batch of 1: "
                        "the first dimension of every output must be the batch"}  # fmt: skip


def test_a_deadline_that_passes_while_the_request_waits(served):
    connection = served.connect()
    connection.data_received(
        msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": 1e-6}]])
    )
    connection.data_received(msgpack.packb(PREDICT))
    served.loop.turn()
    late, good = served.replies(connection)
    assert late[2]["code"] == "DEADLINE_EXCEEDED"
    assert good == PREDICTED


def test_plans_are_found_once_until_the_catalog_changes(served):
    connection = served.connect()
    for _ in range(3):
        served.ask(PREDICT, FEATURES, connection=connection)
    assert served.engine.compiled == [("double", None), ("v:a", "v:given")]
    served.engine.store.catalog_version = 2
    served.ask(PREDICT, connection=connection)
    served.ask(PREDICT, FEATURES, connection=connection)
    assert served.engine.compiled == [("double", None), ("v:a", "v:given")] * 2


def test_the_lists_of_features_remembered_are_bounded(served):
    for k in range(LIMITS.feature_plans_cached + 10):
        served.ask([0, 1, "get_online_features", [[f"v:f{k}"], {"key": 1}]])
    before = len(served.engine.compiled)
    served.ask([0, 1, "get_online_features", [["v:f0"], {"key": 1}]])
    assert len(served.engine.compiled) == before + 1


def test_a_peer_that_does_not_read_is_not_read(served):
    connection = served.connect()
    transport = served.transport_of[connection]
    assert transport.limits == (LIMITS.output_high_water_bytes, LIMITS.output_low_water_bytes)
    connection.pause_writing()
    assert not transport.reading
    connection.resume_writing()
    assert transport.reading


def test_a_connection_that_closes_with_work_pending_is_skipped(served):
    connection, other = served.connect(), served.connect()
    connection.data_received(msgpack.packb(PREDICT))
    other.data_received(msgpack.packb(PREDICT))
    connection.connection_lost(None)
    served.loop.turn()
    assert served.replies(connection) == []
    assert served.replies(other) == [PREDICTED]
    assert served.router.connections == {other}
    other.data_received(msgpack.packb(PREDICT))
    other.connection_lost(None)
    served.loop.turn()
    assert len(served.engine.batches) == 1


def test_a_peer_that_sends_no_more_gets_its_replies_before_the_end(served):
    connection = served.connect()
    connection.data_received(msgpack.packb(PREDICT))
    assert connection.eof_received()
    served.loop.turn()
    assert served.replies(connection) == [PREDICTED]
    assert served.transport_of[connection].closed
    assert not served.connect().eof_received()


def test_finish_closes_once_nothing_is_in_flight(served):
    busy, idle = served.connect(), served.connect()
    busy.data_received(msgpack.packb(PREDICT))
    busy.finish()
    idle.finish()
    assert served.transport_of[idle].closed
    assert not served.transport_of[busy].closed
    served.loop.turn()
    assert served.replies(busy) == [PREDICTED]
    assert served.transport_of[busy].closed
