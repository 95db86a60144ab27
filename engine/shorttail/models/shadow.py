"""A shadow: a version that runs on what the current one has answered. Its answers are compared, and never given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail import pipeline
from shorttail.pipeline import BatchResult, Plan, PlanOutdated

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def failed(self, error: Exception) -> None:
        self.errors += 1
        self.last_error = " ".join(f"{type(error).__name__}: {error}".split())[:300]


@dataclass(slots=True)
class Shadow:
    """A shadow of one plan. share: of batches, 0 to 1; same_inputs: the two versions are fed alike."""

    plan: Plan
    share: float
    same_inputs: bool
    counts: ShadowCounts = field(default_factory=ShadowCounts)
    due: float = 0.0
    running: bool = False  # set by whoever starts a batch, cleared when it has run

    def is_due(self) -> bool:
        """Whether the next batch is one of its share."""
        self.due += self.share
        if self.due < 1.0 - 1e-9:
            return False
        self.due -= 1.0
        return True


@dataclass(slots=True)
class ShadowBatch:
    """A batch that was answered. columns: what it was asked; None if `inputs`, what the model got, is all it takes."""

    shadow: Shadow
    columns: Columns | None
    inputs: Sequence[Array]
    names: Sequence[str]
    answered: Sequence[Array] = ()

    def run(self, store: Store) -> None:
        """Run the shadow on it, compare and count. For a thread of its own; raises nothing."""
        counts = self.shadow.counts
        runner = self.shadow.plan.runner
        assert runner is not None
        try:
            if self.columns is None:
                values = runner.run(self.inputs)
            else:
                result: BatchResult = pipeline.prepare(self.shadow.plan, store, self.columns)
                pipeline.infer(runner, result)
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
            self.shadow.running = False


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
