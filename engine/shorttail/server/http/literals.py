"""Reads JSON in which some clients write numbers that JSON does not have, and writes such numbers as JSON.

JSON has no NaN and no infinities. Answers hold null for NaN, which is a missing value everywhere in this package, and
the strings "Infinity" and "-Infinity", as in the JSON of Protocol Buffers. Requests may hold the same, the string
"NaN", and the bare words NaN, Infinity and -Infinity, which Python's json and Triton's client write.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.errors import InvalidArgument
from shorttail.server.http.json import parse_json

NUMBERS: Final = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
WORD: Final = re.compile(rb"NaN|Infinity")
# A string, also one that does not end, or a bare word. One of the alternatives matches at each quote, so the search
# takes time in proportion to the length.
TOKEN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|NaN|-?Infinity', re.DOTALL)


def parse_document(body: bytes | memoryview) -> Any:
    """Parse JSON that may hold bare words: NaN becomes None, an infinity its name as a string. Raises as parse_json."""
    try:
        return parse_json(body)
    except InvalidArgument:
        if not WORD.search(body):
            raise
    return parse_json(TOKEN.sub(_replaced, bytes(body)))


def _replaced(token: re.Match[bytes]) -> bytes:
    text = token[0]
    if text.startswith(b'"'):
        return text
    return b"null" if text == b"NaN" else b'"' + text + b'"'


def read_numbers(values: list[Any]) -> list[Any]:
    """Return the values of a float column or tensor, with numbers for the names of NUMBERS."""
    if str not in set(map(type, values)):
        return values
    return [NUMBERS.get(value, value) if type(value) is str else value for value in values]


def plain(array: NDArray[Any]) -> list[Any]:
    """Return an array as nested lists for write_json, with the names of infinities."""
    if array.dtype.kind == "f" and np.isinf(array).any():
        named = array.astype(object)
        named[np.isposinf(array)] = "Infinity"
        named[np.isneginf(array)] = "-Infinity"
        array = named
    found: list[Any] = array.tolist()
    return found


def flat_numbers(array: NDArray[Any]) -> Any:
    """Return an array [n] for write_json, with the names of infinities. Floats keep the digits of their type."""
    if array.dtype.kind != "f" or not np.isinf(array).any():
        return array
    return [_name(value) if np.isinf(value) else value for value in array]


def _name(value: Any) -> str:
    return "Infinity" if value > 0 else "-Infinity"
