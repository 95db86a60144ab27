"""Reads and writes tensors of the Open Inference Protocol: as JSON, and as bytes after the JSON (the binary extension).

See https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
import struct
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.define.dtypes import Bool, DType, Float64, Int64, String
from shorttail.define.refusal import described
from shorttail.define.values import Refused, as_column
from shorttail.errors import InvalidArgument
from shorttail.server.http.literals import flat_numbers, read_numbers

Array = NDArray[Any]

DATATYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES: Final = {dtype: name for name, dtype in DATATYPES.items()}
BYTES: Final = "BYTES"
AXES_MAX: Final = 64  # of a NumPy array
LENGTH: Final = struct.Struct("<I")


def datatype(dtype: np.dtype[Any] | DType) -> str:
    """Return the protocol's name of a type: "FP32" for float32, "BYTES" for strings."""
    if isinstance(dtype, DType):
        return BYTES if dtype == String else NAMES[np.dtype(dtype.numpy)]
    return NAMES.get(dtype, BYTES)


def read_tensor(name: str, tensor: dict[str, Any], raw: memoryview | None) -> Array:
    """Return the array of an entry of "inputs". raw: its bytes, or None if its data is JSON. Raises InvalidArgument."""
    where = f"input '{name}'"
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > AXES_MAX
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    ):
        raise InvalidArgument(f"{where}: shape must be a list of at most {AXES_MAX} whole numbers; got {shape!r:.60}")
    kind = tensor.get("datatype")
    if not isinstance(kind, str) or (kind != BYTES and kind not in DATATYPES):
        raise InvalidArgument(f"{where}: datatype {kind!r:.40} is not one of {', '.join(DATATYPES)}, {BYTES}")
    count = math.prod(shape)
    if raw is None:
        if "data" not in tensor:
            raise InvalidArgument(f"{where} has neither data nor the parameter binary_data_size")
        data = _flat(where, tensor["data"], shape, kind)
        flat = _texts(where, data) if kind == BYTES else _numbers(where, data, DATATYPES[kind])
    elif kind == BYTES:
        flat = _raw_texts(where, raw, count)
    else:
        dtype = DATATYPES[kind]
        if len(raw) != count * dtype.itemsize:
            raise InvalidArgument(
                f"{where}: {len(raw)} bytes of data, where {shape} of {kind} has {count * dtype.itemsize}"
            )
        # Copy: the bytes start where the JSON ends, so they may be unaligned, and models need aligned arrays.
        flat = np.frombuffer(raw, dtype).copy()
        if kind == "BOOL":
            flat = flat.view(np.uint8) != 0  # compiled code expects a bool to be the byte 0 or 1
    if flat.size != count:
        raise InvalidArgument(f"{where}: {flat.size} elements of data, where the shape {shape} has {count}")
    try:
        return flat.reshape(shape)
    except ValueError:  # a size of 0 beside one that no array may have
        raise InvalidArgument(f"{where}: the shape {shape!r:.60} is too large") from None


def _numbers(where: str, flat: list[Any], dtype: np.dtype[Any]) -> Array:
    """Return JSON numbers as an array. In floats null becomes NaN, and names of infinities become infinite.

    If numbers of another type have a null, the array holds objects, with None for a null. Numbers and bools never mix.
    """
    if dtype.kind == "f":
        flat = read_numbers(flat)
    kinds = set(map(type, flat))
    if bool in kinds and (dtype.kind != "b" or kinds - {bool, type(None)}):
        wrong = next(at for at, value in enumerate(flat) if isinstance(value, bool) != (dtype.kind == "b"))
        got = f"{described(flat[wrong])} as element {wrong}"
        raise InvalidArgument(f"{where}: data must be an array of {NAMES[dtype]}; got {got}")
    if dtype == np.uint64 and all(type(value) is int and 0 <= value < 1 << 64 for value in flat):
        return np.array(flat, dtype)
    of_64_bits = {"b": Bool, "f": Float64}.get(dtype.kind, Int64)
    try:
        values, nulls, _ = as_column(of_64_bits, flat)
    except Refused as error:
        row = "" if error.row is None else f" as element {error.row}"
        raise InvalidArgument(f"{where}: data must be an array of {NAMES[dtype]}; got {error.got}{row}") from None
    if dtype.kind in "iu" and len(values):
        bounds = np.iinfo(dtype)
        least, most = int(values.min()), int(values.max())
        if not bounds.min <= least <= most <= bounds.max:
            wrong = least if least < bounds.min else most
            raise InvalidArgument(f"{where}: data must be an array of {NAMES[dtype]}; got {wrong}")
    if nulls is None or dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    objects = values.astype(object)
    objects[nulls] = None
    return objects


def _flat(where: str, data: Any, shape: list[int], kind: str) -> list[Any]:
    """Return the elements of data that is nested as its shape, or flat, in row-major order. Raises InvalidArgument."""
    if not shape and not isinstance(data, list):
        return [data]
    sizes = [len(data)] if isinstance(data, list) else []
    while isinstance(data, list) and data and isinstance(data[0], list):
        sizes.append(len(data[0]))
        same_length = all(isinstance(row, list) and len(row) == sizes[-1] for row in data)
        data = list(chain.from_iterable(data)) if same_length else None
    if not isinstance(data, list):
        raise InvalidArgument(f"{where}: data must be an array of {kind}, nested as its shape or flat")
    nested = shape[: len(sizes)] if not data else shape  # within an empty list there are no further sizes to see
    if len(sizes) > 1 and sizes != nested:
        raise InvalidArgument(f"{where}: data is nested as {sizes!r:.60}, where the shape is {shape!r:.60}")
    return data


def _texts(where: str, flat: list[Any]) -> Array:
    """Return JSON texts as an array of objects; null becomes None."""
    for value in flat:
        if value is not None and not isinstance(value, str):
            raise InvalidArgument(f"{where}: data of BYTES must be an array of strings; got {value!r:.40}")
    return _objects(flat)


def _raw_texts(where: str, raw: memoryview, count: int) -> Array:
    """Return the texts of binary BYTES data. Each element is a 4-byte little-endian length, then UTF-8.

    count: how many the shape has.
    """
    found: list[str] = []
    at, end = 0, len(raw)
    while at < end:
        if len(found) == count:
            raise InvalidArgument(f"{where}: more BYTES than the {count} elements of its shape")
        if end - at < LENGTH.size:
            raise InvalidArgument(f"{where}: its BYTES end within an element's length")
        (size,) = LENGTH.unpack_from(raw, at)
        at += LENGTH.size
        if size > end - at:
            raise InvalidArgument(f"{where}: an element of {size} bytes, where {end - at} are left")
        try:
            found.append(str(raw[at : at + size], "utf-8"))
        except UnicodeDecodeError:
            raise InvalidArgument(f"{where}: element {len(found)} is not UTF-8") from None
        at += size
    return _objects(found)


def _objects(texts: list[Any]) -> Array:
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def column_values(name: str, dtype: DType, array: Array) -> Any:
    """Return a tensor as the values of a request column. Raises InvalidArgument for a wrong shape.

    The shape is [rows] or [rows, 1]; for a vector of n numbers [rows, n], or [n] for a single row.
    """
    if dtype.is_vector:
        if array.ndim > 2:
            raise InvalidArgument(f"input '{name}' has the shape [-1, {dtype.width}]; got {list(array.shape)}")
        return array
    if array.ndim == 2 and array.shape[1] == 1:
        array = array.ravel()
    if array.ndim > 1:
        raise InvalidArgument(f"input '{name}' has the shape [-1]; got {list(array.shape)}")
    return array.tolist() if array.dtype.hasobject else array


def json_output(name: str, array: Array) -> dict[str, Any]:
    """Return an entry of "outputs" that contains its data as a flat list."""
    flat = np.ascontiguousarray(array).ravel()
    data = [_text(value) for value in flat.tolist()] if flat.dtype.hasobject else flat_numbers(flat)
    return {"name": name, "datatype": datatype(array.dtype), "shape": list(array.shape), "data": data}


def binary_output(name: str, array: Array) -> tuple[dict[str, Any], bytes]:
    """Return an entry of "outputs" whose data follows the JSON, and that data."""
    if array.dtype.hasobject:
        texts = [_text(value).encode() for value in array.ravel().tolist()]
        raw = b"".join(LENGTH.pack(len(text)) + text for text in texts)
    else:
        raw = np.ascontiguousarray(array).tobytes()
    described = {"name": name, "datatype": datatype(array.dtype), "shape": list(array.shape)}
    return described | {"parameters": {"binary_data_size": len(raw)}}, raw


def _text(value: Any) -> str:
    return "" if value is None else str(value)
