"""Random tree ensembles, as ONNX graphs with branch modes, votes and attributes that no converter emits.

Thresholds and the rows' values come from one small set, so that they meet often.
"""

import os

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

SEED = int(os.environ.get("SHORTTAIL_SEED", "0"))
WIDTH = 4
VALUES = np.array([-2.5, -1, -0.0, 0, 0.1, 1, 1.5, 3, 7, 30.5, 31.5, 40, 1e30], np.float32)
MEMBERS = np.array(
    [-1, 0, 1, 2, 3, 7, 30, 31, 32, 33, 40, 64, 65, 1000, 4095, 4096]
)  # ONNX Runtime requires whole numbers
MODES = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]
TRANSFORMS = ["NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", "PROBIT"]


class RandomTrees:
    """Nodes and leaves of random trees, in the formats of both generations of the operators."""

    def __init__(self, random, modes, n_trees, leaves_max, extremes=False):
        self.random, self.modes, self.extremes = random, modes, extremes
        self.nodes, self.leaves = [], []  # nodes: dicts with children ("leaf" | "node", index)
        self.roots = []
        self.left = 0
        for _ in range(n_trees):
            self.left = int(random.integers(2, leaves_max + 1)) - 1
            self.roots.append(len(self.nodes))
            self.tree = len(self.roots) - 1
            self.branch()

    def branch(self):
        number = len(self.nodes)
        value = self.random.choice(VALUES)
        if self.extremes and self.random.random() < 0.2:
            value = self.random.choice(np.array([np.inf, -np.inf, np.nan], np.float32))
        mode = str(self.random.choice(self.modes))
        members = sorted(set(self.random.choice(MEMBERS, self.random.integers(1, 6)).tolist()))
        node = {"mode": mode, "value": float(value), "feature": int(self.random.integers(WIDTH)), "tree": self.tree}
        self.nodes.append(node | {"missing": int(self.random.random() < 0.4), "members": members})
        self.left -= 1
        for side in ("yes", "no"):
            self.nodes[number][side] = self.child()
        return number

    def child(self):
        if self.left > 0 and self.random.random() < 0.6:
            return ("node", self.branch())
        self.leaves.append(self.tree)
        return ("leaf", len(self.leaves) - 1)

    def old(self):
        """Return nodes_* attributes for ai.onnx.ml 1 to 3, with shuffled node ids, and (tree, node) of each leaf."""
        a = {f"nodes_{name}": [] for name in ("treeids", "nodeids", "modes", "featureids", "values")}
        a |= {f"nodes_{name}": [] for name in ("truenodeids", "falsenodeids", "missing_value_tracks_true")}
        places = {}
        for tree in range(len(self.roots)):
            nodes = [i for i, node in enumerate(self.nodes) if node["tree"] == tree]
            leaves = [i for i, owner in enumerate(self.leaves) if owner == tree]
            keys = [("node", i) for i in nodes] + [("leaf", i) for i in leaves]
            ids = [0, *(1 + self.random.permutation(len(keys) - 1))]
            places |= {key: (tree, int(number)) for key, number in zip(keys, ids, strict=True)}
            for key in keys:
                node = self.nodes[key[1]] if key[0] == "node" else None
                a["nodes_treeids"].append(tree)
                a["nodes_nodeids"].append(places[key][1])
                a["nodes_modes"].append(node["mode"] if node else "LEAF")
                a["nodes_featureids"].append(node["feature"] if node else 0)
                a["nodes_values"].append(node["value"] if node else 0.0)
                a["nodes_missing_value_tracks_true"].append(node["missing"] if node else 0)
                a["nodes_truenodeids"].append(places[node["yes"]][1] if node else 0)
                a["nodes_falsenodeids"].append(places[node["no"]][1] if node else 0)
        return a, [places[("leaf", i)] for i in range(len(self.leaves))]

    def new(self, dtype):
        """Return nodes_* attributes for ai.onnx.ml 5."""
        kind = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
        codes = [[*MODES, "BRANCH_MEMBER"].index(node["mode"]) for node in self.nodes]
        members = [m for node in self.nodes if node["mode"] == "BRANCH_MEMBER" for m in (*node["members"], np.nan)]
        a = {
            "tree_roots": self.roots,
            "nodes_modes": helper.make_tensor("m", TensorProto.UINT8, [len(codes)], codes),
            "nodes_splits": helper.make_tensor("s", kind, [len(codes)], [node["value"] for node in self.nodes]),
            "nodes_featureids": [node["feature"] for node in self.nodes],
            "nodes_missing_value_tracks_true": [node["missing"] for node in self.nodes],
        }
        for side, name in (("yes", "true"), ("no", "false")):
            a[f"nodes_{name}nodeids"] = [node[side][1] for node in self.nodes]
            a[f"nodes_{name}leafs"] = [int(node[side][0] == "leaf") for node in self.nodes]
        if members:
            a["membership_values"] = helper.make_tensor("b", kind, [len(members)], members)
        return a


def rows_of(random, n, dtype):
    rows = random.choice(np.concatenate([VALUES, MEMBERS]), (n, WIDTH)).astype(dtype)
    for value in (np.nan, np.inf, -np.inf, 2.0, 1e-40):
        rows[random.random(rows.shape) < 0.06] = value
    if dtype == np.float64:
        rows[random.random(rows.shape) < 0.1] += 1e-12  # next to a threshold, by less than float32 can represent
    return rows


def model_of(nodes, outputs, element=TensorProto.FLOAT, ml=3, constants=(), inputs=None):
    graph = helper.make_graph(
        nodes,
        "g",
        inputs or [helper.make_tensor_value_info("X", element, [None, WIDTH])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", ml)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def random_ensemble(seed):
    """Return a model with one ensemble whose operator, trees, votes and attributes are random, and its input's dtype.

    Votes are for every target, one of them or several, also several votes of a leaf for the same target.
    """
    random = np.random.default_rng([SEED, seed, 99])
    operator = str(random.choice(["TreeEnsembleRegressor", "TreeEnsembleClassifier", "TreeEnsemble"]))
    wide = bool(random.random() < 0.3)
    element, dtype = (TensorProto.DOUBLE, np.float64) if wide else (TensorProto.FLOAT, np.float32)
    modes = [
        MODES,
        ["BRANCH_LEQ"],
        ["BRANCH_LT"],
        ["BRANCH_LEQ", "BRANCH_EQ"],
        ["BRANCH_GTE", "BRANCH_GT", "BRANCH_NEQ"],
    ]
    modes = modes[random.integers(len(modes))]
    if operator == "TreeEnsemble" and random.random() < 0.5:
        modes = [*modes, "BRANCH_MEMBER"]
    leaves_max = int(random.choice([2, 5, 30, 80]))
    trees = RandomTrees(random, modes, int(random.integers(1, 7)), leaves_max, extremes=random.random() < 0.3)
    n_targets = int(random.integers(1, 5))
    transform = int(random.integers(len(TRANSFORMS)))
    if operator == "TreeEnsemble":
        a = trees.new(dtype) | {"n_targets": n_targets, "post_transform": transform}
        a["aggregate_function"] = int(random.integers(4))
        n = len(trees.leaves)
        a["leaf_targetids"] = random.integers(0, n_targets if random.random() < 0.7 else 1, n).tolist()
        a["leaf_weights"] = helper.make_tensor("w", element, [n], random_weights(random, n, wide))
        outputs = [("Y", element)]
    else:
        kind = "class" if operator == "TreeEnsembleClassifier" else "target"
        nodes, leaves = trees.old()
        votes = random_votes(random, leaves, n_targets)
        values = random_weights(random, len(votes), wide)
        a = nodes | {
            f"{kind}_treeids": [leaf[0] for leaf, _ in votes],
            f"{kind}_nodeids": [leaf[1] for leaf, _ in votes],
        }
        a |= {f"{kind}_ids": [target for _, target in votes], "post_transform": TRANSFORMS[transform]}
        a |= as_floats_or_tensor(f"{kind}_weights", values, wide and random.random() < 0.5)
        n_base = int(random.choice([0, 1, n_targets, n_targets]))
        if n_base:
            a |= as_floats_or_tensor("base_values", random.normal(size=n_base).tolist(), wide and random.random() < 0.5)
        if kind == "target":
            aggregate = str(random.choice(["SUM", "AVERAGE", "MIN", "MAX"]))
            a |= {"n_targets": n_targets, "aggregate_function": aggregate}
            outputs = [("Y", TensorProto.FLOAT)]
        else:
            labels = [["a", "b", "c", "d"], [0, 1, 2, 3], [7, 5, -2, 9]][random.integers(3)][:n_targets]
            texts = isinstance(labels[0], str)
            a["classlabels_strings" if texts else "classlabels_int64s"] = labels
            outputs = [("L", TensorProto.STRING if texts else TensorProto.INT64), ("P", TensorProto.FLOAT)]
    node = helper.make_node(operator, ["X"], [name for name, _ in outputs], domain="ai.onnx.ml", **a)
    return model_of([node], outputs, element, ml=5 if operator == "TreeEnsemble" else 3), dtype


def random_weights(random, n, wide):
    style = random.integers(3)
    few = random.choice([0.0, -0.0, 0.5, -0.5, 1, 100, -100, 1e38, 1e-40, np.inf, -np.inf, np.nan], n)
    drawn = [random.normal(size=n), random.random(n) / 4, few][style]
    return (drawn if wide else drawn.astype(np.float32)).tolist()


def random_votes(random, leaves, n_targets):
    """Return (leaf, target) of each vote: for one target, all, the tree's, several at random, or mostly target 0."""
    style, votes = random.integers(5), []
    for leaf in leaves:
        some = np.flatnonzero(random.random(n_targets) < 0.5).tolist() or [n_targets - 1]
        several = random.integers(0, n_targets, random.integers(1, 4)).tolist()
        targets = [[int(random.integers(n_targets))], list(range(n_targets)), [leaf[0] % n_targets], several, some][
            style
        ]
        votes += [(leaf, target) for target in ([0] if style == 4 and random.random() < 0.8 else targets)]
    if random.random() < 0.3:
        random.shuffle(votes)
    return votes


def as_floats_or_tensor(name, values, tensor):
    """Return an attribute as a list of floats, or as a tensor of doubles."""
    if tensor:
        return {f"{name}_as_tensor": helper.make_tensor(name, TensorProto.DOUBLE, [len(values)], values)}
    return {name: values}
