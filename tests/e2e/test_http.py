"""HTTP of a running server: probes, metrics, the Open Inference Protocol (Triton's client), SageMaker and Vertex AI."""

import json
import os
import signal
import socket
import struct
import time

import msgpack
import numpy as np
import pytest
import tritonclient.http as triton
from http_asking import DEFINITIONS, EVERY, TYPES, ask, ask_json, http_port, tensor, total_inputs, write_every
from prometheus_client.parser import text_string_to_metric_families
from serving import TIMEOUT_S, Server, write_sum
from tritonclient.utils import InferenceServerException

import shorttail as st
from shorttail.config import LIMITS

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp("http")
    (home / "definitions.py").write_text(DEFINITIONS)
    write_sum(home / "total.onnx", 1.0)
    write_every(home / "every.onnx")
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.push("stats", {"user_id": [1, 2], "age": [10.0, 20.0]})
        engine.push("sales", {"shop": ["north"], "rate": [0.5]})
    return home / "store"


@pytest.fixture(scope="module")
def shared(store):
    server = Server(store, "--workers", "2", log=store.parent / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture
def server(shared):
    yield shared
    assert ask(shared, "GET", "/readyz") == (200, b"ok\n")  # after any test


@pytest.fixture
def start(store, tmp_path):
    servers = []

    def start_server(*options):
        servers.append(Server(store, *options, log=tmp_path / f"log{len(servers)}"))
        return servers[-1]

    yield start_server
    for one in servers:
        one.kill()


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(
        f"127.0.0.1:{http_port(server)}", network_timeout=TIMEOUT_S, connection_timeout=TIMEOUT_S
    ) as client:
        yield client


# -- probes and metrics ----------------------------------------------------------------------------------------------


def metrics(server):
    status, text = ask(server, "GET", "/metrics")
    assert status == 200
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_probes_are_answered(server):
    for path in ("/livez", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready"):
        assert ask(server, "GET", path)[0] == 200, path


def test_metrics_of_any_worker_are_of_all_and_survive_a_worker(start):
    server = start("--workers", "2")
    columns = {"user_id": 1, "shop": "north", "amount": 1.0}
    for _ in range(4):  # connections go to the two workers in turn
        with server.connect() as peer:
            assert peer.ask(0, 1, "predict", ["total", columns])[2] is None
            assert peer.ask(0, 1, "predict", ["total", {"nothing": 1}])[2]["code"] == "INVALID_ARGUMENT"
            assert peer.ask(0, 1, "predict", ["no_such_model", {}])[2]["code"] == "NOT_FOUND"
            assert peer.ask(0, 1, "get_online_features", [["stats:age"], {"user_id": [1, 2]}])[2] is None
            assert peer.ask(0, 1, "push", ["stats", {"user_id": [9], "age": [1.0]}])[2] is None

    def count(found, code, method, model):
        labels = {"code": code, "method": method, "model": model, "protocol": "rpc"}
        return found.get(("shorttail_requests_total", *sorted(labels.items())), 0)

    def all_counted():
        found = metrics(server)
        return (
            found
            if count(found, "NOT_FOUND", "predict", "unknown") == 4 and count(found, "OK", "push", "") == 4
            else None
        )

    found = wait_for(all_counted)  # errors are collected ten times per second
    assert count(found, "OK", "predict", "total") == 4
    assert count(found, "INVALID_ARGUMENT", "predict", "total") == 4
    assert count(found, "OK", "get_online_features", "") == 4
    assert found["shorttail_rows_total", ("method", "get_online_features"), ("model", "")] == 8
    for stage in ("queue", "lookup", "transform", "infer", "encode", "total"):
        labels = (("method", "predict"), ("model", "total"), ("stage", stage))
        assert found["shorttail_stage_duration_seconds_count", *labels] == 4
        assert 0 < found["shorttail_stage_duration_seconds_sum", *labels] < TIMEOUT_S
    assert found["shorttail_model_info", ("model", "total"), ("version", "1")] == 1
    assert not [key for key in found if "no_such_model" in str(key)]

    for pid in server.workers():
        os.kill(pid, signal.SIGKILL)

    def restarted():
        try:
            later = metrics(server)
        except OSError:  # no server listens yet
            return None
        return later if later["shorttail_restarts_total", ("process", "worker")] == 2 else None

    later = wait_for(restarted)
    for key, value in found.items():
        if key[0].startswith(("shorttail_requests_total", "shorttail_stage", "shorttail_rows", "shorttail_batch")):
            assert later.get(key, 0) >= value, key


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
    pytest.fail(f"{condition.__name__}: not after {TIMEOUT_S} s")


# -- the Open Inference Protocol -------------------------------------------------------------------------------------


def test_triton_client_reads_health_metadata_and_statistics(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("total")
    assert client.is_model_ready("total", "1")
    assert not client.is_model_ready("total", "9")
    assert client.get_server_metadata()["name"] == "shorttail"
    metadata = client.get_model_metadata("total")
    assert metadata["versions"] == ["1"]
    assert {i["name"]: i["datatype"] for i in metadata["inputs"]} == {
        "user_id": "INT64",
        "shop": "BYTES",
        "amount": "FP64",
    }
    assert metadata["outputs"] == [{"name": "total", "datatype": "FP32", "shape": [-1]}]
    assert metadata["tensors"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    config = client.get_model_config("total")
    assert config["max_batch_size"] == LIMITS.rows_per_request
    assert config["output"] == [{"name": "total", "data_type": "TYPE_FP32", "dims": [1]}]
    assert {model["name"] for model in client.get_model_repository_index()} == {"total", "every"}

    def successes():
        (found,) = client.get_inference_statistics("total")["model_stats"]
        assert found["inference_stats"]["compute_infer"]["count"] == found["execution_count"]
        return found["inference_stats"]["success"]["count"]

    before = successes()
    client.infer("total", total_inputs([1], "north", [1.0]))
    assert successes() == before + 1


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_infers_from_entity_keys(client, binary):
    inputs = total_inputs([1, 2, 77], "north", [[1.0], [2.0], [3.0]], binary)
    outputs = [triton.InferRequestedOutput("total", binary_data=binary)]
    answer = client.infer("total", inputs, outputs=outputs, request_id="r-1", parameters={"statuses": True})
    assert answer.as_numpy("total").tolist() == [11.5, 22.5, 5.0]
    assert answer.as_numpy("statuses:stats").tolist() == [0, 0, 2]
    assert answer.get_response()["id"] == "r-1"
    assert answer.get_response()["model_version"] == "1"
    assert ("binary_data_size" in json.dumps(answer.get_output("total"))) == binary


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("outputs", [None, ["y_text", "y_i64"]])
def test_triton_client_sends_and_gets_tensors_of_every_type(client, binary, outputs):
    inputs = [tensor(name, EVERY[name], kind, binary) for name, (_, _, kind) in TYPES.items()]
    asked = outputs and [triton.InferRequestedOutput(name, binary_data=binary) for name in outputs]
    answer = client.infer("every", inputs, outputs=asked)
    given = [output["name"] for output in answer.get_response()["outputs"]]
    assert given == (outputs or [name.replace("x_", "y_") for name in TYPES])
    for name in given:
        sent, got = EVERY[name.replace("y_", "x_")], answer.as_numpy(name)
        if sent.dtype == object:
            got = np.array([text.decode() if isinstance(text, bytes) else text for text in got], object)
        assert got.dtype == sent.dtype
        assert got.tolist() == sent.tolist()


def test_column_names_and_tensor_names_give_the_same_answer(client):
    columns = [tensor(name[2:], EVERY[name], kind) for name, (_, _, kind) in TYPES.items()]
    assert client.infer("every", columns).as_numpy("y_i64").tolist() == EVERY["x_i64"].tolist()
    matrix = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    assert client.infer("total", [tensor("x", matrix, "FP32")]).as_numpy("total").tolist() == [6.0, 15.0]


def test_compressed_requests_are_read(client):
    answer = client.infer("total", total_inputs([1], "north", [1.0]), request_compression_algorithm="gzip")
    assert answer.as_numpy("total").tolist() == [11.5]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (total_inputs([1], "north", [1.0])[:2], "missing column 'amount'"),
        ([*total_inputs([1], "north", [1.0]), tensor("more", np.zeros(1), "FP64")], "no input 'more'"),
        ([tensor("x", np.zeros((1, 2), np.float32), "FP32")], r"shape \[-1, 3\]; got \[1, 2\]"),
        ([tensor("x", np.zeros((1, 3)), "FP64")], "input 'x' is float; got float64"),
        ([tensor("x", np.zeros((0, 3), np.float32), "FP32")], "no rows"),
        (total_inputs([1, 2], "north", [1.0, 2.0, 3.0]), "has 2 values where others have 3"),
        (
            [tensor("user_id", np.array([1.5]), "FP64"), *total_inputs([1], "n", [1.0])[1:]],
            "'user_id' takes Int64; got 1.5",
        ),
    ],
)
def test_triton_client_gets_an_error_for_a_wrong_request(client, inputs, says):
    with pytest.raises(InferenceServerException, match=says) as raised:
        client.infer("total", inputs)
    assert raised.value.status() == "400"


def test_triton_client_gets_an_error_for_an_unknown_name(client):
    inputs = total_inputs([1], "north", [1.0])
    with pytest.raises(InferenceServerException, match="no model 'nope'"):
        client.infer("nope", inputs)
    with pytest.raises(InferenceServerException, match="has no version 9"):
        client.infer("total", inputs, model_version="9")
    with pytest.raises(InferenceServerException, match="no output 'z'; its outputs: total"):
        client.infer("total", inputs, outputs=[triton.InferRequestedOutput("z")])


X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"shape": [-1, 3]}, "shape must be"),
        ({"shape": [1 << 40, 3]}, "1099511627776 rows in one request; at most 16384"),
        ({"shape": [2, 3]}, "3 elements of data, where the shape"),
        ({"shape": None}, "shape must be"),
        ({"datatype": "FP7"}, "datatype 'FP7'"),
        ({"data": [1, 2]}, "2 elements of data"),
        ({"data": [[1, 2], [3]]}, "must be an array of FP32"),
        ({"data": ["1", "2", "3"]}, "must be an array of FP32"),
        ({"datatype": "INT32", "data": [1, 2, 1 << 40]}, "must be an array of INT32"),
        ({"datatype": "BYTES"}, "must be an array of strings"),
        ({"parameters": {"binary_data_size": 8}}, "binary_data_size 8, where 0 bytes are left"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory is not supported"),
    ],
)
def test_wrong_tensors_are_errors(server, changed, says):
    status, answer = ask_json(server, "POST", "/v2/models/total/infer", {"inputs": [X | changed]})
    assert (status, list(answer)) == (400, ["error"])
    assert says in answer["error"]


def test_wrong_tensor_bytes_are_errors(server):
    def infer(described, raw, length=None):
        head = json.dumps({"inputs": [described | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
        described_length = len(head) if length is None else length
        headers = {"Inference_Header_Content_Length": str(described_length)}
        status, answer = ask(server, "POST", "/v2/models/total/infer", head + raw, **headers)
        return status, json.loads(answer).get("error", "")

    whole = {"name": "x", "datatype": "FP32", "shape": [1, 3]}
    texts = {"name": "shop", "datatype": "BYTES", "shape": [1]}
    assert infer(whole, struct.pack("<3f", 1, 2, 3)) == (200, "")
    for described, raw, length, says in [
        (whole, b"\0" * 11, None, "11 bytes of data"),
        (whole, b"\0" * 12, 10**9, "length within the body"),
        (whole, b"\0" * 12, -1, "length within the body"),
        (texts, struct.pack("<I", 2**32 - 1) + b"x", None, "an element of 4294967295 bytes"),
        (texts, b"\1\0", None, "within an element's length"),
        (texts, struct.pack("<I", 1) + b"\xff", None, "not UTF-8"),
    ]:
        status, error = infer(described, raw, length)
        assert (status, says in error) == (400, True), error


def test_a_deadline_that_has_passed_is_504_and_a_wrong_one_400(server):
    body = {"inputs": [X]}
    path = "/v2/models/total/infer"
    assert ask_json(server, "POST", path, body, X_Deadline_Ms="10000")[0] == 200
    status, answer = ask_json(server, "POST", path, body, X_Deadline_Ms="0.000001")
    assert status == 504
    assert "deadline" in answer["error"]
    for wrong in ("soon", "-1", "nan"):
        assert ask_json(server, "POST", path, body, X_Deadline_Ms=wrong)[0] == 400
    assert ask_json(server, "POST", path, body | {"parameters": {"timeout": 1}})[0] == 504


def test_bodies_up_to_the_limits_are_taken(server):
    path = "/v2/models/total/infer"

    def padded(size):
        head = json.dumps({"inputs": [X]})
        return head + " " * (size - len(head))

    for size in (LIMITS.loop_text_bytes, LIMITS.loop_text_bytes + 1, LIMITS.frame_bytes):
        assert ask(server, "POST", path, padded(size))[0] == 200
    assert ask(server, "POST", path, padded(LIMITS.frame_bytes + 1))[0] == 413
    rows = LIMITS.rows_per_request
    for n, expected in ((rows, 200), (rows + 1, 400)):
        raw = np.zeros((n, 3), np.float32).tobytes()
        described = {"name": "x", "datatype": "FP32", "shape": [n, 3], "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"inputs": [described]}).encode()
        headers = {"Inference_Header_Content_Length": str(len(head))}
        assert ask(server, "POST", path, head + raw, **headers)[0] == expected


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": 1}', b'{"inputs": [1]}', b"[" * 5000, b"\xff\xfe"])
def test_bodies_that_are_not_requests_are_errors(server, body):
    for path in ("/v2/models/total/infer", "/invocations"):
        assert ask(server, "POST", path, body)[0] == 400


# -- SageMaker and Vertex AI -----------------------------------------------------------------------------------------

INSTANCES = [
    {"user_id": 1, "shop": "north", "amount": 1},
    {"user_id": 2, "shop": "nowhere", "amount": 0.5},
]


def test_instances_are_answered(server):
    asked = {"instances": INSTANCES, "parameters": {"model": "total"}}
    assert ask_json(server, "POST", "/invocations", asked) == (200, {"predictions": [11.5, 120.5], "version": 1})
    lists = {"instances": [[1, "north", 1], [2, "nowhere", None]], "parameters": {"model": "total"}}
    assert ask_json(server, "POST", "/invocations", lists)[1]["predictions"] == [11.5, None]
    status, answer = ask_json(server, "POST", "/invocations", {"instances": INSTANCES})
    assert (status, answer["error"].startswith("the request names no model, and the store has several")) == (400, True)
    short = {"instances": [INSTANCES[0], {"user_id": 1}], "parameters": {"model": "total"}}
    assert "instance 1 has other columns" in ask_json(server, "POST", "/invocations", short)[1]["error"]


def test_csv_is_answered(server):
    headers = {"Content_Type": "text/csv", "X_Amzn_SageMaker_Target_Model": "total"}
    assert ask(server, "POST", "/invocations", "1,north,1\n2,nowhere,0.5\n", **headers) == (200, b"11.5\n120.5\n")
    with_header = "amount,user_id,shop\n1,1,north\n"
    assert ask(server, "POST", "/invocations", with_header, **headers) == (200, b"11.5\n")
    status, answer = ask(server, "POST", "/invocations", "1,north,1\n", Accept="application/json", **headers)
    assert (status, json.loads(answer)) == (200, {"predictions": [11.5], "version": 1})
    status, answer = ask(server, "POST", "/invocations", "1,north\n", **headers)
    assert (status, b"has 2 fields" in answer) == (400, True)


def test_the_variables_of_the_platforms_are_used(start, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AIP_HTTP_PORT", str(port))
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/health")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/predict")
    monkeypatch.setenv("SHORTTAIL_MODEL", "total")
    server = start()
    assert http_port(server) == port
    assert ask(server, "GET", "/health")[0] == 200
    assert ask_json(server, "POST", "/predict", {"instances": INSTANCES})[1]["predictions"] == [11.5, 120.5]


# -- access, logs, ends ----------------------------------------------------------------------------------------------


def test_requests_need_a_token(start, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("serve 0123456789abcdef-serve\n")
    tokens.chmod(0o600)
    server = start("--token-file", str(tokens))
    assert ask(server, "GET", "/readyz")[0] == 200
    assert ask(server, "GET", "/v2/health/ready")[0] == 200
    for path in ("/metrics", "/v2", "/v2/models/total"):
        assert ask(server, "GET", path)[0] == 401
        assert ask(server, "GET", path, Authorization="Bearer 0123456789abcdef-other")[0] == 403
        assert ask(server, "GET", path, Authorization="Bearer 0123456789abcdef-serve")[0] == 200
    assert ask(server, "POST", "/v2/models/total/infer", "{}")[0] == 401
    assert ask(server, "POST", "/invocations", "{}")[0] == 401


def test_failed_and_slow_requests_are_logged_with_their_trace(start):
    server = start("--log", "json", "--log-failed", "--slow-ms", "0.001")
    ask_json(server, "POST", "/v2/models/total/infer", {"inputs": [X], "id": "slow-1"}, traceparent=TRACE)
    ask_json(server, "POST", "/v2/models/total/infer", {"inputs": []}, traceparent=TRACE, X_Request_Id="bad-1")
    with server.connect() as peer:
        assert peer.ask(0, 77, "predict", ["total", {"nothing": 1}])[2]["code"] == "INVALID_ARGUMENT"
    assert server.stop() == 0
    lines = [json.loads(text) for text in server.log.read_text().splitlines()]
    (slow,) = [entry for entry in lines if entry["message"] == "slow request"]
    assert (slow["request_id"], slow["trace_id"], slow["model"]) == ("slow-1", TRACE[3:35], "total")
    failed = {entry["protocol"]: entry for entry in lines if entry["message"] == "request failed"}
    assert failed["http"]["request_id"] == "bad-1"
    assert failed["http"]["parent_id"] == TRACE[36:52]
    assert failed["rpc"] | {"time": ""} == {
        "time": "",
        "level": "warning",
        "message": "request failed",
        "protocol": "rpc",
        "method": "predict",
        "model": "total",
        "code": "INVALID_ARGUMENT",
        "error": "unknown column 'nothing'; columns: user_id, shop, amount",
        "request_id": "77",
    }


def test_no_http_opens_no_port(start):
    server = start("--no-http")
    assert "http" not in server.line
    with server.connect() as peer:
        assert peer.ask(0, 1, "ping", [])[3] == "pong"


def test_a_port_in_use_is_an_error(start, server, store, tmp_path):
    port = http_port(server)
    log = tmp_path / "taken"
    with pytest.raises(pytest.fail.Exception):
        Server(store, "--http-port", str(port), log=log)
    assert log.read_text() == (
        f"error: port {port} on 127.0.0.1 is in use; stop the other process or choose another with --http-port\n"
    )


def test_both_protocols_answer_the_same(server, client):
    columns = {"user_id": [1, 2, 3], "shop": "north", "amount": 1.25}
    with server.connect() as peer:
        peer.send(msgpack.packb([0, 1, "predict", ["total", columns]]))
        over_rpc = peer.reply()[3]["outputs"]["total"]
    answer = client.infer("total", total_inputs([1, 2, 3], "north", [1.25]))
    assert answer.as_numpy("total").tolist() == over_rpc
