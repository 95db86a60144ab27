"""The client's side of the wire protocol: addresses, MessagePack-RPC replies, and arrays as an extension type.

docs/protocol.md describes the protocol. The server has its own implementation (native/wire.pyx); tests compare it with
this module.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from shorttail.config import DEFAULT_HOST, DEFAULT_PORT, LIMITS
from shorttail.errors import BY_CODE, Internal, InvalidArgument, ShorttailError, from_code

Array = npt.NDArray[Any]

REQUEST: Final = 0
RESPONSE: Final = 1

TENSOR_EXT: Final = 1
TENSOR_DIMS: Final = 8

MSGID_LIMIT: Final = 1 << 32

# The exceptions of an unpacker for bytes that are not MessagePack, or are too many.
UNPACK_ERRORS: Final = (ValueError, TypeError, msgpack.UnpackException, RecursionError)
OutOfData: Final = msgpack.OutOfData

# A reply can be larger than any request: one row of keys can ask for a thousand features.
REPLY_BYTES: Final = 16 * LIMITS.frame_bytes

TIME_DTYPE: Final = np.dtype("M8[us]")

_CODE_OF: Final[dict[np.dtype[Any], int]] = {
    np.dtype(np.bool_): 1,  # the codes of define/dtypes.py, which a client need not import
    np.dtype(np.int32): 2,
    np.dtype(np.int64): 3,
    np.dtype(np.float32): 4,
    np.dtype(np.float64): 5,
    TIME_DTYPE: 7,  # int64 microseconds since 1970 UTC; -2**63 is NaT
    np.dtype(np.uint8): 9,  # statuses; no feature has this type
}
_DTYPE_OF: Final = {code: dtype.newbyteorder("<") for dtype, code in _CODE_OF.items()}


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
    """Read an address as users write it: "host:port", ":port", "host", "[::1]:port" or "unix:/path".

    The host is DEFAULT_HOST and the port DEFAULT_PORT unless given. Raises InvalidArgument.
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


def new_unpacker() -> msgpack.Unpacker:
    """Return a streaming decoder of replies: feed(bytes), then iterate. Tensors are decoded to NumPy arrays."""
    return msgpack.Unpacker(ext_hook=unpack_ext, max_buffer_size=REPLY_BYTES, strict_map_key=False)


def read_response(message: Any) -> tuple[int, ShorttailError | None, Any]:
    """Return (msgid, error or None, result) of one decoded reply.

    A reply without a msgid is about the connection, not a call: its error is raised. Raises Internal if the message is
    not a reply.
    """
    if isinstance(message, list) and len(message) == 4 and message[0] == RESPONSE:
        _, msgid, error, result = message
        if type(msgid) is int:
            return msgid, None if error is None else _read_error(error), result
        if msgid is None and error is not None:
            raise _read_error(error)
    raise Internal("the server sent something other than a MessagePack-RPC response [1, msgid, error, result]")


def _read_error(error: Any) -> ShorttailError:
    """Return the exception of an error in any of the forms of `serve --rpc-errors`.

    A map of code and message, "CODE: message", or [number, "CODE: message"].
    """
    if isinstance(error, dict):
        return from_code(str(error.get("code", "INTERNAL")), str(error.get("message", error)))
    if isinstance(error, list) and len(error) == 2:
        error = error[1]
    code, colon, message = str(error).partition(": ")
    return from_code(code, message) if colon and code in BY_CODE else Internal(str(error))


# Tensors


def pack_tensor(array: Array) -> msgpack.ExtType:
    """Encode an array of bool, int32, int64, float32, float64, datetime64[us] or uint8 as the tensor extension type.

    The payload is: u8 dtype code, u8 ndim, ndim little-endian u32 dims, and the elements, little-endian, in C order.
    Raises InvalidArgument for another dtype or more than 8 dimensions.
    """
    code = _CODE_OF.get(array.dtype.newbyteorder("="))
    if code is None or array.ndim > TENSOR_DIMS:
        raise InvalidArgument(f"an array of {array.dtype} with {array.ndim} dimensions is no tensor of the wire")
    head = struct.pack(f"<BB{array.ndim}I", code, array.ndim, *array.shape)
    return msgpack.ExtType(TENSOR_EXT, head + array.astype(_DTYPE_OF[code], copy=False).tobytes())


def unpack_tensor(payload: bytes | memoryview) -> Array:
    """Decode a tensor's payload to an array: writable, aligned, in native byte order. Raises InvalidArgument."""
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
    if code == _CODE_OF[np.dtype(np.bool_)]:
        return np.not_equal(np.frombuffer(payload, np.uint8, elements, start).reshape(shape), 0)
    # Copy: the payload belongs to the message and may not be aligned.
    return np.frombuffer(payload, dtype, elements, start).reshape(shape).astype(dtype.newbyteorder("="), copy=True)


def tensor_dims(tensor: msgpack.ExtType) -> int:
    """Return the number of dimensions of a tensor that pack_tensor made."""
    return int(tensor.data[1])


def tensor_rows(tensor: msgpack.ExtType) -> int:
    """Return the first dimension of a tensor that pack_tensor made, 0 if it has none."""
    return int.from_bytes(tensor.data[2:6], "little") if tensor.data[1] else 0


def cut_tensor(tensor: msgpack.ExtType, start: int, stop: int) -> msgpack.ExtType:
    """Return the rows start to stop of a tensor that pack_tensor made, as a tensor."""
    data = tensor.data
    body = 2 + 4 * tensor_dims(tensor)
    row_bytes = (len(data) - body) // tensor_rows(tensor)
    head = data[:2] + struct.pack("<I", stop - start) + data[6:body]
    return msgpack.ExtType(TENSOR_EXT, head + data[body + start * row_bytes : body + stop * row_bytes])


def unpack_ext(code: int, data: bytes) -> Array:
    """Decode the tensor in an extension value; msgpack itself reads timestamps. Raises InvalidArgument."""
    if code != TENSOR_EXT:
        raise InvalidArgument(f"ext type {code} is not known; tensors are ext type {TENSOR_EXT}, times ext type -1")
    return unpack_tensor(data)
