"""Parses rates, durations and objectives as users write them: 10k, 1k:50k:x1.5, 1k..10k, 30s, p99=5ms."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6}
UNITS_S = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
RATE_FORMS = "10k, 1k,2k,5k, a sweep 1k:50k:x1.5 or 1k:10k:+1k, or a ramp 1k..10k"


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate in requests per second. It goes from `start` to `end` in a straight line over the step."""

    start: float
    end: float

    @property
    def mean(self) -> float:
        return (self.start + self.end) / 2

    def __str__(self) -> str:
        return f"{self.start:,.6g}" if self.start == self.end else f"{self.start:,.6g}..{self.end:,.6g}"


def parse_number(text: str, whole: str, forms: str = RATE_FORMS) -> float:
    """Return "1.5k" as 1500.0. whole: the user's whole text, for the error. Raises InvalidArgument."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([kKmM]?)", text.strip())
    value = float(found[1]) * SUFFIXES[found[2].lower()] if found else 0.0
    if not value > 0 or value > LIMITS.bench_rate_per_s:
        raise InvalidArgument(f"'{whole}' is not understood at '{text}'; write {forms}")
    return value


def parse_rates(text: str) -> list[Rate]:
    """Return the rates of --rate, a step for each. Raises InvalidArgument."""
    if ".." in text:
        start, _, end = text.partition("..")
        return [Rate(parse_number(start, text), parse_number(end, text))]
    if ":" not in text:
        return [Rate(rate, rate) for rate in (parse_number(part, text) for part in text.split(","))]
    parts = text.split(":")
    if len(parts) != 3 or parts[2][:1] not in ("x", "+"):
        raise InvalidArgument(
            f"'{text}' is not a sweep; write FIRST:LAST:xFACTOR or FIRST:LAST:+STEP, such as 1k:50k:x1.5"
        )
    first, last = parse_number(parts[0], text), parse_number(parts[1], text)
    by = parse_number(parts[2][1:], text)
    multiplies = parts[2][0] == "x"
    if last < first or (multiplies and by <= 1):
        raise InvalidArgument(f"'{text}' does not grow: LAST must be at least FIRST, and a factor above 1")
    steps = math.log(last / first) / math.log(by) if multiplies else (last - first) / by
    count = int(steps + 1e-9) + 1
    if count > LIMITS.bench_steps:
        raise InvalidArgument(f"'{text}' has {count:,} steps, more than {LIMITS.bench_steps}; use larger steps")
    rates = [first * by**i if multiplies else first + by * i for i in range(count)]
    return [Rate(rate, rate) for rate in rates]


def parse_seconds(text: str, name: str, zero: bool = False) -> float:
    """Return the seconds of "500ms", "30s", "2m" or "1.5". name: of the option, for the error. zero: 0 is allowed.

    Raises InvalidArgument.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(us|ms|s|m|h|)", text.strip())
    seconds = float(found[1]) * UNITS_S[found[2]] if found else -1.0
    if seconds < 0 or (seconds == 0 and not zero) or seconds > LIMITS.bench_duration_s:
        longest = f"at most {LIMITS.bench_duration_s / 3600:g}h"
        raise InvalidArgument(f"{name} '{text}' is not a duration; write 30s, 500ms, 2m or seconds, {longest}")
    return seconds


@dataclass(frozen=True, slots=True)
class Objective:
    """A latency objective: the percentile must be at most `limit_s` seconds."""

    percentile: float
    limit_s: float

    @property
    def samples(self) -> int:
        """The number of answers that the percentile needs."""
        return samples_for(self.percentile)

    def __str__(self) -> str:
        return f"P{self.percentile:g} <= {self.limit_s * 1e3:g} ms"


def samples_for(percentile: float) -> int:
    """Return the number of values of which 100 lie beyond the percentile: 10,000 for P99."""
    return math.ceil(100 / (1 - percentile / 100) - 1e-6)


def parse_objective(text: str) -> Objective:
    """Return the objective of "p99=5ms". Raises InvalidArgument."""
    found = re.fullmatch(r"[pP](\d+(?:\.\d+)?)\s*(?:<=|<|=)\s*(.+)", text.strip())
    if not found or not 0 < float(found[1]) <= 99.99:
        raise InvalidArgument(f"--slo '{text}' is not understood; write a percentile up to 99.99 and a time: p99=5ms")
    return Objective(float(found[1]), parse_seconds(found[2], "--slo"))
