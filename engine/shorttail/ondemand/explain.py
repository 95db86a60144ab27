"""Explains to its author, in a single line, why an on-demand function does not compile.

Numba's own message is a page of tracebacks; the rules here find the reason in it.
"""

from __future__ import annotations

import linecache
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from shorttail.define.ondemand import OnDemand

FILE = "<on-demand function>"

OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "and_": "&",
    "or_": "|", "xor": "^", "neg": "-", "pos": "+", "invert": "~", "not_": "not", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "eq": "==", "ne": "!=", "contains": "in",
    "iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/=", "ifloordiv": "//=", "imod": "%=", "ipow": "**=",
}  # fmt: skip


def paragraph(function: OnDemand, reason: str) -> str:
    """Return the whole message: the function, its file and line if known, and the reason."""
    where = ""
    if function.origin is not None:
        where = f" ({Path(function.origin.file).name}:{function.origin.line})"
    return f"on-demand function '{function.name}'{where} does not compile: {reason}"


def explain(function: OnDemand, error: BaseException) -> str:
    """Return the reason of Numba's error in plain words, after the source line that it is about."""
    text = str(error)
    line = re.search(re.escape(FILE) + r'(?:", line | \()(\d+)', text)
    place = f"{source_line(function, int(line[1]))}: " if line else ""
    return place + plain_reason(type(error).__name__, text)


def source_line(function: OnDemand, number: int) -> str:
    """Return "line 14, `return x + y`" if the file is known, else the captured line without a number."""
    if function.origin is not None and number in function.origin.lines:
        line = function.origin.lines[number]
        text = linecache.getline(function.origin.file, line)
        if text:
            return f"line {line}, `{' '.join(text.split())}`"
    kept = function.source.splitlines()
    return f"in `{kept[number - 1].strip() if 0 < number <= len(kept) else function.name}`"


def plain_reason(kind: str, text: str) -> str:
    """Apply the first rule that matches Numba's text; without one, return its first line. kind: of the exception."""
    body = text.partition("pipeline (step:")[2].partition("\n")[2] or text
    for pattern, say in RULES:
        found = re.search(pattern, body, re.DOTALL)
        if found:
            return str(say(*found.groups()))
    first = next((line for line in body.splitlines() if line.strip()), kind)
    return words(first.strip().removesuffix("."))


def no_implementation(call: str, name: str, arguments: str, rest: str) -> str:
    """Say that a function or an operator does not take these types."""
    name = name.removeprefix("_shorttail_")
    given = split_types(arguments)
    if "Cannot modify readonly" in rest:
        return "a vector cannot be changed, because others read it too; make a new one, such as v * 2 or v.copy()"
    if name in ("getitem", "static_getitem") and len(given) == 2:
        if given[0] == "a vector":
            return f"a vector cannot be indexed by {given[1]}; make it an integer: int(...)"
        return f"{given[0]} cannot be indexed"
    if name in OPERATORS:
        return f"{OPERATORS[name]} is not defined for {' and '.join(given)}"
    specific = re.search(r"(?:TypingError|NumbaTypeError|NumbaValueError|RequireLiteralValue): ([^\n]+)", rest)
    because = f": {words(specific[1].strip().rstrip('.'))}" if specific else ""
    return f"{name}() does not take ({', '.join(given)}){because}"


def unsupported_attribute(name: str, owner: str) -> str:
    module = re.search(r"<module '([\w.]+)'", owner)
    if module:
        return f"{module[1].replace('numpy', 'np')}.{name} cannot be compiled; Numba does not know it"
    return f"{words(owner)} has no attribute '{name}'"


def split_types(text: str) -> list[str]:
    """Split the arguments of a Numba signature and put each into words. Commas inside brackets do not separate."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([<{") - (character in ")]>}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [words(part.strip()) for part in [*parts, text[start:]] if part.strip()]


WORDS = (
    (r"_shorttail_(\w+)", r"\1"),
    (r"Literal\[str\]\(([^)]*)\)", r"the string '\1'"),
    (r"Literal\[\w+\]\(([^)]*)\)", r"\1"),
    (r"OptionalType\((\w+)\)", r"\1 or None"),
    (r"Module\(<module '([\w.]+)'[^>]*>\)", r"the module \1"),
    (r"(?:readonly )?array\(\w+, 1d, \w\)", "a vector"),
    (r"(?:readonly )?array\(\w+, (\d)d, \w\)", r"an array of \1 axes"),
    (r"(?:reflected )?list\([^)]*\)(?:<iv=[^>]*>)?", "a list"),
    (r"(?:Uni)?Tuple\([^)]*\)", "a tuple"),
    (r"type\(CPUDispatcher\(<function (\w+)[^>]*>\)\)", r"the function \1"),
    (r"Function\(<[\w-]+(?: function)? '?(\w+)'?[^>]*>\)", r"the function \1"),
    (r"\bunicode_type\b", "a string"),
    (r"\bcomplex(?:64|128)\b", "a complex number"),
    (r"\bnone\b", "None"),
    (r"\bbool\b|\bboolean\b", "Bool"),
    (r"\bu?int(8|16|32|64)\b", r"Int\1"),
    (r"\bfloat(32|64)\b", r"Float\1"),
)


def words(text: str) -> str:
    """Replace Numba's names of types by this package's names."""
    for pattern, word in WORDS:
        text = re.sub(pattern, word, text)
    return " ".join(text.split())


RULES: tuple[tuple[str, Any], ...] = (
    (
        r"No implementation of function (.*?) found for signature:\s*>>> ([\w.<> ]+?)\((.*?)\)\s*\n(.*)",
        no_implementation,
    ),
    (r"Unknown attribute '?(\w+)'? of type ([^\n]+)", unsupported_attribute),
    (r"module '([\w.]+)' has no attribute '(\w+)'", lambda module, name: f"{module} has nothing called '{name}'"),
    (
        r"unsupported NumPy function 'numpy\.([\w.]+)'",
        lambda name: f"np.{name} cannot be compiled, or not with these arguments",
    ),
    (
        r"Cannot bind .*? \"TypeError: ([^\"]+)\".*?(?:<function (\w+)|$)",
        lambda reason, name: f"{name or 'the function called'}(): {reason}",
    ),
    (
        r"Cannot unify (.+?) and (.+?) for '(\w+)[\w.]*'",
        lambda a, b, name: f"'{name}' is {words(a)} on one path and {words(b)} on another; make it one type",
    ),
    (
        r"[Cc]an't unify return type from the following types: ([^\n]+)",
        lambda types: f"it returns {' on one path and '.join(split_types(types))} on another; return one type",
    ),
    (r"Untyped global name '(\w+)'", lambda name: f"'{name}' cannot be compiled; Numba does not know it"),
    (r"use of yield in a closure", lambda: "a generator cannot be compiled; write a for loop, or [...] with brackets"),
    (r"name '(\w+)' is not defined", lambda name: f"'{name}' is not defined"),
)


def wrong_result(function: OnDemand, result: Any) -> str | None:
    """Return why the type of a function's result does not fit its annotation, None if it fits. result: Numba type."""
    types: Any = import_module("numba.types")
    declared = function.returns
    if isinstance(result, types.NoneType):
        return f"it returns nothing; it is declared to return {declared}"
    if isinstance(result, types.Optional):
        return "it returns None on one of its paths; return a number on every path, such as math.nan for 'no value'"
    numbers = types.Integer | types.Float | types.Boolean
    if not declared.is_vector:
        if isinstance(result, numbers):
            return None
        return f"it returns {words(str(result))}, but is declared to return {declared}"
    if isinstance(result, types.BaseTuple):
        items = list(result)
        if all(isinstance(types.unliteral(item), numbers) for item in items):
            if len(items) == declared.width:
                return None
            return f"it returns {len(items)} numbers, but is declared to return {declared}"
    one_axis = isinstance(result, types.Array | types.List) and getattr(result, "ndim", 1) == 1
    if one_axis and isinstance(result.dtype, numbers):
        return None
    return (
        f"it returns {words(str(result))}, but is declared to return {declared}:"
        " return a one-dimensional array of numbers, or a tuple of them"
    )
