"""Converts the columns of a caller to the MessagePack values that a client sends.

A client does not know the types of the columns, so it keeps the kind of each value: a time stays a time, and a missing
value is nil, NaN or NaT. The server then converts the values to the types of its columns.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, cast

import msgpack
import numpy as np

from shorttail.define.dtypes import Bool, DType, Float64, Int64, Timestamp
from shorttail.define.refusal import Refused, described
from shorttail.define.scalar import can_be_vector, is_masked, is_missing, unwrapped
from shorttail.define.times import times_us
from shorttail.define.values import as_column, as_value
from shorttail.errors import InvalidArgument
from shorttail.protocol import REQUEST, TENSOR_DIMS, TIME_DTYPE, Array, pack_tensor

# Types that are sent as the next larger type of the protocol. uint64 values above int64 are sent as a list instead.
_WIDENED: Final[dict[np.dtype[Any], type[np.generic]]] = {
    np.dtype(np.int8): np.int32,
    np.dtype(np.int16): np.int32,
    np.dtype(np.uint8): np.int32,
    np.dtype(np.uint16): np.int32,
    np.dtype(np.uint32): np.int64,
    np.dtype(np.uint64): np.int64,
    np.dtype(np.float16): np.float32,
}
_INT64_MAX: Final = 2**63 - 1
_UINT64_MAX: Final = 2**64 - 1  # the largest whole number that MessagePack carries

# NumPy dtype kind -> the type to which a pandas, polars or pyarrow column of that kind is converted.
_READ_AS: Final = {"b": Bool, "i": Int64, "u": Int64, "f": Float64, "M": Timestamp}

_PLAIN: Final = frozenset({str, int, float, bool, type(None)})  # sent as they are


def pack_request(msgid: int, method: str, params: list[Any]) -> bytes:
    """Return the request [0, msgid, method, params] as bytes, for 0 <= msgid < 2**32.

    Raises InvalidArgument for a value that MessagePack cannot represent.
    """
    # A new packer with a small first buffer costs 0.2 us; msgpack.packb allocates 256 KiB, which takes 2 us.
    packer = msgpack.Packer(default=_pack_other, buf_size=1024)
    try:
        return bytes(packer.pack((REQUEST, msgid, method, params)))
    except (TypeError, ValueError, OverflowError) as error:
        raise _unsendable(method, params, error) from None


def encode_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return {name: MessagePack value} of columns: arrays of numbers and times become tensors, the rest plain values.

    columns: a dict, or a table of pandas, polars or pyarrow. A column is a scalar, a list or tuple, a NumPy array, or a
    column of pandas, pyarrow or polars. Raises InvalidArgument.
    """
    encoded: dict[str, Any] = {}
    for given, value in _items(columns):
        name = given if type(given) is str else str(given)
        if name in encoded:
            raise InvalidArgument(f"column {name!r} is given twice")
        encoded[name] = encode_column(name, value)
    return encoded


def _items(columns: Any) -> Iterable[tuple[str, Any]]:
    if hasattr(columns, "items"):  # a dict, pandas
        return cast(Iterable[tuple[str, Any]], columns.items())
    if hasattr(columns, "column_names"):  # pyarrow.Table, RecordBatch
        return zip(columns.column_names, columns.columns, strict=True)
    if hasattr(columns, "get_columns"):  # polars
        return ((series.name, series) for series in columns.get_columns())
    raise InvalidArgument(
        f"columns of type {type(columns).__name__}; give a dict of column -> values, pandas, polars or pyarrow"
    )


def encode_column(name: str, value: Any) -> Any:
    """Return a column as a MessagePack value: see encode_columns."""
    if type(value) in _PLAIN or type(value) is list:  # for items that msgpack does not know, it calls _pack_other
        return value
    try:
        return _encoded(value)
    except Refused as error:
        raise _refusal(name, error.got, error.row) from None


def _refusal(name: str, what: str, row: int | None) -> InvalidArgument:
    where = "" if row is None else f" at row {row}"
    return InvalidArgument(f"column '{name}' takes numbers, bools, text, times or vectors; got {what}{where}")


def _encoded(value: Any) -> Any:
    if isinstance(value, list | tuple | range):
        return list(value)
    if isinstance(value, np.ndarray):
        return _encode_array(value)
    if hasattr(value, "to_pylist"):
        return _encode_arrow(value)
    if hasattr(value, "to_arrow") and hasattr(value, "to_list"):
        return _encode_polars(value)
    if hasattr(value, "isna") and hasattr(value, "to_numpy"):
        return _encode_pandas(value)
    if hasattr(value, "__array__") and not isinstance(value, np.generic):
        return _encode_array(np.asarray(value))
    return _plain(value)


# -- scalars -----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return a single value, or a single vector, as a MessagePack value. Raises Refused."""
    if type(value) in _PLAIN:
        return value
    value = unwrapped(value)
    if is_missing(value):
        return None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, datetime.date | np.datetime64):  # datetime and pandas.Timestamp are subclasses
        time_us = as_value(Timestamp, value)
        return msgpack.Timestamp(time_us // 1_000_000, time_us % 1_000_000 * 1000)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer) and not isinstance(value, np.timedelta64):  # a subclass of np.integer
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, Decimal):
        return _plain_decimal(value)
    if can_be_vector(value):
        items = value.tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else list(value)
        return items if _PLAIN.issuperset(map(type, items)) else [_plain(item) for item in items]
    raise Refused(described(value))


def _plain_decimal(value: Decimal) -> int | float:
    """Return a whole Decimal as an int, so that it is not rounded, and another one as a float."""
    is_whole = value.copy_abs() <= _UINT64_MAX and value == value.to_integral_value()
    return int(value) if is_whole else float(value)


def _pack_other(value: Any) -> Any:
    """Convert a value for msgpack.Packer: an int of more than 64 bits becomes a float.

    Raises TypeError for a value that cannot be sent.
    """
    if isinstance(value, int):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    try:
        return _plain(value)
    except Refused as error:
        raise TypeError(error.got) from None


def _unsendable(method: str, params: list[Any], error: Exception) -> InvalidArgument:
    """Return the error that names the value that the packer refused."""
    columns = params[1] if len(params) > 1 and isinstance(params[1], dict) else {}
    for name, value in columns.items():
        many = isinstance(value, list)
        for row, item in enumerate(value if many else [value]):
            try:
                _check_sendable(item)
            except Refused as refusal:
                return _refusal(str(name), refusal.got, row if many else None)
    return InvalidArgument(f"{method}: a value cannot be sent: {error}")


def _check_sendable(item: Any) -> None:
    """Raise Refused for a value that cannot be sent: one that _plain refuses, or text with a lone surrogate."""
    if isinstance(item, msgpack.ExtType | msgpack.Timestamp):
        return
    plain = _plain(item)
    for part in plain if isinstance(plain, list) else [plain]:
        try:
            part.encode() if isinstance(part, str) else None
        except UnicodeEncodeError:
            raise Refused(f"text that is not UTF-8, {described(part)}") from None


# -- arrays ------------------------------------------------------------------------------------------------------------


def _encode_array(array: Array) -> Any:
    kind = array.dtype.kind
    if array.ndim == 0:
        return _plain(array)
    if kind == "O" and len(array) and (rows := _stacked(array)) is not None:
        array, kind = rows, rows.dtype.kind
    if kind in "OUT":
        return array.tolist()  # tolist() makes None of masked elements
    if array.ndim > TENSOR_DIMS:
        raise Refused(f"an array of {array.ndim} dimensions, more than {TENSOR_DIMS}")
    nulls = np.ma.getmaskarray(array) if is_masked(array) else None
    values = np.asarray(array)
    if kind == "M":
        missing = np.isnat(values) if nulls is None else np.isnat(values) | nulls
        times = times_us(values.ravel(), missing.ravel(), str(array.dtype)).reshape(array.shape)
        return _tensor(times.view(TIME_DTYPE), missing)
    if kind not in "biuf":
        return _require_all_missing(array)
    return _tensor(values, nulls)


def _tensor(array: Array, nulls: Array | None) -> Any:
    """Return numbers or times as a tensor. Integers and bools with a null become a list, because they have no NaN."""
    if nulls is not None and nulls.any():
        if array.dtype.kind in "biu":
            items = array.astype(object)
            items[nulls] = None
            return items.tolist()
        array = np.where(nulls, np.array("NaT" if array.dtype.kind == "M" else "NaN", array.dtype), array)
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and int(array.max()) > _INT64_MAX:
        return array.tolist()
    if array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):  # a long double may be too large for a double
            array = array.astype(np.float64)
    native = array.dtype.newbyteorder("=")
    return pack_tensor(array.astype(_WIDENED.get(native, native), copy=False))


def _require_all_missing(array: Array) -> list[None]:
    """Return Nones for an array whose dtype cannot be sent: raises Refused unless all its values are missing."""
    for row, value in enumerate(array):
        if np.ndim(value) or not is_missing(value):
            raise Refused(described(value, str(array.dtype)), row)
    return [None] * len(array)


def _stacked(array: Array) -> Array | None:
    """Return an object array of equally long vectors, as data frames hold them, as a matrix; None for other arrays."""
    first = array[0]
    if type(first) is not np.ndarray or first.dtype.kind not in "biuf":
        return None
    if not all(type(row) is np.ndarray and row.dtype == first.dtype and row.shape == first.shape for row in array):
        return None
    return np.stack(list(array))


# -- columns of pandas, polars and pyarrow -----------------------------------------------------------------------------


def _encode_pandas(values: Any) -> Any:
    if values.ndim > 1 or isinstance(values.dtype, np.dtype):
        return _encode_array(values.to_numpy())
    if hasattr(values.dtype, "pyarrow_dtype"):
        import pyarrow

        return _encode_arrow(pyarrow.array(values, from_pandas=True))
    dtype = _READ_AS.get(values.dtype.kind)
    return list(values) if dtype is None else _encode_typed(dtype, values)


def _encode_polars(values: Any) -> Any:
    if str(values.dtype) != "Object":
        with contextlib.suppress(ImportError):  # without PyArrow: value by value
            return _encode_arrow(values.to_arrow())
    return values.to_list()


def _encode_arrow(values: Any) -> Any:
    from shorttail.define import arrow

    column = arrow.decoded(values)
    if arrow.is_list(column.type) and not column.null_count:
        elements, lengths = arrow.flattened_lists(column)
        if (numbers := arrow.to_numpy(elements)) is not None and not elements.null_count and len(set(lengths)) == 1:
            return _encode_array(numbers.reshape(len(lengths), -1))
    if (numbers := arrow.to_numpy(column)) is not None:
        return _encode_typed(_READ_AS[numbers.dtype.kind], column)
    if arrow.is_text(column.type):
        with contextlib.suppress(UnicodeDecodeError):
            return column.to_pylist()
    return list(column)


def _encode_typed(dtype: DType, values: Any) -> Any:
    try:
        found, nulls, _ = as_column(dtype, values)
    except Refused:
        if dtype is not Int64:
            raise
        return list(values)  # integers above int64
    return _tensor(found.view(TIME_DTYPE) if dtype is Timestamp else found, nulls)
