"""What the specifications of HTTP's inference protocols say: requests as they write them, and every answer's form."""

import http.client
import json
import math

import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from http_asking import DEFINITIONS, ask, ask_json, ask_whole, http_port, tensor, write_every
from onnx import TensorProto, helper
from serving import TIMEOUT_S, Server, write_sum

import shorttail as st
from shorttail.config import LIMITS


def write_identity(path, shape):
    """Write a model that returns its input of floats. shape: None for any."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    home = tmp_path_factory.mktemp("protocols")
    (home / "definitions.py").write_text(DEFINITIONS)
    write_sum(home / "total.onnx", 1.0)
    write_every(home / "every.onnx")
    write_identity(home / "any.onnx", None)
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.apply([st.Model("any", path=home / "any.onnx", batching="request")])
        engine.push("stats", {"user_id": [1, 2], "age": [10.0, 20.0]})
        engine.push("sales", {"shop": ["north"], "rate": [0.5]})
    return home / "store"


@pytest.fixture(scope="module")
def server(store):
    server = Server(store, log=store.parent / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


INFER = "/v2/models/total/infer"
X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
ROW = {"user_id": 1, "shop": "north", "amount": 1}
TOTAL = {"model": "total"}
FOR_TOTAL = {"X_Amzn_SageMaker_Target_Model": "total"}
PREDICTED = 200, {"predictions": [11.5], "version": 1}


# -- the Open Inference Protocol -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"live": True, "ready": True}),
        ("/v2/models/total/ready", {"name": "total", "ready": True}),
        ("/v2/models/total/versions/1/ready", {"name": "total", "ready": True}),
        ("/v1/models/total", {"name": "total", "ready": True}),
        ("/v1/models", {"models": ["total", "every", "any"]}),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_health_and_readiness_have_the_documents_of_the_protocols(server, path, document, slash):
    assert ask_json(server, "GET", path + slash) == (200, document)
    assert ask(server, "HEAD", path + slash) == (200, b"")


def test_the_server_is_at_v2_with_and_without_a_slash(server):
    assert ask_json(server, "GET", "/v2") == ask_json(server, "GET", "/v2/")
    assert ask_json(server, "GET", "/v2/")[1]["name"] == "shorttail"


@pytest.mark.parametrize("identifier", [None, "", "r-1"])
def test_optional_fields_may_be_null(server, identifier):
    body = {"id": identifier, "parameters": None, "outputs": None, "inputs": [X | {"parameters": None}]}
    status, answer = ask_json(server, "POST", INFER, body)
    assert (status, answer["outputs"][0]["data"]) == (200, [6.0])
    assert answer.get("id") == identifier
    asked = body | {"outputs": [{"name": "total", "parameters": None}]}
    assert ask_json(server, "POST", INFER, asked) == (200, answer)


def test_the_longest_timeout_is_taken(server):
    longest = {"inputs": [X], "parameters": {"timeout": 2**63 - 1}}
    assert ask_json(server, "POST", INFER, longest)[0] == 200
    assert ask_json(server, "POST", INFER, {"inputs": [X]}, X_Deadline_Ms=str(2**63 - 1))[0] == 200
    assert ask_json(server, "POST", INFER, {"inputs": [X]}, X_Deadline_Ms="1e999")[0] == 200
    for timeout in (True, -1, 1.5, "1"):
        assert ask_json(server, "POST", INFER, {"inputs": [X], "parameters": {"timeout": timeout}})[0] == 400


@pytest.mark.parametrize("model", ["total", "any"])
@pytest.mark.parametrize("shape", [[0, 2**31, 2**31], [0, 2**64 - 1], [2**31, 2**31, 2**31]])
def test_a_shape_too_large_is_refused(server, model, shape):
    status, answer = ask_json(
        server, "POST", f"/v2/models/{model}/infer", {"inputs": [X | {"shape": shape, "data": []}]}
    )
    assert (status, list(answer)) == (400, ["error"])


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", [1, 3], [1, "a", 3], "an array of FP32; got 'a' (str) as element 1"),
        ("FP32", [1, 3], [1, True, 3], "an array of FP32; got True (bool) as element 1"),
        ("FP32", [1, 3], [True, False, True], "an array of FP32; got True (bool) as element 0"),
        ("INT64", [1, 3], [1, True, 3], "an array of INT64; got True (bool) as element 1"),
        ("INT64", [1, 3], [1, 2.5, 3], "an array of INT64; got 2.5 (float) as element 1"),
        ("BOOL", [1, 3], [True, 1, False], "an array of BOOL; got 1 (int) as element 1"),
        ("BYTES", [1, 3], ["a", 1, "b"], "BYTES must be an array of strings; got 1"),
        ("FP32", [1, 3], [1, [2], 3], "an array of FP32; got [2] (list) as element 1"),
        ("FP32", [1, 3], [[1], [2], [3]], "data is nested as [3, 1], where the shape is [1, 3]"),
        ("FP32", [3], [[1, 2, 3]], "data is nested as [1, 3], where the shape is [3]"),
        ("FP32", [1, 3], [[[1, 2, 3]]], "data is nested as [1, 1, 3], where the shape is [1, 3]"),
        ("FP32", [2, 3], [[1, 2, 3], [4, 5]], "must be an array of FP32, nested as its shape or flat"),
        (["FP32"], [1, 3], [1, 2, 3], "datatype ['FP32'] is not one of"),
        ("FP32", [1, 3.0], [1, 2, 3], "shape must be"),
        ("FP32", [1, 2**64], [1, 2, 3], "shape must be"),
    ],
)
def test_json_tensors_are_what_their_type_and_shape_say(server, datatype, shape, data, says):
    entry = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    for path in (INFER, "/v2/models/any/infer"):
        status, answer = ask_json(server, "POST", path, {"inputs": [entry]})
        assert (status, says in answer["error"]) == (400, True), answer


# -- infinity and missing ----------------------------------------------------------------------------------------------


def of_any(server, data):
    body = data if isinstance(data, str) else json.dumps(data)
    head = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [4], "data": '
    status, answer = ask(server, "POST", "/v2/models/any/infer", f"{head}{body}}}]}}")
    assert status == 200, answer
    return json.loads(answer, parse_constant=pytest.fail)["outputs"][0]["data"]


def test_infinities_are_strings_and_missing_is_null(server):
    assert of_any(server, ["Infinity", "-Infinity", "NaN", None]) == ["Infinity", "-Infinity", None, None]
    assert of_any(server, "[Infinity, -Infinity, NaN, 0.1]") == ["Infinity", "-Infinity", None, 0.1]
    texts = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ['NaN "Infinity" \\']}
    rest = [{"name": n, "datatype": k, "shape": [1], "data": [d]}
            for n, k, d in (("f32", "FP32", 1), ("f64", "FP64", math.inf), ("i64", "INT64", 1), ("i32", "INT32", 1),
                            ("flag", "BOOL", True))]  # fmt: skip
    status, answer = ask_json(server, "POST", "/v2/models/every/infer", {"inputs": [texts, *rest]})
    assert status == 200, answer
    data = {output["name"]: output["data"] for output in answer["outputs"]}
    assert (data["y_text"], data["y_f64"]) == (['NaN "Infinity" \\'], ["Infinity"])


@pytest.mark.parametrize("binary", [True, False])
def test_a_standard_client_sends_and_gets_infinity_and_nan(server, binary):
    sent = np.array([np.inf, -np.inf, np.nan, 0.1], np.float32)
    with triton.InferenceServerClient(f"127.0.0.1:{http_port(server)}", network_timeout=TIMEOUT_S) as client:
        outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
        answer = client.infer("any", [tensor("x", sent, "FP32", binary)], outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("y"), sent)


def test_predictions_tell_infinity_from_missing(server):
    amounts = ["Infinity", "-Infinity", None, 1]
    body = {"inputs": ROW | {"amount": amounts}, "params": TOTAL}
    assert ask_json(server, "POST", "/invocations", body)[1]["predictions"] == ["Infinity", "-Infinity", None, 11.5]
    lines = "\n".join(json.dumps(ROW | {"amount": amount}) for amount in amounts)
    status, answer = ask(server, "POST", "/invocations", lines, Content_Type="application/jsonlines", **FOR_TOTAL)
    assert (status, answer) == (200, b'"Infinity"\n"-Infinity"\nnull\n11.5\n')
    status, answer = ask_json(
        server, "POST", "/invocations", {"instances": [ROW | {"user_id": "Infinity"}], "params": TOTAL}
    )
    assert (status, "takes Int64; got 'Infinity'" in answer["error"]) == (400, True)


# -- what HTTP says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("GET", "/v2/nothing", 404, None),
        ("GET", "/v2/models/%FF%2e", 404, None),
        ("GET", "/v2/models/no_such_model", 404, None),
        ("POST", "/v1/models/no_such_model:predict", 404, None),
        ("POST", "/livez", 405, "GET, HEAD"),
        ("GET", "/v1/models/total:predict", 405, "POST"),
        ("GET", "/invocations", 405, "POST"),
        ("OPTIONS", INFER, 405, "POST"),
        ("DELETE", "/v2", 405, "GET, HEAD"),
    ],
)
def test_unknown_paths_and_methods_have_json_errors(server, method, path, status, allow):
    found, headers, body = ask_whole(server, method, path)
    assert (found, headers["Allow"], headers["Content-Type"]) == (status, allow, "application/json")
    assert list(json.loads(body)) == ["error"]


@pytest.mark.parametrize("content_type", ["text/xml", "image/png", "application/json; charset=utf-16", "nonsense"])
def test_a_media_type_that_is_not_taken_is_415(server, content_type):
    for path in (INFER, "/invocations", "/v1/models/total:predict"):
        status, answer = ask_json(server, "POST", path, {}, Content_Type=content_type)
        assert (status, list(answer)) == (415, ["error"])


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "text/csv"),
        ("application/json", "application/json"),
        ("text/html, application/*;q=0.5", "application/json"),
        ("application/json;q=0.2, application/x-ndjson;q=0.9", "application/x-ndjson"),
        ("text/csv;q=0, */*", "application/json"),
        ("text/html", None),
        ("text/csv;q=0", None),
    ],
)
def test_accept_is_honoured(server, accept, media):
    headers = {"Content_Type": "text/csv", "Accept": accept} | FOR_TOTAL
    status, found, _ = ask_whole(server, "POST", "/invocations", "1,north,1\n", **headers)
    assert (status, found.get_content_type()) == ((200, media) if media else (406, "application/json"))


def test_accept_counts_for_bytes_and_documents_too(server):
    asked = {"inputs": [X], "parameters": {"binary_data_output": True}}
    assert ask(server, "POST", INFER, json.dumps(asked), Accept="application/json")[0] == 406
    assert ask(server, "POST", INFER, json.dumps(asked), Accept="application/octet-stream")[0] == 200
    assert ask(server, "GET", "/v2", Accept="text/html")[0] == 406
    assert ask(server, "GET", "/livez", Accept="text/html")[0] == 200  # a probe asks for no document


def test_a_header_given_twice_is_refused_if_its_values_differ(server):
    def answer(values):
        connection = http.client.HTTPConnection("127.0.0.1", http_port(server), timeout=TIMEOUT_S)
        connection.putrequest("POST", "/invocations")
        body = json.dumps({"instances": [ROW]}).encode()
        connection.putheader("Content-Length", len(body))
        for value in values:
            connection.putheader("X-Amzn-SageMaker-Target-Model", value)
        connection.endheaders(body)
        status = connection.getresponse().status
        connection.close()
        return status

    assert [answer(values) for values in (["total", "total"], ["total", "every"])] == [200, 400]


def test_unknown_query_parameters_count_for_nothing(server):
    assert ask_json(server, "POST", "/v1/models/total:predict?x=1&x=%ff", {"instances": [ROW]}) == PREDICTED


# -- SageMaker, Vertex AI, MLflow, KServe V1 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [ROW]},
        {"instances": [list(ROW.values())]},
        {"instances": [{"features": list(ROW.values())}]},
        {"dataframe_split": {"columns": list(ROW), "data": [list(ROW.values())]}},
        {"dataframe_split": {"index": [0], "columns": list(ROW)[::-1], "data": [list(ROW.values())[::-1]]}},
        {"dataframe_records": [ROW]},
        {"inputs": [ROW]},
        {"inputs": [list(ROW.values())]},
        {"inputs": {name: [value] for name, value in ROW.items()}},
        {"inputs": ROW},
    ],
)
def test_requests_of_all_platforms_are_taken(server, body):
    assert ask_json(server, "POST", "/invocations", body | {"params": TOTAL}) == PREDICTED
    assert ask_json(server, "POST", "/invocations", body | {"parameters": TOTAL | {"version": 1}}) == PREDICTED
    assert ask_json(server, "POST", "/invocations", body, **FOR_TOTAL) == PREDICTED
    assert ask_json(server, "POST", "/v1/models/total:predict", body) == PREDICTED


def test_records_lack_columns_as_in_pandas(server):
    body = {"dataframe_records": [{"user_id": 1, "shop": "north"}, ROW], "params": TOTAL}
    assert ask_json(server, "POST", "/invocations", body)[1]["predictions"] == [None, 11.5]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "it has none of these keys"),
        ({"instances": [ROW], "inputs": [ROW]}, "it has instances and inputs"),
        ("text", "the body must be"),
        ({"instances": ROW}, "instances must be a list of rows"),
        ({"instances": []}, "instances is empty"),
        ({"instances": [[1, 2]]}, "instance 0 must be a map of columns"),
        ({"inputs": 1}, "instances must be a list of rows"),
        ({"inputs": {"user_id": [1] * (LIMITS.rows_per_request + 1)}}, "16385 rows in one request"),
        ({"dataframe_split": []}, "dataframe_split must be"),
        ({"dataframe_split": {"columns": ["a", 1], "data": [[1, 2]]}}, "dataframe_split must be"),
        ({"dataframe_split": {"columns": ["a", "a"], "data": [[1, 2]]}}, "names a column twice"),
        ({"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}, "row 0 of data must be a list: [a]"),
        ({"dataframe_records": [1]}, "must be a list of maps of columns"),
        ({"dataframe_records": [{f"c{n}": 1} for n in range(9)]}, "unknown column 'c0'"),
        ({"instances": [ROW], "params": TOTAL | {"outputs": [["total"]]}}, "must be a list of names among: total"),
        ({"instances": [ROW], "params": []}, None),
        ({"instances": [ROW], "params": [1]}, "parameters must be an object"),
        ({"instances": [ROW], "params": {"model": "every"}}, "names the model 'every', and the path 'total'"),
    ],
)
def test_wrong_requests_of_the_platforms_are_errors(server, body, says):
    status, answer = ask_json(server, "POST", "/v1/models/total:predict", body)
    if says is None:
        assert (status, answer) == PREDICTED
    else:
        assert (status, says in answer["error"]) == (400, True), answer


@pytest.mark.parametrize("media", ["application/jsonlines", "application/x-ndjson", "application/jsonl"])
def test_json_lines_are_an_instance_a_line(server, media):
    def answer(lines):
        return ask(server, "POST", "/invocations", lines, Content_Type=media, **FOR_TOTAL)

    maps = "\n".join([json.dumps(ROW), json.dumps(ROW | {"user_id": 2})])
    assert answer(maps) == answer(maps + "\n") == answer("\r\n" + maps + "\r\n\n") == (200, b"11.5\n21.5\n")
    assert answer('[1, "north", 1]') == (200, b"11.5\n")
    assert answer('{"features": [1, "north", 1]}') == (200, b"11.5\n")
    for lines, says in [
        ("", b"the body has no lines"),
        ('[1, "north", 1]\n{', b"line 2: the body is not JSON"),
        (f"{json.dumps(ROW)}\n" * (LIMITS.rows_per_request + 1), b"more than 16384 lines"),
        ('[1, "north", 1]\n7', b"instance 1 must be a map of columns"),
    ]:
        status, error = answer(lines)
        assert (status, says in error) == (400, True), error
