"""Describes the arrays that a batch is written into: dtype and width of each, and arrays of made-up values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail.define.catalog import TENSOR_TYPES, Catalog, TensorInfo
from shorttail.define.models import Column
from shorttail.errors import Internal
from shorttail.models.signature import column_width


class Buffer(NamedTuple):
    """An array that a batch is written into: a model input, an argument of an on-demand function, a feature column."""

    dtype: np.dtype[Any]
    width: int | None  # None: the shape is [rows]; else [rows, width]

    def example(self, rows: int, random: np.random.Generator) -> NDArray[Any]:
        """Return random values, for columns of which nothing is known (models/examples.py knows more of most).

        Integers are small, because a model may use them as indexes, and not 0, because dividing an integer by 0 ends
        the process. Strings are "0", because a model may parse numbers.
        """
        shape = rows if self.width is None else (rows, self.width)
        if self.dtype.hasobject:
            return np.full(shape, "0", self.dtype)
        if self.dtype.kind == "f":
            return random.normal(size=shape).astype(self.dtype)
        low = 0 if self.dtype.kind == "b" else 1
        return random.integers(low, low + 2, shape).astype(self.dtype)


def input_buffer(catalog: Catalog, tensor: TensorInfo, columns: Sequence[Column]) -> tuple[Buffer, list[int]]:
    """Return the buffer that feeds an input of a model, and how many of its columns each entry of `columns` fills."""
    widths = [column_width(catalog, column, tensor, len(columns)) for column in columns]
    return Buffer(np.dtype(TENSOR_TYPES[tensor.dtype].numpy), None if len(tensor.shape) == 1 else sum(widths)), widths


def check_outputs(names: Sequence[str], values: Sequence[NDArray[Any]], rows: int) -> None:
    """Check that every output of a batch has a row for each row of the inputs. Raises Internal.

    Warm-up has checked it for the example rows, but the number may depend on their values. The encoder of MessagePack
    makes the same check in a server.
    """
    for name, array in zip(names, values, strict=True):
        if not array.ndim or len(array) != rows:
            raise Internal(f"the model failed: output '{name}' has the shape {list(array.shape)} for {rows} rows")
