"""The types of keys, features and request columns.

The codes are part of the table format and of the wire's tensor encoding. Never change a code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from shorttail.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class DType:
    """A type of values.

    name: as users write it, "Vector(8)". code: in files and on the wire. numpy: NumPy's scalar type of an element,
    object for strings. width: elements in a value: n for Vector(n), else 1.
    """

    name: str
    code: int
    numpy: Any
    width: int = 1

    @property
    def is_vector(self) -> bool:
        return self.code in (VECTOR_CODE, WIDE_VECTOR_CODE)

    @property
    def is_integer(self) -> bool:
        return self.code in (Int32.code, Int64.code, Timestamp.code)

    @property
    def is_float(self) -> bool:
        return self.code in (Float32.code, Float64.code)

    def __repr__(self) -> str:
        return self.name


VECTOR_CODE, WIDE_VECTOR_CODE = 8, 9

Bool = DType("Bool", 1, np.bool_)
Int32 = DType("Int32", 2, np.int32)
Int64 = DType("Int64", 3, np.int64)
Float32 = DType("Float32", 4, np.float32)
Float64 = DType("Float64", 5, np.float64)
String = DType("String", 6, np.object_)
Timestamp = DType("Timestamp", 7, np.int64)  # microseconds since 1970-01-01 UTC


def Vector(length: int, element: DType = Float32) -> DType:
    """Return the type of vectors of `length` elements, 1 to 65536. Raises InvalidArgument.

    element: Float32 or Float64. A request column that is a vector and feeds an input of doubles has Float64.
    """
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 65_536:
        raise InvalidArgument(f"Vector({length!r}): the length must be an integer from 1 to 65536")
    if element == Float64:
        return DType(f"Vector({length}, Float64)", WIDE_VECTOR_CODE, np.float64, length)
    if element != Float32:
        raise InvalidArgument(f"Vector({length}, {element!r}): the elements must be Float32 or Float64")
    return DType(f"Vector({length})", VECTOR_CODE, np.float32, length)


VECTOR = re.compile(r"Vector\((\d+)(, Float64)?\)")
SCALARS: dict[str, DType] = {t.name: t for t in (Bool, Int32, Int64, Float32, Float64, String, Timestamp)}


def parse_dtype(name: str) -> DType:
    """Return the type with that name, as `repr` of a type prints it. Raises InvalidArgument."""
    if name in SCALARS:
        return SCALARS[name]
    if vector := VECTOR.fullmatch(name):
        return Vector(int(vector[1]), Float64 if vector[2] else Float32)
    raise InvalidArgument(f"unknown type {name!r}; types: {', '.join(SCALARS)}, Vector(n)")
