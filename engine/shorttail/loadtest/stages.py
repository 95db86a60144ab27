"""Shows where the server's time goes during a load: reads its histograms of stages before and after each step.

/metrics is not read during a step. docs/metrics.md describes the stages.
"""

from __future__ import annotations

import http.client
import ipaddress
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from shorttail import protocol
from shorttail._native.metrics import STAGES as MEASURED
from shorttail.client.calls import reason
from shorttail.config import DEFAULT_HOST, DEFAULT_HTTP_PORT, LIMITS
from shorttail.errors import InvalidArgument, Unavailable
from shorttail.loadtest.rates import samples_for
from shorttail.loadtest.result import Step
from shorttail.loadtest.target import Target
from shorttail.loadtest.text import STAGES

TOTAL: Final = MEASURED[-1]  # the sum of the other stages
HISTOGRAM: Final = "shorttail_stage_duration_seconds"
TIMEOUT_S: Final = 5.0
OFF: Final = "off"
ANSWERED: Final = 0.5  # the server must have counted this share of the good answers, or it is another server


@dataclass(slots=True)
class Counts:
    """Counters of the server, summed over all methods, models and workers.

    at_s: the monotonic time of the reading. buckets: stage -> upper bound in seconds -> observations up to the bound.
    sums_s: stage -> seconds. cpu_s: worker -> seconds of CPU. is_ours: the server is a shorttail server.
    """

    at_s: float = 0.0
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    sums_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_s: dict[str, float] = field(default_factory=dict)
    answered: float = 0.0
    rows: float = 0.0
    is_ours: bool = False


def parse(text: str) -> Counts:
    """Parse Prometheus text. Raises ValueError or KeyError for other text, ImportError without prometheus-client."""
    from prometheus_client.parser import text_string_to_metric_families

    found = Counts(at_s=time.monotonic())
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels, value = sample.name, sample.labels, sample.value
            if name == f"{HISTOGRAM}_bucket":
                found.buckets[labels["stage"]][float(labels["le"])] += value
            elif name == f"{HISTOGRAM}_sum":
                found.sums_s[labels["stage"]] += value
            elif name == "shorttail_requests_total" and labels["code"] == "OK":
                found.answered += value
            elif name == "shorttail_rows_total":
                found.rows += value
            elif name == "shorttail_process_cpu_seconds_total":
                found.cpu_s[labels["worker"]] = value
            elif name == "shorttail_build_info":
                found.is_ours = True
    return found


def fetch(url: str) -> Counts:
    """Read the counters from a URL. Raises Unavailable; its message is only the reason."""
    # No proxy is used, because the load does not use one either.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            body = answer.read(LIMITS.bench_metrics_bytes + 1)
    except urllib.error.HTTPError as error:
        raise Unavailable(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise Unavailable(reason(error.reason) if isinstance(error.reason, OSError) else str(error.reason)) from None
    except http.client.HTTPException:
        raise Unavailable("the server there does not speak HTTP") from None
    except OSError as error:
        raise Unavailable(reason(error)) from None
    if len(body) > LIMITS.bench_metrics_bytes:
        raise Unavailable(f"more than {LIMITS.bench_metrics_bytes:,} bytes")
    try:
        found = parse(body.decode())
    except (ValueError, KeyError):
        raise Unavailable("the answer is not Prometheus text") from None
    except ImportError:
        raise Unavailable("reading it needs prometheus-client: pip install 'shorttail[bench]'") from None
    if not found.is_ours:
        raise Unavailable("the server there is not a shorttail server")
    return found


# -- the difference of two readings ------------------------------------------------------------------------------------


def between(before: Counts, after: Counts, good: int) -> dict[str, Any]:
    """Return the server's figures of a step for its JSON. good: the good answers that the generator received.

    A stage's mean is over all batches, also those without the stage, so that the stages add up to the total.
    Percentiles are interpolated linearly within a bucket, as Prometheus' histogram_quantile does, and are None if fewer
    than 100 observations lie beyond. Raises Unavailable if the counts cannot belong to this step.
    """
    answered = after.answered - before.answered
    counts = {stage: subtract(before.buckets[stage], after.buckets[stage]) for stage in MEASURED}
    if answered < 0 or any(count < 0 for buckets in counts.values() for count in buckets.values()):
        raise Unavailable("the server was restarted during the step, and its counters with it")
    if answered < ANSWERED * good:
        raise Unavailable(f"it counted {answered:,.0f} requests where {good:,} were answered: it is another server")
    batches = max(counts["queue"].values(), default=0.0)
    if not batches:
        raise Unavailable("the server counted no batches: the load had only pushes, or nothing was answered")
    sums_s = {stage: after.sums_s[stage] - before.sums_s[stage] for stage in STAGES}
    total_s = sum(sums_s.values())
    seconds = after.at_s - before.at_s
    shared = after.cpu_s.keys() & before.cpu_s.keys()
    used_s = [after.cpu_s[worker] - before.cpu_s[worker] for worker in shared]

    def describe(stage: str, sum_s: float) -> dict[str, Any]:
        return {
            "mean_us": round(sum_s / batches * 1e6, 3),
            "p50_us": quantile_us(counts[stage], 50),
            "p99_us": quantile_us(counts[stage], 99),
            "share": round(sum_s / total_s, 4) if total_s else 0.0,
        }

    return {
        "seconds": round(seconds, 3),
        "batches": round(batches),
        "requests": round(answered),
        "rows": round(after.rows - before.rows),
        "workers": len(after.cpu_s),
        # The share of a core, averaged over the workers in both readings; None if one of them was restarted.
        "worker_cpu": round(sum(used_s) / len(used_s) / seconds, 4) if used_s and min(used_s) >= 0 else None,
        "total": describe(TOTAL, total_s),
        "stages": {stage: describe(stage, sums_s[stage]) for stage in STAGES if any(counts[stage].values())},
    }


def subtract(before: Mapping[float, float], after: Mapping[float, float]) -> dict[float, float]:
    return {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}


def quantile_us(cumulative: Mapping[float, float], percentile: float) -> float | None:
    """Return a percentile in microseconds, None if there are too few observations.

    cumulative: upper bound in seconds -> observations up to the bound, ascending; the last bound is infinite.
    """
    total = max(cumulative.values(), default=0.0)
    if total < samples_for(percentile):
        return None
    rank = total * percentile / 100
    low_s, below = 0.0, 0.0
    for bound_s, count in cumulative.items():
        if count >= rank:
            if bound_s == float("inf"):
                break  # it took longer than the last finite bound; no more is known
            return round((low_s + (bound_s - low_s) * (rank - below) / (count - below)) * 1e6, 3)
        low_s, below = bound_s, count
    return round(low_s * 1e6, 3)


# -- around each step --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class StageWatch:
    """Reads `url` before and after each step. note: why the first step without stages has none."""

    url: str
    note: str = ""

    def around(self, run: Callable[[], Step]) -> Step:
        """Run a step and set its `server` to the figures of the server, if they can be read."""
        before = self._read()
        step = run()
        after = self._read() if before else None
        if before and after:
            try:
                step.server = between(before, after, step.outcomes["good"])
            except Unavailable as error:
                self._keep_note(str(error))
        return step

    def _read(self) -> Counts | None:
        try:
            return fetch(self.url)
        except Unavailable as error:
            self._keep_note(str(error))
            return None

    def _keep_note(self, reason: str) -> None:
        self.note = self.note or f"no times by stage from {self.url}: {reason}; give the server's URL with --metrics"


def find(option: str | None, target: Target) -> StageWatch | None:
    """Return a watch on the URL of --metrics (option), or on the default URL of a shorttail server on this machine.

    Returns None if there is no URL. Raises InvalidArgument; Unavailable if the given URL cannot be read.
    """
    if option == OFF:
        return None
    if option is None:
        url = default_url(target)
        return StageWatch(url) if url else None
    parts = urlsplit(option)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidArgument(f"--metrics '{option}' is not understood; write http://HOST:{DEFAULT_HTTP_PORT}/metrics")
    watch = StageWatch(option if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/metrics")
    try:
        fetch(watch.url)
    except Unavailable as error:
        raise Unavailable(f"--metrics {option}: {error}; `shorttail serve` prints its HTTP address") from None
    return watch


def default_url(target: Target) -> str:
    """Return the default URL of the metrics, "" for a server on another machine or a path that is not shorttail's."""
    if target.protocol == "http":
        parts = urlsplit(target.text)
        is_ours = is_local(parts.hostname or "") and target.path.startswith("/v2/")
        return f"http://{parts.netloc}/metrics" if is_ours else ""
    address = protocol.parse_address(target.text)
    host = DEFAULT_HOST if address.path is not None else address.host
    if not is_local(host):
        return ""
    return f"http://{f'[{host}]' if ':' in host else host}:{DEFAULT_HTTP_PORT}/metrics"


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
