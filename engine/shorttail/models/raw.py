"""Models of raw tensors: `Model` without `inputs`. A request brings the arrays that the file takes, and nothing is
looked up.

Such a request runs by itself, and gets the outputs as the file gives them. So the arrays may have any rank, their first
axes may differ, and an output need not have a row for each row of an input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.define.catalog import TensorInfo
from shorttail.define.names import quoted
from shorttail.errors import InvalidArgument

Array = NDArray[Any]

# ONNX element type -> NumPy dtype: the types that ONNX Runtime takes from NumPy and Open Inference Protocol names.
RAW_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "bool": np.dtype(np.bool_),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float16": np.dtype(np.float16),
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "string": np.dtype(object),
}
WHY_BY_ITSELF: Final = "its requests bring tensors, which may have any shape"


def check_carried(model: str, what: str, tensors: Sequence[TensorInfo], label: str) -> None:
    """Check that requests and answers can carry these tensors. what: "input" or "output". label: the file, for errors.

    Raises InvalidArgument for a sequence, an optional value, a map, a sparse tensor, and for another element type.
    """
    for tensor in tensors:
        if tensor.dtype not in RAW_TYPES:
            cure = "; name others in outputs=[...]" if what == "output" and len(tensors) > 1 else ""
            raise InvalidArgument(
                f"model '{model}': {what} '{tensor.name}' of {label} is {tensor.dtype}; supported:"
                f" {', '.join(RAW_TYPES)}{cure}"
            )


def refusal(model: str) -> str:
    """Return the error for a request that brings columns to a model of raw tensors."""
    return (
        f"model '{model}' takes tensors, not columns: send them to POST /v2/models/{model}/infer,"
        " or apply the model with inputs=[...]"
    )


def take_tensors(model: str, tensors: Sequence[TensorInfo], given: Mapping[str, Any]) -> list[Array]:
    """Return the arrays of a request in the order of the file's inputs.

    model: its name. tensors: the file's inputs. given: name -> array. An array must have the type and the shape of its
    input. Raises InvalidArgument that names the input.
    """
    names = [tensor.name for tensor in tensors]
    for name in given:
        if name not in names:
            takes = f"its inputs: {', '.join(names)}" if names else "it takes none"
            raise InvalidArgument(f"model '{model}' takes tensors and has no input {quoted(name)}; {takes}")
    return [_take(model, tensor, given) for tensor in tensors]


def _take(model: str, tensor: TensorInfo, given: Mapping[str, Any]) -> Array:
    where = f"input '{tensor.name}'"
    if tensor.name not in given:
        raise InvalidArgument(f"model '{model}' takes tensors, and {where}, which is {tensor.text}, is missing")
    array = given[tensor.name]
    if not isinstance(array, np.ndarray | np.generic):
        raise InvalidArgument(f"{where} is {tensor.text}; give a NumPy array, not {type(array).__name__}")
    array, dtype = np.asarray(array), RAW_TYPES[tensor.dtype]
    if dtype.hasobject and array.dtype.kind in "UT":
        array = array.astype(object)
    if array.dtype.hasobject:
        for value in array.ravel().tolist():
            if not isinstance(value, str):
                got = "null" if value is None else type(value).__name__
                raise InvalidArgument(f"{where} is {tensor.text}; got {got}")
    if array.dtype != dtype:
        raise InvalidArgument(f"{where} is {tensor.text}; got {'string' if array.dtype.hasobject else array.dtype}")
    if not (tensor.any_rank or fits_shape(array.shape, tensor.shape)):
        raise InvalidArgument(f"{where} is {tensor.text}; got the shape {list(array.shape)}")
    return np.require(array, requirements=("C", "A", "E"))  # unlike ascontiguousarray it keeps rank 0


def fits_shape(shape: Sequence[int], declared: Sequence[int | None]) -> bool:
    """Return whether a shape is the declared one, in which None stands for any size."""
    return len(shape) == len(declared) and all(d in (None, s) for s, d in zip(shape, declared, strict=True))


def example_tensors(tensors: Sequence[TensorInfo]) -> list[Array] | None:
    """Return arrays of ones to warm a model up, with size 1 where the file leaves a size open; strings are "1".

    None if they would take more than LIMITS.warm_bytes. Ones are the values that most graphs take for a divisor, a
    number of repeats or a size.
    """
    shapes = [tuple(1 if size is None else size for size in tensor.shape) for tensor in tensors]
    sizes = [math.prod(shape) for shape in shapes]
    if sum(size * RAW_TYPES[tensor.dtype].itemsize for size, tensor in zip(sizes, tensors, strict=True)) > (
        LIMITS.warm_bytes
    ):
        return None
    values = ["1" if tensor.dtype == "string" else 1 for tensor in tensors]
    return [
        np.full(shape, value, RAW_TYPES[tensor.dtype])
        for shape, value, tensor in zip(shapes, values, tensors, strict=True)
    ]


def are_all_fixed(tensors: Sequence[TensorInfo]) -> bool:
    """Return whether every request has arrays of the same shapes, so that they all take about the same time."""
    return not any(tensor.any_rank or None in tensor.shape for tensor in tensors)
