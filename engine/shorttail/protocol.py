"""The wire as Python clients speak it: MessagePack-RPC messages, and arrays as an extension type.

docs/protocol.md is the full text. The server parses with native/wire.pyx; this module is the client's half, and what
tests compare the native one against.
"""

from __future__ import annotations

import datetime
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, cast

import msgpack
import numpy as np
import numpy.typing as npt

from shorttail.config import DEFAULT_HOST, DEFAULT_PORT, LIMITS
from shorttail.dtypes import Bool, Float32, Float64, Int32, Int64
from shorttail.errors import Internal, InvalidArgument, ShorttailError, from_code

Array = npt.NDArray[Any]

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2

TENSOR_EXT: Final = 1
TENSOR_DIMS: Final = 8
UINT8_CODE: Final = 9  # statuses; no feature has this type

MSGID_LIMIT: Final = 1 << 32

# What an unpacker raises for bytes that are not MessagePack, or too many of them.
UNPACK_ERRORS: Final = (ValueError, TypeError, msgpack.UnpackException, RecursionError)
OutOfData: Final = msgpack.OutOfData

# A reply can be larger than any request: one row of keys asks for a thousand features.
REPLY_BYTES: Final = 16 * LIMITS.frame_bytes

_CODE_OF: Final[dict[np.dtype[Any], int]] = {
    np.dtype(np.bool_): Bool.code,
    np.dtype(np.int32): Int32.code,
    np.dtype(np.int64): Int64.code,
    np.dtype(np.float32): Float32.code,
    np.dtype(np.float64): Float64.code,
    np.dtype(np.uint8): UINT8_CODE,
}
_DTYPE_OF: Final = {code: dtype.newbyteorder("<") for dtype, code in _CODE_OF.items()}

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


class Address(NamedTuple):
    """Where a server listens: host and port, or the path of a Unix socket."""

    host: str
    port: int
    path: str | None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """An address as users write it: "host:port", ":port", "host", "[::1]:port" or "unix:/path".

    Raises InvalidArgument.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path:
            raise InvalidArgument(f"address {text!r} names no socket; write unix:/path/to/socket")
        return Address("", 0, path)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = text.partition(":")
    if host and not colon:
        port = str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535) or "/" in host:
        raise InvalidArgument(f"address {text!r} is not understood; write HOST:PORT or unix:/path/to/socket")
    return Address(host or DEFAULT_HOST, int(port), None)


# Messages


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


def new_unpacker() -> msgpack.Unpacker:
    """A streaming decoder of replies: feed(bytes), then iterate. Tensors come out as numpy arrays of their own."""
    return msgpack.Unpacker(ext_hook=unpack_ext, max_buffer_size=REPLY_BYTES, strict_map_key=False)


def read_response(message: Any) -> tuple[int, ShorttailError | None, Any]:
    """(msgid, error or None, result) of one decoded message.

    Raises what the server says of the connection as a whole, which has no msgid; Internal when it is no response.
    """
    if isinstance(message, list) and len(message) == 4 and message[0] == RESPONSE:
        _, msgid, error, result = message
        if type(msgid) is int:
            return msgid, None if error is None else _read_error(error), result
        if msgid is None and error is not None:
            raise _read_error(error)
    raise Internal("the server sent something other than a MessagePack-RPC response [1, msgid, error, result]")


def _read_error(error: Any) -> ShorttailError:
    if isinstance(error, dict):
        return from_code(str(error.get("code", "INTERNAL")), str(error.get("message", error)))
    return Internal(str(error))


# Columns


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


# Tensors


def pack_tensor(array: Array) -> msgpack.ExtType:
    """An array of bool, int32, int64, float32, float64 or uint8 as the tensor extension type.

    Payload: u8 dtype code, u8 ndim, ndim x u32 little-endian dims, then the elements, little-endian, in C order.
    Raises InvalidArgument for another dtype or more than 8 dimensions.
    """
    code = _CODE_OF.get(array.dtype.newbyteorder("="))
    if code is None or array.ndim > TENSOR_DIMS:
        raise InvalidArgument(f"an array of {array.dtype} with {array.ndim} dimensions is no tensor of the wire")
    head = struct.pack(f"<BB{array.ndim}I", code, array.ndim, *array.shape)
    return msgpack.ExtType(TENSOR_EXT, head + array.astype(_DTYPE_OF[code], copy=False).tobytes())


def unpack_tensor(payload: bytes | memoryview) -> Array:
    """The array in a tensor's payload: writable, aligned, in native byte order. Raises InvalidArgument."""
    if len(payload) < 2:
        raise InvalidArgument(f"tensor of {len(payload)} bytes: its head is cut short")
    code, ndim = payload[0], payload[1]
    dtype = _DTYPE_OF.get(code)
    start = 2 + 4 * ndim
    if dtype is None or ndim > TENSOR_DIMS or len(payload) < start:
        raise InvalidArgument(f"tensor with dtype code {code} and {ndim} dimensions is not understood")
    shape = struct.unpack_from(f"<{ndim}I", payload, 2)
    elements = 1
    for size in shape:
        elements *= size
    if len(payload) - start != elements * dtype.itemsize:
        raise InvalidArgument(f"tensor of shape {shape}: {len(payload) - start} bytes do not hold it")
    # The payload lies at any address, and belongs to the message: copy.
    return np.frombuffer(payload, dtype, elements, start).reshape(shape).astype(dtype.newbyteorder("="), copy=True)


def unpack_ext(code: int, data: bytes) -> Any:
    return unpack_tensor(data) if code == TENSOR_EXT else msgpack.ExtType(code, data)
