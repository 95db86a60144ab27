"""Reading as of a moment, through a running server: over MessagePack, HTTP and the command line, as embedded.

tests/unit/test_as_of.py says what a moment may be, and tests the lookup itself.
"""

import asyncio
import datetime
import json
import random
from itertools import cycle, islice

import msgpack
import numpy as np
import onnx
import pytest
from commands import error_of, run_well
from http_asking import ask, ask_json
from onnx import TensorProto, helper
from serving import TIMEOUT_S, Server, until

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument
from shorttail.registry import versions as registry

DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
spend = st.FeatureView("spend", entity=user, ttl="60m", features=[st.Feature("sum", st.Float32, default=-1.0)])
notes = st.FeatureView("notes", entity=user, features=[st.Feature("n", st.Float32, default=0.0)])
models = [st.Model(name, path="sum.onnx", inputs=["spend:sum", "notes:n"]) for name in ("total", "canary", "shadow")]
raw = st.Model("raw", path="sum.onnx")
"""
USERS = 400
BEGIN_US = 1_767_225_600_000_000  # 2026-01-01
MINUTE_US = 60_000_000
TTL_US = 60 * MINUTE_US
REFERENCES = ["spend:sum", "notes:n"]


def write_sum(path):
    """Write a model: x float32 [rows, 2] -> y [rows], the sum of both columns."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """User i spent i at minute i of 2026, and has a note of i from minute 2i. There is no user from USERS on."""
    home = tmp_path_factory.mktemp("store")
    write_sum(home / "sum.onnx")
    (home / "definitions.py").write_text(DEFINITIONS)
    ids = np.arange(USERS)
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.push("spend", {"user_id": ids, "sum": ids.astype(float), "event_time": BEGIN_US + ids * MINUTE_US})
        engine.push("notes", {"user_id": ids, "n": ids.astype(float), "event_time": BEGIN_US + 2 * ids * MINUTE_US})
        # Other versions take the features in another order, and so look up for themselves.
        turned = ["notes:n", "spend:sum"]
        engine.apply([st.Model(name, path=home / "sum.onnx", inputs=turned) for name in ("canary", "shadow")])
        registry.set_canary(engine.store, "canary", 50, 1)
        registry.set_shadow(engine.store, "shadow", 1)
    return home / "store"


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    # Thousands of requests at once are overload on a busy machine; none of them may be refused.
    one = Server(store, "--p99-budget-ms", "1e6", log=tmp_path_factory.mktemp("log") / "log")
    yield one
    assert one.stop() == 0
    assert one.log.read_text() == ""


@pytest.fixture
def client(server):
    with st.Client(address(server), timeout_s=TIMEOUT_S) as client:
        yield client


@pytest.fixture
def engine(store):
    with st.Engine.open(store) as engine:
        yield engine


def address(server):
    return "{}:{}".format(*server.address)


def at(minute):
    return BEGIN_US + minute * MINUTE_US


def status(time_us, ttl_us, as_of):
    if time_us is None or (as_of is not None and time_us > as_of):
        return 2
    return 3 if ttl_us and (as_of is None or time_us < as_of - ttl_us) else 0  # now is long after all TTLs


def oracle(users, as_of):
    """Return (statuses and values of REFERENCES, predictions of the models). as_of: microseconds; None: now."""
    spend = [status(at(user) if user < USERS else None, TTL_US, as_of) for user in users]
    notes = [status(at(2 * user) if user < USERS else None, 0, as_of) for user in users]
    sums = [float(user) if code == 0 else -1.0 for user, code in zip(users, spend, strict=True)]
    ns = [float(user) if code == 0 else 0.0 for user, code in zip(users, notes, strict=True)]
    return [spend, notes], [sums, ns], [a + b for a, b in zip(sums, ns, strict=True)]


def drawn(seed, rows=5):
    """Return (users, moment) of a request; a third of the requests have no moment."""
    draw = random.Random(seed)
    users = [draw.randrange(USERS + 20) for _ in range(draw.randint(1, rows))]
    return users, None if draw.random() < 0.3 else BEGIN_US + draw.randrange(-MINUTE_US, 900 * MINUTE_US)


def check_features(found, users, as_of):
    statuses, values, _ = oracle(users, as_of)
    assert [found.feature_statuses[name].tolist() for name in REFERENCES] == statuses
    assert [found[name].tolist() for name in REFERENCES] == values


# -- MessagePack -------------------------------------------------------------------------------------------------------


def test_requests_of_one_batch_are_each_judged_at_their_moment(server):
    """All requests arrive in one piece, so they are a batch of each route; those without a moment too."""
    for begin in range(0, 3000, 300):
        asked = {seed: drawn(seed) for seed in range(begin, begin + 300)}
        models = dict(zip(asked, cycle(("total", "shadow", "canary", None)), strict=False))
        with server.connect() as peer:
            for seed, (users, as_of) in asked.items():
                options = {"statuses": True} if models[seed] else {}
                forms = (as_of, msgpack.Timestamp.from_unix_nano((as_of or 0) * 1000), iso(as_of or 0))
                if as_of is not None:
                    options["as_of"] = forms[seed % 3]
                method, what = ("predict", models[seed]) if models[seed] else ("get_online_features", REFERENCES)
                peer.send(msgpack.packb([0, seed, method, [what, {"user_id": users}, options]]))
            for _ in asked:
                _, seed, error, result = peer.reply()
                assert error is None
                statuses, values, predicted = oracle(*asked[seed])
                if models[seed] is None:
                    assert (result["statuses"], result["values"]) == (statuses, values), asked[seed]
                else:
                    got = [result["statuses"][view] for view in ("spend", "notes")]
                    assert (got, result["outputs"]["y"]) == (statuses, predicted), asked[seed]


def iso(time_us):
    return str(np.datetime64(time_us, "us")) + "Z"


def test_a_canary_and_a_shadow_look_up_at_the_moment_of_each_request(server, client):
    versions = {client.predict("canary", {"user_id": user}, as_of=at(user)).version for user in range(64)}
    assert versions == {1, 2}
    for seed in range(200):
        users, as_of = drawn(seed)
        assert (
            client.predict("shadow", {"user_id": users}, as_of=as_of).outputs["y"].tolist() == oracle(users, as_of)[2]
        )

    def compared():
        shadow = next(model for model in client.models() if model["name"] == "shadow")["shadow"]
        return shadow if shadow["batches"] + shadow["skipped"] >= 200 else None

    shadow = until(compared, server)
    assert shadow["batches"] > 0
    assert (shadow["rows_differing"], shadow["errors"]) == (0, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("soon", "option 'as_of' takes a datetime, ISO 8601 text or microseconds since 1970; got 'soon' (str)"),
        (None, "option 'as_of' takes a datetime, ISO 8601 text or microseconds since 1970; got None (NoneType)"),
        ([1], "got [1] (list)"),
        (True, "got True (bool)"),
        (1_700_000_000, "option 'as_of': 1700000000 is 1970-01-01T00:28:20Z in microseconds since 1970, and"),
        (-1, "option 'as_of': 1969-12-31T23:59:59Z is before 1970"),
        (2**63, "got 9223372036854775808 (int)"),
    ],
)
def test_a_wrong_moment_fails_its_request_alone(server, value, message):
    right = {"user_id": [3]}
    with server.connect() as peer:
        for method, what in (("predict", "total"), ("get_online_features", REFERENCES)):
            for number, options in enumerate([{"as_of": at(3)}, {"as_of": value}, {"as_of": at(3)}]):
                peer.send(msgpack.packb([0, number, method, [what, right, options]]))
            replies = {number: (error, result) for _, number, error, result in (peer.reply() for _ in range(3))}
            assert replies[0] == replies[2]
            assert replies[0][0] is None
            assert replies[1][0]["code"] == "INVALID_ARGUMENT"
            assert message in replies[1][0]["message"]
            assert "\n" not in replies[1][0]["message"]


def test_only_reads_have_a_moment(server):
    with server.connect() as peer:
        for method, columns in (("push", {"user_id": 1, "sum": 1.0}), ("delete", {"user_id": 1})):
            error = peer.ask(0, 1, method, ["spend", columns, {"as_of": at(1)}])[2]
            assert error["code"] == "INVALID_ARGUMENT"
            assert error["message"].startswith("unknown option 'as_of'; options: deadline_ms, ")
        error = peer.ask(0, 1, "predict", ["total", {"user_id": 1}, {"asof": at(1)}])[2]
        assert "options: as_of, deadline_ms, " in error["message"]


# -- clients -----------------------------------------------------------------------------------------------------------


def test_the_clients_and_the_engine_answer_alike(server, client, engine):
    for source in (client, engine):
        for seed in range(60):
            users, as_of = drawn(seed)
            given = as_of
            if as_of is not None and seed % 2:
                given = datetime.datetime.fromtimestamp(as_of // 10**6, datetime.UTC)
                given = given.replace(microsecond=as_of % 10**6, tzinfo=given.tzinfo if seed % 3 else None)
            check_features(source.get_online_features(REFERENCES, {"user_id": users}, as_of=given), users, as_of)
            answer = source.predict("total", {"user_id": users}, as_of=given)
            assert answer.outputs["y"].tolist() == oracle(users, as_of)[2]
        with pytest.raises(InvalidArgument, match=r"^as_of takes .*; got 'soon' \(str\)$"):
            source.predict("total", {"user_id": 1}, as_of="soon")
        with pytest.raises(InvalidArgument, match=r"^as_of: 1969-12-31T23:59:59Z is before 1970$"):
            source.get_online_features(REFERENCES, {"user_id": 1}, as_of=-1)


def test_many_concurrent_requests_with_different_moments(server):
    async def run():
        async with await st.AsyncClient.connect(address(server), connections=4, timeout_s=TIMEOUT_S) as client:

            async def one(seed):
                users, as_of = drawn(seed)
                if seed % 2:
                    check_features(
                        await client.get_online_features(REFERENCES, {"user_id": users}, as_of=as_of), users, as_of
                    )
                else:
                    answer = await client.predict("total", {"user_id": users}, as_of=as_of, statuses=True)
                    assert answer.outputs["y"].tolist() == oracle(users, as_of)[2]
                    assert [answer.statuses[view].tolist() for view in ("spend", "notes")] == oracle(users, as_of)[0]

            await asyncio.gather(*(one(seed) for seed in range(3000)))

    asyncio.run(run())


def test_large_requests_keep_their_moment(start, store):
    """The bulk worker answers them; those of more than LIMITS.rows_per_request rows are sent in parts."""
    server = start(of=store)
    wide = REFERENCES * 16
    with st.Client(address(server), timeout_s=TIMEOUT_S) as client:
        for rows in (LIMITS.rows_per_request, LIMITS.rows_per_request + 5000):
            users = list(islice(cycle(range(USERS + 20)), rows))
            check_features(client.get_online_features(wide, {"user_id": users}, as_of=at(200)), users, at(200))
            assert server.children("bulk")
            answer = client.predict("total", {"user_id": users}, as_of=iso(at(201)))
            assert answer.outputs["y"].tolist() == oracle(users, at(201))[2]


# -- HTTP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [at(150), iso(at(150))])
def test_bodies_of_all_protocols_name_a_moment(server, given):
    users = list(range(80, 170))
    statuses, _, predicted = oracle(users, at(150))
    parameters = {"as_of": given}
    for form in (
        {"instances": [[user] for user in users]},
        {"dataframe_split": {"columns": ["user_id"], "data": [[user] for user in users]}},
        {"dataframe_records": [{"user_id": user} for user in users]},
        {"inputs": {"user_id": users}},
    ):
        for path, name in (("/invocations", {"model": "total"}), ("/v1/models/total:predict", {})):
            for key in ("parameters", "params"):
                answer = ask_json(server, "POST", path, form | {key: parameters | name})
                assert answer == (200, {"predictions": predicted, "version": 1})
    inputs = [{"name": "user_id", "shape": [len(users)], "datatype": "INT64", "data": users}]
    body = {"inputs": inputs, "parameters": parameters | {"statuses": True}}
    code, document = ask_json(server, "POST", "/v2/models/total/infer", body)
    outputs = {output["name"]: output["data"] for output in document["outputs"]}
    assert (code, outputs["y"]) == (200, predicted)
    assert [outputs[f"statuses:{view}"] for view in ("spend", "notes")] == statuses


def test_the_next_http_request_has_no_moment_of_its_own(server):
    body = {"instances": [[170]]}
    path = "/v1/models/total:predict"
    assert ask_json(server, "POST", path, body | {"parameters": {"as_of": at(170)}})[1]["predictions"] == [170.0]
    assert ask_json(server, "POST", path, body)[1]["predictions"] == [169.0]  # the sum is STALE now, the note is there


@pytest.mark.parametrize("given", ["soon", 1_700_000_000, -1, [], True])
def test_a_wrong_moment_is_400(server, given):
    inputs = [{"name": "user_id", "shape": [1], "datatype": "INT64", "data": [1]}]
    raw = [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]
    for path, body in (
        ("/v1/models/total:predict", {"instances": [[1]]}),
        ("/v2/models/total/infer", {"inputs": inputs}),
        ("/v2/models/total/infer", {"inputs": raw}),
        ("/v2/models/raw/infer", {"inputs": raw}),
    ):
        code, document = ask_json(server, "POST", path, body | {"parameters": {"as_of": given}})
        assert code == 400
        assert document["error"].startswith("the parameter as_of")
        assert "\n" not in document["error"]


def test_tensors_have_the_same_answer_at_every_moment(server):
    raw = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    for model in ("total", "raw"):
        answers = [
            ask_json(server, "POST", f"/v2/models/{model}/infer", raw | {"parameters": parameters})
            for parameters in ({}, {"as_of": at(0)}, {"as_of": at(10**6)})
        ]
        assert answers[0][0] == 200
        assert answers[0] == answers[1] == answers[2]


def test_large_http_requests_keep_their_moment(start, store):
    server = start(of=store)
    users = list(islice(cycle(range(USERS)), LIMITS.rows_per_request))
    predicted = oracle(users, at(200))[2]
    body = {"instances": [{"user_id": user} for user in users], "parameters": {"as_of": at(200)}}
    status, answer = ask(server, "POST", "/v1/models/total:predict", json.dumps(body))
    assert (status, json.loads(answer)["predictions"]) == (200, predicted)
    assert server.children("bulk")


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_asks_a_store_and_a_server_alike(server, store):
    for place in (("--store", str(store)), ("--server", address(server))):
        for moment in (str(at(150)), iso(at(150))):
            said = run_well("features", *REFERENCES, "user_id=80,150,151", "--as-of", moment, *place, "--json").json
            assert said["statuses"] == {
                "spend:sum": ["STALE", "PRESENT", "NOT_FOUND"],
                "notes:n": ["NOT_FOUND", "NOT_FOUND", "NOT_FOUND"],
            }
            said = run_well("predict", "total", "user_id=80,150,151", "--as-of", moment, *place, "--json").json
            assert said["outputs"]["y"] == [-1.0, 150.0, -1.0]
        for command in (("features", "spend:sum"), ("predict", "total")):
            error = error_of(*command, "user_id=1", "--as-of", "1700000000", *place)
            assert error.startswith("error: as_of: 1700000000 is 1970-01-01T00:28:20Z in microseconds since 1970")
