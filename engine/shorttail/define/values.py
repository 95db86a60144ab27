"""What a value becomes in a column of a type: said here once, and used by every way in.

`as_value` is the rule for one value. `as_column` does the same for a whole column, many values at a time where NumPy or
Arrow hold them; its outcome is that of `as_value` on each. Text (CSV, the command line) is read by define/text.py,
Arrow data by define/arrow.py. docs/types.md has the rules as a table (define/types_page.py).
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
from shorttail.define.refusal import Refused, got, numbers_of, refused, shown
from shorttail.define.scalar import EXACT, INT32, INT64, NAN, as_value, is_missing, is_row, unwrapped
from shorttail.define.times import times_us

Array = NDArray[Any]
Nulls = NDArray[np.bool_]

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

__all__ = ["Refused", "as_column", "as_value", "of_arrow", "plain", "refused", "shown"]


def as_column(dtype: DType, values: Any) -> tuple[Array, Nulls | None, bool]:
    """A column as an array of the type, which values are missing (None: none is), and whether it was one value alone.

    values: one value, a list or tuple, a NumPy array (masked ones too), or a column of pandas, polars or pyarrow. The
    array is of `dtype.numpy`: [n], or [n, width] for vectors, objects (str) for strings. A missing value is NaN in
    floats and vectors and None in strings; in other arrays it is any value. Raises Refused with the row.
    """
    if (single := plain(dtype, values)) is not None:
        return single, None, True
    if isinstance(values, list | tuple):
        return _of_list(dtype, values)
    if isinstance(values, np.ndarray):
        return _of_array(dtype, values)
    if hasattr(values, "to_pylist"):  # pyarrow
        return _column_of_arrow(dtype, values)
    if hasattr(values, "to_arrow") and hasattr(values, "to_list"):  # polars
        return _of_polars(dtype, values)
    if hasattr(values, "isna") and hasattr(values, "to_numpy"):
        return _of_pandas(dtype, values)
    if isinstance(values, range) or (hasattr(values, "__array__") and not isinstance(values, np.generic)):
        return _of_array(dtype, np.asarray(values))
    return _of_one(dtype, values)


def plain(dtype: DType, value: Any) -> Array | None:
    """[value], if it is of the very type, as in most pushes of one row; None: it has to be looked at more closely."""
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


def _of_one(dtype: DType, value: Any) -> tuple[Array, Nulls | None, bool]:
    found = as_value(dtype, value)
    return *filled(dtype, [found]), True


def filled(dtype: DType, found: list[Any]) -> tuple[Array, Nulls | None]:
    """Values as as_value gives them, as an array, and which are missing."""
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
    """Doubles as the type's own floats; what is too large for those is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: NaNs that signal
        return values.astype(dtype.numpy, copy=False)


def one_by_one(dtype: DType, values: Sequence[Any], kind: str = "") -> tuple[Array, Nulls | None]:
    """kind: of the array that they were in."""
    found = []
    for row, value in enumerate(values):
        try:
            found.append(as_value(dtype, value))
        except Refused as error:
            said = got(value, kind) if kind and error.got == got(value) else error.got
            raise Refused(said, row) from None
    return filled(dtype, found)


_ALIKE: Final[dict[int, set[type]]] = {  # what one array can be made of at once, by the type's code
    Bool.code: {bool},
    Int32.code: {int},
    Int64.code: {int},
    Float32.code: {float, int, bool},
    Float64.code: {float, int, bool},
    String.code: {str},
    Timestamp.code: {int},
}


def _of_list(dtype: DType, values: Sequence[Any]) -> tuple[Array, Nulls | None, bool]:
    if dtype.is_vector:
        return _vectors_of_list(dtype, values)
    kinds = set(map(type, values))
    if kinds - {type(None)} <= _ALIKE[dtype.code] and (made := _at_once(dtype, values, type(None) in kinds)):
        return *made, False
    return *one_by_one(dtype, values), False


def _at_once(dtype: DType, values: Sequence[Any], has_none: bool) -> tuple[Array, Nulls | None] | None:
    """A list of which every item is of a usual type, or None; None if one of them has to be looked at more closely."""
    nulls: Nulls | None = None
    if has_none:
        nulls = np.fromiter((value is None for value in values), np.bool_, len(values))
        if dtype != String:
            values = [0 if value is None else value for value in values]
    if dtype == String:
        return (_objects(values), nulls) if all_short(values) else None
    try:
        made = np.array(values, np.float64 if dtype.is_float else bool if dtype == Bool else np.int64)
    except OverflowError:
        return None
    if dtype.is_float:
        return _floats(dtype, made, nulls)
    if dtype == Int32 and len(made) and not INT32[0] <= made.min() <= made.max() <= INT32[1]:
        return None
    return made.astype(dtype.numpy, copy=False), nulls


def all_short(texts: Sequence[Any]) -> bool:
    """Whether all of these texts (or None) are UTF-8 and of at most the bytes that are taken. False: perhaps not."""
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
    """Doubles, or floats of the type itself, in which NaN is missing. `values` may be changed."""
    if nulls is not None:
        values[nulls] = np.nan
    missing = np.isnan(values)
    return _narrowed(values, dtype), missing if missing.any() else None


def _of_array(dtype: DType, array: Array) -> tuple[Array, Nulls | None, bool]:
    if array.ndim == 0:
        return _of_one(dtype, array)
    if dtype.is_vector:
        return _vectors_of_array(dtype, array)
    if array.ndim != 1:
        raise Refused(f"an array of shape {array.shape}")
    if array.dtype.kind in "OUT":
        return *_of_list(dtype, array.tolist())[:2], False  # of masked ones it makes None
    nulls = np.ma.getmaskarray(array) if isinstance(array, np.ma.MaskedArray) else None
    return *of_numbers(dtype, np.asarray(array), nulls), False


def of_numbers(dtype: DType, array: Array, nulls: Nulls | None, kind: str = "") -> tuple[Array, Nulls | None]:
    """A column [n] of numbers, bools or times. kind: what messages call its type. Raises Refused.

    What lies under `nulls` does not matter.
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
        return _none_taken(dtype, array, nulls, kind)
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
        raise Refused(got(array[bad], kind), bad)
    return array.astype(dtype.numpy, copy=False), nulls


def _first_outside(dtype: DType, array: Array) -> int | None:
    """The row of the first number that is no value of a type that is Bool or whole."""
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


def _none_taken(dtype: DType, array: Array, nulls: Nulls | None, kind: str) -> tuple[Array, Nulls | None]:
    """A column of a kind of which the type takes no value: all must be missing."""
    for row, value in enumerate(array):
        if not (nulls is not None and nulls[row]) and not is_missing(value):
            raise Refused(got(value, kind), row)
    return filled(dtype, [None] * len(array))


def _of_polars(dtype: DType, values: Any) -> tuple[Array, Nulls | None, bool]:
    if str(values.dtype) != "Object":
        with contextlib.suppress(ImportError):  # without PyArrow, value by value
            return as_column(dtype, values.to_arrow())
    return _of_list(dtype, values.to_list())


def _of_pandas(dtype: DType, values: Any) -> tuple[Array, Nulls | None, bool]:
    """A Series, an Index or an array of pandas: of NumPy, of Arrow, nullable, with a zone, or of any other type."""
    kind = values.dtypes if getattr(values, "ndim", 1) > 1 else values.dtype
    if not hasattr(kind, "na_value"):  # no extension type
        return _of_array(dtype, values.to_numpy())
    if hasattr(kind, "pyarrow_dtype"):
        import pyarrow

        return as_column(dtype, pyarrow.chunked_array(pyarrow.array(values, from_pandas=True)))
    if hasattr(kind, "tz") and hasattr(kind, "unit"):
        return _of_array(dtype, values.to_numpy(f"datetime64[{kind.unit}]"))
    if isinstance(getattr(kind, "numpy_dtype", None), np.dtype) and not dtype.is_vector:
        nulls = np.asarray(values.isna(), np.bool_)
        return *of_numbers(dtype, values.to_numpy(kind.numpy_dtype, na_value=0), nulls, str(kind)), False
    return _of_list(dtype, list(values))


# -- vectors -----------------------------------------------------------------------------------------------------------


def _vectors_of_list(dtype: DType, values: Sequence[Any]) -> tuple[Array, Nulls | None, bool]:
    """A list of numbers is one vector; a list of lists, or of nothing but missing ones, a column of them."""
    first = next((value for value in map(unwrapped, values) if not is_missing(value)), None)
    if first is not None and not is_row(first):
        return _of_one(dtype, values)
    if set(map(type, values)) == {list} and all(len(row) == dtype.width for row in values):
        flat = list(chain.from_iterable(values))
        if set(map(type, flat)) <= {float, int} and (made := _at_once(Float64, flat, False)):
            return _narrowed(made[0].reshape(-1, dtype.width), dtype), None, False
    if set(map(type, values)) == {np.ndarray} and all(
        row.shape == (dtype.width,) and row.dtype.kind in "biuf" for row in values
    ):
        return *of_rows(dtype, np.stack(values)), False
    return *one_by_one(dtype, values), False


def _vectors_of_array(dtype: DType, array: Array) -> tuple[Array, Nulls | None, bool]:
    if array.dtype.kind == "O":
        if array.ndim == 1:
            return _vectors_of_list(dtype, array.tolist())
        return *one_by_one(dtype, [list(row) for row in array]), False
    if array.ndim == 1 and array.dtype.kind in "biuf":
        return _of_one(dtype, array.tolist())
    if array.ndim == 1 and all(map(is_missing, array)):
        return *filled(dtype, [None] * len(array)), False
    if array.ndim > 2 or array.dtype.kind not in "biuf":
        raise Refused(f"an array of {array.dtype} of shape {array.shape}")
    if array.shape[1] != dtype.width:
        raise Refused(numbers_of(array.shape[1]), 0)
    return *of_rows(dtype, array), False


def of_rows(dtype: DType, array: Array) -> tuple[Array, Nulls | None]:
    """A matrix [n, width] of numbers as vectors, of which none is missing; masked elements are NaN."""
    values = np.asarray(array)
    if values.dtype != np.float32:
        with np.errstate(invalid="ignore"):
            values = values.astype(np.float64)
    if isinstance(array, np.ma.MaskedArray):
        values = np.where(np.ma.getmaskarray(array), np.asarray(np.nan, values.dtype), values)
    return np.ascontiguousarray(_narrowed(values, dtype)), None


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _column_of_arrow(dtype: DType, column: Any) -> tuple[Array, Nulls | None, bool]:
    from shorttail.define import arrow

    if not arrow.is_column(column):
        raise Refused(f"a {type(column).__name__}")
    try:
        column = arrow.whole(column)
        if dtype.is_vector and not arrow.is_list(column.type):
            return _of_list(dtype, [unwrapped(item) for item in column])  # one vector alone, or nulls
        found, nulls = of_arrow(dtype, column)
    except arrow.Unsupported as error:
        raise Refused(f"a column of {column.type}, which Arrow cannot convert ({error!s:.60})") from None
    return _of_list(dtype, _texts(found)) if dtype == String else (found, nulls, False)


def of_arrow(dtype: DType, column: Any) -> tuple[Any, Nulls | None]:
    """An Arrow array as an array of the type, and which values are missing. Raises Refused.

    A String stays an Arrow array (string or large_string), whose texts are not looked at. Memory is shared with Arrow
    where the types are alike, and so may be read-only.
    """
    from shorttail.define import arrow

    column = arrow.whole(column)
    kind = str(column.type)
    nulls = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    if dtype.is_vector:
        if arrow.is_list(column.type):
            return _vectors_of_arrow(dtype, *arrow.lists(column), nulls)
    elif (array := arrow.numbers(column)) is not None:
        if dtype != String:
            return of_numbers(dtype, array, nulls, kind)
    elif arrow.is_text(column.type):
        if dtype == String:
            return arrow.as_string(column), nulls
        return one_by_one(dtype, _texts(column), kind)
    elif arrow.is_decimal(column.type) and dtype != String:
        return one_by_one(dtype, column.to_pylist(), kind)
    for row, item in enumerate(column):
        if item.is_valid:
            raise Refused(got(unwrapped(item), kind), row)
    return (arrow.no_texts(len(column)), nulls) if dtype == String else filled(dtype, [None] * len(column))


def _texts(column: Any) -> list[Any]:
    """The texts of an Arrow array, None where there is none. Raises Refused with the row of one that is not UTF-8."""
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


def _vectors_of_arrow(dtype: DType, flat: Any, lengths: Array, nulls: Nulls | None) -> tuple[Array, Nulls | None]:
    """flat: the elements of all lists that are not null; lengths: of these lists."""
    rows = np.arange(len(lengths)) if nulls is None else np.flatnonzero(~nulls)
    if (lengths != dtype.width).any():
        wrong = int(np.argmax(lengths != dtype.width))
        raise Refused(numbers_of(int(lengths[wrong])), int(rows[wrong]))
    try:
        found, _ = of_arrow(Float64, flat)
    except Refused as error:
        raise Refused(error.got, None if error.row is None else int(rows[error.row // dtype.width])) from None
    matrix, _ = of_rows(dtype, found.reshape(-1, dtype.width))
    if nulls is None:
        return matrix, None
    out = np.full((len(nulls), dtype.width), np.nan, np.float32)
    out[rows] = matrix
    return out, nulls
