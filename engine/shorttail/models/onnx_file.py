"""Reads and writes the fields of an ONNX file, which is a protocol buffer, without the onnx package.

A server needs the nodes and weights of forests, and neither the memory of a second copy of the graph nor the time to
import the package. Files come here only after ONNX's own reader has checked them (onnx_weights.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


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
