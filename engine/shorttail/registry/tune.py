"""Which settings run a model fastest on this host: measured on rows that no run has seen, candidates in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shorttail import plan as planning
from shorttail.models.device import CPU, Device
from shorttail.models.forest import Forest
from shorttail.models.load import Runner, load
from shorttail.models.settings import DEFAULT, RunSettings, host
from shorttail.registry import versions as registry
from shorttail.store.files import model_path

if TYPE_CHECKING:
    from shorttail.store import Store

BATCHES = (1, 8, 64, 512)
TURNS_MIN, TURNS_MAX = 7, 2000
# How much faster something must be to be worth its price: more threads are taken from other workers and models, and
# padding computes rows that nobody asked for when batches are of other sizes than those measured.
THREADS_MUST_GAIN, PADDING_MUST_GAIN = 1.25, 1.1


@dataclass
class Candidate:
    """us: rows -> median microseconds of a batch."""

    settings: RunSettings
    runner: Runner
    us: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Lower is better: the mean over the batch sizes in which each counts by ratio, times what it must gain."""
        price = THREADS_MUST_GAIN if self.settings.threads > 1 else 1.0
        price *= PADDING_MUST_GAIN if self.settings.padded else 1.0
        return geometric_mean(self.us.values()) * price


@dataclass
class Tuning:
    model: str
    version: int
    host: str
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate:
        return min(self.candidates, key=lambda candidate: candidate.score)


def tune(store: Store, name: str, version: int | None = None, device: Device = CPU, seconds: float = 1.0) -> Tuning:
    """Measure a version of a model (None: the current one), for `seconds` with each size of batch.

    Raises NotFound, InvalidArgument.
    """
    entry = store.catalog.model(name)
    number = entry.current if version is None else version
    info = entry.version(number)
    path = model_path(store.path, name, number)
    outputs = [tensor.name for tensor in info.outputs]
    first = load(path, outputs, DEFAULT, device)
    example = examples(store, name, number, first)
    candidates = [Candidate(DEFAULT, first)]
    for settings in others_to_try(first.kind == "forest", device):
        runner = load(path, outputs, settings, device)
        # A model with texts comes out the same whether padded or not.
        if all(runner.model.description != known.runner.model.description for known in candidates):
            candidates.append(Candidate(settings, runner))
    for rows in BATCHES:
        measure([(candidate.us, candidate.runner) for candidate in candidates], example, rows, seconds)
    return Tuning(name, number, host(str(device)), candidates)


def others_to_try(forest: bool, device: Device) -> list[RunSettings]:
    """What might beat the default settings; forest: those make a forest of the model."""
    onnx = replace(DEFAULT, runner="onnxruntime") if forest else DEFAULT
    plain = [onnx] if forest else []
    if device.kind == "cuda":
        return plain  # padded always, and its threads are the GPU's
    threads = [2**n for n in range(1, len(os.sched_getaffinity(0)).bit_length())]
    return [*plain, replace(onnx, padded=True), *(replace(onnx, threads=n) for n in threads)]


Example = Callable[[int, np.random.Generator], list[NDArray[Any]]]


def examples(store: Store, name: str, version: int, runner: Runner) -> Example:
    """Random rows for the model. Those for trees turn at their thresholds: others might all take the same path."""
    model = runner.model
    if isinstance(model, Forest):
        return model.example
    plan = planning.compile_model(store, name, version, runner, ("tune", name, version))
    buffers = plan.buffers[: len(runner.inputs)]
    return lambda rows, random: [buffer.example(rows, random) for buffer in buffers]


def measure(targets: Sequence[tuple[dict[int, float], Runner]], example: Example, rows: int, seconds: float) -> None:
    """Put into each target's dict the median time of a batch of so many rows. New rows in every turn, in new order."""
    random = np.random.default_rng()
    taken: list[list[int]] = [[] for _ in targets]
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
            taken[i].append(time.perf_counter_ns() - start)
        turns += 1
    for (us, _), times in zip(targets, taken, strict=True):
        us[rows] = median(times) / 1e3


def save(store: Store, tuning: Tuning) -> None:
    """Write the best settings into the catalog, for hosts like this one. Engines take them up when they see it."""
    with store.edit_catalog() as catalog:
        entry = catalog.model(tuning.model)
        info = entry.version(tuning.version)
        info = replace(info, tuning={**info.tuning, tuning.host: tuning.best.settings.to_json()})
        catalog.models[tuning.model] = replace(entry, versions={**entry.versions, tuning.version: info})
    registry.refresh(store)
