"""The rows on which a compiled forest is compared with ONNX Runtime reach every leaf, also the rarest.

Hypothesis makes the ensembles; `slow_leaf` and `reachable` are the oracle, and walk one tree node by node.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import shorttail as st
from shorttail.models import load
from shorttail.models.check_rows import CELLS_MAX, ROWS
from shorttail.models.forest import NotAForest, compile_forest
from shorttail.models.load import load_runner
from shorttail.models.session import Session
from shorttail.registry.versions import deploy, promote

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402
from random_trees import MODES, WIDTH, RandomTrees, model_of  # noqa: E402

NUMBERS = some.integers(0, 1 << 32)


def leaf_model(trees, dtype):
    """Return a regressor of random trees in the format of ai.onnx.ml 5; leaf i has the weight i + 1."""
    kind = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
    n = len(trees.leaves)
    a = trees.new(dtype) | {"n_targets": 1, "leaf_targetids": [0] * n}
    a["leaf_weights"] = helper.make_tensor("w", kind, [n], [i + 1.0 for i in range(n)])
    node = helper.make_node("TreeEnsemble", ["X"], ["Y"], domain="ai.onnx.ml", **a)
    return model_of([node], [("Y", kind)], kind, ml=5)


def goes_yes(node, x):
    """Whether a value takes a node's "yes", as ONNX Runtime decides it."""
    t, mode = node["value"], node["mode"]
    if mode == "BRANCH_MEMBER":
        members = node["members"]
        bits = min(members) >= 0 and max(members) <= 30
        inside = not np.isnan(x) and abs(x) < 1e15 and (x if bits else np.trunc(x)) in members
    else:
        compare = [np.less_equal, np.less, np.greater_equal, np.greater, np.equal, np.not_equal][MODES.index(mode)]
        inside = bool(compare(x, t))
    return inside or (np.isnan(x) and node["missing"] == 1)


def slow_leaf(trees, root, row):
    """Return the leaf that a row reaches."""
    kind, number = "node", root
    while kind == "node":
        node = trees.nodes[number]
        kind, number = node["yes"] if goes_yes(node, row[node["feature"]]) else node["no"]
    return number


def reachable(trees, dtype):
    """Return the leaves that some row reaches: for each column one value of every kind is tried against the path."""
    ends = [node["value"] for node in trees.nodes] + [
        m + d for node in trees.nodes for m in node["members"] for d in (0, 1, -1)
    ]
    ends = np.array([*ends, 0.0, 0.5, np.inf, -np.inf], dtype)
    values = np.concatenate([ends, np.nextafter(ends, dtype(np.inf)), np.nextafter(ends, dtype(-np.inf)), [np.nan]])
    found = set()

    def walk(kind, number, left):
        if not all(len(possible) for possible in left):
            return
        if kind == "leaf":
            found.add(number)
            return
        node = trees.nodes[number]
        column = node["feature"]
        yes = np.array([goes_yes(node, x) for x in left[column]], bool)
        for side, kept in (("yes", left[column][yes]), ("no", left[column][~yes])):
            walk(*node[side], [*left[:column], kept, *left[column + 1 :]])

    for root in trees.roots:
        walk("node", root, [np.unique(values)] * WIDTH)
    return found


@settings(max_examples=120, deadline=None)
@given(
    NUMBERS, some.sets(some.sampled_from([*MODES, "BRANCH_MEMBER"]), min_size=1), some.integers(2, 40), some.booleans()
)
def test_rows_reach_exactly_the_leaves_that_can_be_reached(tmp_path_factory, seed, modes, leaves_max, wide):
    dtype = np.float64 if wide else np.float32
    trees = RandomTrees(np.random.default_rng(seed), sorted(modes), 3, leaves_max, extremes=seed % 2 == 0)
    path = tmp_path_factory.getbasetemp() / "reach.onnx"
    path.write_bytes(leaf_model(trees, dtype).SerializeToString())
    try:
        forest = compile_forest(path, ["Y"])
    except NotAForest as no:
        assert "a tree of one leaf" in no.reason  # noqa: PT017
        return
    reached = set()
    with np.errstate(invalid="ignore"):
        for batch in forest.check_rows(seed % 7).batches_to_every_leaf():
            [rows] = batch.inputs
            assert len(rows) <= ROWS
            reached |= {slow_leaf(trees, root, row) for row in rows for root in trees.roots}
        assert reached == reachable(trees, dtype)


DEPTH, COMBS = 24, 6


def combs(wrong=None, transform="NONE", element=TensorProto.FLOAT, only=("Y",), classifier=False, n_trees=COMBS):
    """Return trees that are a long chain of tests, each of another column: half of their leaves are reached by fewer
    than one random row in 4,000, and the last ones by one in 16 million. wrong: the leaf whose weight is changed.
    """
    a = {f"nodes_{name}": [] for name in ("treeids", "nodeids", "modes", "featureids", "values")}
    a |= {"nodes_truenodeids": [], "nodes_falsenodeids": [], "nodes_missing_value_tracks_true": []}
    votes, leaf = [], 0
    for tree in range(n_trees):
        for number in range(2 * DEPTH + 1):
            inner = number < DEPTH
            a["nodes_treeids"].append(tree)
            a["nodes_nodeids"].append(number)
            a["nodes_modes"].append("BRANCH_LEQ" if inner else "LEAF")
            a["nodes_featureids"].append((number * 5 + tree) % DEPTH if inner else 0)
            a["nodes_values"].append(float(np.float32(np.sin(number + 7 * tree))) if inner else 0.0)
            a["nodes_truenodeids"].append((number + 1 if number + 1 < DEPTH else 2 * DEPTH) if inner else 0)
            a["nodes_falsenodeids"].append(DEPTH + number if inner else 0)
            a["nodes_missing_value_tracks_true"].append(int(inner and number % 5 == 0))
            if not inner:
                weight = np.cos(leaf) * 12
                votes.append((tree, number, weight + 0.25 if leaf == wrong else weight))
                leaf += 1
    kind = "class" if classifier else "target"
    a |= {f"{kind}_treeids": [tree for tree, _, _ in votes], f"{kind}_nodeids": [number for _, number, _ in votes]}
    a |= {f"{kind}_ids": [0] * leaf, f"{kind}_weights": [weight for _, _, weight in votes], "post_transform": transform}
    a |= {"classlabels_int64s": [0, 1]} if classifier else {"n_targets": 1}
    outputs = [("L", TensorProto.INT64), ("P", TensorProto.FLOAT)] if classifier else [("Y", TensorProto.FLOAT)]
    operator = "TreeEnsembleClassifier" if classifier else "TreeEnsembleRegressor"
    node = helper.make_node(operator, ["X"], [name for name, _ in outputs], domain="ai.onnx.ml", **a)
    inputs = [helper.make_tensor_value_info("X", element, [None, DEPTH])]
    return model_of([node], [output for output in outputs if output[0] in only], inputs=inputs)


def write(model, path):
    path.write_bytes(model.SerializeToString())
    return path


N_LEAVES = COMBS * (DEPTH + 1)
PLANTED = {
    "regressor": ({}, 1),
    "probabilities near 0 and 1": ({"classifier": True, "transform": "LOGISTIC", "only": ("L", "P")}, 4),
    "labels alone": ({"classifier": True, "transform": "LOGISTIC", "only": ("L",)}, 4),
    "integers": ({"classifier": True, "element": TensorProto.INT64, "only": ("L", "P")}, 4),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_leaf_is_found(name, tmp_path):
    """Whichever leaf of the compiled forest is wrong, the check for `apply` finds it."""
    options, step = PLANTED[name]
    right = write(combs(**options), tmp_path / "right.onnx")
    session = Session(right)
    compile_forest(right, session.output_names).verify_every_leaf(session, right)
    for leaf in range(0, N_LEAVES, step):
        forest = compile_forest(write(combs(leaf, **options), tmp_path / "wrong.onnx"), session.output_names)
        with pytest.raises(NotAForest, match="where ONNX Runtime gives"):
            forest.verify_every_leaf(session, right)


def test_a_load_checks_some_of_the_rows_of_apply(tmp_path):
    """They are spread over the trees, and the same at every load."""
    path = write(combs(), tmp_path / "m.onnx")
    forest = compile_forest(path, ["Y"])
    [loaded] = forest.check_rows().batches(40)
    [again] = compile_forest(path, ["Y"]).check_rows().batches(40)
    np.testing.assert_array_equal(loaded.inputs[0], again.inputs[0])
    [loaded] = forest.check_rows().batches(ROWS)
    applied = np.concatenate([batch.inputs[0] for batch in forest.check_rows().batches_to_every_leaf()])
    np.testing.assert_array_equal(loaded.inputs[0], applied[:ROWS])
    few = np.zeros(forest.ensembles[0].trees.n_nodes, np.uint8)
    forest.ensembles[0].trees.reach(next(forest.check_rows().batches(40)).matrices[0], few, np.full(40, -1))
    trees = np.flatnonzero(few) // (2 * DEPTH + 1)
    assert set(trees) == set(range(COMBS))


def test_rows_have_every_kind_of_value(tmp_path):
    path = write(combs(), tmp_path / "m.onnx")
    [batch] = compile_forest(path, ["Y"]).check_rows().batches(ROWS)
    rows = batch.inputs[0]
    thresholds = np.float32(np.sin(0.0))
    column = rows[:, 0]  # tree 0 tests it with threshold sin(0) at its root
    for value in (thresholds, np.nextafter(thresholds, np.float32(1)), np.inf, -np.inf):
        assert (column == value).any(), value
    assert np.isnan(column).any()


def test_a_row_that_goes_elsewhere_is_found(tmp_path):
    """Leaves of the same weight hide a wrong path from the scores, not from the check."""
    forest = compile_forest(write(combs(), tmp_path / "m.onnx"), ["Y"])
    forest.ensembles[0].nodes.threshold[3] += 0.5  # the check's own copy, so that it differs from the compiled trees
    with pytest.raises(NotAForest, match="ends elsewhere in the compiled forest"):
        list(forest.check_rows().batches_to_every_leaf())


def test_memory_of_a_wide_model_is_bounded(tmp_path):
    width = 200_000
    model = combs()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = width
    forest = compile_forest(write(model, tmp_path / "m.onnx"), ["Y"])
    batch = next(forest.check_rows().batches_to_every_leaf())
    assert 0 < batch.inputs[0].size <= CELLS_MAX


def test_a_tree_may_be_a_single_leaf(tmp_path):
    node = helper.make_node(
        "TreeEnsembleRegressor", ["X"], ["Y"], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0, 1], nodes_nodeids=[0, 0], nodes_modes=["LEAF", "LEAF"], nodes_values=[0.0, 0.0],
        nodes_featureids=[0, 0], nodes_truenodeids=[0, 0], nodes_falsenodeids=[0, 0],
        target_treeids=[0, 1], target_nodeids=[0, 0], target_ids=[0, 0], target_weights=[1.0, 2.0],
    )  # fmt: skip
    path = write(model_of([node], [("Y", TensorProto.FLOAT)]), tmp_path / "m.onnx")
    compile_forest(path, ["Y"]).verify_every_leaf(Session(path), path)


def test_trees_over_computed_numbers_run_in_onnx_runtime(tmp_path):
    """No row can be made for a leaf if what its tests see is computed."""
    model = combs()
    model.graph.node[0].input[0] = "x"
    model.graph.node.insert(0, helper.make_node("Neg", ["X"], ["x"]))
    with pytest.raises(NotAForest, match="its trees test numbers that it computes: 'x'"):
        compile_forest(write(model, tmp_path / "m.onnx"), ["Y"])


USER = st.Entity("user", keys={"user_id": st.Int64})
VIEW = st.FeatureView("stats", entity=USER, features=[st.Feature(f"f{i}", st.Float32) for i in range(DEPTH)])
FEATURES = [f"stats:f{i}" for i in range(DEPTH)]


@pytest.fixture
def planted(tmp_path, monkeypatch, trials_here):
    """Return a right model, and a function after which its compiled forest has a wrong leaf that no load reaches."""
    n_trees = 200
    right = write(combs(n_trees=n_trees), tmp_path / "m.onnx")
    forest = compile_forest(right, ["Y"])
    checked = np.zeros(forest.ensembles[0].trees.n_nodes, np.uint8)
    for batch in forest.check_rows().batches(ROWS):
        forest.ensembles[0].trees.reach(batch.matrices[0], checked, np.full(ROWS, -1))
    unchecked = np.flatnonzero(checked.reshape(n_trees, -1)[:, DEPTH:].reshape(-1) == 0)
    wrong = write(combs(int(unchecked[-1]), n_trees=n_trees), tmp_path / "wrong.onnx")

    def plant():
        monkeypatch.setattr(load, "compile_forest", lambda path, names: compile_forest(wrong, names))
        assert load_runner(right, ["Y"]).kind == "forest"

    return right, plant


def check_it_runs_in_onnx_runtime(engine, path):
    engine.push("stats", {"user_id": [1], **{f"f{i}": [0.5] for i in range(DEPTH)}})
    found = engine.store.catalog.model("m").version().forest_differs
    assert found.startswith("its compiled forest gives other answers than ONNX Runtime: ")
    expected = Session(path).run([np.full((1, DEPTH), 0.5, np.float32)])[0]
    np.testing.assert_array_equal(engine.predict("m", {"user_id": [1]}).outputs["Y"], expected)
    assert engine.models()[0]["runs"].endswith(found)


def test_what_apply_finds_holds_for_every_load(tmp_path, planted):
    path, plant = planted
    plant()
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([USER, VIEW, st.Model("m", str(path), FEATURES)])
        check_it_runs_in_onnx_runtime(engine, path)
    with st.Engine.open(tmp_path / "store") as engine:
        check_it_runs_in_onnx_runtime(engine, path)


def test_what_promote_finds_replaces_the_loaded_forest(tmp_path, planted):
    """A version may come from a store of a release that did not check every leaf."""
    path, plant = planted
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([USER, VIEW, st.Model("m", str(path), FEATURES)])
        engine.push("stats", {"user_id": [1], **{f"f{i}": [0.5] for i in range(DEPTH)}})
        engine.predict("m", {"user_id": [1]})
        assert engine.models()[0]["runs"].startswith("compiled forest")
        plant()
        promote(engine.store, "m", 1)
        check_it_runs_in_onnx_runtime(engine, path)


def test_what_deploy_finds_is_recorded(tmp_path, planted):
    path, plant = planted
    first = write(combs(n_trees=2), tmp_path / "first.onnx")
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([USER, VIEW, st.Model("m", str(first), FEATURES)])
        plant()
        deploy(engine.store, "m", path)
        check_it_runs_in_onnx_runtime(engine, path)
