"""Aliases and entities without keys through a running server: over MessagePack and HTTP, as the embedded engine."""

import random

import msgpack
import numpy as np
import onnx
import pytest
from commands import error_of, run_well
from http_asking import ask_json
from onnx import TensorProto, helper
from serving import TIMEOUT_S, hang_up, until

import shorttail as st

DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
site = st.Entity("site", keys={})
profile = st.FeatureView("profile", entity=user, features=[
    st.Feature("age", st.Float32), st.Feature("tier", st.String, default="none"),
])
rates = st.FeatureView("rates", entity=site, features=[
    st.Feature("usd", st.Float32, default=1.0), st.Feature("note", st.String),
])
buyer = user.alias("buyer", user_id="buyer_id")
seller = user.alias("seller", user_id="seller_id")


@st.on_demand
def gap(a: st.Float64, b: st.Float64) -> st.Float32:
    return a - b


sale = st.Model("sale", path="same.onnx", inputs=[
    "buyer:profile:age", "seller:profile:age", "rates:usd", gap("buyer:profile:age", "seller:profile:age"),
])
alone = st.Model("alone", path="same.onnx", inputs=["rates:usd", "rates:usd", "rates:usd", "rates:usd"])
"""
USERS = 500
FEATURES = ["seller:profile:tier", "profile:age", "rates:usd", "buyer:profile:age", "rates:note", "seller:profile:age"]
PREDICT = [0, 7, "predict", ["sale", {"buyer_id": [1, 2, 10**6], "seller_id": 3}, {"statuses": True}]]
NAN = pytest.approx(float("nan"), nan_ok=True)
PREDICTED = {
    "outputs": {"y": [[1.0, 3.0, 1.25, -2.0], [2.0, 3.0, 1.25, -1.0], [NAN, 3.0, 1.25, NAN]]},
    "version": 1,
    "statuses": {"buyer:profile": [0, 0, 2], "seller:profile": [0, 0, 0], "rates": [0, 0, 0]},
}


def write_model(path):
    """Write a model: y = x * 1, so that what comes out shows what went in."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "one"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


@pytest.fixture
def store(tmp_path):
    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    write_model(tmp_path / "same.onnx")
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply(tmp_path / "definitions.py")
        ids = np.arange(USERS)
        engine.push("profile", {"user_id": ids, "age": ids.astype(float), "tier": [f"t{i % 7}" for i in range(USERS)]})
        engine.push("rates", {"usd": 1.25, "note": "today"})
    return tmp_path / "store"


@pytest.fixture
def server(start, store):
    server = start("--log-failed", of=store)
    yield server
    assert server.stop() == 0


@pytest.fixture
def engine(store):
    with st.Engine.open(store) as engine:
        yield engine


@pytest.fixture
def client(server):
    with st.Client("{}:{}".format(*server.address), timeout_s=TIMEOUT_S) as client:
        yield client


def asked(seed, rows):
    """Return the columns of a request for FEATURES. Some users do not exist, and some keys are missing."""
    draw = random.Random(seed)
    return {
        name: [draw.choice([None, draw.randrange(2 * USERS), draw.randrange(USERS)]) for _ in range(rows)]
        for name in ("user_id", "buyer_id", "seller_id")
    }


def same(one, other):
    assert one.to_dict() == other.to_dict()
    assert {n: s.tolist() for n, s in one.statuses.items()} == {n: s.tolist() for n, s in other.statuses.items()}


def test_a_peer_asks_by_aliases(server):
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == [1, 7, None, PREDICTED]
        reply = peer.ask(0, 8, "get_online_features", [["buyer:profile:age", "rates:usd"], {"buyer_id": [5, 6]}])
        assert reply == [1, 8, None, {
            "feature_names": ["buyer:profile:age", "rates:usd"],
            "types": ["Float32", "Float32"],
            "values": [[5.0, 6.0], [1.25, 1.25]],
            "has_default": [False, True],
            "statuses": [[0, 0], [0, 0]],
        }]  # fmt: skip
        found = {view["name"]: view for view in peer.ask(0, 9, "views", [])[3]}
        assert found["profile"]["aliases"] == {"buyer": {"user_id": "buyer_id"}, "seller": {"user_id": "seller_id"}}
        assert (found["rates"]["aliases"], found["rates"]["keys"]) == ({}, {})
        (model, _) = peer.ask(0, 10, "models", [])[3]
        assert model["columns"] == {"buyer_id": "Int64", "seller_id": "Int64"}
        for reference, code, message in (
            ("byer:profile:age", "NOT_FOUND", "no alias 'byer'; did you mean 'buyer'?"),
            (
                "buyer:age",
                "NOT_FOUND",
                "no feature view 'buyer': it is an alias of entity 'user'; its views: buyer:pro",
            ),
            (
                "buyer:rates:usd",
                "NOT_FOUND",
                "alias 'buyer' is of entity 'user' (user_id), and feature view 'rates' of",
            ),
            ("a:buyer:profile:age", "INVALID_ARGUMENT", "'a:buyer:profile:age' is not a feature reference (it has mo"),
        ):
            error = peer.ask(0, 11, "get_online_features", [[reference], {"buyer_id": 1}])[2]
            assert (error["code"], error["message"][: len(message)]) == (code, message)
        for method in ("push", "delete"):
            error = peer.ask(0, 12, method, ["buyer", {"buyer_id": [1]}])[2]
            assert (error["code"], error["message"][:24]) == ("NOT_FOUND", "no feature view 'buyer':")


def test_clients_answer_as_the_embedded_engine(client, engine):
    for seed in range(20):
        columns = asked(seed, rows=1 + seed * 13)
        same(client.get_online_features(FEATURES, columns), engine.get_online_features(FEATURES, columns))
        columns.pop("user_id")
        one, other = client.predict("sale", columns, statuses=True), engine.predict("sale", columns)
        np.testing.assert_array_equal(one.outputs["y"], other.outputs["y"])
        assert {n: s.tolist() for n, s in one.statuses.items()} == {n: s.tolist() for n, s in other.statuses.items()}


def test_a_call_of_many_rows_is_sent_in_parts(client, engine):
    columns = asked(1, rows=20_000)
    same(client.get_online_features(FEATURES, columns), in_halves(engine, columns))


class Joined:
    def __init__(self, *parts):
        self.parts = parts

    def to_dict(self):
        return {name: [v for part in self.parts for v in part.to_dict()[name]] for name in FEATURES}

    @property
    def statuses(self):
        return {n: np.concatenate([part.statuses[n] for part in self.parts]) for n in self.parts[0].statuses}


def in_halves(engine, columns):
    parts = ({name: values[half] for name, values in columns.items()} for half in (slice(10_000), slice(10_000, None)))
    return Joined(*(engine.get_online_features(FEATURES, part) for part in parts))


def test_requests_of_several_lookups_share_a_batch(server):
    """200 requests at once, of both models: each gets the rows of its own keys."""
    with server.connect() as peer:
        ways = [["sale", {"buyer_id": n, "seller_id": n + 1}] if n % 2 else ["alone", {}] for n in range(200)]
        peer.send(b"".join(msgpack.packb([0, n, "predict", params]) for n, params in enumerate(ways)))
        found = {reply[1]: reply[3]["outputs"]["y"] for reply in (peer.reply() for _ in ways)}
    assert found == {n: [[n, n + 1, 1.25, -1.0]] if n % 2 else [[1.25] * 4] for n in range(200)}


def test_http_asks_by_aliases(server, engine):
    columns = {"buyer_id": [1, 2, 10**6], "seller_id": [3, 3, 3]}
    expected = engine.predict("sale", columns)
    inputs = [{"name": n, "datatype": "INT64", "shape": [3], "data": values} for n, values in columns.items()]
    body = {"inputs": inputs, "parameters": {"statuses": True}}
    status, answer = ask_json(server, "POST", "/v2/models/sale/infer", body)
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert status == 200
    assert np.array(outputs.pop("y"), float).reshape(3, 4).tolist()[:2] == expected.outputs["y"].tolist()[:2]
    assert outputs == {f"statuses:{name}": codes.tolist() for name, codes in expected.statuses.items()}
    rows = [{"buyer_id": 1, "seller_id": 3}, {"buyer_id": 2, "seller_id": 3}]
    status, answer = ask_json(server, "POST", "/invocations", {"instances": rows, "parameters": {"model": "sale"}})
    assert (status, answer) == (200, {"predictions": PREDICTED["outputs"]["y"][:2], "version": 1})


def test_http_asks_for_a_model_that_takes_no_columns(server):
    one = {"instances": [{}], "parameters": {"model": "alone"}}
    assert ask_json(server, "POST", "/invocations", one) == (200, {"predictions": [[1.25] * 4], "version": 1})
    status, answer = ask_json(server, "POST", "/invocations", one | {"instances": [{}, {}]})
    assert (status, "takes no columns, so a request has one row; got 2" in answer["error"]) == (400, True)
    status, answer = ask_json(server, "POST", "/v2/models/alone/infer", {"inputs": []})
    assert (status, answer["outputs"][0]["shape"], answer["outputs"][0]["data"]) == (200, [1, 4], [1.25] * 4)


def test_the_row_of_a_view_without_keys_is_pushed_and_deleted(client):
    assert client.push("rates", {"usd": 2.0, "note": "a"}) == 1
    assert client.get_online_features(["rates:usd"], {}).to_dict() == {"rates:usd": [2.0]}
    count = client.push("rates", {"usd": [3.0, 4.0], "note": ["a", "b"]})
    assert (count, count.duplicate) == (2, 1)
    assert client.predict("alone", {}).outputs["y"].tolist() == [[4.0] * 4]
    with pytest.raises(st.InvalidArgument, match="view 'rates' has no key 'user_id'; keys: none"):
        client.delete("rates", {"user_id": [1]})
    assert [client.delete("rates", {}), client.delete("rates", {})] == [1, 0]
    assert client.get_online_features(["rates:usd"], {}).statuses["rates"].tolist() == [2]
    with pytest.raises(st.InvalidArgument, match="key column 'user_id' is missing"):
        client.delete("profile", {})


def test_commands_print_the_same_of_a_server_and_of_a_store(server, store, tmp_path):
    (tmp_path / "row.csv").write_text("usd,note\n1.25,today\n")
    where, other = ["--server", "{}:{}".format(*server.address)], ["--store", str(store)]
    for arguments in (
        ["features", "buyer:profile:age", "profile:tier", "rates:usd", "buyer_id=1,9999", "user_id=3"],
        ["features", "rates:usd"],
        ["predict", "sale", "buyer_id=1,2", "seller_id=3", "--json"],
        ["predict", "alone"],
    ):
        assert run_well(*arguments, *where).out == run_well(*arguments, *other).out
    for source in (where, other):
        assert run_well("delete", "rates", *source).out == "rates: 1 row deleted\n"
        run_well("push", "rates", str(tmp_path / "row.csv"), *source)
        assert "no alias 'byer'; did you mean 'buyer'?" in error_of("features", "byer:profile:age", "x=1", *source)
        assert "'buyer'" in error_of("features", "buyer:profile:age", "buyer=1", *source)


def test_a_load_test_asks_by_aliases(server, unused_port):
    asks = ["--predict", "sale", "--features", "buyer:profile:age,rates:usd", "--push", "rates"]
    keys = ["--keys", "buyer_id=uniform:1:400", "--keys", "seller_id=uniform:1:400", "--overwrite-live-rows"]
    short = ["--rate", "200", "--duration", "0.2s", "--warmup", "0s", "--json"]
    found = run_well("bench", "{}:{}".format(*server.address), *asks, *keys, *short).json
    assert [(step["error"], step["lost"]) for step in found["steps"]] == [(0, 0)]
    assert found["steps"][0]["good_per_s"] > 0


def test_aliases_stay_over_a_reload_and_follow_apply(server, store):
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == [1, 7, None, PREDICTED]
        assert hang_up(server).startswith("reloaded")
    swapped = (
        DEFINITIONS.replace('"buyer_id"', '"x"').replace('"seller_id"', '"buyer_id"').replace('"x"', '"seller_id"')
    )
    (store.parent / "definitions.py").write_text(swapped)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == [1, 7, None, PREDICTED]
        shown = run_well("apply", str(store.parent / "definitions.py"), "--store", str(store)).out
        assert "alias buyer" in shown
        question = [0, 8, "predict", ["sale", {"buyer_id": 1, "seller_id": 3}]]
        after = [[3.0, 1.0, 1.25, 2.0]]
        assert until(lambda: (reply := peer.ask(*question))[2] is None and reply[3]["outputs"]["y"] == after, server)
