"""Compiled forests compared with ONNX Runtime: models of the usual libraries, made by the usual converters.

The id of every test shows its seed; SHORTTAIL_SEED is added to all seeds. test_forest_graphs.py tests branch modes that
no converter emits.
"""

import os
import threading
import warnings

import numpy as np
import pytest

from shorttail._native.forest import simd_level
from shorttail.errors import Internal, InvalidArgument
from shorttail.models.forest import Forest, NotAForest, compile_forest
from shorttail.models.session import Session

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    onnx = pytest.importorskip("onnx")
    onnxmltools = pytest.importorskip("onnxmltools")
    lightgbm = pytest.importorskip("lightgbm")
    pytest.importorskip("skl2onnx")
    import skl2onnx.common._container as container
    from onnxmltools.convert.common.data_types import FloatTensorType as ToolsFloat
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
    from sklearn.ensemble import (
        ExtraTreesClassifier,
        ExtraTreesRegressor,
        GradientBoostingClassifier,
        GradientBoostingRegressor,
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
        IsolationForest,
        RandomForestClassifier,
        RandomForestRegressor,
    )
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

SEED = int(os.environ.get("SHORTTAIL_SEED", "0"))
WIDTH = 6
BATCHES = (1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 100, 700)

pytestmark = pytest.mark.filterwarnings("ignore")  # converters and training libraries give many warnings


@pytest.fixture(scope="module", autouse=True)
def plain_numbers():
    """Make skl2onnx write Python integers: for histogram boosting it writes NumPy integers, which new onnx refuses."""

    def make_node(*args, **attributes):
        for name, value in attributes.items():
            if name.startswith("nodes_") and name.endswith(("ids", "true")):
                attributes[name] = [int(item) for item in value]
        return original(*args, **attributes)

    original = container.make_node
    container.make_node = make_node
    yield
    container.make_node = original


def data(seed, rows=300, nan=False, categories=False):
    """Return (features float32, score). Some features are whole numbers, so that values equal thresholds."""
    random = np.random.default_rng([SEED, seed])
    x = random.normal(size=(rows, WIDTH)).astype(np.float32)
    x[:, 1] = random.integers(-3, 4, rows)
    x[:, 2] = np.round(x[:, 2], 1)
    if categories:
        x[:, 3] = random.integers(0, 5, rows)
        x[:, 4] = random.integers(0, 45, rows)
    score = x[:, 0] + np.sin(2 * x[:, 1]) * x[:, 2] + (x[:, 4] % 3 if categories else x[:, 4])
    score = score + random.normal(scale=0.3, size=rows)
    if nan:
        x[random.random(x.shape) < 0.15] = np.nan
    return x, score


def classes(score, n):
    return np.digitize(score, np.quantile(score, np.arange(1, n) / n))


def from_sklearn(estimator, x, y, kind=FloatTensorType):
    estimator.fit(x, y)
    options = {id(estimator): {"zipmap": False}} if hasattr(estimator, "predict_proba") else None
    opset = {"": 18, "ai.onnx.ml": 3}
    return convert_sklearn(estimator, initial_types=[("X", kind([None, WIDTH]))], options=options, target_opset=opset)


def from_lightgbm(estimator, x, y, **fit):
    estimator.set_params(verbose=-1, n_jobs=1)
    estimator.fit(x, y, **fit)
    kind = [("X", ToolsFloat([None, WIDTH]))]
    zipmap = {"zipmap": False} if isinstance(estimator, lightgbm.LGBMClassifier) else {}
    return onnxmltools.convert_lightgbm(estimator, initial_types=kind, **zipmap)


def load(model, folder, outputs=None):
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    session = Session(path, outputs)
    return session, compile_forest(path, session.output_names)


def rows_like(x, random, n, dtype):
    """Return n rows of known values, shuffled within each column, with some NaN, infinities and zeros."""
    rows = np.stack([random.choice(x[:, c], n) for c in range(x.shape[1])], axis=1).astype(dtype)
    for value in (np.nan, np.inf, -np.inf, 0.0):
        rows[random.random(rows.shape) < 0.03] = value
    return rows


def same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.dtype.kind == "f":
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    else:
        np.testing.assert_array_equal(ours, theirs)


def check(model, x, seed, folder, batches=BATCHES):
    """Check that forest and ONNX Runtime agree, on random rows and on rows at the thresholds."""
    session, forest = load(model, folder)
    assert forest.inputs == session.inputs
    assert forest.outputs == session.outputs
    forest.verify_against(session, rows=600, seed=seed)
    forest.verify_every_leaf(session, folder / "model.onnx", seed)
    random = np.random.default_rng([SEED, seed, 1])
    dtype = np.float64 if session.inputs[0].dtype == "double" else np.float32
    for n in batches:
        rows = rows_like(x, random, n, dtype)
        for ours, theirs in zip(forest.run([rows]), session.run([rows]), strict=True):
            same(ours, np.asarray(theirs))
    return forest


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("kind", [DecisionTreeClassifier, RandomForestClassifier, ExtraTreesClassifier])
def test_sklearn_classifiers(kind, n_classes, seed, tmp_path):
    x, score = data(seed)
    y = classes(score, n_classes)
    many = {} if kind is DecisionTreeClassifier else {"n_estimators": 3 + 2 * seed}
    check(from_sklearn(kind(max_depth=2 + 2 * seed, random_state=seed, **many), x, y), x, seed, tmp_path)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("kind", [DecisionTreeRegressor, RandomForestRegressor, ExtraTreesRegressor])
def test_sklearn_regressors(kind, targets, seed, tmp_path):
    x, score = data(seed)
    y = score if targets == 1 else np.stack([score, x[:, 0] * 3], axis=1)
    many = {} if kind is DecisionTreeRegressor else {"n_estimators": 3 + 2 * seed}
    check(from_sklearn(kind(max_depth=2 + 2 * seed, random_state=seed, **many), x, y), x, seed, tmp_path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [RandomForestClassifier, RandomForestRegressor, GradientBoostingRegressor])
def test_models_of_doubles_are_exact(kind, seed, tmp_path):
    x, score = data(seed)
    y = classes(score, 2 + seed % 2) if kind is RandomForestClassifier else score
    model = from_sklearn(kind(n_estimators=7, max_depth=3 + seed, random_state=seed), x, y, DoubleTensorType)
    if kind is not RandomForestClassifier:  # the converter declares doubles, but the operator returns floats
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    check(model, x, seed, tmp_path)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_classes", [1, 2, 4])
@pytest.mark.parametrize("histogram", [False, True])
def test_sklearn_boosting(histogram, n_classes, seed, tmp_path):
    x, score = data(seed, nan=histogram and seed % 2 == 0)
    y = score if n_classes == 1 else classes(score, n_classes)
    if histogram:
        kind = HistGradientBoostingRegressor if n_classes == 1 else HistGradientBoostingClassifier
        estimator = kind(max_iter=4 + seed, max_leaf_nodes=4 + 8 * seed, random_state=seed, early_stopping=False)
    else:
        kind = GradientBoostingRegressor if n_classes == 1 else GradientBoostingClassifier
        estimator = kind(n_estimators=4 + seed, max_depth=1 + seed, random_state=seed)
    check(from_sklearn(estimator, x, y), x, seed, tmp_path)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("names", [["no", "yes"], ["a", "b", "c"], [-5, 7, 1 << 40]])
def test_class_names(names, seed, tmp_path):
    x, score = data(seed)
    y = np.array(names)[classes(score, len(names))]
    forest = check(from_sklearn(RandomForestClassifier(5, max_depth=4, random_state=seed), x, y), x, seed, tmp_path)
    assert set(forest.run([x])[0]) <= set(names)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_classes", [1, 2, 3])
@pytest.mark.parametrize("leaves", [2, 31, 63, 127])
def test_lightgbm(leaves, n_classes, seed, tmp_path):
    x, score = data(seed, rows=600, nan=seed % 2 == 1)
    y = score if n_classes == 1 else classes(score, n_classes)
    kind = lightgbm.LGBMRegressor if n_classes == 1 else lightgbm.LGBMClassifier
    estimator = kind(n_estimators=3 + 4 * seed, num_leaves=leaves, min_child_samples=1, random_state=seed)
    forest = check(from_lightgbm(estimator, x, y), x, seed, tmp_path)
    trees = forest.ensembles[0].trees
    assert leaves > 64 or trees.n_bitvector_trees == trees.n_trees
    assert leaves < 127 or trees.n_bitvector_trees < trees.n_trees


@pytest.mark.parametrize("seed", range(6))
def test_lightgbm_categories(seed, tmp_path):
    x, score = data(seed, rows=600, categories=True, nan=seed > 3)
    estimator = lightgbm.LGBMClassifier(n_estimators=6, num_leaves=12 + 16 * seed, min_data_per_group=1, cat_smooth=1)
    model = from_lightgbm(estimator, x, classes(score, 2 + seed % 2), categorical_feature=[3, 4])
    assert any(b"BRANCH_EQ" in list(attribute.strings) for attribute in model.graph.node[0].attribute)
    check(model, x, seed, tmp_path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", ["poisson", "gamma", "binary-rf", "multi-rf", "split"])
def test_lightgbm_objectives(objective, seed, tmp_path):
    """For these objectives the converter adds operators after the trees."""
    x, score = data(seed)
    forest = {"boosting_type": "rf", "bagging_fraction": 0.6, "bagging_freq": 1, "n_estimators": 6, "num_leaves": 9}
    if objective.endswith("rf"):
        n_classes = 2 if objective == "binary-rf" else 3
        model = from_lightgbm(lightgbm.LGBMClassifier(**forest), x, classes(score, n_classes))
    elif objective == "split":
        estimator = lightgbm.LGBMRegressor(n_estimators=9, num_leaves=7, verbose=-1, n_jobs=1).fit(x, score)
        kind = [("X", ToolsFloat([None, WIDTH]))]
        model = onnxmltools.convert_lightgbm(estimator, initial_types=kind, split=4)
    else:
        estimator = lightgbm.LGBMRegressor(n_estimators=6, num_leaves=9, objective=objective)
        model = from_lightgbm(estimator, x, score - score.min() + 0.1)
    check(model, x, seed, tmp_path)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n_classes", [1, 2, 3])
@pytest.mark.parametrize("depth", [3, 8])
def test_xgboost(depth, n_classes, seed, tmp_path):
    xgboost = pytest.importorskip("xgboost")
    x, score = data(seed, rows=500, nan=seed % 2 == 1)
    y = score if n_classes == 1 else classes(score, n_classes)
    kind = xgboost.XGBRegressor if n_classes == 1 else xgboost.XGBClassifier
    estimator = kind(n_estimators=4 + 3 * seed, max_depth=depth, n_jobs=1, random_state=seed).fit(x, y)
    model = onnxmltools.convert_xgboost(estimator, initial_types=[("X", ToolsFloat([None, WIDTH]))])
    check(model, x, seed, tmp_path)


def without_zipmap(model):
    """Return a CatBoost classifier with the matrix as output instead of the list of dicts that CatBoost adds."""
    (zipmap,) = [node for node in model.graph.node if node.op_type == "ZipMap"]
    model.graph.node.remove(zipmap)
    for output in list(model.graph.output):
        if output.name == zipmap.output[0]:
            model.graph.output.remove(output)
    kind = onnx.helper.make_tensor_value_info(zipmap.input[0], onnx.TensorProto.FLOAT, [None, None])
    model.graph.output.append(kind)
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_catboost(n_classes, seed, tmp_path):
    catboost = pytest.importorskip("catboost")
    x, score = data(seed, nan=seed == 2)
    y = score if n_classes == 1 else classes(score, n_classes)
    kind = catboost.CatBoostRegressor if n_classes == 1 else catboost.CatBoostClassifier
    estimator = kind(iterations=5 + seed, depth=2 + 2 * seed, verbose=0, allow_writing_files=False, thread_count=1)
    estimator.fit(x, y)
    estimator.save_model(str(tmp_path / "cat.onnx"), format="onnx")
    model = onnx.load(str(tmp_path / "cat.onnx"))
    check(model if n_classes == 1 else without_zipmap(model), x, seed, tmp_path)


@pytest.fixture(scope="module")
def boosted():
    x, score = data(77, rows=500)
    return x, from_lightgbm(lightgbm.LGBMClassifier(n_estimators=20, num_leaves=31), x, classes(score, 2))


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("leaves", [8, 60, 200])
def test_every_simd_level_gives_the_same_bits(level, leaves, tmp_path, monkeypatch):
    x, score = data(5, rows=800, nan=True)
    model = from_lightgbm(lightgbm.LGBMClassifier(n_estimators=9, num_leaves=leaves), x, classes(score, 3))
    monkeypatch.setenv("SHORTTAIL_SIMD", "scalar")
    plain = check(model, x, 5, tmp_path)
    monkeypatch.setenv("SHORTTAIL_SIMD", level)
    try:
        assert simd_level() == level
    except InvalidArgument as error:
        assert level in str(error)  # noqa: PT017
        pytest.skip(f"this CPU has no {level}")
    forced = check(model, x, 5, tmp_path)
    assert forced.ensembles[0].trees.simd == level
    for n in BATCHES:
        for ours, theirs in zip(forced.run([x[:n]]), plain.run([x[:n]]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_unknown_simd_level_is_refused(monkeypatch):
    monkeypatch.setenv("SHORTTAIL_SIMD", "mmx")
    with pytest.raises(InvalidArgument, match="SHORTTAIL_SIMD=mmx"):
        simd_level()


def test_one_output_only(boosted, tmp_path):
    x, model = boosted
    for names in (["probabilities"], ["label"], ["probabilities", "label"]):
        session, forest = load(model, tmp_path, names)
        assert forest.output_names == names
        for ours, theirs in zip(forest.run([x]), session.run([x]), strict=True):
            same(ours, theirs)


def test_no_rows_give_no_rows(boosted, tmp_path):
    _, forest = load(boosted[1], tmp_path)
    label, probabilities = forest.run([np.zeros((0, WIDTH), np.float32)])
    assert label.shape == (0,)
    assert probabilities.shape == (0, 2)


def test_rows_that_are_not_contiguous(boosted, tmp_path):
    x, model = boosted
    _, forest = load(model, tmp_path)
    wide = np.concatenate([x, x], axis=1)[:, :WIDTH]
    np.testing.assert_array_equal(forest.run([wide])[1], forest.run([x])[1])
    np.testing.assert_array_equal(forest.run([np.asfortranarray(x)])[1], forest.run([x])[1])


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((3, WIDTH)),
        np.zeros(WIDTH, np.float32),
        np.zeros((3, 2), np.float32),
        np.zeros((3, WIDTH), np.int64),
        None,
    ],
)
def test_wrong_input_is_refused(rows, boosted, tmp_path):
    _, forest = load(boosted[1], tmp_path)
    with pytest.raises(Internal, match="the model failed"):
        forest.run([rows])


def test_read_only_rows_and_threads(boosted, tmp_path):
    x, model = boosted
    _, forest = load(model, tmp_path)
    x = x.copy()
    x.flags.writeable = False
    expected = forest.run([x])[1]
    wrong = []

    def work():
        wrong.extend(1 for _ in range(50) if not np.array_equal(forest.run([x])[1], expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_verify_finds_a_wrong_threshold(boosted, tmp_path):
    """The comparison at load time finds a forest whose thresholds are wrong by one bit."""
    _, model = boosted
    session, _ = load(model, tmp_path)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for attribute in changed.graph.node[0].attribute:
        if attribute.name == "nodes_values":
            attribute.floats[0] = np.nextafter(np.float32(attribute.floats[0]), np.float32(9))
    _, forest = load(changed, tmp_path)
    with pytest.raises(NotAForest, match=r"gives .* where ONNX Runtime gives"):
        forest.verify_against(session)


def test_isolation_forest_goes_to_onnx_runtime(tmp_path):
    x, _ = data(3)
    estimator = IsolationForest(n_estimators=3, random_state=0).fit(x)
    kind = [("X", FloatTensorType([None, WIDTH]))]
    model = convert_sklearn(estimator, initial_types=kind, target_opset={"": 18, "ai.onnx.ml": 3})
    with pytest.raises(NotAForest, match="node of type"):
        load(model, tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_refused_or_read(seed, boosted, tmp_path):
    """A file with flipped or missing bytes gives NotAForest or a forest, but never a crash."""
    good = boosted[1].SerializeToString()
    random = np.random.default_rng([SEED, seed])
    path = tmp_path / "damaged.onnx"
    rows = np.zeros((40, WIDTH), np.float32)
    for _ in range(150):
        bad = bytearray(good[: random.integers(1, len(good))] if random.random() < 0.3 else good)
        for at in random.integers(0, len(bad), random.integers(1, 5)):
            bad[at] = random.integers(0, 256)
        path.write_bytes(bad)
        try:
            forest: Forest = compile_forest(path, ["label", "probabilities"])
            forest.run([rows])
        except (NotAForest, Internal):
            pass
