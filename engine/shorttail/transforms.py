"""On-demand features: a user's function, compiled with Numba into a loop over the batch.

Numba is imported only when a model has on-demand features. What division by zero and overflow give is the hardware's
answer (inf, NaN, wrap-around), never an exception: one row cannot fail a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from shorttail.errors import InvalidArgument
from shorttail.ondemand import OnDemand

_compiled: dict[tuple[OnDemand, Any, bool], Callable[..., None]] = {}


def compile_on_demand(function: OnDemand, out_dtype: Any = None, *, contiguous: bool = True) -> Callable[..., None]:
    """A loop that drops the GIL: loop(*arguments [n], out [n]) with one array a parameter, of its type.

    out_dtype: numpy type of `out`, by default that of the return annotation; contiguous: whether `out` is (it is not
    when it is a column of a matrix). Raises InvalidArgument when numba is missing or the function does not compile.
    """
    target = np.dtype(out_dtype if out_dtype is not None else function.returns.numpy)
    key = (function, target, contiguous)
    if key not in _compiled:
        _compiled[key] = _compile(function, target, contiguous)
    return _compiled[key]


def _compile(function: OnDemand, target: np.dtype[Any], contiguous: bool) -> Callable[..., None]:
    try:
        numba: Any = import_module("numba")
    except ImportError:
        raise InvalidArgument(
            f"on-demand function '{function.name}' needs Numba; install it with `pip install shorttail[numba]`"
        ) from None
    namespace: dict[str, Any] = {"math": math, "np": np}
    exec(compile(function.source, f"<on-demand function {function.name}>", "exec"), namespace)
    names = [name for name, _ in function.params]
    loop_source = (
        f"def loop({', '.join(f'column_{name}' for name in names)}, out):\n"
        f"    for row in range(out.shape[0]):\n"
        f"        out[row] = scalar({', '.join(f'column_{name}[row]' for name in names)})\n"
    )
    options = {"nogil": True, "error_model": "numpy"}
    loop_namespace = {"scalar": numba.njit(**options)(namespace[function.name])}
    exec(loop_source, loop_namespace)
    arguments = [numba.from_dtype(np.dtype(dtype.numpy))[::1] for _, dtype in function.params]
    out = numba.from_dtype(target)[::1] if contiguous else numba.from_dtype(target)[:]
    try:
        # With its types given it is compiled here and now, never by a request.
        compiled: Callable[..., None] = numba.njit([numba.void(*arguments, out)], **options)(loop_namespace["loop"])
    except numba.core.errors.NumbaError as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"on-demand function '{function.name}' does not compile: {reason[:400]}") from None
    return compiled
