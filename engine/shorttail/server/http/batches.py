"""Requests over HTTP, batched as those of the MessagePack wire are: what one loop turn brought runs together.

They wait in columns of their own and run by the same plans, so they cost the other protocol nothing but their time on
the loop. A batch that is too slow for the loop runs its model in a thread.
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
from shorttail._native.columns import Columns
from shorttail._native.metrics import METHODS, PROTOCOLS, Recorder
from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, ShorttailError
from shorttail.pipeline import BatchResult, Plan
from shorttail.server.faults import one_line

if TYPE_CHECKING:
    from shorttail.engine import Engine

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
    """The requests for one plan that the next turn runs."""

    plan: Plan
    columns: Columns
    opened_ns: int
    requests: list[Waiting] = field(default_factory=list)


class HttpBatches:
    """Of one worker. fault: told of every exception that nobody foresaw."""

    def __init__(self, engine: Engine, recorder: Recorder, fault: Callable[[Exception], None]):
        self.engine = engine
        self.recorder = recorder
        self.fault = fault
        self.loop = asyncio.get_running_loop()
        self.pending: dict[int, Pending] = {}
        self.in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def predict(self, plan: Plan, values: Mapping[str, Any], deadline_ns: int = 0) -> Answer:
        """Run a plan on {column: value or values}. Raises what Engine.predict raises, and DeadlineExceeded."""
        self._admit(deadline_ns)
        plan = self._for_request(plan, values)
        pending = self.pending.get(id(plan))
        if pending is None:
            pending = Pending(plan, plan.new_columns(), time.perf_counter_ns())
        first = pending.columns.n_rows
        rows = pending.columns.append(values)
        answer: asyncio.Future[Answer] = self.loop.create_future()
        pending.requests.append(Waiting(first, rows, deadline_ns, answer))
        if len(pending.requests) == 1:
            if not self.pending:
                self.loop.call_soon(self._run)
            self.pending[id(plan)] = pending
        if pending.columns.n_rows >= LIMITS.batch_rows:
            del self.pending[id(plan)]
            self._start(pending)
        found: Answer = await self._counted(answer)
        return found

    async def infer(self, plan: Plan, inputs: Mapping[str, Array], deadline_ns: int = 0) -> Answer:
        """Run a plan's model on its own input tensors: no columns, no lookups.

        inputs: by the names in the file, of exactly its types and widths. Raises InvalidArgument, Internal.
        """
        self._admit(deadline_ns)
        runner = plan.runner
        assert runner is not None
        rows, arrays = check_tensors(plan, inputs)
        opened_ns = time.perf_counter_ns()
        nothing = np.empty((0, rows), np.uint8)
        result = BatchResult(runner.output_names, arrays, nothing, None, plan.version)
        if rows > runner.loop_rows_max:
            await self._counted(self.loop.run_in_executor(runner.executor, pipeline.infer, runner, result))
        else:
            pipeline.infer(runner, result)
        self._record(plan, rows, opened_ns, opened_ns, 0, opened_ns, time.perf_counter_ns())
        return Answer(result.names, result.values, {}, plan.version)

    def _for_request(self, plan: Plan, values: Mapping[str, Any]) -> Plan:
        """The plan of the canary, if the model has one and it answers for these keys."""
        split = plan.split
        if split is None:
            return plan
        columns = plan.new_columns()
        columns.append(values)
        below = columns.hash_row(0, split.columns, split.salt) < split.below
        return self.engine.plan_for_model(plan.model, split.version) if below else plan

    def _admit(self, deadline_ns: int) -> None:
        if self.in_flight >= LIMITS.http_requests:
            raise ResourceExhausted(f"{self.in_flight} requests over HTTP are in flight; send it again later")
        if deadline_ns and deadline_ns <= time.perf_counter_ns():
            raise DeadlineExceeded("the deadline passed before the request was read")

    async def _counted(self, answer: asyncio.Future[Any]) -> Any:
        self.in_flight += 1
        try:
            return await answer
        finally:
            self.in_flight -= 1

    # -- a turn ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """One loop turn: everything that waits."""
        pending, self.pending = self.pending, {}
        for batch in pending.values():
            self._start(batch)

    def _start(self, batch: Pending) -> None:
        start_ns = time.perf_counter_ns()
        for request in batch.requests:
            if request.deadline_ns and request.deadline_ns <= start_ns and not request.answer.done():
                request.answer.set_exception(DeadlineExceeded("the deadline passed while the request waited"))
        if all(request.answer.done() for request in batch.requests):
            return  # none is waited for any more
        try:
            plan, result = self.engine.prepare(batch.plan, batch.columns)
            prepared_ns = time.perf_counter_ns()
            runner = plan.runner
            assert runner is not None
            if batch.columns.n_rows > runner.loop_rows_max:
                task = self.loop.create_task(self._apart(batch, plan, result, start_ns, prepared_ns))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            pipeline.infer(runner, result)
        except Exception as error:
            self._fail(batch, error)
        else:
            self._finish(batch, plan, result, start_ns, prepared_ns)

    async def _apart(self, batch: Pending, plan: Plan, result: BatchResult, start_ns: int, prepared_ns: int) -> None:
        runner = plan.runner
        assert runner is not None
        try:
            await self.loop.run_in_executor(runner.executor, pipeline.infer, runner, result)
        except Exception as error:
            self._fail(batch, error)
        else:
            self._finish(batch, plan, result, start_ns, prepared_ns)

    def _finish(self, batch: Pending, plan: Plan, result: BatchResult, start_ns: int, prepared_ns: int) -> None:
        done_ns = time.perf_counter_ns()
        looked_up_ns = result.looked_up_ns or prepared_ns
        self._record(plan, batch.columns.n_rows, batch.opened_ns, start_ns, looked_up_ns, prepared_ns, done_ns)
        values = list(result.values)
        for request in batch.requests:
            if request.answer.done():  # it was cancelled, or came too late
                continue
            part = slice(request.first, request.first + request.rows)
            statuses = dict(zip(plan.view_names, result.view_statuses[:, part], strict=True))
            request.answer.set_result(Answer(result.names, [array[part] for array in values], statuses, result.version))

    def _fail(self, batch: Pending, error: Exception) -> None:
        if not isinstance(error, ShorttailError):
            self.fault(error)
            error = Internal(f"model '{batch.plan.model}': {one_line(error)}")
        for request in batch.requests:
            if not request.answer.done():
                request.answer.set_exception(error)

    def _record(
        self, plan: Plan, rows: int, opened_ns: int, start_ns: int, looked_up_ns: int, prepared_ns: int, done_ns: int
    ) -> None:
        slot = self.recorder.slot(PREDICT, plan.model)
        # Requests are counted by their outcome and their encoding is timed where responses are made.
        self.recorder.batch(slot, HTTP, 0, rows, opened_ns, start_ns, looked_up_ns, prepared_ns, done_ns, 0)


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
