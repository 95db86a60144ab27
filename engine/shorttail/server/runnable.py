"""The interface of a batch of requests, as the batcher runs it, whatever protocol the requests came by."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from shorttail._native.columns import Columns
from shorttail._native.wire import WireRoute
from shorttail.pipeline import BatchResult, Plan


class Runnable(Protocol):
    """Requests of one route that run together: a Batch of native/wire, or an HttpBatch.

    protocol: index into metrics.PROTOCOLS. columns: the request columns of all requests. inputs: the model's own input
    tensors, if a request brings them instead of columns. n_requests: all that were added. waiting: requests to be
    counted when the batch is answered. opened_ns, started_ns: when its first request was read, and when it began to run
    (CLOCK_MONOTONIC). traces: index of a request in the batch -> (message id, traceparent).
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
    def n_requests(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def opened_ns(self) -> int: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def traces(self) -> dict[int, tuple[int, bytes]] | None: ...

    def drop_expired(self) -> int:
        """Answer the requests that are past their deadline, and return how many still wait. Called before a run."""

    def requests(self) -> Sequence[tuple[int, int, int]]:
        """Return (number, first row, rows) of the requests that have no answer yet, in order of their rows."""

    def refuse(self, number: int, code: str, message: str) -> Hashable:
        """Answer one request with an error. Returns its sender, None if the sender is not known."""

    def leave_loop(self) -> None:
        """The batch runs in a thread. The next batch of its route waits until it has run."""

    def took(self, run_ns: int) -> None:
        """Set how long the batch has run, if it waited between its runs."""

    def stay_in_loop(self) -> None:
        """The batch runs in the event loop."""

    def answer_by(self, plan: Plan) -> None:
        """The results come from another plan than the route's: the catalog changed after the requests were read."""

    def keep_columns(self) -> None:
        """Do not reuse the columns after the reply: a shadow still reads them."""

    def reply_to(self, numbers: Sequence[int], result: BatchResult) -> None:
        """Answer some requests with their rows of the result. `reply` or `fail` has to follow for the others."""

    def reply(self, result: BatchResult) -> None:
        """Answer each request that has no answer yet with its rows of the result."""

    def fail(self, code: str, message: str) -> None:
        """Answer each request that has no answer yet with this error."""
