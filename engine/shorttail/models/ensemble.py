"""Tree ensemble operators of ONNX to native forests: TreeEnsembleClassifier, TreeEnsembleRegressor, TreeEnsemble.

What the operators mean is what ONNX Runtime does with them; where it departs from the specification, it is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.forest import Trees
from shorttail.models.onnx_graph import Node

Array = NDArray[Any]

# Codes of native/forest.h.
MODES = {
    b"LEAF": 0,
    b"BRANCH_LEQ": 1,
    b"BRANCH_LT": 2,
    b"BRANCH_GTE": 3,
    b"BRANCH_GT": 4,
    b"BRANCH_EQ": 5,
    b"BRANCH_NEQ": 6,
}
LEAF, MEMBER, MEMBER_WHOLE = 0, 7, 8
TARGETS_MAX = 10_000
BITS_MAX = 30  # a set of numbers up to this is a bit mask in ONNX Runtime, and of any others an int32 set
AGGREGATES = {b"SUM": 0, b"AVERAGE": 1, b"MIN": 2, b"MAX": 3}
TRANSFORMS = {b"NONE": 0, b"LOGISTIC": 1, b"SOFTMAX": 2, b"SOFTMAX_ZERO": 3, b"PROBIT": 4}
PROBIT = TRANSFORMS[b"PROBIT"]
# ai.onnx.ml 5 numbers them: BRANCH_LEQ 0, LT 1, GTE 2, GT 3, EQ 4, NEQ 5, MEMBER 6; AVERAGE 0, SUM 1, MIN 2, MAX 3.
AGGREGATES_5 = (1, 0, 2, 3)
# Post-transforms by the number that ONNX Runtime reads: it takes 1 for LOGISTIC, which the specification gives SOFTMAX.
TRANSFORMS_5 = (0, 1, 2, 3, 4)

NODE_KEYS = {
    *("nodes_falsenodeids", "nodes_featureids", "nodes_hitrates", "nodes_missing_value_tracks_true", "nodes_modes"),
    *("nodes_nodeids", "nodes_treeids", "nodes_truenodeids", "nodes_values", "nodes_values_as_tensor"),
    *("nodes_hitrates_as_tensor", "base_values", "base_values_as_tensor", "post_transform", "aggregate_function"),
}
CLASS_KEYS = {
    *("class_ids", "class_nodeids", "class_treeids", "class_weights", "class_weights_as_tensor"),
    *("classlabels_int64s", "classlabels_strings"),
}
TARGET_KEYS = {
    *("target_ids", "target_nodeids", "target_treeids", "target_weights", "target_weights_as_tensor", "n_targets"),
}
KEYS_5 = {
    *("aggregate_function", "leaf_targetids", "leaf_weights", "membership_values", "n_targets", "nodes_falseleafs"),
    *("nodes_falsenodeids", "nodes_featureids", "nodes_hitrates", "nodes_missing_value_tracks_true", "nodes_modes"),
    *("nodes_splits", "nodes_trueleafs", "nodes_truenodeids", "post_transform", "tree_roots"),
}


class NotAForest(Exception):
    """The model, or part of it, is something that only ONNX Runtime should run. `reason` says what, in one line."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass
class Ensemble:
    """One ensemble operator, compiled. labels: what class numbers stand for (int64, or object array of str)."""

    trees: Trees
    labels: Array | None
    feature: NDArray[np.int32]  # of each node that is not a leaf, with its threshold or a value of its set
    threshold: NDArray[np.float64]

    def run(self, rows: Array) -> tuple[Array | None, Array]:
        numbers, scores = self.trees.run(rows)
        if numbers is None or self.labels is None:
            return numbers, scores
        return self.labels[numbers], scores


def compile_ensemble(node: Node, element: str) -> Ensemble:
    """element: type of the operator's input, "float" or "double". Raises NotAForest."""
    a = node.attributes
    known = KEYS_5 if node.op_type == "TreeEnsemble" else NODE_KEYS
    known = known | (CLASS_KEYS if node.op_type == "TreeEnsembleClassifier" else TARGET_KEYS)
    for name in a:
        if name not in known or a[name] is None:
            raise NotAForest(f"{node.op_type} has an attribute {name!r} that is not known")
    build = compile_5 if node.op_type == "TreeEnsemble" else compile_3
    try:
        return build(node, a, element == "double")
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise NotAForest(f"{node.op_type}: {error}") from error


def compile_3(node: Node, a: dict[str, Any], wide: bool) -> Ensemble:
    """The operators before ai.onnx.ml 5: nodes and weights are found by (tree id, node id)."""
    classifier = node.op_type == "TreeEnsembleClassifier"
    prefix = "class" if classifier else "target"
    tree_ids, node_ids = ints(a, "nodes_treeids"), ints(a, "nodes_nodeids")
    finder = NodeFinder(tree_ids, node_ids)
    mode = codes(a["nodes_modes"], MODES)
    n = finder.size
    inner = mode != LEAF
    yes, no = np.zeros(n, np.int32), np.zeros(n, np.int32)
    yes[inner] = finder.find(finder.tree[inner], sized(ints(a, "nodes_truenodeids"), n)[inner])
    no[inner] = finder.find(finder.tree[inner], sized(ints(a, "nodes_falsenodeids"), n)[inner])
    targets, weights = ints(a, f"{prefix}_ids"), numbers(a, f"{prefix}_weights", wide)
    owner = finder.find(finder.tree_of(ints(a, f"{prefix}_treeids")), ints(a, f"{prefix}_nodeids"))
    require(len(targets) == len(weights) == len(owner), "its weights differ in number from their nodes")
    labels, n_targets = class_labels(a) if classifier else (None, int(a.get("n_targets", 0)))
    base = numbers(a, "base_values", wide)
    order = np.argsort(owner, kind="stable")
    single = classifier and n_targets == 2 and len(np.unique(targets)) == 1
    trees = make_trees(
        feature=sized(ints(a, "nodes_featureids"), n),
        yes=yes,
        no=no,
        mode=mode,
        missing_yes=padded(a.get("nodes_missing_value_tracks_true"), n),
        threshold=sized(numbers(a, "nodes_values", wide), n),
        root=finder.first,
        weight_begin=offsets(owner, n),
        weight_target=targets[order],
        weight=weights[order],
        set_begin=np.zeros(n + 1),
        set_value=np.zeros(0),
        base=base,
        n_targets=n_targets,
        wide=wide,
        wide_scores=False,  # the operators before 5 give floats, whatever they take
        aggregate=AGGREGATES[a.get("aggregate_function", b"SUM")] if not classifier else 0,
        post_transform=TRANSFORMS[a.get("post_transform", b"NONE")],
        classifier=classifier,
        one_class_votes=single,
        all_positive=bool(classifier and not (weights < 0).any()),
    )
    if labels is not None:
        check_classes(trees, a, base, set(np.unique(targets)))
        # Where both of two classes are voted for, ONNX Runtime answers 0 and 1, whatever the classes are called.
        numbered = labels.dtype == np.int64 and np.array_equal(labels, np.arange(n_targets))
        if numbered or (labels.dtype == np.int64 and n_targets == 2 and not single):
            labels = None
    features, thresholds = ints(a, "nodes_featureids")[inner], numbers(a, "nodes_values", wide)[inner]
    return Ensemble(trees, labels, features.astype(np.int32), thresholds)


def check_classes(trees: Trees, a: dict[str, Any], base: Array, targets: set[int]) -> None:
    """Refuses what ONNX Runtime leaves undefined."""
    n, transform = trees.n_targets, TRANSFORMS[a.get("post_transform", b"NONE")]
    require(n >= 2, "a classifier of one class")
    require(len(base) in (0, n) or (n == 2 and len(base) == 1), f"{len(base)} base values for {n} classes")
    if n == 2:
        require(trees.votes != "some", "two classes, and leaves that vote for different ones")
        require(1 in targets or transform != PROBIT, "PROBIT of a single score")
        require(len(base) != 2 or targets != {0}, "two base values for a single score")


def compile_5(node: Node, a: dict[str, Any], wide: bool) -> Ensemble:
    """ai.onnx.ml 5: nodes and leaves are numbered separately; here leaves follow the nodes."""
    modes = np.asarray(a["nodes_modes"]).astype(np.int64)
    n, leaves = len(modes), len(ints(a, "leaf_targetids"))
    yes, no = sized(ints(a, "nodes_truenodeids"), n), sized(ints(a, "nodes_falsenodeids"), n)
    roots = ints(a, "tree_roots")
    require(bool(((modes >= 0) & (modes <= 6)).all()), "a branch mode that is not known")
    require(bool(((roots >= 0) & (roots < n)).all()), "a root that is not a node")
    require(bool((yes[roots] != no[roots]).all()), "a tree of one leaf")
    yes = yes + n * (sized(ints(a, "nodes_trueleafs"), n) != 0)
    no = no + n * (sized(ints(a, "nodes_falseleafs"), n) != 0)
    weights = sized(numbers(a, "leaf_weights", wide, suffix=False), leaves)
    sets, values, whole = members(modes, numbers(a, "membership_values", wide, suffix=False), n + leaves)
    aggregate = int(a.get("aggregate_function", 1))
    transform = int(a.get("post_transform", 0))
    require(0 <= aggregate < 4 and 0 <= transform < 5, "a post-transform or an aggregate that is not known")
    fill = np.zeros(leaves, np.int64)
    features, splits = sized(ints(a, "nodes_featureids"), n), sized(numbers(a, "nodes_splits", wide, suffix=False), n)
    trees = make_trees(
        feature=np.concatenate([features, fill]),
        yes=np.concatenate([yes, fill]),
        no=np.concatenate([no, fill]),
        mode=np.concatenate([modes + 1, fill]) + whole,
        missing_yes=padded(a.get("nodes_missing_value_tracks_true"), n + leaves),
        threshold=np.concatenate([splits, fill]),
        root=roots,
        weight_begin=np.concatenate([np.zeros(n, np.int64), np.arange(leaves + 1)]),
        weight_target=ints(a, "leaf_targetids"),
        weight=weights,
        set_begin=sets,
        set_value=values,
        base=np.zeros(0),
        n_targets=int(a.get("n_targets", 0)),
        wide=wide,
        wide_scores=wide,
        aggregate=AGGREGATES_5[aggregate],
        post_transform=TRANSFORMS_5[transform],
        classifier=False,
        one_class_votes=False,
        all_positive=False,
    )
    tested = np.concatenate([features, np.repeat(np.concatenate([features, fill]), np.diff(sets))])
    return Ensemble(trees, None, tested.astype(np.int32), np.concatenate([splits, values]))


def members(modes: Array, values: Array, n: int) -> tuple[Array, Array, Array]:
    """(offsets [n + 1], values, flags [n]): the sets of MEMBER nodes, listed in order with NaN after each.

    The flag says that ONNX Runtime looks a number up without its fraction: it does in sets that are no bit mask.
    """
    set_nodes = np.flatnonzero(modes == MEMBER - 1)
    which = np.cumsum(np.isnan(values)) - np.isnan(values)  # number of the set that each value is in
    kept = ~np.isnan(values) & (which < len(set_nodes))
    which, values = which[kept], values[kept]
    require(
        bool(((values == np.trunc(values)) & (np.abs(values) < 1 << 31)).all()), "a set of other than whole numbers"
    )
    counts, whole = np.zeros(n, np.int64), np.zeros(n, np.int64)
    if len(set_nodes):
        counts[set_nodes] = np.bincount(which, minlength=len(set_nodes))
        require(bool((counts[set_nodes] > 0).all()), "a set with no members")
        whole[set_nodes[which[(values < 0) | (values > BITS_MAX)]]] = MEMBER_WHOLE - MEMBER
    return np.concatenate([[0], np.cumsum(counts)]), values, whole


class NodeFinder:
    """Finds nodes by (tree id, node id). Trees must be listed one after another, as converters do."""

    def __init__(self, tree_ids: Array, node_ids: Array):
        self.size = len(tree_ids)
        require(self.size > 0 and len(node_ids) == self.size, "it has no nodes, or some have no number")
        starts = np.concatenate([[True], tree_ids[1:] != tree_ids[:-1]])
        self.first = np.flatnonzero(starts)
        self.tree = np.cumsum(starts) - 1  # ordinal of each node's tree
        ids = tree_ids[self.first]
        self._by_id = np.argsort(ids, kind="stable")
        self._ids = ids[self._by_id]
        require(bool((self._ids[1:] != self._ids[:-1]).all()), "the nodes of a tree are not together")
        require(bool((node_ids >= 0).all()) and int(node_ids.max()) < 1 << 31, "a node has a negative number")
        self._count = np.diff(np.append(self.first, self.size))
        self._dense = bool(np.array_equal(node_ids, np.arange(self.size) - self.first[self.tree]))
        if not self._dense:
            keys = self.tree << 31 | node_ids
            self._order = np.argsort(keys, kind="stable")
            self._keys = keys[self._order]
            require(bool((self._keys[1:] != self._keys[:-1]).all()), "a node is there twice")

    def tree_of(self, tree_ids: Array) -> Array:
        at = np.searchsorted(self._ids, tree_ids)
        require(bool((self._ids[np.minimum(at, len(self._ids) - 1)] == tree_ids).all()), "a weight has no tree")
        return self._by_id[at]

    def find(self, tree: Array, node_ids: Array) -> Array:
        """Indices of nodes, from their trees' ordinals and their numbers."""
        require(len(tree) == len(node_ids), "its arrays differ in length")
        if self._dense:
            require(bool(((node_ids >= 0) & (node_ids < self._count[tree])).all()), "a node that does not exist")
            return self.first[tree] + node_ids
        keys = tree << 31 | node_ids
        at = np.minimum(np.searchsorted(self._keys, keys), self.size - 1)
        require(bool((self._keys[at] == keys).all()), "a node that does not exist")
        return self._order[at]


def make_trees(**arrays: Any) -> Trees:
    require(0 < arrays["n_targets"] <= TARGETS_MAX, f"{arrays['n_targets']} targets or classes")
    types = {
        **dict.fromkeys(("feature", "yes", "no", "weight_target"), np.int32),
        **dict.fromkeys(("mode", "missing_yes"), np.uint8),
        **dict.fromkeys(("threshold", "weight", "set_value", "base"), np.float64),
        **dict.fromkeys(("root", "weight_begin", "set_begin"), np.uint32),
    }
    for name, dtype in types.items():
        given = np.asarray(arrays[name])
        if given.dtype.kind in "iu" and len(given):
            require(int(given.min()) >= -(1 << 31) and int(given.max()) < 1 << 31, f"a {name} out of range")
        arrays[name] = np.ascontiguousarray(given, dtype)
    return Trees(**arrays)


def class_labels(a: dict[str, Any]) -> tuple[Array, int]:
    if "classlabels_strings" in a and len(a["classlabels_strings"][1]):
        values, which = a["classlabels_strings"]
        labels = np.array([value.decode() for value in values] + [None], object)[:-1][which]
        return labels, len(labels)
    labels = ints(a, "classlabels_int64s")
    return labels, len(labels)


def ints(a: dict[str, Any], name: str) -> NDArray[np.int64]:
    value = a.get(name)
    if value is None:
        return np.zeros(0, np.int64)
    require(isinstance(value, np.ndarray) and value.dtype == np.int64, f"{name} is not a list of integers")
    result: NDArray[np.int64] = value
    return result


def numbers(a: dict[str, Any], name: str, wide: bool, suffix: bool = True) -> NDArray[np.float64]:
    """A list of floats, or the tensor in its place, as float64. A tensor must be of the type that sums are made in."""
    value, as_tensor = a.get(name), a.get(f"{name}_as_tensor") if suffix else None
    if as_tensor is not None and len(as_tensor):
        require(value is None or not len(value), f"{name} is given twice")
        value = as_tensor
        require(value.dtype == (np.float64 if wide else np.float32), f"{name}_as_tensor is of another type")
    if value is None:
        return np.zeros(0)
    floats = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 1
    require(floats, f"{name} is not a list of floats")
    result: NDArray[np.float64] = value.astype(np.float64)
    return result


def codes(value: tuple[Sequence[bytes], Array], known: dict[bytes, int]) -> NDArray[np.uint8]:
    texts, which = value
    for text in texts:
        require(text in known, f"{text.decode(errors='replace')!r} is not known")
    return np.array([known[text] for text in texts], np.uint8)[which]


def padded(value: Array | None, n: int) -> Array:
    """Flags for n nodes; what is not given is 0, and so is anything but 1."""
    flags = np.zeros(n, np.uint8)
    if value is not None:
        given = value[:n] == 1
        flags[: len(given)] = given
    return flags


def offsets(owner: Array, n: int) -> Array:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n))])


def sized(array: Any, n: int) -> Any:
    require(len(array) == n, "its arrays differ in length")
    return array


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise NotAForest(reason)
