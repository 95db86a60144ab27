"""The text of /metrics in the Prometheus format, with the counts of all processes of the server.

docs/metrics.md lists the metrics. The number of label values is bounded: methods, codes and stages are fixed, and
models are those of the store. prometheus_client writes the format.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from shorttail._native.metrics import BOUNDS_NS, CODES, PROTOCOLS, ROW_BOUNDS, STAGES
from shorttail.config import VERSION
from shorttail.observe.memory import BULK, MetricsMemory, Process, SlotCounts
from shorttail.observe.tallies import (
    FUNCTIONS,
    KINDS,
    LARGEST_DIFFERENCE,
    RUNS,
    SHADOWS,
    WRITES,
    Kind,
    Labels,
    float_of,
)

if TYPE_CHECKING:
    from shorttail.engine import Engine

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
SECONDS: Final = [repr(bound / 1e9) for bound in BOUNDS_NS]
ROWS: Final = [repr(float(bound)) for bound in ROW_BOUNDS]
TOTAL: Final = STAGES.index("total")

# Gauges with a sample for each worker: name, help, word of the process header, units of the word per unit of the gauge.
WORKER_GAUGES: Final = (
    ("store_generation", "Commits of the store that the worker has seen.", "generation", 1.0),
    (
        "store_reader_age_seconds",
        "How long the worker's snapshot has been older than the store; 0: it is the newest.",
        "reader_age_us",
        1e6,
    ),
)
# Metrics by protocol: name, help, and the words of the process header for MessagePack-RPC and for HTTP. The connections
# of the bulk worker are those of other workers, so it is left out.
PROTOCOL_GAUGES: Final = (
    ("connections", "Open connections.", "connections", "http_connections"),
    ("requests_in_flight", "Requests read and not yet answered.", "in_flight", "http_in_flight"),
    (
        "large_requests_in_flight",
        "Requests that the bulk worker has and has not answered.",
        "large_in_flight",
        "http_large_in_flight",
    ),
)
PROTOCOL_COUNTERS: Final = (
    ("connections_accepted", "Connections accepted.", "connections_total", "http_connections_total"),
    ("connections_refused", "Connections refused because there were too many.", "refused", "http_refused"),
    ("connections_cut", "Connections closed by a deadline, or to make room for others.", "cut", "http_cut"),
    ("received_bytes", "Bytes received.", "received_bytes", "http_received_bytes"),
    ("sent_bytes", "Bytes sent.", "sent_bytes", "http_sent_bytes"),
)
# Metrics of the whole server: name, help, word of the process header, units of the word per unit of the metric.
SERVER_COUNTERS: Final = (
    ("requests_shed", "Requests refused because of overload.", "requests_shed", 1.0),
    ("handshakes_failed", "Connections that ended before they were served.", "handshakes_failed", 1.0),
    ("file_shortages", "Connections closed because a process could open no more files.", "file_shortages", 1.0),
    ("unexpected_errors", "Exceptions that are a fault of the server.", "unexpected_errors", 1.0),
    (
        "hung_workers",
        "Workers killed because their event loop hung or they were not ready in time.",
        "hung_workers",
        1.0,
    ),
    ("writes_refused", "Pushes and deletes that the writer refused as they came.", "writes_refused", 1.0),
    ("gc_collections", "Garbage collections of the interpreters.", "gc_collections", 1.0),
    ("gc_pause_seconds", "Time that the interpreters paused for garbage collection.", "gc_pause_ns", 1e9),
    ("log_lines_dropped", "Log lines left out because there were too many.", "log_lines_dropped", 1.0),
)
SERVER_GAUGES: Final = (
    ("waiting_rows", "Rows of requests that were read and not yet answered.", "waiting_rows"),
    ("waiting_bytes", "Bytes of these requests of MessagePack-RPC.", "waiting_bytes"),
    ("suspects", "Senders of rows that make models fail, whose requests are batched apart.", "suspects"),
    ("banned_models", "Model versions that are not run, because processes died in their runs.", "banned_models"),
    ("queued_write_rows", "Rows that wait in the writer for the next commit.", "queued_rows"),
    ("queued_write_bytes", "Bytes of these rows on the wire.", "queued_bytes"),
)
RESTARTS: Final = (("worker", "worker_restarts"), ("writer", "writer_restarts"), ("bulk", "bulk_restarts"))
# Counters with labels of the catalog: name, help, kind, the label that tells values apart (None: there is one), and
# (value of that label, value of the kind).
TALLIED: Final = (
    (
        "push_rows",
        "Rows given to pushes that were acknowledged, by what became of them.",
        WRITES,
        "outcome",
        tuple((value, value) for value in ("stored", "older", "duplicate")),
    ),
    ("deleted_rows", "Rows that deletes removed.", WRITES, None, (("", "deleted"),)),
    (
        "on_demand_failed_rows",
        "Rows for which an on-demand function gave no value, so that it was missing.",
        FUNCTIONS,
        "reason",
        (("error", "error"), ("length", "length")),
    ),
    (
        "model_failed_runs",
        "Runs of a model that ended with an error or for their time.",
        RUNS,
        "reason",
        (("error", "failed"), ("run_timeout", "timed_out"), ("loop_limit", "left_loop")),
    ),
    ("model_part_runs", "Runs of batches whose requests do not all share a run.", RUNS, None, (("", "in_parts"),)),
    (
        "requests_refused_again",
        "Requests refused without a run, because the same rows were refused just before.",
        RUNS,
        None,
        (("", "refused_again"),),
    ),
    ("shadow_batches", "Batches that a shadow ran on.", SHADOWS, None, (("", "batches"),)),
    ("shadow_rows", "Rows that a shadow answered.", SHADOWS, None, (("", "rows"),)),
    ("shadow_rows_differing", "Rows that a shadow answered otherwise.", SHADOWS, None, (("", "rows_differing"),)),
    ("shadow_errors", "Batches on which a shadow failed.", SHADOWS, None, (("", "errors"),)),
    ("shadow_skipped_batches", "Batches that came while the shadow still ran.", SHADOWS, None, (("", "skipped"),)),
)


def exposition(memory: MetricsMemory, engine: Engine) -> bytes:
    """Return the text of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(memory, engine))
    return generate_latest(registry)


class ServerCollector(Collector):
    """Collects the metrics of a server from the memory that its processes share."""

    def __init__(self, memory: MetricsMemory, engine: Engine):
        self.memory = memory
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []  # otherwise registering would collect all metrics

    def collect(self) -> Iterator[Metric]:
        yield from _requests(self.memory.slots())
        processes = self.memory.processes()
        yield from _by_protocol([process for process in processes if process.region != BULK])
        yield from _by_worker([process for process in processes if process.has_loop and process.living])
        yield from _server(processes)
        yield from _tallied(self.memory.tallied())
        info = GaugeMetricFamily(
            "shorttail_model_info", "1 for the version of each model that serves.", labels=["model", "version"]
        )
        for name, entry in self.engine.store.catalog.models.items():
            info.add_metric([name, str(entry.current)], 1.0)
        yield info


def _requests(slots: dict[tuple[str, str], SlotCounts]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "shorttail_requests", "Requests by outcome.", labels=["protocol", "method", "model", "code"]
    )
    rows = CounterMetricFamily("shorttail_rows", "Rows answered.", labels=["method", "model"])
    batches = HistogramMetricFamily("shorttail_batch_rows", "Rows of a batch.", labels=["method", "model"])
    stages = HistogramMetricFamily(
        "shorttail_stage_duration_seconds",
        "Time of a batch in each stage; queue is that of its oldest request, total is from its arrival to the reply.",
        labels=["method", "model", "stage"],
    )
    commits = HistogramMetricFamily("shorttail_commit_duration_seconds", "Time of a commit of pushes and deletes.")
    for (method, model), counts in sorted(slots.items()):
        n_codes = len(CODES)
        for number, n in enumerate(counts.requests):
            if n:
                requests.add_metric([PROTOCOLS[number // n_codes], method, model, CODES[number % n_codes]], n)
        if not any(counts.batches):
            if method == "push" and any(counts.stages[TOTAL]):  # the writer counts its commits there
                words = counts.stages[TOTAL]
                commits.add_metric([], _cumulative(SECONDS, words[:-1]), words[-1] / 1e9)
            continue
        rows.add_metric([method, model], counts.rows)
        batches.add_metric([method, model], _cumulative(ROWS, counts.batches), counts.rows)
        for stage, words in zip(STAGES, counts.stages, strict=True):
            if any(words[:-1]):
                stages.add_metric([method, model, stage], _cumulative(SECONDS, words[:-1]), words[-1] / 1e9)
    yield from (requests, rows, batches, stages, commits)


def _cumulative(bounds: Sequence[str], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the (upper bound, cumulative count) pairs of a histogram; its last bucket is "+Inf"."""
    total, buckets = 0, []
    for bound, count in zip([*bounds, "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def _by_protocol(processes: list[Process]) -> Iterator[Metric]:
    for name, text, *words in PROTOCOL_GAUGES:
        gauge = GaugeMetricFamily(f"shorttail_{name}", text, labels=["protocol"])
        for protocol, word in zip(PROTOCOLS, words, strict=True):
            gauge.add_metric([protocol], sum(process.header[word] for process in processes if process.living))
        yield gauge
    for name, text, *words in PROTOCOL_COUNTERS:
        counter = CounterMetricFamily(f"shorttail_{name}", text, labels=["protocol"])
        for protocol, word in zip(PROTOCOLS, words, strict=True):
            counter.add_metric([protocol], sum(process.header[word] for process in processes))
        yield counter


def _by_worker(workers: list[Process]) -> Iterator[Metric]:
    for name, text, word, unit in WORKER_GAUGES:
        gauge = GaugeMetricFamily(f"shorttail_{name}", text, labels=["worker"])
        for worker in workers:
            gauge.add_metric([worker.name], worker.header[word] / unit)
        yield gauge
    heartbeat = GaugeMetricFamily(
        "shorttail_loop_heartbeat_age_seconds",
        "Time since the last turn of the worker's event loop.",
        labels=["worker"],
    )
    memory = GaugeMetricFamily("shorttail_process_resident_memory_bytes", "Resident memory.", labels=["worker"])
    cpu = CounterMetricFamily("shorttail_process_cpu_seconds", "CPU time, user and system.", labels=["worker"])
    now_ns = time.monotonic_ns()
    for worker in workers:
        label = [worker.name]
        if worker.header["heartbeat_ns"]:
            heartbeat.add_metric(label, max(0, now_ns - worker.header["heartbeat_ns"]) / 1e9)
        usage = process_usage(worker.header["pid"])
        if usage is not None:
            cpu.add_metric(label, usage[0])
            memory.add_metric(label, usage[1])
    yield from (heartbeat, memory, cpu)


def process_usage(pid: int) -> tuple[float, int] | None:
    """Return the CPU seconds and the resident bytes of a process, from /proc (proc(5)); None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S, int(fields[21]) * PAGE_BYTES


def _server(processes: list[Process]) -> Iterator[Metric]:
    def total(word: str) -> int:
        return sum(process.header[word] for process in processes)

    restarts = CounterMetricFamily("shorttail_restarts", "Processes started again after they died.", labels=["process"])
    for process, word in RESTARTS:
        restarts.add_metric([process], total(word))
    yield restarts
    for name, text, word, unit in SERVER_COUNTERS:
        yield CounterMetricFamily(f"shorttail_{name}", text, value=total(word) / unit)
    for name, text, word in SERVER_GAUGES:
        value = sum(process.header[word] for process in processes if process.living)
        yield GaugeMetricFamily(f"shorttail_{name}", text, value=value)
    running = sum(process.living and process.is_worker for process in processes)
    yield GaugeMetricFamily("shorttail_workers", "Workers that run.", value=running)
    info = GaugeMetricFamily("shorttail_build_info", "1, with the versions.", labels=["version", "python"])
    info.add_metric([VERSION, platform.python_version()], 1.0)
    yield info


def _tallied(tallies: dict[tuple[int, Labels], list[int]]) -> Iterator[Metric]:
    by_kind: dict[Kind, list[tuple[Labels, list[int]]]] = {kind: [] for kind in KINDS}
    for (number, labels), values in sorted(tallies.items()):
        by_kind[KINDS[number]].append((labels, values))
    for name, text, kind, told_by, parts in TALLIED:
        family = CounterMetricFamily(
            f"shorttail_{name}", text, labels=[*kind.labels, *([told_by] if told_by is not None else [])]
        )
        for labels, values in by_kind[kind]:
            for part, value in parts:
                shown = [*labels, part] if told_by is not None else labels
                family.add_metric(shown, values[kind.values.index(value)])
        yield family
    largest = GaugeMetricFamily(
        "shorttail_shadow_largest_difference", "Largest difference of two numbers.", labels=SHADOWS.labels
    )
    for labels, values in by_kind[SHADOWS]:
        largest.add_metric(labels, float_of(values[LARGEST_DIFFERENCE]))
    yield largest
