"""The engine, `Client` and `AsyncClient` return the same types, values, nulls, defaults and statuses."""

import asyncio
import datetime

import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pytest
from onnx import TensorProto, helper
from serving import TIMEOUT_S, Server

import shorttail as st

BIG = 2**53 + 1  # the smallest positive integer that a double cannot hold
TIME = datetime.datetime(2013, 1, 1, 5, 0, 0, 1, tzinfo=datetime.UTC)
TYPES = {
    "flag": (st.Bool, True, pa.bool_(), "boolean"),
    "small": (st.Int32, -7, pa.int32(), "Int32"),
    "big": (st.Int64, -BIG, pa.int64(), "Int64"),
    "single": (st.Float32, 0.5, pa.float32(), "float32"),
    "double": (st.Float64, 0.1, pa.float64(), "float64"),
    "text": (st.String, "none", pa.string(), "string"),
    "time": (st.Timestamp, 1, pa.timestamp("us", "UTC"), "datetime64[us, UTC]"),
    "taste": (st.Vector(3), [1, 2, 3], pa.list_(pa.float32(), 3), "object"),
    "wide": (st.Vector(2, st.Float64), [0.1, 1e300], pa.list_(pa.float64(), 2), "object"),
}
REFERENCES = [f"{view}:{name}" for view in ("plain", "given") for name in TYPES]  # without defaults, and with
ROW = {
    "flag": False,
    "small": 2**31 - 1,
    "big": BIG,
    "single": float(np.float32(0.1)),
    "double": 1 / 3,
    "text": "é\0",
    "time": TIME,
    "taste": [0.5, -1.5, 2.0],
    "wide": [1 / 3, -1e300],
}
# Key 1 has values, key 2 has nulls, key 3 has no row, and the row of key 4 is older than the TTL.
KEYS = {"user_id": [1, 2, 3, 4, 1]}
STATUSES = [0, 1, 2, 3, 0]


def write_model(path):
    """Write a model: x float32 [rows, 2] -> outputs [rows], [rows, 1] and [rows, n] of numbers, bools and strings."""
    value, node = helper.make_tensor_value_info, helper.make_node
    graph = helper.make_graph(
        [
            node("Softmax", ["x"], ["scores"]),
            node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
            node("ReduceSum", ["x", "axis"], ["sum"], keepdims=1),
            node("Cast", ["sum"], ["exact"], to=TensorProto.DOUBLE),
            node("Greater", ["sum", "zero"], ["positive"]),
            node("Cast", ["label"], ["short"], to=TensorProto.INT32),
            node("LabelEncoder", ["label"], ["name"], domain="ai.onnx.ml", keys_int64s=[0], values_strings=["on time"],
                 default_string="late"),
        ],
        "outputs",
        [value("x", TensorProto.FLOAT, [None, 2])],
        [
            value("scores", TensorProto.FLOAT, [None, 2]),
            value("label", TensorProto.INT64, [None]),
            value("exact", TensorProto.DOUBLE, [None, 1]),
            value("positive", TensorProto.BOOL, [None, 1]),
            value("short", TensorProto.INT32, [None]),
            value("name", TensorProto.STRING, [None]),
        ],
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0]),
        ],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """Return {name: function(method, *arguments)} for an engine, and for clients of a server on the same store."""
    home = tmp_path_factory.mktemp("answers")
    user = st.Entity("user", keys={"user_id": st.Int64})
    plain = [st.Feature(name, dtype) for name, (dtype, *_) in TYPES.items()]
    given = [st.Feature(name, dtype, default=default) for name, (dtype, default, *_) in TYPES.items()]
    model = st.Model("kinds", path=str(write_model(home / "kinds.onnx")), inputs=["plain:single", "request:amount"])
    with st.Engine.open(home / "store", create=True) as engine:
        views = [st.FeatureView("plain", entity=user, features=plain, ttl="1h")]
        views += [st.FeatureView("given", entity=user, features=given, ttl="1h")]
        engine.apply([user, *views, model])
        now = datetime.datetime.now(datetime.UTC)
        rows = {name: [value, None, value] for name, value in ROW.items()}
        rows |= {"user_id": [1, 2, 4], "event_time": [now, now, now - datetime.timedelta(days=1)]}
        for view in views:
            engine.push(view.name, rows)
        server = Server(home / "store", log=home / "log")
        try:
            yield {"engine": lambda method, *asked: getattr(engine, method)(*asked), **clients(server)}
            assert server.stop() == 0
            assert server.log.read_text() == ""
        finally:
            server.kill()


def clients(server):
    address = f"127.0.0.1:{server.address[1]}"

    def blocking(method, *asked):
        with st.Client(address, timeout_s=TIMEOUT_S) as client:
            return getattr(client, method)(*asked)

    async def pipelined(method, *asked):
        async with await st.AsyncClient.connect(address, timeout_s=TIMEOUT_S) as client:
            return await getattr(client, method)(*asked)

    return {"Client": blocking, "AsyncClient": lambda *asked: asyncio.run(pipelined(*asked))}


def expected(view, name):
    """Return the values of a feature for KEYS, as Arrow returns them."""
    default = TYPES[name][1] if view == "given" else None
    if name == "time" and default is not None:
        default = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(microseconds=default)
    return [ROW[name] if status == 0 else default for status in STATUSES]


@pytest.mark.parametrize("way", ["engine", "Client", "AsyncClient"])
def test_features_of_every_type(ways, way):
    answer = ways[way]("get_online_features", REFERENCES, KEYS)
    assert answer.feature_names == REFERENCES
    assert list(answer.feature_types.values()) == [str(dtype) for dtype, *_ in TYPES.values()] * 2
    assert {name: codes.tolist() for name, codes in answer.feature_statuses.items()} == dict.fromkeys(
        REFERENCES, STATUSES
    )
    table, frame = answer.to_arrow(), answer.to_pandas()
    assert table.schema.types == [arrow for _, _, arrow, _ in TYPES.values()] * 2
    assert [str(dtype) for dtype in frame.dtypes] == [pandas for *_, pandas in TYPES.values()] * 2
    for reference in REFERENCES:
        values = expected(*reference.split(":"))
        assert table[reference].to_pylist() == values
        assert [plain(value) for value in frame[reference]] == values
    us = int(TIME.timestamp()) * 1_000_000 + 1
    assert answer.to_dict()["plain:time"] == [us, None, None, None, us]


def plain(value):
    """Convert a value of pandas to that of Arrow."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if pd.isna(value) else float(value) if isinstance(value, np.floating) else value


def test_engine_and_clients_agree_to_the_byte(ways):
    answers = {way: ask("get_online_features", REFERENCES, KEYS) for way, ask in ways.items()}
    engine = answers.pop("engine")
    for answer in answers.values():
        assert answer.to_arrow().equals(engine.to_arrow())
        pd.testing.assert_frame_equal(answer.to_pandas(), engine.to_pandas())
        assert answer.to_dict() == engine.to_dict()
        assert repr(answer) == repr(engine)
        assert repr(answer).startswith("Features(5 rows)\n  plain:flag")


def test_the_table_of_a_result_can_be_pushed_again(ways):
    """The table of a result can be pushed: its types are those of the view, and no value changes."""
    ask = ways["Client"]
    table = ask("get_online_features", REFERENCES[: len(TYPES)], {"user_id": [1, 2]}).to_arrow()
    table = table.rename_columns(list(TYPES)).append_column("user_id", pa.array([11, 12]))
    assert ask("push", "plain", table) == 2
    again = ask("get_online_features", REFERENCES[: len(TYPES)], {"user_id": [11, 12]})
    assert again.to_arrow().rename_columns(list(TYPES)).equals(table.drop_columns("user_id"))


@pytest.mark.parametrize("way", ["engine", "Client", "AsyncClient"])
def test_predictions_are_the_same_in_engine_and_clients(ways, way):
    answer = ways[way]("predict", "kinds", {"user_id": [1, 3], "amount": [1000, 3]})
    table, frame = answer.to_arrow(), answer.to_pandas()
    assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
        "scores": pa.list_(pa.float32(), 2),
        "label": pa.int64(),
        "exact": pa.float64(),
        "positive": pa.bool_(),
        "short": pa.int32(),
        "name": pa.string(),
    }
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        "scores_0": "float32",
        "scores_1": "float32",
        "label": "Int64",
        "exact": "float64",
        "positive": "boolean",
        "short": "Int32",
        "name": "string",
    }
    for name in ("label", "exact", "positive", "short", "name"):
        first = answer.outputs[name].ravel()[0]
        assert table[name][0].as_py() == frame[name][0] == first
    assert frame[["scores_0", "scores_1"]].to_numpy().tobytes() == answer.outputs["scores"].tobytes()
    assert (frame["label"][0], frame["name"][0], frame["positive"][0]) == (1, "late", True)
    assert frame["exact"][0] == np.float32(0.1) + np.float32(1000)
    head, first, *_ = repr(answer).splitlines()
    assert head == "Prediction('kinds', version=1, 2 rows)"
    assert first == "  scores    float32[2]  [0, 1], [nan, nan]"
