"""Converts a single value to the type of a column. define/values.py converts whole columns by the same rules."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.dtypes import (
    VECTOR_CODE,
    WIDE_VECTOR_CODE,
    Bool,
    DType,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    Timestamp,
)
from shorttail.define.refusal import Refused, described, described_length, described_text
from shorttail.define.times import MIDNIGHT, datetime_us, parse_time, times_us

EXACT: Final = 2**53  # a double with a larger absolute value may be a rounded integer
INT32: Final = (-(2**31), 2**31 - 1)
INT64: Final = (-(2**63), 2**63 - 1)
NAN: Final = float("nan")
_PLAIN: Final = frozenset({int, float, str, bool, type(None), list, datetime.datetime})


def as_value(dtype: DType, value: Any) -> Any:
    """Return a value as the plain Python value of the type, or None if it is missing.

    The result is a bool, int, float or str; a Timestamp is an int of microseconds since 1970 UTC; a vector is a tuple
    of floats, with NaN for a missing element. A float is not rounded to Float32 yet. Raises Refused for a value that
    the type does not take.
    """
    if type(value) not in _PLAIN:
        value = unwrapped(value)
    if is_missing(value):
        return None
    if isinstance(value, np.timedelta64):  # it is a subclass of np.integer
        raise Refused(described(value))
    return _READERS[dtype.code](dtype, value)


def unwrapped(value: Any) -> Any:
    """Return the value that a 0-d NumPy array or an Arrow scalar holds; any other value as it is."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value[()]
    return _unwrapped_arrow(value) if hasattr(value, "as_py") else value


def _unwrapped_arrow(scalar: Any) -> Any:
    """Return the value of an Arrow scalar, without importing PyArrow. Raises Refused."""
    if not scalar.is_valid:
        return None
    kind = str(scalar.type)
    if kind.startswith("timestamp["):
        return np.datetime64(scalar.value, scalar.type.unit)
    if kind.startswith("date"):  # as_py() knows the years 1 to 9999 alone
        return np.datetime64(scalar.value, "D" if kind.startswith("date32") else "ms")
    if kind.startswith("duration["):
        return np.timedelta64(scalar.value, scalar.type.unit)
    if kind.startswith("extension<"):  # only the extension type knows what its storage means
        raise Refused(f"a value of {kind}")
    if hasattr(scalar, "dictionary"):
        return _unwrapped_arrow(scalar.value)
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise Refused("text that is not UTF-8") from None
    except Exception:  # such as a time of day with nanoseconds
        raise Refused(f"a value of {kind}") from None


def is_missing(value: Any) -> bool:
    """Return whether a value is None, NaN, NaT, pandas.NA or np.ma.masked."""
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    if isinstance(value, Decimal):
        return value.is_nan()
    # By names: pandas may not be installed, and a server that imports numpy.ma at its first value makes others wait.
    return type(value).__name__ in ("NAType", "NaTType", "MaskedConstant")


def is_masked(array: Any) -> bool:
    """Return whether an array is one of np.ma. For a plain array this does not import numpy.ma."""
    return type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray)


def _as_bool(dtype: DType, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if _is_number(value) and (value == 0 or value == 1):
        return bool(value)
    raise Refused(described(value))


def _as_int(dtype: DType, value: Any) -> int:
    low, high = INT32 if dtype == Int32 else INT64
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        whole = int(value)
    elif isinstance(value, Decimal):
        # Compare first: int() of Decimal("1e999999999") would build a number of 10**9 digits.
        whole = int(value) if value.copy_abs() <= high + 1 and value == value.to_integral_value() else high + 1
    elif isinstance(value, float | np.floating):
        exact = float(value)
        whole = int(exact) if abs(exact) <= EXACT and exact.is_integer() else high + 1
    else:
        raise Refused(described(value))
    if not low <= whole <= high:
        raise Refused(described(value))
    return whole


def _as_float(dtype: DType, value: Any) -> float:
    if not (_is_number(value) or isinstance(value, bool | np.bool_)):
        raise Refused(described(value))
    try:
        return float(value)
    except OverflowError:  # an int of more than 1,024 bits becomes infinity, as float("1e400") does
        return float("inf") if value > 0 else float("-inf")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | Decimal) and not isinstance(value, bool)


def _as_text(dtype: DType, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(described(value))
    text = str.__str__(value)  # a str enum has its own __str__, which returns the name
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise Refused(f"text that is not UTF-8, {described(text)}") from None
    if size > LIMITS.string_bytes:
        raise Refused(described_text(size))
    return text


def _as_time(dtype: DType, value: Any) -> int:
    if isinstance(value, str):
        return parse_time(value)
    if hasattr(value, "to_datetime64"):  # a pandas Timestamp: its year may be out of datetime's range
        value = value.to_datetime64()
    if isinstance(value, datetime.datetime):
        return datetime_us(value)
    if isinstance(value, datetime.date):
        return datetime_us(datetime.datetime.combine(value, MIDNIGHT))
    if isinstance(value, np.datetime64):
        try:
            return int(times_us(np.array([value]))[0])
        except Refused as error:
            raise Refused(error.got) from None  # drop the row of the array made here
    if hasattr(value, "to_unix_nano"):  # msgpack.Timestamp
        time_us = int(value.seconds) * 1_000_000 + int(value.nanoseconds) // 1_000
        if not INT64[0] <= time_us <= INT64[1]:
            raise Refused(described(value))
        return time_us
    return _as_int(dtype, value)


def _as_vector(dtype: DType, value: Any) -> tuple[float, ...]:
    if not can_be_vector(value):
        raise Refused(described(value))
    items = [as_value(Float64, item) for item in value]
    if len(items) != dtype.width:
        raise Refused(described_length(len(items)))
    return tuple(NAN if item is None else item for item in items)


def can_be_vector(value: Any) -> bool:
    """Return whether a value has elements, so that it can be a vector: a list, a tuple, an array or a Series."""
    return isinstance(value, list | tuple | np.ndarray) or (
        not isinstance(value, np.generic)  # np.bytes_ has elements too
        and hasattr(value, "__iter__")
        and hasattr(value, "__len__")
        and hasattr(value, "__array__")
    )


_READERS: Final[dict[int, Callable[[DType, Any], Any]]] = {
    Bool.code: _as_bool,
    Int32.code: _as_int,
    Int64.code: _as_int,
    Float32.code: _as_float,
    Float64.code: _as_float,
    String.code: _as_text,
    Timestamp.code: _as_time,
    VECTOR_CODE: _as_vector,
    WIDE_VECTOR_CODE: _as_vector,
}
