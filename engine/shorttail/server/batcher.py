"""Greedy batching: the requests that arrived while the last batch ran are the next batch.

`Connection.data_received` appends each request to the open batch of its plan. `Batcher.run` answers all open batches at
the end of the same turn of the event loop. So a batch holds one request when the server is idle, with no waiting
window, and hundreds under load. If a batch would hold up the loop for too long, the loop only looks its features up,
and the model runs in another thread (model_threads.py). Requests that arrive for that model meanwhile form its next
batch; other models are answered as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from shorttail import pipeline
from shorttail._native.wire import Router
from shorttail.errors import ShorttailError
from shorttail.pipeline import BatchResult, Plan
from shorttail.server.errorlog import one_line
from shorttail.server.model_threads import ModelThreads, PreparedBatch
from shorttail.server.runnable import Runnable
from shorttail.server.shadow import ShadowThread
from shorttail.server.telemetry import FEATURES, PREDICT, RPC

if TYPE_CHECKING:
    from shorttail.engine import Engine
    from shorttail.server.telemetry import Telemetry


class OtherBatches(Protocol):
    """Batches that came by another protocol than MessagePack-RPC (server/http/batches.py)."""

    def take(self) -> list[Runnable]:
        """Return the batches whose routes are not busy. No request is added to them afterwards."""

    def forget_plans(self) -> None:
        """Forget all plans: the catalog changed. Batches that wait still run by the plans they were read for."""


class Batcher:
    """Runs the batches of one worker. MessagePack-RPC and HTTP requests go through the same code.

    http: the batches that came over HTTP, or None if the server has no HTTP. fault: called with every exception that is
    not a ShorttailError. telemetry: counts the batches; None counts nothing.
    """

    def __init__(
        self,
        router: Router,
        engine: Engine,
        fault: Callable[[Exception], None],
        telemetry: Telemetry | None = None,
        http: OtherBatches | None = None,
    ):
        self.router = router
        self.engine = engine
        self.fault = fault
        self.telemetry = telemetry
        self.http = http
        self.plans_version = engine.plans_version
        self.model_threads = ModelThreads(router.loop, router)
        self.shadows = ShadowThread(engine.store)
        router.connect(run=self.run, fault=fault)

    def run(self) -> None:
        """Run one turn: answer every batch that waits, then write once to each connection."""
        batches: list[Runnable] = [*self.router.take()]
        answered = bool(batches)
        if self.http is not None:
            batches += self.http.take()
        for batch in batches:
            if batch.drop_expired():
                self.answer(batch)
        self.router.flush()
        if self.shadows.waiting:
            self.shadows.start()
        self.follow_catalog()
        if self.router.overloaded or not answered:
            self.model_threads.rest()

    def answer(self, batch: Runnable) -> None:
        """Run a batch and reply. A batch that is too slow for the loop replies later, in `answered_in_thread`."""
        try:
            plan, result = self.prepare(batch)
            shadowed = self.shadows.take(plan, batch, result) if plan.shadow is not None else None
            if plan.runner is not None:
                if batch.n_rows > plan.runner.loop_rows_max:
                    self.model_threads.put(PreparedBatch(batch, plan.runner, result, shadowed, self.answered_in_thread))
                    return
                batch.stay_in_loop()
                pipeline.infer(plan.runner, result)
            self.reply(batch, result)
            if shadowed is not None:
                self.shadows.add(shadowed, result)
        except Exception as error:
            self.fail(batch, error)

    def prepare(self, batch: Runnable) -> tuple[Plan, BatchResult]:
        """Look up the features and transform them. A request that brings the model's input tensors needs neither."""
        if batch.inputs is None:
            return self.engine.prepare(batch.route, batch.columns)
        plan = batch.route.plan
        return plan, BatchResult.of_inputs(plan, batch.inputs)

    def answered_in_thread(self, prepared: PreparedBatch, error: BaseException | None) -> None:
        """Reply to a batch that has run in another thread; `run` of this turn writes the replies to the connections."""
        try:
            if error is not None:
                raise error
            self.reply(prepared.batch, prepared.result)
            if prepared.shadowed is not None:
                self.shadows.add(prepared.shadowed, prepared.result)
        except Exception as failure:
            self.fail(prepared.batch, failure)

    def reply(self, batch: Runnable, result: BatchResult) -> None:
        telemetry = self.telemetry
        if telemetry is None:
            batch.reply(result)
            return
        # Read before the reply: the batch is empty afterwards.
        model, requests, rows = batch.route.plan.model, batch.waiting, batch.n_rows
        opened_ns, start_ns, traces, protocol = batch.opened_ns, batch.started_ns, batch.traces, batch.protocol
        batch.reply(result)
        taken_ns = telemetry.recorder.answered(
            PREDICT if model else FEATURES,
            model,
            protocol,
            requests,
            rows,
            opened_ns,
            start_ns,
            result.looked_up_ns,
            result.prepared_ns,
            result.inferred_ns,
        )
        if taken_ns > telemetry.slow_ns and protocol == RPC:
            telemetry.slow_batch(model, result, requests, rows, opened_ns, start_ns, taken_ns, traces)

    def fail(self, batch: Runnable, error: Exception) -> None:
        if isinstance(error, ShorttailError):
            batch.fail(error.code, error.message)
            return
        # The server's log gets the cause with its place in the code; the callers get one line.
        batch.fail("INTERNAL", f"{describe(batch)}: {one_line(error)}")
        self.fault(error)

    def follow_catalog(self) -> None:
        """Forget plans of an older catalog and of versions that no longer answer, and start to load new versions.

        Called between batches. A batch that waits holds the plan it was read for.
        """
        if self.engine.plans_version != self.plans_version:
            self.engine.follow()
            self.plans_version = self.engine.plans_version
            self.router.forget_plans()
            if self.http is not None:
                self.http.forget_plans()

    def close(self) -> None:
        self.model_threads.close()
        self.shadows.close()


def describe(batch: Runnable) -> str:
    plan = batch.route.plan
    return f"model '{plan.model}'" if plan.kind == "predict" else "get_online_features"
