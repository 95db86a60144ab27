"""Loads a model file into a Runner: a compiled forest if the graph is a tree ensemble, else an ONNX Runtime session."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.define.catalog import TensorInfo
from shorttail.errors import DeadlineExceeded, InvalidArgument, ShorttailError
from shorttail.models.device import CPU, Device
from shorttail.models.forest import NotAForest, RunnableModel, compile_forest
from shorttail.models.raw import are_all_fixed, example_tensors
from shorttail.models.session import (
    ExactRows,
    FixedRows,
    ModelFailed,
    RawSession,
    RowsRefused,
    RunTimedOut,
    Session,
    check_rows,
)
from shorttail.models.settings import DEFAULT, RunSettings

Array = NDArray[Any]

# `warm` times a batch size with at most TIMED_RUNS runs, and starts no further run after TIMED_US (but at least two).
TIMED_RUNS: Final = 10
TIMED_US: Final = 1000
DIFFERS: Final = "its compiled forest gives other answers than ONNX Runtime"

# After so many runs in a row that held up the event loop, a model runs in a thread; after so many quick ones, on the
# loop again.
SLOW_RUNS: Final = 3
FAILURE_US: Final = 50.0  # of a run that fails, before one is measured: most of it is the exception
QUICK_RUNS: Final = 100


@dataclass(slots=True)
class RunCounts:
    """What went wrong with a loaded version so far, in this process; /metrics shows it.

    failed, timed_out: runs that ended with an error, or for the model's run_timeout. left_loop: runs on an event loop
    that were ended for its short limit and made again in a thread. in_parts: runs of batches whose requests do not all
    share a run. refused_again: requests refused without a run, because the same rows were refused just before.
    functions: name of an on-demand function -> [rows for which it failed, rows for which its vector had a wrong
    length].
    """

    failed: int = 0
    timed_out: int = 0
    left_loop: int = 0
    in_parts: int = 0
    refused_again: int = 0
    functions: dict[str, list[int]] = field(default_factory=dict)

    def note(self, error: ShorttailError) -> None:
        """Count a run that raised this error. Rows that were refused before a run are no failure of the model."""
        if isinstance(error, RunTimedOut):
            self.timed_out += 1
        elif isinstance(error, ModelFailed) and not isinstance(error, RowsRefused):
            self.failed += 1

    def of_function(self, name: str) -> list[int]:
        return self.functions.setdefault(name, [0, 0])


class Runner:
    """A loaded model, as a plan runs it.

    run: takes an array for each of `inputs` and returns an array for each of `output_names`. kind: "forest",
    "onnxruntime" or "cuda". why: the reason for that kind, in one line, "" for a forest. executor: the only thread that
    may call `run`; None if every thread may. measured_us: rows of a batch -> microseconds, filled by `warm`.
    loop_rows_max: the most rows that may run on an event loop; a larger batch would stall it. slow_runs: how many runs
    in a row have held up the event loop. by_request: each request has a run of its own, because the answer for a row
    depends on the other rows of the run. unwarmed: why no example could run, in one line, "" if one did. counts: of
    what went wrong.
    """

    def __init__(
        self,
        model: RunnableModel,
        kind: str,
        why: str = "",
        executor: Executor | None = None,
        *,
        by_request: bool = False,
    ):
        self.inputs = model.inputs
        self.output_names = model.output_names
        self.run = model.run  # the model's own method, so that no call is added to the hot path
        self.kind = kind
        self.why = why
        self.executor = executor
        self.measured_us: dict[int, float] = {}
        self.unwarmed = ""
        self.loop_rows_max = 0 if executor else LIMITS.batch_rows
        self.model = model
        self.by_request = by_request
        self._loop_rows_warm = self.loop_rows_max  # as warm-up measured it
        self.slow_runs = self._quick_runs = 0  # in a row
        self.failure_us = FAILURE_US  # of a run that fails
        self.counts = RunCounts()
        self._example: list[Array] | None = None  # one that the model has run
        self._worked_ns = 0  # when the example ran last

    def explain(self, error: ModelFailed, worked: bool = False) -> ShorttailError:
        """Return the error for a request that made the model fail in a run of its own.

        It is the request's fault if the model still runs its example, or has just run other requests (worked). Else
        the model itself is broken, and the error is returned as it is.
        """
        if isinstance(error, RunTimedOut):
            return DeadlineExceeded(error.message)
        if isinstance(error, RowsRefused):
            return InvalidArgument(error.message)
        if not worked and time.monotonic_ns() - self._worked_ns > 1e9 * LIMITS.example_run_s:
            if self._example is None:
                return error
            try:
                self.run(self._example)
            except ShorttailError:
                return error
            self._worked_ns = time.monotonic_ns()
        return InvalidArgument(f"the model refuses this request: {error.reason}")

    @property
    def exact_rows(self) -> int | None:
        """The number of rows that every run must have, None if any will do."""
        return self.model.rows if isinstance(self.model, ExactRows) else None

    @property
    def forest_differs(self) -> str:
        """`why`, if the model runs in ONNX Runtime because its compiled forest answered otherwise, else ""."""
        return self.why if self.why.startswith(DIFFERS) else ""

    @property
    def description(self) -> str:
        """For example "compiled forest, avx2, 300 trees" or "ONNX Runtime, 1 thread: it has a node of type Gemm"."""
        return f"{self.model.description}: {self.why}" if self.why else self.model.description

    def warm(self, example: Callable[[int], list[Array]]) -> None:
        """Run a batch of 1, 2, 4, ... rows, so that no request pays for a first run, and record how long each takes.

        example: returns inputs with the given number of rows. Warming stops at LIMITS.batch_rows, before a batch whose
        inputs exceed LIMITS.warm_bytes, and after a batch that takes more than LIMITS.warm_run_us. Two sizes are always
        measured, because one says nothing about what a further row costs. A model that takes an exact number of rows
        runs that many.
        Raises InvalidArgument if an output does not have as many rows as the inputs.
        """
        rows = self.exact_rows or 1
        while rows <= LIMITS.batch_rows:
            inputs = example(rows)
            if self._example is None:
                self._example = inputs
            if sum(array.nbytes for array in inputs) > LIMITS.warm_bytes:
                break
            check_rows(self.output_names, self.run(inputs), rows)
            self.measured_us[rows] = _shortest_us(self.run, inputs)
            if self.exact_rows:
                break
            if self.measured_us[rows] <= LIMITS.warm_run_us:
                rows *= 2
            elif len(self.measured_us) == 1:
                rows *= 4  # of a model that takes as long for each row, four rows are enough
            else:
                break
        if self.executor is None:
            self.loop_rows_max = self._loop_rows_warm = self._rows_within(LIMITS.loop_stall_us)

    def note_failure(self, took_us: float, error: ShorttailError) -> None:
        """Note an error of a run, and how long the run took. A long one counts as at most twice the average."""
        self.counts.note(error)
        self.failure_us += 0.1 * (min(took_us, 2 * self.failure_us) - self.failure_us)

    def note_slow(self, ended: bool = False) -> None:
        """Note a run that held up the event loop. After SLOW_RUNS in a row the model leaves the loop.

        A single such run says little: other processes may have held up this one. ended: the run was ended for its
        time, so the model leaves the loop at once.
        """
        self.slow_runs += 1
        self.counts.left_loop += ended
        if ended or self.slow_runs >= SLOW_RUNS:
            self.loop_rows_max = self.slow_runs = self._quick_runs = 0

    def note_quick(self, in_thread: bool = False) -> None:
        """Note a run that would not hold up the loop. A model that left the loop is back after QUICK_RUNS in a row."""
        self.slow_runs = 0
        if in_thread and self.loop_rows_max < self._loop_rows_warm:
            self._quick_runs += 1
            if self._quick_runs >= QUICK_RUNS:
                self.loop_rows_max = self._loop_rows_warm

    def refuse(self, check: Callable[[Sequence[Array]], None]) -> None:
        """Call `check` with the inputs of every run. It raises RowsRefused for rows that must not be run."""
        run = self.run

        def checked(inputs: Sequence[Array]) -> list[Array]:
            check(inputs)
            return run(inputs)

        self.run = checked

    def leave_unwarmed(self, reason: str) -> None:
        """Serve without a warm-up. Nobody knows how long the model takes, so no batch of it runs on an event loop."""
        self.unwarmed = reason
        self.loop_rows_max = 0

    def warm_raw(self, tensors: Sequence[TensorInfo]) -> None:
        """Run a made-up request of tensors. If it fails, `unwarmed` says why: a graph may want other values.

        Requests run in the event loop only if the example shows how long each of them takes.
        """
        self.loop_rows_max = self._loop_rows_warm = 0
        inputs = example_tensors(tensors)
        if inputs is None:
            return
        try:
            self.run(inputs)
        except ShorttailError as error:
            self.leave_unwarmed(error.message)
            return
        self.measured_us[1] = _shortest_us(self.run, inputs)
        if self.executor is None and are_all_fixed(tensors) and self.measured_us[1] <= LIMITS.loop_stall_us:
            self.loop_rows_max = self._loop_rows_warm = 1

    def cost_us(self, rows: int) -> float:
        """Estimate the microseconds of a batch, on lines through the measured sizes.

        Beyond the largest size the line through the last two goes on. Returns 0.0 before `warm`.
        """
        if not self.measured_us:
            return 0.0
        sizes, times_us = list(self.measured_us), list(self.measured_us.values())
        if rows <= sizes[-1]:
            return float(np.interp(rows, sizes, times_us))
        if len(sizes) == 1:
            return times_us[0] * rows / sizes[0]
        row_us = max(0.0, times_us[-1] - times_us[-2]) / (sizes[-1] - sizes[-2])
        return times_us[-1] + row_us * (rows - sizes[-1])

    def _rows_within(self, limit_us: float) -> int:
        """Return the largest batch, in rows, whose estimated time is at most `limit_us`."""
        low, high = 0, LIMITS.batch_rows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost_us(middle) <= limit_us else (low, middle - 1)
        return low


def load_runner(
    path: Path,
    outputs: Sequence[str],
    settings: RunSettings = DEFAULT,
    device: Device = CPU,
    *,
    by_request: bool = False,
    raw: bool = False,
    run_key: int = 1,
    run_timeout_s: float = LIMITS.run_timeout_s,
    forest_differs: str = "",
    every_leaf: bool = False,
) -> Runner:
    """Load an ONNX file into the fastest runner that gives ONNX Runtime's answers.

    by_request: each request has a run of its own, which is never padded or split. raw: requests bring tensors of any
    shape, each by itself. run_key, run_timeout_s: of Session. A forest is compared with ONNX Runtime before it may
    serve, on rows for 512 of its leaves, or on rows that reach every leaf (every_leaf). forest_differs: why an earlier
    comparison refused it, "" if none did; it is not compiled then. Forests run on the CPU, also where `device` is a
    GPU. Raises InvalidArgument if ONNX Runtime cannot load the file.
    """
    session = Session(path, outputs, settings.threads, run_key=run_key, run_timeout_s=run_timeout_s)
    plain: RunnableModel = FixedRows(session, session.fixed_rows) if session.fixed_rows else session
    if forest_differs:
        why = forest_differs
    elif settings.runner == "onnxruntime":
        why = "measured faster here by `shorttail tune`"
    elif raw and any(None in tensor.shape[1:] for tensor in session.inputs):
        why = "its requests may have any number of columns"
    else:
        try:
            forest = compile_forest(path, session.output_names)
        except NotAForest as no:
            why = no.reason
        else:
            try:
                if every_leaf:
                    forest.verify_every_leaf(plain, path)
                else:
                    forest.verify_against(plain)
                return Runner(forest, "forest", by_request=by_request)
            except NotAForest as no:
                why = f"{DIFFERS}: {no.reason}"
    if by_request or raw:
        executor = None
        if device != CPU:
            from shorttail.models.buckets import open_session

            executor = ThreadPoolExecutor(1, f"{path.parent.parent.name} on {device}")
            session = open_session(
                path, outputs, settings.threads, device, run_key=run_key, run_timeout_s=run_timeout_s
            )
        rows = session.fixed_rows
        model = RawSession(session) if raw else ExactRows(session, rows) if rows else session
        kind = "onnxruntime" if device == CPU else device.kind
        return Runner(model, kind, why, executor, by_request=True)
    if device == CPU and not settings.padded:
        return Runner(plain, "onnxruntime", why)
    if any(tensor.dtype == "string" for tensor in (*session.inputs, *session.outputs)):
        return Runner(plain, "onnxruntime", f"{why}; strings cannot be bound to buffers")

    from shorttail.models.buckets import BucketSession

    on_gpu = device.kind == "cuda"
    buckets = BucketSession(path, outputs, threads=settings.threads, device=device, owned=on_gpu)
    return Runner(buckets, device.kind if on_gpu else "onnxruntime", why, buckets.executor)


def _shortest_us(run: Callable[[Sequence[Array]], list[Array]], inputs: list[Array]) -> float:
    """Return the microseconds of the fastest run. Short runs are repeated most: other processes disturb them most."""
    shortest_us, runs, began_ns = math.inf, 0, time.perf_counter_ns()
    while runs < 2 or (runs < TIMED_RUNS and time.perf_counter_ns() - began_ns < 1e3 * TIMED_US):
        start_ns = time.perf_counter_ns()
        run(inputs)
        shortest_us = min(shortest_us, (time.perf_counter_ns() - start_ns) / 1e3)
        runs += 1
    return shortest_us
