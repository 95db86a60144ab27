"""Compiled forests compared with ONNX Runtime: hand-made graphs with features that no converter emits."""

import re

import numpy as np
import pytest

from shorttail.errors import InvalidArgument
from shorttail.models.forest import NotAForest, compile_forest
from shorttail.models.session import Session

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402
from random_trees import (  # noqa: E402
    MODES,
    SEED,
    TRANSFORMS,
    WIDTH,
    RandomTrees,
    model_of,
    random_ensemble,
    rows_of,
)

BATCHES = (1, 2, 4, 7, 16, 40, 130)


def check(model, random, folder, dtype=np.float32, batches=BATCHES, tolerance=1e-5):
    """Check that the forest equals ONNX Runtime. Return the forest, or None if ONNX Runtime refuses the model."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        session = Session(path)
    except InvalidArgument as error:
        print(error)
        return None
    forest = compile_forest(path, session.output_names)
    for n in batches:
        rows = rows_of(random, n, dtype)
        for ours, theirs in zip(forest.run([rows]), session.run([rows]), strict=True):
            theirs = np.asarray(theirs)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            if ours.dtype.kind == "f":
                np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance / 10)
            else:
                np.testing.assert_array_equal(ours, theirs)
    return forest


def weights(random, n, style):
    drawn = random.normal(size=n) if style == "mixed" else random.random(n) / 4
    return drawn.astype(np.float32).tolist()


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("modes", [*[[mode] for mode in MODES], MODES], ids=[*MODES, "all"])
def test_branch_modes(modes, seed, tmp_path):
    random = np.random.default_rng([SEED, seed])
    dtype = np.float64 if seed % 3 == 2 else np.float32
    trees = RandomTrees(random, modes, 4, [6, 40, 100][seed % 3], extremes=seed % 4 == 3)
    nodes, leaves = trees.old()
    a = nodes | {"target_treeids": [t for t, _ in leaves], "target_nodeids": [n for _, n in leaves]}
    a |= {"target_ids": [0] * len(leaves), "target_weights": weights(random, len(leaves), "mixed"), "n_targets": 1}
    node = helper.make_node("TreeEnsembleRegressor", ["X"], ["Y"], domain="ai.onnx.ml", **a)
    element = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
    assert check(model_of([node], [("Y", TensorProto.FLOAT)], element), random, tmp_path, dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("aggregate", ["SUM", "AVERAGE", "MIN", "MAX"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_regressors(transform, aggregate, seed, tmp_path):
    """Test one and three targets, votes by some leaves or by all, with and without base values."""
    random = np.random.default_rng([SEED, seed, 1])
    trees = RandomTrees(random, ["BRANCH_LEQ", "BRANCH_GT"], 5, 30)
    nodes, leaves = trees.old()
    n_targets = 1 if seed == 0 else 3
    votes = [(leaf, k) for leaf in leaves for k in range(n_targets)]
    if seed == 2:
        votes = [(leaf, k) for leaf, k in votes if k == leaf[0] % 3 or random.random() < 0.3]
    a = nodes | {"target_treeids": [leaf[0] for leaf, _ in votes], "target_nodeids": [leaf[1] for leaf, _ in votes]}
    a |= {"target_ids": [k for _, k in votes], "target_weights": weights(random, len(votes), "positive")}
    a |= {"n_targets": n_targets, "post_transform": transform, "aggregate_function": aggregate}
    if seed % 2 == 0:
        a["base_values"] = [0.125, 0.25, 0.05][:n_targets]
    node = helper.make_node("TreeEnsembleRegressor", ["X"], ["Y"], domain="ai.onnx.ml", **a)
    assert check(model_of([node], [("Y", TensorProto.FLOAT)]), random, tmp_path)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_ensembles(first, tmp_path):
    """Every combination of targets, votes, base values, aggregates and post-transforms gives ONNX Runtime's scores."""
    compared = 0
    for seed in range(first, first + 50):
        model, dtype = random_ensemble(seed)
        try:
            forest = check(model, np.random.default_rng([SEED, seed]), tmp_path, dtype, (1, 3, 60), tolerance=1e-6)
        except NotAForest as no:
            assert re.search("one class|two classes|one leaf|single score", no.reason), no.reason  # noqa: PT017
        except AssertionError as wrong:
            raise AssertionError(f"SHORTTAIL_SEED={SEED}, random_ensemble({seed})") from wrong
        else:
            compared += forest is not None
    assert compared > 20


@pytest.mark.parametrize("style", ["positive", "mixed"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("n_base", [0, 1, 2])
@pytest.mark.parametrize("voted", [[0], [1], [0, 1]])
@pytest.mark.parametrize("names", [[0, 1], [5, -3], ["no", "yes"]])
def test_two_classes(names, voted, n_base, transform, style, tmp_path):
    """ONNX Runtime has many special cases for two classes: votes for one or both, base values, signs of weights."""
    random = np.random.default_rng([SEED, len(voted), n_base])
    trees = RandomTrees(random, ["BRANCH_LT"], 3, 12)
    nodes, leaves = trees.old()
    votes = [(leaf, k) for leaf in leaves for k in voted]
    a = nodes | {"class_treeids": [leaf[0] for leaf, _ in votes], "class_nodeids": [leaf[1] for leaf, _ in votes]}
    a |= {"class_ids": [k for _, k in votes], "class_weights": weights(random, len(votes), style)}
    a |= {"post_transform": transform} | ({"base_values": [0.2, -0.1][:n_base]} if n_base else {})
    kind = TensorProto.STRING if isinstance(names[0], str) else TensorProto.INT64
    a["classlabels_strings" if kind == TensorProto.STRING else "classlabels_int64s"] = names
    node = helper.make_node("TreeEnsembleClassifier", ["X"], ["L", "P"], domain="ai.onnx.ml", **a)
    model = model_of([node], [("L", kind), ("P", TensorProto.FLOAT)])
    # ONNX Runtime leaves these cases undefined: it writes only one of two numbers, or reads outside its arrays.
    if voted == [0] and (n_base == 2 or transform == "PROBIT"):
        with pytest.raises(NotAForest, match="single score"):
            check(model, random, tmp_path)
    else:
        check(model, random, tmp_path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_base", [False, True])
def test_many_classes(with_base, transform, seed, tmp_path):
    random = np.random.default_rng([SEED, seed, 3])
    trees = RandomTrees(random, MODES, 6, 20)
    nodes, leaves = trees.old()
    votes = [(leaf, k) for leaf in leaves for k in range(4)]
    if seed % 2:
        votes = [(leaf, k) for leaf, k in votes if k == leaf[0] % 3 or (seed == 3 and random.random() < 0.2)]
    a = nodes | {"class_treeids": [leaf[0] for leaf, _ in votes], "class_nodeids": [leaf[1] for leaf, _ in votes]}
    a |= {"class_ids": [k for _, k in votes], "class_weights": weights(random, len(votes), "positive")}
    a |= {"post_transform": transform, "classlabels_int64s": [4, 3, 9, 1]}
    if with_base:
        a["base_values"] = [0.1, 0.2, -0.3, 0.1]
    node = helper.make_node("TreeEnsembleClassifier", ["X"], ["L", "P"], domain="ai.onnx.ml", **a)
    assert check(model_of([node], [("L", TensorProto.INT64), ("P", TensorProto.FLOAT)]), random, tmp_path)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("aggregate", range(4))
@pytest.mark.parametrize("transform", range(5))
def test_version_5(transform, aggregate, dtype, seed, tmp_path):
    random = np.random.default_rng([SEED, seed, 4])
    modes = [["BRANCH_MEMBER"], [*MODES, "BRANCH_MEMBER"], ["BRANCH_LEQ"]][seed % 3]
    trees = RandomTrees(random, modes, 5, [8, 70][seed % 2])
    kind = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
    n_targets = 1 + 2 * (seed % 2)
    leaf_weights = random.random(len(trees.leaves)) / 8
    a = trees.new(dtype) | {"n_targets": n_targets, "aggregate_function": aggregate, "post_transform": transform}
    a["leaf_targetids"] = [int(k) for k in random.integers(0, n_targets, len(trees.leaves))]
    a["leaf_weights"] = helper.make_tensor("w", kind, [len(leaf_weights)], leaf_weights.tolist())
    node = helper.make_node("TreeEnsemble", ["X"], ["Y"], domain="ai.onnx.ml", **a)
    model = model_of([node], [("Y", kind)], kind, ml=5)
    if any(trees.nodes[root]["yes"][1] == trees.nodes[root]["no"][1] for root in trees.roots):
        # ONNX Runtime takes a root for a leaf if its children, a node and a leaf, have the same number.
        with pytest.raises(NotAForest, match="a tree of one leaf"):
            check(model, random, tmp_path)
    else:
        assert check(model, random, tmp_path, dtype, (1, 3, 50))


def chain(flags, shared=True, values=None):
    """Return a regressor whose tests of feature 0 share one true child, as LightGBM's converter writes == tests."""
    n = len(flags)
    mode = "BRANCH_EQ" if shared else "BRANCH_LEQ"
    values = values or list(range(1, n + 1))
    rows = [(i, mode, float(values[i]), n, i + 1 if i + 1 < n else n + 1, flag) for i, flag in enumerate(flags)]
    rows += [(n, "LEAF", 0.0, 0, 0, 0), (n + 1, "LEAF", 0.0, 0, 0, 0)]
    number, modes, values, yes, no, missing = (list(column) for column in zip(*rows, strict=True))
    return helper.make_node(
        "TreeEnsembleRegressor", ["X"], ["Y"], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0] * len(rows), nodes_nodeids=number, nodes_modes=modes, nodes_values=values,
        nodes_truenodeids=yes, nodes_falsenodeids=no, nodes_missing_value_tracks_true=missing,
        nodes_featureids=[0] * len(rows), target_treeids=[0, 0], target_nodeids=[n, n + 1],
        target_ids=[0, 0], target_weights=[1.0, 2.0],
    )  # fmt: skip


CHAINS = {
    "eq": ([0] * 3, True, None),
    "missing": ([1] * 3, True, None),
    "long": ([0] * 70, True, None),
    "long missing": ([1] * 40, True, None),
    "one": ([0], True, None),
    "missing first": ([1, 0, 0], True, None),
    "missing second": ([0, 1, 0], True, None),
    "missing large": ([0, 0, 1], True, [1, 40, 0.1]),
    "missing after large": ([0, 0, 1], True, [1, 40, 2]),
    "fractions": ([0, 1], True, [1.5, 0.1]),
    "no chain": ([0, 1, 0], False, None),
}


@pytest.mark.parametrize("name", CHAINS)
def test_nodes_that_share_a_child(name, tmp_path):
    flags, shared, values = CHAINS[name]
    model = model_of([chain(flags, shared, values)], [("Y", TensorProto.FLOAT)])
    forest = check(model, np.random.default_rng(SEED), tmp_path)
    assert forest
    forest.verify_every_leaf(Session(tmp_path / "model.onnx"), tmp_path / "model.onnx")
    if shared:
        assert forest.ensembles[0].trees.n_leaves == 2  # one set instead of a copy of the leaf per value


def regressor(output="Y", source="X", scale=1.0):
    node = chain([0, 0])
    node.input[0], node.output[0] = source, output
    for attribute in node.attribute:
        if attribute.name == "target_weights":
            attribute.floats[:] = [scale, 2 * scale]
    return node


def op(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, **attributes)


FLOAT, INT64, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE
ONE = ("one", np.array(1, np.float32))
AROUND = {
    "identity": ([regressor("a"), op("Identity", ["a"], ["Y"])], FLOAT, []),
    "times one": ([regressor("a"), op("Mul", ["a", "one"], ["Y"])], FLOAT, [ONE]),
    "exp": ([regressor("a"), op("Exp", ["a"], ["Y"])], FLOAT, []),
    "sigmoid": ([regressor("a", scale=-3.0), op("Sigmoid", ["a"], ["Y"])], FLOAT, []),
    "cast": ([regressor("a"), op("Cast", ["a"], ["Y"], to=DOUBLE)], DOUBLE, []),
    "cast before": ([op("Cast", ["X"], ["x"], to=DOUBLE), regressor("Y", "x")], FLOAT, []),
    "one minus": (
        [regressor("a", scale=0.3), op("Sub", ["one", "a"], ["b"]), op("Concat", ["b", "a"], ["Y"], axis=1)],
        FLOAT,
        [ONE],
    ),
    "label": (
        [
            regressor("a", scale=0.3),
            regressor("b", scale=0.2),
            op("Concat", ["b", "a"], ["c"], axis=1),
            op("Softmax", ["c"], ["p"], axis=1),
            op("ArgMax", ["p"], ["n"], axis=1),
            helper.make_node("ArrayFeatureExtractor", ["names", "n"], ["l"], domain="ai.onnx.ml"),
            op("Reshape", ["l", "shape"], ["Y"]),
        ],
        INT64,
        [("names", np.array([7, 9])), ("shape", np.array([-1]))],
    ),
    "sum of ensembles": ([regressor("a"), regressor("b"), op("Sum", ["a", "b"], ["Y"])], FLOAT, []),
    "over its negation": ([regressor("a"), op("Neg", ["a"], ["b"]), op("Div", ["a", "b"], ["Y"])], FLOAT, []),
}


@pytest.mark.parametrize("name", AROUND)
def test_operators_around_a_forest(name, tmp_path):
    nodes, kind, constants = AROUND[name]
    forest = check(model_of(nodes, [("Y", kind)], constants=constants), np.random.default_rng(SEED), tmp_path)
    assert forest
    forest.verify_every_leaf(Session(tmp_path / "model.onnx"), tmp_path / "model.onnx")


EXTREME = [0.0, 1e-30, 1.0, 1.0000001, 18.5, 30.0, 88.5, 110.0, 3e9, 1e19, 1e30, np.inf]
EXTREME = [*EXTREME, *(-value for value in EXTREME), np.nan]
BOTH = op("Concat", ["a", "b"], ["c"], axis=1)
AFTER = {
    "sigmoid": ([op("Sigmoid", ["a"], ["Y"])], FLOAT),
    "exp": ([op("Exp", ["a"], ["Y"])], FLOAT),
    "softmax": ([BOTH, op("Softmax", ["c"], ["Y"], axis=1)], FLOAT),
    "argmax": ([BOTH, op("ArgMax", ["c"], ["Y"], axis=1)], INT64),
    "argmax of probabilities": (
        [BOTH, op("Softmax", ["c"], ["p"], axis=1), op("ArgMax", ["p"], ["Y"], axis=1, keepdims=0)],
        INT64,
    ),
    "cast": ([op("Cast", ["a"], ["Y"], to=DOUBLE)], DOUBLE),
    "arithmetic": (
        [op("Mul", ["a", "b"], ["m"]), op("Sub", ["m", "a"], ["d"]), op("Div", ["d", "b"], ["Y"])],
        FLOAT,
    ),
}


def steps(output, column, values):
    """Return a tree that gives values[i] where the column is above i - 1 and at most i."""
    n = len(values)
    inner, leaves = list(range(n - 1)), list(range(n - 1, 2 * n - 1))
    return helper.make_node(
        "TreeEnsembleRegressor", ["X"], [output], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0] * (2 * n - 1), nodes_nodeids=[*inner, *leaves], nodes_values=[*map(float, inner), *[0.0] * n],
        nodes_modes=["BRANCH_LEQ"] * (n - 1) + ["LEAF"] * n, nodes_featureids=[column] * (2 * n - 1),
        nodes_truenodeids=leaves[:-1] + [0] * n, nodes_falsenodeids=[*inner[1:], leaves[-1], *[0] * n],
        target_treeids=[0] * n, target_nodeids=leaves, target_ids=[0] * n, target_weights=values,
    )  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_operators_after_trees_with_extreme_scores(name, tmp_path):
    """Every pair of scores: zeros, ties, numbers that overflow, infinities and NaN."""
    after, kind = AFTER[name]
    nodes = [steps("a", 0, EXTREME), steps("b", 1, EXTREME), *after]
    (tmp_path / "m.onnx").write_bytes(model_of(nodes, [("Y", kind)]).SerializeToString())
    session = Session(tmp_path / "m.onnx")
    forest = compile_forest(tmp_path / "m.onnx", ["Y"])
    rows = np.zeros((len(EXTREME) ** 2, WIDTH), np.float32)
    rows[:, 0], rows[:, 1] = (grid.ravel() for grid in np.mgrid[: len(EXTREME), : len(EXTREME)])
    with np.errstate(all="ignore"):
        [ours], [theirs] = forest.run([rows]), session.run([rows])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("element", [INT64, TensorProto.INT32])
def test_integer_inputs(element, tmp_path):
    random = np.random.default_rng(SEED)
    trees = RandomTrees(random, MODES, 4, 20)
    nodes, leaves = trees.old()
    a = nodes | {"class_treeids": [leaf[0] for leaf in leaves], "class_nodeids": [leaf[1] for leaf in leaves]}
    a |= {"class_ids": [0] * len(leaves), "class_weights": weights(random, len(leaves), "mixed")}
    a |= {"classlabels_int64s": [0, 1], "post_transform": "LOGISTIC"}
    node = helper.make_node("TreeEnsembleClassifier", ["X"], ["L", "P"], domain="ai.onnx.ml", **a)
    model = model_of([node], [("L", INT64), ("P", FLOAT)], element)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    session = Session(tmp_path / "model.onnx")
    forest = compile_forest(tmp_path / "model.onnx", session.output_names)
    forest.verify_against(session, rows=2000)
    forest.verify_every_leaf(session, tmp_path / "model.onnx")


def test_one_input_per_column(tmp_path):
    """The graph concatenates several inputs to a matrix."""
    names = [f"f{i}" for i in range(WIDTH)]
    inputs = [helper.make_tensor_value_info(name, FLOAT, [None, 1]) for name in names]
    model = model_of([op("Concat", names, ["x"], axis=1), regressor("Y", "x")], [("Y", FLOAT)], inputs=inputs)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    session = Session(tmp_path / "model.onnx")
    compile_forest(tmp_path / "model.onnx", ["Y"]).verify_every_leaf(session, tmp_path / "model.onnx")


def changed(**attributes):
    node = chain([0, 0])
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items() if value is not None)
    return node


REFUSED = {
    "no tree ensemble": [op("Identity", ["X"], ["Y"])],
    "node of type Gather": [regressor("a"), op("Gather", ["a", "which"], ["Y"], axis=1)],
    "node of type MatMul": [regressor("a"), op("MatMul", ["a", "a"], ["Y"])],
    "contain a cycle": [changed(nodes_falsenodeids=[1, 0, 0, 0])],
    "a node that does not exist": [changed(nodes_falsenodeids=[1, 9, 0, 0])],
    "a leaf has no weight": [changed(target_nodeids=[2, 2])],
    "a target that does not exist": [changed(n_targets=2, target_ids=[0, 5])],
    "a node is there twice": [changed(nodes_nodeids=[0, 0, 2, 3])],
    "arrays differ in length": [changed(nodes_values=[1.0, 2.0])],
    "attribute 'surprise' that is not known": [changed(surprise=1)],
    "'BRANCH_NEAR' is not known": [changed(nodes_modes=["BRANCH_NEAR", "BRANCH_EQ", "LEAF", "LEAF"])],
    "it is too large": [changed(nodes_featureids=[-1, 0, 0, 0])],
    "a weight has no tree": [changed(target_treeids=[0, 8])],
    "it has no nodes": [changed(nodes_treeids=None, nodes_nodeids=None)],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_graphs_are_refused_with_a_reason(reason, tmp_path):
    path = tmp_path / "model.onnx"
    model = model_of(REFUSED[reason], [("Y", FLOAT)], constants=[("which", np.array([0]))])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NotAForest, match=reason) as refused:
        compile_forest(path, ["Y"])
    assert "\n" not in refused.value.reason


def test_other_generations_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model_of([regressor()], [("Y", FLOAT)], ml=6).SerializeToString())
    with pytest.raises(NotAForest, match=r"ai\.onnx\.ml 6"):
        compile_forest(path, ["Y"])
    path.write_bytes(b"not a model at all")
    with pytest.raises(NotAForest):
        compile_forest(path, ["Y"])
