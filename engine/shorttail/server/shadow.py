"""Shadows: a shadow is a model version that runs on requests that the current version has answered.

Its answers are compared with those of the current version and counted. No client ever gets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail import pipeline
from shorttail._native.route import Route
from shorttail.errors import Internal
from shorttail.models.request_runs import BadShare, PartRun
from shorttail.pipeline import BatchResult, Plan, PlanOutdated, Shadow
from shorttail.server.runnable import Runnable

if TYPE_CHECKING:
    from shorttail._native.columns import Columns
    from shorttail.models.load import Runner
    from shorttail.store import Store

Array = NDArray[Any]

# Two runs of the same mathematics differ by rounding. A difference up to TOLERANCE counts as equal: relative for values
# above 1, absolute below.
TOLERANCE: Final = 1e-4


@dataclass(slots=True)
class ShadowCounts:
    """How the answers of a shadow compared with the current version's, in this process.

    rows_differing: rows in which an output differs by more than TOLERANCE, or is another text, integer or bool.
    largest_difference: the largest difference of two numbers. skipped: batches that came while the shadow still ran.
    """

    batches: int = 0
    rows: int = 0
    rows_differing: int = 0
    largest_difference: float = 0.0
    errors: int = 0
    skipped: int = 0
    last_error: str = ""

    def failed(self, error: Exception) -> None:
        self.errors += 1
        self.last_error = " ".join(f"{type(error).__name__}: {error}".split())[:300]


class ShadowState:
    """The state of one shadow in this process: its counts, and whether it runs.

    The state belongs to a pair of versions, not to a plan, so it outlives a change of the catalog that compiles new
    plans.
    """

    __slots__ = ("counts", "due", "running")

    def __init__(self) -> None:
        self.counts = ShadowCounts()
        self.due = 0.0
        self.running = False  # set by whoever starts a batch, cleared when it has run

    def is_due(self, share: float) -> bool:
        """Whether the shadow runs on the next batch, if it runs on this share of the batches (0 to 1)."""
        self.due += share
        if self.due < 1.0 - 1e-9:
            return False
        self.due -= 1.0
        return True


@dataclass(slots=True)
class ShadowBatch:
    """A batch that the current version answers, kept for the shadow.

    columns: the request columns, or None if the shadow takes the same input arrays (`inputs`) as the current version.
    rows, requests: of the batch.
    """

    shadow: Shadow
    state: ShadowState
    columns: Columns | None
    inputs: Sequence[Array]
    names: Sequence[str]
    rows: int
    requests: Sequence[tuple[int, int, int]]
    answered: Sequence[Array] = ()

    def run(self, store: Store) -> None:
        """Run the shadow on the batch, compare its answers and count them. Called in a thread; raises nothing."""
        counts = self.state.counts
        runner = self.shadow.plan.runner
        assert runner is not None
        try:
            if self.columns is None:
                values = self.infer(runner, self.inputs)
            else:
                values = self.infer(runner, pipeline.prepare(Route(self.shadow.plan), store, self.columns).values)
            answered = dict(zip(self.names, self.answered, strict=True))
            differing, largest = compare(answered, dict(zip(runner.output_names, values, strict=True)), self.rows)
        except PlanOutdated:
            counts.skipped += 1  # the catalog changed; the next batch comes with a new plan
        except Exception as error:
            counts.failed(error)
        else:
            counts.batches += 1
            counts.rows += len(differing)
            counts.rows_differing += int(np.count_nonzero(differing))
            counts.largest_difference = max(counts.largest_difference, largest)
        finally:
            self.state.running = False

    def infer(self, runner: Runner, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run the shadow's model, one request at a time if its rows depend on each other. Raises its first error."""
        if not runner.by_request or len(self.requests) == 1:
            return runner.run(inputs)
        run = PartRun(runner, inputs, self.rows, self.requests, BadShare(runner), 1)
        while not run.is_done:
            run.step()
        parts = run.result()
        for error in parts.failures.values():
            raise error
        if len(parts.answered) > 1:
            raise Internal("its outputs have other widths for some requests of a batch than for others")
        return parts.answered[0].outputs


class ShadowThread:
    """Runs shadows in a thread. Each shadow runs one batch at a time; only the batches of one turn wait for it."""

    def __init__(self, store: Store):
        self.store = store
        self.thread: ThreadPoolExecutor | None = None
        self.waiting: list[ShadowBatch] = []
        self.states: dict[tuple[str, int, int], ShadowState] = {}  # by (model, current version, shadow's version)

    def state(self, model: str, current: int, shadow: int) -> ShadowState:
        """The state of that shadow. States of the model's other pairs of versions are dropped."""
        key = (model, current, shadow)
        if key not in self.states:
            self.states = {other: state for other, state in self.states.items() if other[0] != model}
            self.states[key] = ShadowState()
        return self.states[key]

    def take(self, plan: Plan, batch: Runnable, result: BatchResult) -> ShadowBatch | None:
        """Keep what the shadow needs of a batch whose model is about to run. None: the shadow skips this batch."""
        shadow = plan.shadow
        if shadow is None:
            return None
        state = self.state(plan.model, plan.version, shadow.plan.version)
        if not state.is_due(shadow.share):
            return None
        if state.running:
            state.counts.skipped += 1
            return None
        columns = None
        if not shadow.same_inputs:
            columns = batch.columns
            batch.keep_columns()
        runner = shadow.plan.runner
        requests = batch.requests() if runner is not None and runner.by_request else ()
        return ShadowBatch(shadow, state, columns, result.values, result.names, batch.n_rows, requests)

    def add(self, shadowed: ShadowBatch, result: BatchResult) -> None:
        """Queue a batch for the shadow, with the answers that the current version gave."""
        shadowed.answered = result.values
        self.waiting.append(shadowed)

    def start(self) -> None:
        """Start the queued batches. Called after the replies of this turn are written."""
        waiting, self.waiting = self.waiting, []
        for shadowed in waiting:
            state = shadowed.state
            if state.running:
                state.counts.skipped += 1
                continue
            state.running = True
            runner = shadowed.shadow.plan.runner
            assert runner is not None
            thread = runner.executor
            if thread is None:
                thread = self.thread = self.thread or ThreadPoolExecutor(1, "shadow")
            thread.submit(shadowed.run, self.store)

    def describe(self, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the counts of each model's shadow to the list that `Engine.models()` gave."""
        for model in models:
            if (shadow := model["shadow"]) is not None:
                shadow.update(asdict(self.state(model["name"], model["version"], shadow["version"]).counts))
        return models

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)


def compare(answered: Mapping[str, Array], shadowed: Mapping[str, Array], rows: int) -> tuple[NDArray[np.bool_], float]:
    """Compare two versions' outputs, as far as both have an output of that name.

    rows: the first axis of every output; 1 for outputs of any shapes, which are compared as a whole.
    Returns (bool [rows], True where a row differs; the largest difference of two numbers). NaN equals NaN and differs
    from every number. Outputs of different shapes differ in every row.
    """
    differing = np.zeros(rows, np.bool_)
    largest = 0.0
    for name, ours in answered.items():
        theirs = shadowed.get(name)
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            differing[:] = True
            continue
        if ours.dtype.kind == "f" and theirs.dtype.kind == "f":
            a, b = by_rows(ours.astype(np.float64), rows), by_rows(theirs.astype(np.float64), rows)
            with np.errstate(invalid="ignore"):
                distance = np.where(a == b, 0.0, np.abs(a - b))  # of equal infinities too
                unlike = (distance > TOLERANCE * np.maximum(1.0, np.abs(a))) | np.isinf(distance)
            unlike |= np.isnan(a) != np.isnan(b)
            finite = distance[np.isfinite(distance)]
            largest = max(largest, float(finite.max(initial=0.0)))
        else:
            unlike = by_rows(np.asarray(ours != theirs), rows)
        differing |= unlike.any(axis=1)
    return differing, largest


def by_rows(array: Array, rows: int) -> Array:
    """Return an array as a matrix [rows, ...], also if it has no elements."""
    return array.reshape(rows, array.size // rows if rows else 0)
