"""A client handles arrays as a whole: a call runs as many Python instructions for 10,000 rows as for ten."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from shorttail import protocol
from shorttail.client import calls
from shorttail.client.calls import Call
from shorttail.protocol import parse_address
from shorttail.results import Features, Prediction

FEW, MANY = 10, 10_000


def opcodes(work: Callable[[], Any]) -> int:
    """Count the bytecode instructions that `work` executes, in its frame and in all frames below."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def received(data: bytes) -> Any:
    unpacker = protocol.new_unpacker()
    unpacker.feed(data)
    return protocol.read_response(unpacker.unpack())[2]


def columns(rows: int) -> dict[str, Any]:
    names = [f"user {i}" for i in range(rows)]
    return {
        "integers": np.arange(rows),
        "narrow": np.arange(rows).astype(np.int16),
        "floats": np.linspace(0, 1, rows, dtype=np.float32),
        "flags": np.arange(rows) % 2 == 0,
        "times": np.arange(rows).astype("datetime64[s]"),
        "masked": np.ma.array(np.arange(rows), mask=np.arange(rows) % 2),
        "vectors": np.zeros((rows, 4), np.float32),
        "text": np.array(names),
        "objects": np.array([*names[:-1], None], object),
        "arrow": pa.array(np.arange(rows)),
        "arrow_nulls": pa.array([*range(rows - 1), None]),
        "arrow_text": pa.array(names, pa.string_view()),
        "arrow_times": pa.array(np.arange(rows), pa.timestamp("ns", "UTC")),
        "arrow_vectors": pa.array([[0.5, 1.5]] * rows),
        "lists": names,
        "scalar": 7,
    }


def test_columns_are_encoded_without_a_python_loop_over_rows() -> None:
    address = parse_address(":1")

    def send(given: dict[str, Any]) -> bytes:
        params = calls.predict_params("m", given, None, False)
        return Call(address, 1, "predict", params, calls.Deadline(5.0)).message()

    few, many = columns(FEW), columns(MANY)
    send(few)  # which imports what reads Arrow
    assert opcodes(lambda: send(few)) == opcodes(lambda: send(many)) > 0


def test_results_are_decoded_without_a_python_loop_over_rows() -> None:
    def reply(rows: int) -> tuple[bytes, bytes]:
        tensors = [
            protocol.pack_tensor(np.arange(rows)),
            protocol.pack_tensor(np.ones((rows, 3), np.float32)),
            [*(f"label {i}" for i in range(rows - 1)), None],
        ]
        statuses = [protocol.pack_tensor(np.zeros(rows, np.uint8))] * 3
        outputs = dict(zip("abc", tensors, strict=True))
        prediction = {"outputs": outputs, "version": 1, "statuses": {"v": statuses[0]}}
        features = {"feature_names": ["v:a", "v:b", "v:c"], "values": tensors, "statuses": statuses}
        return tuple(msgpack.packb([1, 0, None, result]) for result in (prediction, features))

    def read(data: tuple[bytes, bytes]) -> tuple[Prediction, Features]:
        return calls.read_prediction("m", received(data[0])), calls.read_features(received(data[1]))

    few, many = reply(FEW), reply(MANY)
    assert opcodes(lambda: read(few)) == opcodes(lambda: read(many)) > 0
    prediction, features = read(many)
    for values in (prediction.outputs["a"], prediction.outputs["b"]):
        assert values.flags.writeable
        assert values.flags.c_contiguous
        assert values.flags.aligned
    np.testing.assert_array_equal(prediction.outputs["a"], np.arange(MANY))
    assert prediction.outputs["c"].dtype == object
    assert prediction.outputs["c"][-2:].tolist() == [f"label {MANY - 2}", None]
    assert features.to_dict()["v:a"][-1] == MANY - 1


def test_the_instruction_count_sees_a_loop_over_elements() -> None:
    counts = [opcodes(lambda rows=rows: [i + 1 for i in range(rows)]) for rows in (FEW, MANY)]
    assert counts[1] > counts[0] + MANY - FEW


@pytest.mark.parametrize("values", [["a\0", "b"], ["", None], [["a", "b"], ["c", "d\0"]], []])
def test_strings_are_decoded_unchanged(values: list[Any]) -> None:
    result = {"outputs": {"label": values}, "version": 1}
    assert calls.read_prediction("m", result).outputs["label"].tolist() == values
