"""Served models: what is fed for missing texts over every protocol, vectors of doubles, outputs that lose rows."""

import asyncio

import numpy as np
import onnx
import pandas as pd
import pytest
from http_asking import ask_json
from onnx import TensorProto, helper, numpy_helper
from serving import TIMEOUT_S, Server
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import shorttail as st

EPOCH = 1_700_000_123.456


def write(path, nodes, kind, width, **constants):
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [value("x", kind, [None, width])],
        [value("y", kind, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture(scope="module")
def trained():
    """A pipeline whose column of texts has missing values, which the converter calls "nan"."""
    random = np.random.default_rng(0)
    table = pd.DataFrame({"tier": random.choice(["gold", "tin", "nan"], 400), "amount": random.normal(size=400)})
    chance = table.tier.map({"gold": 0.9, "tin": 0.5, "nan": 0.1})
    encoder = make_column_transformer((OneHotEncoder(), ["tier"]), ("passthrough", ["amount"]))
    return make_pipeline(encoder, LogisticRegression()).fit(table, random.random(400) < chance)


@pytest.fixture(scope="module")
def server(tmp_path_factory, trained):
    home = tmp_path_factory.mktemp("people")
    kinds = [("tier", StringTensorType([None, 1])), ("amount", FloatTensorType([None, 1]))]
    (home / "tiers.onnx").write_bytes(to_onnx(trained, initial_types=kinds).SerializeToString())
    same = [helper.make_node("Identity", ["x"], ["y"])]
    losing = [
        helper.make_node("Mul", ["x", "one"], ["same"]),
        helper.make_node("Less", ["same", "limit"], ["less"]),
        helper.make_node("Reshape", ["less", "flat"], ["kept"]),
        helper.make_node("Compress", ["x", "kept"], ["y"], axis=0),
    ]
    constants = {"one": np.float32(1), "limit": np.float32(1e9), "flat": np.array([-1])}
    features = [st.Feature("tier", st.String), st.Feature("count", st.Int64)]
    view = st.FeatureView("v", entity=st.Entity("u", keys={"id": st.Int64}), features=features)
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(
            [
                view,
                st.Model("stored", str(home / "tiers.onnx"), {"tier": ["v:tier"], "amount": ["request:amount"]}),
                st.Model("sent", str(home / "tiers.onnx"), {"tier": ["request:tier"], "amount": ["request:amount"]}),
                st.Model("counts", write(home / "counts.onnx", same, TensorProto.INT64, 1), ["v:count"]),
                st.Model("times", write(home / "times.onnx", same, TensorProto.DOUBLE, 2), ["request:t"]),
                st.Model(
                    "losing", write(home / "losing.onnx", losing, TensorProto.FLOAT, 1, **constants), ["request:a"]
                ),
            ]
        )
        engine.push("v", {"id": [1, 2], "tier": ["gold", None], "count": [4, None]})
    started = Server(home / "store", "--port", "0", "--http-port", "0", log=home / "log")
    yield started
    started.stop()


def test_missing_texts_over_every_protocol(server, trained):
    tiers, amount = ["gold", "nan", "nan"], [0.5, -1.0, 2.0]
    expected = trained.predict_proba(pd.DataFrame({"tier": tiers, "amount": amount}))
    with st.Client("{}:{}".format(*server.address), timeout_s=TIMEOUT_S) as client:
        stored = client.predict("stored", {"id": [1, 2, 99], "amount": amount}).outputs["output_probability"]
        sent = client.predict("sent", {"tier": ["gold", None, float("nan")], "amount": amount}).outputs
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    np.testing.assert_allclose(sent["output_probability"], expected, atol=1e-5)
    rows = [{"tier": "gold", "amount": 0.5}, {"tier": None, "amount": -1.0}, {"tier": None, "amount": 2.0}]
    body = {
        "inputs": [
            {"name": name, "datatype": kind, "shape": [3], "data": [row[name] for row in rows]}
            for name, kind in (("tier", "BYTES"), ("amount", "FP64"))
        ]
    }
    status, answer = ask_json(server, "POST", "/v2/models/sent/infer", body)
    assert status == 200, answer
    data = {output["name"]: output["data"] for output in answer["outputs"]}["output_probability"]
    np.testing.assert_allclose(np.reshape(data, (3, 2)), expected, atol=1e-5)


def test_a_missing_value_that_nothing_replaces_fails_its_own_request_alone(server):
    async def ask():
        client = await st.AsyncClient.connect("{}:{}".format(*server.address), timeout_s=TIMEOUT_S)
        asked = [client.predict("counts", {"id": 3 if n % 10 == 7 else 1}) for n in range(60)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await client.close()
        return answers

    for number, answer in enumerate(asyncio.run(ask())):
        if number % 10 == 7:
            assert isinstance(answer, st.InvalidArgument)
            assert "v:count has no value at row 0 (it is null, stale or not found)" in str(answer)
        else:
            assert answer.outputs["y"].tolist() == [[4]]


def test_a_vector_of_doubles_keeps_its_bits(server):
    with st.Client("{}:{}".format(*server.address), timeout_s=TIMEOUT_S) as client:
        for value in ([[EPOCH, 0.1]], np.array([[EPOCH, 0.1]]), [EPOCH, 0.1]):
            assert client.predict("times", {"t": value}).outputs["y"].tolist() == [[EPOCH, 0.1]]


def test_an_output_that_loses_rows_is_an_error(server):
    request = {"a": [1.0, 2e9, 3.0]}
    with st.Client("{}:{}".format(*server.address), timeout_s=TIMEOUT_S) as client:
        with pytest.raises(st.ShorttailError, match="has 2 rows for a batch of 3"):
            client.predict("losing", request)
        assert client.predict("losing", {"a": [1.0, 3.0]}).outputs["y"].tolist() == [[1.0], [3.0]]
    body = {"inputs": [{"name": "a", "datatype": "FP64", "shape": [3], "data": request["a"]}]}
    status, answer = ask_json(server, "POST", "/v2/models/losing/infer", body)
    assert (status, answer) == (500, {"error": "the model failed: output 'y' has the shape [2, 1] for 3 rows"})
