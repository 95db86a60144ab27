"""Requests over HTTP, batched as those of the MessagePack wire are: what one loop turn brought runs together.

They wait in columns of their own, and run by the same plans in the same turns, under the same admission: a turn takes
what its budget allows, of both protocols together. A batch that is too slow for the loop runs its model in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail import pipeline
from shorttail._native.metrics import METHODS, PROTOCOLS, Recorder
from shorttail._native.wire import Batch, Route
from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, ShorttailError
from shorttail.pipeline import BatchResult, Plan
from shorttail.server.apart import Prepared
from shorttail.server.faults import one_line

if TYPE_CHECKING:
    from shorttail.engine import Engine
    from shorttail.models.load import Runner
    from shorttail.models.shadow import ShadowBatch
    from shorttail.server.batcher import Batcher

HTTP: Final = PROTOCOLS.index("http")
PREDICT: Final = METHODS.index("predict")
Array = NDArray[Any]


@dataclass(slots=True)
class Answer:
    """One request's part of a batch. values: [rows, ...] for each of names; statuses: view -> uint8 [rows]."""

    names: Sequence[str]
    values: Sequence[Array]
    statuses: Mapping[str, Array]
    version: int


@dataclass(slots=True)
class Waiting:
    first: int
    rows: int
    deadline_ns: int  # of time.perf_counter_ns; 0: none
    answer: asyncio.Future[Answer]


@dataclass(slots=True)
class Pending:
    """The requests for one plan that run together. batch: their columns, and what they count for in admission."""

    batch: Batch
    opened_ns: int
    requests: list[Waiting] = field(default_factory=list)

    def wanted(self) -> bool:
        """Answer what is past its deadline; whether anybody is left."""
        self.batch.start()
        now_ns = time.perf_counter_ns()
        for request in self.requests:
            if request.deadline_ns and request.deadline_ns <= now_ns and not request.answer.done():
                request.answer.set_exception(DeadlineExceeded("the deadline passed while the request waited"))
        if any(not request.answer.done() for request in self.requests):
            return True
        self.batch.end(ran=False)
        return False


@dataclass(slots=True)
class Run:
    """A batch that is about to be inferred. prepared_ns: when its features were there; 0: it needs none."""

    pending: Pending
    plan: Plan
    rows: int
    result: BatchResult
    prepared_ns: int = 0


class HttpBatches:
    """Of one worker. fault: told of every exception that nobody foresaw."""

    def __init__(self, engine: Engine, batcher: Batcher, recorder: Recorder, fault: Callable[[Exception], None]):
        self.engine = engine
        self.router = batcher.router
        self.apart = batcher.apart
        self.shadows = batcher.shadows
        self.recorder = recorder
        self.fault = fault
        self.loop = asyncio.get_running_loop()
        self.routes: dict[int, Route] = {}  # by the id of their plans
        self.open: dict[Route, Pending] = {}  # those that take requests
        self.pending: list[Pending] = []
        self.in_flight = 0
        batcher.http = self

    async def predict(self, plan: Plan, values: Mapping[str, Any], deadline_ns: int = 0) -> Answer:
        """Run a plan on {column: value or values}.

        Raises what Engine.predict raises, DeadlineExceeded, and ResourceExhausted when there is no time for it.
        """
        self._check_in_flight()
        plan = self._for_request(plan, values)
        route = self._admitted(plan, deadline_ns)
        pending = self.open.get(route) or Pending(Batch(route, plan.new_columns()), time.perf_counter_ns())
        columns = pending.batch.columns
        first = columns.n_rows
        rows = columns.append(values)
        pending.batch.count(self.router, rows, 0)  # its body counts where bodies are read
        answer: asyncio.Future[Answer] = self.loop.create_future()
        pending.requests.append(Waiting(first, rows, deadline_ns, answer))
        if len(pending.requests) == 1:
            self.pending.append(pending)
            self.open[route] = pending
        if columns.n_rows >= LIMITS.batch_rows:
            del self.open[route]
        return await self._counted(answer)

    async def infer(self, plan: Plan, inputs: Mapping[str, Array], deadline_ns: int = 0) -> Answer:
        """Run a plan's model on its own input tensors: no columns, no lookups.

        inputs: by the names in the file, of exactly its types and widths. Raises InvalidArgument, Internal, and what
        `predict` raises for want of time.
        """
        self._check_in_flight()
        runner = plan.runner
        assert runner is not None
        rows, arrays = check_tensors(plan, inputs)
        pending = Pending(Batch(self._admitted(plan, deadline_ns), plan.new_columns()), time.perf_counter_ns())
        pending.batch.count(self.router, rows, 0)
        answer: asyncio.Future[Answer] = self.loop.create_future()
        pending.requests.append(Waiting(0, rows, deadline_ns, answer))
        pending.batch.start()
        nothing = np.empty((0, rows), np.uint8)
        run = Run(pending, plan, rows, BatchResult(runner.output_names, arrays, nothing, None, plan.version))
        if rows > runner.loop_rows_max:
            self._put(run, runner, None)
        else:
            self._infer(run, runner, None)
        return await self._counted(answer)

    def _for_request(self, plan: Plan, values: Mapping[str, Any]) -> Plan:
        """The plan of the canary, if the model has one and it answers for these keys."""
        split = plan.split
        if split is None:
            return plan
        columns = plan.new_columns()
        columns.append(values)
        below = columns.hash_row(0, split.columns, split.salt) < split.below
        return self.engine.plan_for_model(plan.model, split.version) if below else plan

    def _check_in_flight(self) -> None:
        if self.in_flight >= LIMITS.http_requests:
            raise ResourceExhausted(f"{self.in_flight} requests over HTTP are in flight; send it again later")

    def _admitted(self, plan: Plan, deadline_ns: int) -> Route:
        """Its route. Raises ResourceExhausted, DeadlineExceeded."""
        route = self.routes.get(id(plan))
        if route is None:
            route = self.routes[id(plan)] = Route(plan, b"", plan.version)  # which keeps the plan
        self.router.admit(route, deadline_ns)
        return route

    def forget_plans(self) -> None:
        """The catalog changed: nothing here may keep a model. Batches that wait run by the plans they came for."""
        self.routes.clear()
        self.open.clear()

    async def _counted(self, answer: asyncio.Future[Answer]) -> Answer:
        self.in_flight += 1
        try:
            return await answer
        finally:
            self.in_flight -= 1

    # -- a turn ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Once a loop turn: everything that waits, but what is for a model that runs in its thread."""
        waiting, self.pending = self.pending, []
        for pending in waiting:
            route = pending.batch.route
            if route.busy:
                self.pending.append(pending)
                continue
            if self.open.get(route) is pending:
                del self.open[route]
            if pending.wanted():
                self._start(pending)

    def _start(self, pending: Pending) -> None:
        batch = pending.batch
        try:
            plan, result = self.engine.prepare(batch.route.plan, batch.columns)
        except Exception as error:
            self._fail(pending, error)
            return
        runner = plan.runner
        assert runner is not None
        shadowed = None if plan.shadow is None else self.shadows.take(plan.shadow, batch, result)
        run = Run(pending, plan, batch.columns.n_rows, result, time.perf_counter_ns())
        if batch.columns.n_rows > runner.loop_rows_max:
            self._put(run, runner, shadowed)
        else:
            batch.route.apart = False
            self._infer(run, runner, shadowed)

    def _infer(self, run: Run, runner: Runner, shadowed: ShadowBatch | None) -> None:
        """In the loop."""
        error: Exception | None = None
        try:
            pipeline.infer(runner, run.result)
        except Exception as failure:
            error = failure
        self._answer(run, shadowed, error)

    def _put(self, run: Run, runner: Runner, shadowed: ShadowBatch | None) -> None:
        """To the model's thread."""
        batch = run.pending.batch

        def answered(prepared: Prepared, error: BaseException | None) -> None:
            self._answer(run, prepared.shadowed, error)

        self.apart.put(Prepared(batch, runner, run.result, shadowed, run.pending.wanted, answered))

    def _answer(self, run: Run, shadowed: ShadowBatch | None, error: BaseException | None) -> None:
        try:
            if error is not None:
                raise error
            run.pending.batch.end(ran=True)
            self._finish(run)
            if shadowed is not None:
                self.shadows.add(shadowed, run.result)
        except Exception as failure:
            self._fail(run.pending, failure)

    def _finish(self, run: Run) -> None:
        pending, plan, result = run.pending, run.plan, run.result
        self._record(run, time.perf_counter_ns())
        values = list(result.values)
        for request in pending.requests:
            if request.answer.done():  # it was cancelled, or came too late
                continue
            part = slice(request.first, request.first + request.rows)
            statuses = dict(zip(plan.view_names, result.view_statuses[:, part], strict=False))
            request.answer.set_result(Answer(result.names, [array[part] for array in values], statuses, result.version))

    def _fail(self, pending: Pending, error: Exception) -> None:
        pending.batch.end(ran=False)
        if not isinstance(error, ShorttailError):
            self.fault(error)
            error = Internal(f"model '{pending.batch.route.plan.model}': {one_line(error)}")
        for request in pending.requests:
            if not request.answer.done():
                request.answer.set_exception(error)

    def _record(self, run: Run, done_ns: int) -> None:
        opened_ns, start_ns = run.pending.opened_ns, run.pending.batch.started_ns
        prepared_ns = run.prepared_ns or start_ns
        looked_up_ns = run.result.looked_up_ns or prepared_ns
        slot = self.recorder.slot(PREDICT, run.plan.model)
        # Requests are counted by their outcome and their encoding is timed where responses are made.
        self.recorder.batch(slot, HTTP, 0, run.rows, opened_ns, start_ns, looked_up_ns, prepared_ns, done_ns, 0)


def check_tensors(plan: Plan, inputs: Mapping[str, Array]) -> tuple[int, list[Array]]:
    """Rows, and the arrays in the model's order. Raises InvalidArgument unless they are what the model takes.

    The width is that of the plan's buffer even where the file leaves it open: so many columns the model was loaded for.
    """
    assert plan.runner is not None
    arrays, rows = [], -1
    for tensor, buffer in zip(plan.runner.inputs, plan.buffers, strict=False):
        array = inputs[tensor.name]
        if array.dtype != buffer.dtype:
            raise InvalidArgument(f"input '{tensor.name}' is {tensor.dtype}; got {_kind(array)}")
        widths = [] if buffer.width is None else [buffer.width]
        if list(array.shape[1:]) != widths or array.ndim < 1:
            raise InvalidArgument(f"input '{tensor.name}' has the shape {[-1, *widths]}; got {list(array.shape)}")
        if rows not in (-1, len(array)):
            raise InvalidArgument(f"input '{tensor.name}' has {len(array)} rows where others have {rows}")
        rows = len(array)
        arrays.append(array)
    if rows < 1:
        raise InvalidArgument("no rows: send at least one")
    if rows > LIMITS.rows_per_request:
        raise InvalidArgument(
            f"{rows} rows in one request; at most {LIMITS.rows_per_request} are taken: send it in parts"
        )
    return rows, arrays


def _kind(array: Array) -> str:
    return "string" if array.dtype.hasobject else str(array.dtype)
