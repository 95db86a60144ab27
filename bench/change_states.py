"""The states through which bench/change.py takes a store, and what a server must answer in each of them.

A view `stats` of many rows has eight features and a model `m`. A cycle adds a feature, widens, changes, renames, fills
and removes it, with a model `late` that takes it, and makes and drops a view `extra`. It ends as it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray
from worst import mean

import shorttail as st

FEATURES = [f"f{i}" for i in range(8)]
OF_MODEL = 4  # features that the model takes, the first ones
PUSHED = 8192  # keys whose rows are pushed again and again
TIERED = 64  # keys whose rows got a value of the added feature by a push
EXTRA = 10_000  # rows of the view that is made and dropped
EVENT_TIME_US = 1_700_000_000_000_000  # of all rows of the source
BATCH_ROWS = 1 << 18
NO_SCORE = -1.0

Keys = NDArray[np.int64]
Values = list[float | None]
Answer = Callable[[Keys], Values]  # what must be answered for these keys

# The kinds of changes that are counted. Others bring back what the next cycle changes.
KINDS = (
    "add a feature",
    "widen a type",
    "change a default",
    "rename a feature",
    "change a description",
    "fill a feature from the source",
    "remove a feature",
    "drop a model",
    "drop a view",
)


@dataclass(frozen=True)
class State:
    """What a store has after a change, and what it answers.

    kind: of the change. definitions: what is applied; rows: what is pushed, as (view, columns), if no definitions are.
    answers: what features and models answer that a cycle makes or drops; others are NOT_FOUND.
    """

    kind: str
    definitions: list[Any] = field(default_factory=list)
    rows: tuple[str, dict[str, Any]] | None = None
    prune: bool = False
    answers: dict[str, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Which keys the rows have: 0 to `rows`, of which the last are pushed again, and the very last have tiers."""

    rows: int

    @property
    def base(self) -> int:
        """The number of keys that are not pushed."""
        return self.rows - PUSHED - TIERED

    @property
    def tiered(self) -> Keys:
        return np.arange(self.rows - TIERED, self.rows)

    def is_tiered(self, keys: Keys) -> NDArray[np.bool_]:
        return (keys >= self.rows - TIERED) & (keys < self.rows)


def features_of(keys: Keys, turn: int | Keys = 0) -> NDArray[np.float32]:
    """Return float32 [n, 8]: the features of rows as they were pushed at a turn; 0: as they were loaded."""
    first = (keys * 7 + turn * 13) % 65_536
    return (first[:, None] + np.arange(len(FEATURES))).astype(np.float32)


def level_of(keys: Keys) -> Keys:
    """Return what the source says of the feature that was added as `tier`."""
    return keys % 97


def score_of(keys: Keys) -> NDArray[np.float32]:
    """Return what the source says of the feature `score`."""
    return (keys % 1009 + 0.5).astype(np.float32)


def write_source(path: Path, rows: int) -> None:
    """Write the file that the view is loaded and filled from. Its rows are in no order of their keys."""
    order = np.random.default_rng(0).permutation(rows)
    writer = None
    for start in range(0, rows, BATCH_ROWS):
        keys = order[start : start + BATCH_ROWS]
        features = features_of(keys)
        columns: dict[str, Any] = {"user_id": keys, "event_time": np.full(len(keys), EVENT_TIME_US)}
        columns |= {name: features[:, i] for i, name in enumerate(FEATURES)}
        columns |= {"level": level_of(keys), "score": score_of(keys)}
        batch = pa.RecordBatch.from_pydict(columns)
        writer = writer or pyarrow.parquet.ParquetWriter(path, batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()


class Cycle:
    """Makes the states of each cycle. folder: of the models' files and of the source."""

    def __init__(self, folder: Path, layout: Layout):
        self.layout = layout
        self.source = folder / "rows.parquet"
        user = st.Entity("user", keys={"user_id": st.Int64})
        self.view = st.FeatureView("stats", user, [st.Feature(name, st.Float32) for name in FEATURES])
        self.extra = st.FeatureView("extra", user, [st.Feature("x", st.Float32, default=0.5)])
        taken = [f"stats:{name}" for name in FEATURES[:OF_MODEL]]
        self.model = st.Model("m", mean(folder / "m.onnx", OF_MODEL), taken)
        self.late = st.Model("late", mean(folder / "late.onnx", 2), ["stats:f0", "stats:tier"])

    def start(self) -> State:
        return State("start", [self.view, self.model])

    def states(self, number: int) -> Iterator[State]:
        """Yield the states of a cycle in their order. number: of the cycle, from 0."""
        first, second = 1000 + number, 2000 + number
        tiered = self.layout.tiered
        tiers = tiered % 50 + 10 * number

        def tier(default: int, filled: bool = False, pushed: bool = True) -> Answer:
            def answer(keys: Keys) -> Values:
                found = np.full(len(keys), default)
                if filled:
                    found = np.where(keys < self.layout.base, level_of(keys), found)
                if pushed:
                    found = np.where(self.layout.is_tiered(keys), keys % 50 + 10 * number, found)
                return as_values(found)

            return answer

        def late(of: Answer) -> Answer:
            """The mean of f0 and of another feature."""
            return lambda keys: as_values((features_of(keys)[:, 0] + np.array(of(keys), float)) / 2)

        def stats(*features: st.Feature, **options: Any) -> st.FeatureView:
            return replace(self.view, features=[*self.view.features, *features], **options)

        narrow = st.Feature("tier", st.Int32, default=first)
        wide = replace(narrow, dtype=st.Int64)
        other = replace(wide, default=second)
        level = replace(other, name="level", renamed_from="tier")
        text = f"what users did, as of cycle {number}"
        score = st.Feature("score", st.Float32, default=NO_SCORE)
        source = st.ParquetSource(str(self.source), timestamp="event_time")
        # The model keeps the default that it was deployed with, and the feature that is renamed and removed.
        kept, refilled = late(tier(first)), late(tier(first, filled=True))

        view = stats(narrow)
        yield State("add a feature", [view, self.model], answers={"stats:tier": tier(first, pushed=False)})
        without = {"stats:tier": tier(first, pushed=False), "late": late(tier(first, pushed=False))}
        yield State("make a model", [view, self.model, self.late], answers=without)
        answers = {"stats:tier": tier(first), "late": kept}
        yield State("push", rows=("stats", {"user_id": tiered, "tier": tiers}), answers=answers)
        yield State("widen a type", [stats(wide)], answers=answers)
        answers = {"stats:tier": tier(second), "late": kept}
        yield State("change a default", [stats(other)], answers=answers)
        answers = {"stats:level": tier(second), "late": kept}
        yield State("rename a feature", [stats(level)], answers=answers)
        yield State("change a description", [stats(level, description=text)], answers=answers)
        answers = {"stats:level": tier(second, filled=True), "stats:score": self.scores, "late": refilled}
        filled = stats(level, score, description=text, source=source)
        yield State("fill a feature from the source", [filled], answers=answers)
        yield State("remove a feature", [self.view], answers={"late": refilled})
        yield State("drop a model", [self.view, self.model], prune=True)
        answers = {"extra:x": lambda keys: [0.5] * len(keys)}
        yield State("make a view", [self.view, self.model, self.extra], answers=answers)
        ids = np.arange(EXTRA)
        answers = {"extra:x": lambda keys: [float(key) if key < EXTRA else 0.5 for key in keys]}
        yield State("push", rows=("extra", {"user_id": ids, "x": ids.astype(np.float32)}), answers=answers)
        yield State("drop a view", [self.view, self.model], prune=True)

    def scores(self, keys: Keys) -> Values:
        """A row that was pushed is later than the source's, which then gives nothing."""
        return as_values(np.where(keys < self.layout.base, score_of(keys), NO_SCORE))


def as_values(found: NDArray[Any]) -> Values:
    return [float(value) for value in found]
