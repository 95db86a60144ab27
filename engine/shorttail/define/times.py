"""Converts times of every kind to microseconds since 1970-01-01 UTC. An overflow raises Refused and never wraps."""

from __future__ import annotations

import datetime
import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.define.refusal import Refused, described, short_repr

EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
EPOCH_UTC: Final = datetime.datetime(1970, 1, 1)  # EPOCH without a time zone
MIDNIGHT: Final = datetime.time(0, tzinfo=datetime.UTC)
INT64_MAX: Final = 2**63 - 1

# NumPy time unit -> (multiplier, divisor) to microseconds. Months and years are converted to days first.
UNITS_US: Final = {
    "W": (604_800_000_000, 1),
    "D": (86_400_000_000, 1),
    "h": (3_600_000_000, 1),
    "m": (60_000_000, 1),
    "s": (1_000_000, 1),
    "ms": (1_000, 1),
    "us": (1, 1),
    "ns": (1, 10**3),
    "ps": (1, 10**6),
    "fs": (1, 10**9),
    "as": (1, 10**12),
}
YEARS_MAX: Final = 300_000  # from 1970; 64 bits of microseconds reach 292,000 years

TIME: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]+))?)?(Z|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)


def datetime_us(value: datetime.datetime) -> int:
    """Return microseconds since 1970-01-01 UTC. A datetime without a time zone is UTC. Raises Refused."""
    try:
        aware = value if value.utcoffset() is not None else value.replace(tzinfo=datetime.UTC)
        return (aware - EPOCH) // datetime.timedelta(microseconds=1)
    except Exception:  # a user's tzinfo class may raise anything
        raise Refused(described(value)) from None


def parse_time(text: str) -> int:
    """Return microseconds since 1970 UTC of ISO 8601 text: a date, or a date and a time. Raises Refused.

    Without a time zone it is UTC. Digits of a second after the sixth are cut off.
    """
    found = TIME.fullmatch(text)
    if found is None:
        raise Refused(f"{short_repr(text)} (str)")
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    fraction, zone = found[7], found[8]
    try:
        since = datetime.datetime(year, month, day, hour, minute, second) - EPOCH_UTC
    except ValueError:  # such as February 30
        raise Refused(f"{short_repr(text)} (str)") from None
    time_us = (since.days * 86_400 + since.seconds) * 1_000_000 + int(f"{(fraction or '')[:6]:0<6}")
    return time_us - _offset_minutes(zone, text) * 60_000_000


def time_text(time_us: int) -> str:
    """Return microseconds since 1970 UTC as ISO 8601 text that parse_time reads: "2026-01-31T12:00:00.25Z"."""
    text = str(np.datetime64(time_us, "us"))
    return f"{text.rstrip('0').rstrip('.')}Z"


def _offset_minutes(zone: str | None, text: str) -> int:
    if zone is None or zone == "Z":
        return 0
    hours, minutes = int(zone[1:3]), int(zone[3:].lstrip(":") or 0)
    if hours > 23 or minutes > 59:
        raise Refused(f"{short_repr(text)} (str)")
    return (60 * hours + minutes) * (-1 if zone[0] == "-" else 1)


def times_us(array: NDArray[Any], missing: NDArray[np.bool_] | None = None, kind: str = "") -> NDArray[np.int64]:
    """Convert a datetime64 array [n] of any unit to microseconds since 1970, rounded towards the past.

    Where `missing` is True the result is 0. kind: the array's type as errors name it. Raises Refused with the row of a
    time that does not fit 64 bits.
    """
    unit, count = np.datetime_data(array.dtype)
    ticks = array.astype(array.dtype.newbyteorder("="), copy=False).view(np.int64)
    if missing is not None:
        ticks = np.where(missing, 0, ticks)
    if unit == "generic":
        fits = np.zeros(len(ticks), np.bool_) if missing is None else missing
    elif unit in "YM":
        fits = np.abs(ticks.astype(np.float64)) * count < YEARS_MAX * (12 if unit == "M" else 1)
        days = np.where(fits, ticks, 0).view(f"M8[{count}{unit}]").astype("datetime64[D]").view(np.int64)
        ticks, unit, count = np.where(fits, days, ticks), "D", 1
    else:
        fits = np.ones(len(ticks), np.bool_)
    times, per = UNITS_US.get(unit, (1, 1))
    if per == 1:
        times = min(times * count, INT64_MAX)
        most = INT64_MAX // times
        fits &= (ticks <= most) & (ticks >= -most)
        found = np.where(fits, ticks, 0) * times
    elif count == 1:
        found = ticks // per
    else:  # Python ints do not overflow
        exact = [int(tick) * count // per for tick in ticks]
        fits &= np.array([-INT64_MAX <= value <= INT64_MAX for value in exact], np.bool_)
        found = np.array([value if fit else 0 for value, fit in zip(exact, fits.tolist(), strict=True)], np.int64)
    if not fits.all():
        bad = int(np.argmin(fits))
        raise Refused(described(array[bad], kind or str(array.dtype)), bad)
    return found
