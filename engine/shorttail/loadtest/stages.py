"""Where the server's time goes while a load runs: its own histograms of stages, read before and after each step.

Nothing is asked of /metrics during a step. docs/metrics.md says what the stages are.
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

TOTAL: Final = MEASURED[-1]  # what the stages before, one after the other, make up
HISTOGRAM: Final = "shorttail_stage_duration_seconds"
TIMEOUT_S: Final = 5.0
OFF: Final = "off"
ANSWERED: Final = 0.5  # of the good answers, that the server has to have counted to be the one that gave them


@dataclass(slots=True)
class Counts:
    """The sum of all methods, models and workers. buckets: stage -> upper bound in seconds -> observations at most
    that long; sums_s: stage -> seconds; cpu_s: worker -> seconds; at_s: monotonic."""

    at_s: float = 0.0
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    sums_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_s: dict[str, float] = field(default_factory=dict)
    answered: float = 0.0
    rows: float = 0.0
    is_ours: bool = False


def parse(text: str) -> Counts:
    """Prometheus text. Raises ValueError for what is none."""
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
    """Raises Unavailable, with the reason alone."""
    # Without proxies: a server on this machine or next to it is meant, as for the load itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            body = answer.read(LIMITS.bench_metrics_bytes + 1)
    except urllib.error.HTTPError as error:
        raise Unavailable(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise Unavailable(reason(error.reason) if isinstance(error.reason, OSError) else str(error.reason)) from None
    except http.client.HTTPException:
        raise Unavailable("what is there speaks no HTTP") from None
    except OSError as error:
        raise Unavailable(reason(error)) from None
    if len(body) > LIMITS.bench_metrics_bytes:
        raise Unavailable(f"more than {LIMITS.bench_metrics_bytes:,} bytes")
    try:
        found = parse(body.decode())
    except (ValueError, KeyError):
        raise Unavailable("what is there is no Prometheus text") from None
    except ImportError:
        raise Unavailable("reading it needs prometheus-client: pip install 'shorttail[bench]'") from None
    if not found.is_ours:
        raise Unavailable("there is another server there, none of shorttail")
    return found


# -- what happened between two readings --------------------------------------------------------------------------------


def between(before: Counts, after: Counts, good: int) -> dict[str, Any]:
    """The figures of one step, as they stand in its JSON. good: the answers that the generator got.

    A stage's mean is over all batches, whether or not they had it, so that the stages add up to the total. Percentiles
    are interpolated within a bucket, in a straight line as Prometheus' histogram_quantile does, and None where fewer
    than 100 observations lie beyond. Raises Unavailable when the counts cannot be this step's.
    """
    answered = after.answered - before.answered
    counts = {stage: subtract(before.buckets[stage], after.buckets[stage]) for stage in MEASURED}
    if answered < 0 or any(count < 0 for buckets in counts.values() for count in buckets.values()):
        raise Unavailable("the server was started again meanwhile, and its counters with it")
    if answered < ANSWERED * good:
        raise Unavailable(f"it counted {answered:,.0f} requests where {good:,} were answered: it is another server")
    batches = max(counts["queue"].values(), default=0.0)
    if not batches:
        raise Unavailable("no batches were counted: nothing but pushes, or nothing at all, was asked")
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
        # Of a core, on average of the workers; None when one was replaced.
        "worker_cpu": round(sum(used_s) / len(used_s) / seconds, 4) if used_s and min(used_s) >= 0 else None,
        "total": describe(TOTAL, total_s),
        "stages": {stage: describe(stage, sums_s[stage]) for stage in STAGES if any(counts[stage].values())},
    }


def subtract(before: Mapping[float, float], after: Mapping[float, float]) -> dict[float, float]:
    return {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}


def quantile_us(cumulative: Mapping[float, float], percentile: float) -> float | None:
    """cumulative: upper bounds in seconds, ascending, the last one infinite -> observations up to there."""
    total = max(cumulative.values(), default=0.0)
    if total < samples_for(percentile):
        return None
    wanted = total * percentile / 100
    low_s, below = 0.0, 0.0
    for bound_s, count in cumulative.items():
        if count >= wanted:
            if bound_s == float("inf"):
                break  # all that is known is that it took longer
            return round((low_s + (bound_s - low_s) * (wanted - below) / (count - below)) * 1e6, 3)
        low_s, below = bound_s, count
    return round(low_s * 1e6, 3)


# -- around each step --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class StageWatch:
    """Reads `url` before and after steps. note: why a step has no breakdown, the first time that one has none."""

    url: str
    note: str = ""

    def around(self, run: Callable[[], Step]) -> Step:
        before = self._read()
        step = run()
        after = self._read() if before else None
        if before and after:
            try:
                step.server = between(before, after, step.outcomes["good"])
            except Unavailable as error:
                self._say(str(error))
        return step

    def _read(self) -> Counts | None:
        try:
            return fetch(self.url)
        except Unavailable as error:
            self._say(str(error))
            return None

    def _say(self, why: str) -> None:
        self.note = self.note or f"no stage breakdown from {self.url}: {why}; --metrics URL names the server's"


def find(option: str | None, target: Target) -> StageWatch | None:
    """What --metrics names, or where a shorttail server on this machine has its metrics by default.

    None when there is nowhere to look. Raises InvalidArgument, and Unavailable when nothing is at the address given.
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
        raise Unavailable(f"--metrics {option}: {error}; `shorttail serve` says where its HTTP is") from None
    return watch


def default_url(target: Target) -> str:
    """ "" for a server on another machine, and for an HTTP path that is not one of ours."""
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
