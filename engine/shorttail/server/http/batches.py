"""Batches of HTTP requests: the requests for a plan in one turn of the event loop run together, as on the RPC side.

HTTP requests collect in batches of their own. server/batcher.py runs these in the same turns as the batches of
MessagePack-RPC, and both are under the same admission.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from shorttail._native.columns import Columns
from shorttail._native.metrics import METHODS, PROTOCOLS
from shorttail._native.wire import Batch, Router, WireRoute
from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, from_code
from shorttail.models.buffers import check_outputs
from shorttail.models.raw import refusal, take_tensors
from shorttail.models.request_runs import RequestRows
from shorttail.pipeline import BatchResult, Plan
from shorttail.server.http.parsed import Answer
from shorttail.server.runnable import Runnable

if TYPE_CHECKING:
    from shorttail.engine import Engine

HTTP: Final = PROTOCOLS.index("http")
PREDICT: Final = METHODS.index("predict")
Array = NDArray[Any]


@dataclass(slots=True)
class Waiting:
    """A request in a batch: its first row, its rows, its future. deadline_ns: of time.perf_counter_ns; 0: none.

    sender: as server/senders.py knows it.
    """

    first: int
    rows: int
    deadline_ns: int
    sender: Hashable
    answer: asyncio.Future[Answer]


class HttpBatch:
    """HTTP requests for one plan that run together: a Runnable. Its native Batch holds the columns, and its counts.

    inputs: the model's input tensors, if the request brings them instead of columns; such a batch has one request, of
    `rows` rows.
    """

    protocol: Final = HTTP
    waiting: Final = 0  # HTTP requests are counted where their responses are made (HttpServer)
    traces: Final = None

    def __init__(self, route: WireRoute, inputs: Sequence[Array] | None = None, rows: int = 0):
        self.batch = Batch(route, route.plan.new_columns())
        self.route = route
        self.inputs = inputs
        self._lookup_names = route.plan.lookup_names
        self._rows = rows
        self.opened_ns = time.perf_counter_ns()
        self.taken: list[Waiting] = []

    @property
    def columns(self) -> Columns:
        return self.batch.columns

    @property
    def n_rows(self) -> int:
        return self.batch.columns.n_rows if self.inputs is None else self._rows

    @property
    def started_ns(self) -> int:
        return self.batch.started_ns

    @property
    def n_requests(self) -> int:
        return len(self.taken)

    def add(self, router: Router, rows: int, deadline_ns: int, sender: Hashable) -> asyncio.Future[Answer]:
        """Add a request; its rows are the last `rows` rows of the batch. Returns a future of its answer."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.taken.append(Waiting(self.n_rows - rows, rows, deadline_ns, sender, answer))
        self.batch.count(router, rows, 0)  # 0 bytes: HttpServer.body limits the bytes of bodies
        return answer

    def drop_expired(self) -> int:
        self.batch.start()
        now_ns = time.perf_counter_ns()
        for request in self.taken:
            if request.deadline_ns and request.deadline_ns <= now_ns and not request.answer.done():
                request.answer.set_exception(DeadlineExceeded("the deadline passed while the request waited"))
        remain = sum(not request.answer.done() for request in self.taken)
        if not remain:
            self.batch.end(ran=False)
        return remain

    def leave_loop(self) -> None:
        self.batch.leave_loop()

    def took(self, run_ns: int) -> None:
        self.batch.took(run_ns)

    def stay_in_loop(self) -> None:
        self.batch.stay_in_loop()

    def answer_by(self, plan: Plan) -> None:
        self._lookup_names = plan.lookup_names

    def keep_columns(self) -> None:
        """Do nothing: columns of an HttpBatch are never reused."""

    def requests(self) -> list[RequestRows]:
        return [
            RequestRows(number, request.first, request.rows)
            for number, request in enumerate(self.taken)
            if not request.answer.done()
        ]

    def refuse(self, number: int, code: str, message: str) -> Hashable:
        request = self.taken[number]
        if not request.answer.done():
            request.answer.set_exception(from_code(code, message))
        return request.sender

    def reply_to(self, numbers: Sequence[int], result: BatchResult) -> None:
        if self.inputs is None:
            check_outputs(result.names, result.values, self.n_rows)  # else a request would get rows of another one
        values = list(result.values)
        for number in numbers:
            request = self.taken[number]
            if request.answer.done():  # the caller has gone, or the deadline has passed
                continue
            statuses: Mapping[str, Array] = {}
            parts = values
            if self.inputs is None:
                part = slice(request.first, request.first + request.rows)
                statuses = dict(zip(self._lookup_names, result.view_statuses[:, part], strict=True))
                parts = [array[part] for array in values]
            request.answer.set_result(Answer(result.names, parts, statuses, result.version, request.rows))

    def reply(self, result: BatchResult) -> None:
        self.batch.end(ran=True)
        self.reply_to(range(len(self.taken)), result)

    def fail(self, code: str, message: str) -> None:
        self.batch.end(ran=False)
        for request in self.taken:
            if not request.answer.done():
                request.answer.set_exception(from_code(code, message))


class HttpBatches:
    """The HTTP requests of one worker that wait for their batch to run."""

    def __init__(self, engine: Engine, router: Router):
        self.engine = engine
        self.router = router
        self.routes: dict[int, WireRoute] = {}  # by id(plan)
        self.open: dict[WireRoute, HttpBatch] = {}  # batches that take requests
        self.pending: list[Runnable] = []
        self.in_flight = 0

    async def predict(
        self,
        plan: Plan,
        values: Mapping[str, Any],
        moment_us: int | None = None,
        deadline_ns: int = 0,
        sender: Hashable = None,
    ) -> Answer:
        """Run a plan on {column: value or values}.

        moment_us: at which TTLs are judged, in microseconds since 1970; None: when the batch runs. deadline_ns: of
        time.perf_counter_ns; 0: none. sender: as server/senders.py knows it. Raises the errors of Engine.predict,
        DeadlineExceeded, and ResourceExhausted under overload.
        """
        if plan.tensors is not None:
            raise InvalidArgument(refusal(plan.model))
        self._check_in_flight()
        route = self._admitted(self.engine.plan_for_request(plan, values), deadline_ns, sender)
        batch = self.open.get(route) or HttpBatch(route)
        rows = batch.columns.append(values)
        if moment_us is not None:
            batch.columns.judge_at(moment_us, rows)
        if not batch.taken:
            self.pending.append(batch)
            self.open[route] = batch
        answer = batch.add(self.router, rows, deadline_ns, sender)
        if batch.n_rows >= LIMITS.batch_rows:
            del self.open[route]
        return await self._counted(answer)

    async def infer(
        self, plan: Plan, inputs: Mapping[str, Array], deadline_ns: int = 0, sender: Hashable = None
    ) -> Answer:
        """Run a plan's model on its input tensors, without columns and lookups.

        inputs: arrays by the names in the model file, with its dtypes and widths. For admission, a request for a model
        that takes tensors is one row. Raises InvalidArgument, Internal, and the errors of `predict` under overload and
        after a deadline.
        """
        self._check_in_flight()
        if plan.tensors is None:
            rows, arrays = check_tensors(plan, inputs)
        else:
            rows, arrays = 1, take_tensors(plan.model, plan.tensors, inputs)
        batch = HttpBatch(self._admitted(plan, deadline_ns, sender), arrays, rows)
        self.pending.append(batch)
        return await self._counted(batch.add(self.router, rows, deadline_ns, sender))

    def _check_in_flight(self) -> None:
        if self.in_flight >= LIMITS.http_requests:
            raise ResourceExhausted(f"{self.in_flight} HTTP requests are in flight; send it again later")

    def _admitted(self, plan: Plan, deadline_ns: int, sender: Hashable) -> WireRoute:
        """Admit a request and return its plan's route. Raises ResourceExhausted, DeadlineExceeded."""
        route = self.routes.get(id(plan))
        if route is None:
            route = self.routes[id(plan)] = WireRoute(plan, b"", plan.version)  # it keeps the plan
        if self.router.suspects.get(sender, 0) > time.monotonic_ns():
            route = route.of_suspects()
        self.router.admit(route, deadline_ns)
        return route

    async def _counted(self, answer: asyncio.Future[Answer]) -> Answer:
        """Await an answer, and count the request as in flight meanwhile."""
        self.in_flight += 1
        try:
            return await answer
        finally:
            self.in_flight -= 1

    # -- a turn ------------------------------------------------------------------------------------------------

    def take(self) -> list[Runnable]:
        """Take the batches that wait, except those of busy routes. No request is added to them afterwards."""
        taken, waiting = [], self.pending
        self.pending = []
        for batch in waiting:
            if batch.route.busy:
                self.pending.append(batch)
                continue
            if self.open.get(batch.route) is batch:
                del self.open[batch.route]
            taken.append(batch)
        return taken

    def forget_plans(self) -> None:
        """Forget all routes: the catalog changed. Batches that wait still run by the plans they were read for."""
        self.routes.clear()
        self.open.clear()


def check_tensors(plan: Plan, inputs: Mapping[str, Array]) -> tuple[int, list[Array]]:
    """Return the number of rows, and the input arrays in the model's order.

    Raises InvalidArgument if an array does not have the dtype and the width of the model's input. If the model file
    leaves a width open, it is that of the plan's buffer: the number of columns for which the model was loaded.
    """
    assert plan.runner is not None
    arrays, rows = [], -1
    for tensor, buffer in zip(plan.runner.inputs, plan.buffers, strict=False):
        if tensor.name not in inputs:
            raise InvalidArgument(f"input '{tensor.name}' of model '{plan.model}' is missing")
        array = inputs[tensor.name]
        if array.dtype.hasobject and None in array.ravel().tolist():
            raise InvalidArgument(f"input '{tensor.name}' is {tensor.dtype}; got null")
        if array.dtype != buffer.dtype:
            raise InvalidArgument(f"input '{tensor.name}' is {tensor.dtype}; got {_kind(array)}")
        widths = [] if buffer.width is None else [buffer.width]
        if list(array.shape[1:]) != widths or array.ndim < 1:
            raise InvalidArgument(f"input '{tensor.name}' has the shape {[-1, *widths]}; got {list(array.shape)}")
        if rows not in (-1, len(array)):
            raise InvalidArgument(f"input '{tensor.name}' has {len(array)} rows; the inputs before it have {rows}")
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
