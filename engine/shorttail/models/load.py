"""A model file into what runs it: a compiled forest where the graph is one, ONNX Runtime otherwise."""

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
from shorttail.errors import InvalidArgument
from shorttail.models.device import CPU, Device
from shorttail.models.forest import NotAForest, Runs, compile_forest
from shorttail.models.session import FixedRows, Session
from shorttail.models.settings import DEFAULT, RunSettings

log = logging.getLogger(__name__)

Array = NDArray[Any]

# `warm` times a batch in so many runs at the most, and no more of them after so long.
TIMED_RUNS: Final = 10
TIMED_US: Final = 1000


class Runner:
    """A loaded model: what a plan runs.

    run: one array for each of `inputs` in, one for each of `output_names` out. kind: "forest", "onnxruntime" or "cuda".
    why: what decided that, one line. executor: the only thread that may run it, if there is one.
    cost_us: rows -> microseconds of a batch, as `warm` measured them. loop_rows_max: a batch of more rows would stall
    an event loop.
    """

    def __init__(self, model: Runs, kind: str, why: str = "", executor: Executor | None = None):
        self.inputs = model.inputs
        self.output_names = model.output_names
        self.run = model.run  # the model's own: nothing is called in between
        self.kind = kind
        self.why = why
        self.executor = executor
        self.measured_us: dict[int, float] = {}
        self.loop_rows_max = 0 if executor else LIMITS.batch_rows
        self.model = model

    @property
    def description(self) -> str:
        """ "compiled forest, avx2, 300 trees", or "ONNX Runtime, 1 thread: it has a node of type Gemm"."""
        return f"{self.model.description}: {self.why}" if self.why else self.model.description

    def warm(self, example: Callable[[int], list[Array]]) -> None:
        """Run every power of two of rows, so that no request pays for a first run, and note what it costs.

        example: inputs of that many rows. Sizes that cost far more than a loop can bear, or much memory, are left out.
        Raises InvalidArgument when an output has not one row for each row.
        """
        rows = 1
        while rows <= LIMITS.batch_rows:
            inputs = example(rows)
            if sum(array.nbytes for array in inputs) > LIMITS.warm_bytes:
                break
            for name, array in zip(self.output_names, self.run(inputs), strict=True):
                if array.shape[:1] != (rows,):
                    raise InvalidArgument(
                        f"output '{name}' has the shape {list(array.shape)} for a batch of {rows}; the first axis of an"
                        " output must be the rows"
                    )
            self.measured_us[rows] = _shortest_us(self.run, inputs)
            if self.measured_us[rows] > LIMITS.warm_run_us:
                break
            rows *= 2
        if self.executor is None:
            self.loop_rows_max = self._rows_within(LIMITS.loop_stall_us)

    def cost_us(self, rows: int) -> float:
        """Microseconds that a batch takes: measured, or in proportion to what was. 0.0 before `warm`."""
        if not self.measured_us:
            return 0.0
        last = max(self.measured_us)
        if rows > last:
            return self.measured_us[last] * rows / last
        return float(np.interp(rows, list(self.measured_us), list(self.measured_us.values())))

    def _rows_within(self, limit_us: float) -> int:
        low, high = 0, LIMITS.batch_rows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost_us(middle) <= limit_us else (low, middle - 1)
        return low


def load(path: Path, outputs: Sequence[str], settings: RunSettings = DEFAULT, device: Device = CPU) -> Runner:
    """The fastest thing that gives the file's answers. Raises InvalidArgument if ONNX Runtime cannot load it.

    A forest is compared with ONNX Runtime before it may serve: on rows at its thresholds, just below and just above.
    Forests run on the CPU whatever the device.
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
                why = f"its compiled forest answers otherwise: {no.reason}"
                log.warning("%s runs in ONNX Runtime: %s", path, why)
    if device == CPU and not settings.padded:
        return Runner(plain, "onnxruntime", why)
    if any(tensor.dtype == "string" for tensor in (*session.inputs, *session.outputs)):
        return Runner(plain, "onnxruntime", f"{why}; its texts cannot be bound to buffers")

    from shorttail.models.buckets import BucketSession

    on_gpu = device.kind == "cuda"
    buckets = BucketSession(path, outputs, threads=settings.threads, device=device, owned=on_gpu)
    return Runner(buckets, device.kind if on_gpu else "onnxruntime", why, buckets.executor)


def _shortest_us(run: Callable[[Sequence[Array]], list[Array]], inputs: list[Array]) -> float:
    """Of two runs, and of more while they are short: what else the machine does weighs most on those."""
    shortest_us, runs, began_ns = math.inf, 0, time.perf_counter_ns()
    while runs < 2 or (runs < TIMED_RUNS and time.perf_counter_ns() - began_ns < 1e3 * TIMED_US):
        start_ns = time.perf_counter_ns()
        run(inputs)
        shortest_us = min(shortest_us, (time.perf_counter_ns() - start_ns) / 1e3)
        runs += 1
    return shortest_us
