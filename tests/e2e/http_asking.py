"""Helpers for HTTP tests: a model with inputs of every type, and requests sent whole or byte by byte."""

import contextlib
import http.client
import json
import re
import socket

import numpy as np
import onnx
import tritonclient.http as triton
from onnx import TensorProto, helper
from serving import TIMEOUT_S

DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
shop = st.Entity("shop", keys={"shop": st.String})
stats = st.FeatureView("stats", entity=user, features=[st.Feature("age", st.Float32, default=1.5)])
sales = st.FeatureView("sales", entity=shop, features=[st.Feature("rate", st.Float32, default=100.0)])
total = st.Model("total", path="total.onnx", inputs=["stats:age", "sales:rate", "request:amount"])
every = st.Model("every", path="every.onnx", inputs={
    name: [f"request:{name[2:]}"] for name in ("x_f32", "x_f64", "x_i64", "x_i32", "x_flag", "x_text")
})
"""
TYPES = {
    "x_f32": (TensorProto.FLOAT, np.float32, "FP32"),
    "x_f64": (TensorProto.DOUBLE, np.float64, "FP64"),
    "x_i64": (TensorProto.INT64, np.int64, "INT64"),
    "x_i32": (TensorProto.INT32, np.int32, "INT32"),
    "x_flag": (TensorProto.BOOL, np.bool_, "BOOL"),
    "x_text": (TensorProto.STRING, np.object_, "BYTES"),
}
EVERY = {
    "x_f32": np.array([1.5, -2.5], np.float32),
    "x_f64": np.array([1e300, 0.25]),
    "x_i64": np.array([2**62 + 1, -5]),
    "x_i32": np.array([-(2**31), 7], np.int32),
    "x_flag": np.array([True, False]),
    "x_text": np.array(["Zürich", ""], np.object_),
}


def write_every(path):
    """Write a model that returns its inputs, which have all types."""
    tensors = {name: kind for name, (kind, _, _) in TYPES.items()}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [name.replace("x_", "y_")]) for name in tensors],
        "every",
        [helper.make_tensor_value_info(name, kind, [None]) for name, kind in tensors.items()],
        [helper.make_tensor_value_info(name.replace("x_", "y_"), kind, [None]) for name, kind in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def http_port(server):
    """Return the HTTP port of a server, from its announcement."""
    return int(re.search(r"http on 127\.0\.0\.1:(\d+)", server.line)[1])


def ask(server, method, path, body=None, **headers):
    """Send a request and return (status, body). Underscores in header names stand for hyphens."""
    status, _, answer = ask_whole(server, method, path, body, **headers)
    return status, answer


def ask_whole(server, method, path, body=None, **headers):
    """As ask, and return (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", http_port(server), timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def ask_json(server, method, path, body=None, **headers):
    """As ask, with JSON bodies."""
    status, answer = ask(server, method, path, None if body is None else json.dumps(body), **headers)
    return status, json.loads(answer)


def tensor(name, array, kind, binary=True):
    """Make an input for Triton's client. kind: its datatype; binary: sent as bytes, not as JSON."""
    made = triton.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def total_inputs(users, shop, amount, binary=True):
    """Make the inputs of model "total" for users in one shop."""
    texts = np.array([shop], np.object_)
    return [
        tensor("user_id", np.array(users), "INT64", binary),
        tensor("shop", texts, "BYTES", binary),
        tensor("amount", np.array(amount, np.float32), "FP32", binary),
    ]


INFER = "/v2/models/total/infer"


def body_of(count):
    """Return the body of an INFER request with this many rows, for the model of serving.py."""
    rows = [{"name": name, "datatype": kind, "shape": [count], "data": [value] * count}
            for name, kind, value in (("user_id", "INT64", 1), ("amount", "FP32", 0.5))]  # fmt: skip
    return json.dumps({"inputs": rows})


class Asking:
    """A connection on which a test can write parts of a request, unlike http.client."""

    def __init__(self, server, stack):
        address = "127.0.0.1", http_port(server)
        self.peer = stack.enter_context(socket.create_connection(address, TIMEOUT_S))

    def send(self, text):
        self.peer.sendall(text.encode())

    def begin(self, body_bytes, *headers):
        """Send the headers of a request whose body has this many bytes."""
        self.send("\r\n".join([f"POST {INFER} HTTP/1.1", "Host: x", f"Content-Length: {body_bytes}", *headers, "", ""]))

    def answer(self):
        """Return (status, body) of the next response, or None if the server has closed."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            got = self.peer.recv(1)
            if not got:
                assert not head
                return None
            head += got
        status, *lines = head.decode().split("\r\n")
        lengths = [line.split(":")[1] for line in lines if line.lower().startswith("content-length")]
        body = b""
        while lengths and len(body) < int(lengths[0]):
            body += self.peer.recv(int(lengths[0]) - len(body))
        return int(status.split()[1]), body

    def probe(self):
        """Return the status of /livez."""
        self.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        return self.answer()[0]

    def has_ended(self):
        """Wait until the server closes the connection, and return True."""
        with contextlib.suppress(ConnectionError):
            assert self.answer() is None
        return True

    def has_ended_already(self):
        """Whether the server has closed the connection. Bytes that arrived stay unread."""
        self.peer.setblocking(False)
        try:
            return self.peer.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.peer.settimeout(TIMEOUT_S)
