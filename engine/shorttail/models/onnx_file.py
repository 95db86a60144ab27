"""Reads just enough of an ONNX file (a protocol buffer) to know whether it refers to other files, and which inputs and
outputs have no shape.

ONNX Runtime opens such files by itself, from paths that the model chooses (CVE-2024-27318 and similar ones), so every
model is checked before ONNX Runtime opens it. Serving does not need the onnx package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Message types of onnx.proto: field number -> type of the message in it, for fields through which a tensor is reached.
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
    """Return whether a tensor of the model is kept in another file. Damaged input never raises an error."""
    # An external tensor names its file under the key "location". A forest of millions of nodes does not contain this
    # word, and walking it field by field in Python would take seconds.
    if b"location" not in data:
        return False
    try:
        return any_external(memoryview(data), "Model", 0)
    except (IndexError, ValueError):
        return False  # not a protocol buffer: ONNX Runtime will say so


def any_external(message: memoryview, kind: str, depth: int) -> bool:
    """Return whether a message of type `kind` contains an external tensor. Nesting beyond NESTING_MAX counts as one."""
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


def names_without_shape(data: bytes) -> set[str]:
    """Return the inputs and outputs for which a model declares no shape. ONNX Runtime shows them with the shape [].

    Returns nothing for bytes that are not a protocol buffer, such as ONNX Runtime's own format.
    """
    try:
        graphs = [part for number, part in fields(memoryview(data)) if number == 7 and isinstance(part, memoryview)]
        return {
            bytes(info[1]).decode("utf-8", "replace")
            for graph in graphs
            for number, part in fields(graph)
            if number in (11, 12) and isinstance(part, memoryview)
            for info in [messages(part)]
            if 1 in info and 2 not in messages(messages(info.get(2, b"")).get(1, b""))
        }
    except (IndexError, ValueError):
        return set()


def messages(message: memoryview | bytes) -> dict[int, memoryview]:
    """Return {field number: bytes} of the fields of a message that hold bytes; of a repeated field the last."""
    return {number: value for number, value in fields(memoryview(message)) if isinstance(value, memoryview)}


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) for each field of a message: an int for a varint, the bytes for any other type.

    Raises ValueError or IndexError for bytes that are not a protocol buffer.
    """
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
            continue  # start or end of a group: the group's fields are read as fields of this message
        else:
            raise ValueError("no such wire type")
        if at + length > len(message):
            raise ValueError("a field runs past the end of its message")
        yield tag >> 3, message[at : at + length]
        at += length


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """Decode the varint at an offset. Returns the value and the offset after it."""
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


def encoded(message: Iterable[tuple[int, int | bytes | memoryview]]) -> bytes:
    """Return the bytes of a message, from what `fields` yields: (field number, value), the value an int or bytes."""
    result = bytearray()
    for number, value in message:
        if isinstance(value, int):
            result += encoded_varint(number << 3) + encoded_varint(value)
        else:
            result += encoded_varint(number << 3 | 2) + encoded_varint(len(value)) + value
    return bytes(result)


def encoded_varint(value: int) -> bytes:
    """Return the varint of a number that is not negative."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])
