"""A worker's telemetry: its counters in the server's shared memory, and its log of failed and slow requests.

A batch costs one call, `Recorder.answered` in batcher.py. `tick` gathers everything else ten times a second.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from shorttail._native.metrics import METHODS, PROTOCOLS
from shorttail.observe.logs import RequestLog, trace_ids
from shorttail.observe.memory import WORD, MetricsMemory
from shorttail.server.settings import ServerSettings

if TYPE_CHECKING:
    from shorttail._native.wire import Router
    from shorttail.engine import Engine
    from shorttail.pipeline import BatchResult
    from shorttail.server.http.app import HttpServer

RPC: Final = PROTOCOLS.index("rpc")
PREDICT: Final = METHODS.index("predict")
FEATURES: Final = METHODS.index("get_online_features")


class Telemetry:
    """The counters and the request log of one worker. fd: the shared memory; -1 counts for this process alone."""

    def __init__(self, fd: int = -1, settings: ServerSettings | None = None):
        settings = settings or ServerSettings()
        self.memory = MetricsMemory.attach(fd) if fd >= 0 else MetricsMemory.create(1)
        self.recorder = self.memory.claim()
        self.log = RequestLog(settings.log, settings.slow_ms * 1000, settings.log_failed)
        self.slow_ns = self.log.slow_ns or 1 << 62
        self._last: dict[str, int] = {}
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
        """Count, and perhaps log, the outcome of a push or delete. msgid: -1 for a notification."""
        self.recorder.requests(self.recorder.slot(METHODS.index(method), ""), RPC, code, 1)
        slow = taken_ns > self.slow_ns
        if not (slow if code == "OK" else self.log.failed):
            return
        level = "error" if code == "INTERNAL" else "warning"
        fields: dict[str, Any] = {"protocol": "rpc", "method": method, "code": code, "error": message[:500]}
        fields |= {"duration_ms": _ms(taken_ns), "request_id": str(msgid) if msgid >= 0 else None}
        text = "slow request" if code == "OK" else "request failed"
        self.log.note(level, text, **fields, **trace_ids(_text(trace)))

    def tick(self, engine: Engine, router: Router, http: HttpServer | None) -> None:
        """Bring the shared memory up to date, and log the requests that failed since the last call."""
        put = self.recorder.put
        now_ns = time.monotonic_ns()
        put(WORD["heartbeat_ns"], now_ns)
        if engine.store.is_newest:
            self._newest_ns = now_ns
        put(WORD["reader_age_us"], (now_ns - self._newest_ns) // 1000)
        put(WORD["generation"], max(0, engine.store.generation))
        put(WORD["connections"], len(router.connections))
        put(WORD["in_flight"], router.in_flight)
        self._count("connections_total", router.accepted)
        self._count("received_bytes", router.received_bytes)
        self._count("sent_bytes", router.sent_bytes)
        self._count("log_lines_dropped", self.log.dropped_in_all)
        if http is not None:
            put(WORD["http_connections"], len(http.connections))
            put(WORD["http_in_flight"], http.in_flight)
            self._count("http_connections_total", http.connections.opened)
            self._count("http_received_bytes", http.received_bytes)
            self._count("http_sent_bytes", http.sent_bytes)
        self._failures(router)

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
