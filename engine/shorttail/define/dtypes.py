"""The types of keys, features and request columns.

The codes are part of the table format and of the wire's tensor encoding. Never change a code.
"""

from __future__ import annotations

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
        return self.code == VECTOR_CODE

    @property
    def is_integer(self) -> bool:
        return self.code in (Int32.code, Int64.code, Timestamp.code)

    @property
    def is_float(self) -> bool:
        return self.code in (Float32.code, Float64.code)

    def __repr__(self) -> str:
        return self.name


VECTOR_CODE = 8

Bool = DType("Bool", 1, np.bool_)
Int32 = DType("Int32", 2, np.int32)
Int64 = DType("Int64", 3, np.int64)
Float32 = DType("Float32", 4, np.float32)
Float64 = DType("Float64", 5, np.float64)
String = DType("String", 6, np.object_)
Timestamp = DType("Timestamp", 7, np.int64)  # microseconds since 1970-01-01 UTC


def Vector(length: int) -> DType:
    """Return the type of float32 vectors of `length` elements, 1 to 65536. Raises InvalidArgument."""
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 65_536:
        raise InvalidArgument(f"Vector({length!r}): the length must be an integer from 1 to 65536")
    return DType(f"Vector({length})", VECTOR_CODE, np.float32, length)


SCALARS: dict[str, DType] = {t.name: t for t in (Bool, Int32, Int64, Float32, Float64, String, Timestamp)}


def parse_dtype(name: str) -> DType:
    """Return the type with that name, as `repr` of a type prints it. Raises InvalidArgument."""
    if name in SCALARS:
        return SCALARS[name]
    if name.startswith("Vector(") and name.endswith(")") and name[7:-1].isdigit():
        return Vector(int(name[7:-1]))
    raise InvalidArgument(f"unknown type {name!r}; types: {', '.join(SCALARS)}, Vector(n)")
