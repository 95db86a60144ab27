"""The results of a step of a load test: its figures, its warnings and its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native.loadtest import OUTCOMES, Generator, Hiccups
from shorttail.loadtest.histogram import Histogram
from shorttail.loadtest.rates import Objective, Rate

FORMAT: Final = 1  # version of the JSON
LAG_LIMIT_US: Final = 100.0  # no warning for a send lag or machine noise below this
BUSY: Final = 0.9  # share of a core from which on a generator thread is near its limit
KEPT_UP: Final = 0.99  # achieved / offered rate from which on the server kept up
MIN_SLICE_SAMPLES: Final = 100  # least answers for the P99 of a slice


@dataclass(frozen=True, slots=True)
class Errors:
    """The errors with the same code. message: of the first of them."""

    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a step: the requests that were due in this part of the time. lag, hiccup: the largest, in us."""

    start_s: float
    length_s: float
    outcomes: dict[str, int]
    latency: Histogram
    lag_max_us: float
    hiccup_max_us: float

    def to_dict(self) -> dict[str, Any]:
        total = self.latency.total
        p50, p99 = (ns / 1e3 for ns in self.latency.at([50, 99]))
        return {
            "start_s": round(self.start_s, 6),
            "length_s": round(self.length_s, 6),
            **self.outcomes,
            "p50_us": p50 if total else None,
            "p99_us": p99 if total >= MIN_SLICE_SAMPLES else None,
            "max_us": self.latency.max_ns / 1e3 if total else None,
            "lag_max_us": self.lag_max_us,
            "hiccup_max_us": self.hiccup_max_us,
        }


@dataclass(slots=True)
class Step:
    """The result of a load with the same rate (None: closed loop).

    Counts are of requests that were due after the warm-up; rates are per second. latency: since a request was due.
    service: since it was sent. lag: how late the generator sent it. hiccups: how late the machine wakes a thread.
    """

    rate: Rate | None
    duration_s: float
    seconds: float  # from the end of the warm-up to the last answer
    outcomes: dict[str, int]
    due: int
    errors: dict[str, Errors]
    latency: Histogram
    service: Histogram
    lag: Histogram
    hiccups: Histogram
    by_kind: dict[str, Histogram]
    slices: list[Slice]
    counts: dict[str, int]
    cpu: float  # share of a core that the busiest generator thread used
    fatal: str = ""
    interrupted: bool = False
    server: dict[str, Any] | None = None  # the server's times by stage (stages.py), from its own metrics
    events: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    captures: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def offered_per_s(self) -> float:
        return self.due / self.duration_s if self.duration_s else 0.0

    @property
    def achieved_per_s(self) -> float:
        """Answers per second, good ones and errors."""
        answered = self.outcomes["good"] + self.outcomes["error"]
        return answered / self.seconds if self.seconds else 0.0

    @property
    def good_per_s(self) -> float:
        return self.outcomes["good"] / self.seconds if self.seconds else 0.0

    @property
    def bad_share(self) -> float:
        return 1 - self.outcomes["good"] / self.due if self.due else 0.0

    @property
    def kept_up(self) -> bool:
        return self.achieved_per_s >= KEPT_UP * self.offered_per_s

    @property
    def generator_kept_up(self) -> bool:
        """Whether requests were sent on time, so that the figures describe the server and not the generator."""
        lag_us = self.lag.percentile(99) / 1e3
        return lag_us <= max(LAG_LIMIT_US, 0.1 * self.latency.percentile(99) / 1e3)

    def meets(self, objective: Objective) -> bool:
        """Return whether the latency meets the objective, the server kept up, and almost no request failed."""
        return (
            self.latency.percentile(objective.percentile) <= objective.limit_s * 1e9
            and self.kept_up
            and self.bad_share <= min(0.001, 1 - objective.percentile / 100)
        )

    def warnings(self) -> list[str]:
        """Return sentences about conditions that spoil the figures."""
        found = []
        lag_us = self.lag.percentile(99) / 1e3
        if not self.generator_kept_up:
            found.append(
                f"the generator could not keep up: P99 of its own send lag is {lag_us:,.0f} us; "
                "use a machine of its own, --threads, or a lower rate"
            )
        if self.cpu > BUSY and self.rate is not None and not self.kept_up:
            found.append(f"a generator thread used {self.cpu:.0%} of a core; more --threads may offer more")
        if self.counts["blocked"]:
            found.append(
                f"{self.counts['blocked']:,} requests waited because every connection was full; the wait is in their "
                "latency (more --connections or --pipeline would put the queue into the server)"
            )
        noise_us, p99_us = self.hiccups.percentile(99.9) / 1e3, self.latency.percentile(99) / 1e3
        if self.hiccups.total and noise_us > p99_us / 2 and noise_us > LAG_LIMIT_US:
            found.append(
                f"this machine is noisy: 1 in 1,000 wake-ups was {noise_us:,.0f} us late, which is more than half of "
                "the measured P99"
            )
        if self.counts["reconnects"]:
            found.append(f"{self.counts['reconnects']:,} connections were lost and opened again")
        return found

    def to_dict(self) -> dict[str, Any]:
        lag_p50, lag_p99 = self.lag.at([50, 99])
        return {
            "rate_per_s": None if self.rate is None else [self.rate.start, self.rate.end],
            "offered_per_s": round(self.offered_per_s, 3),
            "achieved_per_s": round(self.achieved_per_s, 3),
            "good_per_s": round(self.good_per_s, 3),
            "duration_s": round(self.duration_s, 6),
            "seconds": round(self.seconds, 6),
            "requests": self.due,
            **self.outcomes,
            "errors": {code: {"count": e.count, "message": e.message} for code, e in self.errors.items()},
            "latency": self.latency.to_dict(),
            "service_time": self.service.to_dict(),
            "send_lag": {**self.lag.to_dict(), "p50_us": lag_p50 / 1e3, "p99_us": lag_p99 / 1e3},
            "machine_hiccups": self.hiccups.to_dict(),
            "by_kind": {name: histogram.to_dict() for name, histogram in self.by_kind.items()},
            "over_time": [part.to_dict() for part in self.slices],
            "counts": self.counts,
            "generator_cpu": round(self.cpu, 4),
            "fatal": self.fatal or None,
            "interrupted": self.interrupted,
            "server": self.server,
            "warnings": self.warnings(),
        }


def collect(
    rate: Rate | None, generators: Sequence[Generator], names: Sequence[str], hiccups: Hiccups, interrupted: bool
) -> Step:
    """Return the step's result from its generator threads. names: of the request templates."""
    results = [generator.results() for generator in generators]
    first = results[0]
    warm_ns = min(result["warm_ns"] for result in results)
    end_ns = max(result["end_ns"] for result in results)
    done_ns = max(end_ns, *(result["last_done_ns"] for result in results))
    delays, hiccups_start_ns, hiccups_worst = hiccups.results()
    slices = make_slices(generators, results, (hiccups_start_ns, hiccups_worst))
    by_kind = {
        name: Histogram.merged(generator.template_latency(i) for generator in generators)
        for i, name in enumerate(names)
    }
    latency = Histogram.empty()
    for part in by_kind.values():
        latency.add(part)
    seconds = max(end_ns - first["start_ns"], 1) / 1e9
    return Step(
        rate=rate,
        duration_s=max(end_ns - warm_ns, 0) / 1e9,
        seconds=max(done_ns - warm_ns, 0) / 1e9,
        outcomes={name: sum(result[name] for result in results) for name in OUTCOMES},
        due=sum(result["due"] for result in results),
        errors=merge_errors([error for result in results for error in result["errors"]]),
        latency=latency,
        service=Histogram.merged(result["service"] for result in results),
        lag=Histogram.merged(result["lag"] for result in results),
        hiccups=Histogram.merged([delays]),
        by_kind=by_kind if len(by_kind) > 1 else {},
        slices=slices,
        counts={
            name: sum(result[name] for result in results)
            for name in ("blocked", "unsent", "late_answers", "reconnects", "wrong_answers", "bytes_out", "bytes_in")
        },
        cpu=max(result["cpu_ns"] for result in results) / 1e9 / seconds,
        fatal=next((result["fatal"] for result in results if result["fatal"]), ""),
        interrupted=interrupted,
        events=np.concatenate([generator.events() for generator in generators]),
        captures=[pair for generator in generators for pair in generator.captures()],
    )


def merge_errors(errors: Sequence[tuple[str, str, int]]) -> dict[str, Errors]:
    counts: Counter[str] = Counter()
    messages: dict[str, str] = {}
    for code, message, count in errors:
        counts[code] += count
        messages.setdefault(code, message)
    return {code: Errors(count, messages[code]) for code, count in counts.most_common()}


def make_slices(
    generators: Sequence[Generator], results: Sequence[dict[str, Any]], hiccups: tuple[int, NDArray[np.uint32]]
) -> list[Slice]:
    """Return the slices of the step that had begun when it ended."""
    warm_ns, interval_ns, end_ns = results[0]["warm_ns"], results[0]["interval_ns"], results[0]["end_ns"]
    outcomes = sum(np.asarray(result["interval_outcomes"]) for result in results)
    lag = np.max([result["interval_lag_max_ns"] for result in results], axis=0)
    slices = []
    for i, counts in enumerate(np.asarray(outcomes)):
        start_ns = warm_ns + i * interval_ns
        if warm_ns == 0 or start_ns >= end_ns:
            break
        slices.append(
            Slice(
                start_s=i * interval_ns / 1e9,
                length_s=min(interval_ns, end_ns - start_ns) / 1e9,
                outcomes={name: int(n) for name, n in zip(OUTCOMES, counts, strict=True)},
                latency=Histogram.merged(generator.interval_latency(i) for generator in generators),
                lag_max_us=int(lag[i]) / 1e3,
                hiccup_max_us=worst_between(hiccups, start_ns, start_ns + interval_ns),
            )
        )
    return slices


HICCUP_SLICE_NS: Final = 100_000_000


def worst_between(hiccups: tuple[int, NDArray[np.uint32]], start_ns: int, end_ns: int) -> float:
    """Return the machine's worst delay between two times, in us. The times are rounded to HICCUP_SLICE_NS."""
    begun_ns, worst = hiccups
    first = max(start_ns - begun_ns, 0) // HICCUP_SLICE_NS
    last = max(end_ns - begun_ns, 0) // HICCUP_SLICE_NS + 1
    part = worst[first:last]
    return float(part.max()) if len(part) else 0.0
