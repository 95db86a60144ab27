"""Times `plan` of a store with 200 views and 100 models, of which one view has changed, for bench/change.py."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import onnx
import report
from loadgen import BenchError
from micro import forest as forests

import shorttail as st
from shorttail.registry import apply as applying
from shorttail.store import Store

VIEWS, MODELS = 200, 100
QUICK_VIEWS, QUICK_MODELS = 20, 10
FEATURES = forests.WIDTH // 2  # of a view; a model takes those of two views
ROUNDS, QUICK_ROUNDS = 5, 2
LIMIT_S = 1.0
DEFINITIONS = """\
import shorttail as st

user = st.Entity("user", keys={{"user_id": st.Int64}})
names = [f"f{{i}}" for i in range({features})]
views = [
    st.FeatureView(f"view_{{n}}", entity=user, features=[st.Feature(name, st.Float32) for name in names])
    for n in range({views})
]
models = [
    st.Model(
        f"model_{{n}}",
        f"model_{{n}}.onnx",
        [f"view_{{m % {views}}}:{{name}}" for m in (2 * n, 2 * n + 1) for name in names],
        outputs=["probabilities"],
    )
    for n in range({models})
]
"""
CHANGED = """
views[7] = st.FeatureView(
    "view_7", entity=user, features=[*views[7].features, st.Feature("added", st.Float32, default=0.5)]
)
"""


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """Make the store, and return the seconds of the command and of its work. quick: a tenth of the views and models."""
    n_views, n_models = (QUICK_VIEWS, QUICK_MODELS) if quick else (VIEWS, MODELS)
    folder.mkdir()
    write_models(folder, n_models)
    definitions, store = folder / "definitions.py", folder / "store"
    text = DEFINITIONS.format(features=FEATURES, views=n_views, models=n_models)
    definitions.write_text(text)
    with st.Engine.open(store, create=True) as engine:
        engine.apply(str(definitions))
        for n in range(n_views):
            engine.push(f"view_{n}", {"user_id": list(range(10)), **{f"f{i}": [0.5] * 10 for i in range(FEATURES)}})
    definitions.write_text(text + CHANGED)
    work_s, command_s = [], []
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        start_s = time.perf_counter()
        with Store.open(store) as target:
            found = applying.plan(target, applying.prepare(str(definitions)))
        work_s.append(time.perf_counter() - start_s)
        if found.errors or list(found.tables) != ["view_7"]:
            raise BenchError(f"the plan has {len(found.errors)} errors and new tables for {', '.join(found.tables)}")
        command_s.append(command(definitions, store))
    return {
        "views": n_views,
        "models": n_models,
        "work_s": report.spread(work_s),
        "command_s": report.spread(command_s),
    }


def bars_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    what = f"plan of {figures['views']} views and {figures['models']} models"
    return [
        report.at_most(f"{what}: the work", figures["work_s"]["median"], LIMIT_S, "s"),
        report.at_most(f"{what}: the command", figures["command_s"]["median"], LIMIT_S, "s"),
    ]


def command(definitions: Path, store: Path) -> float:
    """Return the seconds that `shorttail plan` takes, with the start of its interpreter."""
    words = [sys.executable, "-m", "shorttail", "plan", str(definitions), "--store", str(store)]
    start_s = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    seconds = time.perf_counter() - start_s
    if done.returncode != 0 or "1 new table" not in done.stdout:
        last = ([*done.stderr.splitlines(), *done.stdout.splitlines()] or ["it said nothing"])[-1]
        raise BenchError(f"shorttail plan: {last}")
    return seconds


def write_models(folder: Path, count: int) -> None:
    """Write files that differ from each other: a forest of 100 trees with 31 leaves."""
    forests.training_rows = forests.QUICK_TRAINING_ROWS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = onnx.load_model_from_string(forests.MODELS["lightgbm-100x31"]())
    for n in range(count):
        model.producer_version = str(n)
        onnx.save_model(model, str(folder / f"model_{n}.onnx"))
