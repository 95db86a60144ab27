"""Solves the paths of a tree ensemble: which values of its input columns lead to a leaf, or that none do.

The numbers of a column are handled as ordinals: int64, in the order of the floats, one for each float, so that the
neighbours of a threshold are the numbers beside it. A path allows an interval of ordinals for each column, perhaps NaN,
and, for a column that is tested for equality or membership, some of the segments between the members of all its sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shorttail.models.ensemble import LEAF, MEMBER, MEMBER_WHOLE, MODES, Ensemble

Array = NDArray[Any]
EQ, NEQ, LT, GTE = (MODES[name] for name in (b"BRANCH_EQ", b"BRANCH_NEQ", b"BRANCH_LT", b"BRANCH_GTE"))
HIGH_YES = (MODES[b"BRANCH_GT"], GTE)  # the modes whose "yes" takes the numbers above the threshold
# dtypes of whole numbers -> the lowest, and the lowest float above the highest.
INTEGERS = {"i4": (-(2.0**31), 2.0**31), "i8": (-(2.0**63), 2.0**63), "b1": (0.0, 2.0)}


class RandomNumbers(Protocol):
    """Random numbers for rows: see shorttail.models.check_rows.Draws."""

    def uniform(self, columns: int, purpose: int) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Columns:
    """Where the features of an ensemble come from. column: int64 [features], the number of the graph's input column.
    whole: bool [features], whether a Cast to integers drops fractions on the way.
    """

    column: NDArray[np.int64]
    whole: NDArray[np.bool_]


class Paths:
    """The paths from the roots of an ensemble to its leaves.

    dtypes: the dtype of each input column, as text. Nodes that are shared are copied, as the compiled forest does it;
    a chain of == tests with the same "yes" is one test of a set. Arrays over the copies, in order of depth: node (the
    node of the ensemble), parent (the copy above, -1 for a root), took_yes, is_copy (whether the node has other
    copies). leaves: the copies that are leaves. tested_column, tested_value: every threshold and every member.
    cells: numbers that `write` needs for a row.
    """

    def __init__(self, ensemble: Ensemble, columns: Columns, dtypes: Array):
        nodes = self.nodes = ensemble.nodes
        inner = np.flatnonzero(nodes.mode != LEAF)
        source = np.zeros(len(nodes.mode), np.int64)
        source[inner] = columns.column[nodes.feature[inner]]
        self.columns = np.unique(source[inner])
        self.column = np.searchsorted(self.columns, source)  # the column that each node tests, by number in `columns`
        # Whether a column's numbers are handled as float64. They are float32 if the input or the ensemble is.
        self.wide = np.array([ensemble.trees.wide and dtypes[c][1:] != "f4" for c in self.columns.tolist()], bool)
        self._set_bounds(columns, dtypes)
        link = np.zeros(len(nodes.mode), bool)
        below = np.clip(nodes.no[inner], 0, len(nodes.mode) - 1)  # nodes that no root leads to may hold anything
        link[inner] = (
            (nodes.mode[inner] == EQ)
            & (nodes.mode[below] == EQ)
            & (nodes.feature[inner] == nodes.feature[below])
            & (nodes.yes[inner] == nodes.yes[below])
        )
        self._unfold(chain_ends(nodes.no, link))
        self.is_set = nodes.mode >= EQ
        self.nan_yes = nodes.missing_yes == 1
        self.high_yes = np.isin(nodes.mode, HIGH_YES)
        self.cut = np.zeros(len(nodes.mode), np.int64)
        self._set_cuts(np.flatnonzero((nodes.mode != LEAF) & ~self.is_set))
        self.segments: dict[int, tuple[Array, Array]] = {}
        owner, value = self._set_members(np.unique(self.node[self.is_set[self.node]]), link, ensemble.trees.wide)
        plain = inner[~self.is_set[inner]]
        self.tested_column = np.concatenate([source[plain], source[owner]])
        self.tested_value = np.concatenate([nodes.threshold[plain], value])
        self.cells = len(self.columns) + sum(len(starts) for starts, _ in self.segments.values())

    def _set_bounds(self, columns: Columns, dtypes: Array) -> None:
        """Set the lowest and highest ordinal of each column, whether it may be NaN, and whether it is whole numbers."""
        n = len(self.columns)
        self.lowest, self.highest = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.whole, self.may_be_nan = np.zeros(n, bool), np.ones(n, bool)
        casts = set(columns.column[columns.whole].tolist())
        for i, column in enumerate(self.columns.tolist()):
            whole = INTEGERS.get(dtypes[column][1:]) or (INTEGERS["i4"] if column in casts else None)
            self.whole[i], self.may_be_nan[i] = whole is not None, whole is None
            bounds = ordinals_of(np.array(whole or (-np.inf, np.inf)), self.wide[i])
            self.lowest[i], self.highest[i] = bounds - np.array([0, whole is not None])

    def _unfold(self, end: Array) -> None:
        """Set node, parent and took_yes by walking down from the roots, level by level. end: the "no" of each node."""
        nodes = self.nodes
        level, above, yes = nodes.root.astype(np.int64), np.full(len(nodes.root), -1), np.zeros(len(nodes.root), bool)
        levels, first = [], 0
        while len(level):
            levels.append((level, above, yes))
            inner = np.flatnonzero(nodes.mode[level] != LEAF)
            at = level[inner]
            above = np.concatenate([inner, inner]) + first
            first += len(level)
            level = np.concatenate([nodes.yes[at], end[at]]).astype(np.int64)
            yes = np.arange(len(level)) < len(inner)
        self.node, self.parent, self.took_yes = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        self.leaves = np.flatnonzero(nodes.mode[self.node] == LEAF)
        self.is_copy = np.bincount(self.node, minlength=len(nodes.mode))[self.node] > 1

    def _set_cuts(self, plain: Array) -> None:
        """Set the highest ordinal below the cut of each ordered test. The cut of <= and > is just above the threshold,
        that of < and >= just below it.
        """
        nodes = self.nodes
        threshold, column = nodes.threshold[plain], self.column[plain]
        cut, exact = floor_ordinals(threshold, self.wide[column])
        cut -= exact & np.isin(nodes.mode[plain], (LT, GTE))
        nothing = np.where(self.high_yes[plain], self.highest[column], self.lowest[column] - 1)
        self.cut[plain] = np.where(np.isnan(threshold), nothing, cut)  # no number meets a threshold that is NaN

    def _set_members(self, heads: Array, link: Array, bits_64: bool) -> tuple[Array, Array]:
        """Find the members of the sets, and cut the columns into segments at them. heads: nodes that test a set.

        Returns the node and the value of each member.
        """
        nodes = self.nodes
        self.nan_yes[nodes.mode == NEQ] = True
        single = heads[nodes.mode[heads] < MEMBER]
        many = heads[nodes.mode[heads] >= MEMBER]
        counts = nodes.set_begin[many + 1].astype(np.int64) - nodes.set_begin[many]
        owners, values = (
            [single, np.repeat(many, counts)],
            [nodes.threshold[single], nodes.set_value[spans(nodes.set_begin[many].astype(np.int64), counts)]],
        )
        head = at = single[link[single]]
        while len(at):  # along the chains of == tests
            below = nodes.no[at].astype(np.int64)
            owners.append(head)
            values.append(nodes.threshold[below])
            # ONNX Runtime joins neighbours that fit a bit mask, and uses only the first one's rule for missing values.
            joined = is_bit(nodes.threshold[at], bits_64) & is_bit(nodes.threshold[below], bits_64)
            self.nan_yes[head] |= ~joined & (nodes.missing_yes[below] == 1)
            head, at = head[link[below]], below[link[below]]
        owner, value = np.concatenate(owners), np.concatenate(values)
        self._cut_segments(owner, value)
        return owner, value

    def _cut_segments(self, owner: Array, value: Array) -> None:
        """Cut each column that sets test into segments, at the ends of the members.

        owner, value: the node and the value of each member.
        """
        low, high = self._member_range(owner, value)
        kept = low <= high
        owner, low, high = owner[kept], low[kept], high[kept]
        order = np.argsort(owner, kind="stable")
        owner, low, high = owner[order], low[order], high[order]
        self.member_first, self.member_count = np.zeros(len(owner), np.int64), np.zeros(len(owner), np.int64)
        columns = self.column[owner]
        set_columns = np.unique(self.column[self.node[self.is_set[self.node]]])
        for column in set_columns.tolist():
            mine = columns == column
            starts = np.unique(np.concatenate([low[mine], high[mine] + 1, [self.lowest[column]]]))
            starts = starts[(starts >= self.lowest[column]) & (starts <= self.highest[column])]
            self.segments[column] = starts, np.append(starts[1:] - 1, self.highest[column])
            first = np.searchsorted(starts, low[mine])
            self.member_first[mine] = first
            self.member_count[mine] = np.searchsorted(starts, high[mine], side="right") - first
        # a node's members are member_begin[node] ... member_begin[node + 1] - 1
        self.member_begin = np.searchsorted(owner, np.arange(len(self.nodes.mode) + 1))

    def _member_range(self, owner: Array, value: Array) -> tuple[Array, Array]:
        """Return the lowest and the highest ordinal that count as each member; lowest above highest if none does."""
        wide, whole = self.wide[self.column[owner]], self.nodes.mode[owner] == MEMBER_WHOLE
        high, exact = floor_ordinals(value, wide)
        low = high + ~exact
        # a value of these sets counts without its fraction
        above, above_exact = floor_ordinals(value + 1, wide)
        below, _ = floor_ordinals(value - 1, wide)
        high = np.where(whole & (value >= 0), above - above_exact, high)
        low = np.where(whole & (value <= 0), below + 1, low)
        nan = np.isnan(value)  # no value equals NaN
        low, high = np.where(nan, 1, low), np.where(nan, 0, high)
        return low, high

    def write(self, rows: Array, at_rows: Array, leaves: Array, draws: RandomNumbers) -> NDArray[np.bool_]:
        """Overwrite the columns that the paths to some leaves test with values that lead there.

        rows: float64 [n, input columns]. at_rows: the row of each leaf. leaves: numbers of copies. draws: give each row
        its numbers. Returns whether each leaf can be reached; the row of a leaf that cannot is left as it is.
        """
        allowed = Allowed(self, len(leaves))
        allowed.restrict(leaves)
        uniform = [draws.uniform(len(self.columns), purpose)[at_rows] for purpose in (4, 5, 6)]
        allowed.choose_segments(uniform[0])
        numbers = allowed.low <= allowed.high
        possible: NDArray[np.bool_] = (numbers | allowed.nan | ~allowed.tested).all(axis=1)
        value = allowed.pick(uniform[1], uniform[2])
        value = np.where(allowed.nan & (~numbers | (uniform[1] < 0.05)), np.nan, value)
        row, column = np.nonzero(allowed.tested & possible[:, None])
        rows[at_rows[row], self.columns[column]] = value[row, column]
        return possible


class Allowed:
    """What some paths allow, an entry for each path and column: the ordinals from `low` to `high` (none if low is above
    high), NaN if `nan`. tested: whether the path tests the column. masks: column -> bool [paths, segments], the
    segments that sets allow.
    """

    def __init__(self, paths: Paths, n: int):
        self._paths = paths
        self.low, self.high = np.tile(paths.lowest, (n, 1)), np.tile(paths.highest, (n, 1))
        self.nan = np.tile(paths.may_be_nan, (n, 1))
        self.tested = np.zeros(self.low.shape, bool)
        self.masks: dict[int, NDArray[np.bool_]] = {}

    def restrict(self, at: Array) -> None:
        """Walk up from each path's leaf, and allow only what every test on the way sends down that path."""
        paths, row = self._paths, np.arange(len(at))
        while True:
            kept = paths.parent[at] >= 0
            row, at = row[kept], at[kept]
            if not len(at):
                return
            yes, at = paths.took_yes[at], paths.parent[at]
            node = paths.node[at]
            column = paths.column[node]
            self.tested[row, column] = True
            self.nan[row, column] &= paths.nan_yes[node] == yes
            is_set = paths.is_set[node]
            up = ~is_set & (yes == paths.high_yes[node])
            down = ~is_set & ~up
            cell = row[up], column[up]
            self.low[cell] = np.maximum(self.low[cell], paths.cut[node[up]] + 1)
            cell = row[down], column[down]
            self.high[cell] = np.minimum(self.high[cell], paths.cut[node[down]])
            for number in np.unique(column[is_set]).tolist():
                mine = is_set & (column == number)
                self._restrict_set(number, row[mine], node[mine], yes[mine] != (paths.nodes.mode[node[mine]] == NEQ))

    def _restrict_set(self, column: int, row: Array, node: Array, inside: Array) -> None:
        """Allow only the segments of a set's members (inside), or only the others. An entry for each path."""
        paths, segments = self._paths, len(self._paths.segments[column][0])
        mask = self.masks.setdefault(column, np.ones((len(self.low), segments), bool))
        begin = paths.member_begin[node]
        count = paths.member_begin[node + 1] - begin
        member, test = spans(begin, count), np.repeat(np.arange(len(node)), count)
        segment = spans(paths.member_first[member], paths.member_count[member])
        test = np.repeat(test, paths.member_count[member])
        out = ~inside[test]
        mask[row[test[out]], segment[out]] = False
        kept = np.zeros((np.count_nonzero(inside), segments), bool)
        kept[(np.cumsum(inside) - 1)[test[~out]], segment[~out]] = True
        mask[row[inside]] &= kept

    def choose_segments(self, uniform: Array) -> None:
        """Narrow what each path allows to one of the segments that its sets allow, and to whole numbers."""
        paths, every = self._paths, np.arange(len(self.low))
        for column, mask in self.masks.items():
            starts, ends = paths.segments[column]
            low, high = np.maximum(self.low[:, [column]], starts), np.minimum(self.high[:, [column]], ends)
            if paths.whole[column]:
                low, high = whole_ordinals(low, high, paths.wide[[column]])
            mask &= low <= high
            passed = np.cumsum(mask, axis=1)
            chosen = np.argmax(passed > np.floor(uniform[:, [column]] * passed[:, -1:]), axis=1)
            self.low[:, column] = np.where(passed[:, -1], low[every, chosen], 1)
            self.high[:, column] = np.where(passed[:, -1], high[every, chosen], 0)
        whole = paths.whole
        if whole.any():
            self.low[:, whole], self.high[:, whole] = whole_ordinals(
                self.low[:, whole], self.high[:, whole], paths.wide[whole]
            )

    def pick(self, edge: Array, place: Array) -> NDArray[np.float64]:
        """Return a number of each interval: mostly one of its ends, else any. edge, place: random numbers of [0, 1).

        Infinity is an end of an open interval, but is seldom picked; a number beyond the other end usually replaces it.
        """
        wide, whole = self._paths.wide, self._paths.whole
        low, high = floats_of(self.low, wide), floats_of(self.high, wide)
        with np.errstate(invalid="ignore", over="ignore"):
            top = np.where(np.isfinite(high), high, np.where(np.isfinite(low), low + np.abs(low) + 1, 1.0))
            bottom = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - np.abs(high) - 1, -1.0))
        last = np.clip(ordinals_of(top, wide), self.low, self.high)
        first = np.clip(ordinals_of(bottom, wide), self.low, self.high)
        span = last.astype(np.uint64) - first.astype(np.uint64)
        step = np.minimum((place * span.astype(np.float64)).astype(np.uint64), span)
        any_of = (first.astype(np.uint64) + step).astype(np.int64)
        ordinal = np.select(
            [edge < 0.1, edge < 0.15, edge < 0.45, edge < 0.75], [self.low, self.high, first, last], any_of
        )
        value = floats_of(ordinal, wide)
        down = np.floor(value[:, whole])
        value[:, whole] = np.where(down < low[:, whole], down + 1, down)
        return np.where((value == 0) & (place < 0.5), -value, value)


def ordinals_of(values: Array, wide: Array | bool) -> NDArray[np.int64]:
    """Return the ordinals of floats: of float64 where `wide`, else of the float32 that the value rounds to.

    0 and -0 have the same ordinal; NaN has no meaning. wide: broadcasts to values.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = np.asarray(values).astype(np.float32).view(np.int32).astype(np.int64)
    narrow = np.where(narrow < 0, -(narrow + (1 << 31)), narrow)
    if not np.any(wide):
        return narrow
    bits = np.asarray(values, np.float64).view(np.int64)
    return np.where(wide, np.where(bits < 0, -(bits & np.iinfo(np.int64).max), bits), narrow)


def floats_of(ordinals: Array, wide: Array | bool) -> NDArray[np.float64]:
    """Return the floats of ordinals, as float64."""
    size = np.abs(ordinals)
    with np.errstate(invalid="ignore"):  # ordinals of float64 give any float32 here, which is replaced below
        result = size.astype(np.int32).view(np.float32).astype(np.float64)
    if np.any(wide):
        result = np.where(wide, size.view(np.float64), result)
    return np.where(ordinals < 0, -result, result)


def floor_ordinals(values: Array, wide: Array | bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the ordinal of the highest float at or below each value, and whether that float equals the value."""
    ordinals = ordinals_of(values, wide)
    floats = floats_of(ordinals, wide)
    return ordinals - (floats > values), floats == values


def whole_ordinals(low: Array, high: Array, wide: Array) -> tuple[Array, Array]:
    """Narrow intervals of ordinals to the whole numbers at their ends."""
    return ordinals_of(np.ceil(floats_of(low, wide)), wide), ordinals_of(np.floor(floats_of(high, wide)), wide)


def is_bit(values: Array, bits_64: bool) -> NDArray[np.bool_]:
    """Return whether ONNX Runtime can keep each threshold as one bit of a mask."""
    result: NDArray[np.bool_] = (values >= 1) & (values <= (64 if bits_64 else 32)) & (values == np.floor(values))
    return result


def spans(first: Array, count: Array) -> NDArray[np.int64]:
    """Return the numbers first[0], first[0] + 1, ... (count[0] of them), then those of first[1], and so on."""
    ends = np.cumsum(count)
    numbers: NDArray[np.int64] = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
    return numbers


def chain_ends(no: Array, link: Array) -> NDArray[np.int64]:
    """Return the "no" of each node, past the nodes of its chain. link: whether a node's "no" goes on with its chain."""
    target = np.where(link, no, np.arange(len(no)))  # the last node of the chain, found by doubling the steps
    while not np.array_equal(further := target[target], target):
        target = further
    return no[target].astype(np.int64)
