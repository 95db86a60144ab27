"""Schemathesis asks a server everything that /openapi.json describes, and much that it does not.

No answer may be a 5xx, have a status or a media type that is not described, or break its schema. `make soak` sends more
requests of each kind (SHORTTAIL_HTTP_EXAMPLES).
"""

import collections
import copy
import json
import os
import re
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import onnx
import pytest
from http_asking import DEFINITIONS, ask, ask_json, http_port, write_every
from onnx import TensorProto, helper
from serving import Server, write_sum

import shorttail as st

EXAMPLES = int(os.environ.get("SHORTTAIL_HTTP_EXAMPLES", "10"))
# All checks of Schemathesis but those that expect an error for an unknown header, and a success for every request that
# fits a schema: which columns a model takes, no schema says.
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
]
MORE = """
import shorttail as st

@st.on_demand
def ratio(a: st.Float64, b: st.Int64) -> st.Float32:
    return a / b

mixed = st.Model("mixed", path="mixed.onnx", inputs={
    "x": [ratio("request:a", "request:b")], "v": ["request:v"], "name": ["request:name"],
})
"""


def write(path, takes, gives, nodes):
    """Write a model. takes, gives: name -> (type, shape)."""
    values = [[helper.make_tensor_value_info(n, t, s) for n, (t, s) in side.items()] for side in (takes, gives)]
    graph = helper.make_graph(nodes, "g", *values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("openapi")
    (home / "definitions.py").write_text(DEFINITIONS)
    (home / "more.py").write_text(MORE)
    write_sum(home / "total.onnx", 1.0)
    write_every(home / "every.onnx")
    floats = TensorProto.FLOAT, None
    write(home / "any.onnx", {"t": floats}, {"y": floats}, [helper.make_node("Identity", ["t"], ["y"])])
    takes = {
        "x": (TensorProto.FLOAT, [None, 1]),
        "v": (TensorProto.FLOAT, [None, 2]),
        "name": (TensorProto.STRING, [None, 1]),
    }
    gives = {name.upper(): kind for name, kind in takes.items()}
    write(home / "mixed.onnx", takes, gives, [helper.make_node("Identity", [n], [n.upper()]) for n in takes])
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.apply(home / "more.py")
        engine.apply([st.Model("any", path=home / "any.onnx", batching="request")])
        engine.push("stats", {"user_id": [1, 2], "age": [10.0, 20.0]})
        engine.push("sales", {"shop": ["north"], "rate": [0.5]})
    server = Server(home / "store", log=home / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


def schemathesis(server, document, folder, *options):
    """Run Schemathesis, and return the counts of statuses: {(method, path of the document): {status: n}}."""
    (folder / "openapi.json").write_text(json.dumps(document))
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", "openapi.json", "-c", ",".join(CHECKS),
         "--url", f"http://127.0.0.1:{http_port(server)}", "--max-examples", str(EXAMPLES),
         "--report-har-path", "all.har", *options],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"LD_PRELOAD": ""},  # ASan is for the server alone
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = collections.defaultdict(collections.Counter)
    for entry in json.loads((folder / "all.har").read_text())["log"]["entries"]:
        method, path = entry["request"]["method"], unquote(urlsplit(entry["request"]["url"]).path)
        found[method, pattern_of(document, path)][entry["response"]["status"]] += 1
    return found


def pattern_of(document, path):
    """Return the path of the document that a request's path is, or None."""
    for pattern in sorted(document["paths"], key=lambda pattern: "{" in pattern):
        if re.fullmatch(re.sub(r"{\w+}", "[^/:]+", re.sub(r"[.]", r"\\.", pattern)), path):
            return pattern
    return None


def test_every_answer_is_as_the_document_says(server, tmp_path):
    _, document = ask_json(server, "GET", "/openapi.json")
    found = schemathesis(server, document, tmp_path, "--phases", "coverage,fuzzing")
    for path, methods in document["paths"].items():
        for method in methods:
            assert found[method.upper(), path], (method, path)


VALUES = {  # datatype of a column -> schema of its values
    "BYTES": {"type": "string"},
    "BOOL": {"type": "boolean"},
    "INT32": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    "INT64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "FP32": {"type": ["number", "null"]},
    "FP64": {"type": ["number", "null"]},
}


def of_model(document, model):
    """Return the document as it is for one model, so that most requests fit it. model: its metadata."""
    document = copy.deepcopy(document)
    inputs, columns = [], {}
    for tensor in model["inputs"]:
        value = VALUES[tensor["datatype"]]
        size = 2 if len(tensor["shape"]) == 2 else 1
        values = {"type": "array", "items": value, "minItems": size, "maxItems": size}
        columns[tensor["name"]] = values if size == 2 else value
        fixed = {"name": {"const": tensor["name"]}, "datatype": {"const": tensor["datatype"]}, "data": values}
        fixed["shape"] = {"const": [1, size]}
        inputs.append({"type": "object", "properties": fixed, "required": list(fixed), "additionalProperties": False})
    row = {"type": "object", "properties": columns, "required": list(columns), "additionalProperties": False}
    schemas = document["components"]["schemas"]
    request = schemas["InferRequest"]["properties"]
    request["inputs"] = {"type": "array", "prefixItems": inputs, "minItems": len(inputs), "maxItems": len(inputs)}
    del request["outputs"]
    schemas["Instances"]["properties"] = {
        "instances": {"type": "array", "items": row, "minItems": 1},
        "parameters": {"const": {"model": model["name"]}},
    }
    schemas["Instances"]["required"] = ["instances", "parameters"]
    schemas["Invocation"] = schemas["Instances"]
    for path in document["paths"].values():
        for operation in path.values():
            operation["parameters"] = [p for p in operation.get("parameters", []) if p["in"] == "path"]
            for parameter in operation["parameters"]:
                parameter["schema"] = {"const": model["name"] if parameter["name"] == "model" else "1"}
    return document


@pytest.mark.parametrize("name", ["total", "every", "mixed", "any"])
def test_requests_that_fit_a_model_are_answered(server, tmp_path, name):
    _, document = ask_json(server, "GET", "/openapi.json")
    _, model = ask_json(server, "GET", f"/v2/models/{name}")
    paths = "infer|predict|invocations" if name != "any" else "infer"
    options = ["--phases", "fuzzing", "--mode", "positive", "--include-path-regex", f"({paths})$"]
    found = schemathesis(server, of_model(document, model), tmp_path, *options)
    assert len(found) == (4 if name != "any" else 2)
    assert all(statuses[200] for statuses in found.values()), found


def test_the_document_and_the_routes_are_one(server):
    """Each method of each path is either described or 405."""
    _, document = ask_json(server, "GET", "/openapi.json")
    for path, methods in document["paths"].items():
        asked = path.replace("{model}", "total").replace("{version}", "1")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            status, answer = ask(server, method, asked, b"{}" if method == "POST" else None)
            assert (status == 405) == (method.lower() not in methods), (method, asked, answer)
            assert status != 404
