"""No usual model is taken for one whose rows depend on each other: forests, pipelines and networks as people have them.

Models of the usual libraries come from the usual converters, and run in ONNX Runtime, also those that would run as a
compiled forest. The seed of every model is fixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from row_models import FLOAT, FLOAT16, INT64, STRING, X4, Take, examine, graph, op, weight

from shorttail.models.row_scan import scan_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import catboost
    import lightgbm
    import onnxmltools
    import sklearn.calibration as calibration
    import sklearn.compose as compose
    import sklearn.decomposition as decomposition
    import sklearn.discriminant_analysis as discriminant
    import sklearn.ensemble as ensemble
    import sklearn.feature_extraction.text as text
    import sklearn.gaussian_process as gaussian
    import sklearn.impute as impute
    import sklearn.linear_model as linear
    import sklearn.mixture as mixture
    import sklearn.multioutput as multioutput
    import sklearn.naive_bayes as naive_bayes
    import sklearn.neighbors as neighbors
    import sklearn.neural_network as neural
    import sklearn.pipeline as pipeline
    import sklearn.preprocessing as preprocessing
    import sklearn.svm as svm
    import xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType as ToolsFloat
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType
    from sklearn.cluster import KMeans
    from sklearn.tree import DecisionTreeRegressor

pytestmark = pytest.mark.filterwarnings("ignore")  # converters and training libraries give many warnings

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(240, 4)).astype(np.float32)
CLASSES = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)
TARGET = X[:, 0] * 2 - X[:, 1] ** 2 + 0.1 * X[:, 2]
CITIES = np.array(["aa", "bb", "cc", "dd"], object)
TABLE = np.column_stack([RANDOM.choice(CITIES, len(X)), RANDOM.choice(CITIES[:2], len(X))])

SCIKIT_LEARN: dict[str, Callable[[], Any]] = {
    "logistic regression": lambda: linear.LogisticRegression(),
    "ridge": lambda: linear.Ridge(),
    "stochastic gradient classifier": lambda: linear.SGDClassifier(loss="log_loss"),
    "linear SVM": lambda: svm.LinearSVC(),
    "SVM with probabilities": lambda: svm.SVC(probability=True, random_state=0),
    "support vector regression": lambda: svm.SVR(),
    "network classifier": lambda: neural.MLPClassifier((16, 8), max_iter=20, random_state=0),
    "network regressor": lambda: neural.MLPRegressor(hidden_layer_sizes=(16,), max_iter=20, random_state=0),
    "nearest neighbors classifier": lambda: neighbors.KNeighborsClassifier(3),
    "nearest neighbors regressor": lambda: neighbors.KNeighborsRegressor(5, weights="distance"),
    "local outlier factor": lambda: neighbors.LocalOutlierFactor(novelty=True),
    "Gaussian naive Bayes": lambda: naive_bayes.GaussianNB(),
    "Gaussian process": lambda: gaussian.GaussianProcessRegressor(alpha=0.1),
    "isolation forest": lambda: ensemble.IsolationForest(n_estimators=20, random_state=0),
    "random forest": lambda: ensemble.RandomForestClassifier(20, max_depth=5, random_state=0),
    "gradient boosting": lambda: ensemble.GradientBoostingRegressor(n_estimators=20),
    "AdaBoost": lambda: ensemble.AdaBoostClassifier(n_estimators=10),
    "bagging": lambda: ensemble.BaggingClassifier(n_estimators=5),
    "voting": lambda: ensemble.VotingClassifier(
        [("a", linear.LogisticRegression()), ("b", naive_bayes.GaussianNB())], voting="soft", flatten_transform=False
    ),
    "stacking": lambda: ensemble.StackingClassifier(
        [("a", linear.LogisticRegression()), ("b", naive_bayes.GaussianNB())], cv=2
    ),
    "calibrated classifier": lambda: calibration.CalibratedClassifierCV(svm.LinearSVC(), cv=2),
    "k-means": lambda: KMeans(4, n_init=1, random_state=0),
    "Gaussian mixture": lambda: mixture.GaussianMixture(3, random_state=0),
    "linear discriminant": lambda: discriminant.LinearDiscriminantAnalysis(),
    "quadratic discriminant": lambda: discriminant.QuadraticDiscriminantAnalysis(),
    "scaler, PCA, logistic regression": lambda: pipeline.make_pipeline(
        preprocessing.StandardScaler(), decomposition.PCA(2), linear.LogisticRegression()
    ),
    "imputer, polynomials, ridge": lambda: pipeline.make_pipeline(
        impute.SimpleImputer(), preprocessing.PolynomialFeatures(2), linear.Ridge()
    ),
    "bins, normalizer, linear regression": lambda: pipeline.make_pipeline(
        preprocessing.KBinsDiscretizer(4, encode="onehot-dense"), preprocessing.Normalizer(), linear.LinearRegression()
    ),
    "several outputs": lambda: multioutput.MultiOutputRegressor(DecisionTreeRegressor(max_depth=4)),
}


@pytest.mark.parametrize("name", SCIKIT_LEARN)
def test_scikit_learn(name: str, tmp_path: Path) -> None:
    model = SCIKIT_LEARN[name]()
    target: Any = CLASSES if hasattr(model, "predict_proba") or "Classif" in type(model).__name__ else TARGET
    if name == "linear SVM":
        target = CLASSES
    if name == "several outputs":
        target = np.column_stack([TARGET, -TARGET])
    model.fit(X, target)
    options = {"zipmap": False} if hasattr(model, "classes_") and name != "linear SVM" else None
    path = tmp_path / "m.onnx"
    made = to_onnx(model, X[:1], options=options, target_opset={"": 17, "ai.onnx.ml": 3})
    path.write_bytes(made.SerializeToString())
    # The converter gives the labels of this one as a matrix of one row.
    check(path, outputs=["probabilities"] if name == "quadratic discriminant" else None)


def check(path: Path, **how: Any) -> None:
    found = examine(path, **how)
    print(found)
    assert not found.depends, found.why
    assert found.why == ""


def test_zipmap(tmp_path: Path) -> None:
    model = linear.LogisticRegression().fit(X, CLASSES)
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(model, X[:1]).SerializeToString())
    check(path)


def test_columns_of_text_and_numbers(tmp_path: Path) -> None:
    """The most usual pipeline: categories one-hot, numbers scaled."""
    import pandas

    frame = pandas.DataFrame({"city": TABLE[:, 0], "kind": TABLE[:, 1], "a": X[:, 0], "b": X[:, 1]})
    columns = compose.make_column_transformer(
        (preprocessing.OneHotEncoder(handle_unknown="ignore"), ["city", "kind"]),
        (preprocessing.StandardScaler(), ["a", "b"]),
    )
    model = pipeline.make_pipeline(columns, linear.LogisticRegression()).fit(frame, CLASSES)
    types = [(name, StringTensorType([None, 1])) for name in ("city", "kind")]
    types += [(name, FloatTensorType([None, 1])) for name in ("a", "b")]
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(model, initial_types=types, options={"zipmap": False}).SerializeToString())
    check(path, texts=CITIES[:2])


def test_encoders_that_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    """Numbers 1,000 times larger are no categories: the examples are left as they are."""
    numbers = RANDOM.integers(0, 2, (240, 3))
    model = pipeline.make_pipeline(preprocessing.OneHotEncoder(), linear.LogisticRegression()).fit(numbers, CLASSES)
    path = tmp_path / "m.onnx"
    types = [("x", Int64TensorType([None, 3]))]
    path.write_bytes(to_onnx(model, initial_types=types, options={"zipmap": False}).SerializeToString())
    check(path)


def test_words(tmp_path: Path) -> None:
    """Words are counted, and weighed by how rare they are."""
    words = [" ".join(RANDOM.choice(["red", "green", "blue", "wide", "tall"], 3)) for _ in range(240)]
    model = pipeline.make_pipeline(text.TfidfVectorizer(lowercase=False), linear.LogisticRegression()).fit(
        words, CLASSES
    )
    path = tmp_path / "m.onnx"
    types = [("x", StringTensorType([None, 1]))]
    path.write_bytes(to_onnx(model, initial_types=types, options={"zipmap": False}).SerializeToString())
    check(path, texts=words[:8])


@pytest.mark.parametrize("forest", [False, True], ids=["in ONNX Runtime", "compiled"])
def test_lightgbm(forest: bool, tmp_path: Path) -> None:
    model = lightgbm.LGBMClassifier(n_estimators=10, num_leaves=7, verbose=-1).fit(X, CLASSES)
    made = onnxmltools.convert_lightgbm(model, initial_types=[("x", ToolsFloat([None, 4]))], zipmap=False)
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    check(path, forest=forest)


def test_xgboost(tmp_path: Path) -> None:
    model = xgboost.XGBRegressor(n_estimators=10, max_depth=4).fit(X, TARGET)
    made = onnxmltools.convert_xgboost(model, initial_types=[("x", ToolsFloat([None, 4]))])
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    check(path)


def test_catboost(tmp_path: Path) -> None:
    model = catboost.CatBoostClassifier(iterations=10, depth=3, verbose=False, allow_writing_files=False)
    model.fit(X, CLASSES)
    path = tmp_path / "m.onnx"
    model.save_model(str(path), format="onnx")
    check(path, outputs=["label"])


# -- networks, as exporters write them --------------------------------------------------------------------------------

Y: Take = {"y": (FLOAT, [None, None])}
IDS: Take = {"user": (INT64, [None]), "item": (INT64, [None]), "x": (FLOAT, [None, 4])}
DENSE = [op("Gemm", "h w1 b1", "g1"), op("Relu", "g1", "r1"), op("Gemm", "r1 w2", "y")]
DENSE_WEIGHTS: dict[str, Any] = {"w1": weight(4, 8), "b1": weight(8), "w2": weight(8, 2, seed=1)}
TOKENS = [op("Reshape", "x to", "tokens")]  # [rows, 4] -> [rows, 2 tokens, 2]


def norms(path: Path) -> Path:
    """Batch normalization as in inference, layer normalization, dropout that is off."""
    nodes = [
        op("BatchNormalization", "x ones zeros zeros ones", "a"),
        op("LayerNormalization", "a ones zeros", "b"),
        op("Dropout", "b", "h"),
        *DENSE,
    ]
    return graph(path, nodes, X4, Y, ones=np.ones(4, "f4"), zeros=np.zeros(4, "f4"), **DENSE_WEIGHTS)


def old_softmax(opset: int, **attributes: Any) -> Callable[[Path], Path]:
    """Softmax of [rows, 2 tokens, 2] that flattens all but the rows, as it did before opset 13."""
    nodes = [*TOKENS, op("Softmax", "tokens", "p", **attributes), op("Flatten", "p", "y")]
    return lambda path: graph(path, nodes, X4, Y, opset, to=np.array([-1, 2, 2]))


def convolution(path: Path) -> Path:
    nodes = [
        op("Unsqueeze", "x one", "image"),
        op("Conv", "image k", "c", pads=[1, 1]),
        op("MaxPool", "c", "m", kernel_shape=[2], strides=[2]),
        op("GlobalAveragePool", "m", "p"),
        op("Flatten", "p", "y"),
    ]
    return graph(path, nodes, X4, Y, one=np.array([1]), k=weight(3, 1, 3))


def recurrent(kind: str, gates: int) -> Callable[[Path], Path]:
    """The rows are the second axis, after the steps."""
    nodes = [
        *TOKENS,
        op("Transpose", "tokens", "steps", perm=[1, 0, 2]),
        op(kind, "steps w r", "all last", hidden_size=3),
        op("Squeeze", "last zero", "y"),
    ]
    w = {"w": weight(1, 3 * gates, 2), "r": weight(1, 3 * gates, 3), "to": np.array([-1, 2, 2])}
    return lambda path: graph(path, nodes, X4, Y, **w, zero=np.array([0]))


def transformer(path: Path) -> Path:
    """Heads side by side with the rows, and shapes that the graph computes, as torch exports attention."""
    nodes = [
        *TOKENS,
        op("Shape", "x", "shape"),
        op("Gather", "shape zero", "n"),
        op("Unsqueeze", "n zeros", "n1"),
        op("Mul", "n1 two", "n2"),
        op("Concat", "two n2 one", "headed", axis=0),
        op("Transpose", "tokens", "t", perm=[1, 0, 2]),
        op("MatMul", "t wq", "q0"),
        op("Reshape", "q0 headed", "q1"),
        op("Transpose", "q1", "q", perm=[1, 0, 2]),
        op("Transpose", "q1", "k", perm=[1, 2, 0]),
        op("MatMul", "q k", "scores"),
        op("Softmax", "scores", "p", axis=-1),
        op("MatMul", "p q", "o"),
        op("Transpose", "o", "o1", perm=[1, 0, 2]),
        op("Concat", "two n1 two", "back", axis=0),
        op("Reshape", "o1 back", "o2"),
        op("Transpose", "o2", "o3", perm=[1, 0, 2]),
        op("Add", "o3 tokens", "res"),
        op("LayerNormalization", "res ones nil", "ln"),
        op("Concat", "n1 minus1", "flat", axis=0),
        op("Reshape", "ln flat", "y"),
    ]
    constants: dict[str, Any] = {"to": np.array([-1, 2, 2]), "zero": np.array(0), "zeros": np.array([0])}
    constants |= {"one": np.array([1]), "two": np.array([2]), "minus1": np.array([-1]), "wq": weight(2, 2)}
    return graph(path, nodes, X4, Y, **constants, ones=np.ones(2, "f4"), nil=np.zeros(2, "f4"))


def einsum_attention(path: Path) -> Path:
    nodes = [
        *TOKENS,
        op("Einsum", "tokens tokens", "s", equation="bid,bjd->bij"),
        op("Softmax", "s", "p"),
        op("Einsum", "p tokens", "o", equation="bij,bjd->bid"),
        op("ReduceMean", "o", "y", axes=[1], keepdims=0),
    ]
    return graph(path, nodes, X4, Y, to=np.array([-1, 2, 2]))


def wide_and_deep(path: Path) -> Path:
    nodes = [
        op("Gather", "wide user", "wide_user"),
        op("Gather", "users user", "u"),
        op("Gather", "items item", "i"),
        op("Concat", "u i x", "h", axis=1),
        op("Gemm", "h w1 b1", "g1"),
        op("Relu", "g1", "r1"),
        op("MatMul", "r1 w2", "deep"),
        op("Add", "wide_user deep", "logit"),
        op("Sigmoid", "logit", "y"),
    ]
    tables = {"wide": weight(2, 1), "users": weight(2, 3), "items": weight(2, 3)}
    return graph(path, nodes, IDS, Y, **tables, w1=weight(10, 8), b1=weight(8), w2=weight(8, 1))


def two_towers(path: Path) -> Path:
    """Users and items go through one tower together, one after the other, and are then taken apart."""
    nodes = [
        op("Gather", "users user", "u"),
        op("Gather", "items item", "i"),
        op("Concat", "u i", "both", axis=0),
        op("Gemm", "both w1 b1", "g"),
        op("Tanh", "g", "t"),
        op("LpNormalization", "t", "n", axis=-1),
        op("Split", "n", "nu ni", axis=0),
        op("Mul", "nu ni", "product"),
        op("ReduceSum", "product one", "cosine"),
        op("Concat", "cosine x", "y", axis=1),
    ]
    tables = {"users": weight(2, 4), "items": weight(2, 4, seed=3)}
    return graph(path, nodes, IDS, Y, **tables, w1=weight(4, 8), b1=weight(8), one=np.array([1]))


def interactions(path: Path) -> Path:
    """A factorization machine over 3 fields, and the products of each pair of fields."""
    nodes = [
        op("Gather", "users user", "u"),
        op("Gather", "items item", "i"),
        op("Unsqueeze", "u one", "u1"),
        op("Unsqueeze", "i one", "i1"),
        op("Unsqueeze", "x one", "x1"),
        op("Concat", "u1 i1 x1", "fields", axis=1),
        op("ReduceSum", "fields one", "total", keepdims=0),
        op("Mul", "total total", "square"),
        op("ReduceSumSquare", "fields", "squares", axes=[1], keepdims=0),
        op("Sub", "square squares", "fm"),
        op("Transpose", "fields", "turned", perm=[0, 2, 1]),
        op("MatMul", "fields turned", "pairs"),
        op("Flatten", "pairs", "flat"),
        op("Concat", "fm flat", "y", axis=1),
    ]
    return graph(path, nodes, IDS, Y, users=weight(2, 4), items=weight(2, 4), one=np.array([1]))


def top_columns(path: Path) -> Path:
    nodes = [
        op("TopK", "x two", "best at", axis=1),
        op("CumSum", "best axis", "sums"),
        op("Cast", "at", "places", to=FLOAT),
        op("ArgMax", "x", "first", axis=1),
        op("Cast", "first", "first_f", to=FLOAT),
        op("Concat", "sums places first_f", "y", axis=1),
    ]
    return graph(path, nodes, X4, Y, two=np.array([2]), axis=np.array(1))


def labels_looked_up(path: Path) -> Path:
    """Labels are looked up in a row of classes, as converters do: the rows become the last axis and the first again."""
    take = op("ArrayFeatureExtractor", "classes at", "found")
    take.domain = "ai.onnx.ml"
    nodes = [op("ArgMax", "x", "at", axis=1), take, op("Reshape", "found to", "y")]
    return graph(path, nodes, X4, {"y": (INT64, [None])}, classes=np.array([[7, 5, 3, 1]]), to=np.array([-1]))


def columns_first(path: Path) -> Path:
    """Everything is computed with the rows as the last axis."""
    nodes = [
        op("Transpose", "x", "t", perm=[1, 0]),
        op("MatMul", "w t", "h"),
        op("Softmax", "h", "p", axis=0),
        op("ReduceMax", "p", "m", axes=[0]),
        op("Div", "p m", "d"),
        op("Transpose", "d", "y", perm=[1, 0]),
    ]
    return graph(path, nodes, X4, Y, w=weight(4, 4))


def missing_filled(path: Path) -> Path:
    nodes = [
        op("IsNaN", "x", "nan"),
        op("Shape", "x", "shape"),
        op("Expand", "mean shape", "means"),
        op("Where", "nan means x", "h"),
        *DENSE,
    ]
    return graph(path, nodes, X4, Y, mean=weight(4), **DENSE_WEIGHTS)


def rebuilt(path: Path) -> Path:
    """An autoencoder: the answer is how well a row is rebuilt."""
    nodes = [
        op("MatMul", "x down", "code"),
        op("Tanh", "code", "t"),
        op("MatMul", "t up", "again"),
        op("Sub", "x again", "off"),
        op("ReduceL2", "off", "y", axes=[1]),
    ]
    return graph(path, nodes, X4, Y, down=weight(4, 2), up=weight(2, 4))


def half(path: Path) -> Path:
    weights = {name: value.astype(np.float16) for name, value in DENSE_WEIGHTS.items()}
    nodes = [op("Cast", "x", "h", to=FLOAT16), *DENSE[:-1], op("Gemm", "r1 w2", "o"), op("Cast", "o", "y", to=FLOAT)]
    return graph(path, nodes, X4, Y, **weights)


def statically_quantized(path: Path) -> Path:
    """Scales that were found before, from examples."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"h": X[:50]}, {"h": X[50:]}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    plain = graph(path.with_suffix(".plain"), DENSE, {"h": (FLOAT, [None, 4])}, Y, **DENSE_WEIGHTS)
    quantize_static(plain, path, Reader())
    return path


def row_by_row(path: Path) -> Path:
    """Scan goes through the rows, and keeps nothing from one to the next."""
    row, out = helper.make_tensor_value_info("row", FLOAT, [4]), helper.make_tensor_value_info("out", FLOAT, [4])
    body = helper.make_graph([op("Mul", "row w", "a"), op("Tanh", "a", "out")], "b", [row], [out])
    return graph(path, [op("Scan", "x", "y", body=body, num_scan_inputs=1)], X4, Y, w=weight(4))


def fixed(rows: int) -> Callable[[Path], Path]:
    return lambda path: graph(path, DENSE, {"h": (FLOAT, [rows, 4])}, {"y": (FLOAT, [rows, 2])}, **DENSE_WEIGHTS)


def parts_of_a_step(path: Path) -> Path:
    """Numbers that count as text, thresholds, and a table of a vocabulary."""
    look = op("LabelEncoder", "city", "id", keys_strings=list(CITIES), values_int64s=[0, 1, 2, 3], default_int64=0)
    look.domain = "ai.onnx.ml"
    nodes = [
        look,
        op("Gather", "table id", "e"),
        op("Squeeze", "e one", "h"),
        op("Greater", "h zero", "is"),
        op("Where", "is h neg", "g"),
        op("Concat", "h g", "y", axis=1),
    ]
    takes: Take = {"city": (STRING, [None, 1])}
    return graph(path, nodes, takes, Y, table=weight(4, 4), one=np.array([1]), zero=np.float32(0), neg=np.float32(-1))


def each_id_once(path: Path) -> Path:
    """Ids that occur twice in a run are looked up once, as TensorFlow does."""
    nodes = [
        op("Unique", "user", "ids first inverse count"),
        op("Gather", "users ids", "found"),
        op("Gather", "found inverse", "u"),
        op("Concat", "u x", "y", axis=1),
    ]
    return graph(path, nodes, {name: IDS[name] for name in ("user", "x")}, Y, users=weight(2, 4))


def some_rows_replaced(path: Path) -> Path:
    """Values that are too large are replaced where they are, as torch does with a mask; examples have none."""
    nodes = [
        op("Greater", "x million", "is"),
        op("NonZero", "is", "places"),
        op("Transpose", "places", "at", perm=[1, 0]),
        op("GatherND", "x at", "values"),
        op("Sqrt", "values", "less"),
        op("ScatterND", "x at less", "y"),
    ]
    return graph(path, nodes, X4, Y, million=np.float32(1e6))


def dense_as_convolution(path: Path) -> Path:
    """The rows are the pixels of an image, and each window has one pixel."""
    nodes = [
        op("Transpose", "x", "t", perm=[1, 0]),
        op("Unsqueeze", "t zero", "image"),
        op("Conv", "image k", "c"),
        op("Squeeze", "c zero", "s"),
        op("Transpose", "s", "y", perm=[1, 0]),
    ]
    return graph(path, nodes, X4, Y, zero=np.array([0]), k=weight(3, 4, 1))


def mixture_of_experts(path: Path) -> Path:
    """A gate chooses among experts, which all compute every row."""
    nodes = [
        op("MatMul", "x gate", "g"),
        op("Softmax", "g", "shares", axis=1),
        op("Unsqueeze", "x one", "x1"),
        op("MatMul", "x4 experts", "each"),
        op("Unsqueeze", "shares two", "s1"),
        op("Squeeze", "each two", "e1"),
        op("Mul", "e1 s1", "m"),
        op("ReduceSum", "m one", "y", keepdims=0),
    ]
    nodes.insert(3, op("Unsqueeze", "x1 one", "x4"))  # [rows, 1, 1, 4] by [3 experts, 4, 5]
    return graph(path, nodes, X4, Y, gate=weight(4, 3), experts=weight(3, 4, 5), one=np.array([1]), two=np.array([2]))


NETWORKS: dict[str, Callable[[Path], Path]] = {
    "normalization": norms,
    "softmax of opset 9": old_softmax(9),
    "softmax of opset 11, last axis": old_softmax(11, axis=-1),
    "softmax of opset 12": old_softmax(12, axis=1),
    "convolution over the columns": convolution,
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "attention within a row": transformer,
    "attention by Einsum": einsum_attention,
    "wide and deep": wide_and_deep,
    "two towers": two_towers,
    "interactions": interactions,
    "best columns": top_columns,
    "labels looked up": labels_looked_up,
    "columns first": columns_first,
    "missing values filled": missing_filled,
    "autoencoder": rebuilt,
    "half precision": half,
    "static quantization": statically_quantized,
    "row by row": row_by_row,
    "vocabulary": parts_of_a_step,
    "mixture of experts": mixture_of_experts,
    "each id once": each_id_once,
    "some rows replaced": some_rows_replaced,
    "dense as convolution": dense_as_convolution,
    "a file of 8 rows": fixed(8),
    "a file of 1 row": fixed(1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, tmp_path: Path) -> None:
    check(NETWORKS[name](tmp_path / "m.onnx"), texts=CITIES)


@pytest.mark.parametrize(
    "name", ["normalization", "LSTM", "attention within a row", "wide and deep", "a file of 8 rows"]
)
def test_network_in_padded_batches(name: str, tmp_path: Path) -> None:
    check(NETWORKS[name](tmp_path / "m.onnx"), padded=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_scan_without_examples_blames_none(name: str, tmp_path: Path) -> None:
    import onnx

    path = NETWORKS[name](tmp_path / "m.onnx")
    model = onnx.load(path).graph
    scan = scan_rows(path.read_bytes(), [i.name for i in model.input], [o.name for o in model.output], None, None)
    assert scan.mixes == ""
