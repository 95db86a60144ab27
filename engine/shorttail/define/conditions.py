"""Conditions on rows, written as text: `tier=gold`, `age>=30`, `tier!=`. A row must satisfy all of a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shorttail.define.dtypes import DType
from shorttail.define.names import quoted, suggestion
from shorttail.define.text import csv_row, parse_field
from shorttail.errors import InvalidArgument, NotFound

OPERATORS: Final = ("==", "!=", "<=", ">=", "=", "<", ">")  # no operator is the beginning of a later one
ANY: Final = re.compile(rf"(.*?)\s*({'|'.join(OPERATORS)})(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Condition:
    """`column operator value`. operator: = != < <= > or >=. value: of the column's type, as define.values.as_value
    gives it; None stands for a missing value, with = or !=.

    A missing value satisfies `column=` alone, and `column!=` means that the value is there.
    """

    column: str
    operator: str
    value: Any


def parse_condition(text: str, dtypes: Mapping[str, DType], owner: str) -> Condition:
    """Return the condition of a text. The value is written as on the command line (define/text.py).

    dtypes: column -> type. owner: the view, named in errors: "view 'x'". Spaces around the operator count only inside
    of quotes. Raises NotFound for an unknown column, and InvalidArgument.
    """
    name, operator, value_text = _split(text, dtypes)
    if not operator:
        raise InvalidArgument(f"{quoted(text)} is not a condition; write 'column=value' with one of = != < <= > >=")
    if name not in dtypes:
        raise NotFound(f"{owner} has no column {quoted(name)}{suggestion(name, dtypes, 'columns')}")
    operator = "=" if operator == "==" else operator
    value_text = value_text.strip()
    if dtypes[name].is_vector and value_text:
        raise InvalidArgument(f"{quoted(text)}: '{name}' is a vector; {name}= and {name}!= tell whether it is missing")
    fields = csv_row(name, value_text)
    if len(fields) > 1:
        raise InvalidArgument(f"{quoted(text)}: give one value; put a text that holds a comma into quotes")
    value = parse_field(name, fields[0], dtypes[name])
    if value is None and operator not in ("=", "!="):
        raise InvalidArgument(f"{quoted(text)}: a missing value has no order; use {name}= or {name}!=")
    return Condition(name, operator, value)


def _split(text: str, columns: Mapping[str, DType]) -> tuple[str, str, str]:
    """Return (column, operator, text of the value), at the operator after a known column: the longest that fits.

    A column's name may hold an operator itself. Without a known column the first operator counts; "" if there is none.
    """
    for name in sorted(columns, key=len, reverse=True):
        rest = text.removeprefix(name).lstrip() if text.startswith(name) else ""
        operator = next((operator for operator in OPERATORS if rest.startswith(operator)), None)
        if operator is not None:
            return name, operator, rest[len(operator) :]
    found = ANY.fullmatch(text)
    return (found[1], found[2], found[3]) if found else (text, "", "")
