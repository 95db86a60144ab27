"""Names of any script through a running server, by every protocol; and names from strangers that reach no file."""

import contextlib
import csv
import io
import json
import os
import socket
import time
import unicodedata
from urllib.parse import quote

import msgpack
import numpy as np
import onnx
import pytest
from commands import run_well
from http_asking import ask, ask_json, http_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from onnx import TensorProto, helper
from prometheus_client.parser import text_string_to_metric_families
from serving import ASAN, TIMEOUT_S, Server

import shorttail as st
from shorttail.errors import Unavailable

CHARACTERS = some.characters(exclude_categories=("C", "Z"), include_characters=" ", exclude_characters=":/")
ODD = [
    "7d_avg", "amount (USD)", "größe", "a=b", "a", "-x", "--store", "a, b", '"q"', "日本語", "❤️", "request", "inputs",
    "statuses", "a  b", "<b>&", "%2e", "..", "\\x00", "nan", "x" * 255,
]  # fmt: skip
TEXTS = some.sampled_from(ODD) | some.text(CHARACTERS, min_size=1)
LETTERS = some.characters(categories=("Lu", "Ll", "Lt", "Nd")).filter(lambda c: f"_{c}".isidentifier())
FOLDERS = some.sampled_from(["fraud", "größe", "日本語", "हिन्दी", "7d", "a-b.c_d"]) | some.text(LETTERS, min_size=1)


def is_name(text):
    return text == text.strip() and len(text.encode()) <= 255 and unicodedata.normalize("NFC", text) == text


def write_sum(path, width):
    """Write a model: float32 [rows, width] -> p [rows], the sum of the columns."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["p"], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [None])],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("names")
    write_sum(home / "sum.onnx", 4)
    view = st.FeatureView("stats", st.Entity("e", {"k": st.Int64}), [st.Feature("f", st.Float32)])
    model = st.Model("größe-1.5", str(home / "sum.onnx"), ["stats:f", *(f"request:{name}" for name in "abc")])
    odd = st.FeatureView("größe.v1", st.Entity("f", {"k=1": st.Int64}), [st.Feature("größe, max=1", st.Float32)])
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply([view, odd, model])
    # Folders of models that the catalog does not have: no request may find their files.
    for folder in (home / "store" / "models" / "ghost" / "1", home / "outside" / "1"):
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes((home / "sum.onnx").read_bytes())
    return home


@pytest.fixture(scope="module")
def server(home):
    server = Server(home / "store", "--log-failed", log=home / "log")
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server):
    host, port = server.address
    with st.Client(f"{host}:{port}", timeout_s=TIMEOUT_S) as client:
        yield client


def once_loaded(call):
    """Return the result of `call`, repeated while the model that it asks for is being loaded."""
    ends = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return call()
        except Unavailable:
            assert time.monotonic() < ends
            time.sleep(0.01)


# -- valid names -------------------------------------------------------------------------------------------------------

NUMBERS = iter(range(1 << 30))


@settings(max_examples=5 if ASAN else 25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    FOLDERS.filter(is_name),
    FOLDERS.filter(is_name),
    some.lists(TEXTS.filter(is_name), min_size=5, max_size=5, unique=True),
)
def test_a_name_means_the_same_everywhere(home, server, client, view, model, texts):
    number = next(NUMBERS)  # views and models must differ in more than case from those of the examples before
    view, model = f"{view[:30]}.{number}", f"{model[:30]}-{number}"
    key, first, second, *asked = texts
    references = [f"{view}:{first}", f"{view}:{second}"]
    definitions = [
        st.FeatureView(view, st.Entity(key, {key: st.Int64}), [st.Feature(n, st.Float32) for n in (first, second)]),
        st.Model(model, str(home / "sum.onnx"), [*references, *(f"request:{name}" for name in asked)]),
    ]
    keys, columns = {key: [1, 2]}, {key: [1, 2], **{name: [0.5, 0.25] for name in asked}}
    with st.Engine.open(home / "store") as engine:
        engine.apply(definitions)
        assert client.push(view, {key: [1, 2], first: [1.0, 2.0], second: [10.0, 20.0]}) == 2
        engine.refresh()
        for source in (engine, client):
            found = source.get_online_features(references, keys)
            assert found.to_dict() == {references[0]: [1.0, 2.0], references[1]: [10.0, 20.0]}
            assert once_loaded(lambda source=source: source.predict(model, columns)).outputs["p"].tolist() == [12, 22.5]
    path = f"/v2/models/{quote(model, safe='')}"
    status, described = ask_json(server, "GET", path)
    assert (status, described["name"], [i["name"] for i in described["inputs"]]) == (200, model, [key, *asked])
    inputs = [{"name": key, "datatype": "INT64", "shape": [2], "data": [1, 2]}]
    inputs += [{"name": name, "datatype": "FP32", "shape": [2], "data": [0.5, 0.25]} for name in asked]
    status, answer = ask_json(server, "POST", f"{path}/versions/1/infer", {"inputs": inputs})
    assert (status, answer["model_name"], answer["outputs"][0]["data"]) == (200, model, [12, 22.5])
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    body = {"instances": rows, "parameters": {"model": model}}
    assert ask_json(server, "POST", "/invocations", body) == (200, {"predictions": [12, 22.5], "version": 1})
    text = io.StringIO()
    csv.writer(text).writerows([columns, *zip(*columns.values(), strict=True)])
    target = {"Content_Type": "text/csv", "X_Amzn_SageMaker_Target_Model": quote(model)}
    assert ask(server, "POST", "/invocations", text.getvalue().encode(), **target) == (200, b"12.0\n22.5\n")
    where = ["--server", ":".join(map(str, server.address)), "--json", "--"]
    answer = run_well("predict", model, *where, f"{key}=1,2", *(f"{name}=0.5,0.25" for name in asked))
    assert answer.json["outputs"]["p"] == [12, 22.5]
    answer = run_well("features", *where, *references, f"{key}=1,2")
    assert list(answer.json["features"].values()) == [[1.0, 2.0], [10.0, 20.0]]


def test_metrics_and_the_header_of_a_platform_name_a_model_of_any_script(server, home):
    body = json.dumps({"instances": [{"k": 1, "a": 1, "b": 2, "c": 3}]})
    for header in ("größe-1.5".encode(), b"gr%C3%B6%C3%9Fe-1.5", b"/gr%C3%B6%C3%9Fe-1.5"):
        assert ask(server, "POST", "/invocations", body, X_Amzn_SageMaker_Target_Model=header)[0] == 200
    for header in (b"\xff", b"%FF", b"%00", b"..%2foutside", b"/../outside/"):
        status, answer = ask(server, "POST", "/invocations", body, X_Amzn_SageMaker_Target_Model=header)
        assert (status, json.loads(answer)["error"][:9]) == (404, "no model ")
    status, text = ask(server, "GET", "/metrics")
    assert status == 200
    models = {
        sample.labels["model"]
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name in ("shorttail_requests_total", "shorttail_model_info")
    }
    assert "größe-1.5" in models


@pytest.mark.parametrize("name", ["stats", "versions", "infer", "ready", "unknown", "request", "models", "1", "true"])
def test_a_model_may_be_called_like_a_part_of_a_path(server, home, name):
    with st.Engine.open(home / "store") as engine:
        engine.apply([st.Model(name, str(home / "sum.onnx"), [f"request:{column}" for column in "abcd"])])
    path = f"/v2/models/{name}"
    assert ask_json(server, "GET", f"{path}/versions/1")[1]["name"] == name
    status, found = ask_json(server, "GET", path)
    assert status == 200
    assert ("model_stats" in found) == (name == "stats")  # as docs/names.md says
    inputs = [{"name": column, "datatype": "FP32", "shape": [1], "data": [1]} for column in "abcd"]
    assert once_loaded(lambda: infer(server, path, inputs)) == [4]


def infer(server, path, inputs):
    status, answer = ask_json(server, "POST", f"{path}/infer", {"inputs": inputs})
    if status == 503:
        raise Unavailable(answer["error"])
    assert status == 200
    return answer["outputs"][0]["data"]


def test_a_load_test_takes_odd_names(server, unused_port):
    host, port = server.address
    asked = ["--predict", "größe-1.5", "--features", '"größe.v1:größe, max=1",stats:f', "--push", "größe.v1"]
    keys = ["--keys", "k=1=uniform:1:9", "--keys", "k=uniform:1:9"]
    keys += [part for column in "abc" for part in ("--value", f"{column}=1")]
    short = ["--rate", "200", "--duration", "0.2s", "--warmup", "0s", "--json"]
    found = run_well("bench", f"{host}:{port}", *asked, *keys, *short).json
    assert [(step["error"], step["lost"]) for step in found["steps"]] == [(0, 0)]
    assert found["steps"][0]["good_per_s"] > 0


def test_a_server_starts_where_the_output_cannot_encode_its_names(home, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    server = Server(home / "store", "--no-http", log=tmp_path / "log", env=environment)
    try:
        assert r"models: gr\xf6\xdfe-1.5 v1" in server.line
    finally:
        server.kill()


# -- names from strangers ----------------------------------------------------------------------------------------------

WILD = ["ghost", "..", ".", "../outside", "../../outside", "..\\outside", "ghost/", "ghost/../ghost", "/etc/passwd", "",
        "ghost\0", "\0", "a\x1b[31m\nerror: forged", "\u202egnp", "x" * 100_000, "größe-1.5\u0301", "%2e%2e", "~", "*",
        "größe-1.5/1", "GRÖSSE-1.5", "gro\u0308ße-1.5"]  # fmt: skip


@pytest.mark.parametrize("name", WILD, ids=range(len(WILD)))
def test_an_unknown_model_is_not_found_by_any_way(server, client, name):
    with server.connect() as peer:
        for version in ({}, {"version": 1}):
            reply = peer.ask(0, 1, "predict", [name, {"k": [1]}, version])
            assert reply[:2] == [1, 1]
            assert_refused(reply[2]["message"], reply[2]["code"], name)
        reply = peer.ask(0, 2, "push", [name, {"k": [1]}])
        assert_refused(reply[2]["message"], reply[2]["code"], name)
    body = {"instances": [{"k": 1}], "parameters": {"model": name}}
    if name:
        status, answer = ask_json(server, "POST", "/invocations", body)
        assert status == 404
        assert_refused(answer["error"], "NOT_FOUND", name)
    if 0 < len(name) < 4000:
        for path in (f"/v2/models/{quote(name, safe='')}", f"/v2/models/{quote(name, safe='')}/infer"):
            status, answer = ask(server, "POST" if path.endswith("infer") else "GET", path, "{}")
            assert status in (404, 405)
            assert b"\x1b" not in answer


def assert_refused(message, code, name):
    assert code == "NOT_FOUND"
    assert message.isprintable()
    assert len(message) < 2000
    assert message.startswith(f"no {'feature view' if 'feature view' in message else 'model'} {name[:60]!r}"[:-1])


RAW = [
    b"/v2/models/../../outside", b"/v2/models/%2e%2e%2f%2e%2e%2foutside", b"/v2/models/..%2foutside",
    b"/v2/models/ghost", b"/v2/models/ghost%00", b"/v2/models/%00", b"/v2/models/%ed%a0%80", b"/v2/models/\xff",
    b"/v2/models/%ff", b"/v2/models/%", b"/v2/models/%zz", b"/v2/models//", b"/v2/models/.", b"/v2/models/..",
    b"/v2/models/%252e%252e", b"/v2/models/ghost/versions/1", b"/v2/models/ghost/versions/%2e%2e",
    b"/v2/models/" + b"x" * 7000, b"/v2/models/{model}", b"/v2/models/%7Bmodel%7D", b"/v2/models/a;b?c=d#e",
]  # fmt: skip


@pytest.mark.parametrize("path", RAW, ids=range(len(RAW)))
@pytest.mark.parametrize("rest", [b"", b"/config", b"/stats", b"/ready", b"/versions/1/config"])
def test_a_path_that_is_sent_raw_finds_no_file(server, path, rest):
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.create_connection(("127.0.0.1", http_port(server)), TIMEOUT_S))
        peer.sendall(b"GET " + path + rest + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while data := peer.recv(65536):
            answer += data
    assert answer.split()[1] in (b"400", b"404"), answer
    assert b"onnx" not in answer
    assert b"Traceback" not in answer


def test_bytes_that_are_no_text_name_nothing(server):
    """A MessagePack string may hold any bytes; lone surrogates and broken UTF-8 are names of nothing."""
    with server.connect() as peer:
        for raw in (b"\xff", b"\xed\xa0\x80", b"gr\xf6\xdfe-1.5", b"gr\xc3\xb6\xc3\x9fe-1.5\xff"):
            name = msgpack.packb("x" * len(raw)).replace(b"x" * len(raw), raw)
            for method, params in (
                ("predict", b"\x92" + name + msgpack.packb({"k": [1]})),
                ("predict", b"\x92" + msgpack.packb("größe-1.5") + b"\x81" + name + msgpack.packb([1])),
                ("get_online_features", b"\x92\x91" + name + msgpack.packb({"k": [1]})),
                ("get_online_features", b"\x92" + msgpack.packb(["stats:f"]) + b"\x81" + name + msgpack.packb([1])),
                ("push", b"\x92" + name + msgpack.packb({"k": [1], "f": [1.0]})),
                ("push", b"\x92" + msgpack.packb("stats") + b"\x81" + name + msgpack.packb([1])),
            ):
                peer.send(b"\x94\x00\x07" + msgpack.packb(method) + params)
                kind, number, error, _ = peer.reply()
                assert (kind, number) == (1, 7)
                assert error["code"] in ("NOT_FOUND", "INVALID_ARGUMENT")
                assert error["message"].isprintable()
        surrogate = json.dumps({"instances": [{"k": 1}], "parameters": {"model": "\ud800"}})
        assert ask(server, "POST", "/invocations", surrogate)[0] == 400
    assert ask(server, "GET", "/v2/models/x", X_Request_Id=b"\xff\xfe")[0] == 404


def test_long_names_of_strangers_cost_little(server, client):
    """Names of megabytes are neither compared with the known ones nor sent back."""
    known = [f"feature_{number}_of_a_wide_view" for number in range(2000)]
    for ask_for in (
        lambda: client.predict("x" * (12 << 20), {"k": [1]}),
        lambda: client.predict("größe-1.5", {"\x1b" * (12 << 20): [1]}),
        lambda: client.push("x" * (4 << 20), {"k": [1]}),
        lambda: client.push("stats", {"k": [1], "y" * (4 << 20): [1]}),
        lambda: client.get_online_features(["stats:" + "x" * 60_000], {"k": [1]}),
        lambda: client.get_online_features([f"stats:{known[0]}"], {"k": [1]}),
    ):
        with pytest.raises(st.ShorttailError) as caught:
            ask_for()
        assert len(caught.value.message) < 2000


def test_the_log_has_one_printable_line_for_each_failure(server, client):
    with pytest.raises(st.NotFound):
        client.predict("a\x1b[31m\nerror: forged", {"k": [1]})
    ask(server, "GET", "/v2/models/a%1b%5b31m%0aerror:%20forged")
    ends = time.monotonic() + TIMEOUT_S
    while "forged" not in (text := server.log.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert "forged" in text
    assert all(line.isprintable() for line in text.split("\n"))
    assert not any(line.startswith("error: forged") for line in text.split("\n"))
    assert "Traceback" not in text, text


def test_only_models_of_the_catalog_have_answered(server, home):
    status, index = ask_json(server, "POST", "/v2/repository/index")
    assert status == 200
    assert "ghost" not in [entry["name"] for entry in index]
    assert np.any([entry["name"] == "größe-1.5" for entry in index])
