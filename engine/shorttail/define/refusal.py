"""What is said of a value that a column does not take: in the same words for every way in."""

from __future__ import annotations

import reprlib
from typing import Any, Final

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.dtypes import DType
from shorttail.errors import InvalidArgument


class Refused(ValueError):
    """A value that a column of its type does not take. got: the value and its kind, as messages say it."""

    def __init__(self, got: str, row: int | None = None):
        super().__init__(got)
        self.got = got
        self.row = row

    def error(self, what: str, dtype: DType) -> InvalidArgument:
        """The error for users. what: "column 'x'", with what it belongs to before it."""
        row = "" if self.row is None else f" at row {self.row}"
        return InvalidArgument(f"{what} takes {dtype}; got {self.got}{row}")


def refused(column: str, dtype: DType, value: Any, row: int | None = None) -> InvalidArgument:
    """The error that says that a column does not take a value. row: None for a value alone."""
    return Refused(got(value), row).error(f"column '{column}'", dtype)


def got(value: Any, kind: str = "") -> str:
    """A value and its kind: "3.5 (float)". kind: the dtype of the array that held it, if it was in one."""
    return f"{shown(value)} ({kind or type(value).__name__})"


def numbers_of(count: int) -> str:
    """What a vector of another length is."""
    return f"{count} number{'' if count == 1 else 's'}"


def said_of_text(size: int) -> str:
    """What a text of so many bytes is that is refused: too long, or else not UTF-8."""
    if size > LIMITS.string_bytes:
        return f"text of {size} bytes, more than {LIMITS.string_bytes}"
    return "text that is not UTF-8"


def shown(value: Any) -> str:
    """A value for a message, at most 40 characters long."""
    if isinstance(value, np.datetime64 | np.timedelta64):
        text = str(value)
    else:
        text = _short.repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class _Short(reprlib.Repr):
    """Writes the first items of what is long, and nothing raises."""

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 128 else f"{'-' if value < 0 else ''}2**{value.bit_length() - 1}..."


_short: Final = _Short()
_short.maxstring = _short.maxother = 100
