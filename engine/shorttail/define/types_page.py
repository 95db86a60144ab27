"""docs/types.md: what a column of each type takes, and which values the ways in cannot express.

    python -m shorttail.define.types_page > docs/types.md

The rules themselves are in define/scalar.py and define/values.py; tests/e2e/test_types.py sends every kind of value
through every way in, and holds them to one outcome.
"""

from __future__ import annotations

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
        "whole numbers in range, of any integer type and byte order; floats that are whole (3.0) and at most "
        f"{EXACT:,} from 0, because pandas makes floats of integers beside a null; Decimals that are whole",
        "bools, 3.5, infinity, a float beyond that (it may have been rounded), numbers out of range, text, times",
    ),
    Rule(
        "Float32, Float64",
        "every real number: integers of any size (rounded to the nearest), floats, float16, Decimals; bools as 1.0 and "
        "0.0. What is too large is infinite",
        "text, times, complex numbers",
    ),
    Rule(
        "String",
        "text, NumPy's text (U and T), categories and dictionaries of text; Arrow's string, large_string, string_view",
        f"bytes, numbers, bools, times, text that is not UTF-8, more than {LIMITS.string_bytes:,} bytes of UTF-8",
    ),
    Rule(
        "Timestamp",
        "datetime (without a zone it is UTC), date (its midnight UTC), datetime64 of every unit, timestamps and dates of "
        "pandas, Arrow and polars; whole numbers, as Int64 takes them, are microseconds since 1970 UTC; text in ISO 8601 "
        "that begins YYYY-MM-DD: `2024-01-02`, `2024-01-02T03:04:05.678901Z`, `2024-01-02 08:34+05:30`",
        "bools, other text, times that do not fit 64 bits of microseconds",
    ),
    Rule(
        "Vector(n)",
        "n numbers for each row, as Float32 takes them: a list, a tuple, an array, a row of a matrix, Arrow's list, "
        "large_list, fixed_size_list or list_view. A list of numbers alone is one vector",
        "another length, text, times",
    ),
)

ALIKE: Final = (
    "A **missing** value is None, NaN, NaT, pandas.NA, a null of Arrow or polars, a masked element of a NumPy array, nil "
    "of MessagePack or null of JSON. In a stored feature it is NULL. In a vector, one number may be missing: it is NaN. "
    "In keys of rows that are pushed, loaded or deleted, and in event times, it is refused. In a key column of a request "
    "it matches no row. In another request column of a model a Float or a Vector takes it as NaN, and every other type "
    'refuses it, unless the model says what to take: `st.Model(..., missing={"tier": "nan"})`.',
    "What is **finer than a microsecond** is cut off towards the past, also before 1970. A time is never a number: a "
    "datetime is refused for a Float or Int column. A timedelta (duration) is refused everywhere.",
    "A **list of mixed values** is taken value by value: `[1, 2.5]` for an Int64 is refused for its 2.5. A single value "
    "beside columns is repeated; arrays of no dimensions and scalars of NumPy, pandas and Arrow are single values.",
    "What is refused is named with its column, the column's type, the value, its Python type or the array's, and its "
    "row: `column 'x' takes Int64; got 3.5 (float) at row 2`. Of the rows of a push that has such a value none is "
    "stored.",
)

TEXT: Final = (
    "CSV files, CSV bodies of `/invocations`, `column=value` of the command line and `--value` of `shorttail bench` hold "
    "text, which one grammar reads:",
    "- A whole number is `-?[0-9]+`, a decimal number `-?([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([eE][+-]?[0-9]+)?`; the column "
    "takes it as it takes that number, so an Int64 takes `3.0`. Floats also read `nan` (which is missing), `inf`, `-inf` "
    "and `infinity`, in any case. `1_0`, `+1` and `0x1F` are no numbers.",
    "- Bool also reads `true` and `false` in any case; Timestamp reads ISO 8601 as above.",
    "- Nothing is stripped: ` 1` is no number, and ` a ` is a text of three characters.",
    '- An empty field is a missing value; an empty field in quotes (`""`) is the empty text. An empty line is a row '
    "with one empty field.",
    '- A vector is its numbers with commas between them, in quotes in a file (`"1,2.5"`); in a CSV body it is as many '
    "fields as it has numbers; on the command line `v=1,2;3,4` is two vectors; for `bench` its numbers are separated by "
    "`/`.",
    "- On the command line a value is a row of CSV: `tier=gold,tin` is two rows, `tier=` a missing value, and "
    "`tier='\"\"'` the empty text.",
)

CANNOT: Final = (
    ("`Engine.predict`, `get_online_features`, `push`, `delete`", "nothing"),
    (
        "`Client` and `AsyncClient`",
        "Integers beyond 64 bits travel as floats. Lists of Decimals travel as floats, or as integers where they are "
        "whole. MessagePack has no complex numbers, sets or durations: the client refuses them.",
    ),
    (
        "`load`, `materialize`, `shorttail push FILE` (Parquet, Arrow)",
        "A column has one type, so no mixed values, and no integers beyond 64 bits. A value alone is no column. Parquet "
        "has no lone surrogates, no string_view and no byte orders.",
    ),
    ("the same, CSV", "All is text: a column is what its fields say, and there are no bytes and no masks."),
    (
        "Open Inference v2, JSON",
        "One datatype for a tensor, so no mixed values; no NaN and no infinity (null is missing); no lone surrogates; "
        "times only as text or microseconds. A datatype that has no nulls may have them in its JSON data all the same.",
    ),
    ("Open Inference v2, binary", "As JSON, and no missing values but NaN in FP16, FP32 and FP64."),
    (
        "`/invocations`, JSON",
        "No NaN and no infinity (null is missing); no lone surrogates; times only as text or microseconds. Integers beyond "
        "64 bits are read as floats.",
    ),
    ("`/invocations`, CSV, the command line, `shorttail bench`", "All is text, see above."),
    ("defaults of features", "A default is one value: no columns. A missing one is no default."),
)


def page() -> str:
    """The text of docs/types.md."""
    lines = [
        "# What a column takes",
        "",
        "<!-- Made by `python -m shorttail.define.types_page`; change it there. -->",
        "",
        "A value becomes the same in a column of a type, or is refused in the same words, whichever way it comes in: "
        "embedded or through a client, pushed, loaded from a file, over HTTP, or from the command line.",
        "",
        "| type | takes | refuses |",
        "|---|---|---|",
        *(f"| {rule.types} | {rule.takes} | {rule.refuses} |" for rule in RULES),
        "",
    ]
    for text in ALIKE:
        lines += [text, ""]
    lines += ["## Text", "", TEXT[0], "", *TEXT[1:], "", "## What a way cannot express", ""]
    lines += ["| way in | cannot express |", "|---|---|", *(f"| {way} | {what} |" for way, what in CANNOT)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
