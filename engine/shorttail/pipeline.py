"""The path of a batch, from request columns to answers. Read this page first.

A request reaches this page as rows of a `Columns`: native/wire fills it on the server, `Columns.append` in embedded
use. A batch holds the rows of all requests that waited for the same plan. A plan is compiled once (plan.py). It says
where each value comes from and where it goes, by column numbers, buffers and offsets instead of names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shorttail._native.columns import Columns, CopyColumns
from shorttail._native.pages import Lookup, lookup
from shorttail._native.route import Route, Split
from shorttail._native.transforms import TransformProgram
from shorttail.define.dtypes import DType
from shorttail.models.buffers import Buffer, check_outputs
from shorttail.models.request_runs import BadShare, PartRun
from shorttail.results import Statuses

if TYPE_CHECKING:
    from shorttail.define.catalog import TensorInfo
    from shorttail.models.load import Runner
    from shorttail.store import Store

STATUS = np.dtype(np.uint8)
TEXT_WORK: Final = 64
NO_STATUSES = np.empty((0, 0), STATUS)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One model version, or one list of features, compiled. A plan never changes; a Route holds what does."""

    kind: str  # "predict" or "features"
    key: tuple[Any, ...]  # what was asked for; when the catalog changes, it finds the plan's successor
    catalog_version: int
    model: str  # "" for features
    version: int  # 0 for features
    names: tuple[str, ...]  # request columns
    dtypes: tuple[DType, ...]
    required: tuple[str, ...]  # request columns that refuse a missing value
    instead: Mapping[str, Any]  # request column -> the value that replaces a missing value
    lookup_names: tuple[str, ...]  # "view" or "alias:view"; the names in the statuses of an answer
    table_ids: tuple[int, ...]  # for each lookup the table that it reads
    lookups: tuple[Lookup, ...]
    buffers: tuple[Buffer, ...]  # the model's inputs come first, in the model's order
    copy: CopyColumns | None  # of request columns
    transforms: TransformProgram | None  # the on-demand functions
    runner: Runner | None
    feature_names: tuple[str, ...]  # () for models
    feature_places: tuple[tuple[int, int | None], ...]  # for each feature its buffer, and its column there
    feature_types: tuple[str, ...]  # for each feature the name of its type
    has_default: tuple[bool, ...]
    status_rows: list[int] | None  # for each feature the row of its statuses in the lookup's output; None: in order
    split: Split | None = None  # the requests that a canary answers
    shadow: Shadow | None = None  # another version that runs on what was answered
    tensors: tuple[TensorInfo, ...] | None = None  # the inputs of a model that takes tensors; it has no columns
    made_of: tuple[Any, ...] = ()  # what of the catalog it was compiled from: while that stays, so does the plan

    @property
    def row_values(self) -> int:
        """Values of a row in the buffers, or in the answer if it has more: features may be asked for repeatedly."""
        return self._of_row(1)

    @property
    def row_work(self) -> int:
        """What a row costs to look up, compute and answer: as row_values, but a text counts for TEXT_WORK numbers."""
        return self._of_row(TEXT_WORK)

    def _of_row(self, text: int) -> int:
        values = [text if dtype.kind == "O" else 1 for dtype, _ in self.buffers]
        widths = [value * (width or 1) for value, (_, width) in zip(values, self.buffers, strict=True)]
        asked = sum((widths if column is None else values)[buffer] for buffer, column in self.feature_places)
        return max(sum(widths), asked)

    def new_columns(self) -> Columns:
        """Make empty request columns for this plan."""
        return Columns(self.names, self.dtypes, self.required, self.instead)

    def takes(self, columns: Columns) -> bool:
        """Return True if this plan can run a batch that was read for another one."""
        return (self.names, self.dtypes) == (columns.names, columns.dtypes)


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """A version that runs on what the current one has answered, to be compared with it.

    plan: of the shadow; share: the part of the batches that it runs on, 0 to 1; same_inputs: both versions take the
    same inputs, so the shadow runs on the arrays that the current one got.
    """

    plan: Plan
    share: float
    same_inputs: bool


@dataclass(slots=True)
class BatchResult:
    """The result of a batch of n rows; the first axis of every array is n, except in a request of a model's tensors.

    names, values: names and arrays of the outputs. Before `infer`, values are the model's input arrays.
    view_statuses: uint8 [lookups, n]; feature_statuses: uint8 [features, n], or None for a model.
    looked_up_ns, prepared_ns, inferred_ns: when each step ended, by time.perf_counter_ns; 0: the step was not run.
    """

    names: Sequence[str]
    values: Sequence[NDArray[Any]]
    view_statuses: Statuses
    feature_statuses: Statuses | None
    version: int
    looked_up_ns: int = 0
    prepared_ns: int = 0
    inferred_ns: int = 0

    @classmethod
    def of_inputs(cls, plan: Plan, inputs: Sequence[NDArray[Any]]) -> BatchResult:
        """The result of `prepare` for a request that brings the model's input tensors: nothing is looked up."""
        assert plan.runner is not None
        return cls(
            plan.runner.output_names, inputs, NO_STATUSES, None, plan.version, prepared_ns=time.perf_counter_ns()
        )

    @property
    def outputs(self) -> list[tuple[str, NDArray[Any]]]:
        return list(zip(self.names, self.values, strict=True))


class FeatureColumns(Sequence[NDArray[Any]]):
    """The features of a batch: each is a buffer, or a column of a buffer.

    A column's array is made when it is asked for, because making a NumPy view takes as long as a lookup.
    """

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
    """The catalog changed after the plan was compiled. The plan has to be compiled again."""


def run_batch(route: Route, store: Store, columns: Columns) -> BatchResult:
    """Look up, transform and infer all rows of `columns` at once. Raises PlanOutdated."""
    result = prepare(route, store, columns)
    runner = route.plan.runner
    if runner is not None:
        infer(runner, result)
        check_outputs(result.names, result.values, columns.n_rows)
    return result


def prepare(route: Route, store: Store, columns: Columns) -> BatchResult:
    """Look up the features and run the on-demand functions: everything but the model. Raises PlanOutdated.

    The result holds no reference to `columns`, which may be filled again at once.
    """
    plan = route.plan
    rows = columns.n_rows
    buffers = [np.empty(rows if width is None else (rows, width), dtype) for dtype, width in plan.buffers]
    view_statuses = np.empty((len(plan.lookups), rows), STATUS)
    feature_statuses = np.empty((len(plan.feature_names), rows), STATUS) if plan.feature_names else None

    # Between enter and leave the store keeps its snapshot, so the addresses in the directories stay valid.
    gate = store.gate
    if not gate.try_enter():
        store.enter()
    try:
        if store.catalog_version != plan.catalog_version:
            raise PlanOutdated
        directories = route.directories_in(store)
        now_us = time.time_ns() // 1000
        lookup(directories, plan.lookups, columns, buffers, view_statuses, now_us, feature_statuses)
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
    """Run the model on the result of `prepare`. This touches nothing else, so it may run in any thread.

    A batch of more than `runner.loop_rows_max` rows would hold up an event loop. Raises ModelFailed; the result then
    still has the model's inputs.
    """
    result.values = runner.run(result.values)
    result.inferred_ns = time.perf_counter_ns()


def infer_in_parts(
    runner: Runner, result: BatchResult, rows: int, requests: Sequence[tuple[int, int, int]], bad: BadShare, most: int
) -> PartRun:
    """Return what runs the model on the result of `prepare`, a few requests at a time (models/request_runs.py).

    rows: of the batch, with the rows of requests that are not asked for any more. most: requests of a run. The result
    keeps the model's inputs, because the model may give arrays of other widths to some requests.
    """
    return PartRun(runner, result.values, rows, requests, bad, most)
