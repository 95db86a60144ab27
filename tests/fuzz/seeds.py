"""The first inputs of codec.check: requests of every kind, and the damaged messages of mutations.py."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
from codec import TOKEN
from mutations import FRAMES, HUGE

VALUES: dict[str, list[Any]] = {
    "key": [1, None, -(2**63), 2.0, float("nan")],
    "small": [3, -4, None, 1.0],
    "amount": [0.5, 7, None],
    "single": [1.5, True, 2**64 - 1],
    "name": ["a", "é" * 20, None],
    "taste": [[1.0, 2], None, [None, 3]],
    "new": [True, 0, None, 1.0],
    "at": [0, 10**15, None, msgpack.Timestamp(1), msgpack.Timestamp(-1, 5), msgpack.Timestamp(2**34, 5), "1969-12-31"],
}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OPTIONS = {
    "as_of": "2026-01-01",
    "deadline_ms": 1e9,
    "priority": 2,
    "encoding": "tensor",
    "statuses": True,
    "version": 1,
    "traceparent": TRACE,
}


def tensor(code: int, shape: list[int], data: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, struct.pack(f"<BB{len(shape)}I", code, len(shape), *shape) + data)


def messages() -> Iterator[list[Any]]:
    for name, values in VALUES.items():
        yield [0, 1, "predict", [name, {name: values}]]
        yield [0, 1, "predict", [name, {name: values[0]}, OPTIONS]]
    rows = {name: values[:3] for name, values in VALUES.items()}
    yield [0, 2, "predict", [",".join(VALUES), rows]]
    yield [0, 2, "predict", [",".join(VALUES), rows, OPTIONS]]
    yield [0, 3, "predict", ["at", {"at": tensor(7, [2], bytes(15) + b"\x80")}]]
    for code, size in ((1, 1), (2, 4), (3, 8), (4, 4), (5, 8), (9, 1)):
        yield [0, 3, "predict", ["amount", {"amount": tensor(code, [2], bytes(2 * size))}]]
        yield [0, 3, "predict", ["key,taste", {"key": 1, "taste": tensor(code, [2, 2], bytes(4 * size))}]]
    yield [0, 4, "predict", ["key,new", {"key": tensor(3, [], bytes(8)), "new": tensor(1, [1], b"\1")}]]
    yield [0, 5, "get_online_features", [["view:a", "view:b"], {"key": [1, 2]}, {"encoding": "tensor"}]]
    yield [0, 6, "get_online_features", [["view:a"], {"key": 1}, {"as_of": msgpack.Timestamp(1, 5)}]]
    yield [0, 7, "push", ["view", {"key": [1]}, {"traceparent": TRACE}]]
    yield [2, "delete", ["view", {"key": [1]}]]
    yield [2, "predict", ["key", {"key": 1}]]
    yield [0, 8, "echo", [{1: [None, True, b"\0", 2**64 - 1, -1.5, msgpack.Timestamp(1)]}]]
    yield [0, 9, "auth", [TOKEN]]
    yield [0, 10, "ping", []]


def inputs() -> Iterator[bytes]:
    streams = [msgpack.packb(message) for message in messages()]
    streams += [*FRAMES, *(FRAMES[0] + huge for huge in HUGE), b"".join(streams[:4])]
    for number, stream in enumerate(streams):
        yield bytes([2, number % 7]) + stream
    yield b"\0\xff" + msgpack.packb([0, 9, "auth", [TOKEN]]) + streams[0]


def write(folder: Path) -> None:
    """Write the inputs to the folder of a corpus, with the same names each time."""
    for data in inputs():
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
