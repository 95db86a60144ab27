"""Columns as a caller holds them into MessagePack values: what a client sends."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

import msgpack
import numpy as np

from shorttail.errors import InvalidArgument
from shorttail.protocol import REQUEST, TENSOR_DIMS, Array, pack_tensor

# What travels as the next larger type that the wire has. (uint64 is checked for values above int64 first.)
_WIDENED: Final[dict[np.dtype[Any], type[np.generic]]] = {
    np.dtype(np.int8): np.int32,
    np.dtype(np.int16): np.int32,
    np.dtype(np.uint8): np.int32,
    np.dtype(np.uint16): np.int32,
    np.dtype(np.uint32): np.int64,
    np.dtype(np.uint64): np.int64,
    np.dtype(np.float16): np.float32,
}


_AS_THEY_ARE: Final = frozenset({str, int, bool, type(None)})  # items that MessagePack carries, and that mean one thing


def pack_request(msgid: int, method: str, params: list[Any]) -> bytes:
    """[0, msgid, method, params] as bytes, for 0 <= msgid < 2**32.

    Raises InvalidArgument for a value that MessagePack cannot carry.
    """
    # A packer of its own costs 0.2 us with a small first buffer; msgpack.packb takes 256 KiB and 2 us.
    packer = msgpack.Packer(default=_pack_other, buf_size=1024)
    try:
        return bytes(packer.pack((REQUEST, msgid, method, params)))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{method}: a value cannot be sent: {error}") from None


def encode_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as a caller holds them, as MessagePack values: numeric arrays as tensors, the rest as plain values.

    A column is a scalar, a list or tuple, a numpy array, or anything with a numpy form (pandas, pyarrow, polars).
    `columns` is a dict, or a table of pandas, polars or pyarrow. Raises InvalidArgument.
    """
    return {str(name): encode_column(str(name), value) for name, value in _items(columns)}


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
    """One column for the wire: see encode_columns."""
    if value is None or isinstance(value, (str, bool, int, float, list)):
        return value
    if isinstance(value, (tuple, range)):
        return list(value)
    if isinstance(value, np.generic) or _is_missing(value):
        return _pack_other(value)
    if isinstance(value, (datetime.datetime, bytes)):
        return _encode_scalar(name, value)
    if _has_nulls(value):
        # As numpy, integers with a null would turn into floats.
        return _plain_items(_as_list(value))
    if getattr(getattr(value, "dtype", None), "tz", None) is not None:
        value = value.to_numpy("datetime64[us]")  # pandas gives an object a time where there is a zone
    array = np.asarray(value)
    if array.dtype.kind in "UT" and not isinstance(value, np.ndarray):
        return _as_list(value)  # as fixed-width text, a string has lost the zero bytes at its end
    if array.ndim == 0:
        return _encode_scalar(name, array.item() if array.dtype.kind != "M" else array[()])
    return _encode_array(name, array)


def _encode_scalar(name: str, value: Any) -> Any:
    try:
        return value if isinstance(value, (str, bool, int, float)) else _pack_other(value)
    except TypeError as error:
        raise InvalidArgument(f"column {name!r}: {error}") from None


def _encode_array(name: str, array: Array) -> Any:
    kind = array.dtype.kind
    if kind == "O" and len(array) and (rows := _stacked(array)) is not None:
        array, kind = rows, rows.dtype.kind
    if kind in "OUT":
        return _plain_items(array.tolist())
    if kind == "M":
        microseconds = array.astype("datetime64[us]").astype(np.int64)
        missing = np.isnat(array)
        if not missing.any():
            return pack_tensor(microseconds)
        return [None if gone else us for us, gone in zip(microseconds.tolist(), missing.tolist(), strict=True)]
    if kind not in "biuf" or array.dtype.itemsize > 8:
        raise InvalidArgument(f"column {name!r}: arrays of {array.dtype} cannot be sent; use numbers, bool or str")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidArgument(f"column {name!r}: {int(array.max())} does not fit Int64")
    if array.ndim > TENSOR_DIMS:
        raise InvalidArgument(f"column {name!r}: {array.ndim} dimensions are more than {TENSOR_DIMS}")
    native = array.dtype.newbyteorder("=")
    return pack_tensor(array.astype(_WIDENED.get(native, native), copy=False))


def _stacked(array: Array) -> Array | None:
    """The matrix of an array of vectors, as a data frame has them; None if it holds something else."""
    first = array[0]
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "biuf":
        return None
    if not all(isinstance(row, np.ndarray) and row.shape == first.shape for row in array):
        return None
    return np.stack(list(array))


def _plain_items(items: list[Any]) -> list[Any]:
    """Items of an object array or of a table's column; only a column with odd ones costs Python work for each."""
    return items if _AS_THEY_ARE.issuperset(map(type, items)) else [_plain(item) for item in items]


def _plain(item: Any) -> Any:
    """An item of an object array: a missing value of pandas, in whatever form, is a null."""
    if isinstance(item, str):
        return item
    return None if _is_missing(item) or (isinstance(item, float) and item != item) else item


def _is_missing(value: Any) -> bool:
    return type(value).__name__ in ("NAType", "NaTType")  # pandas.NA and NaT, without importing pandas


def _has_nulls(value: Any) -> bool:
    """Whether a column of pyarrow, polars or a nullable type of pandas has nulls; False for anything else."""
    count = getattr(value, "null_count", 0)  # an attribute of pyarrow, a method of polars
    if count:
        return bool(count() if callable(count) else count)
    is_nullable = hasattr(value, "isna") and not isinstance(getattr(value, "dtype", None), np.dtype)
    return is_nullable and bool(value.isna().any())


def _as_list(value: Any) -> list[Any]:
    to_list = getattr(value, "to_pylist", None) or getattr(value, "to_list", None)
    return list(to_list() if to_list else value)


def _pack_other(value: Any) -> Any:
    """What MessagePack has no type for, for the packer; TypeError when there is no form for it."""
    if isinstance(value, np.ndarray):
        return value.tolist()  # a row of a list of vectors
    if isinstance(value, (np.datetime64, datetime.datetime)):
        return _microseconds(value)
    if isinstance(value, np.generic):
        return value.item()
    if _is_missing(value):
        return None
    raise TypeError(f"{type(value).__name__} is not a number, bool, str, or an array of them")


def _microseconds(value: np.datetime64 | datetime.datetime) -> int | None:
    """Microseconds since 1970-01-01 UTC, as a Timestamp travels; a time without a zone is taken as UTC."""
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else int(value.astype("datetime64[us]").astype(np.int64))
    if _is_missing(value):
        return None
    aware = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
    return (aware - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
