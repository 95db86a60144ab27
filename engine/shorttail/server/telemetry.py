"""A worker's telemetry: its counters in the server's shared memory, and its log of failed and slow requests.

A batch costs one call, `Recorder.answered` in batcher.py. `tick` gathers everything else ten times a second.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shorttail._native.metrics import METHODS, PROTOCOLS
from shorttail.observe.logs import RequestLog, Seldom, trace_ids
from shorttail.observe.memory import WORD, MetricsMemory
from shorttail.observe.tallies import FUNCTIONS, LARGEST_DIFFERENCE, RUNS, SHADOWS, Kind, Labels, float_bits
from shorttail.server.accepting import RAISE
from shorttail.server.settings import ServerSettings

if TYPE_CHECKING:
    from shorttail._native.wire import Router
    from shorttail.engine import Engine
    from shorttail.pipeline import BatchResult
    from shorttail.server.accepting import Entrance, Room, SpareFile
    from shorttail.server.bulk_link import BulkLink
    from shorttail.server.errorlog import ErrorLog
    from shorttail.server.handover import Channel
    from shorttail.server.http.app import HttpServer
    from shorttail.server.shadow import ShadowThread

RPC: Final = PROTOCOLS.index("rpc")
PREDICT: Final = METHODS.index("predict")
FEATURES: Final = METHODS.index("get_online_features")

# Attributes of the native Router -> words of the process header.
ROUTER_COUNTERS: Final = {
    "accepted": "connections_total",
    "received_bytes": "received_bytes",
    "sent_bytes": "sent_bytes",
    "refused": "refused",
    "timed_out": "cut",
    "shed": "requests_shed",
}
ROUTER_GAUGES: Final = {"in_flight": "in_flight", "waiting_rows": "waiting_rows", "waiting_bytes": "waiting_bytes"}


@dataclass(frozen=True, slots=True)
class Sources:
    """The parts of a worker that count."""

    engine: Engine
    router: Router
    http: HttpServer | None
    shadows: ShadowThread
    large: BulkLink
    channel: Channel
    entrances: list[Entrance]
    spare: SpareFile
    room: Room
    faults: ErrorLog

    def counters(self) -> dict[str, int]:
        """Return {word of the process header: count of this process so far}."""
        router, http, channel = self.router, self.http, self.channel
        counts = {word: int(getattr(router, name)) for name, word in ROUTER_COUNTERS.items()}
        counts["refused"] += self.room.refused
        counts["handshakes_failed"] = channel.failed_handshakes + sum(door.failed_handshakes for door in self.entrances)
        counts["file_shortages"] = channel.lost + self.spare.turned_away
        counts["unexpected_errors"] = self.faults.total
        if http is not None:
            counts["http_connections_total"] = http.connections.opened
            counts["http_refused"] = http.connections.refused + http.room.refused
            counts["http_cut"] = http.connections.cut + http.bodies.timed_out
            counts["http_received_bytes"] = http.received_bytes
            counts["http_sent_bytes"] = http.sent_bytes
        return counts

    def gauges(self) -> dict[str, int]:
        """Return {word of the process header: its value now}."""
        router, http = self.router, self.http
        values = {word: int(getattr(router, name)) for name, word in ROUTER_GAUGES.items()}
        values |= {"connections": len(router.connections), "generation": max(0, self.engine.store.generation)}
        values |= {"large_in_flight": len(self.large.calls), "suspects": len(router.suspects)}
        if http is not None:
            values |= {"http_connections": len(http.connections), "http_in_flight": http.in_flight}
            values["http_large_in_flight"] = http.bulk.in_flight if http.bulk is not None else 0
        return values

    def tallies(self) -> Iterator[tuple[Kind, Labels, Any]]:
        """Yield (kind, labels, the object that counts) of the counters with labels."""
        for key, runner in self.engine.runners:
            yield RUNS, (key.model,), runner.counts
            for function, failed in list(runner.counts.functions.items()):
                yield FUNCTIONS, (key.model, function), failed
        for (model, _, version), state in list(self.shadows.states.items()):
            yield SHADOWS, (model, str(version)), state.counts


def counts_of(kind: Kind, counting: Any) -> list[int]:
    """Return the counts so far of an object that `Sources.tallies` yields."""
    if kind is FUNCTIONS:
        return list(counting)
    return [getattr(counting, name) for name in kind.values if name != "largest_difference"]


class Telemetry:
    """The counters and the request log of one worker.

    fd: the shared memory; -1 counts for this process alone. region: of that memory; None is any worker's.
    """

    def __init__(self, fd: int = -1, settings: ServerSettings | None = None, region: int | None = None):
        settings = settings or ServerSettings()
        self.memory = MetricsMemory.attach(fd) if fd >= 0 else MetricsMemory.create(1)
        self.recorder = self.memory.claim(region)
        self.tallies = self.memory.tallies()
        self.log = RequestLog(settings.log, settings.slow_ms * 1000, settings.log_failed)
        self.slow_ns = self.log.slow_ns or 1 << 62
        self._last: dict[str, int] = {}
        # Objects that count, by id -> (kind, labels, the object, its counts at the last tick). A version that is loaded
        # again has another object, which counts from 0.
        self._tallied: dict[int, tuple[Kind, Labels, Any, list[int]]] = {}
        self._max_connections = settings.max_connections
        self._refused, self._closed = Seldom(), Seldom()
        self._newest_ns = time.monotonic_ns()
        self._gc_started_ns = 0

    def close(self) -> None:
        if self._on_gc in gc.callbacks:
            gc.callbacks.remove(self._on_gc)

    def watch_gc(self) -> None:
        gc.callbacks.append(self._on_gc)

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_started_ns = time.perf_counter_ns()
        elif self._gc_started_ns:
            self.recorder.add(WORD["gc_collections"], 1)
            self.recorder.add(WORD["gc_pause_ns"], time.perf_counter_ns() - self._gc_started_ns)

    def slow_batch(
        self,
        model: str,
        result: BatchResult,
        requests: int,
        rows: int,
        opened_ns: int,
        start_ns: int,
        taken_ns: int,
        traces: Mapping[int, tuple[int, bytes]] | None,
    ) -> None:
        """Log a batch of MessagePack-RPC that took more than slow_ns. requests: answered ones; traces: Batch.traces."""
        of: dict[str, Any] = {
            "protocol": "rpc",
            "method": "predict" if model else "get_online_features",
            "model": model,
        }
        of |= {"duration_ms": _ms(taken_ns)}
        self.log.note(
            "warning",
            "slow batch",
            **of,
            queue_ms=_ms(start_ns - opened_ns),
            lookup_ms=_ms(result.looked_up_ns - start_ns),
            infer_ms=_ms(result.inferred_ns - result.prepared_ns) if result.inferred_ns else None,
            requests=requests,
            rows=rows,
        )
        for msgid, trace in (traces or {}).values():
            self._traced("warning", "slow request", msgid, trace, of)

    def wrote(self, method: str, code: str, message: str, msgid: int, taken_ns: int, trace: bytes | None) -> None:
        """Count, and perhaps log, the outcome of what the writer answers. msgid: -1 for a notification."""
        counted = method if method in METHODS else "other"
        self.recorder.requests(self.recorder.slot(METHODS.index(counted), ""), RPC, code, 1)
        slow = taken_ns > self.slow_ns
        if not (slow if code == "OK" else self.log.failed):
            return
        level = "error" if code == "INTERNAL" else "warning"
        fields: dict[str, Any] = {"protocol": "rpc", "method": method, "code": code, "error": message[:500]}
        fields |= {"duration_ms": _ms(taken_ns), "request_id": str(msgid) if msgid >= 0 else None}
        text = "slow request" if code == "OK" else "request failed"
        self.log.note(level, text, **fields, **trace_ids(_text(trace)))

    def tick(self, sources: Sources) -> None:
        """Bring the shared memory up to date, and log the requests that failed since the last call."""
        put = self.recorder.put
        now_ns = time.monotonic_ns()
        put(WORD["heartbeat_ns"], now_ns)
        if sources.engine.store.is_newest:
            self._newest_ns = now_ns
        put(WORD["reader_age_us"], (now_ns - self._newest_ns) // 1000)
        for word, value in sources.gauges().items():
            put(WORD[word], value)
        counters = sources.counters()
        self._refusals(sources, counters)
        for word, total in counters.items():
            self._count(word, total)
        self._count("log_lines_dropped", self.log.dropped_in_all)
        self._tally(sources)
        self._failures(sources.router)

    def _refusals(self, sources: Sources, counters: Mapping[str, int]) -> None:
        """Log now and then what too few files do to connections. HTTP logs by itself (server/http/connection.py)."""
        refused = counters["refused"] - self._last.get("refused", 0)
        if sources.router.max_connections < self._max_connections and (n := self._refused.count(refused)):
            most = sources.router.max_connections
            text = f"connections refused: this process may open so few files that it takes {most} of them; {RAISE}"
            self.log.note("warning", text, protocol="rpc", connections=n)
        if n := self._closed.count(counters["file_shortages"] - self._last.get("file_shortages", 0)):
            self.log.note("warning", f"connections closed: this process may open no more files; {RAISE}", connections=n)

    def _tally(self, sources: Sources) -> None:
        """Add what the counters with labels grew by. Those that are gone are read for the last time."""
        before, self._tallied = self._tallied, {}
        for kind, labels, counting in sources.tallies():
            _, _, _, last = before.pop(id(counting), (kind, labels, counting, [0] * len(kind.values)))
            self._tallied[id(counting)] = kind, labels, counting, self._tally_one(kind, labels, counting, last)
        for kind, labels, counting, last in before.values():
            self._tally_one(kind, labels, counting, last)

    def _tally_one(self, kind: Kind, labels: Labels, counting: Any, last: list[int]) -> list[int]:
        counts = counts_of(kind, counting)
        if counts != last and any(counts):
            self.tallies.add(kind, labels, [now - then for now, then in zip(counts, last, strict=False)])
            if kind is SHADOWS:
                self.tallies.put(kind, labels, LARGEST_DIFFERENCE, float_bits(counting.largest_difference))
        return counts

    def _failures(self, router: Router) -> None:
        """Count failed requests of MessagePack-RPC. Log a line for each traced one, and one per kind for the others."""
        errors, lines = router.take_errors(), Counter[tuple[str, str, str]]()
        for method, model, code, msgid, message, trace in router.take_traced():
            if self.log.failed and trace_ids(_text(trace)):
                lines[method, model, code] += 1
                of = {"protocol": "rpc", "method": method, "model": model, "code": code, "error": message[:500]}
                self._traced("error" if code == "INTERNAL" else "warning", "request failed", msgid, trace, of)
        for kind, (n, msgid, message) in errors.items():
            self._failed(*kind, n, n - lines[kind], msgid, message)

    def _count(self, word: str, total: int) -> None:
        """Add what a counter of this process grew by. The word may hold the count of an earlier process as well."""
        self.recorder.add(WORD[word], total - self._last.get(word, 0))
        self._last[word] = total

    def _failed(self, method: str, model: str, code: str, n: int, untold: int, msgid: int, message: str) -> None:
        """Count n failed requests of one kind. untold: those of them that have no line in the log yet."""
        self.recorder.requests(self.recorder.slot(METHODS.index(method), model), RPC, code, n)
        if not self.log.failed or untold <= 0:
            return
        fields: dict[str, Any] = {"model": model, "code": code, "error": message[:500]}
        fields |= {"requests": untold} if untold > 1 else {}
        fields |= {"request_id": str(msgid)} if msgid >= 0 else {}
        level = "error" if code == "INTERNAL" else "warning"
        self.log.note(level, "request failed", protocol="rpc", method=method, **fields)

    def _traced(self, level: str, text: str, msgid: int, trace: bytes, fields: Mapping[str, Any]) -> None:
        """Log a line for a request with a traceparent; no line if the traceparent is not valid."""
        if ids := trace_ids(_text(trace)):
            self.log.note(level, text, **fields, request_id=str(msgid), **ids)


def _text(trace: bytes | None) -> str | None:
    return None if trace is None else trace.decode("ascii", "replace")


def _ms(ns: int) -> float:
    return round(ns / 1e6, 3)
