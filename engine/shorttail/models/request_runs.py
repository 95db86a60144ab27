"""Runs a batch in parts, a few requests a run.

Two kinds of batches need it. If the answer for a row depends on the other rows of the run, each request has a run of
its own. And if a run fails, it is repeated in halves until only the requests that make the model fail are left, so that
no request fails for another's row.
"""

from __future__ import annotations

import math
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

# After a run that succeeds, the next may have GROWTH times as many requests; after one that fails, half as many. If a
# share p of the requests is bad, that settles where (1 - p)^n is about 0.6: five requests for one bad in ten. Runs of
# that size also need the fewest repetitions in all (Dorfman, "The Detection of Defective Members of Large Populations",
# 1943).
GROWTH: Final = 1.5


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
    """What `run_in_parts` returns.

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


def run_in_parts(
    runner: Runner, inputs: Sequence[Array], rows: int, requests: Sequence[RequestRows], requests_per_run: float
) -> PartRuns:
    """Run the requests of a batch with at most `requests_per_run` of them in a run.

    inputs: an array [rows, ...] for each input of the model; of any shape if there is only one request. Requests that
    make the model fail are found by halving. Raises nothing that the model raises.
    """
    limit = 1.0 if runner.by_request else requests_per_run
    failures: dict[int, ShorttailError] = {}
    parts: list[_Part] = []
    position = 0
    while position < len(requests):
        count = int(min(max(limit, 1.0), len(requests) - position))
        part = requests[position : position + count]
        position += count
        before = len(failures)
        _run_part(runner, inputs, rows, part, parts, failures)
        if any(isinstance(failures.get(request.number), RunTimedOut) for request in part):
            limit = 1.0  # each further try of a larger run would take as long
        elif len(failures) > before:
            limit = max(1.0, min(limit, count) / 2)
        elif not runner.by_request:
            limit *= GROWTH
    for number, error in failures.items():
        if isinstance(error, ModelFailed):
            failures[number] = runner.explain(error, worked=bool(parts))
    if not runner.by_request and not failures and limit > LIMITS.batch_rows:
        limit = ANY_NUMBER
    return PartRuns(_joined(parts, rows), failures, limit)


def _run_part(
    runner: Runner,
    inputs: Sequence[Array],
    batch_rows: int,
    requests: Sequence[RequestRows],
    parts: list[_Part],
    failures: dict[int, ShorttailError],
) -> None:
    """Run some requests together, and in halves if that fails."""
    waiting = [requests]
    while waiting:
        part = waiting.pop()
        first, rows = part[0].first, sum(request.rows for request in part)
        if rows == batch_rows:
            taken = list(inputs)
        elif part[-1].first + part[-1].rows == first + rows:
            taken = [array[first : first + rows] for array in inputs]
        else:  # the callers of requests between them have gone
            taken = [np.concatenate([array[r.first : r.first + r.rows] for r in part]) for array in inputs]
        try:
            outputs = runner.run(taken)
            for name, array in zip(runner.output_names, outputs, strict=True):
                if array.shape[:1] != (rows,) and rows != batch_rows:
                    raise Internal(f"output '{name}' has the shape {list(array.shape)} for {rows} rows")
        except ShorttailError as error:
            if len(part) == 1:
                failures[part[0].number] = error
            elif isinstance(error, RunTimedOut):
                waiting += [[request] for request in reversed(part)]
            else:
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
        else:
            parts.append(_Part(part, outputs))


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
