"""Tells Numba how to compile the functions of numerics.py, for each type of arguments.

This module is imported only to compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from shorttail.ondemand import numerics
from shorttail.ondemand.numerics import Body, dot, whole

types: Any = import_module("numba").types
overload: Any = import_module("numba.extending").overload

NUMBERS = types.Number | types.Boolean
WHOLE_NUMBERS = types.Integer | types.Boolean


def define(stub: Body, choose: Body, **options: Any) -> None:
    """Register a stub. choose(*types of arguments) returns the function to compile, None if the types do not fit."""
    overload(stub, jit_options={"error_model": "numpy", "nogil": True} | options, strict=False)(choose)


def is_none(kind: Any) -> bool:
    return kind is None or isinstance(kind, types.NoneType) or getattr(kind, "value", 0) is None


def are_vectors(*kinds: Any) -> bool:
    return all(isinstance(kind, types.Array) and kind.ndim == 1 for kind in kinds)


# -- whole numbers -------------------------------------------------------------------------------------------------


def saturating(bits: int, number: Any) -> Callable[[Any], Any]:
    """Return a chooser of conversions to an integer of `bits` bits that saturate. number: the integer's NumPy type."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    above = float(high + 1)  # a power of two: exact

    def choose(x: Any) -> Any:
        if isinstance(x, types.Float):
            return lambda x: number(x) if low <= x < above else number(high if x > 0 else low if x < 0 else 0)
        if isinstance(x, types.Integer) and bits == 32:
            return lambda x: number(min(max(x, low), high))
        return (lambda x: number(x)) if isinstance(x, WHOLE_NUMBERS) else None

    return choose


def rounding(to: Any) -> Callable[[Any], Any]:
    """Return a chooser of conversions to Int64. to: np.floor or np.ceil."""

    def choose(x: Any) -> Any:
        if isinstance(x, types.Float):
            return lambda x: whole(to(x))
        return (lambda x: np.int64(x)) if isinstance(x, WHOLE_NUMBERS) else None

    return choose


def choose_nearest(x: Any, digits: Any = None) -> Any:
    if not is_none(digits):
        return lambda x, digits=None: round(x, digits)
    if isinstance(x, types.Float):
        return lambda x, digits=None: whole(np.rint(x))
    return (lambda x, digits=None: np.int64(x)) if isinstance(x, WHOLE_NUMBERS) else None


def whole_fmod(a: Any, b: Any) -> Any:
    """The remainder with the sign of `a`. Numba's own has the wrong sign, and traps for the lowest Int64 and -1."""
    rest = a % b
    return rest - b if rest != 0 and (rest < 0) != (a < 0) else rest


def choose_fmod(a: Any, b: Any) -> Any:
    if isinstance(a, types.Integer) and isinstance(b, types.Integer):
        return whole_fmod
    return lambda a, b: np.fmod(a, b)


define(numerics.whole, saturating(64, np.int64))
define(numerics.whole32, saturating(32, np.int32))
define(numerics.nearest, choose_nearest)
define(numerics.floor, rounding(np.floor))
define(numerics.ceil, rounding(np.ceil))
define(numerics.mod, lambda a, b: lambda a, b: a % b)
define(numerics.divide, lambda a, b: lambda a, b: (a // b, a % b))
define(numerics.fmod, choose_fmod)
define(numerics.left, lambda a, bits: lambda a, bits: np.int64(a) << bits if 0 <= bits < 64 else 0)
define(numerics.right, lambda a, bits: lambda a, bits: np.int64(a) >> (bits if 0 <= bits < 64 else 63))
define(numerics.truth, lambda x: (lambda x: x != 0) if isinstance(x, NUMBERS) else None)


# -- vectors, and functions that take vectors or numbers ---------------------------------------------------------


def choose_dot(a: Any, b: Any) -> Any:
    if not are_vectors(a, b):
        return None
    single = a.dtype == types.float32 and b.dtype == types.float32
    integers = isinstance(a.dtype, types.Integer) and isinstance(b.dtype, types.Integer)
    zero = np.float32(0) if single else 0 if integers else 0.0

    def sum_of_products(a: Any, b: Any) -> Any:
        if len(a) != len(b):
            raise ValueError("vectors of different lengths")
        total = zero
        for i in range(len(a)):
            total += a[i] * b[i]
        return total

    return sum_of_products


def choose_norm(v: Any, ord: Any = None) -> Any:
    if not are_vectors(v):
        return None
    if is_none(ord):
        return lambda v, ord=None: np.sqrt(dot(v, v))

    def norm_of_order(v: Any, ord: Any = None) -> Any:
        if ord == 1:
            return np.abs(v).sum()
        if ord == math.inf:
            return np.abs(v).max()
        return (np.abs(v) ** ord).sum() ** (1 / ord)

    return norm_of_order


def choose_where(condition: Any, a: Any, b: Any) -> Any:
    if all(isinstance(kind, NUMBERS) for kind in (condition, a, b)):
        return lambda condition, a, b: a if condition else b
    return lambda condition, a, b: np.where(condition, a, b)


def choose_clip(x: Any, low: Any, high: Any) -> Any:
    if all(isinstance(kind, NUMBERS) for kind in (x, low, high)):
        return lambda x, low, high: np.minimum(np.maximum(x, low), high)
    return lambda x, low, high: np.clip(x, low, high)


# The sum may be in any order, as in BLAS, because only then it can be vectorized. The lengths are compared first, so
# indices need no checks.
define(numerics.dot, choose_dot, fastmath={"reassoc"}, boundscheck=False)
define(numerics.norm, choose_norm)
define(numerics.where, choose_where)
define(numerics.clip, choose_clip)
