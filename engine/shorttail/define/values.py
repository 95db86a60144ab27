"""Converts values to the type of a column. Every way in (embedded, client, files, HTTP, command line) uses this module.

`as_value` (define/scalar.py) is the rule for one value. `as_column` converts a whole column, and gives the same result
as `as_value` on each value; where NumPy or Arrow hold the values, it converts many at a time. define/text.py reads text
(CSV, the command line), and define/arrow.py reads the buffers of Arrow. docs/types.md has the rules as a table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.define.dtypes import Bool, DType, Float32, Float64, Int32, Int64, String, Timestamp
from shorttail.define.refusal import Refused, described, described_length
from shorttail.define.scalar import EXACT, INT32, INT64, NAN, as_value, can_be_vector, is_masked, is_missing, unwrapped
from shorttail.define.times import times_us

Array = NDArray[Any]
Nulls = NDArray[np.bool_]

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

__all__ = ["Refused", "as_column", "as_value", "exact_column", "from_arrow"]


def as_column(dtype: DType, values: Any) -> tuple[Array, Nulls | None, bool]:
    """Convert a column to (array, nulls, is_scalar).

    values: a single value, a list or tuple, a NumPy array (also a masked one), or a column of pandas, polars or
    pyarrow. array: `dtype.numpy` of shape [n], or [n, width] for vectors; str objects for strings. nulls: bool [n],
    True where a value is missing, or None if no value is. is_scalar: `values` was a single value, so n is 1. Where a
    value is missing, floats and vectors hold NaN, strings hold None, and other arrays hold an arbitrary value.
    Raises Refused with the row of a value that the type does not take.
    """
    if (single := exact_column(dtype, values)) is not None:
        return single, None, True
    if isinstance(values, list | tuple):
        return _from_list(dtype, values)
    if isinstance(values, np.ndarray):
        return _from_array(dtype, values)
    if hasattr(values, "to_pylist"):  # pyarrow
        return _column_from_arrow(dtype, values)
    if hasattr(values, "to_arrow") and hasattr(values, "to_list"):  # polars
        return _from_polars(dtype, values)
    if hasattr(values, "isna") and hasattr(values, "to_numpy"):
        return _from_pandas(dtype, values)
    if isinstance(values, range) or (hasattr(values, "__array__") and not isinstance(values, np.generic)):
        return _from_array(dtype, np.asarray(values))
    return _from_one_value(dtype, values)


def exact_column(dtype: DType, value: Any) -> Array | None:
    """Return [value] as an array if `value` has exactly the Python type of the column, else None.

    This is the fast path for a push of a single row. None means that the value needs the checks of `as_value`.
    """
    kind = type(value)
    if dtype.is_float:
        is_exact = kind is float and abs(value) <= FLOAT32_MAX  # neither NaN nor infinite
    elif dtype.is_integer:
        is_exact = kind is int and INT32[0] <= value <= INT32[1]
    elif dtype is String:
        is_exact = kind is str and value.isascii() and len(value) <= LIMITS.string_bytes
        return np.array([value], object) if is_exact else None
    else:
        is_exact = kind is bool and dtype is Bool
    return np.array([value], dtype.numpy) if is_exact else None


def _from_one_value(dtype: DType, value: Any) -> tuple[Array, Nulls | None, bool]:
    found = as_value(dtype, value)
    return *from_values(dtype, [found]), True


def from_values(dtype: DType, found: list[Any]) -> tuple[Array, Nulls | None]:
    """Return the array and the nulls of values that `as_value` has converted; None is a missing value."""
    nulls = np.fromiter((value is None for value in found), np.bool_, len(found))
    if dtype == String:
        texts = np.empty(len(found), object)
        texts[:] = found
        return texts, nulls if nulls.any() else None
    if dtype.is_vector:
        rows: Array = np.full((len(found), dtype.width), np.nan)
        for row, value in enumerate(found):
            if value is not None:
                rows[row] = value
        return _narrowed(rows, dtype), nulls if nulls.any() else None
    if nulls.any():
        filler = NAN if dtype.is_float else 0
        found = [filler if value is None else value for value in found]
    if dtype.is_float:
        return _narrowed(np.array(found, np.float64), dtype), nulls if nulls.any() else None
    return np.array(found, dtype.numpy), nulls if nulls.any() else None


def _narrowed(values: Array, dtype: DType) -> Array:
    """Convert doubles to the float type of the column. A value too large for Float32 becomes infinity."""
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: signalling NaNs
        return values.astype(dtype.numpy, copy=False)


def one_by_one(dtype: DType, values: Sequence[Any], kind: str = "") -> tuple[Array, Nulls | None]:
    """Convert each value with `as_value`. kind: the type of the array that held the values, named in errors."""
    found = []
    for row, value in enumerate(values):
        try:
            found.append(as_value(dtype, value))
        except Refused as error:
            said = described(value, kind) if kind and error.got == described(value) else error.got
            raise Refused(said, row) from None
    return from_values(dtype, found)


_FAST_TYPES: Final[dict[int, set[type]]] = {  # type code -> Python types that NumPy converts all at once
    Bool.code: {bool},
    Int32.code: {int},
    Int64.code: {int},
    Float32.code: {float, int, bool},
    Float64.code: {float, int, bool},
    String.code: {str},
    Timestamp.code: {int},
}


def _from_list(dtype: DType, values: Sequence[Any]) -> tuple[Array, Nulls | None, bool]:
    if dtype.is_vector:
        return _vectors_from_list(dtype, values)
    kinds = set(map(type, values))
    if kinds - {type(None)} <= _FAST_TYPES[dtype.code] and (made := _all_at_once(dtype, values, type(None) in kinds)):
        return *made, False
    return *one_by_one(dtype, values), False


def _all_at_once(dtype: DType, values: Sequence[Any], has_none: bool) -> tuple[Array, Nulls | None] | None:
    """Convert a list whose items all have a type of _FAST_TYPES, or are None.

    Returns None if an item is out of range, or needs the checks of `as_value`.
    """
    nulls: Nulls | None = None
    if has_none:
        nulls = np.fromiter((value is None for value in values), np.bool_, len(values))
        if dtype != String:
            values = [0 if value is None else value for value in values]
    if dtype == String:
        return (_objects(values), nulls) if _all_fit(values) else None
    try:
        made = np.array(values, np.float64 if dtype.is_float else bool if dtype == Bool else np.int64)
    except OverflowError:
        return None
    if dtype.is_float:
        return _floats(dtype, made, nulls)
    if dtype == Int32 and len(made) and not INT32[0] <= made.min() <= made.max() <= INT32[1]:
        return None
    return made.astype(dtype.numpy, copy=False), nulls


def _all_fit(texts: Sequence[Any]) -> bool:
    """Return True if all texts (None is skipped) are surely valid UTF-8 and at most LIMITS.string_bytes long.

    False means that each text must be checked: the length is an estimate of 4 bytes per character.
    """
    given = [text for text in texts if text is not None]
    try:
        "".join(given).encode()
    except UnicodeEncodeError:
        return False
    return 4 * max(map(len, given), default=0) <= LIMITS.string_bytes


def _objects(values: Sequence[Any]) -> Array:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _floats(dtype: DType, values: Array, nulls: Nulls | None) -> tuple[Array, Nulls | None]:
    """Return floats of the column's type, and nulls: NaN is a missing value. May write to `values`."""
    if nulls is not None:
        values[nulls] = np.nan
    missing = np.isnan(values)
    return _narrowed(values, dtype), missing if missing.any() else None


def _from_array(dtype: DType, array: Array) -> tuple[Array, Nulls | None, bool]:
    if array.ndim == 0:
        return _from_one_value(dtype, array)
    if dtype.is_vector:
        return _vectors_from_array(dtype, array)
    if array.ndim != 1:
        raise Refused(f"an array of shape {array.shape}")
    if array.dtype.kind in "OUT":
        return *_from_list(dtype, array.tolist())[:2], False  # tolist() makes None of masked elements
    nulls = np.ma.getmaskarray(array) if is_masked(array) else None
    return *from_numbers(dtype, np.asarray(array), nulls), False


def from_numbers(dtype: DType, array: Array, nulls: Nulls | None, kind: str = "") -> tuple[Array, Nulls | None]:
    """Convert an array [n] of numbers, bools or times. Values where `nulls` is True are ignored.

    kind: the array's type as errors name it. Raises Refused.
    """
    kind = kind or str(array.dtype)
    if nulls is not None and not nulls.any():
        nulls = None
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    has = array.dtype.kind
    if has == "M" and dtype == Timestamp:
        missing = np.isnat(array) if nulls is None else np.isnat(array) | nulls
        return times_us(array, missing, kind), missing if missing.any() else None
    if has not in "biuf" or dtype == String or (has == "b" and dtype.is_integer):
        return _require_all_missing(dtype, array, nulls, kind)
    if dtype.is_float:
        wide = dtype.numpy if array.dtype == dtype.numpy else np.float64
        with np.errstate(invalid="ignore"):
            return _floats(dtype, array.astype(wide, copy=nulls is not None), nulls)
    if array.dtype == dtype.numpy:
        return array, nulls
    if nulls is not None:
        array = np.where(nulls, np.zeros((), array.dtype), array)
    if has == "f" and (missing := np.isnan(array)).any():
        nulls = missing if nulls is None else missing | nulls
        array = np.where(missing, np.zeros((), array.dtype), array)
    if (bad := _first_outside(dtype, array)) is not None:
        raise Refused(described(array[bad], kind), bad)
    return array.astype(dtype.numpy, copy=False), nulls


def _first_outside(dtype: DType, array: Array) -> int | None:
    """Return the row of the first number that a Bool, integer or Timestamp column does not take; None: it takes all."""
    if not len(array) or array.dtype.kind == "b":
        return None
    if dtype == Bool:
        fits = (array == 0) | (array == 1)
    elif array.dtype.kind == "f":
        wide = array.astype(np.float64, copy=False)
        fits = (np.abs(wide) <= EXACT) & (np.trunc(wide) == wide)
        if dtype == Int32:
            fits &= (wide >= INT32[0]) & (wide <= INT32[1])
    else:
        low, high = INT32 if dtype == Int32 else INT64
        if low <= int(array.min()) and int(array.max()) <= high:
            return None
        fits = np.array([low <= value <= high for value in array.tolist()], np.bool_)
    return None if fits.all() else int(np.argmin(fits))


def _require_all_missing(dtype: DType, array: Array, nulls: Nulls | None, kind: str) -> tuple[Array, Nulls | None]:
    """Convert an array whose kind the type never takes: raises Refused unless all its values are missing."""
    for row, value in enumerate(array):
        if not (nulls is not None and nulls[row]) and not is_missing(value):
            raise Refused(described(value, kind), row)
    return from_values(dtype, [None] * len(array))


def _from_polars(dtype: DType, values: Any) -> tuple[Array, Nulls | None, bool]:
    if str(values.dtype) != "Object":
        with contextlib.suppress(ImportError):  # without PyArrow: value by value
            return as_column(dtype, values.to_arrow())
    return _from_list(dtype, values.to_list())


def _from_pandas(dtype: DType, values: Any) -> tuple[Array, Nulls | None, bool]:
    """Convert a pandas Series, Index or array, with a NumPy, Arrow, nullable, time zone or any other extension type."""
    kind = values.dtypes if getattr(values, "ndim", 1) > 1 else values.dtype
    if not hasattr(kind, "na_value"):  # a NumPy dtype, not an extension type
        return _from_array(dtype, values.to_numpy())
    if hasattr(kind, "pyarrow_dtype"):
        import pyarrow

        return as_column(dtype, pyarrow.chunked_array(pyarrow.array(values, from_pandas=True)))
    if hasattr(kind, "tz") and hasattr(kind, "unit"):
        return _from_array(dtype, values.to_numpy(f"datetime64[{kind.unit}]"))
    if isinstance(getattr(kind, "numpy_dtype", None), np.dtype) and not dtype.is_vector:
        nulls = np.asarray(values.isna(), np.bool_)
        return *from_numbers(dtype, values.to_numpy(kind.numpy_dtype, na_value=0), nulls, str(kind)), False
    return _from_list(dtype, list(values))


# -- vectors -----------------------------------------------------------------------------------------------------------


def _vectors_from_list(dtype: DType, values: Sequence[Any]) -> tuple[Array, Nulls | None, bool]:
    """A list of numbers is a single vector. A list of lists, or of missing values alone, is a column of vectors."""
    first = next((value for value in map(unwrapped, values) if not is_missing(value)), None)
    if first is not None and not can_be_vector(first):
        return _from_one_value(dtype, values)
    if set(map(type, values)) == {list} and all(len(row) == dtype.width for row in values):
        flat = list(chain.from_iterable(values))
        if set(map(type, flat)) <= {float, int} and (made := _all_at_once(Float64, flat, False)):
            return _narrowed(made[0].reshape(-1, dtype.width), dtype), None, False
    if set(map(type, values)) == {np.ndarray} and all(
        row.shape == (dtype.width,) and row.dtype.kind in "biuf" for row in values
    ):
        return *from_matrix(dtype, np.stack(values)), False
    return *one_by_one(dtype, values), False


def _vectors_from_array(dtype: DType, array: Array) -> tuple[Array, Nulls | None, bool]:
    if array.dtype.kind == "O":
        if array.ndim == 1:
            return _vectors_from_list(dtype, array.tolist())
        return *one_by_one(dtype, [list(row) for row in array]), False
    if array.ndim == 1 and array.dtype.kind in "biuf":
        return _from_one_value(dtype, array.tolist())
    if array.ndim == 1 and all(map(is_missing, array)):
        return *from_values(dtype, [None] * len(array)), False
    if array.ndim > 2 or array.dtype.kind not in "biuf":
        raise Refused(f"an array of {array.dtype} of shape {array.shape}")
    if array.shape[1] != dtype.width:
        raise Refused(described_length(array.shape[1]), 0)
    return *from_matrix(dtype, array), False


def from_matrix(dtype: DType, array: Array) -> tuple[Array, Nulls | None]:
    """Convert a matrix [n, width] of numbers to n vectors. No row is missing; masked elements become NaN."""
    values = np.asarray(array)
    if values.dtype != np.float32:
        with np.errstate(invalid="ignore"):
            values = values.astype(np.float64)
    if is_masked(array):
        values = np.where(np.ma.getmaskarray(array), np.asarray(np.nan, values.dtype), values)
    return np.ascontiguousarray(_narrowed(values, dtype)), None


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _column_from_arrow(dtype: DType, column: Any) -> tuple[Array, Nulls | None, bool]:
    from shorttail.define import arrow

    if not arrow.is_column(column):
        raise Refused(f"a {type(column).__name__}")
    try:
        column = arrow.decoded(column)
        if dtype.is_vector and not arrow.is_list(column.type):
            return _from_list(dtype, [unwrapped(item) for item in column])  # a single vector, or nulls
        found, nulls = from_arrow(dtype, column)
    except arrow.ArrowError as error:
        raise Refused(f"a column of {column.type}, which Arrow cannot convert ({error!s:.60})") from None
    return _from_list(dtype, _arrow_texts(found)) if dtype == String else (found, nulls, False)


def from_arrow(dtype: DType, column: Any) -> tuple[Any, Nulls | None]:
    """Convert an Arrow array to an array of the column's type, and nulls (bool [n], or None). Raises Refused.

    A String column stays an Arrow array (string or large_string), and its texts are not checked. Where both types have
    the same layout, the result shares Arrow's memory, so it may be read-only.
    """
    from shorttail.define import arrow

    column = arrow.decoded(column)
    kind = str(column.type)
    nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    if dtype.is_vector:
        if arrow.is_list(column.type):
            return _vectors_from_arrow(dtype, *arrow.flattened_lists(column), nulls)
    elif (array := arrow.to_numpy(column)) is not None:
        if dtype != String:
            return from_numbers(dtype, array, nulls, kind)
    elif arrow.is_text(column.type):
        if dtype == String:
            return arrow.as_string(column), nulls
        return one_by_one(dtype, _arrow_texts(column), kind)
    elif arrow.is_decimal(column.type) and dtype != String:
        return one_by_one(dtype, column.to_pylist(), kind)
    for row, item in enumerate(column):
        if item.is_valid:
            raise Refused(described(unwrapped(item), kind), row)
    return (arrow.null_texts(len(column)), nulls) if dtype == String else from_values(dtype, [None] * len(column))


def _arrow_texts(column: Any) -> list[Any]:
    """Return the texts of an Arrow array, None for a null. Raises Refused with the row of a text that is not UTF-8."""
    try:
        texts: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        row = next(row for row, item in enumerate(column) if not _is_utf8(item))
        raise Refused("text that is not UTF-8", row) from None
    return texts


def _is_utf8(item: Any) -> bool:
    try:
        item.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _vectors_from_arrow(dtype: DType, flat: Any, lengths: Array, nulls: Nulls | None) -> tuple[Array, Nulls | None]:
    """Convert Arrow lists to vectors.

    flat: the elements of all lists that are not null, one list after the other. lengths: the length of each such list.
    """
    rows = np.arange(len(lengths)) if nulls is None else np.flatnonzero(~nulls)
    if (lengths != dtype.width).any():
        wrong = int(np.argmax(lengths != dtype.width))
        raise Refused(described_length(int(lengths[wrong])), int(rows[wrong]))
    try:
        found, _ = from_arrow(Float64, flat)
    except Refused as error:
        raise Refused(error.got, None if error.row is None else int(rows[error.row // dtype.width])) from None
    matrix, _ = from_matrix(dtype, found.reshape(-1, dtype.width))
    if nulls is None:
        return matrix, None
    out = np.full((len(nulls), dtype.width), np.nan, dtype.numpy)
    out[rows] = matrix
    return out, nulls
