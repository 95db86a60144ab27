"""Values that are written as text (CSV, the command line, `shorttail bench`): one grammar for all of them.

A field of text is read as a value here, and define/values.py says whether a column takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shorttail.define.dtypes import Bool, DType, Float64, String, Timestamp, parse_dtype
from shorttail.define.refusal import Refused, shown
from shorttail.define.times import TIME, parse_time
from shorttail.define.values import as_value
from shorttail.errors import InvalidArgument

WHOLE: Final = re.compile(r"-?[0-9]+")
NUMBER: Final = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
FLOATS: Final = re.compile("nan|-?inf|-?infinity", re.IGNORECASE)
BOOLS: Final = {"true": True, "false": False}
DIGITS_MAX: Final = 400  # of a whole number; Python refuses to read some thousand

# A field of CSV, and what follows it. A quote within quotes is written twice.
FIELD: Final = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n][^,\r\n]*)?)(,|\r\n|\n|\r|\Z)')


def parse_text(dtype: DType, text: str) -> Any:
    """The value of a field, as define.values.as_value gives it; None for "nan" in a float. Raises Refused.

    Nothing is stripped, and an empty field is not given: it is a missing value. Numbers are `-?[0-9]+` or decimal
    numbers, in floats also nan and inf; Bool takes true and false too, a Timestamp ISO 8601. The numbers of a vector
    are separated by commas, with nothing between two commas for one that is missing.
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
        raise Refused(f"{shown(text)} (text)")
    try:
        return as_value(dtype, value)
    except Refused:
        raise Refused(f"{shown(text)} (text)") from None


def _number(text: str) -> int | float | None:
    if WHOLE.fullmatch(text) and len(text) <= DIGITS_MAX:
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else None


# -- CSV ---------------------------------------------------------------------------------------------------------------


def csv_rows(text: str) -> Iterator[list[str | None]]:
    """The rows of CSV: a field is None where there is nothing, and "" where there are quotes with nothing in them.

    A line with nothing in it is a row with one empty field. Raises ValueError with the number of a line that is wrong.
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


def parse_columns(arguments: Sequence[str], dtypes: Mapping[str, str], taker: str) -> dict[str, Any]:
    """{column: value, or list of values} of "column=value" arguments, by the names of types in `dtypes`.

    "1,2,3" is a row of CSV, and so a list ("..." keeps a comma in a text). A vector's numbers are separated by commas,
    vectors by semicolons; even one is a list of vectors. Nothing after the = is a missing value, and '""' the empty
    text. Raises InvalidArgument.
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
        columns[name] = parse_values(name, text, parse_dtype(dtypes[name]))
    return columns


def parse_values(name: str, text: str, dtype: DType) -> Any:
    """One value, or the list of them, of what is written after "name=". Raises InvalidArgument."""
    if dtype.is_vector:
        return [parse_field(name, part or None, dtype) for part in text.split(";")]
    values = [parse_field(name, field, dtype) for field in csv_row(name, text)]
    return values if len(values) > 1 else values[0]


def csv_row(name: str, text: str) -> list[str | None]:
    """The fields of one line of CSV. Raises InvalidArgument."""
    try:
        rows = list(csv_rows(text)) or [[None]]
    except ValueError as error:
        raise InvalidArgument(f"{name}={shown(text)}: {str(error).partition(': ')[2]}") from None
    if len(rows) > 1:
        raise InvalidArgument(f"{name}={shown(text)}: more than one line; put a text with a line break into quotes")
    return rows[0]


def parse_field(name: str, field: str | None, dtype: DType, row: int | None = None) -> Any:
    """The value of a field of a column, None for an empty one. Raises InvalidArgument."""
    try:
        return None if field is None else parse_text(dtype, field)
    except Refused as error:
        raise Refused(error.got, row).error(f"column '{name}'", dtype) from None
