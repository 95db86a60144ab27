"""On-demand features: a small numeric function over request columns and stored features.

The function is kept as source text with the types of its parameters, so that a server compiles it (Numba, see
transforms.py) from the catalog alone and never needs the definitions file. That is why it may use nothing but its
parameters, `math`, `np` and Python's builtins.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from shorttail.dtypes import DType, String, parse_dtype
from shorttail.errors import InvalidArgument
from shorttail.names import check_name, split_reference

Json = dict[str, Any]
MODULES = ("math", "np")


@dataclass(frozen=True)
class OnDemand:
    """A function declared with @on_demand. Equal when name, types and source are equal.

    params: (name, dtype) of each parameter. source: the dedented `def`, without decorators and annotations.
    """

    name: str
    params: tuple[tuple[str, DType], ...]
    returns: DType
    source: str

    def __call__(self, *references: str) -> OnDemandFeature:
        """The feature this function gives for these arguments: "view:feature" or "request:column" each."""
        return OnDemandFeature(self, references)

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "params": [[name, dtype.name] for name, dtype in self.params],
            "returns": self.returns.name,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, data: Json) -> OnDemand:
        params = tuple((name, parse_dtype(dtype)) for name, dtype in data["params"])
        return cls(data["name"], params, parse_dtype(data["returns"]), data["source"])


@dataclass(frozen=True)
class OnDemandFeature:
    """One column of a model's input: a function and the references that are its arguments."""

    function: OnDemand
    args: tuple[str, ...]

    def __post_init__(self) -> None:
        name, params = self.function.name, self.function.params
        if len(self.args) != len(params):
            raise InvalidArgument(
                f"{name}(...) takes {len(params)} arguments ({', '.join(p for p, _ in params)}), not {len(self.args)}"
            )
        for arg in self.args:
            try:
                split_reference(arg)
            except InvalidArgument as error:
                raise InvalidArgument(f"argument of {name}(...): {error.message}") from None

    def to_json(self) -> Json:
        return {"on_demand": self.function.to_json(), "args": list(self.args)}

    @classmethod
    def from_json(cls, data: Json) -> OnDemandFeature:
        return cls(OnDemand.from_json(data["on_demand"]), tuple(data["args"]))


def on_demand(function: Callable[..., Any]) -> OnDemand:
    """Declare a function over columns; it is compiled and run over the whole batch.

    Parameters and return value are annotated with numeric types (st.Float64, ...). Raises InvalidArgument.
    """
    if not inspect.isfunction(function):
        raise InvalidArgument(f"@on_demand: {function!r} is not a function")
    name = check_name(function.__name__, "on-demand function")
    where = f"on-demand function '{name}'"
    try:
        annotations = inspect.get_annotations(function, eval_str=True)
    except Exception as error:
        raise InvalidArgument(f"{where}: its annotations do not evaluate: {error}") from None
    params = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise InvalidArgument(f"{where}: '{parameter}' must be a plain parameter without a default")
        dtype = numeric(annotations.get(parameter.name), f"{where}: parameter '{parameter.name}'")
        params.append((parameter.name, dtype))
    if not params:
        raise InvalidArgument(f"{where} takes no parameters; it needs at least one column to work on")
    returns = numeric(annotations.get("return"), f"{where}: the return value")
    check_globals(function, where)
    return OnDemand(name, tuple(params), returns, function_source(function, where))


def numeric(dtype: object, what: str) -> DType:
    if not isinstance(dtype, DType):
        raise InvalidArgument(f"{what} has no type; annotate it, for example with st.Float64")
    if dtype == String or dtype.is_vector:
        raise InvalidArgument(f"{what} is {dtype}; on-demand functions take and return single numbers")
    return dtype


def check_globals(function: Callable[..., Any], where: str) -> None:
    """Refuse names that would not exist where the function is compiled again from its text alone."""
    code: CodeType = function.__code__
    for name in [*code.co_freevars, *global_names(code)]:
        if name not in MODULES and (name in code.co_freevars or not hasattr(builtins, name)):
            raise InvalidArgument(
                f"{where} uses '{name}'; only its parameters, math, np and builtins are known where it is compiled:"
                f" define '{name}' inside the function"
            )


def global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from global_names(constant)


def function_source(function: Callable[..., Any], where: str) -> str:
    """The function's text, dedented, without decorators, annotations or docstring."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        raise InvalidArgument(f"{where}: its source text cannot be read; define it in a file with `def`") from None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise InvalidArgument(f"{where} must be defined with a plain `def`")
    definition.decorator_list = []
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    # Printed from the tree: comments and layout do not make it a different function.
    return ast.unparse(definition) + "\n"
