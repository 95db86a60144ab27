"""Jobs of the zygote that change the definition of a view again and again, and push rows to it meanwhile.

State n of the view is definitions(n): a feature is added, widened, renamed, gets another default, and is removed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from zygote import Shim

from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.registry.apply import apply
from shorttail.store import ColumnBatch, Store
from shorttail.store.table import UNTIMED

Report = Callable[..., None]

USER = Entity("user", keys={"id": dtypes.Int64})
A, S = Feature("a", dtypes.Int64), Feature("s", dtypes.String)
STATES = 6
ROWS = 3000
X = 9.5  # the value of the added feature in row 0


def definitions(step: int) -> FeatureView:
    more = {
        0: [],
        1: [Feature("x", dtypes.Float32, default=1.5)],
        2: [Feature("x", dtypes.Float64, default=1.5)],
        3: [Feature("y", dtypes.Float64, default=1.5, renamed_from="x")],
        4: [Feature("y", dtypes.Float64, default=2.5)],
        5: [],
    }[step % STATES]
    return FeatureView("v", USER, [S, A, *more] if step % STATES == 5 else [A, S, *more])


def state_of(store: Store) -> list[tuple[str, str, Any]]:
    return [(f.name, f.dtype.name, f.default) for f in store.catalog.views["v"].features]


def state_in(step: int) -> list[tuple[str, str, Any]]:
    return [(f.name, f.dtype.name, f.default) for f in definitions(step).features]


def rows(keys: list[int], x: float | None = None, x_name: str = "x") -> ColumnBatch:
    """Rows whose features follow from their keys."""
    ids = np.array(keys)
    texts = np.array([str(key) for key in keys], object)
    features: list[Any] = [(ids, None), (texts, None)]
    names = ["a", "s"]
    if x is not None:
        features.append((np.full(len(keys), x), None))
        names.append(x_name)
    return ColumnBatch([ids], np.full(len(keys), UNTIMED), features, tuple(names))


def change(report: Report, path: str, step: int, fault: list[int] | None = None) -> None:
    """Apply the definitions of a step. fault: (mode, number of the write at which the process dies)."""
    shim = Shim()
    with Store.open(path) as store:
        report(seen=True)
        if fault is not None:
            shim.arm(path, *fault)
        apply(store, [definitions(step)])
        shim.disarm()
        report(done=step)


def count_writes(report: Report, path: str, step: int) -> None:
    """Apply the definitions of a step, and report how many writes that takes."""
    shim = Shim()
    with Store.open(path) as store:
        shim.watch(path)
        apply(store, [definitions(step)])
        report(writes=shim.calls)


def push_on(report: Report, path: str) -> None:
    """Push rows with new keys until the process is killed, and report the last one that was acknowledged."""
    with Store.open(path) as store:
        for key in itertools.count(ROWS):
            assert store.upsert("v", rows([key])) == 1
            if key % 20 == 0:
                report(acked=key)


JOBS = (change, count_writes, push_on)
