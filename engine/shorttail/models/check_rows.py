"""Makes the rows on which a compiled forest is compared with ONNX Runtime: rows that reach every leaf.

A leaf that random rows reach once in a million could be wrong for years. So a row is made for a leaf: the tests on the
path from its root say which values each column may have, and the row gets one of them; a leaf that no values reach is
proved to be unreachable in the same way. Values at the ends of what a path allows, NaN and infinities are preferred.
Columns that only other trees test get values at and beside the thresholds of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail.models.ensemble import Ensemble, NotAForest
from shorttail.models.leaf_paths import INTEGERS, Columns, Paths

Array = NDArray[Any]

ROWS = 512  # rows that are always checked, and the most rows of a batch
CELLS_MAX = 1 << 20  # rows of a batch times their columns: bounds the memory
SPECIAL = (np.nan, np.inf, -np.inf, 0.0)
SPECIAL_SHARE = 0.02  # of the values of a column that a path does not test


@dataclass(frozen=True)
class Batch:
    """Rows to compare. inputs: an array for each input of the graph. matrices: the rows as each ensemble gets them."""

    inputs: list[Array]
    matrices: list[Array]


class CheckRows:
    """The rows that check a forest. The row of a leaf depends on that leaf and the seed alone.

    ensembles: each with the input column that each of its features is. inputs: (dtype, width) of each input of the
    graph; their columns are numbered one input after the other.
    """

    def __init__(
        self, ensembles: Sequence[tuple[Ensemble, Columns]], inputs: Sequence[tuple[np.dtype[Any], int]], seed: int = 0
    ):
        self._inputs = inputs
        self._dtypes = np.concatenate([np.full(width, dtype.str) for dtype, width in inputs])
        self._seed = seed
        self._ensembles = [ensemble for ensemble, _ in ensembles]
        self._columns = [columns for _, columns in ensembles]
        self._paths = [Paths(ensemble, columns, self._dtypes) for ensemble, columns in ensembles]
        self._first = np.cumsum([0, *(len(paths.leaves) for paths in self._paths)])
        self._set_table()
        widest = max([len(self._dtypes), *(paths.cells for paths in self._paths)])
        self._rows_max = int(np.clip(CELLS_MAX // widest, 1, ROWS))

    def batches(self, rows: int) -> Iterator[Batch]:
        """Yield batches of rows for `rows` leaves, which are spread over the trees; if there are fewer leaves, each
        gets several rows. Raises NotAForest if a row misses the leaf that it was made for.
        """
        yield from self._batches(rows, self._none_reached())

    def batches_to_every_leaf(self) -> Iterator[Batch]:
        """Yield what `batches` yields for ROWS rows, and then a row for each leaf that no row has reached yet."""
        reached = self._none_reached()
        yield from self._batches(ROWS, reached)
        left = np.setdiff1d(np.arange(self._first[-1]), self._spread(ROWS)[0])
        left = left[np.argsort(_mix(left.astype(np.uint64)), kind="stable")]  # so that a batch is spread over the trees
        waiting, at = left[:0], 0
        while at < len(left) or len(waiting):
            waiting = waiting[~self._has_row(waiting, reached)]
            while len(waiting) < self._rows_max and at < len(left):
                more = left[at : at + self._rows_max]
                waiting = np.concatenate([waiting, more[~self._has_row(more, reached)]])
                at += len(more)
            chosen, waiting = waiting[: self._rows_max], waiting[self._rows_max :]
            if len(chosen):
                yield self._batch(chosen, np.zeros(len(chosen), np.int64), reached)

    def _none_reached(self) -> list[Array]:
        """Return a flag for each node of each ensemble: whether a row has reached it."""
        return [np.zeros(len(paths.nodes.mode), np.uint8) for paths in self._paths]

    def _spread(self, n: int) -> tuple[Array, Array]:
        """Return n leaves, and for each of them how often it came before."""
        total = int(self._first[-1])
        leaves = np.arange(n) % total if n >= total else np.linspace(0, total - 1, n).astype(np.int64)
        return leaves, np.arange(n) // total

    def _batches(self, n: int, reached: list[Array]) -> Iterator[Batch]:
        leaves, turn = self._spread(n)
        for at in range(0, n, self._rows_max):
            yield self._batch(leaves[at : at + self._rows_max], turn[at : at + self._rows_max], reached)

    def _has_row(self, leaves: Array, reached: list[Array]) -> Array:
        """Return whether rows have reached each leaf. A leaf of which there are copies needs a row for each copy."""
        result = np.zeros(len(leaves), bool)
        for paths, first, end, seen in zip(self._paths, self._first[:-1], self._first[1:], reached, strict=True):
            mine = (leaves >= first) & (leaves < end)
            at = paths.leaves[leaves[mine] - first]
            result[mine] = (seen[paths.node[at]] == 1) & ~paths.is_copy[at]
        return result

    def _batch(self, leaves: Array, turn: Array, reached: list[Array]) -> Batch:
        """Return a row for each leaf, and record in `reached` which leaf nodes these rows reach."""
        draws = Draws(self._seed, leaves, turn)
        rows = self._fill(draws)
        solved = np.zeros(len(leaves), bool)
        for paths, first, end in zip(self._paths, self._first[:-1], self._first[1:], strict=True):
            mine = np.flatnonzero((leaves >= first) & (leaves < end))
            if len(mine):
                solved[mine] = paths.write(rows, mine, paths.leaves[leaves[mine] - first], draws)
        matrices = [self._matrix(rows, e) for e in range(len(self._ensembles))]
        for e, paths in enumerate(self._paths):
            mine = solved & (leaves >= self._first[e]) & (leaves < self._first[e + 1])
            wanted = np.full(len(leaves), -1)
            wanted[mine] = paths.node[paths.leaves[leaves[mine] - self._first[e]]]
            met = self._ensembles[e].trees.reach(matrices[e], reached[e], wanted)
            if not met[mine].all():
                raise NotAForest("a row that ends at one of its leaves ends elsewhere in the compiled forest")
        return Batch(self._split(rows), matrices)

    def example(self, n: int, random: np.random.Generator) -> list[Array]:
        """Return n random rows, an array for each input, with values at and beside the thresholds of all trees."""
        turn = random.integers(1 << 62, size=n)
        return self._split(self._fill(Draws(self._seed, np.arange(n), turn)))

    def _split(self, rows: Array) -> list[Array]:
        """Return the rows as the inputs of the graph."""
        ends = np.cumsum([width for _, width in self._inputs])
        with np.errstate(invalid="ignore", over="ignore"):
            return [
                np.ascontiguousarray(rows[:, end - width : end].astype(dtype))
                for end, (dtype, width) in zip(ends, self._inputs, strict=True)
            ]

    def _matrix(self, rows: Array, e: int) -> Array:
        """Return the rows as ensemble `e` gets them."""
        columns = self._columns[e]
        matrix = rows[:, columns.column]
        matrix[:, columns.whole] = np.trunc(matrix[:, columns.whole])
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(matrix.astype(np.float64 if self._ensembles[e].trees.wide else np.float32))

    def _set_table(self) -> None:
        """Set the columns that any tree tests, by dtype, and the finite thresholds and members of each of them."""
        column = np.concatenate([paths.tested_column for paths in self._paths])
        value = np.concatenate([paths.tested_value for paths in self._paths])
        column, value = column[np.isfinite(value)], value[np.isfinite(value)]
        self._tested, number = np.unique(column, return_inverse=True)
        self._table = value[np.argsort(number, kind="stable")]
        self._counts = np.bincount(number, minlength=len(self._tested))
        dtypes = self._dtypes[self._tested]
        self._by_dtype = [(np.dtype(dtype), np.flatnonzero(dtypes == dtype)) for dtype in np.unique(dtypes)]

    def _fill(self, draws: Draws) -> Array:
        """Return rows [n, columns] of float64: thresholds of the column and the numbers beside them, NaN, infinities.

        Columns that no tree tests are 0.
        """
        width = len(self._tested)
        first = np.cumsum(self._counts) - self._counts
        known = self._table[first + (draws.uniform(width, 1) * self._counts).astype(np.int64)]
        side, special = draws.uniform(width, 2), draws.uniform(width, 3)
        rows = np.zeros((len(known), len(self._dtypes)))
        for dtype, columns in self._by_dtype:
            values = beside(known[:, columns], side[:, columns], dtype)
            if dtype.kind == "f":
                for i, value in enumerate(SPECIAL):
                    share = special[:, columns]
                    values[(share >= i * SPECIAL_SHARE) & (share < (i + 1) * SPECIAL_SHARE)] = value
            rows[:, self._tested[columns]] = values
        return rows


def beside(thresholds: Array, draws: Array, dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """Return numbers of a dtype at thresholds, just above, just below, or anywhere. draws: numbers of [0, 1)."""
    if dtype.kind != "f":
        low, high = INTEGERS[dtype.str[1:]]
        whole: NDArray[np.float64] = np.clip(np.round(thresholds + 3 * draws - 1.5), low, high / 2)
        return whole
    with np.errstate(over="ignore"):
        at = thresholds.astype(dtype)
        up, down = np.nextafter(at, dtype.type(np.inf)), np.nextafter(at, dtype.type(-np.inf))
        far = at * (6 * draws - 5) + (8 * draws - 7)
        chosen = np.select([draws < 0.25, draws < 0.5, draws < 0.75], [at, up, down], far)
    result: NDArray[np.float64] = chosen.astype(np.float64)
    return result


class Draws:
    """Random numbers that depend on the seed, the leaf, the turn, the column and the purpose alone (SplitMix64)."""

    def __init__(self, seed: int, leaves: Array, turn: Array):
        self._row = _mix(_mix(leaves.astype(np.uint64) + np.uint64(seed) * np.uint64(0x10001)) + turn.astype(np.uint64))

    def uniform(self, columns: int, purpose: int) -> Array:
        """Return numbers of [0, 1), float64 [rows, columns]. purpose: a small number for each use."""
        column = np.arange(columns, dtype=np.uint64) * np.uint64(64) + np.uint64(purpose)
        bits = _mix(self._row[:, None] + _mix(column))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: Array) -> Array:
    """Scramble uint64 numbers: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
