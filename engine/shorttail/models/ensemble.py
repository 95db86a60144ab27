"""Compiles ONNX's tree ensemble operators to native forests: TreeEnsembleClassifier, -Regressor and TreeEnsemble.

ONNX Runtime's behaviour is followed, also where it departs from the ONNX specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shorttail._native.forest import Trees
from shorttail.models.onnx_graph import Node

Array = NDArray[Any]

# These numbers are the codes of native/forest.h.
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
BITS_MAX = 30  # ONNX Runtime keeps a set of numbers in 0 ... 30 as a bit mask, any other set as an int32 set
AGGREGATES = {b"SUM": 0, b"AVERAGE": 1, b"MIN": 2, b"MAX": 3}
TRANSFORMS = {b"NONE": 0, b"LOGISTIC": 1, b"SOFTMAX": 2, b"SOFTMAX_ZERO": 3, b"PROBIT": 4}
PROBIT = TRANSFORMS[b"PROBIT"]
# ai.onnx.ml 5 has numbers for modes and aggregates: BRANCH_LEQ 0, LT 1, GTE 2, GT 3, EQ 4, NEQ 5, MEMBER 6;
# AVERAGE 0, SUM 1, MIN 2, MAX 3.
AGGREGATES_5 = (1, 0, 2, 3)
# Post-transforms by the number that ONNX Runtime reads: 1 is LOGISTIC there, and SOFTMAX in the specification.
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
    """Raised for a model that only ONNX Runtime should run. `reason` says why, in one line."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Nodes:
    """The nodes of an ensemble as `Trees` takes them, which says what the arrays are."""

    feature: NDArray[np.int32]
    yes: NDArray[np.int32]
    no: NDArray[np.int32]
    mode: NDArray[np.uint8]
    missing_yes: NDArray[np.uint8]
    threshold: NDArray[np.float64]
    root: NDArray[np.uint32]
    set_begin: NDArray[np.uint32]
    set_value: NDArray[np.float64]


@dataclass
class Ensemble:
    """A compiled ensemble operator.

    labels: the label of each class number (int64, or an object array of str); None if numbers are the labels.
    """

    trees: Trees
    labels: Array | None
    nodes: Nodes

    def run(self, rows: Array) -> tuple[Array | None, Array]:
        """Run a batch, [rows, features]. Returns (labels [rows], None for a regressor; scores [rows, targets])."""
        numbers, scores = self.trees.run(rows)
        if numbers is None or self.labels is None:
            return numbers, scores
        return self.labels[numbers], scores


def compile_ensemble(node: Node, element: str) -> Ensemble:
    """Compile an ensemble operator. element: type of its input, "float" or "double". Raises NotAForest."""
    attributes = node.attributes
    known = KEYS_5 if node.op_type == "TreeEnsemble" else NODE_KEYS
    known = known | (CLASS_KEYS if node.op_type == "TreeEnsembleClassifier" else TARGET_KEYS)
    for name in attributes:
        if name not in known or attributes[name] is None:
            raise NotAForest(f"{node.op_type} has an attribute {name!r} that is not known")
    build = compile_5 if node.op_type == "TreeEnsemble" else compile_3
    try:
        return build(node, attributes, element == "double")
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise NotAForest(f"{node.op_type}: {error}") from error


def compile_3(node: Node, attributes: dict[str, Any], wide: bool) -> Ensemble:
    """Compile an operator from before ai.onnx.ml 5, where (tree id, node id) identifies nodes and weights.

    wide: the input is float64, not float32.
    """
    classifier = node.op_type == "TreeEnsembleClassifier"
    prefix = "class" if classifier else "target"
    tree_ids, node_ids = int_list(attributes, "nodes_treeids"), int_list(attributes, "nodes_nodeids")
    finder = NodeFinder(tree_ids, node_ids)
    mode = enum_codes(attributes["nodes_modes"], MODES)
    n = finder.size
    inner = mode != LEAF
    yes, no = np.zeros(n, np.int32), np.zeros(n, np.int32)
    yes[inner] = finder.find(finder.tree[inner], of_length(int_list(attributes, "nodes_truenodeids"), n)[inner])
    no[inner] = finder.find(finder.tree[inner], of_length(int_list(attributes, "nodes_falsenodeids"), n)[inner])
    targets, weights = int_list(attributes, f"{prefix}_ids"), float_list(attributes, f"{prefix}_weights", wide)
    owner = finder.find(
        finder.tree_of(int_list(attributes, f"{prefix}_treeids")), int_list(attributes, f"{prefix}_nodeids")
    )
    require(len(targets) == len(weights) == len(owner), "its weights differ in number from their nodes")
    labels, n_targets = class_labels(attributes) if classifier else (None, int(attributes.get("n_targets", 0)))
    base = float_list(attributes, "base_values", wide)
    order = np.argsort(owner, kind="stable")
    single = classifier and n_targets == 2 and len(np.unique(targets)) == 1
    trees, nodes = make_trees(
        feature=of_length(int_list(attributes, "nodes_featureids"), n),
        yes=yes,
        no=no,
        mode=mode,
        missing_yes=node_flags(attributes.get("nodes_missing_value_tracks_true"), n),
        threshold=of_length(float_list(attributes, "nodes_values", wide), n),
        root=finder.first,
        weight_begin=weight_offsets(owner, n),
        weight_target=targets[order],
        weight=weights[order],
        set_begin=np.zeros(n + 1),
        set_value=np.zeros(0),
        base=base,
        n_targets=n_targets,
        wide=wide,
        wide_scores=False,  # the operators before ai.onnx.ml 5 return float, also for double inputs
        aggregate=AGGREGATES[attributes.get("aggregate_function", b"SUM")] if not classifier else 0,
        post_transform=TRANSFORMS[attributes.get("post_transform", b"NONE")],
        classifier=classifier,
        one_class_votes=single,
        all_positive=bool(classifier and not (weights < 0).any()),
    )
    if labels is not None:
        check_classes(trees, attributes, base, set(np.unique(targets)))
        # With two classes that both have weights, ONNX Runtime answers 0 and 1, whatever the class labels are.
        numbered = labels.dtype == np.int64 and np.array_equal(labels, np.arange(n_targets))
        if numbered or (labels.dtype == np.int64 and n_targets == 2 and not single):
            labels = None
    return Ensemble(trees, labels, nodes)


def check_classes(trees: Trees, attributes: dict[str, Any], base: Array, targets: set[int]) -> None:
    """Raise NotAForest for a classifier whose result ONNX Runtime leaves undefined."""
    n, transform = trees.n_targets, TRANSFORMS[attributes.get("post_transform", b"NONE")]
    require(n >= 2, "a classifier of one class")
    require(len(base) in (0, n) or (n == 2 and len(base) == 1), f"{len(base)} base values for {n} classes")
    if n == 2:
        require(trees.votes != "some", "two classes, and leaves that vote for different ones")
        require(1 in targets or transform != PROBIT, "PROBIT of a single score")
        require(len(base) != 2 or targets != {0}, "two base values for a single score")


def compile_5(node: Node, attributes: dict[str, Any], wide: bool) -> Ensemble:
    """Compile TreeEnsemble of ai.onnx.ml 5. ONNX numbers nodes and leaves separately; here leaves follow the nodes."""
    modes = np.asarray(attributes["nodes_modes"]).astype(np.int64)
    n, leaves = len(modes), len(int_list(attributes, "leaf_targetids"))
    yes, no = (
        of_length(int_list(attributes, "nodes_truenodeids"), n),
        of_length(int_list(attributes, "nodes_falsenodeids"), n),
    )
    roots = int_list(attributes, "tree_roots")
    require(bool(((modes >= 0) & (modes <= 6)).all()), "a branch mode that is not known")
    require(bool(((roots >= 0) & (roots < n)).all()), "a root that is not a node")
    require(bool((yes[roots] != no[roots]).all()), "a tree of one leaf")
    yes = yes + n * (of_length(int_list(attributes, "nodes_trueleafs"), n) != 0)
    no = no + n * (of_length(int_list(attributes, "nodes_falseleafs"), n) != 0)
    weights = of_length(float_list(attributes, "leaf_weights", wide, suffix=False), leaves)
    sets, values, whole = member_sets(
        modes, float_list(attributes, "membership_values", wide, suffix=False), n + leaves
    )
    aggregate = int(attributes.get("aggregate_function", 1))
    transform = int(attributes.get("post_transform", 0))
    require(0 <= aggregate < 4 and 0 <= transform < 5, "a post-transform or an aggregate that is not known")
    fill = np.zeros(leaves, np.int64)
    features, splits = (
        of_length(int_list(attributes, "nodes_featureids"), n),
        of_length(float_list(attributes, "nodes_splits", wide, suffix=False), n),
    )
    trees, nodes = make_trees(
        feature=np.concatenate([features, fill]),
        yes=np.concatenate([yes, fill]),
        no=np.concatenate([no, fill]),
        mode=np.concatenate([modes + 1, fill]) + whole,
        missing_yes=node_flags(attributes.get("nodes_missing_value_tracks_true"), n + leaves),
        threshold=np.concatenate([splits, fill]),
        root=roots,
        weight_begin=np.concatenate([np.zeros(n, np.int64), np.arange(leaves + 1)]),
        weight_target=int_list(attributes, "leaf_targetids"),
        weight=weights,
        set_begin=sets,
        set_value=values,
        base=np.zeros(0),
        n_targets=int(attributes.get("n_targets", 0)),
        wide=wide,
        wide_scores=wide,
        aggregate=AGGREGATES_5[aggregate],
        post_transform=TRANSFORMS_5[transform],
        classifier=False,
        one_class_votes=False,
        all_positive=False,
    )
    return Ensemble(trees, None, nodes)


def member_sets(modes: Array, values: Array, n: int) -> tuple[Array, Array, Array]:
    """Return the sets of MEMBER nodes as (offsets [n + 1], values, flags [n]).

    values: all sets in the order of their nodes, each followed by NaN. n: nodes and leaves. A flag is set where ONNX
    Runtime drops the fraction of a number before it looks it up, which it does in sets that are not bit masks.
    """
    set_nodes = np.flatnonzero(modes == MEMBER - 1)
    which = np.cumsum(np.isnan(values)) - np.isnan(values)  # index of the set that each value belongs to
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
    """Finds nodes by (tree id, node id). The nodes of a tree must stand together, as converters write them."""

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
        """Return the ordinals of trees from their ids."""
        at = np.searchsorted(self._ids, tree_ids)
        require(bool((self._ids[np.minimum(at, len(self._ids) - 1)] == tree_ids).all()), "a weight has no tree")
        return self._by_id[at]

    def find(self, tree: Array, node_ids: Array) -> Array:
        """Return the indices of nodes. tree: ordinals of their trees. node_ids: their ids within the tree."""
        require(len(tree) == len(node_ids), "its arrays differ in length")
        if self._dense:
            require(bool(((node_ids >= 0) & (node_ids < self._count[tree])).all()), "a node that does not exist")
            return self.first[tree] + node_ids
        keys = tree << 31 | node_ids
        at = np.minimum(np.searchsorted(self._keys, keys), self.size - 1)
        require(bool((self._keys[at] == keys).all()), "a node that does not exist")
        return self._order[at]


def make_trees(**arrays: Any) -> tuple[Trees, Nodes]:
    """Convert the arrays to the dtypes that native code takes, and build the trees. Raises NotAForest for a number out
    of range.
    """
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
    return Trees(**arrays), Nodes(**{field.name: arrays[field.name] for field in fields(Nodes)})


def class_labels(attributes: dict[str, Any]) -> tuple[Array, int]:
    """Return the class labels (int64, or an object array of str) and their number."""
    if "classlabels_strings" in attributes and len(attributes["classlabels_strings"][1]):
        values, which = attributes["classlabels_strings"]
        labels = np.array([value.decode() for value in values] + [None], object)[:-1][which]
        return labels, len(labels)
    labels = int_list(attributes, "classlabels_int64s")
    return labels, len(labels)


def int_list(attributes: dict[str, Any], name: str) -> NDArray[np.int64]:
    """Return an attribute that is a list of integers, empty if it is missing."""
    value = attributes.get(name)
    if value is None:
        return np.zeros(0, np.int64)
    require(isinstance(value, np.ndarray) and value.dtype == np.int64, f"{name} is not a list of integers")
    result: NDArray[np.int64] = value
    return result


def float_list(attributes: dict[str, Any], name: str, wide: bool, suffix: bool = True) -> NDArray[np.float64]:
    """Return an attribute that is a list of floats, or the tensor NAME_as_tensor, as float64; empty if it is missing.

    wide: a tensor must be float64, else float32. suffix: the attribute may be given as a tensor.
    """
    value, as_tensor = attributes.get(name), attributes.get(f"{name}_as_tensor") if suffix else None
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


def enum_codes(value: tuple[Sequence[bytes], Array], known: dict[bytes, int]) -> NDArray[np.uint8]:
    """Return the code of each string of a list. Raises NotAForest for a string that `known` lacks."""
    texts, which = value
    for text in texts:
        require(text in known, f"{text.decode(errors='replace')!r} is not known")
    return np.array([known[text] for text in texts], np.uint8)[which]


def node_flags(value: Array | None, n: int) -> Array:
    """Return a flag for each of n nodes: 1 where the attribute is 1, else 0, also where it is too short."""
    flags = np.zeros(n, np.uint8)
    if value is not None:
        given = value[:n] == 1
        flags[: len(given)] = given
    return flags


def weight_offsets(owner: Array, n: int) -> Array:
    """Return where the weights of each node begin, [n + 1]. owner: the node of each weight."""
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n))])


def of_length(array: Any, n: int) -> Any:
    """Return the array if it has n entries. Raises NotAForest otherwise."""
    require(len(array) == n, "its arrays differ in length")
    return array


def require(holds: bool, reason: str) -> None:
    if not holds:
        raise NotAForest(reason)
