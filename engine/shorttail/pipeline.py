"""The path of a batch, from request columns to answers. Read this page first.

A request reaches this page as rows of a `Columns` (filled by native/wire on the server, by a dict in embedded use),
together with whatever else was pending for the same plan. A plan is compiled once (plan.py) and says, in numbers
instead of names, where each value comes from and where it goes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail._native.columns import Columns, CopyColumns
from shorttail._native.pages import Directory, Lookup, lookup
from shorttail._native.transforms import TransformProgram
from shorttail.dtypes import DType
from shorttail.results import Statuses

if TYPE_CHECKING:
    from shorttail.models.load import Runner
    from shorttail.models.shadow import Shadow
    from shorttail.store import Store

STATUS = np.dtype(np.uint8)


class Buffer(NamedTuple):
    """An array that a batch fills: a model input, an argument of an on-demand function, a feature column."""

    dtype: np.dtype[Any]
    width: int | None  # None: [rows]; else [rows, width]

    def example(self, rows: int, random: np.random.Generator) -> NDArray[Any]:
        """Random values, for warming up and measuring a model: small enough to be an index, or a number as text."""
        shape = rows if self.width is None else (rows, self.width)
        if self.dtype.hasobject:
            return np.full(shape, "0", self.dtype)
        values = random.normal(size=shape) if self.dtype.kind == "f" else random.integers(0, 2, shape)
        return values.astype(self.dtype)


@dataclass(frozen=True, slots=True)
class Split:
    """Which requests a canary answers: those whose first row, its first `columns` columns, hashes to below `below`."""

    version: int
    below: int  # of 2**32
    salt: int
    columns: int


@dataclass(slots=True)
class Plan:
    """One model version, or one list of features, ready to run."""

    kind: str  # "predict" or "features"
    key: tuple[Any, ...]  # what was asked for; finds this plan's successor when the catalog changes
    catalog_version: int
    model: str  # "" for features
    version: int  # 0 for features
    names: tuple[str, ...]  # request columns
    dtypes: tuple[DType, ...]
    view_names: tuple[str, ...]
    lookups: tuple[Lookup, ...]  # one a view
    buffers: tuple[Buffer, ...]  # the model's inputs come first, in its order
    copy: CopyColumns | None  # of request columns
    transforms: TransformProgram | None  # the on-demand functions
    runner: Runner | None
    feature_names: tuple[str, ...]  # () for models
    feature_places: tuple[tuple[int, int | None], ...]  # of each its buffer, and the column if that is a matrix
    has_default: tuple[bool, ...]
    status_rows: list[int] | None  # features: where the lookup wrote each one's statuses, unless in order
    spare: list[Columns] = field(default_factory=list)
    split: Split | None = None  # another version answers a part of the requests
    shadow: Shadow | None = None  # another version runs on what was answered
    directories: Sequence[Directory | None] = ()  # one a view, as they were in
    directories_of: object = None  # that dict of the store's

    def find_directories(self, store: Store) -> None:
        """Between enter() and leave()."""
        self.directories = [store.directory(view) for view in self.view_names]
        self.directories_of = store.directories

    def new_columns(self) -> Columns:
        """An empty batch for this plan."""
        return Columns(self.names, self.dtypes)

    def answers_for(self, asked: Plan, columns: Columns) -> bool:
        """Whether a batch parsed for `asked` can be run by this plan, and its answer read by what `asked` says."""
        return (
            (self.names, self.dtypes) == (columns.names, columns.dtypes)
            and self.view_names == asked.view_names
            and self.has_default == asked.has_default
        )


@dataclass(slots=True)
class BatchResult:
    """What a batch of n rows gave; every array's first axis is n.

    names, values: of the outputs (until `infer`, values are the model's inputs).
    view_statuses: uint8 [views, n]; feature_statuses: uint8 [features, n] or None.
    looked_up_ns, prepared_ns, inferred_ns: when each step was done, by time.perf_counter_ns; 0: it was not run.
    """

    names: Sequence[str]
    values: Sequence[NDArray[Any]]
    view_statuses: Statuses
    feature_statuses: Statuses | None
    version: int
    looked_up_ns: int = 0
    prepared_ns: int = 0
    inferred_ns: int = 0

    @property
    def outputs(self) -> list[tuple[str, NDArray[Any]]]:
        return list(zip(self.names, self.values, strict=True))


class FeatureColumns(Sequence[NDArray[Any]]):
    """The features of a batch, each a buffer or a column of one; made when asked for, because a view costs as much as
    a lookup."""

    __slots__ = ("buffers", "places")

    def __init__(self, buffers: list[NDArray[Any]], places: Sequence[tuple[int, int | None]]):
        self.buffers = buffers
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        buffer, column = self.places[i]
        return self.buffers[buffer] if column is None else self.buffers[buffer][:, column]


class PlanOutdated(Exception):
    """The catalog changed after the plan was compiled; compile it again."""


def run_batch(plan: Plan, store: Store, columns: Columns) -> BatchResult:
    """Look up, transform, infer: every row that `columns` holds, at once."""
    result = prepare(plan, store, columns)
    if plan.runner is not None:
        infer(plan.runner, result)
    return result


def prepare(plan: Plan, store: Store, columns: Columns) -> BatchResult:
    """Look up and transform: all there is to do but `infer`, if there is a model. Raises PlanOutdated.

    Nothing in the result refers to `columns`, which may be filled again at once.
    """
    rows = columns.n_rows
    buffers = [np.empty(rows if width is None else (rows, width), dtype) for dtype, width in plan.buffers]
    view_statuses = np.empty((len(plan.lookups), rows), STATUS)
    feature_statuses = np.empty((len(plan.feature_names), rows), STATUS) if plan.feature_names else None

    # Until it is left the store's snapshot stays, and with it the addresses in its directories.
    gate = store.gate
    if not gate.try_enter():
        store.enter()
    try:
        if store.catalog_version != plan.catalog_version:
            raise PlanOutdated
        if plan.directories_of is not store.directories:
            plan.find_directories(store)
        now_us = time.time_ns() // 1000
        lookup(plan.directories, plan.lookups, columns, buffers, view_statuses, now_us, feature_statuses)
    finally:
        if gate.leave():
            store.wake()
    looked_up_ns = time.perf_counter_ns()

    if plan.copy is not None:
        plan.copy.run(columns, buffers)
    if plan.transforms is not None:
        plan.transforms.run(buffers, rows)

    if feature_statuses is not None and plan.status_rows is not None:
        feature_statuses = feature_statuses[plan.status_rows]
    prepared_ns = time.perf_counter_ns()

    if plan.runner is None:
        values: Sequence[NDArray[Any]] = FeatureColumns(buffers, plan.feature_places)
        return BatchResult(plan.feature_names, values, view_statuses, feature_statuses, 0, looked_up_ns, prepared_ns)
    inputs = buffers[: len(plan.runner.inputs)]
    return BatchResult(plan.runner.output_names, inputs, view_statuses, None, plan.version, looked_up_ns, prepared_ns)


def infer(runner: Runner, result: BatchResult) -> None:
    """Run the model on what `prepare` gave. It touches nothing else, so that it may run in any thread.

    A batch of more than `runner.loop_rows_max` rows would stall an event loop.
    """
    result.values = runner.run(result.values)
    result.inferred_ns = time.perf_counter_ns()
