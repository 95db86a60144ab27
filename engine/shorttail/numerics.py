"""The arithmetic of on-demand functions where Numba's own is undefined, traps, or needs SciPy.

`rewrite` changes a captured function's text so that it calls the functions here; `install` teaches Numba what those
compile to. Numba's own definitions stay as they are for everybody else in the process.

- A float becomes a whole number (int, round, math.floor, ...) by dropping its fraction; what does not fit an Int64
  saturates and NaN is 0. By LLVM's rules it could be anything.
- np.mod, np.fmod and np.divmod of the lowest Int64 and -1 are 0; by the processor's rules they end the process.
- Shifts by 64 and more give 0 (or -1), as in Python.
- np.dot, @ and np.linalg.norm of vectors need no BLAS; np.where and np.clip take numbers too.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

Body = Callable[..., Any]


def whole(x: Any) -> Any: ...
def whole32(x: Any) -> Any: ...
def nearest(x: Any, digits: Any = None) -> Any: ...
def floor(x: Any) -> Any: ...
def ceil(x: Any) -> Any: ...
def mod(a: Any, b: Any) -> Any: ...
def fmod(a: Any, b: Any) -> Any: ...
def divide(a: Any, b: Any) -> Any: ...
def left(a: Any, bits: Any) -> Any: ...
def right(a: Any, bits: Any) -> Any: ...
def dot(a: Any, b: Any) -> Any: ...
def norm(v: Any, ord: Any = None) -> Any: ...
def where(condition: Any, a: Any, b: Any) -> Any: ...
def clip(x: Any, low: Any, high: Any) -> Any: ...
def truth(x: Any) -> Any: ...


STUBS: list[Body] = [
    whole,
    whole32,
    nearest,
    floor,
    ceil,
    mod,
    fmod,
    divide,
    left,
    right,
    dot,
    norm,
    where,
    clip,
    truth,
]
NAMES: dict[str, Body] = {f"_shorttail_{stub.__name__}": stub for stub in STUBS}
ATTRIBUTES: dict[str, Body] = {
    "math.floor": floor, "math.ceil": ceil, "math.trunc": whole, "math.fmod": fmod,
    "np.mod": mod, "np.remainder": mod, "np.fmod": fmod, "np.divmod": divide,
    "np.left_shift": left, "np.right_shift": right,
    "np.dot": dot, "np.inner": dot, "np.vdot": dot, "np.linalg.norm": norm, "np.where": where, "np.clip": clip,
}  # fmt: skip
CALLS: dict[str, Body] = {
    "int": whole,
    "round": nearest,
    "np.int64": whole,
    "np.int32": whole32,
}  # only where they are called
OPERATORS: dict[type[ast.operator], Body] = {ast.MatMult: dot, ast.LShift: left, ast.RShift: right}


def rewrite(source: str) -> ast.Module:
    """The tree of a captured text with calls of the functions above in it; lines stay."""
    tree = ast.parse(source)
    aliases = {"math": "math", "np": "np"}
    for statement in tree.body:  # numpy = np, sqrt = math.sqrt: whatever the file calls them
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = ast.unparse(statement.value)
            if name.partition(".")[0] in ("math", "np") and "(" not in name:
                aliases[statement.targets[0].id] = name
    Rewriter(aliases).visit(tree)
    return ast.fix_missing_locations(tree)


class Rewriter(ast.NodeTransformer):
    def __init__(self, aliases: dict[str, str]):
        self.aliases = aliases
        self.local: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before = self.local
        arguments = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
        stored = {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
        self.local = before | arguments | stored
        self.generic_visit(node)
        self.local = before
        return node

    def dotted(self, node: ast.AST) -> str:
        """np.linalg.norm of such an expression, an empty text of another."""
        if isinstance(node, ast.Name):
            return "" if node.id in self.local else self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (owner := self.dotted(node.value)):
            return f"{owner}.{node.attr}"
        return ""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        found = ATTRIBUTES.get(self.dotted(node))
        return call_name(found, node) if found else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        found = ATTRIBUTES.get(self.dotted(node)) if node.id in self.aliases else None
        return call_name(found, node) if found and isinstance(node.ctx, ast.Load) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = self.dotted(node.func)
        self.generic_visit(node)
        if name in CALLS and node.args:
            node.func = call_name(CALLS[name], node.func)
        if name == "math.log" and len(node.args) == 2:
            logs = [ast.Call(node.func, [argument], []) for argument in node.args]
            return ast.copy_location(ast.BinOp(logs[0], ast.Div(), logs[1]), node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        found = OPERATORS.get(type(node.op))
        return ast.copy_location(ast.Call(call_name(found, node), [node.left, node.right], []), node) if found else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if type(node.op) not in OPERATORS or not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], self.visit(ast.copy_location(value, node))), node)


def call_name(function: Body, node: ast.AST) -> ast.Name:
    return ast.copy_location(ast.Name(f"_shorttail_{function.__name__}", ast.Load()), node)


_installed = False


def install() -> None:
    """Teach Numba the functions above, once a process."""
    global _installed
    if _installed:
        return
    types: Any = import_module("numba").types
    overload: Any = import_module("numba.extending").overload
    options = {"error_model": "numpy", "nogil": True}

    def define(stub: Body, choose: Body, **more: Any) -> None:
        overload(stub, jit_options=options | more, strict=False)(choose)

    def saturating(low: int, high: int, number: Any) -> Body:
        def choose(x: Any) -> Any:
            if isinstance(x, types.Float):
                above = float(high + 1)  # a power of two: exact
                return lambda x: number(x) if low <= x < above else number(high if x > 0 else low if x < 0 else 0)
            if isinstance(x, types.Integer) and number is np.int32:
                return lambda x: number(min(max(x, low), high))
            return (lambda x: number(x)) if isinstance(x, types.Integer | types.Boolean) else None

        return choose

    define(whole, saturating(-(1 << 63), (1 << 63) - 1, np.int64))
    define(whole32, saturating(-(1 << 31), (1 << 31) - 1, np.int32))

    def choose_nearest(x: Any, digits: Any = None) -> Any:
        if is_none(digits):
            return (lambda x, digits=None: whole(np.rint(x))) if isinstance(x, types.Float) else identity(x)
        return lambda x, digits=None: round(x, digits)

    def is_none(kind: Any) -> bool:
        return kind is None or isinstance(kind, types.NoneType) or getattr(kind, "value", 0) is None

    def identity(x: Any) -> Any:
        return (lambda x, digits=None: np.int64(x)) if isinstance(x, types.Integer | types.Boolean) else None

    define(nearest, choose_nearest)

    def rounding(to: Any) -> Body:
        def choose(x: Any) -> Any:
            if isinstance(x, types.Float):
                return lambda x: whole(to(x))
            return (lambda x: np.int64(x)) if isinstance(x, types.Integer | types.Boolean) else None

        return choose

    define(floor, rounding(np.floor))
    define(ceil, rounding(np.ceil))
    define(mod, lambda a, b: lambda a, b: a % b)
    define(divide, lambda a, b: lambda a, b: (a // b, a % b))

    def whole_fmod(a: Any, b: Any) -> Any:  # Numba's own forgets the sign
        rest = a % b
        return rest - b if rest != 0 and (rest < 0) != (a < 0) else rest

    def choose_fmod(a: Any, b: Any) -> Any:
        if isinstance(a, types.Integer) and isinstance(b, types.Integer):
            return whole_fmod
        return lambda a, b: np.fmod(a, b)

    define(fmod, choose_fmod)
    define(left, lambda a, bits: lambda a, bits: np.int64(a) << bits if 0 <= bits < 64 else 0)
    define(right, lambda a, bits: lambda a, bits: np.int64(a) >> (bits if 0 <= bits < 64 else 63))

    def is_vector(*kinds: Any) -> bool:
        return all(isinstance(kind, types.Array) and kind.ndim == 1 for kind in kinds)

    def choose_dot(a: Any, b: Any) -> Any:
        if not is_vector(a, b):
            return None
        both_single = a.dtype == types.float32 and b.dtype == types.float32
        zero = np.float32(0) if both_single else 0 if isinstance(a.dtype, types.Integer) else 0.0

        def sum_of_products(a: Any, b: Any) -> Any:
            if len(a) != len(b):
                raise ValueError("vectors of different lengths")
            total = zero
            for i in range(len(a)):
                total += a[i] * b[i]
            return total

        return sum_of_products

    # In any order, as BLAS does: only then can it be vectorised.
    define(dot, choose_dot, fastmath={"reassoc"}, boundscheck=False)

    def choose_norm(v: Any, ord: Any = None) -> Any:
        if not is_vector(v):
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

    define(norm, choose_norm)

    def choose_where(condition: Any, a: Any, b: Any) -> Any:
        if all(isinstance(kind, types.Number | types.Boolean) for kind in (condition, a, b)):
            return lambda condition, a, b: a if condition else b
        return lambda condition, a, b: np.where(condition, a, b)

    def choose_clip(x: Any, low: Any, high: Any) -> Any:
        if all(isinstance(kind, types.Number | types.Boolean) for kind in (x, low, high)):
            return lambda x, low, high: np.minimum(np.maximum(x, low), high)
        return lambda x, low, high: np.clip(x, low, high)

    define(where, choose_where)
    define(clip, choose_clip)
    define(truth, lambda x: (lambda x: x != 0) if isinstance(x, types.Number | types.Boolean) else None)
    _installed = True
