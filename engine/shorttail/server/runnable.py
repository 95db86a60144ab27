"""What the batcher runs: a batch of requests, from whatever protocol they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from shorttail._native.columns import Columns
from shorttail._native.wire import WireRoute
from shorttail.pipeline import BatchResult


class Runnable(Protocol):
    """Requests of one route that run together: native/wire's Batch, or HTTP's HttpBatch.

    protocol: its place in metrics.PROTOCOLS. columns: what the requests ask; inputs: the model's own input tensors, if
    the requests bring them instead of columns. waiting: requests that are counted when the batch is answered.
    traces: a request's place in the batch -> (message id, traceparent).
    """

    @property
    def protocol(self) -> int: ...
    @property
    def route(self) -> WireRoute: ...
    @property
    def columns(self) -> Columns: ...
    @property
    def inputs(self) -> Sequence[NDArray[Any]] | None: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def opened_ns(self) -> int: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def traces(self) -> dict[int, tuple[int, bytes]] | None: ...

    def wanted(self) -> int:
        """Answer the requests that are past their deadline; return how many still wait. Asked before a run."""

    def leave_loop(self) -> None:
        """The batch runs outside the loop; the route's next batch waits until it has."""

    def stay_in_loop(self) -> None:
        """The batch runs in the loop."""

    def keep_columns(self) -> None:
        """Leave the columns as they are once the batch is answered: somebody still reads them."""

    def reply(self, result: BatchResult) -> None:
        """Give each request its rows of the result."""

    def fail(self, code: str, message: str) -> None:
        """Give each request that has no answer this error."""
