"""Finds out whether a model's answer for a row depends on the other rows of its run, before requests share runs.

Two ways look for it. Examples are run together, one by one, in runs of other sizes, in another order, and with rows of
zeros after them, and the answers for each row are compared. One row is 1,000 times larger than the others, and one
is NaN, so that an effect on their companions is large. And the graph is scanned for operators that work across the rows
(row_scan.py), for effects that no example shows. A model depends on its rows if either finds it: with examples, in two
of three draws of rows, so that a rare effect of rounding is not taken for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shorttail.config import LIMITS
from shorttail.errors import Internal
from shorttail.models.load import Runner
from shorttail.models.row_scan import Example, RowScan, scan_rows
from shorttail.models.session import blank_rows

Array = NDArray[Any]

ROWS_MAX, ROWS_MIN = 24, 2
DRAWS = 3
# An answer may differ by this part of the largest value of its row, and by this part of that of a usual row: sums are
# rounded differently in runs of another size.
ROW_TOLERANCE, USUAL_TOLERANCE = 1e-4, 1e-6
NUDGE = 2.0**-19  # inputs are changed by up to this part, to see what rounding does to the answers
HALF_ROW_TOLERANCE, HALF_NUDGE = 1e-2, 2.0**-10  # instead, for models that compute with 16-bit floats
NO_ROUNDING = 1e-2  # a nudge that changes an answer by more than this part met a step of the model
TIE = 1e-3  # a label is not clear if the two best scores of the row differ by less than this part of the best
# Labels alone tell of other rows if this part of the clear ones changes, or this part of all.
CLEAR_LABELS_CHANGED, LABELS_CHANGED = 0.1, 0.5
# The examples are multiplied by these in turn. The large one stands between rows that it would drown.
FACTORS = (1.0, -1.0, 0.01, 1000.0, 1.0, 30.0, -0.3, 3.0)
NAN_ROW = 4


@dataclass(frozen=True)
class RowFinding:
    """What was found out about a model's rows. depends: whether a row's answer depends on the other rows of its run.

    why: the reason or a remark, in one line, "" if there is nothing to say.
    """

    depends: bool
    why: str = ""


class Difference(NamedTuple):
    """A difference between answers. size: in multiples of what is allowed. text: a sentence without its end."""

    size: float
    text: str


class Way(NamedTuple):
    """A way to run rows. when: in words. runs: the rows of each run, and its size with rows of zeros."""

    when: str
    runs: Sequence[tuple[Array, int]]


Drawn = tuple[list[Array], list[Array]]  # rows, and the answers to each alone


class NotExamined(Exception):
    """No example runs."""


class OutOfTime(Exception):
    """The trial has taken as long as it may."""


def examine_rows(runner: Runner, data: bytes, example: Example) -> RowFinding:
    """Examine a loaded and warm model.

    data: its ONNX file. example: returns random inputs with the given number of rows, one array for each of the
    runner's inputs. Takes about LIMITS.row_check_s at most, or a few runs of a model that is slower than that.
    """
    fixed_rows = next((tensor.shape[0] for tensor in runner.inputs if tensor.shape and tensor.shape[0]), None)
    if runner.kind == "forest" or fixed_rows == 1:
        return RowFinding(False)  # a compiled forest walks its trees for each row, and in a run of one are no others
    inputs = [tensor.name for tensor in runner.inputs]
    trial = Trial(runner, example)
    try:
        first = trial.rows_that_run(0)
    except NotExamined as error:
        scan = scan_rows(data, inputs, runner.output_names, None, fixed_rows)
        remark = f"its rows could not be compared, because the model refuses every example: {error}"
        return RowFinding(bool(scan.mixes), f"{scan.mixes}; {remark}" if scan.mixes else remark)
    is_slow = 10 * trial.run_s > LIMITS.row_check_s  # the scan makes three runs
    repeated = None if is_slow else lambda count: [array[np.arange(count) % len(array)] for array in first[0]]
    scan = scan_rows(data, inputs, runner.output_names, repeated, fixed_rows)
    trial.run(first, scan.has_half)
    return judged(trial, scan)


def judged(trial: Trial, scan: RowScan) -> RowFinding:
    """Return what the examples and the scan say together."""
    if trial.is_random:
        why = "the same rows get other answers in another run: the model "
        why += f"is random ({scan.random})" if scan.random else "is random, or changes as it runs"
    elif trial.change is not None:
        cause = scan.mixes or (scan.moves if trial.change.size < np.inf else "")
        return RowFinding(True, f"{trial.change.text}{': ' * bool(cause)}{cause}{trial.cut_short}")
    else:
        why = "no answer of an example changed"
    if scan.mixes:
        return RowFinding(True, f"{scan.mixes}; {why}{trial.cut_short}")
    return RowFinding(False, f"{why}{trial.cut_short}" if trial.is_random or trial.cut_short else "")


class Trial:
    """Runs examples in several ways and compares the answers.

    change: the largest change of an answer by other rows, None if there is none. is_random: whether the same run gave
    other answers. cut_short: what was left out for lack of time, in words that follow a finding. run_s: the time of a
    run of one row.
    """

    def __init__(self, runner: Runner, example: Example):
        self.change: Difference | None = None
        self.is_random = False
        self.cut_short = ""
        self._runner = runner
        self._example = example
        self._tolerance, self._nudge = ROW_TOLERANCE, NUDGE
        self._random = np.random.default_rng(0)
        self._ends_s = time.perf_counter() + LIMITS.row_check_s
        self.run_s = 0.0

    def run(self, first: Drawn, has_half: bool) -> None:
        """Make the trial: two draws of rows, and a third if they differ.

        first: the first draw. has_half: whether the model computes with 16-bit floats.
        """
        if has_half:
            self._tolerance, self._nudge = HALF_ROW_TOLERANCE, HALF_NUDGE
        found: list[Difference | None] = []
        for number in range(DRAWS):
            changes: list[Difference] = []
            try:
                if number:
                    self._check_time()
                drawn = self.rows_that_run(number) if number else first
                changes.extend(self._differences(*drawn))  # what comes before an exception stays
            except NotExamined:
                break
            except OutOfTime:
                self.cut_short = f"; not every way was tried, because a run takes {self.run_s:.2g} s"
            found.append(max(changes, key=lambda change: (change.size < np.inf, change.size), default=None))
            if self.is_random:
                return
            if self.cut_short or found.count(None) == 2 or len(found) - found.count(None) == 2:
                break
        positive = [change for change in found if change is not None]
        if len(positive) >= (2 if len(found) > 1 and not self.cut_short else 1):
            self.change = positive[0]

    def _differences(self, rows: list[Array], alone: list[Array]) -> Iterator[Difference]:
        """Run rows in every way and yield the changes of answers. alone: the answers one by one. Raises OutOfTime."""
        count = len(rows[0])
        try:
            together, again = self._runner.run(rows), self._runner.run(rows)
        except Internal as error:
            yield Difference(np.inf, f"the model refuses rows together that it takes one by one: {error.message}")
            return
        for name, array, ones in zip(self._runner.output_names, together, alone, strict=True):
            if (shape := np.shape(array))[:1] != (count,) or len(ones) != count:
                yield Difference(np.inf, f"output '{name}' has the shape {list(shape)} for {count} rows")
                return
        counted = np.ones(count, bool)
        for array in rows:
            if array.dtype.kind == "f":  # what NaN becomes may depend on its place in vector instructions
                counted &= ~np.isnan(array.reshape(count, -1)).any(axis=1)
        judge = Judge(together, counted, self._tolerance)
        if any(judge.changes(again, "")):
            self.is_random = True
            return
        judge.allow_rounding(self._nudged(rows))
        yield from judge.changes(alone, "when no other row shares its run")
        for way in ways(count, self._random):
            yield from self._changes(judge, rows, way)

    def rows_that_run(self, number: int) -> Drawn:
        """Return distinct rows, each of which runs alone, and their answers. Raises NotExamined."""
        plain = self._example(ROWS_MAX)
        candidates = [scaled(plain, number, "fiu"), scaled(plain, number, "f"), plain]
        rows: list[list[Array]] = []
        answers: list[list[Array]] = []
        wanted, reason, began_s = ROWS_MAX, "", time.perf_counter()
        for row in range(ROWS_MAX):
            for arrays in candidates:
                one = [array[row : row + 1] for array in arrays]
                try:
                    answer = self._runner.run(one)
                except Internal as error:
                    reason = error.message
                    continue
                rows.append(one)
                answers.append(answer)
                break
            self.run_s = (time.perf_counter() - began_s) / (row + 1)
            # A draw makes about four runs for each of its rows.
            wanted = max(ROWS_MIN, min(wanted, int(LIMITS.row_check_s / (4 * DRAWS * self.run_s))))
            if len(rows) >= wanted or (not rows and time.perf_counter() > self._ends_s):
                break
        if len(rows) < ROWS_MIN:
            raise NotExamined(reason)
        return joined(rows), joined(answers)

    def _changes(self, judge: Judge, rows: list[Array], way: Way) -> Iterator[Difference]:
        parts = []
        for chosen, size in way.runs:
            self._check_time()
            piece = [np.concatenate([a[chosen], blank_rows(a, size - len(chosen))]) for a in rows]
            try:
                outputs = self._runner.run(piece)
            except Internal as error:
                if size == len(chosen):
                    text = f"the model refuses rows {way.when} that it takes otherwise: {error.message}"
                    yield Difference(np.inf, text)
                return
            parts.append([array[: len(chosen)] for array in outputs])
        order = np.argsort(np.concatenate([chosen for chosen, _ in way.runs]))
        outputs = [array[order] if len(array) == len(order) else array for array in joined(parts)]
        yield from judge.changes(outputs, f"when {way.when}")

    def _nudged(self, rows: list[Array]) -> list[Array] | None:
        """Return the answers to rows that differ by what rounding makes of them, None if the model refuses them."""
        parts = [
            1 + self._nudge * self._random.random(array.shape) if array.dtype.kind == "f" else None for array in rows
        ]
        near = [a if part is None else (a * part).astype(a.dtype) for a, part in zip(rows, parts, strict=True)]
        try:
            return self._runner.run(near)
        except Internal:
            return None

    def _check_time(self) -> None:
        if time.perf_counter() > self._ends_s:
            raise OutOfTime


class Judge:
    """Compares answers with those of a first run, `answers`. counted: which rows are compared. tolerance: of a row."""

    def __init__(self, answers: list[Array], counted: Array, tolerance: float):
        self._answers = [array.reshape(len(array), -1) for array in answers]
        self._counted = counted
        self._scales = [largest(array) for array in self._answers]
        self._allowed = [tolerance * scale + USUAL_TOLERANCE * np.median(scale) for scale in self._scales]
        self._clear = np.ones(len(counted), bool)
        for array, scale in zip(self._answers, self._scales, strict=True):
            if array.dtype.kind == "f" and array.size:
                self._clear &= ~tied(array, scale)

    def allow_rounding(self, nudged: list[Array] | None) -> None:
        """Allow the changes that a nudge of the inputs makes, except where it meets steps in most rows."""
        for i, array in enumerate(nudged or ()):
            if array.dtype.kind == "f" and array.size == self._answers[i].size:
                rounding = largest(difference(self._answers[i], array.reshape(self._answers[i].shape)))
                is_step = rounding > NO_ROUNDING * self._scales[i]
                if is_step.mean() <= 0.5:
                    self._allowed[i] = self._allowed[i] + 2 * np.where(is_step, np.inf, rounding)

    def changes(self, outputs: list[Array], when: str) -> Iterator[Difference]:
        """Yield the largest change of each output. when: what is other about the run, in words."""
        for before, array, allowed in zip(self._answers, outputs, self._allowed, strict=True):
            if array.size != before.size:
                yield Difference(np.inf, f"the answer for a row has another width {when}")
                continue
            after = array.reshape(before.shape)
            if before.dtype.kind == "f":
                gaps = difference(before, after)
                beyond = (gaps > allowed[:, None]) & self._counted[:, None]
                with np.errstate(divide="ignore", invalid="ignore"):
                    sizes = np.where(beyond, gaps / allowed[:, None], 0.0)
            else:
                beyond = (before != after) & self._counted[:, None]
                changed = beyond.any(axis=1)
                few = (changed & self._clear).mean() <= CLEAR_LABELS_CHANGED and changed.mean() <= LABELS_CHANGED
                sizes = np.where(few, 0.0, beyond.astype(float))
            if sizes.any():
                at = np.unravel_index(np.argmax(sizes), sizes.shape)
                text = f"the answer for a row changes from {shown(before[at])} to {shown(after[at])} {when}"
                yield Difference(float(sizes[at]), text)


def ways(count: int, random: np.random.Generator) -> Iterator[Way]:
    """Yield ways to run `count` rows, other than together and one by one."""
    every = np.arange(count)
    zeros = "rows of zeros follow it in its run"
    yield Way(zeros, [(every, 2 << (count - 1).bit_length())])
    yield Way("the rows of its run are in another order", [(every[::-1], count)])
    yield Way("the rows of its run are in another order", [(random.permutation(count), count)])
    for size in (2, 3, 7, 8):
        if size < count:
            chosen = [every[at : at + size] for at in range(0, count, size)]
            yield Way("fewer rows share its run", [(part, len(part)) for part in chosen])
            if size == 3:
                yield Way(zeros, [(part, 4) for part in chosen])


def scaled(arrays: list[Array], number: int, kinds: str) -> list[Array]:
    """Return examples at odd scales, distinct and some of them negative.

    number: the draw. The first and the third have a large row, the second has a row of NaN. kinds: the kinds of dtypes
    that are scaled.
    """
    factors = np.resize(FACTORS, ROWS_MAX)
    if number == 1:
        factors[factors == max(FACTORS)] = 1.0
    found = []
    for array in arrays:
        if array.dtype.kind in kinds:
            values = array * factors.reshape(-1, *[1] * (array.ndim - 1))
            if array.dtype.kind == "f" and number == 1:
                values[NAN_ROW] = np.nan
            elif array.dtype.kind != "f":
                values = np.clip(values, np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)
            array = values.astype(array.dtype)
        found.append(array)
    return found


def joined(pieces: list[list[Array]]) -> list[Array]:
    """Return the arrays of several runs as those of one. Those of different widths, or without rows, become no rows."""
    outputs = list(zip(*pieces, strict=True))
    fit = [len({np.shape(part)[1:] for part in parts}) == 1 and np.ndim(parts[0]) for parts in outputs]
    return [np.concatenate(parts) if is_fit else np.empty(0) for parts, is_fit in zip(outputs, fit, strict=True)]


def largest(array: Array) -> Array:
    """Return the largest finite magnitude of each row, 0 for a row that has none."""
    if array.dtype.kind != "f" or not array.size:
        return np.zeros(len(array))
    return np.asarray(np.abs(np.where(np.isfinite(array), array, 0)).max(axis=1), float)


def difference(a: Array, b: Array) -> Array:
    """Return |a - b|, 0 where both are the same (also both NaN, or infinite), infinite where only one is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(a.astype(float) - b.astype(float))
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.where(np.isfinite(gaps), gaps, np.inf))


def tied(scores: Array, scale: Array) -> Array:
    """Return for each row whether its scores leave the label open: the best two, or a single one near a threshold."""
    if scores.shape[1] > 1:
        best = np.sort(scores, axis=1)[:, -2:].astype(float)
        return np.asarray(best[:, 1] - best[:, 0] <= TIE * scale)
    return np.asarray(np.minimum(np.abs(scores[:, 0]), np.abs(scores[:, 0] - 0.5)) <= TIE)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else repr(getattr(value, "item", lambda: value)())
