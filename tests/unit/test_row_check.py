"""Models whose rows depend on each other are found, each kind by what it does, and the reason names the operator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_kinds import DEPENDENT, Y1, Y, dense, fixed
from row_models import FLOAT, FLOAT16, INT64, STRING, X4, Take, examine, graph, op, weight

import shorttail.models.row_check as row_check
from shorttail.config import LIMITS
from shorttail.errors import Internal
from shorttail.models.load import Runner
from shorttail.models.row_scan import rows_in

pytestmark = pytest.mark.filterwarnings("ignore")  # quantization gives some


@pytest.mark.parametrize("kind", DEPENDENT)
def test_found(kind: str, tmp_path: Path) -> None:
    build, names = DEPENDENT[kind]
    found = examine(build(tmp_path / "m.onnx"), texts=["a", "b", "c"])
    print(found)
    assert found.depends
    assert names in found.why
    assert "\n" not in found.why


# ONNX Runtime moves the statistics of a normalization in training, so that its answers differ from run to run.
SCAN_ALONE = {
    *("batch normalization in training mode", "the mean of the batch for values above a million", "saturated"),
}
EXAMPLES_ENOUGH = [kind for kind in DEPENDENT if kind not in SCAN_ALONE]


@pytest.mark.parametrize("kind", EXAMPLES_ENOUGH)
def test_found_by_examples_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "scan_rows", lambda *_: row_check.RowScan())
    found = examine(DEPENDENT[kind][0](tmp_path / "m.onnx"), texts=["a", "b", "c"])
    assert found.depends
    assert found.why.startswith(("the answer for a row changes from", "the model refuses rows"))
    assert "nan" not in found.why


def test_the_scan_finds_what_no_example_shows(tmp_path: Path) -> None:
    found = examine(DEPENDENT["saturated"][0](tmp_path / "m.onnx"))
    assert found.why == "node Softmax 'softmax_p' works along the rows; no answer of an example changed"


def test_the_scan_follows_only_the_outputs_that_are_used(tmp_path: Path) -> None:
    nodes = [op("Softmax", "x", "p", axis=0), op("Exp", "x", "y"), op("Shape", "p", "s"), op("Reshape", "y s", "z")]
    path = graph(tmp_path / "m.onnx", nodes, X4, {"p": (FLOAT, [None, 4]), "z": (FLOAT, [None, 4])})
    assert examine(path, ["p"]).depends
    assert not examine(path, ["z"]).depends  # only the shape of p is used


def test_padding_that_is_seen_only_when_batches_are_padded(tmp_path: Path) -> None:
    """A mean that counts rows of zeros: 5 rows of it are right alone, in any order."""
    path = fixed(64, op("ReduceMax", "x", "m", axes=[0]), op("Greater", "m x", "is"), op("Cast", "is", "y", to=FLOAT))
    found = examine(path(tmp_path / "m.onnx"))
    assert found.depends


def noise(kind: str) -> Callable[[Path], Path]:
    if kind == "Dropout":
        nodes = [op("Dropout", "h half on", "y")]
        return dense(*nodes, half=np.float32(0.5), on=np.array(True))
    return dense(op(kind, "h", "r"), op("Add", "h r", "y"))


@pytest.mark.parametrize("kind", ["RandomNormalLike", "RandomUniformLike", "Dropout"])
def test_a_random_model_is_not_called_dependent(kind: str, tmp_path: Path) -> None:
    found = examine(noise(kind)(tmp_path / "m.onnx"))
    assert not found.depends
    assert found.why.startswith(f"the same rows get other answers in another run: the model is random (node {kind} ")


def test_a_random_model_with_a_sum_over_the_rows_is_both(tmp_path: Path) -> None:
    nodes = [op("CumSum", "h axis", "a"), op("RandomNormalLike", "a", "r"), op("Add", "a r", "y")]
    found = examine(dense(*nodes, axis=np.array(0))(tmp_path / "m.onnx"))
    assert found.depends
    assert found.why.startswith("node CumSum 'cumsum_a' works along the rows; the same rows get other answers")


def test_outputs_whose_first_axis_is_not_the_rows(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", [op("Transpose", "x", "y", perm=[1, 0])], X4, {"y": (FLOAT, [4, None])})
    found = examine(path)
    assert found.depends
    assert found.why.startswith("output 'y' has the shape [4, 24] for 24 rows")


def test_a_width_that_depends_on_the_rows(tmp_path: Path) -> None:
    found = check(Fake(lambda x: (np.ones((len(x), len(x))), [0] * len(x))))
    assert found.depends
    assert found.why.startswith("the answer for a row has another width when ")
    sums = graph(tmp_path / "s.onnx", [op("ReduceSum", "x", "y", keepdims=0)], X4, {"y": (FLOAT, [])})
    assert examine(sums).why.startswith("output 'y' has the shape [] for 24 rows: node ReduceSum")


def never(rows: int) -> list[Any]:
    return [np.full((rows, 1), "unknown", object)]


def test_a_model_that_refuses_every_example_is_scanned(tmp_path: Path) -> None:
    takes: Take = {"city": (STRING, [None, 1])}
    first = op("CategoryMapper", "city", "id")
    first = op("Cast", "city", "id", to=FLOAT)  # refuses text that is no number
    free = graph(tmp_path / "free.onnx", [first, op("Exp", "id", "y")], takes, Y1)
    found = examine(free, example=never)
    assert not found.depends
    assert found.why.startswith("its rows could not be compared, because the model refuses every example: the model")
    mixing = [op("Softmax", "id", "y", axis=0), op("CumSum", "id axis", "y"), op("ReduceMax", "id", "y", axes=[0])]
    for node in mixing:
        path = graph(tmp_path / "mixing.onnx", [first, node], takes, Y1, axis=np.array(0))
        found = examine(path, example=never)
        assert found.depends, node.op_type
        assert found.why.startswith(f"node {node.op_type} ")
        assert "refuses every example" in found.why
    dense_first = [first, op("MatMul", "id w", "h"), op("Reshape", "h to", "r"), op("Softmax", "r", "y", axis=0)]
    path = graph(tmp_path / "dense.onnx", dense_first, takes, Y, w=weight(1, 4), to=np.array([-1, 4]))
    assert examine(path, example=never).depends
    turned = [first, op("Transpose", "id", "t", perm=[1, 0]), op("Softmax", "t", "y", axis=0)]
    path = graph(tmp_path / "turned.onnx", turned, takes, {"y": (FLOAT, [1, None])})
    assert not examine(path, example=never).depends  # where the rows are is not known


def test_a_few_rows_that_run_are_enough(tmp_path: Path) -> None:
    """The model refuses most examples; the others show where the rows are, behind a transposition."""
    random = np.random.default_rng(0)
    nodes = [
        op("Cast", "city", "id", to=FLOAT),
        op("Transpose", "id", "t", perm=[1, 0]),
        op("ReduceMax", "t", "m", axes=[1]),
        op("Transpose", "m", "n", perm=[1, 0]),
        op("Greater", "id million", "is"),
        op("Where", "is n id", "y"),
    ]
    path = graph(tmp_path / "m.onnx", nodes, {"city": (STRING, [None, 1])}, Y1, million=np.float32(1e6))
    texts = np.array(["3", "7", "-2", "x", "y", "z", "no", "none"], object)
    found = examine(path, example=lambda rows: [random.choice(texts, (rows, 1))])
    assert found.why == "node ReduceMax 'reducemax_m' works along the rows; no answer of an example changed"


def test_rows_that_the_model_refuses_are_left_out(tmp_path: Path) -> None:
    """An embedding of 2 ids: ids 1,000 times larger, or negative, are refused."""
    nodes = [op("Gather", "table id", "e"), op("Reshape", "e to", "h"), op("Softmax", "h", "y", axis=0)]
    takes: Take = {"id": (INT64, [None, 1])}
    path = graph(tmp_path / "m.onnx", nodes, takes, Y, table=weight(2, 4), to=np.array([-1, 4]))
    assert examine(path).depends


# -- the verdict from answers alone -----------------------------------------------------------------------------------


class Fake:
    """A model of one float matrix [rows, 3] whose answers a function computes."""

    description = "fake"

    def __init__(self, function: Callable[[Any], Sequence[Any]], wait_s: float = 0.0):
        from shorttail.define.catalog import TensorInfo

        self.inputs = [TensorInfo("x", "float", (None, 3))]
        self.output_names = ["y", "label"]
        self.calls = 0
        self._function = function
        self._wait_s = wait_s

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        self.calls += 1
        time.sleep(self._wait_s)
        return [np.asarray(output) for output in self._function(inputs[0])]


def check(fake: Fake) -> row_check.RowFinding:
    random = np.random.default_rng(0)
    return row_check.examine_rows(
        Runner(fake, "onnxruntime"),  # type: ignore[arg-type]
        b"",
        lambda rows: [random.normal(size=(rows, 3)).astype(np.float32)],
    )


def test_a_label_may_flip_where_scores_are_equal() -> None:
    """In a third of the rows the two scores are equal but for rounding, which differs with the number of rows."""

    def function(x: Any) -> Sequence[Any]:
        second = np.where(x[:, 1] > 0.4, x[:, 0] * (1 + 1e-6 * (-1) ** len(x)), x[:, 2])
        scores = np.stack([x[:, 0], second], axis=1)
        return scores, np.argmax(scores, axis=1)

    assert not check(Fake(function)).depends


def test_a_label_that_other_rows_change_while_its_scores_are_clear() -> None:
    found = check(Fake(lambda x: (x, (x[:, 0] >= x[:, 0].max()).astype(int))))
    assert found.depends
    assert found.why.startswith("the answer for a row changes from 0 to 1 when ")


def test_a_small_row_is_measured_by_its_own_scale() -> None:
    """A hundred-thousandth is added, which is nothing beside the largest answer of the batch."""
    found = check(Fake(lambda x: (x + 1e-5 * (len(x) > 1), [0] * len(x))))
    assert found.depends


def test_rounding_is_allowed_where_terms_cancel() -> None:
    """The answer is what is left of large terms, whose error of rounding depends on the number of rows."""

    def function(x: Any) -> Sequence[Any]:
        terms = 1e4 * x * (1 + 1e-7 * (len(x) % 3))
        return np.float32(terms) - np.float32(1e4 * (x // 1e-3 * 1e-3)), [0] * len(x)

    assert not check(Fake(function)).depends


def test_nan_equals_nan() -> None:
    assert not check(Fake(lambda x: (np.where(x < 0, np.nan, x), [0] * len(x)))).depends
    assert check(Fake(lambda x: (np.where(x.min() < -1, np.nan, x), [0] * len(x)))).depends


def test_a_change_must_be_seen_twice() -> None:
    def function(x: Any) -> Sequence[Any]:
        once = 1.0 if fake.calls == 30 else 0.0
        return x + once, [0] * len(x)

    fake = Fake(function)
    found = check(fake)
    assert not found.depends
    assert found.why == ""


def test_rows_that_are_refused_together() -> None:
    def function(x: Any) -> Sequence[Any]:
        if len(x) > 1:
            raise Internal("the model failed: no room")
        return x, [0] * len(x)

    found = check(Fake(function))
    assert found.depends
    assert found.why == "the model refuses rows together that it takes one by one: the model failed: no room"


def test_a_slow_model_is_examined_with_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "LIMITS", dataclasses.replace(LIMITS, row_check_s=0.05))
    steady = Fake(lambda x: (x, [0] * len(x)), wait_s=0.02)
    found = check(steady)
    assert not found.depends
    assert found.why.startswith("no answer of an example changed; not every way was tried, because a run takes 0.02")
    assert steady.calls <= 12
    mixing = Fake(lambda x: (x / np.abs(x).max(), [0] * len(x)), wait_s=0.02)
    found = check(mixing)
    assert found.depends
    assert mixing.calls <= 12


def test_examples_of_half_precision_may_differ_more(tmp_path: Path) -> None:
    nodes = [op("Cast", "x", "h", to=FLOAT16), op("MatMul", "h w", "g"), op("Cast", "g", "y", to=FLOAT)]
    path = graph(tmp_path / "m.onnx", nodes, X4, Y, w=weight(4, 4).astype(np.float16))
    assert not examine(path).depends


def test_where_the_rows_are() -> None:
    sizes = (3, 5, 7)
    assert rows_in([(3, 4), (5, 4), (7, 4)], sizes).axes == {0}  # type: ignore[union-attr]
    assert rows_in([(8, 6, 2), (8, 10, 2), (8, 14, 2)], sizes).axes == {1}  # type: ignore[union-attr]
    assert rows_in([(3, 3), (5, 5), (7, 7)], sizes).axes == {0, 1}  # type: ignore[union-attr]
    assert rows_in([(4,)] * 3, sizes).axes == set()  # type: ignore[union-attr]
    assert rows_in([(4, 4), (6, 4), (8, 4)], sizes) is None  # one more than the rows
    assert rows_in([(3, 1), (5,), (7, 1)], sizes) is None
    assert rows_in([(8, 8)], (8,)) is None  # either may be the rows
    assert rows_in([(8, 3)], (8,)).axes == {0}  # type: ignore[union-attr]
