"""Declares on-demand features: small numeric functions of request columns, stored features and other such features.

The catalog keeps a function as source text with the types of its parameters (capture.py). A server compiles it with
Numba from the catalog alone (ondemand/compile.py) and never needs the definitions file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Union

from shorttail.config import LIMITS
from shorttail.define.capture import Origin, capture
from shorttail.define.dtypes import WIDE_VECTOR_CODE, DType, String, parse_dtype
from shorttail.define.names import check_function_name, split_reference
from shorttail.errors import InvalidArgument

Json = dict[str, Any]
Argument = Union[str, "OnDemandFeature"]
"""An argument of an on-demand function: a reference as in a model's inputs, or another on-demand feature."""


@dataclass(frozen=True)
class OnDemand:
    """A function declared with @on_demand. Two functions are equal if their names, types and sources are.

    params: (name, dtype) of each parameter. source: statements that define the function and need only `math` and `np`.
    origin: where the function was written; None in a process that has it from the catalog.
    """

    name: str
    params: tuple[tuple[str, DType], ...]
    returns: DType
    source: str
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __call__(self, *arguments: Argument) -> OnDemandFeature:
        """Return the feature that this function computes from these arguments. Raises InvalidArgument."""
        return OnDemandFeature(self, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process has no origin, which refers to objects of the definitions file."""
        return OnDemand, (self.name, self.params, self.returns, self.source)

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
    """A function with its arguments. It fills a column of a model's input; a vector fills a column for each element."""

    function: OnDemand
    args: tuple[Argument, ...]

    def __post_init__(self) -> None:
        name, params = self.function.name, self.function.params
        if len(self.args) != len(params):
            raise InvalidArgument(
                f"{name}(...) takes {len(params)} arguments ({', '.join(p for p, _ in params)}), not {len(self.args)}"
            )
        for arg in self.args:
            if isinstance(arg, OnDemand):
                raise InvalidArgument(
                    f"argument of {name}(...): call {arg.name} with its arguments: {arg.name}('view:feature', ...)"
                )
            if isinstance(arg, OnDemandFeature):
                continue
            try:
                split_reference(arg)
            except InvalidArgument as error:
                raise InvalidArgument(f"argument of {name}(...): {error.message}") from None
        if self.depth > LIMITS.on_demand_depth:
            raise InvalidArgument(f"{name}(...): on-demand features nest at most {LIMITS.on_demand_depth} deep")

    @property
    def depth(self) -> int:
        return 1 + max((arg.depth for arg in self.args if isinstance(arg, OnDemandFeature)), default=0)

    @property
    def label(self) -> str:
        """The feature as the user wrote it: function(argument, ...)."""
        shown = (arg if isinstance(arg, str) else arg.label for arg in self.args)
        return f"{self.function.name}({', '.join(shown)})"

    @property
    def references(self) -> list[str]:
        """The "view:feature" and "request:column" arguments of this feature and of the features inside it, in order."""
        return [name for feature in self.walk() for name in feature.args if isinstance(name, str)]

    def walk(self) -> Iterator[OnDemandFeature]:
        """Yield the features inside this one, innermost first, and then this one: an order to compute them in."""
        for arg in self.args:
            if isinstance(arg, OnDemandFeature):
                yield from arg.walk()
        yield self

    def to_json(self) -> Json:
        args = [arg if isinstance(arg, str) else arg.to_json() for arg in self.args]
        return {"on_demand": self.function.to_json(), "args": args}

    @classmethod
    def from_json(cls, data: Json) -> OnDemandFeature:
        args = tuple(arg if isinstance(arg, str) else cls.from_json(arg) for arg in data["args"])
        return cls(OnDemand.from_json(data["on_demand"]), args)


def on_demand(function: Callable[..., Any]) -> OnDemand:
    """Declare a function of columns, which is compiled and run over whole batches (docs/on-demand.md).

    Annotate the parameters and the return value with types (st.Float64, st.Vector(8), ...). The present values of
    constants and plain functions of the same file are captured. Raises InvalidArgument.
    """
    if not inspect.isfunction(function):
        raise InvalidArgument(f"@on_demand: {function!r} is not a function")
    name = check_function_name(function.__name__, "on-demand function")
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
    source, origin = capture(function, where)
    return OnDemand(name, tuple(params), returns, source, origin)


def numeric(dtype: object, what: str) -> DType:
    """Return `dtype` if it is a type other than String. what: the beginning of the message. Raises InvalidArgument."""
    if not isinstance(dtype, DType):
        raise InvalidArgument(f"{what} has no type; annotate it, for example with st.Float64")
    if dtype == String:
        raise InvalidArgument(
            f"{what} is String; on-demand functions take and return numbers and vectors: store a number for the string,"
            " or give the string to the model directly"
        )
    if dtype.code == WIDE_VECTOR_CODE:
        raise InvalidArgument(f"{what} is {dtype}; vectors of functions have Float32 elements: Vector({dtype.width})")
    return dtype
