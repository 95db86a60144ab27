"""Replaces the arithmetic of on-demand functions where Numba's own is undefined, traps, or needs SciPy.

`rewrite` changes a captured function's text so that it calls the functions here, and overloads.py tells Numba how to
compile them. Numba's own definitions stay as they are for all other code of the process.

- int, round, math.floor, ... of a float give an Int64: a value out of range saturates, and NaN gives 0. LLVM leaves
  both undefined.
- np.mod, np.fmod and np.divmod of the lowest Int64 and -1 are 0; the processor would end the process.
- Shifts by 64 and more give 0 (or -1), as in Python.
- np.dot, @ and np.linalg.norm of vectors need no BLAS; np.where and np.clip also take numbers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

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
}  # replaced only where they are called, because np.int64 is also a dtype
OPERATORS: dict[type[ast.operator], Body] = {ast.MatMult: dot, ast.LShift: left, ast.RShift: right}


def rewrite(source: str) -> ast.Module:
    """Return the tree of a captured text that calls the functions above. Line numbers stay the same."""
    tree = ast.parse(source)
    aliases = {"math": "math", "np": "np"}
    for statement in tree.body:  # names that the file gave to modules and functions: numpy = np, sqrt = math.sqrt
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = ast.unparse(statement.value)
            if name.partition(".")[0] in ("math", "np") and "(" not in name:
                aliases[statement.targets[0].id] = name
    Rewriter(aliases).visit(tree)
    return ast.fix_missing_locations(tree)


class Rewriter(ast.NodeTransformer):
    """Replaces calls and operators in a tree. aliases: name in the file -> dotted name, "math.sqrt"."""

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
        """Return the dotted name of an expression, "np.linalg.norm", or "" if it is not a global dotted name."""
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
