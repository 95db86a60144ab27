"""Describes requests for the native generator: templates of pieces, and the columns that their values come from.

The generator makes a request from literal bytes and random values. For each group and each row of the request it draws
a row once, and all columns of the group take their values from it, so the parts of a composite key fit together.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from shorttail import protocol

NO_GROUP: Final = -1
EXT_32: Final = 0xC9  # the tag of an extension whose length takes four bytes


@dataclass(frozen=True, slots=True)
class Group:
    """Columns that take their values from the same row. draw: how a row in 0 ... n - 1 is chosen: "uniform", "zipf"
    (row 0 is the most popular) or "in-turn".
    """

    draw: str
    n: int
    exponent: float = 0.99


@dataclass(frozen=True, slots=True)
class EncodedColumn:
    """The values of a column in an encoding.

    kind "int": low + row of the group; without a group, low + a random number below `span`. "float": uniform in
    [from_, to). "table": the encoded value of row i is table[offsets[i]:offsets[i + 1]].
    form: "msgpack", "json" or "raw" (inside a tensor).
    """

    kind: str
    form: str
    group: int = NO_GROUP
    low: int = 0
    span: int = 0
    from_: float = 0.0
    to: float = 0.0
    table: bytes = b""
    offsets: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(1, np.uint64))


class Piece(NamedTuple):
    """A piece of a request.

    kind "literal": the bytes [begin, end) of the template. "values": n values of a column. "nonce": the request's
    number. "body": the following pieces are the HTTP body; its length is written into the eight digits before it.
    """

    kind: str
    column: int = 0
    n: int = 0
    begin: int = 0
    end: int = 0


@dataclass(slots=True)
class Template:
    """A kind of request, and its weight among the kinds."""

    name: str
    weight: float
    data: bytes = b""
    pieces: list[Piece] = field(default_factory=list)

    def literal(self, part: bytes) -> None:
        begin = len(self.data)
        self.data += part
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.kind == "literal":
            self.pieces[-1] = last._replace(end=len(self.data))
        else:
            self.pieces.append(Piece("literal", begin=begin, end=len(self.data)))

    def values(self, column: int, count: int) -> None:
        self.pieces.append(Piece("values", column, count))

    def nonce(self) -> None:
        self.pieces.append(Piece("nonce"))

    def body(self) -> None:
        self.pieces.append(Piece("body"))


def table_column(values: Sequence[Any], form: str, group: int = NO_GROUP) -> EncodedColumn:
    """Encode values of any type into a table. form "raw": the bytes of NumPy arrays or scalars, unchanged."""
    if form == "msgpack":
        encoded = [bytes(msgpack.packb(value)) for value in values]
    elif form == "json":
        encoded = [json.dumps(value).encode() for value in values]
    else:
        encoded = [np.asarray(value).tobytes() for value in values]
    offsets = np.zeros(len(encoded) + 1, np.uint64)
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    return EncodedColumn("table", form, group, table=b"".join(encoded), offsets=offsets)


def array_header(items: int) -> bytes:
    packer = msgpack.Packer()
    return bytes(packer.pack_array_header(items))


def tensor_header(dtype: str, shape: Sequence[int]) -> bytes:
    """Return the bytes that precede the elements of a tensor in a message."""
    array = np.zeros(0, dtype)
    head = struct.pack(f"<BB{len(shape)}I", protocol.pack_tensor(array).data[0], len(shape), *shape)
    size = len(head) + int(np.prod(shape)) * array.itemsize
    return struct.pack(">BIB", EXT_32, size, protocol.TENSOR_EXT) + head
