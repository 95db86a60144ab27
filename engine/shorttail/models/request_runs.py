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
from shorttail.errors import Internal, InvalidArgument, ShorttailError
from shorttail.models.session import ModelFailed, RunTimedOut

if TYPE_CHECKING:
    from shorttail.models.load import Runner

Array = NDArray[Any]
ANY_NUMBER: Final = math.inf  # of requests may share a run

# A request changes the estimate of the share of bad requests by this part of the difference.
SHARE_WEIGHT: Final = 0.005
SLOPE_ROWS: Final = 256  # a row costs the slope of the model's time from 1 row to this many
PART_US: Final = 10.0  # what a run costs besides the model: slices of arrays, calls in Python


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
    failures: number of a request -> its error.
    """

    answered: list[Answered]
    failures: dict[int, ShorttailError]


class _Part(NamedTuple):
    """A run that succeeded. first: the first row of its requests in the batch, -1 if they do not follow each other."""

    requests: Sequence[RequestRows]
    outputs: list[Array]
    first: int
    rows: int


class BadShare:
    """Estimates which share of a route's requests is bad, and how many requests should share a run because of it.

    value: the share, 0 to 1. requests_per_run: the number with the least expected time a request, as `best_size` says.
    known: the rows of requests that were refused lately -> (their error, when to forget it, in ns of CLOCK_MONOTONIC).
    Callers often repeat a request that was refused, and the same rows would be refused again.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.value = 0.0
        self.requests_per_run = 1.0 if runner.by_request else ANY_NUMBER
        self.known: dict[tuple[Any, ...], tuple[ShorttailError, int]] = {}
        self._value_then = 0.0  # when requests_per_run was computed

    def refused(self, rows: tuple[Any, ...]) -> ShorttailError | None:
        """Return the error with which these rows (`rows_of`) were refused lately, None if they were not."""
        error, until_ns = self.known.get(rows, (None, 0))
        if error is not None and until_ns < time.monotonic_ns():
            del self.known[rows]
            return None
        return error

    def remember(self, rows: tuple[Any, ...], error: ShorttailError) -> None:
        """Remember that these rows were refused, for LIMITS.refusal_kept_s."""
        while len(self.known) >= LIMITS.refusals_kept:
            del self.known[next(iter(self.known))]
        self.known[rows] = error, time.monotonic_ns() + int(1e9 * LIMITS.refusal_kept_s)

    def forget(self) -> None:
        """Forget the refusals whose time is over, if the oldest is one of them."""
        now_ns = time.monotonic_ns()
        while self.known and next(iter(self.known.values()))[1] < now_ns:
            del self.known[next(iter(self.known))]

    def learn(self, bad: int, requests: int, rows: int) -> None:
        """Note how many of some requests were bad. rows: of these requests."""
        if self.value == 0.0 and not bad:
            return
        weight = 1.0 - (1.0 - SHARE_WEIGHT) ** requests
        self.value += weight * (bad / requests - self.value)
        if self.value * LIMITS.batch_rows < 1.0:
            self.value = 0.0
        if not 0.8 * self._value_then <= self.value <= 1.25 * self._value_then and not self.runner.by_request:
            self._value_then = self.value
            self.requests_per_run = best_size(self.runner, self.value, rows / requests) if self.value else ANY_NUMBER


def best_size(runner: Runner, bad: float, rows: float) -> float:
    """Return how many requests of so many rows should share a run, if a share `bad` of them makes it fail.

    Larger runs share their fixed cost, but fail more often; a failed one is repeated in halves, and each failure costs
    an exception as well. It is the search for defective members of a group (Dorfman, "The Detection of Defective
    Members of Large Populations", 1943), where a test has a fixed cost, a cost for each member and one for a failure.
    """
    one_us = runner.cost_us(1)
    row_us = max(0.0, runner.cost_us(SLOPE_ROWS) - one_us) / (SLOPE_ROWS - 1)
    run_us = one_us - row_us + PART_US
    best, least_us = 1.0, float("inf")
    size = 1
    while size <= LIMITS.batch_rows:
        levels = math.log2(size)
        # For each bad request: a failure and a good half on each level, and the other requests of its run again.
        repeated_us = runner.failure_us * (1 + levels) + run_us * levels + row_us * rows * (size - 1)
        request_us = run_us / size + row_us * rows + bad * repeated_us
        if request_us < least_us:
            best, least_us = float(size), request_us
        size *= 2
    return best


def rows_of(inputs: Sequence[Array], rows: slice) -> tuple[Any, ...]:
    """Return the rows of all inputs as a key of a dict. Rows of another shape give another key."""
    return tuple(
        (array.shape[1:], tuple(array[rows].ravel().tolist()) if array.dtype.hasobject else array[rows].tobytes())
        for array in inputs
    )


class PartRun:
    """Runs the requests of a batch, at most `most` and `bad.requests_per_run` of them in a run. `step` makes one run.

    requests: (number, first row, rows) of each. inputs: an array [rows, ...] for each input of the model; of any shape
    if there is only one request. A run of several requests has at most the rows that may run on the event loop, if the
    model may run there. Requests that make the model fail are found by halving.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: Sequence[Array],
        rows: int,
        requests: Sequence[tuple[int, int, int]],
        bad: BadShare,
        most: int,
    ):
        self.runner = runner
        self.inputs = inputs
        self.rows = rows
        self.requests = [RequestRows(*request) for request in requests]
        self.failures: dict[int, ShorttailError] = {}
        self.bad = bad
        self.most = most
        self.run_rows_max = runner.loop_rows_max or LIMITS.batch_rows
        self.position = 0  # of the first request that was in no run yet
        self.halves: list[Sequence[RequestRows]] = []  # of runs that have failed
        self.parts: list[_Part] = []
        # Of tensors without an axis of rows, a slice of rows would not be the whole request.
        self.has_rows = bool(inputs) and all(array.ndim and len(array) == rows for array in inputs)
        if bad.known and self.has_rows:
            self._refuse_known()

    def _refuse_known(self) -> None:
        """Refuse the requests whose rows were refused lately, without a run."""
        self.bad.forget()
        others = []
        for request in self.requests:
            error = self.bad.refused(rows_of(self.inputs, slice(request.first, request.first + request.rows)))
            if error is None:
                others.append(request)
            else:
                self.failures[request.number] = error
                self.runner.counts.refused_again += 1
        self.requests = others

    @property
    def is_done(self) -> bool:
        """Whether every request has an answer or an error."""
        return not self.halves and self.position == len(self.requests)

    def step(self, *, on_loop: bool = False) -> None:
        """Make the next run. Raises nothing that the model raises.

        on_loop: the run has the short limit of the event loop. If it is ended for that, RunTimedOut is raised, and the
        next step makes the same run again, which should be in a thread.
        """
        part = self.halves.pop() if self.halves else self._next_part()
        self.runner.counts.in_parts += 1
        start_ns = time.perf_counter_ns()
        try:
            self.parts.append(self._run(part))
        except ShorttailError as error:
            if on_loop and isinstance(error, RunTimedOut):
                self.halves.append(part)
                raise
            self.runner.note_failure((time.perf_counter_ns() - start_ns) / 1e3, error)
            self._failed(part, error)
        else:
            self.bad.learn(0, len(part), self.parts[-1].rows)

    def result(self) -> PartRuns:
        """Return the answers and the errors, once all runs are made."""
        for request in self.requests:
            error = self.failures.get(request.number)
            if not isinstance(error, ModelFailed):
                continue
            explained = self.failures[request.number] = self.runner.explain(error, worked=bool(self.parts))
            if isinstance(explained, InvalidArgument) and self.has_rows:
                rows = slice(request.first, request.first + request.rows)
                if sum(array[rows].nbytes for array in self.inputs) <= LIMITS.refusal_bytes:
                    self.bad.remember(rows_of(self.inputs, rows), explained)
        return PartRuns(_joined(self.parts, self.rows), self.failures)

    def _next_part(self) -> Sequence[RequestRows]:
        """Take as many of the next requests as may share a run, at least one."""
        end, rows = self.position, 0
        most = min(self.most, self.bad.requests_per_run)
        while end < len(self.requests) and end - self.position < most:
            rows += self.requests[end].rows
            if rows > self.run_rows_max and end > self.position:
                break
            end += 1
        part = self.requests[self.position : end]
        self.position = end
        return part

    def _run(self, part: Sequence[RequestRows]) -> _Part:
        first, end = part[0].first, part[-1].first + part[-1].rows
        rows = end - first if len(part) == 1 else sum(request.rows for request in part)
        if rows == self.rows:
            return _Part(part, self.runner.run(self.inputs), first, rows)
        if end - first == rows:
            taken = [array[first:end] for array in self.inputs]
        else:  # there are others between them, whose callers have gone or that are refused
            first = -1
            taken = [np.concatenate([array[r.first : r.first + r.rows] for r in part]) for array in self.inputs]
        outputs = self.runner.run(taken)
        for name, array in zip(self.runner.output_names, outputs, strict=True):
            if array.shape[:1] != (rows,):
                raise Internal(f"output '{name}' has the shape {list(array.shape)} for {rows} rows")
        return _Part(part, outputs, first, rows)

    def _failed(self, part: Sequence[RequestRows], error: ShorttailError) -> None:
        if len(part) == 1:
            self.failures[part[0].number] = error
            self.bad.learn(1, 1, part[0].rows)
        elif isinstance(error, RunTimedOut):  # each further try of several requests could take as long
            self.halves += [[request] for request in reversed(part)]
        else:
            middle = len(part) // 2
            self.halves += [part[middle:], part[:middle]]


def _joined(parts: Sequence[_Part], rows: int) -> list[Answered]:
    """Put the outputs of runs into arrays of the whole batch, one set of arrays for each set of widths."""
    if len(parts) == 1 and parts[0].rows == rows:
        return [Answered([request.number for request in parts[0].requests], parts[0].outputs)]
    alike: dict[tuple[Any, ...], list[_Part]] = {}
    for part in parts:
        alike.setdefault(tuple([(array.shape[1:], array.dtype) for array in part.outputs]), []).append(part)
    answered = []
    for (*forms,), group in alike.items():
        wholes = [np.full((rows, *shape), "" if dtype.hasobject else 0, dtype) for shape, dtype in forms]
        for part in group:
            if part.first >= 0:
                for whole, array in zip(wholes, part.outputs, strict=True):
                    whole[part.first : part.first + part.rows] = array
                continue
            at = 0
            for request in part.requests:
                for whole, array in zip(wholes, part.outputs, strict=True):
                    whole[request.first : request.first + request.rows] = array[at : at + request.rows]
                at += request.rows
        answered.append(Answered([request.number for part in group for request in part.requests], wholes))
    return sorted(answered, key=lambda item: len(item.requests))
