"""Greedy batching: whatever arrived while the last batch ran is the next batch.

`data_received` appends requests to the open batch of their model; at the end of the same loop turn `run` answers all
of them. So a batch is one request when the server is idle, with no window to wait for, and hundreds under load. A batch
that would take too long for the loop has its features looked up here and its model run in another thread (apart.py);
what comes meanwhile for that model is its next batch, and other models are answered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shorttail import pipeline
from shorttail._native.wire import Batch, Router
from shorttail.errors import ShorttailError
from shorttail.server.apart import Apart, Prepared, ShadowThread
from shorttail.server.faults import one_line
from shorttail.server.telemetry import FEATURES, PREDICT

if TYPE_CHECKING:
    from shorttail.engine import Engine
    from shorttail.pipeline import BatchResult
    from shorttail.server.http.batches import HttpBatches
    from shorttail.server.telemetry import Telemetry


class Batcher:
    """Runs the batches of one worker. fault: told of every exception that nobody foresaw."""

    def __init__(
        self, router: Router, engine: Engine, fault: Callable[[Exception], None], telemetry: Telemetry | None = None
    ):
        self.router = router
        self.engine = engine
        self.fault = fault
        self.telemetry = telemetry
        self.plans_version = engine.plans_version
        self.http: HttpBatches | None = None  # if there is HTTP: its batches run in the same turns
        self.apart = Apart(router.loop, router)
        self.shadows = ShadowThread(engine.store)
        router.run = self.run
        router.fault = fault

    def run(self) -> None:
        """One loop turn: answer everything that waits, then one write a connection."""
        batches = self.router.take()
        for batch in batches:
            if batch.wanted():
                self.answer(batch)
        if self.http is not None and self.http.pending:
            self.http.run()
        self.router.flush()
        if self.shadows.waiting:
            self.shadows.start()
        self.follow_catalog()
        if self.router.sheds or not batches:
            self.apart.rest()

    def answer(self, batch: Batch) -> None:
        try:
            plan, result = self.engine.prepare(batch.route.plan, batch.columns)
            shadowed = None if plan.shadow is None else self.shadows.take(plan.shadow, batch, result)
            if plan.runner is not None:
                if batch.columns.n_rows > plan.runner.loop_rows_max:
                    self.apart.put(Prepared(batch, plan.runner, result, shadowed, batch.wanted, self.answered_apart))
                    return
                batch.route.apart = False
                pipeline.infer(plan.runner, result)
            self.reply(batch, result)
            if shadowed is not None:
                self.shadows.add(shadowed, result)
        except Exception as error:
            self.fail(batch, error)

    def answered_apart(self, prepared: Prepared, error: BaseException | None) -> None:
        """A batch has run in another thread: reply; this turn's run() writes the replies."""
        try:
            if error is not None:
                raise error
            self.reply(prepared.batch, prepared.result)
            if prepared.shadowed is not None:
                self.shadows.add(prepared.shadowed, prepared.result)
        except Exception as failure:
            self.fail(prepared.batch, failure)

    def reply(self, batch: Batch, result: BatchResult) -> None:
        telemetry = self.telemetry
        if telemetry is None:
            batch.reply(result)
            return
        model, requests, rows = (
            batch.route.plan.model,
            batch.waiting,
            batch.columns.n_rows,
        )  # before: it is empty afterwards
        opened_ns, start_ns, traces = batch.opened_ns, batch.started_ns, batch.traces
        batch.reply(result)
        taken_ns = telemetry.recorder.answered(
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
        if taken_ns > telemetry.slow_ns:
            telemetry.slow_batch(model, result, requests, rows, opened_ns, start_ns, taken_ns, traces)

    def fail(self, batch: Batch, error: Exception) -> None:
        if isinstance(error, ShorttailError):
            batch.fail(error.code, error.message)
            return
        # The cause goes to the server's log, one line of it to the callers.
        batch.fail("INTERNAL", f"{describe(batch)}: {one_line(error)}")
        self.fault(error)

    def follow_catalog(self) -> None:
        """Drop the plans made for another catalog, or before another version answered, and have new versions loaded.

        Run between batches: requests that wait hold their plans.
        """
        if self.engine.plans_version != self.plans_version:
            self.engine.follow()
            self.plans_version = self.engine.plans_version
            self.router.forget_plans()
            if self.http is not None:
                self.http.forget_plans()

    def close(self) -> None:
        self.apart.close()
        self.shadows.close()


def describe(batch: Batch) -> str:
    plan = batch.route.plan
    return f"model '{plan.model}'" if plan.kind == "predict" else "get_online_features"
