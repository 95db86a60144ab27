"""How a value becomes a value of a column's type: said here once, and used by every way in."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from shorttail.errors import InvalidArgument

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# The types are known by name here: over --server nothing else of them arrives.
INTEGERS = ("Int32", "Int64")
FLOATS = ("Float32", "Float64")
BOOLS = {"true": True, "1": True, "false": False, "0": False}


def parse_columns(arguments: Sequence[str], dtypes: Mapping[str, str], taker: str) -> dict[str, Any]:
    """{column: value, or list of values} of "column=value" arguments, typed by the names of types in `dtypes`.

    "1,2,3" is a list ("..." keeps a comma in a string). A vector's numbers are separated by commas, vectors by
    semicolons; even one is a list of vectors. Nothing after the = is an empty string, or null for other types.
    Raises InvalidArgument.
    """
    columns: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        known = ", ".join(f"{column} {dtype}" for column, dtype in dtypes.items())
        if not equals:
            raise InvalidArgument(f"'{argument}' is not column=value; columns of {taker}: {known}")
        if name not in dtypes:
            raise InvalidArgument(f"{taker} takes no column '{name}'; columns: {known}")
        if name in columns:
            raise InvalidArgument(f"'{name}' is given twice; write {name}=a,b for a batch")
        columns[name] = parse_values(name, text, dtypes[name])
    return columns


def parse_values(name: str, text: str, dtype: str) -> Any:
    if dtype.startswith("Vector("):
        return [[parse_value(name, item, "Float32") for item in part.split(",")] for part in text.split(";")]
    items = next(csv.reader([text]), None) or [""]
    values = [parse_value(name, item, dtype) for item in items]
    return values if len(values) > 1 else values[0]


def parse_value(name: str, text: str, dtype: str) -> Any:
    if dtype == "String":
        return text
    if text == "":
        return None
    try:
        if dtype in INTEGERS:
            return int(text)
        if dtype in FLOATS:
            return float(text)
        if dtype == "Bool":
            return BOOLS[text.lower()]
        return int(text) if text.lstrip("-").isdigit() else datetime.fromisoformat(text)
    except (ValueError, KeyError):
        hint = {"Bool": " (true or false)", "Timestamp": " (microseconds, or like 2026-01-31T12:00:00)"}.get(dtype, "")
        raise InvalidArgument(f"{name}={text}: column '{name}' is {dtype}{hint}") from None


def microseconds(value: datetime) -> int:
    """Microseconds since 1970-01-01 UTC; a datetime without a zone is taken as UTC."""
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)
