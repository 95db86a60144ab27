"""Parses values written as text. CSV, the command line and `shorttail bench` share this grammar.

This module turns a field of text into a value; define/scalar.py decides whether the column takes that value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from shorttail.define.dtypes import Bool, DType, Float64, String, Timestamp, parse_dtype
from shorttail.define.names import quoted
from shorttail.define.refusal import Refused, short_repr
from shorttail.define.times import TIME, parse_time
from shorttail.define.values import as_value
from shorttail.errors import InvalidArgument

WHOLE: Final = re.compile(r"-?[0-9]+")
NUMBER: Final = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
FLOATS: Final = re.compile("nan|-?inf|-?infinity", re.IGNORECASE)
BOOLS: Final = {"true": True, "false": False}
DIGITS_MAX: Final = 400  # of an integer; int() raises above 4,300 digits

# A CSV field, and the separator after it. A quote inside a quoted field is written twice.
FIELD: Final = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n][^,\r\n]*)?)(,|\r\n|\n|\r|\Z)')


def parse_text(dtype: DType, text: str) -> Any:
    """Return the value of a field in the form of `as_value`; None for "nan" in a float column. Raises Refused.

    The caller reads an empty field as a missing value; text "" is the empty text. Spaces are not stripped. Numbers are
    `-?[0-9]+` or decimal numbers; floats also take nan and inf, a Bool takes true and false, a Timestamp takes
    ISO 8601. The numbers of a vector are separated by commas; an empty one is a missing element.
    """
    if dtype == String:
        return as_value(dtype, text)
    if dtype.is_vector:
        return as_value(dtype, [parse_text(Float64, part) if part else None for part in text.split(",")])
    if dtype.is_float and (NUMBER.fullmatch(text) or FLOATS.fullmatch(text)):
        return as_value(dtype, float(text))
    if (value := _number(text)) is None:
        if dtype == Bool and text.lower() in BOOLS:
            return BOOLS[text.lower()]
        if dtype == Timestamp and TIME.fullmatch(text):
            return parse_time(text)
        raise Refused(f"{short_repr(text)} (text)")
    try:
        return as_value(dtype, value)
    except Refused:
        raise Refused(f"{short_repr(text)} (text)") from None


def _number(text: str) -> int | float | None:
    if WHOLE.fullmatch(text) and len(text) <= DIGITS_MAX:
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else None


# -- CSV ---------------------------------------------------------------------------------------------------------------


def csv_rows(text: str) -> Iterator[list[str | None]]:
    """Yield the rows of CSV. An empty field is None, and an empty field in quotes is "".

    An empty line is a row with one empty field. Raises ValueError with the line number for a wrong quote.
    """
    at, row = 0, list[str | None]()
    while at < len(text) or row:
        field = FIELD.match(text, at)
        if field is None:
            line = text.count("\n", 0, at) + 1
            raise ValueError(f'line {line}: a field in quotes must end with a quote, and a quote in it is written ""')
        quoted, plain, end = field.groups()
        row.append(plain if quoted is None else quoted.replace('""', '"'))
        at = field.end()
        if end != ",":
            yield row
            row = []


# -- the command line --------------------------------------------------------------------------------------------------


def parse_columns(arguments: Sequence[str], dtypes: Mapping[str, str], owner: str) -> dict[str, Any]:
    """Return {column: value or list of values} of "column=value" arguments. Raises InvalidArgument.

    dtypes: column -> name of its type. owner: the model or view, named in errors. "1,2,3" is a row of CSV, so it is a
    list; quotes keep a comma inside a text. The numbers of a vector are separated by commas, and vectors by semicolons;
    a single vector also becomes a list. Nothing after the = is a missing value, and '""' is the empty text.
    """
    columns: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = split_argument(argument, dtypes)
        known = ", ".join(f"{column} {dtype}" for column, dtype in dtypes.items())
        if not equals:
            raise InvalidArgument(f"{quoted(argument)} is not column=value; columns of {owner}: {known}")
        if name not in dtypes:
            raise InvalidArgument(f"{owner} takes no column {quoted(name)}; columns: {known}")
        if name in columns:
            raise InvalidArgument(f"'{name}' is given twice; write {name}=a,b for a batch")
        columns[name] = parse_values(name, text, parse_dtype(dtypes[name]))
    return columns


def split_argument(argument: str, columns: Iterable[str]) -> tuple[str, str, str]:
    """Split "column=text" as str.partition does, at the = after a known column: the longest one that fits.

    A column's name may hold a = itself. Without a known column the first = counts.
    """
    name = max((column for column in columns if argument.startswith(f"{column}=")), key=len, default=None)
    return argument.partition("=") if name is None else (name, "=", argument[len(name) + 1 :])


def parse_values(name: str, text: str, dtype: DType) -> Any:
    """Return the value, or the list of values, of the text after "name=". Raises InvalidArgument."""
    if dtype.is_vector:
        return [parse_field(name, part or None, dtype) for part in text.split(";")]
    values = [parse_field(name, field, dtype) for field in csv_row(name, text)]
    return values if len(values) > 1 else values[0]


def csv_row(name: str, text: str) -> list[str | None]:
    """Return the fields of one line of CSV; an empty field is None. Raises InvalidArgument."""
    try:
        rows = list(csv_rows(text)) or [[None]]
    except ValueError as error:
        raise InvalidArgument(f"{name}={short_repr(text)}: {str(error).partition(': ')[2]}") from None
    if len(rows) > 1:
        raise InvalidArgument(
            f"{name}={short_repr(text)}: more than one line; put a text with a line break into quotes"
        )
    return rows[0]


def parse_field(name: str, field: str | None, dtype: DType, row: int | None = None) -> Any:
    """Return the value of a field of column `name`; None for an empty field. Raises InvalidArgument."""
    try:
        return None if field is None else parse_text(dtype, field)
    except Refused as error:
        raise Refused(error.got, row).error(f"column '{name}'", dtype) from None
