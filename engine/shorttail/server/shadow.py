"""A shadow: a version that runs on what the current one has answered. Its answers are compared, and never given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail import pipeline
from shorttail._native.route import Route
from shorttail.pipeline import BatchResult, Plan, PlanOutdated, Shadow
from shorttail.server.runnable import Runnable

if TYPE_CHECKING:
    from shorttail._native.columns import Columns
    from shorttail.store import Store

Array = NDArray[Any]

# Two runs of the same mathematics differ by rounding: by no more than this, relative above 1 and absolute below.
TOLERANCE: Final = 1e-4


@dataclass(slots=True)
class ShadowCounts:
    """What a shadow's answers were found to be, in this process.

    rows_differing: those in which some output differs by more than TOLERANCE, or is another text, integer or truth
    value. largest_difference: of any number. skipped: batches that came while the last one was still running.
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
    """What is known of one shadow in this process: its counts, and whether it runs.

    It is found by the two versions, so it goes on when the catalog changes and their plans are compiled again.
    """

    __slots__ = ("counts", "due", "running")

    def __init__(self) -> None:
        self.counts = ShadowCounts()
        self.due = 0.0
        self.running = False  # set by whoever starts a batch, cleared when it has run

    def is_due(self, share: float) -> bool:
        """Whether the next batch is one of the shadow's share (0 to 1)."""
        self.due += share
        if self.due < 1.0 - 1e-9:
            return False
        self.due -= 1.0
        return True


@dataclass(slots=True)
class ShadowBatch:
    """A batch that was answered. columns: what it was asked; None if `inputs`, what the model got, is all it takes."""

    shadow: Shadow
    state: ShadowState
    columns: Columns | None
    inputs: Sequence[Array]
    names: Sequence[str]
    answered: Sequence[Array] = ()

    def run(self, store: Store) -> None:
        """Run the shadow on it, compare and count. For a thread of its own; raises nothing."""
        counts = self.state.counts
        runner = self.shadow.plan.runner
        assert runner is not None
        try:
            if self.columns is None:
                values = runner.run(self.inputs)
            else:
                result = pipeline.run_batch(Route(self.shadow.plan), store, self.columns)
                values = list(result.values)
            answered = dict(zip(self.names, self.answered, strict=True))
            differing, largest = compare(answered, dict(zip(runner.output_names, values, strict=True)))
        except PlanOutdated:
            counts.skipped += 1  # the catalog changed: the next batch comes with another plan
        except Exception as error:
            counts.failed(error)
        else:
            counts.batches += 1
            counts.rows += len(differing)
            counts.rows_differing += int(np.count_nonzero(differing))
            counts.largest_difference = max(counts.largest_difference, largest)
        finally:
            self.state.running = False


class ShadowThread:
    """Runs shadows on what was answered: of each model one batch at a time, and none waits but those of one turn."""

    def __init__(self, store: Store):
        self.store = store
        self.thread: ThreadPoolExecutor | None = None
        self.waiting: list[ShadowBatch] = []
        self.states: dict[tuple[str, int, int], ShadowState] = {}  # by model, version that answers, shadow's version

    def state(self, model: str, current: int, shadow: int) -> ShadowState:
        """What is known of that shadow. Another shadow of the model, or of another version of it, is forgotten."""
        key = (model, current, shadow)
        if key not in self.states:
            self.states = {other: state for other, state in self.states.items() if other[0] != model}
            self.states[key] = ShadowState()
        return self.states[key]

    def take(self, plan: Plan, batch: Runnable, result: BatchResult) -> ShadowBatch | None:
        """Before a batch's model runs: what its shadow will need, or None if this batch is none of its share."""
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
        return ShadowBatch(shadow, state, columns, result.values, result.names)

    def add(self, shadowed: ShadowBatch, result: BatchResult) -> None:
        """Once its answers are made."""
        shadowed.answered = result.values
        self.waiting.append(shadowed)

    def start(self) -> None:
        """Once the answers of this turn are sent."""
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
        """`Engine.models()` with what each shadow was found to answer so far."""
        for model in models:
            if (shadow := model["shadow"]) is not None:
                shadow.update(asdict(self.state(model["name"], model["version"], shadow["version"]).counts))
        return models

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)


def compare(answered: Mapping[str, Array], shadowed: Mapping[str, Array]) -> tuple[NDArray[np.bool_], float]:
    """(bool [rows]: the row differs, the largest difference of a number), over the outputs that both have.

    NaN equals NaN; against anything else it differs, and so does a row of another shape.
    """
    rows = len(next(iter(answered.values())))
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
            a, b = ours.astype(np.float64).reshape(rows, -1), theirs.astype(np.float64).reshape(rows, -1)
            with np.errstate(invalid="ignore"):
                distance = np.where(a == b, 0.0, np.abs(a - b))  # of equal infinities too
                unlike = (distance > TOLERANCE * np.maximum(1.0, np.abs(a))) | np.isinf(distance)
            unlike |= np.isnan(a) != np.isnan(b)
            finite = distance[np.isfinite(distance)]
            largest = max(largest, float(finite.max(initial=0.0)))
        else:
            unlike = (ours != theirs).reshape(rows, -1)
        differing |= unlike.any(axis=1)
    return differing, largest
