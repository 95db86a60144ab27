"""What the parsers of HTTP bodies know of a model, and what the writers of responses get of an answer.

Parsers and writers are functions of plain values, which can be pickled, so they may run in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from shorttail.define.dtypes import DType
from shorttail.define.event_times import as_of_us


class TooLarge(Exception):
    """The event loop would take too long for this request: the bulk worker answers it instead."""


@dataclass(frozen=True, slots=True)
class ModelColumns:
    """A model, as far as parsing needs it.

    model, version: its name, and the number of the version that the request asks for (None: the current one). names,
    dtypes: its request columns. tensors: the names of the inputs of its file. takes_tensors: it takes only those.
    """

    model: str
    version: int | None
    names: tuple[str, ...]
    dtypes: tuple[DType, ...]
    tensors: tuple[str, ...]
    takes_tensors: bool


# Finds a model by its name and version. A name of None is the model that the path or the server names. Raises NotFound,
# and InvalidArgument if nothing names a model.
FindModel = Callable[[str | None, int | None], ModelColumns]


def parse_moment(parameters: Mapping[str, Any]) -> int | None:
    """Return the parameter as_of of a request in microseconds since 1970, or None without it. Raises InvalidArgument.

    It is the moment at which TTLs are judged; requests that bring tensors have no use for it.
    """
    value = parameters.get("as_of")
    return None if value is None else as_of_us(value, "the parameter as_of")


@dataclass(slots=True)
class Answer:
    """The answer to one request. values: an array for each name; statuses: lookup -> uint8 [rows].

    The first axis of an array is the rows. Arrays of a model that takes tensors have any shape, and `rows` is 1.
    """

    names: Sequence[str]
    values: Sequence[NDArray[Any]]
    statuses: Mapping[str, NDArray[Any]]
    version: int
    rows: int


@dataclass(frozen=True, slots=True)
class ResponseBody:
    """The body of a response with status 200, and the headers that describe it."""

    content: bytes
    content_type: str
    headers: dict[str, str] = field(default_factory=dict)
