"""Reads the parts of Arrow arrays as NumPy arrays. define/values.py converts them to the types of columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shorttail.define.dtypes import DType, String, Timestamp
from shorttail.define.refusal import Refused

Array = NDArray[Any]
ArrowError = pa.ArrowException


def decoded(column: Any) -> Any:
    """Return a column as a single Array without dictionary or run-end encoding. Raises Refused if it is over 2 GiB."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            raise Refused("a column of more than 2 GiB; give it in parts")
    while True:
        if pa.types.is_dictionary(column.type):
            words = column.dictionary
            if pa.types.is_string_view(words.type):  # polars has these; Arrow cannot decode them
                column = pa.DictionaryArray.from_arrays(column.indices, words.cast(pa.large_string()))
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        else:
            return column


def to_numpy(column: Any) -> Array | None:
    """Return numbers, bools or times as a NumPy array, with arbitrary values at nulls; None for other types."""
    kind, types = column.type, pa.types
    if types.is_boolean(kind):  # Arrow stores a bool as a bit
        found: Array = column.fill_null(False).to_numpy(zero_copy_only=False)
        return found
    if types.is_integer(kind) or types.is_floating(kind):
        return value_buffer(column, kind.to_pandas_dtype())
    if types.is_timestamp(kind):
        return value_buffer(column, np.int64).view(f"M8[{kind.unit}]")
    if types.is_date32(kind):
        return value_buffer(column, np.int32).astype(np.int64).view("M8[D]")
    if types.is_date64(kind):
        return value_buffer(column, np.int64).view("M8[ms]")
    return None


def value_buffer(column: Any, numpy_type: Any) -> Array:
    """Return a view of the values that an array, which may be a slice, uses in its buffer."""
    buffer = column.buffers()[1]
    if buffer is None or not len(column):
        return np.zeros(len(column), numpy_type)
    return np.frombuffer(buffer, numpy_type, len(column), column.offset * np.dtype(numpy_type).itemsize)


def is_list(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_column(value: Any) -> bool:
    return isinstance(value, pa.Array | pa.ChunkedArray)


def is_decimal(kind: Any) -> bool:
    return bool(pa.types.is_decimal(kind))


def may_take(dtype: DType, kind: Any) -> bool:
    """Return whether a column of an Arrow type can hold values that the dtype takes; if not, only nulls fit."""
    types = pa.types
    while types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        kind = kind.value_type
    number = types.is_integer(kind) or types.is_floating(kind) or is_decimal(kind)
    if types.is_null(kind):
        return True
    if dtype.is_vector:
        return is_list(kind)
    if dtype == String:
        return is_text(kind)
    if dtype == Timestamp:
        return number or is_text(kind) or bool(types.is_timestamp(kind) or types.is_date(kind))
    return number or (bool(types.is_boolean(kind)) and not dtype.is_integer)


def as_string(column: Any) -> Any:
    """Return texts as string or large_string: a string_view is cast."""
    return column.cast(pa.large_string()) if pa.types.is_string_view(column.type) else column


def null_texts(count: int) -> Any:
    return pa.nulls(count, pa.string())


def flattened_lists(column: Any) -> tuple[Any, NDArray[np.int64]]:
    """Return the elements of all lists that are not null, one list after the other, and the length of each list."""
    if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    present = column.drop_null() if column.null_count else column
    lengths = pc.list_value_length(present).to_numpy(zero_copy_only=False)
    return present.flatten(), lengths.astype(np.int64)
