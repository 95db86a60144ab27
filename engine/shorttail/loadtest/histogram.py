"""Histograms of nanoseconds in HdrHistogram's buckets: merged and read with numpy, written by hdrhistogram."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native.loadtest import COUNTS
from shorttail.errors import InvalidArgument
from shorttail.loadtest.rates import samples_for

HALF_BITS: Final = 10  # 1024 buckets an octave: three digits
HIGHEST_NS: Final = 3_600_000_000_000
SHOWN: Final = (50.0, 90.0, 99.0, 99.9, 99.99)

Counts = NDArray[np.uint64]


def _highest_values() -> NDArray[np.int64]:
    """The largest value that falls into each bucket."""
    index = np.arange(COUNTS, dtype=np.int64)
    shift = np.maximum((index >> HALF_BITS) - 1, 0)
    highest: NDArray[np.int64] = ((index - (shift << HALF_BITS) + 1) << shift) - 1
    return highest


HIGHEST: Final = _highest_values()


@dataclass(slots=True)
class Histogram:
    """counts: uint64 [COUNTS]; max_ns exactly; sum_ns."""

    counts: Counts
    max_ns: int = 0
    sum_ns: float = 0.0

    @classmethod
    def empty(cls) -> Histogram:
        return cls(np.zeros(COUNTS, np.uint64))

    @classmethod
    def merged(cls, parts: Iterable[tuple[Counts, int, float]]) -> Histogram:
        """Of what the generator gives."""
        whole = cls.empty()
        for counts, max_ns, sum_ns in parts:
            whole.add(cls(counts, max_ns, sum_ns))
        return whole

    def add(self, other: Histogram) -> None:
        self.counts = self.counts + other.counts
        self.max_ns = max(self.max_ns, other.max_ns)
        self.sum_ns += other.sum_ns

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def mean_ns(self) -> float:
        return self.sum_ns / self.total if self.total else 0.0

    def at(self, percentiles: Sequence[float]) -> list[int]:
        """Nanoseconds that so many percent of the values do not exceed, to three digits. Zeros when it is empty."""
        ends = np.cumsum(self.counts)
        total = int(ends[-1])
        if not total:
            return [0] * len(percentiles)
        # HdrHistogram's rule: the rank is rounded, and is 1 at least.
        ranks = [max(1, int(percentile / 100 * total + 0.5)) for percentile in percentiles]
        found = HIGHEST[np.searchsorted(ends, np.array(ranks, np.uint64))]
        return [min(int(value), self.max_ns) for value in found]

    def percentile(self, percentile: float) -> int:
        return self.at([percentile])[0]

    def shown(self, percentiles: Sequence[float] = SHOWN) -> dict[str, float]:
        """{"50": us, ...}: those percentiles that enough values lie beyond to be spoken of."""
        enough = [p for p in percentiles if self.total >= samples_for(p)]
        return {f"{p:g}": ns / 1e3 for p, ns in zip(enough, self.at(enough), strict=True)}

    def curve(self, points_per_decade: int = 24) -> list[tuple[float, float]]:
        """(percentile, us) from 0 on, evenly spaced in log 1/(1 - p), as far as enough values lie beyond."""
        if not self.total:
            return []
        last = max(np.log10(self.total / 100), 0.0)
        beyond = 10 ** -np.linspace(0, last, max(2, int(last * points_per_decade) + 1))
        percentiles = [float(p) for p in (1 - beyond) * 100]
        return [(p, ns / 1e3) for p, ns in zip(percentiles, self.at(percentiles), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: times in us, and the whole histogram as HdrHistogram writes it."""
        return {
            "count": self.total,
            "mean_us": round(self.mean_ns / 1e3, 3),
            "max_us": self.max_ns / 1e3,
            "percentiles_us": self.shown(),
            "hdr": self.encoded(),
        }

    def encoded(self) -> str:
        """The standard V2 compressed form, in base64."""
        return str(self.to_hdr().encode().decode("ascii"))

    def to_hdr(self) -> Any:
        """As the library's own object, in ns."""
        hdr = new_hdr()
        np.frombuffer(hdr.counts, np.uint64)[:] = self.counts
        filled = np.flatnonzero(self.counts)
        if len(filled):
            hdr.set_internal_tacking_values(int(filled[0]), int(filled[-1]), self.total)
        return hdr

    @classmethod
    def decoded(cls, text: str, max_ns: int, mean_ns: float) -> Histogram:
        hdr = new_hdr()
        hdr.decode_and_add(text.encode("ascii"))
        counts = np.frombuffer(hdr.counts, np.uint64).copy()
        return cls(counts, max_ns, mean_ns * float(counts.sum()))


def new_hdr() -> Any:
    """Raises InvalidArgument without the library."""
    return require_library()(1, HIGHEST_NS, HALF_BITS * 3 // 10)


def require_library() -> Any:
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError:
        raise InvalidArgument(
            "load tests need the hdrhistogram library; install it with `pip install 'shorttail[bench]'`"
        ) from None
    return HdrHistogram


def write_log(path: str, started_s: float, slices: Sequence[tuple[str, float, float, Histogram]]) -> None:
    """A log in HdrHistogram's format 1.2, values in ns, its column of maxima in ms.

    slices: (tag, start, length, latencies), in seconds since `started_s`, a time since 1970.
    """
    from hdrh.log import HistogramLogWriter

    with open(path, "w", encoding="ascii") as file:  # noqa: PTH123  the path is the user's
        writer = HistogramLogWriter(file)
        writer.output_log_format_version()
        writer.output_comment(f"[StartTime: {started_s:.3f} (seconds since epoch)]")
        writer.output_legend()
        for tag, start_s, length_s, histogram in slices:
            # The library's writer knows no tags, and takes a start of 0 for none.
            largest_ms = histogram.max_ns / 1e6
            head = f"Tag={tag}," if tag else ""
            file.write(f"{head}{start_s:.3f},{length_s:.3f},{largest_ms:.3f},{histogram.encoded()}\n")
