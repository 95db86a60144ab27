"""Histograms of nanoseconds in HdrHistogram's buckets. NumPy merges and reads them; hdrhistogram encodes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native.loadtest import COUNTS
from shorttail.errors import InvalidArgument
from shorttail.loadtest.rates import samples_for

HALF_BITS: Final = 10  # 1024 buckets per octave give three digits
HIGHEST_NS: Final = 3_600_000_000_000
SHOWN: Final = (50.0, 90.0, 99.0, 99.9, 99.99)

Counts = NDArray[np.uint64]


def _highest_values() -> NDArray[np.int64]:
    """Return the largest value of each bucket."""
    index = np.arange(COUNTS, dtype=np.int64)
    shift = np.maximum((index >> HALF_BITS) - 1, 0)
    highest: NDArray[np.int64] = ((index - (shift << HALF_BITS) + 1) << shift) - 1
    return highest


HIGHEST: Final = _highest_values()


@dataclass(slots=True)
class Histogram:
    """A histogram. counts: uint64 [COUNTS]. max_ns: the largest value, exact. sum_ns: the sum of the values."""

    counts: Counts
    max_ns: int = 0
    sum_ns: float = 0.0

    @classmethod
    def empty(cls) -> Histogram:
        return cls(np.zeros(COUNTS, np.uint64))

    @classmethod
    def merged(cls, parts: Iterable[tuple[Counts, int, float]]) -> Histogram:
        """Return the sum of histograms as the generator returns them: (counts, maximum, sum)."""
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
        """Return the percentiles in nanoseconds, with three digits; zeros if the histogram is empty."""
        ends = np.cumsum(self.counts)
        total = int(ends[-1])
        if not total:
            return [0] * len(percentiles)
        # HdrHistogram's rule: the rank is rounded and at least 1.
        ranks = [max(1, int(percentile / 100 * total + 0.5)) for percentile in percentiles]
        found = HIGHEST[np.searchsorted(ends, np.array(ranks, np.uint64))]
        return [min(int(value), self.max_ns) for value in found]

    def percentile(self, percentile: float) -> int:
        return self.at([percentile])[0]

    def shown(self, percentiles: Sequence[float] = SHOWN) -> dict[str, float]:
        """Return {"50": us, ...} with the percentiles that at least 100 values exceed."""
        enough = [p for p in percentiles if self.total >= samples_for(p)]
        return {f"{p:g}": ns / 1e3 for p, ns in zip(enough, self.at(enough), strict=True)}

    def curve(self, points_per_decade: int = 24) -> list[tuple[float, float]]:
        """Return (percentile, us) pairs, evenly spaced in log 1/(1 - p), up to the last that 100 values exceed."""
        if not self.total:
            return []
        last = max(np.log10(self.total / 100), 0.0)
        beyond = 10 ** -np.linspace(0, last, max(2, int(last * points_per_decade) + 1))
        percentiles = [float(p) for p in (1 - beyond) * 100]
        return [(p, ns / 1e3) for p, ns in zip(percentiles, self.at(percentiles), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: figures in us, and the whole histogram in HdrHistogram's encoding."""
        return {
            "count": self.total,
            "mean_us": round(self.mean_ns / 1e3, 3),
            "max_us": self.max_ns / 1e3,
            "percentiles_us": self.shown(),
            "hdr": self.encoded(),
        }

    def encoded(self) -> str:
        """Return HdrHistogram's standard V2 compressed encoding, in base64."""
        return str(self.to_hdr().encode().decode("ascii"))

    def to_hdr(self) -> Any:
        """Return the library's own histogram object, in ns."""
        hdr = new_hdr()
        np.frombuffer(hdr.counts, np.uint64)[:] = self.counts
        filled = np.flatnonzero(self.counts)
        if len(filled):
            hdr.set_internal_tacking_values(int(filled[0]), int(filled[-1]), self.total)
        return hdr

    @classmethod
    def decoded(cls, text: str, max_ns: int, mean_ns: float) -> Histogram:
        """Return the histogram that `encoded` encoded."""
        hdr = new_hdr()
        hdr.decode_and_add(text.encode("ascii"))
        counts = np.frombuffer(hdr.counts, np.uint64).copy()
        return cls(counts, max_ns, mean_ns * float(counts.sum()))


def new_hdr() -> Any:
    """Return an empty histogram of the library. Raises InvalidArgument if the library is not installed."""
    return require_library()(1, HIGHEST_NS, HALF_BITS * 3 // 10)


def require_library() -> Any:
    """Return the class HdrHistogram. Raises InvalidArgument if hdrhistogram is not installed."""
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError:
        raise InvalidArgument(
            "load tests need the hdrhistogram library; install it with `pip install 'shorttail[bench]'`"
        ) from None
    return HdrHistogram


def write_log(path: str, started_s: float, slices: Sequence[tuple[str, float, float, Histogram]]) -> None:
    """Write a log in HdrHistogram's format 1.2, with values in ns and the column of maxima in ms.

    started_s: seconds since 1970 UTC. slices: (tag, start, length, latencies), in seconds since `started_s`.
    """
    from hdrh.log import HistogramLogWriter

    with open(path, "w", encoding="ascii") as file:  # noqa: PTH123  the path is the user's
        writer = HistogramLogWriter(file)
        writer.output_log_format_version()
        writer.output_comment(f"[StartTime: {started_s:.3f} (seconds since epoch)]")
        writer.output_legend()
        for tag, start_s, length_s, histogram in slices:
            # The library's writer supports no tags, and treats a start of 0 as missing.
            largest_ms = histogram.max_ns / 1e6
            head = f"Tag={tag}," if tag else ""
            file.write(f"{head}{start_s:.3f},{length_s:.3f},{largest_ms:.3f},{histogram.encoded()}\n")
