"""Captures a Python function as source text that needs nothing else of its file.

The text contains the constants and plain functions of the file that the function uses. A server compiles on-demand
functions from the catalog alone and never sees the definitions file, so the values of the file's names are captured
when the function is declared.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument

# Builtins that reach outside of the function, or that have no meaning for numbers.
FORBIDDEN_BUILTINS = {
    "print", "input", "open", "eval", "exec", "compile", "globals", "locals", "vars", "dir", "getattr", "setattr",
    "delattr", "hasattr", "breakpoint", "exit", "quit", "help", "id", "hash", "super", "type", "object",
    "memoryview", "__import__", "callable", "repr", "format", "ascii",
}  # fmt: skip
FORBIDDEN_SYNTAX: dict[type[ast.AST], str] = {
    ast.Raise: "it cannot raise: one row would fail its whole batch; return a value that says so, such as math.nan",
    ast.Assert: "it cannot assert: one row would fail its whole batch; return a value that says so, such as math.nan",
    ast.Try: "it cannot catch errors: arithmetic gives NaN, infinity or 0 instead of raising",
    ast.With: "'with' needs objects, and only numbers and vectors can be compiled",
    ast.Yield: "it must return one value, not yield several",
    ast.YieldFrom: "it must return one value, not yield several",
    ast.Await: "it cannot wait for anything",
    ast.Import: "it cannot import; math and np are known, and constants and plain functions of the same file",
    ast.ImportFrom: "it cannot import; math and np are known, and constants and plain functions of the same file",
    ast.Dict: "dicts cannot be compiled; use if / elif, or a tuple and an index",
    ast.DictComp: "dicts cannot be compiled; use if / elif, or a tuple and an index",
    ast.Set: "sets cannot be compiled; compare with == and 'or', or test 'in' on a tuple",
    ast.SetComp: "sets cannot be compiled; compare with == and 'or', or test 'in' on a tuple",
    ast.JoinedStr: "strings cannot be made; only numbers and vectors can be compiled",
    ast.Global: "it cannot keep anything from one row to the next",
    ast.ClassDef: "classes cannot be compiled; use plain functions",
}


@dataclass(frozen=True)
class Origin:
    """Where a function was written, for messages. lines: line of the captured text -> line of the file."""

    file: str
    line: int
    lines: dict[int, int]
    function: FunctionType


@dataclass
class Capture:
    """The text captured so far. where: the beginning of every error message."""

    where: str
    parts: dict[str, str] = field(default_factory=dict)  # global name -> the statement that defines it, in order
    values: dict[str, Any] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)  # functions that are being captured, outermost first
    trees: dict[str, tuple[ast.FunctionDef, FunctionType]] = field(default_factory=dict)  # the functions in `parts`

    def function(self, function: FunctionType, name: str) -> ast.FunctionDef:
        """Add everything that `function` uses to `parts`, and return its bare definition. Raises InvalidArgument."""
        definition = bare_definition(function, self.where, name)
        self.open.append(name)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for used in dict.fromkeys([*cells, *global_names(function.__code__)]):
            try:
                value = cells[used].cell_contents if used in cells else function.__globals__[used]
            except (KeyError, ValueError):
                if used not in cells and hasattr(builtins, used):
                    self.check_builtin(used)
                    continue
                raise InvalidArgument(
                    f"{self.where} uses '{used}', which is not defined yet; define it above the function, in its file"
                ) from None
            self.add(used, value)
        self.open.pop()
        return definition

    def check_builtin(self, name: str) -> None:
        if name in FORBIDDEN_BUILTINS:
            raise InvalidArgument(f"{self.where} uses {name}(), which cannot be compiled; only numbers and vectors can")

    def add(self, name: str, value: Any) -> None:
        """Add the statement that gives a global name its present value. Raises InvalidArgument."""
        if name in self.open:
            raise InvalidArgument(f"{self.where}: '{name}' calls itself, which cannot be compiled; write a loop")
        if name in self.values:
            if self.values[name] is not value:
                raise InvalidArgument(
                    f"{self.where} uses two different values with the name '{name}', from two files; rename one of them"
                )
            return
        value = getattr(value, "py_func", value)  # the user may have compiled the function with Numba already
        value = getattr(getattr(value, "origin", None), "function", value)  # it may be another on-demand function
        if isinstance(value, FunctionType) and not is_library(value):
            definition = self.function(value, name)
            definition.name = name
            self.parts[name] = ast.unparse(definition)
            self.trees[name] = definition, value
        elif (text := library_text(value)) is not None:
            if text != name:
                self.parts[name] = f"{name} = {text}"
        elif (text := literal(value)) is not None:
            self.parts[name] = f"{name} = {text}"
        else:
            raise InvalidArgument(
                f"{self.where} uses '{name}', which is {describe(value)}; it can use its parameters, math, np,"
                " builtins, and numbers, tuples of numbers, NumPy arrays and plain functions of its file"
            )
        self.values[name] = value


def capture(function: FunctionType, where: str) -> tuple[str, Origin]:
    """Return source text that defines `function` where only `math` and `np` exist, and where it was written.

    where: the beginning of error messages. Raises InvalidArgument.
    """
    name = function.__name__
    captured = Capture(where)
    definition = captured.function(function, name)
    captured.parts[name] = ast.unparse(definition)
    captured.trees[name] = definition, function
    file = function.__code__.co_filename
    lines: dict[int, int] = {}
    text = ""
    for part, statement in captured.parts.items():
        before = text.count("\n")
        text += f"{statement}\n"
        if part in captured.trees and captured.trees[part][1].__code__.co_filename == file:
            tree, written = captured.trees[part]
            own = printed_lines(statement, tree)
            lines |= {before + new: written.__code__.co_firstlineno + old - 1 for new, old in own.items()}
    return text, Origin(file, lines[before + 1], lines, function)


def printed_lines(text: str, tree: ast.FunctionDef) -> dict[int, int]:
    """Return, for each line of a text printed from a tree, the line that the tree was read from. Both count from 1."""
    # Both trees have the same shape, so walking them in step pairs each printed line with its line in the file.
    pairs = zip(ast.walk(ast.parse(text).body[0]), ast.walk(tree), strict=True)
    found: dict[int, int] = {}
    for new, old in pairs:
        if isinstance(new, ast.stmt | ast.expr) and isinstance(old, ast.stmt | ast.expr):
            found.setdefault(new.lineno, old.lineno)
    return found | {1: tree.lineno}


def bare_definition(function: FunctionType, where: str, name: str) -> ast.FunctionDef:
    """Return the function's tree without decorators, annotations and docstring. Raises InvalidArgument."""
    helper = "" if name == function.__name__ and where.endswith(f"'{name}'") else f" uses '{name}'"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        raise InvalidArgument(
            f"{where}{helper}: its source text cannot be read; define it in a file with `def`"
        ) from None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise InvalidArgument(f"{where}{helper} must be defined with a plain `def`")
    for node in ast.walk(definition):
        check_syntax(node, where, function.__code__.co_firstlineno)
    definition.decorator_list = []
    definition.returns = None
    for argument in [*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs]:
        argument.annotation = None
    if function.__defaults__:
        definition.args.defaults = [default_value(value, where, name) for value in function.__defaults__]
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    # Annotations of variables are dropped: Python does not evaluate them, and they may use names that are not captured.
    for node in ast.walk(definition):
        for body in (getattr(node, block, None) for block in ("body", "orelse")):
            if isinstance(body, list):
                body[:] = [plain_assignment(statement) for statement in body]
    return definition


def check_syntax(node: ast.AST, where: str, first_line: int) -> None:
    """Raise InvalidArgument for syntax that cannot be compiled. first_line: line of the function in its file."""
    reason = FORBIDDEN_SYNTAX.get(type(node))
    if isinstance(node, ast.Attribute) and node.attr == "random" and isinstance(node.value, ast.Name):
        reason = "it cannot draw random numbers: the same request must get the same answer"
    if reason is not None:
        assert isinstance(node, ast.stmt | ast.expr)
        text = ast.unparse(node).splitlines()[0]
        raise InvalidArgument(f"{where}, line {first_line + node.lineno - 1}, `{text}`: {reason}")


def plain_assignment(statement: ast.stmt) -> ast.stmt:
    """Return `x: int = 1` as `x = 1`, `x: int` as `pass`, and any other statement unchanged."""
    if not isinstance(statement, ast.AnnAssign):
        return statement
    if statement.value is None:
        return ast.copy_location(ast.Pass(), statement)
    return ast.copy_location(ast.Assign([statement.target], statement.value), statement)


def default_value(value: Any, where: str, name: str) -> ast.expr:
    """Return a parameter's default as an expression. Raises InvalidArgument if it is not a number."""
    text = literal(value)
    if text is None:
        raise InvalidArgument(f"{where} uses '{name}', which has a default that is {describe(value)}, not a number")
    return ast.parse(text, mode="eval").body


def global_names(code: CodeType) -> Iterator[str]:
    """Yield the global names that a function uses, and those of the functions inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from global_names(constant)


def is_library(value: FunctionType) -> bool:
    return value.__module__.partition(".")[0] in ("numpy", "math", "builtins")


def library_text(value: Any) -> str | None:
    """Return `math`, `np` or a name in them ("np.sqrt") for such a value, however the file imported it; else None."""
    if isinstance(value, ModuleType):
        return {"math": "math", "numpy": "np", "numpy.linalg": "np.linalg"}.get(value.__name__)
    if isinstance(value, BuiltinFunctionType | FunctionType | np.ufunc | type) or hasattr(value, "__wrapped__"):
        name = getattr(value, "__name__", "")
        for module, text in ((math, "math"), (np, "np"), (np.linalg, "np.linalg"), (builtins, "")):
            if name and getattr(module, name, None) is value:
                return f"{text}.{name}" if text else name
    return None


def literal(value: Any) -> str | None:
    """Return an expression for a number, a tuple of such, or a NumPy array of numbers; None for any other value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return repr(int(value)) if -(1 << 63) <= value < 1 << 63 else None
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else f"float('{float(value)!r}')"
    if isinstance(value, tuple) and value:
        items = [literal(item) for item in value]
        return None if None in items else f"({', '.join(item for item in items if item)},)"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and 0 < value.size <= LIMITS.constant_elements:
        numbers = value.tolist()
        shown = repr(numbers).replace("nan", "np.nan").replace("inf", "np.inf")
        return f"np.array({shown}, np.{value.dtype.name})"
    return None


def describe(value: Any) -> str:
    """Return the kind of a value in words, for error messages."""
    if isinstance(value, ModuleType):
        return f"the module {value.__name__}"
    if isinstance(value, np.ndarray):
        limit = f"at most {LIMITS.constant_elements:,} numbers"
        return f"a NumPy array of {value.dtype} and {value.size:,} elements ({limit})"
    name = type(value).__name__
    return f"the class {value.__name__}" if isinstance(value, type) else f"a{'n' * (name[0].lower() in 'aeiou')} {name}"
