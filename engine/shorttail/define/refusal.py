"""Errors for a value that a column does not take. Every way in uses these words."""

from __future__ import annotations

import reprlib
from typing import Any, Final

import numpy as np

from shorttail.config import LIMITS
from shorttail.define.dtypes import DType
from shorttail.errors import InvalidArgument


class Refused(ValueError):
    """Raised for a value that a column of this type does not take.

    got: the value and its Python or array type, as the message shows them. row: None for a single value.
    """

    def __init__(self, got: str, row: int | None = None):
        super().__init__(got)
        self.got = got
        self.row = row

    def error(self, what: str, dtype: DType) -> InvalidArgument:
        """Return the error for the user. what: names the column, such as "view 'v': column 'x'"."""
        row = "" if self.row is None else f" at row {self.row}"
        return InvalidArgument(f"{what} takes {dtype}; got {self.got}{row}")


def described(value: Any, kind: str = "") -> str:
    """Return a value and its type, such as "3.5 (float)". kind: the dtype of the array that held it, if any."""
    return f"{short_repr(value)} ({kind or type(value).__name__})"


def described_length(count: int) -> str:
    """Describe a vector that has the wrong length, such as "3 numbers"."""
    return f"{count} number{'' if count == 1 else 's'}"


def described_text(size: int) -> str:
    """Describe a refused text of `size` bytes: it is too long, or else it is not UTF-8."""
    if size > LIMITS.string_bytes:
        return f"text of {size} bytes, more than {LIMITS.string_bytes}"
    return "text that is not UTF-8"


def short_repr(value: Any) -> str:
    """Return the repr of a value, cut to at most 40 characters."""
    if isinstance(value, np.datetime64 | np.timedelta64):
        text = str(value)
    else:
        text = _short.repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class _Short(reprlib.Repr):
    """Shows only the first items of a long value. It never raises; repr of an int of over 4,300 digits would."""

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 128 else f"{'-' if value < 0 else ''}2**{value.bit_length() - 1}..."


_short: Final = _Short()
_short.maxstring = _short.maxother = 100
