"""Runs a batch in parts, a few requests a run.

Two kinds of batches need it. If the answer for a row depends on the other rows of the run, each request has a run of
its own. And if a run fails, it is repeated in halves until only the requests that make the model fail are left, so that
no request fails for another's row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.errors import Internal, ShorttailError
from shorttail.models.session import ModelFailed, RunTimedOut

if TYPE_CHECKING:
    from shorttail.models.load import Runner

Array = NDArray[Any]
ANY_NUMBER: Final = math.inf  # of requests may share a run

# After a run that succeeds, the next may have GROWTH times as many requests; after one that fails, half as many, or one
# if a failure takes longer than the requests do. So if many requests are bad, each soon has a run of its own, and if
# few are, runs stay large: it is the search for defective members of a group (Dorfman, "The Detection of Defective
# Members of Large Populations", 1943), with a group size that is learned.
GROWTH: Final = 1.25


class RequestRows(NamedTuple):
    """A request of a batch: its number there, its first row and its number of rows."""

    number: int
    first: int
    rows: int


class Answered(NamedTuple):
    """Requests that were answered, whose outputs have the same widths.

    requests: their numbers. outputs: an array [rows of the batch, ...] for each output of the model; the rows of other
    requests are zeros or "".
    """

    requests: list[int]
    outputs: list[Array]


class PartRuns(NamedTuple):
    """The result of a PartRun.

    answered: one item, or several if a model gives arrays of other widths to some requests; the largest is the last.
    failures: number of a request -> its error. requests_per_run: for the next batch.
    """

    answered: list[Answered]
    failures: dict[int, ShorttailError]
    requests_per_run: float


class _Part(NamedTuple):
    """A run that succeeded. The rows of its requests follow each other in `outputs`, if not in the batch."""

    requests: Sequence[RequestRows]
    outputs: list[Array]


class PartRun:
    """Runs the requests of a batch with at most `requests_per_run` of them in a run. `step` makes one run.

    inputs: an array [rows, ...] for each input of the model; of any shape if there is only one request. A run of
    several requests has at most the rows that may run on the event loop, if the model may run there. Requests that make
    the model fail are found by halving.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: Sequence[Array],
        rows: int,
        requests: Sequence[RequestRows],
        requests_per_run: float,
    ):
        self.runner = runner
        self.inputs = inputs
        self.rows = rows
        self.requests = requests
        self.run_rows_max = runner.loop_rows_max or LIMITS.batch_rows
        self.limit = 1.0 if runner.by_request else requests_per_run
        self.position = 0  # of the first request that was in no run yet
        self.halves: list[Sequence[RequestRows]] = []  # of runs that have failed
        self.parts: list[_Part] = []
        self.failures: dict[int, ShorttailError] = {}
        self.request_ns = 0.0  # of a request in the last run that succeeded

    @property
    def is_done(self) -> bool:
        """Whether every request has an answer or an error."""
        return not self.halves and self.position == len(self.requests)

    def step(self, *, on_loop: bool = False) -> None:
        """Make the next run. Raises nothing that the model raises.

        on_loop: the run has the short limit of the event loop. If it is ended for that, RunTimedOut is raised, and the
        next step makes the same run again, which should be in a thread.
        """
        is_half = bool(self.halves)
        part = self.halves.pop() if is_half else self._next_part()
        start_ns = time.perf_counter_ns()
        try:
            self.parts.append(_Part(part, self._run(part)))
        except ShorttailError as error:
            if on_loop and isinstance(error, RunTimedOut):
                self.halves.append(part)
                raise
            took_ns = time.perf_counter_ns() - start_ns
            self._failed(part, error, is_half, took_ns)
        else:
            self.request_ns = (time.perf_counter_ns() - start_ns) / len(part)
            if not is_half and not self.runner.by_request:
                self.limit *= GROWTH

    def result(self) -> PartRuns:
        """Return the answers and the errors, once all runs are made."""
        failures = {
            number: self.runner.explain(error, worked=bool(self.parts)) if isinstance(error, ModelFailed) else error
            for number, error in self.failures.items()
        }
        limit = self.limit
        if not self.runner.by_request and not failures and limit > LIMITS.batch_rows:
            limit = ANY_NUMBER
        return PartRuns(_joined(self.parts, self.rows), failures, limit)

    def _next_part(self) -> Sequence[RequestRows]:
        """Take as many of the next requests as may share a run, at least one."""
        end, rows = self.position, 0
        most = len(self.requests) if self.limit == ANY_NUMBER else max(1, int(self.limit))
        while end < len(self.requests) and end - self.position < most:
            rows += self.requests[end].rows
            if rows > self.run_rows_max and end > self.position:
                break
            end += 1
        part = self.requests[self.position : end]
        self.position = end
        return part

    def _run(self, part: Sequence[RequestRows]) -> list[Array]:
        first, rows = part[0].first, sum(request.rows for request in part)
        if rows == self.rows:
            return self.runner.run(self.inputs)
        if part[-1].first + part[-1].rows == first + rows:
            taken = [array[first : first + rows] for array in self.inputs]
        else:  # the callers of requests between them have gone
            taken = [np.concatenate([array[r.first : r.first + r.rows] for r in part]) for array in self.inputs]
        outputs = self.runner.run(taken)
        for name, array in zip(self.runner.output_names, outputs, strict=True):
            if array.shape[:1] != (rows,):
                raise Internal(f"output '{name}' has the shape {list(array.shape)} for {rows} rows")
        return outputs

    def _failed(self, part: Sequence[RequestRows], error: ShorttailError, is_half: bool, took_ns: int) -> None:
        endless = isinstance(error, RunTimedOut)
        if len(part) == 1:
            self.failures[part[0].number] = error
        elif endless:  # each further try of several requests could take as long
            self.halves += [[request] for request in reversed(part)]
        else:
            middle = len(part) // 2
            self.halves += [part[middle:], part[:middle]]
        if endless or took_ns > len(part) * self.request_ns > 0:
            self.limit = 1.0
        elif not is_half:
            self.limit = max(1.0, min(self.limit, len(part)) / 2)


def _joined(parts: Sequence[_Part], rows: int) -> list[Answered]:
    """Put the outputs of runs into arrays of the whole batch, one set of arrays for each set of widths."""
    if len(parts) == 1 and sum(request.rows for request in parts[0].requests) == rows:
        return [Answered([request.number for request in parts[0].requests], parts[0].outputs)]
    alike: dict[tuple[Any, ...], list[_Part]] = {}
    for part in parts:
        alike.setdefault(tuple((array.shape[1:], array.dtype) for array in part.outputs), []).append(part)
    answered = []
    for (*forms,), group in alike.items():
        wholes = [np.full((rows, *shape), "" if dtype.hasobject else 0, dtype) for shape, dtype in forms]
        for part in group:
            at, first = 0, part.requests[0].first
            count = sum(request.rows for request in part.requests)
            if part.requests[-1].first + part.requests[-1].rows == first + count:
                for whole, array in zip(wholes, part.outputs, strict=True):
                    whole[first : first + count] = array
                continue
            for request in part.requests:
                for whole, array in zip(wholes, part.outputs, strict=True):
                    whole[request.first : request.first + request.rows] = array[at : at + request.rows]
                at += request.rows
        answered.append(Answered([request.number for part in group for request in part.requests], wholes))
    return sorted(answered, key=lambda item: len(item.requests))
