"""Reads the graph of an ONNX file: nodes, constants, inputs and outputs. Serving does not need the onnx package.

Attributes stay encoded until they are used, and C code decodes them, because a tree ensemble keeps its nodes in
attributes: a thousand trees are about 5 MB of fields with a single number each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.forest import read_attribute
from shorttail.define.catalog import TensorInfo
from shorttail.models.onnx_file import encoded, fields, varint

# TensorProto.DataType -> (ONNX's name of the element type, NumPy dtype).
ELEMENTS: dict[int, tuple[str, str]] = {
    1: ("float", "f4"),
    6: ("int32", "i4"),
    7: ("int64", "i8"),
    8: ("string", "O"),
    9: ("bool", "?"),
    11: ("double", "f8"),
}
Array = NDArray[Any]
EMPTY = memoryview(b"")
IR_VERSION = 8  # of the files that are written here


@dataclass
class Node:
    """An operator of a graph. An optional input or output that is left out has the name ""; a name is optional too."""

    name: str = ""
    op_type: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    packed: list[memoryview] = field(default_factory=list)

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """The decoded attributes by name.

        A value is a float, an int, bytes, a float32 or int64 array, the array of a tensor, or, for a list of strings,
        (distinct strings, index of each entry's string).
        """
        result: dict[str, Any] = {}
        for data in self.packed:
            name, value = read_attribute(data)
            if not isinstance(value, tuple):
                result[name] = value
            elif len(value) == 2:
                result[name] = tensor(memoryview(value[1]))[1]
            else:
                result[name] = value[1:]
        return result


@dataclass
class Graph:
    """The parts of an ONNX model that a forest is compiled from. opsets: operator domain -> version."""

    opsets: dict[str, int] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    has_functions: bool = False


def read_graph(data: bytes, lenient: bool = False) -> Graph:
    """Return the graph of an ONNX file's bytes. lenient: leave out constants that cannot be read here.

    Raises ValueError or IndexError for bytes that are not an ONNX file.
    """
    graph = Graph()
    for number, value in fields(memoryview(data)):
        if number == 8 and isinstance(value, memoryview):
            parts = dict(fields(value))
            graph.opsets[as_text(parts.get(1, EMPTY))] = as_int(parts.get(2, 0))
        elif number == 25:
            graph.has_functions = True
        elif number == 7 and isinstance(value, memoryview):
            read_body(value, graph, lenient)
    constant_names = graph.constants.keys()
    graph.inputs = [info for info in graph.inputs if info.name not in constant_names]
    return graph


def lone_model(node: Node, element: int, opsets: dict[str, int], without: str) -> bytes:
    """Return an ONNX file with a single node, whose inputs and outputs are its own.

    element: the TensorProto.DataType of its only input, a matrix. without: an attribute that is left out.
    """
    attributes = [(5, data) for data in node.packed if read_attribute(data)[0] != without]
    names = [(1, node.inputs[0].encode()), *((2, name.encode()) for name in node.outputs)]
    body = encoded([*names, (4, node.op_type.encode()), *attributes, (7, node.domain.encode())])
    matrix = encoded([(1, encoded([(1, element), (2, encoded([(1, b""), (1, b"")]))]))])
    infos = [(11, encoded([(1, node.inputs[0].encode()), (2, matrix)]))]
    infos += [(12, encoded([(1, name.encode())])) for name in node.outputs if name]
    imports = [(8, encoded([(1, domain.encode()), (2, version)])) for domain, version in opsets.items()]
    return encoded([(1, IR_VERSION), (7, encoded([(1, body), (2, b"lone"), *infos])), *imports])


def read_body(data: memoryview, graph: Graph, lenient: bool = False) -> None:
    """Add the nodes, constants, inputs and outputs of a GraphProto to `graph`."""
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            graph.nodes.append(read_node(value))
        elif number == 5:
            with suppress(ValueError) if lenient else nullcontext():
                name, constant = tensor(value)
                graph.constants[name] = constant
        elif number == 11:
            graph.inputs.append(value_info(value))
        elif number == 12:
            graph.outputs.append(value_info(value))
        elif number == 15 and not lenient:
            raise ValueError("it has sparse constants")


def read_node(data: memoryview) -> Node:
    node = Node()
    for number, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            node.inputs.append(as_text(value))
        elif number == 2:
            node.outputs.append(as_text(value))
        elif number == 3:
            node.name = as_text(value)
        elif number == 4:
            node.op_type = as_text(value)
        elif number == 5:
            node.packed.append(value)
        elif number == 7:
            node.domain = as_text(value)
    return node


def value_info(data: memoryview) -> TensorInfo:
    """Decode a ValueInfoProto. dtype is "" unless it is a tensor with a type in ELEMENTS; a missing shape is ()."""
    name, kind, shape = "", "", []
    for number, value in fields(data):
        if number == 1:
            name = as_text(value)
        elif number == 2 and isinstance(value, memoryview):
            for which, inner in fields(value):
                if which != 1 or not isinstance(inner, memoryview):
                    continue
                for part, content in fields(inner):
                    if part == 1 and isinstance(content, int):
                        kind = ELEMENTS.get(content, ("", ""))[0]
                    elif part == 2 and isinstance(content, memoryview):
                        shape = [dimension(dim) for which, dim in fields(content) if which == 1]
    return TensorInfo(name, kind, tuple(shape))


def dimension(data: int | memoryview) -> int | None:
    """Return a fixed size, or None if the size is named, unknown, or 0 (some converters write 0 for "any size")."""
    assert isinstance(data, memoryview)
    for number, value in fields(data):
        if number == 1 and isinstance(value, int) and 0 < value < 1 << 62:
            return value
    return None


def tensor(data: memoryview) -> tuple[str, Array]:
    """Return (name, value) of a TensorProto. Raises ValueError for an element type that is not in ELEMENTS."""
    name, element, sizes = "", 0, []
    raw: memoryview | None = None
    chunks: dict[int, list[int | memoryview]] = {}
    for number, value in fields(data):
        if number == 1:
            sizes += list(integers(value))
        elif number == 2 and isinstance(value, int):
            element = value
        elif number == 8:
            name = as_text(value)
        elif number == 9 and isinstance(value, memoryview):
            raw = value
        elif number in (13, 14) and value != 0:
            raise ValueError("a constant is kept in another file")
        elif number in (4, 5, 6, 7, 10):
            chunks.setdefault(number, []).append(value)
    if element == 2 and raw is not None:
        return name, np.frombuffer(raw, np.uint8).reshape(sizes)
    if element not in ELEMENTS and element != 2:
        raise ValueError(f"a constant has element type {element}")
    dtype = np.dtype("u1" if element == 2 else ELEMENTS[element][1])
    if raw is not None:
        return name, np.frombuffer(raw, dtype).reshape(sizes)
    if element in (1, 11):
        packed = b"".join(
            bytes(chunk) for chunk in chunks.get(4 if element == 1 else 10, []) if not isinstance(chunk, int)
        )
        return name, np.frombuffer(packed, dtype).reshape(sizes)
    if element == 8:
        return name, np.array([as_text(chunk) for chunk in chunks.get(6, [])], object).reshape(sizes)
    numbers = [number for chunk in chunks.get(7 if element == 7 else 5, []) for number in integers(chunk)]
    return name, np.array(numbers, np.int64).astype(dtype).reshape(sizes)


def integers(value: int | memoryview) -> Iterator[int]:
    """Yield the signed numbers of a repeated int64 field, whether it is packed or not."""
    if isinstance(value, int):
        yield signed(value)
        return
    at = 0
    while at < len(value):
        number, at = varint(value, at)
        yield signed(number)


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def as_int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a field that must hold an integer holds bytes")
    return value


def as_text(value: int | memoryview) -> str:
    if isinstance(value, int):
        raise ValueError("a field that must hold text holds an integer")
    return bytes(value).decode("utf-8", "replace")
