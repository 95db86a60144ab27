"""Measures which settings run a model fastest on this host. Candidates take turns, on rows that no run has seen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shorttail.define.catalog import VersionInfo
from shorttail.errors import InvalidArgument
from shorttail.models.device import CPU, Device
from shorttail.models.examples import Examples
from shorttail.models.forest import Forest
from shorttail.models.load import Runner
from shorttail.models.serving import open_version
from shorttail.models.settings import DEFAULT, RunSettings, host
from shorttail.store.files import model_path

if TYPE_CHECKING:
    from shorttail.store import Store

BATCHES = (1, 8, 64, 512)
TURNS_MIN, TURNS_MAX = 7, 2000
# How many times faster a setting must be to be chosen. More threads take CPUs from other workers and models; padding
# computes rows that no request asked for, if batches have other sizes than the measured powers of two.
THREADS_MUST_GAIN, PADDING_MUST_GAIN = 1.25, 1.1


@dataclass
class Candidate:
    """Settings that are measured. median_us: rows of a batch -> median microseconds."""

    settings: RunSettings
    runner: Runner
    median_us: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The geometric mean of the times of all batch sizes, times the factor by which the settings must be faster.

        Lower is better.
        """
        factor = THREADS_MUST_GAIN if self.settings.threads > 1 else 1.0
        factor *= PADDING_MUST_GAIN if self.settings.padded else 1.0
        return geometric_mean(self.median_us.values()) * factor


@dataclass
class Tuning:
    """The result of a measurement. host: the description that the best settings are stored under."""

    model: str
    version: int
    host: str
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate:
        return min(self.candidates, key=lambda candidate: candidate.score)


def tune(store: Store, name: str, version: int | None = None, device: Device = CPU, seconds: float = 1.0) -> Tuning:
    """Measure a version of a model (None: the current one). Each batch size takes `seconds`.

    Raises NotFound if there is no such model or version, InvalidArgument if it cannot be loaded or takes tensors.
    """
    entry = store.catalog.model(name)
    number = entry.current if version is None else version
    info = entry.version(number)
    path = model_path(store.path, name, number)
    if info.model.is_raw:
        raise InvalidArgument(f"model '{name}' takes tensors of any shape, so there is no batch of rows to measure")
    first = open_version(path, info, number, DEFAULT, device)
    example = examples(store, info, path, first)
    candidates = [Candidate(DEFAULT, first)]
    for settings in others_to_try(first.kind == "forest", device):
        runner = open_version(path, info, number, settings, device)
        # A model with strings is never padded, so its padded candidate would be the same runner again.
        if all(runner.model.description != known.runner.model.description for known in candidates):
            candidates.append(Candidate(settings, runner))
    for rows in (first.exact_rows,) if first.exact_rows else BATCHES:
        measure([(candidate.median_us, candidate.runner) for candidate in candidates], example, rows, seconds)
    return Tuning(name, number, host(str(device)), candidates)


def others_to_try(forest: bool, device: Device) -> list[RunSettings]:
    """Return the settings that might beat the default ones. forest: the default settings run a compiled forest."""
    onnx = replace(DEFAULT, runner="onnxruntime") if forest else DEFAULT
    plain = [onnx] if forest else []
    if device.kind == "cuda":
        return plain  # on a GPU batches are always padded, and CPU threads do not matter
    threads = [2**n for n in range(1, len(os.sched_getaffinity(0)).bit_length())]
    return [*plain, replace(onnx, padded=True), *(replace(onnx, threads=n) for n in threads)]


Example = Callable[[int, np.random.Generator], list[NDArray[Any]]]


def examples(store: Store, info: VersionInfo, path: Path, runner: Runner) -> Example:
    """Return a function that makes random rows for the model of a version. path: its file.

    Rows for a forest have values around its thresholds; other random rows might all take the same path through a tree.
    """
    model = runner.model
    if isinstance(model, Forest):
        return model.check_rows().example
    found = Examples.of(store.catalog, info, path.read_bytes())
    found.keep_those_that_run(runner.run, np.random.default_rng(0), runner.exact_rows or 1)
    return found


def measure(targets: Sequence[tuple[dict[int, float], Runner]], example: Example, rows: int, seconds: float) -> None:
    """Measure the runners with batches of `rows` rows for `seconds`, and put the median microseconds into their dicts.

    Every turn has new rows and a new order of the runners.
    """
    random = np.random.default_rng()
    times_ns: list[list[int]] = [[] for _ in targets]
    for _, runner in targets:
        runner.run(example(rows, random))
    until = time.monotonic() + seconds
    turns = 0
    while turns < TURNS_MIN or (time.monotonic() < until and turns < TURNS_MAX):
        inputs = example(rows, random)
        for i in random.permutation(len(targets)):
            run = targets[i][1].run
            start = time.perf_counter_ns()
            run(inputs)
            times_ns[i].append(time.perf_counter_ns() - start)
        turns += 1
    for (median_us, _), times in zip(targets, times_ns, strict=True):
        median_us[rows] = median(times) / 1e3


def save(store: Store, tuning: Tuning) -> None:
    """Write the best settings into the catalog, for hosts like this one. Running engines use them once they refresh."""
    with store.edit_catalog(
        "tuned", f"model {tuning.model}", {"version": tuning.version, "host": tuning.host}
    ) as catalog:
        entry = catalog.model(tuning.model)
        info = entry.version(tuning.version)
        info = replace(info, tuning={**info.tuning, tuning.host: tuning.best.settings.to_json()})
        catalog.models[tuning.model] = replace(entry, versions={**entry.versions, tuning.version: info})
    store.refresh()
