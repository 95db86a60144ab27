"""docs/types.md: what a column of each type takes, and which values the ways in cannot express.

    python -m shorttail.define.types_page > docs/types.md

The rules themselves are in define/scalar.py and define/values.py; tests/e2e/test_types.py sends every kind of value
through every way in, and holds them to one outcome.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shorttail.config import LIMITS
from shorttail.define.scalar import EXACT


@dataclass(frozen=True, slots=True)
class Rule:
    """What columns of some types take and refuse, for people."""

    types: str
    takes: str
    refuses: str


RULES: Final = (
    Rule(
        "Bool",
        "bools; the whole numbers 0 and 1 of any numeric type, as databases and CSV have them",
        "other numbers, text, times",
    ),
    Rule(
        "Int32, Int64",
        f"""whole numbers in range, of any integer type and byte order; floats that are whole (3.0) and at most
        {EXACT:,} away from 0, because pandas makes floats of integers beside a null; Decimals that are whole""",
        """bools, 3.5, infinity, a float further from 0 than that (it may have been rounded), numbers out of range,
        text, times""",
    ),
    Rule(
        "Float32, Float64",
        """every real number: integers of any size (rounded to the nearest), floats, float16, Decimals; bools as 1.0 and
        0.0. What is too large is infinite""",
        "text, times, complex numbers",
    ),
    Rule(
        "String",
        "text, NumPy's text (U and T), categories and dictionaries of text; Arrow's string, large_string, string_view",
        f"bytes, numbers, bools, times, text that is not UTF-8, more than {LIMITS.string_bytes:,} bytes of UTF-8",
    ),
    Rule(
        "Timestamp",
        """datetime (without a zone it is UTC), date (its midnight UTC), datetime64 of every unit, timestamps and dates
        of pandas, Arrow and polars; whole numbers, as Int64 takes them, are microseconds since 1970 UTC; text in
        ISO 8601 that begins YYYY-MM-DD: `2024-01-02`, `2024-01-02T03:04:05.678901Z`, `2024-01-02 08:34+05:30`""",
        "bools, other text, times that do not fit 64 bits of microseconds",
    ),
    Rule(
        "Vector(n)",
        """n numbers for each row, as Float32 takes them: a list, a tuple, an array, a row of a matrix, Arrow's list,
        large_list, fixed_size_list or list_view. A list of numbers alone is one vector""",
        "another length, text, times",
    ),
)

ALIKE: Final = """
A **missing** value is None, NaN, NaT, pandas.NA, a null of Arrow or polars, a masked element of a NumPy array, nil of
MessagePack or null of JSON. In a stored feature it is NULL. A number of a vector may be missing: it is NaN. In the keys
of rows that are pushed, loaded or deleted, and in event times, a missing value is refused. In a key column of a request
it matches no row. In another request column of a model a Float or a Vector takes it as NaN, and every other type
refuses it, unless the model says what to take: `st.Model(..., missing={"tier": "nan"})`.

What is **finer than a microsecond** is cut off towards the past, also before 1970. A time is never a number: a datetime
is refused for a Float or Int column. A timedelta (a duration) is refused everywhere.

A **list of mixed values** is taken value by value: `[1, 2.5]` for an Int64 is refused for its 2.5. A single value
beside columns is repeated; arrays of no dimensions and scalars of NumPy, pandas and Arrow are single values.

What is **refused** is named with the column, its type, the value, the value's Python type or that of its array, and the
row: `column 'x' takes Int64; got 3.5 (float) at row 2`. Nothing of a request or push that has such a value is used.

## Text

CSV files, CSV bodies of `/invocations`, `column=value` of the command line and `--value` of `shorttail bench` hold
text, which one grammar reads:

- A whole number is `-?[0-9]+`, a decimal number `-?([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([eE][+-]?[0-9]+)?`. The column takes
  it as it takes that number, so an Int64 takes `3.0`. A float also reads `nan` (which is missing), `inf`, `-inf` and
  `infinity`, in any case. `1_0`, `+1` and `0x1F` are no numbers.
- A Bool also reads `true` and `false` in any case, a Timestamp ISO 8601 as above.
- Nothing is stripped: ` 1` is no number, and ` a ` is a text of three characters.
- An empty field is a missing value; an empty field in quotes (`""`) is the empty text. An empty line is a row with one
  empty field.
- A vector is its numbers with commas between them, in quotes in a file (`"1,2.5"`). In a CSV body it is as many fields
  as it has numbers. On the command line `v=1,2;3,4` is two vectors. For `bench` its numbers are separated by `/`.
- On the command line a value is a row of CSV: `tier=gold,tin` is two rows, `tier=` is a missing value, and
  `tier='""'` is the empty text.
"""

CANNOT: Final = (
    ("`Engine.predict`, `get_online_features`, `push`, `delete`", "nothing"),
    (
        "`Client` and `AsyncClient`",
        """Integers beyond 64 bits travel as floats, Decimals as floats or, where they are whole, as integers. What no
        column takes (bytes, durations, complex numbers, sets) is refused by the client, which does not know the
        column's type and so does not name it.""",
    ),
    (
        "`load`, `materialize`, `shorttail push FILE`: Parquet and Arrow",
        """A column has one type: no mixed values, no integers beyond 64 bits. A column has rows: no value alone. Arrow
        has no lone surrogates, no other byte order, and of NumPy's times those of s, ms, us and ns.""",
    ),
    ("the same, CSV", "All is text, see above."),
    (
        "Open Inference v2, JSON",
        """A tensor has one datatype: no mixed values. No NaN and no infinity (null is missing), no missing vector, no
        lone surrogates; times are text or microseconds. Data of every datatype may have nulls.""",
    ),
    ("Open Inference v2, binary", "As JSON, but NaN and infinity can be sent, and nothing else that is missing."),
    (
        "`/invocations`, JSON",
        """No NaN and no infinity (null is missing), no lone surrogates; times are text or microseconds; integers beyond
        64 bits are read as floats.""",
    ),
    ("`/invocations`, CSV; the command line; `shorttail bench`", "All is text, see above."),
    ("defaults of features", "A default is one value. A missing one is no default."),
)


def page() -> str:
    """The text of docs/types.md."""
    return "\n".join(lines()) + "\n"


def lines() -> Iterator[str]:
    yield "# What a column takes"
    yield ""
    yield "<!-- Made by `python -m shorttail.define.types_page`; change it there. -->"
    yield ""
    yield "A value becomes the same in a column of a type, or is refused in the same words, whichever way it comes in:"
    yield "embedded or through a client, pushed, loaded from a file, over HTTP, or from the command line."
    yield ""
    yield "| type | takes | refuses |"
    yield "|---|---|---|"
    for rule in RULES:
        yield f"| {rule.types} | {one_line(rule.takes)} | {one_line(rule.refuses)} |"
    yield from ALIKE.splitlines()
    yield ""
    yield "## What a way cannot express"
    yield ""
    yield "| way in | cannot express |"
    yield "|---|---|"
    for way, what in CANNOT:
        yield f"| {way} | {one_line(what)} |"


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
