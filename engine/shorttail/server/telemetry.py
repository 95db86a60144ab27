"""What a worker tells of itself: its counters in the server's shared memory, its log of failed and slow requests.

On the way of a batch stands one call, `batch`; everything else is gathered by `tick`, ten times a second.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any, Final

from shorttail._native.metrics import METHODS, PROTOCOLS
from shorttail.monitor.logs import RequestLog
from shorttail.monitor.memory import WORD, MetricsMemory
from shorttail.server.settings import Settings

if TYPE_CHECKING:
    from shorttail._native.wire import Batch, Router
    from shorttail.engine import Engine
    from shorttail.pipeline import BatchResult
    from shorttail.server.http.app import HttpServer
    from shorttail.server.writer_link import WriterLink

RPC: Final = PROTOCOLS.index("rpc")
PREDICT: Final = METHODS.index("predict")
FEATURES: Final = METHODS.index("get_online_features")


class Telemetry:
    """Of one worker. fd: the shared memory, -1: counts are this process's alone."""

    def __init__(self, fd: int = -1, settings: Settings | None = None):
        settings = settings or Settings()
        self.memory = MetricsMemory.attach(fd) if fd >= 0 else MetricsMemory.create(1)
        self.recorder = self.memory.claim()
        self.log = RequestLog(
            "json" if settings.log == "json" else "text", settings.slow_ms * 1000, settings.log_failed
        )
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

    def batch(self, batch: Batch, result: BatchResult, requests: int, rows: int, opened_ns: int, start_ns: int) -> None:
        """A batch of the wire was answered just now. requests: those that got their answer."""
        model = batch.route.plan.model
        taken_ns = self.recorder.answered(
            PREDICT if model else FEATURES,
            model,
            requests,
            rows,
            opened_ns,
            start_ns,
            result.looked_up_ns,
            result.prepared_ns,
            result.inferred_ns,
        )
        if taken_ns > self.slow_ns:
            self.log.note(
                "warning",
                "slow batch",
                protocol="rpc",
                method="predict" if model else "get_online_features",
                model=model,
                duration_ms=_ms(taken_ns),
                queue_ms=_ms(start_ns - opened_ns),
                lookup_ms=_ms(result.looked_up_ns - start_ns),
                infer_ms=_ms(result.inferred_ns - result.prepared_ns) if result.inferred_ns else None,
                requests=requests,
                rows=rows,
            )

    def tick(self, engine: Engine, router: Router, link: WriterLink, http: HttpServer | None) -> None:
        """Bring the shared memory up to date, and note what failed on the wire since the last time."""
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
            self._count("http_connections_total", http.connections_total)
            self._count("http_received_bytes", http.received_bytes)
            self._count("http_sent_bytes", http.sent_bytes)
        for (method, code), n in link.outcomes.items():
            self.recorder.requests(self.recorder.slot(METHODS.index(method), ""), RPC, code, n)
        link.outcomes.clear()
        for (method, model, code), (n, msgid, message) in router.take_errors().items():
            self._failed(method, model, code, n, msgid, message)

    def _count(self, word: str, total: int) -> None:
        """A counter that this process keeps itself; the word may hold what a process before it counted."""
        self.recorder.add(WORD[word], total - self._last.get(word, 0))
        self._last[word] = total

    def _failed(self, method: str, model: str, code: str, n: int, msgid: int, message: str) -> None:
        self.recorder.requests(self.recorder.slot(METHODS.index(method), model), RPC, code, n)
        if not self.log.failed:
            return
        fields: dict[str, Any] = {"model": model, "code": code, "error": message[:500]}
        fields |= {"requests": n} if n > 1 else {}
        fields |= {"request_id": str(msgid)} if msgid >= 0 else {}
        level = "error" if code == "INTERNAL" else "warning"
        self.log.note(level, "request failed", protocol="rpc", method=method, **fields)


def _ms(ns: int) -> float:
    return round(ns / 1e6, 3)
