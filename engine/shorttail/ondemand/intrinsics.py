"""Numba intrinsics for loops over rows: pointers, read-only vectors, and calls that cannot raise.

This module is imported only to compile.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_types: Any = import_module("numba.types")
_cgutils: Any = import_module("numba.core.cgutils")
_carray: Any = import_module("numba").carray
_intrinsic: Any = import_module("numba.extending").intrinsic
_njit: Any = import_module("numba").njit


def _pointer(typing: Any, address: Any, kind: Any) -> Any:
    """pointer(address, np.float64) is a pointer. It is indexed without checks: the runner has checked the arrays."""
    result = _types.CPointer(kind.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(_types.intp, kind), generate


def _frozen(typing: Any, array: Any) -> Any:
    """frozen(array) is the same array, read-only, because other functions and the model may read the same row."""
    result = array.copy(readonly=True)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]  # no reference is counted, because Numba does not own the memory

    return result(array), generate


def _attempt(typing: Any, function: Any, values: Any) -> Any:
    """attempt(function, (value, ...)) -> (whether it returned, its result). It never raises."""
    signature = function.get_call_type(typing, tuple(values), {})
    result = _types.Tuple((_types.boolean, signature.return_type))

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        compiled = function.dispatcher.overloads[signature.args]
        context.add_linking_libs([compiled.library])
        given = _cgutils.unpack_tuple(builder, arguments[1])
        cast = [context.cast(builder, value, a, b) for value, a, b in zip(given, values, signature.args, strict=True)]
        status, value = context.call_internal_no_propagate(builder, compiled.fndesc, signature, cast)
        return context.make_tuple(builder, result, [status.is_ok, value])

    return result(function, values), generate


pointer = _intrinsic(_pointer)
frozen = _intrinsic(_frozen)
attempt = _intrinsic(_attempt)


def _vector(address: Any, width: Any) -> Any:
    return frozen(_carray(pointer(address, _float32), width))


_float32: Any = import_module("numpy").float32
vector = _njit(error_model="numpy", nogil=True)(_vector)
