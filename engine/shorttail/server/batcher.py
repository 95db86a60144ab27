"""Greedy batching: the requests that arrived while the last batch ran are the next batch.

`Connection.data_received` appends each request to the open batch of its plan. `Batcher.run` answers all open batches at
the end of the same turn of the event loop. So a batch holds one request when the server is idle, with no waiting
window, and hundreds under load. If a batch would hold up the loop for too long, the loop only looks its features up,
and the model runs in another thread (model_threads.py). Requests that arrive for that model meanwhile form its next
batch; other models are answered as before. A batch whose model fails runs again in parts, until only the requests that
make the model fail are left (models/request_runs.py): in such a thread, or on the loop in slices of time (slices.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from shorttail import pipeline
from shorttail._native.wire import Router
from shorttail.config import LIMITS
from shorttail.errors import Internal, ShorttailError
from shorttail.models.request_runs import PartRuns
from shorttail.models.session import ModelFailed, RunTimedOut
from shorttail.pipeline import BatchResult, Plan
from shorttail.server.errorlog import one_line
from shorttail.server.model_threads import ModelThreads, PreparedBatch, bad_share
from shorttail.server.runnable import Runnable
from shorttail.server.senders import Senders
from shorttail.server.shadow import ShadowThread
from shorttail.server.slices import Slices
from shorttail.server.telemetry import FEATURES, PREDICT, RPC

if TYPE_CHECKING:
    from shorttail.engine import Engine
    from shorttail.models.load import Runner
    from shorttail.server.telemetry import Telemetry


# A run of this length has held up the loop, unless the machine did: it was expected to take LIMITS.loop_stall_us.
HELD_UP_NS: Final = int(4e3 * LIMITS.loop_stall_us)


class Ran(Enum):
    """What `Batcher.infer_in_loop` did with a batch."""

    HERE = 1  # it has run
    TOO_SLOW = 2  # it has to run in a thread
    IN_PARTS = 3  # its requests must not all share a run, or some may be refused without one
    FAILED = 4  # the model has failed: it has to run in parts


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
        self.slices = Slices(router, self.model_threads)
        self.shadows = ShadowThread(engine.store)
        self.senders = Senders(router.suspects)
        router.connect(run=self.run, fault=fault)

    def run(self) -> None:
        """Run one turn: answer every batch that waits, then write once to each connection."""
        batches: list[Runnable] = [*self.router.take()]
        if self.http is not None:
            batches += self.http.take()
        ran, start_ns = False, time.perf_counter_ns() if self.slices.waiting else 0
        for batch in batches:
            if batch.drop_expired():
                ran |= self.answer(batch)
        self.router.flush()
        if self.slices.waiting:
            self.slices.run(time.perf_counter_ns() - start_ns if ran and start_ns else 0)
        if self.shadows.waiting:
            self.shadows.start()
        self.follow_catalog()
        if not ran:
            self.model_threads.rest()

    def answer(self, batch: Runnable) -> bool:
        """Run a batch and reply. Returns False if it cannot run now; it then replies later, in `answered_later`."""
        try:
            plan, result = self.prepare(batch)
            shadowed = self.shadows.take(plan, batch, result) if plan.shadow is not None else None
            if plan.runner is not None:
                ran = self.infer_in_loop(plan.runner, batch, result)
                if ran is not Ran.HERE:
                    in_parts, failed = ran is not Ran.TOO_SLOW, ran is Ran.FAILED
                    prepared = PreparedBatch(
                        batch, plan.runner, result, shadowed, self.answered_later, in_parts, failed
                    )
                    in_slices = in_parts and batch.n_rows <= batch.n_requests * plan.runner.loop_rows_max
                    (self.slices if in_slices else self.model_threads).put(prepared)
                    return False
            self.reply(batch, result)
            if shadowed is not None:
                self.shadows.add(shadowed, result)
        except Exception as error:
            self.fail(batch, error)
        return True

    def infer_in_loop(self, runner: Runner, batch: Runnable, result: BatchResult) -> Ran:
        """Run the model, if it may run on the loop and for all requests at once."""
        bad = bad_share(batch.route, runner) if runner.by_request else batch.route.bad
        if bad is not None and (batch.n_requests > bad.requests_per_run or (bad.value and bad.known)):
            return Ran.IN_PARTS
        if batch.n_rows > runner.loop_rows_max:
            return Ran.TOO_SLOW
        batch.stay_in_loop()
        try:
            pipeline.infer(runner, result)
        except RunTimedOut:
            runner.note_slow(ended=True)
            return Ran.TOO_SLOW
        except ModelFailed as error:
            runner.counts.note(error)
            bad_share(batch.route, runner).learn(1, batch.n_requests, batch.n_rows)
            return Ran.FAILED
        if bad is not None:
            bad.learn(0, batch.n_requests, batch.n_rows)
        if result.inferred_ns - result.prepared_ns > HELD_UP_NS:
            runner.note_slow()
        elif runner.slow_runs:
            runner.note_quick()
        return Ran.HERE

    def prepare(self, batch: Runnable) -> tuple[Plan, BatchResult]:
        """Look up the features and transform them. A request that brings the model's input tensors needs neither."""
        if batch.inputs is None:
            plan, result = self.engine.prepare(batch.route, batch.columns)
            if plan is not batch.route.plan:
                batch.answer_by(plan)
            return plan, result
        plan = batch.route.plan
        return plan, BatchResult.of_inputs(plan, batch.inputs)

    def answered_later(self, prepared: PreparedBatch, error: BaseException | None) -> None:
        """Reply to a batch that ran in a thread or in slices. `run` then writes the replies to the connections."""
        try:
            if error is not None:
                raise error
            if prepared.parts is not None:
                self.reply_in_parts(prepared.batch, prepared.result, prepared.parts.result())
                return
            self.reply(prepared.batch, prepared.result)
            if prepared.shadowed is not None:
                self.shadows.add(prepared.shadowed, prepared.result)
        except Exception as failure:
            self.fail(prepared.batch, failure)

    def reply_in_parts(self, batch: Runnable, result: BatchResult, parts: PartRuns) -> None:
        """Reply to a batch of which a few requests ran at a time, and remember who sent those that failed."""
        for number, error in parts.failures.items():
            sender = batch.refuse(number, error.code, error.message)
            if isinstance(error, Internal):
                self.fault(error)
            else:
                self.senders.blame(sender)
        if not parts.answered:
            batch.fail("INTERNAL", "all requests of the batch were refused")  # nobody gets this: all have their answer
            return
        for requests, outputs in parts.answered[:-1]:
            batch.reply_to(requests, replace(result, values=outputs))
        self.reply(batch, replace(result, values=parts.answered[-1].outputs))

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
