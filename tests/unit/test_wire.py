"""native/wire against msgpack, without sockets: a fake engine, and a transport that records what is written."""

import math
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as values
from test_wire_codec import untensor

from shorttail import Float64, Int64, String
from shorttail._native import wire
from shorttail._native.columns import Columns
from shorttail.config import LIMITS
from shorttail.errors import NotFound
from shorttail.server.batcher import Batcher


class FakePlan(SimpleNamespace):
    row_values = row_work = 1

    def new_columns(self):
        return Columns(self.names, self.dtypes)


class FakeEngine:
    """Models 'double' and 'named' return twice their key, model 'broken' raises.

    A feature is the key, with status 2 if negative.
    """

    def __init__(self):
        self.store = SimpleNamespace(catalog_version=1)
        self.batches = []
        self.compiled = []

    def plan_for_model(self, name, version=None):
        if name not in ("double", "named", "broken") or version not in (None, 1, 2):
            raise NotFound(f"unknown model {name!r} version {version}")
        self.compiled.append((name, version))
        names, dtypes = ("key", "amount"), (Int64, Float64)
        if name == "named":
            names, dtypes = ("key", "name"), (Int64, String)
        return FakePlan(kind="predict", model=name, version=version or 2, names=names, dtypes=dtypes,
                        lookup_names=("stats",), feature_names=(), feature_types=(), has_default=(),
                        runner=None, split=None, shadow=None)  # fmt: skip

    def plan_for_features(self, references):
        self.compiled.append(references)
        if "v:none" in references:
            raise NotFound("unknown feature 'v:none'")
        return FakePlan(kind="features", model="", version=0, names=("key",), dtypes=(Int64,), lookup_names=("v",),
                        feature_names=references, feature_types=("Float64",) * len(references),
                        has_default=tuple(r == "v:given" for r in references),
                        runner=None, split=None, shadow=None)  # fmt: skip

    @property
    def plans_version(self):
        return self.store.catalog_version

    def follow(self):
        pass

    def prepare(self, route, columns):
        return route.plan, self.run(route, columns)

    def run(self, route, columns):
        plan = route.plan
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

    def read_on(self):
        """Let connections read the rest of messages that were too long for one turn, as on a busy machine."""
        while due := [callback for callback in self.later if callback.__name__ == "read_on"]:
            self.later = [callback for callback in self.later if callback not in due]
            for callback in due:
                callback()


class FakeTransport:
    def __init__(self, peer=("10.0.0.1", 1)):
        self.peer = peer
        self.written, self.closed, self.eof, self.reading = [], False, False, True

    def set_write_buffer_limits(self, high, low):
        self.limits = (high, low)

    def get_extra_info(self, name):
        return self.peer

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
    """A router with a fake engine, and connections to it."""

    def __init__(self):
        self.loop, self.engine, self.faults = FakeLoop(), FakeEngine(), []
        self.transport_of = {}
        self.router = wire.Router(
            self.loop, self.engine, {"ping": lambda params: "pong", "echo": lambda params: params}
        )
        Batcher(self.router, self.engine, self.faults.append)

    def connect(self, peer=("10.0.0.1", 1)):
        connection = wire.Connection(self.router)
        self.transport_of[connection] = FakeTransport(peer)
        connection.connection_made(self.transport_of[connection])
        return connection

    def ask(self, *messages, connection=None):
        connection = connection or self.connect()
        connection.data_received(b"".join(map(msgpack.packb, messages)))
        self.loop.read_on()
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
    "feature_names": ["v:a", "v:given"], "types": ["Float64", "Float64"], "values": [[4.0, None], [4.0, -1.0]],
    "has_default": [False, True], "statuses": [[0, 2], [0, 2]],
}]  # fmt: skip


def test_the_requests_of_a_suspect_have_a_batch_of_their_own(served):
    """They are answered all the same, and so are its requests for features, which no model can refuse."""
    good, bad = served.connect(), served.connect(("10.0.0.2", 1))
    served.router.suspects[bad.sender] = 1 << 62
    taken = []

    def run():
        taken.extend((batch.route.for_suspects, batch.n_requests) for batch in served.router.take())
        served.router.flush()

    served.router.connect(run=run)
    for connection in (bad, good, bad):
        connection.data_received(msgpack.packb(PREDICT))
    bad.data_received(msgpack.packb(FEATURES))
    served.loop.turn()
    assert taken == [(True, 2), (False, 1), (False, 1)]
    taken.clear()
    served.router.suspects[bad.sender] = 1  # its time is over
    bad.data_received(msgpack.packb(PREDICT))
    served.loop.turn()
    assert taken == [(False, 1)]


def test_an_answer_that_cannot_be_encoded_fails_alone(served, monkeypatch):
    run = served.engine.run

    def with_texts(route, columns):
        result = run(route, columns)
        result.outputs[0] = ("label", np.array(["a", 1.5, "c"], object))
        return result

    monkeypatch.setattr(served.engine, "run", with_texts)
    replies = served.ask(*[[0, i, "predict", ["double", {"key": i, "amount": 1.0}]] for i in range(3)])
    assert [reply[3] and reply[3]["outputs"]["label"] for reply in replies] == [["a"], None, ["c"]]
    assert replies[1][:3] == [1, 1, {"code": "INTERNAL", "message": "the answer cannot be encoded: Internal"}]
    assert len(served.faults) == 1


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


def test_text_that_is_not_utf8_fails_its_own_request_alone(served):
    good = [[0, i, "predict", ["named", {"key": i, "name": "é"}]] for i in range(40)]
    bad = msgpack.packb([0, 99, "predict", ["named", {"key": [1, 2], "name": ["é", b"\xff"]}]], use_bin_type=False)
    connection = served.connect()
    connection.data_received(b"".join([*map(msgpack.packb, good[:20]), bad, *map(msgpack.packb, good[20:])]))
    served.loop.turn()
    assert served.engine.batches == [("named", 40)]
    replies = {reply[1]: reply[2:] for reply in served.replies(connection)}
    code, message = replies.pop(99)[0].values()
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("column 'name' takes String; got text that is not UTF-8, ")
    assert {i: reply[1]["outputs"]["label"] for i, reply in replies.items()} == {i: [2 * i] for i in range(40)}


def test_a_full_batch_takes_no_more_requests(served):
    n = LIMITS.batch_rows // 2
    message = [0, 1, "predict", ["double", {"key": list(range(n)), "amount": 0}]]
    replies = served.ask(message, message, message)
    assert served.engine.batches == [("double", 2 * n), ("double", n)]
    assert [reply[3]["outputs"]["label"][-1] for reply in replies] == [2 * (n - 1)] * 3


@settings(max_examples=30, deadline=None)
@given(
    values.lists(values.sampled_from([PREDICT, FEATURES, [0, 9, "ping", []]]), min_size=1, max_size=5), values.data()
)
def test_replies_do_not_depend_on_how_the_bytes_are_split(messages, data):
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


def test_a_message_split_at_every_byte_and_sent_byte_by_byte(served):
    stream = msgpack.packb(PREDICT)
    connection = served.connect()
    for cut in range(1, len(stream)):
        connection.data_received(stream[:cut])
        connection.data_received(stream[cut:])
    for k in range(len(stream)):
        connection.data_received(stream[k : k + 1])
    served.loop.turn()
    assert served.replies(connection) == [PREDICTED] * len(stream)


def test_options_of_requests_are_understood(served):
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
        (
            "predict",
            ["double", {}, {"speed": 1}],
            "INVALID_ARGUMENT",
            "unknown option 'speed'; options: as_of, deadline_ms",
        ),
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
def test_a_wrong_request_gets_an_error_and_the_next_is_served(served, method, params, code, message):
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
def test_a_message_that_is_no_request_gets_an_error_after_earlier_replies_and_ends_the_connection(served, data, code):
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


def test_an_exception_of_the_engine_is_one_line_for_callers_and_is_reported(served):
    broken = [0, 1, "predict", ["broken", {"key": 1, "amount": 1}]]
    replies = served.ask(broken, broken, PREDICT)
    assert [reply[2] and reply[2]["code"] for reply in replies] == ["INTERNAL", "INTERNAL", None]
    assert replies[0][2]["message"] == "model 'broken': RuntimeError: first line"
    assert len(served.faults) == 1


def test_an_output_without_a_row_per_request_row_is_an_error(served):
    served.engine.run = lambda plan, columns: SimpleNamespace(
        outputs=[("loss", np.zeros(3))], view_statuses=np.zeros((1, 1), np.uint8), feature_statuses=None, version=1
    )
    [reply] = served.ask(PREDICT)
    assert reply[2] == {"code": "INTERNAL", "message": "'loss' has 3 rows for a batch of 1: "
                        "the first dimension of every output must be the batch"}  # fmt: skip


def test_a_deadline_can_pass_while_the_request_waits_in_a_batch(served):
    connection = served.connect()
    connection.data_received(
        msgpack.packb([0, 1, "predict", ["double", {"key": 1, "amount": 0}, {"deadline_ms": 1e-6}]])
    )
    connection.data_received(msgpack.packb(PREDICT))
    served.loop.turn()
    late, good = served.replies(connection)
    assert late[2]["code"] == "DEADLINE_EXCEEDED"
    assert good == PREDICTED


def test_a_plan_is_compiled_once_until_the_catalog_changes(served):
    connection = served.connect()
    for _ in range(3):
        served.ask(PREDICT, FEATURES, connection=connection)
    assert served.engine.compiled == [("double", None), ("v:a", "v:given")]
    served.engine.store.catalog_version = 2
    served.ask(PREDICT, connection=connection)
    served.ask(PREDICT, FEATURES, connection=connection)
    assert served.engine.compiled == [("double", None), ("v:a", "v:given")] * 2


def test_the_number_of_cached_feature_lists_is_bounded(served):
    for k in range(LIMITS.feature_plans_cached + 10):
        served.ask([0, 1, "get_online_features", [[f"v:f{k}"], {"key": 1}]])
    before = len(served.engine.compiled)
    served.ask([0, 1, "get_online_features", [["v:f0"], {"key": 1}]])
    assert len(served.engine.compiled) == before + 1


def test_the_requests_of_a_peer_that_does_not_read_are_not_read(served):
    connection = served.connect()
    transport = served.transport_of[connection]
    assert transport.limits == (LIMITS.output_high_water_bytes, LIMITS.output_low_water_bytes)
    connection.pause_writing()
    assert not transport.reading
    connection.resume_writing()
    assert transport.reading


def test_requests_of_a_closed_connection_are_not_run(served):
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
