"""ONNX's own tests of its operators, served over HTTP and compared with ONNX Runtime on the same inputs.

By hand, `python tests/e2e/test_onnx_nodes.py` prints the counts, and `... FOLDER` takes the tests of a folder that has
model.onnx and test_data_set_*/*.pb for each (the `onnx` wheels up to 1.21 ship one: onnx/backend/test/data/node).
"""

from __future__ import annotations

import http.client
import json
import math
import struct
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from http_asking import http_port
from onnx import numpy_helper
from serving import TIMEOUT_S, Server

import shorttail as st
from shorttail.errors import InvalidArgument

LEAST_SERVED = 1200
MEMORY = Path("/dev/shm")
HEADER_BYTES = "Inference-Header-Content-Length"
# What requests carry: ONNX Runtime's name of a type -> (the protocol's datatype, NumPy dtype).
CARRIED = {
    "tensor(bool)": ("BOOL", "?"),
    "tensor(int8)": ("INT8", "i1"),
    "tensor(int16)": ("INT16", "<i2"),
    "tensor(int32)": ("INT32", "<i4"),
    "tensor(int64)": ("INT64", "<i8"),
    "tensor(uint8)": ("UINT8", "u1"),
    "tensor(uint16)": ("UINT16", "<u2"),
    "tensor(uint32)": ("UINT32", "<u4"),
    "tensor(uint64)": ("UINT64", "<u8"),
    "tensor(float16)": ("FP16", "<f2"),
    "tensor(float)": ("FP32", "<f4"),
    "tensor(double)": ("FP64", "<f8"),
    "tensor(string)": ("BYTES", "O"),
}
DTYPES = {datatype: np.dtype(dtype) for datatype, dtype in CARRIED.values()}


@dataclass
class Case:
    """An operator's test: a model and the inputs of its data sets, in the order of the graph's inputs."""

    name: str
    model: bytes
    data_sets: list[list]
    kinds: dict[str, str] = field(default_factory=dict)  # input -> type in ONNX Runtime
    fails: str = ""  # why ONNX Runtime does not load the model, or does not run it
    is_carried: bool = False  # whether requests and answers can carry all inputs and outputs
    runs: list[tuple[dict, list]] = field(default_factory=list)  # (inputs by name, outputs), both by ONNX Runtime
    is_random: bool = False  # two sessions of ONNX Runtime give different outputs


def generated():
    """Return the tests that the installed onnx package makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, about overflows that the tests want
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
        return [
            Case(case.name, case.model.SerializeToString(), [list(inputs) for inputs, _ in case.data_sets])
            for case in cases
        ]


def shipped(folder):
    """Return the tests of a folder. An input that is no tensor is None: no such model is served."""

    def read(path):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(path.read_bytes())
            return numpy_helper.to_array(tensor)
        except Exception:
            return None

    def by_number(path):
        return int(path.stem.rpartition("_")[2])

    return [
        Case(
            case.name,
            (case / "model.onnx").read_bytes(),
            [[read(path) for path in sorted(one.glob("input_*.pb"), key=by_number)]
             for one in sorted(case.glob("test_data_set_*"))],
        )
        for case in sorted(Path(folder).iterdir())
    ]  # fmt: skip


def as_array(value):
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    array = np.asarray(value)
    if array.dtype.kind not in "USO":
        return array
    texts = [text.decode() if isinstance(text, bytes) else str(text) for text in array.ravel().tolist()]
    return np.array([*texts, None], object)[:-1].reshape(array.shape)


def ask_onnx_runtime(case):
    """Run the case in ONNX Runtime itself, and note what it says."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1

    def session():
        return onnxruntime.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])

    try:
        first = session()
    except Exception as error:
        case.fails = f"loading: {error}"
        return
    inputs, outputs = first.get_inputs(), first.get_outputs()
    case.kinds = {tensor.name: tensor.type for tensor in inputs}
    case.is_carried = all(tensor.type in CARRIED for tensor in (*inputs, *outputs))
    names = [tensor.name for tensor in onnx.load_model_from_string(case.model).graph.input]
    try:
        for given in case.data_sets:
            feed = {name: as_array(v) for name, v in zip(names, given, strict=False) if name in case.kinds}
            case.runs.append((feed, first.run(None, feed)))
        if case.is_carried:
            second = session()
            case.is_random = any(not same(a, second.run(None, feed)) for feed, a in case.runs)
    except Exception as error:
        case.fails = f"running: {error}"


def same(ours, theirs):
    """Whether two lists of outputs are equal: bit for bit, but that NaN is NaN, and floats may differ in rounding."""
    return len(ours) == len(theirs) and all(map(same_array, ours, theirs))


def same_array(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind == "f":
        return bool(np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-6, atol=1e-7, equal_nan=True))
    return bool(np.array_equal(a, b))


# -- asking the server -----------------------------------------------------------------------------------------------


class Peer:
    """Sends inference requests on one connection: with binary tensors, or with all in JSON."""

    def __init__(self, server):
        self.connection = http.client.HTTPConnection("127.0.0.1", http_port(server), timeout=TIMEOUT_S)

    def ask(self, name, kinds, feed, binary):
        """Return ({output: array}, "") or (None, the error with its status)."""
        inputs, tail = [], []
        for tensor, array in feed.items():
            entry = {"name": tensor, "datatype": CARRIED[kinds[tensor]][0], "shape": list(array.shape)}
            if binary:
                tail.append(as_bytes(array))
                entry["parameters"] = {"binary_data_size": len(tail[-1])}
            else:
                entry["data"] = array.tolist()  # nested; of rank 0 a single value
            inputs.append(entry)
        document = {"inputs": inputs, "parameters": {"binary_data_output": binary}}
        head = json.dumps(document).encode()
        headers = {HEADER_BYTES: str(len(head))} if binary else {}
        self.connection.request("POST", f"/v2/models/{name}/infer", b"".join([head, *tail]), headers)
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            return None, f"{response.status} {json.loads(body)['error']}"
        length = int(response.headers.get(HEADER_BYTES, len(body)))
        return from_document(json.loads(body[:length]), body[length:]), ""

    def close(self):
        self.connection.close()


def as_bytes(array):
    if not array.dtype.hasobject:
        return array.tobytes()
    texts = [text.encode() for text in array.ravel().tolist()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def from_document(document, raw):
    found = {}
    for output in document["outputs"]:
        dtype, shape = DTYPES[output["datatype"]], output["shape"]
        if "data" in output:
            # NaN is null, and an infinity its name, which NumPy converts.
            values = [math.nan if value is None else value for value in output["data"]]
            array = np.array([*values, None], object)[:-1].astype(dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            array, raw = read_bytes(raw[:size], dtype), raw[size:]
        found[output["name"]] = array.reshape(shape)
    return found


def read_bytes(raw, dtype):
    if not dtype.hasobject:
        return np.frombuffer(raw, dtype)
    texts, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return np.array([*texts, None], object)[:-1]


# -- the comparison --------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """counts: what happened to how many tests; wrong: a line for each that should not have happened."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, case, what, detail=""):
        self.counts[what] += 1
        if detail:
            self.wrong.append(f"{case.name}: {what}: {detail}")


def compare(cases, home):
    """Apply every model, serve them, and compare each answer. home: an empty folder."""
    outcome = Outcome()
    for case in cases:
        ask_onnx_runtime(case)
        (home / f"{case.name}.onnx").write_bytes(case.model)
    served = [case for case in cases if case.is_carried]
    with st.Engine.open(home / "store", create=True) as engine:
        for case in cases:
            if not case.is_carried:
                refuse(engine, definition(home, case), case, outcome)
        for at in range(0, len(served), 500):
            engine.apply([definition(home, case) for case in served[at : at + 500]])
    server = Server(home / "store", log=home / "log")
    peer = Peer(server)
    try:
        for case in served:
            check(peer, case, outcome)
        outcome.wrong += [f"the server's log: {line}" for line in server.log.read_text().splitlines()[:20]]
        assert server.stop() == 0
    finally:
        peer.close()
        server.kill()
    return outcome


def definition(home, case):
    return st.Model(case.name, path=home / f"{case.name}.onnx", batching="request")


def refuse(engine, model, case, outcome):
    """Check that `apply` refuses a model that requests cannot carry, or that ONNX Runtime does not load."""
    try:
        engine.apply([model])
    except InvalidArgument as error:
        what = "refused at apply, also by ONNX Runtime" if case.fails else "refused at apply"
        is_clear = "\n" not in error.message and f"model '{model.name}'" in error.message
        outcome.note(case, what, "" if is_clear else f"unclear: {error.message!r}")
    else:
        outcome.note(case, "applied", "requests cannot carry its tensors")


def check(peer, case, outcome):
    if case.fails:  # then the request is to blame, and its error says so in one line
        feed = {name: as_array(v) for name, v in zip(case.kinds, case.data_sets[0], strict=False)}
        answer, error = peer.ask(case.name, case.kinds, feed, binary=True)
        is_clear = answer is None and error.startswith("400 ") and "\n" not in error
        outcome.note(case, "fails in ONNX Runtime too", "" if is_clear else f"{error or 'answered'}")
        return
    for feed, expected in case.runs:
        for binary in (True, False):
            answer, error = peer.ask(case.name, case.kinds, feed, binary)
            form = "bytes" if binary else "JSON"
            if answer is None:
                return outcome.note(case, "failed", f"{form}: {error}")
            got = list(answer.values())
            if case.is_random:
                alike = [(a.dtype, a.shape) for a in got] == [(a.dtype, a.shape) for a in expected]
            else:
                alike = same(got, expected)
            if not alike:
                return outcome.note(case, "answered wrong", f"{form}: {got} instead of {expected}"[:500])
    return outcome.note(case, "served, random" if case.is_random else "served")


def new_folder():
    """Make a folder that is removed again, in memory if the system has a place for it: `apply` syncs 10,000 files."""
    return tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)


def test_operators_are_served_as_onnx_runtime_runs_them():
    cases = generated()
    with new_folder() as folder:
        outcome = compare(cases, Path(folder))
    print(f"\n{len(cases)} tests: {dict(outcome.counts)}")
    assert outcome.wrong == []
    assert outcome.counts["served"] >= LEAST_SERVED


if __name__ == "__main__":
    found = shipped(sys.argv[1]) if sys.argv[1:] else generated()
    with new_folder() as folder:
        result = compare(found, Path(folder))
    for line in result.wrong:
        print(line)
    print(f"{len(found)} tests: {dict(result.counts)}")
    sys.exit(bool(result.wrong))
