"""Writes docs/types.md: which values a column of each type takes, and which values each interface cannot express.

    python -m shorttail.define.types_page > docs/types.md

define/scalar.py and define/values.py implement the rules. tests/e2e/test_types.py sends every kind of value through
every interface, and checks that the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shorttail.config import LIMITS
from shorttail.define.scalar import EXACT


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table of types: which values these types take, and which they refuse."""

    types: str
    takes: str
    refuses: str


RULES: Final = (
    Rule(
        "Bool",
        "bools; 0 and 1 of any numeric type, because databases and CSV files write bools as numbers",
        "other numbers, text, times",
    ),
    Rule(
        "Int32, Int64",
        f"""integers in range, of any integer type and byte order; whole floats (3.0) of absolute value up to {EXACT:,},
        because pandas turns integers with a null into floats; whole Decimals""",
        """bools, 3.5, infinity, floats of larger absolute value (they may be rounded integers), numbers out of range,
        text, times""",
    ),
    Rule(
        "Float32, Float64",
        """every real number: integers of any size (rounded to the nearest float), floats, float16, Decimals; bools as
        1.0 and 0.0. A number that is too large becomes infinity""",
        "text, times, complex numbers",
    ),
    Rule(
        "String",
        "text, NumPy's text (U and T), categories and dictionaries of text; Arrow's string, large_string, string_view",
        f"bytes, numbers, bools, times, text that is not UTF-8, text of more than {LIMITS.string_bytes:,} UTF-8 bytes",
    ),
    Rule(
        "Timestamp",
        """datetime (UTC if it has no time zone), date (midnight UTC), datetime64 of every unit, timestamps and dates of
        pandas, Arrow and polars; every number that Int64 takes, as microseconds since 1970 UTC; ISO 8601 text that
        starts with YYYY-MM-DD: `2024-01-02`, `2024-01-02T03:04:05.678901Z`, `2024-01-02 08:34+05:30`""",
        "bools, other text, times that do not fit 64 bits of microseconds",
    ),
    Rule(
        "Vector(n)",
        """n numbers per row, each as Float32 takes it: a list, a tuple, an array, a row of a matrix, Arrow's list,
        large_list, fixed_size_list or list_view. A flat list of numbers is a single vector""",
        "vectors of another length, text, times",
    ),
)

NOTES: Final = """
The elements of a Vector(n) are Float32, and those of a `Vector(n, Float64)` are Float64. A request column that is a
vector and feeds an input of doubles is the latter. Vectors of on-demand functions have Float32 elements.

A **missing** value is None, NaN, NaT, pandas.NA, an Arrow or polars null, a masked element of a NumPy array, a
MessagePack nil or a JSON null. A stored feature holds it as NULL. A missing number inside a vector is NaN. Event times
and the keys of rows that are pushed, loaded or deleted refuse a missing value. In a key column of a request it matches
no row. In another request column of a model, Float and Vector columns take it as NaN, and every other type refuses it,
unless the model gives a value to use instead, `st.Model(..., missing={"tier": "nan"})`, or its file has one text for it
([models.md](models.md#missing-values); also for stored values that are missing).

**Times** are rounded to microseconds towards the past, also before 1970. A time is never a number: Float and Int
columns refuse a datetime. Every column refuses a timedelta (a duration).

A **list of mixed values** is converted value by value: an Int64 column refuses `[1, 2.5]` because of 2.5. A **single
value** beside longer columns is repeated. Arrays without dimensions, and NumPy, pandas and Arrow scalars, are single
values.

The **error** for a refused value names the column, its type, the value, the type of the value (or of its array) and the
row: `column 'x' takes Int64; got 3.5 (float) at row 2`. The whole request or push is then refused.

## Event times

The event time of a row says which row of a key is the latest, and with the view's TTL how long the row is served. A
wrong one would hide every later row of its key, or be stale at once. So a push or a load is refused as a whole, and the
error names the row, if an event time

- is before 1970 or after 2200;
- is more than `max_clock_skew` ahead of the clock of the process that takes the row: the server's writer, the command
  or the embedded engine. This is a setting of the store, an hour unless it was changed
  ([operations.md](operations.md#clocks)). A row within the skew is served at once;
- is a plain number in another unit than microseconds. Nanoseconds lie after 2200. A number that is a time from 2000 to
  now in seconds or in milliseconds would be in January 1970, and is refused with that unit.

```text
view 'v': column 'event_time' at row 0: 1795000000 is 1970-01-01T00:29:55Z in microseconds since 1970, and
2026-11-18T11:06:40Z in seconds; give microseconds, or datetimes
```

The last rule is for numbers alone. Times that say their unit (datetimes, datetime64, timestamps and dates of Arrow and
pandas, ISO 8601 text) are taken from 1970-01-01 on, so history of January 1970 is loaded as one of these.

A row without an event time gets the present time when it is committed, or 1 us more than the time of the stored row of
its key if that is later. So **a push without times is never older than what is stored**, whatever the clock does. All
rows of a load that have no event times get the time at which the load began.

## Text

CSV files, CSV bodies of `/invocations`, `column=value` on the command line and `--value` of `shorttail bench` contain
text. The same grammar reads all of them:

- An integer is `-?[0-9]+`, and a decimal number is `-?([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([eE][+-]?[0-9]+)?`. The column
  then takes or refuses that number by the table above, so an Int64 takes `3.0`. A Float also takes `nan` (a missing
  value), `inf`, `-inf` and `infinity`, in upper or lower case. `1_0`, `+1` and `0x1F` are not numbers.
- A Bool also takes `true` and `false`, in upper or lower case. A Timestamp also takes ISO 8601 as above.
- Spaces are kept: ` 1` is not a number, and ` a ` is a text of three characters.
- An empty field is a missing value. An empty field in quotes (`""`) is the empty text. An empty line is a row with one
  empty field.
- The numbers of a vector are separated by commas, so in a file the field is in quotes (`"1,2.5"`). In a CSV body each
  number of a vector is a field of its own. On the command line `v=1,2;3,4` is two vectors. For `bench` the numbers are
  separated by `/`.
- In `column=value` the column ends at the `=` after the longest known column that fits ([names.md](names.md)).
- On the command line a value is a row of CSV: `tier=gold,tin` is two rows, `tier=` is a missing value, and `tier='""'`
  is the empty text.
"""

NOT_EXPRESSIBLE: Final = (
    (
        "`Engine.predict`, `get_online_features`, `push`, `delete`; `load` of a dict or pandas",
        "These express every value.",
    ),
    (
        "`Client` and `AsyncClient`",
        """Integers of more than 64 bits are sent as floats, whole Decimals of up to 64 bits as integers, and other
        Decimals as floats. The client itself refuses values that no column takes (bytes, durations, complex numbers,
        sets); it does not know the column's type, so its error does not name it.""",
    ),
    (
        "`load`, `materialize`, `shorttail push FILE`: Parquet, Arrow and polars",
        """A column has a single type: no mixed values, no integers of more than 64 bits. A column has rows: no single
        values. Arrow has no lone surrogates, only the machine's byte order, and only the time units s, ms, us and
        ns.""",
    ),
    ("The same: CSV, and names of folders (`country=DE`)", "Every value is text, see above."),
    (
        "Open Inference v2, JSON",
        """A tensor has a single datatype: no mixed values. No NaN and no infinity (null is a missing value), no missing
        vector, no lone surrogates; times are text or microseconds. Data of every datatype may contain nulls.""",
    ),
    (
        "Open Inference v2, binary",
        "The same as JSON, but NaN and infinity can be sent. NaN is the only missing value: there are no nulls.",
    ),
    (
        "`/invocations`, JSON",
        """No NaN and no infinity (null is a missing value), no lone surrogates; times are text or microseconds;
        integers of more than 64 bits are read as floats.""",
    ),
    ("`/invocations`, CSV; the command line; `shorttail bench`", "Every value is text, see above."),
    ("defaults of features", "A default is a single value. A missing value means that the feature has no default."),
)


def page() -> str:
    """Return the text of docs/types.md."""
    return "\n".join(lines()) + "\n"


def lines() -> Iterator[str]:
    yield "# What a column takes"
    yield ""
    yield "<!-- Made by `python -m shorttail.define.types_page`; change it there. -->"
    yield ""
    yield "Every interface converts a value to the type of its column by the same rules, and refuses it with the same"
    yield "error: embedded calls, clients, pushes, loads from files, HTTP and the command line."
    yield ""
    yield "| type | takes | refuses |"
    yield "|---|---|---|"
    for rule in RULES:
        yield f"| {rule.types} | {one_line(rule.takes)} | {one_line(rule.refuses)} |"
    yield from NOTES.splitlines()
    yield ""
    yield "## Values that an interface cannot express"
    yield ""
    yield "| interface | limits |"
    yield "|---|---|"
    for interface, limits in NOT_EXPRESSIBLE:
        yield f"| {interface} | {one_line(limits)} |"


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
