"""Refuses event times that cannot be right: a wrong one would hide all later rows of its key, or be stale at once.

The moment at which a request has event times judged (`as_of`) is under the same rules, except that it may be ahead of
the clock.

An event time lies from 1970 to 2200, and is at most `max_clock_skew` ahead of the clock. The usual mistake is another
unit: seconds and milliseconds taken as microseconds lie in January 1970, and nanoseconds after the year 30,000. So a
number in January 1970 is refused too if it is a time from 2000 to now in one of these units. docs/types.md describes
the rules.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from numbers import Number
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shorttail.define import clock
from shorttail.define.dtypes import Timestamp
from shorttail.define.durations import UNIT_US, duration_text
from shorttail.define.refusal import Refused, described
from shorttail.define.scalar import as_value, unwrapped
from shorttail.define.times import TIME
from shorttail.errors import InvalidArgument

LATEST_US: Final = 7_258_118_400_000_000  # 2200-01-01
LIKELY_US: Final = 946_684_800_000_000  # 2000-01-01: the earliest time that a number in another unit is taken for
ZONES_US: Final = 14 * 3_600_000_000  # local times are up to 14 hours ahead of UTC
SMALL_UNITS: Final = (("seconds", 1_000_000), ("milliseconds", 1_000))  # unit -> microseconds

# A moment at which event times are judged: what a column of Timestamp takes. None: when the request runs.
AsOf: TypeAlias = datetime.date | np.datetime64 | str | int | None  # a datetime is a date


class ImpossibleTime(ValueError):
    """Raised for an event time that cannot be right. The message has the time and the reason. row: counted from 0."""

    def __init__(self, reason: str, row: int):
        super().__init__(reason)
        self.row = row


def check_event_times(times_us: NDArray[np.int64], given: Any, max_clock_skew_us: int | None) -> None:
    """Raise ImpossibleTime for the first event time that cannot be right.

    times_us: int64 [n], microseconds since 1970 UTC. given: the column that they were read from, or a single value.
    max_clock_skew_us: how far an event time may be ahead of the clock of this process; None if another process will
    compare it with its own clock.
    """
    if not len(times_us):
        return
    now_us = clock.now_us()
    newest_us = now_us + (max_clock_skew_us or 0)
    limit_us = LATEST_US if max_clock_skew_us is None else min(newest_us, LATEST_US)
    least_us = int(times_us.min())
    if least_us > newest_us // 1000 and int(times_us.max()) <= limit_us:
        return
    wrong = (times_us < 0) | (times_us > limit_us)
    suspects = np.zeros(len(times_us), np.bool_)
    for _, unit_us in SMALL_UNITS:
        suspects |= (times_us >= LIKELY_US // unit_us) & (times_us <= newest_us // unit_us)
    row = int(np.argmax(wrong)) if wrong.any() else len(times_us)
    if (number := _first_number(given, np.flatnonzero(suspects[:row]).tolist())) is not None:
        row = number
    if row < len(times_us):
        raise ImpossibleTime(_reason(int(times_us[row]), now_us, max_clock_skew_us), row)


def as_of_us(value: Any, what: str = "as_of") -> int:
    """Return the moment at which event times are judged, in microseconds since 1970 UTC.

    value: anything that a column of Timestamp takes. what: names it in errors. Raises InvalidArgument.
    """
    try:
        time_us = as_value(Timestamp, value)
        if time_us is None:
            raise Refused(described(value))
        check_event_times(np.array([time_us]), value, None)
    except Refused as error:
        raise InvalidArgument(
            f"{what} takes a datetime, ISO 8601 text or microseconds since 1970; got {error.got}"
        ) from None
    except ImpossibleTime as error:
        raise InvalidArgument(f"{what}: {error}") from None
    return int(time_us)


def _first_number(given: Any, rows: Iterable[int]) -> int | None:
    """Return the first of these rows in which a plain number was given, or None. A datetime has no unit to mistake."""
    for row in rows:
        value = _item(given, row)
        if not isinstance(value, str):
            if isinstance(value, Number):
                return row
            if not isinstance(given, list | tuple) and str(getattr(given, "dtype", "")).lower() != "object":
                return None  # a column of one type, which is not a number
        elif not TIME.fullmatch(value):
            return row
    return None


def _item(given: Any, row: int) -> Any:
    if hasattr(given, "iloc"):
        given = given.iloc
    elif isinstance(given, str) or not hasattr(given, "__getitem__") or getattr(given, "shape", None) == ():
        return unwrapped(given)
    return unwrapped(given[row])


def _reason(time_us: int, now_us: int, max_clock_skew_us: int | None) -> str:
    newest_us = now_us + (max_clock_skew_us or 0)
    for unit, unit_us in SMALL_UNITS:
        if LIKELY_US // unit_us <= time_us <= newest_us // unit_us:
            return _in_unit(time_us, unit, time_us * unit_us)
    if LIKELY_US <= time_us // 1000 <= newest_us:
        return _in_unit(time_us, "nanoseconds", time_us // 1000)
    if time_us < 0:
        return f"{_shown(time_us)} is before 1970"
    if time_us > LATEST_US or max_clock_skew_us is None:
        return f"{_shown(time_us)} is after 2200"
    ahead_us = time_us - now_us
    zone = "; is it a local time? Event times are UTC" if ahead_us <= ZONES_US else ""
    return (
        f"{_shown(time_us)} is {_about(ahead_us)} ahead of this host's clock "
        f"({_shown(now_us)}), and max_clock_skew is {duration_text(max_clock_skew_us)}{zone}"
    )


def _in_unit(time_us: int, unit: str, meant_us: int) -> str:
    return (
        f"{time_us} is {_shown(time_us)} in microseconds since 1970, and {_shown(meant_us)} in {unit}; "
        "give microseconds, or datetimes"
    )


def _about(length_us: int) -> str:
    """Return a length of time with one decimal, such as "2h" or "1.5d"."""
    unit = next((unit for unit in ("d", "h", "m", "s") if length_us >= UNIT_US[unit]), "ms")
    return f"{length_us / UNIT_US[unit]:,.1f}".removesuffix(".0") + unit


def _shown(time_us: int) -> str:
    return f"{np.datetime64(time_us // 1_000_000, 's')}Z"
