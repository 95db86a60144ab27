"""Reads just enough of an ONNX file (a protocol buffer) to know whether it points at other files.

ONNX Runtime opens such files by itself, from paths that the model chooses (CVE-2024-27318 and kin), so a model is
looked at before ONNX Runtime sees it. The onnx package is not needed to serve.
"""

from __future__ import annotations

from collections.abc import Iterator

# Message types of onnx.proto, and which of their fields hold messages that can lead to a tensor.
CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Training": {1: "Graph", 2: "Graph"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of Tensor
NESTING_MAX = 64


def uses_external_data(data: bytes) -> bool:
    """Whether some tensor of the model is kept in another file. Damaged input gives True or False, never an error."""
    # An external tensor names its file under the key "location". Forests of millions of nodes hold no such word, and
    # walking them field by field in Python would take seconds.
    if b"location" not in data:
        return False
    try:
        return any_external(memoryview(data), "Model", 0)
    except (IndexError, ValueError):
        return False  # not a protocol buffer: ONNX Runtime will say so


def any_external(message: memoryview, kind: str, depth: int) -> bool:
    if depth > NESTING_MAX:
        return True
    children = CHILDREN[kind]
    for number, value in fields(message):
        if kind == "Tensor":
            if number == EXTERNAL_DATA or (number == DATA_LOCATION and value == 1):
                return True
        elif number in children and isinstance(value, memoryview) and any_external(value, children[number], depth + 1):
            return True
    return False


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: an int for varints, the bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            number, at = varint(message, at)
            yield tag >> 3, number
            continue
        if wire_type == 2:
            length, at = varint(message, at)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        elif wire_type in (3, 4):
            continue  # the marks around a group: look at what is between them as if it stood here
        else:
            raise ValueError("no such wire type")
        if at + length > len(message):
            raise ValueError("a field runs past the end of its message")
        yield tag >> 3, message[at : at + length]
        at += length


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The value at that offset, and the offset after it."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint longer than 10 bytes")
