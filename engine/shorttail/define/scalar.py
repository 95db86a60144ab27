"""What one value becomes in a column of a type. define/values.py does the same for whole columns."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.dtypes import VECTOR_CODE, Bool, DType, Float32, Float64, Int32, Int64, String, Timestamp
from shorttail.define.refusal import Refused, got, numbers_of, said_of_text
from shorttail.define.times import MIDNIGHT, microseconds, parse_time, times_us

EXACT: Final = 2**53  # a double beyond it may be a whole number that was rounded
INT32: Final = (-(2**31), 2**31 - 1)
INT64: Final = (-(2**63), 2**63 - 1)
NAN: Final = float("nan")
_PLAIN: Final = frozenset({int, float, str, bool, type(None), list, datetime.datetime})


def as_value(dtype: DType, value: Any) -> Any:
    """A value as the plain Python value of a type; None if it is missing.

    bool, int, float, str, the microseconds since 1970 UTC of a Timestamp, or the tuple of floats of a vector, in which
    a missing element is NaN. A float is not rounded to Float32 yet. Raises Refused.
    """
    if type(value) not in _PLAIN:
        value = unwrapped(value)
    if is_missing(value):
        return None
    if isinstance(value, np.timedelta64):  # for NumPy a kind of integer
        raise Refused(got(value))
    return _READERS[dtype.code](dtype, value)


def unwrapped(value: Any) -> Any:
    """What an array of no dimensions, or a scalar of Arrow, holds."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value[()]
    return _of_arrow(value) if hasattr(value, "as_py") else value


def _of_arrow(scalar: Any) -> Any:
    """What a scalar of Arrow holds, without importing Arrow. Raises Refused."""
    if not scalar.is_valid:
        return None
    kind = str(scalar.type)
    if kind.startswith("timestamp["):
        return np.datetime64(scalar.value, scalar.type.unit)
    if kind.startswith("duration["):
        return np.timedelta64(scalar.value, scalar.type.unit)
    if kind.startswith("extension<"):  # what its storage means is known to its type alone
        raise Refused(f"a value of {kind}")
    if hasattr(scalar, "dictionary"):
        return _of_arrow(scalar.value)
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise Refused("text that is not UTF-8") from None
    except Exception:  # nanoseconds of a time of day
        raise Refused(f"a value of {kind}") from None


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, NaT, pandas.NA or masked."""
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    if isinstance(value, Decimal):
        return value.is_nan()
    return value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType")


def _as_bool(dtype: DType, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if _is_number(value) and (value == 0 or value == 1):
        return bool(value)
    raise Refused(got(value))


def _as_int(dtype: DType, value: Any) -> int:
    low, high = INT32 if dtype == Int32 else INT64
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        whole = int(value)
    elif isinstance(value, Decimal):
        # Compared first: a whole number of 10**9 digits is better not made.
        whole = int(value) if value.copy_abs() <= high + 1 and value == value.to_integral_value() else high + 1
    elif isinstance(value, float | np.floating):
        exact = float(value)
        whole = int(exact) if abs(exact) <= EXACT and exact.is_integer() else high + 1
    else:
        raise Refused(got(value))
    if not low <= whole <= high:
        raise Refused(got(value))
    return whole


def _as_float(dtype: DType, value: Any) -> float:
    if not (_is_number(value) or isinstance(value, bool | np.bool_)):
        raise Refused(got(value))
    try:
        return float(value)
    except OverflowError:  # an int of more than 1,024 bits is rounded as its text would be
        return float("inf") if value > 0 else float("-inf")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | Decimal) and not isinstance(value, bool)


def _as_text(dtype: DType, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(got(value))
    text = str.__str__(value)  # also of an enum, whose own __str__ gives its name
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise Refused(f"text that is not UTF-8, {got(text)}") from None
    if size > LIMITS.string_bytes:
        raise Refused(said_of_text(size))
    return text


def _as_time(dtype: DType, value: Any) -> int:
    if isinstance(value, str):
        return parse_time(value)
    if hasattr(value, "to_datetime64"):  # of pandas, whose years may lie beyond those of datetime
        value = value.to_datetime64()
    if isinstance(value, datetime.datetime):
        return microseconds(value)
    if isinstance(value, datetime.date):
        return microseconds(datetime.datetime.combine(value, MIDNIGHT))
    if isinstance(value, np.datetime64):
        try:
            return int(times_us(np.array([value]))[0])
        except Refused as error:
            raise Refused(error.got) from None  # without a row
    if hasattr(value, "to_unix_nano"):  # msgpack.Timestamp
        time_us = int(value.seconds) * 1_000_000 + int(value.nanoseconds) // 1_000
        if not INT64[0] <= time_us <= INT64[1]:
            raise Refused(got(value))
        return time_us
    return _as_int(dtype, value)


def _as_vector(dtype: DType, value: Any) -> tuple[float, ...]:
    if not is_row(value):
        raise Refused(got(value))
    items = [as_value(Float64, item) for item in value]
    if len(items) != dtype.width:
        raise Refused(numbers_of(len(items)))
    return tuple(NAN if item is None else item for item in items)


def is_row(value: Any) -> bool:
    """Whether a value can be a vector: something that has elements."""
    return isinstance(value, list | tuple | np.ndarray) or (
        not isinstance(value, np.generic)  # of bytes it has elements too
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
}
