"""Loads a model file into a Runner: a compiled forest if the graph is a tree ensemble, else an ONNX Runtime session."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.models.device import CPU, Device
from shorttail.models.forest import NotAForest, RunnableModel, compile_forest
from shorttail.models.session import FixedRows, Session, check_rows
from shorttail.models.settings import DEFAULT, RunSettings

log = logging.getLogger(__name__)

Array = NDArray[Any]

# `warm` times a batch size with at most TIMED_RUNS runs, and starts no further run after TIMED_US (but at least two).
TIMED_RUNS: Final = 10
TIMED_US: Final = 1000


class Runner:
    """A loaded model, as a plan runs it.

    run: takes an array for each of `inputs` and returns an array for each of `output_names`.
    kind: "forest", "onnxruntime" or "cuda". why: the reason for that kind, in one line, "" for a forest.
    executor: the only thread that may call `run`; None if every thread may.
    measured_us: rows of a batch -> microseconds, filled by `warm`.
    unwarmed: why no example row could run, in one line; "" once `warm` has run.
    loop_rows_max: the most rows that may run on an event loop; a larger batch would stall it.
    """

    def __init__(self, model: RunnableModel, kind: str, why: str = "", executor: Executor | None = None):
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

    @property
    def description(self) -> str:
        """For example "compiled forest, avx2, 300 trees" or "ONNX Runtime, 1 thread: it has a node of type Gemm"."""
        return f"{self.model.description}: {self.why}" if self.why else self.model.description

    def warm(self, example: Callable[[int], list[Array]]) -> None:
        """Run a batch of 1, 2, 4, ... rows, so that no request pays for a first run, and record how long each takes.

        example: returns inputs with the given number of rows. Warming stops at LIMITS.batch_rows, before a batch whose
        inputs exceed LIMITS.warm_bytes, and after a batch that takes more than LIMITS.warm_run_us.
        Raises InvalidArgument if an output does not have as many rows as the inputs.
        """
        rows = 1
        while rows <= LIMITS.batch_rows:
            inputs = example(rows)
            if sum(array.nbytes for array in inputs) > LIMITS.warm_bytes:
                break
            check_rows(self.output_names, self.run(inputs), rows)
            self.measured_us[rows] = _shortest_us(self.run, inputs)
            if self.measured_us[rows] > LIMITS.warm_run_us:
                break
            rows *= 2
        if self.executor is None:
            self.loop_rows_max = self._rows_within(LIMITS.loop_stall_us)

    def refuse(self, check: Callable[[Sequence[Array]], None]) -> None:
        """Call `check` with the inputs of every run. It raises InvalidArgument for rows that must not be run."""
        run = self.run

        def checked(inputs: Sequence[Array]) -> list[Array]:
            check(inputs)
            return run(inputs)

        self.run = checked

    def leave_unwarmed(self, reason: str) -> None:
        """Serve without a warm-up. Nobody knows how long the model takes, so no batch of it runs on an event loop."""
        self.unwarmed = reason
        self.loop_rows_max = 0

    def cost_us(self, rows: int) -> float:
        """Estimate the microseconds of a batch: interpolated between measured sizes, in proportion beyond the largest.

        Returns 0.0 before `warm`.
        """
        if not self.measured_us:
            return 0.0
        last = max(self.measured_us)
        if rows > last:
            return self.measured_us[last] * rows / last
        return float(np.interp(rows, list(self.measured_us), list(self.measured_us.values())))

    def _rows_within(self, limit_us: float) -> int:
        """Return the largest batch, in rows, whose estimated time is at most `limit_us`."""
        low, high = 0, LIMITS.batch_rows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost_us(middle) <= limit_us else (low, middle - 1)
        return low


def load_runner(path: Path, outputs: Sequence[str], settings: RunSettings = DEFAULT, device: Device = CPU) -> Runner:
    """Load an ONNX file into the fastest runner that gives ONNX Runtime's answers.

    A forest is compared with ONNX Runtime before it may serve: on rows at its thresholds, just below and just above.
    Forests run on the CPU, also where `device` is a GPU. Raises InvalidArgument if ONNX Runtime cannot load the file.
    """
    session = Session(path, outputs, settings.threads)
    plain = FixedRows(session, session.fixed_rows) if session.fixed_rows else session
    if settings.runner == "onnxruntime":
        why = "measured faster here by `shorttail tune`"
    else:
        try:
            forest = compile_forest(path, session.output_names)
        except NotAForest as no:
            why = no.reason
        else:
            try:
                forest.verify_against(plain)
                return Runner(forest, "forest")
            except NotAForest as no:
                why = f"its compiled forest gives other answers than ONNX Runtime: {no.reason}"
                log.warning("%s runs in ONNX Runtime: %s", path, why)
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
