"""Models whose rows depend on each other answer each of many requests in flight as if it were alone."""

import asyncio

import numpy as np
import onnxruntime
import pytest
from row_kinds import DEPENDENT

import shorttail as st

REQUESTS = 50
STATEFUL = "batch normalization in training mode"  # ONNX Runtime moves its statistics with each run
KINDS = [kind for kind in DEPENDENT if kind != STATEFUL]
TEXTS = np.array(["a", "b", "c"], object)

pytestmark = pytest.mark.filterwarnings("ignore")  # quantization gives some


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The files by kind, and a store in which `apply` found out about each."""
    home = tmp_path_factory.mktemp("kinds")
    files = {kind: DEPENDENT[kind][0](home / f"m{number}.onnx") for number, kind in enumerate(KINDS)}
    definitions = []
    for path in files.values():
        tensor = onnxruntime.InferenceSession(path).get_inputs()[0]
        columns = [f"request:c{i}" for i in range(tensor.shape[1])]
        definitions.append(st.Model(path.stem, str(path), columns, outputs=[output_of(path)]))
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(definitions)
    return files, home / "store"


def output_of(path):
    """The last output: others hold what a Scan has carried, or the labels of scores."""
    return onnxruntime.InferenceSession(path).get_outputs()[-1].name


def requests_of(path):
    """Return 50 requests of 1 to 5 rows, or of as many as the file takes, and the answer that each gets alone."""
    session = onnxruntime.InferenceSession(path)
    tensor = session.get_inputs()[0]
    random = np.random.default_rng(3)
    asked = []
    for number in range(REQUESTS):
        shape = (tensor.shape[0] if isinstance(tensor.shape[0], int) else 1 + number % 5, tensor.shape[1])
        if tensor.type == "tensor(string)":
            rows = random.choice(TEXTS, shape)
        elif tensor.type == "tensor(int64)":
            rows = random.integers(0, 3, shape)
        else:
            rows = (random.normal(size=shape) * 10.0 ** random.integers(-1, 3)).astype(np.float32)
        asked.append((rows, session.run([output_of(path)], {tensor.name: rows})[0]))
    return asked


async def answers(address, model, asked):
    async with await st.AsyncClient.connect(address) as client:
        columns = [{f"c{i}": column for i, column in enumerate(rows.T)} for rows, _ in asked]
        return await asyncio.gather(*[client.predict(model, each) for each in columns])


def test_every_request_is_answered_as_if_it_were_alone(kinds, start):
    files, store = kinds
    server = start(of=store)
    for kind, path in files.items():
        asked = requests_of(path)
        got = asyncio.run(answers("{}:{}".format(*server.address), path.stem, asked))
        for prediction, (_, expected) in zip(got, asked, strict=True):
            np.testing.assert_allclose(prediction.outputs[output_of(path)], expected, 1e-5, 1e-6, err_msg=kind)
