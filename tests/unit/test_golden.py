"""Rows with expected outputs are compared when a version is registered and whenever it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import onnx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from sklearn.ensemble import RandomForestClassifier

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, Unavailable
from shorttail.models.golden import FILE, GoldenRows
from shorttail.registry import versions as registry
from shorttail.store.files import model_path

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(300, 3)).astype(np.float32)
FITTED = RandomForestClassifier(n_estimators=10, random_state=0).fit(
    X, np.array(["no", "yes"])[(X[:, 0] > X[:, 2]) * 1]
)
STATS = st.FeatureView(
    "stats",
    entity=st.Entity("user", keys={"user_id": st.Int64}),
    features=[
        st.Feature("age", st.Float32),
        st.Feature("tier", st.String, default="tin"),
        st.Feature("taste", st.Vector(2)),
        st.Feature("visits", st.Int64),
    ],
)
COLUMNS = ["request:a", "stats:age", "request:c"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([STATS])
        yield engine


def forest(tmp_path: Path) -> str:
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(FITTED, X[:1]).SerializeToString())
    return str(path)


def golden(tmp_path: Path, name: str = "golden.parquet", **changes: Any) -> str:
    """Save the table of examples of the forest. changes: columns that differ; None drops one."""
    table: dict[str, Any] = {
        "user_id": np.arange(300),
        "a": X[:, 0],
        "stats:age": X[:, 1],
        "c": X[:, 2],
        "output_label": FITTED.predict(X),
        "output_probability": list(FITTED.predict_proba(X)),
    } | changes
    frame = pd.DataFrame({key: value for key, value in table.items() if value is not None})
    path = tmp_path / name
    if name.endswith(".csv"):
        frame.to_csv(path, index=False)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pandas(frame).schema) as file:
            file.write_table(pa.Table.from_pandas(frame))
    else:
        frame.to_parquet(path)
    return str(path)


def message(engine: st.Engine, model: st.Model) -> str:
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        engine.apply([model])
    assert model.name not in engine.store.catalog.models
    return caught.value.message


@pytest.mark.parametrize("name", ["golden.parquet", "golden.arrow", "golden.csv"])
@pytest.mark.parametrize("wide", [False, True])
def test_examples_that_agree_are_kept_with_the_version(
    engine: st.Engine, tmp_path: Path, name: str, wide: bool
) -> None:
    columns: dict[str, Any] = {}
    if wide or name.endswith("csv"):
        columns = {f"output_probability_{i}": FITTED.predict_proba(X)[:, i] for i in range(2)}
        columns["output_probability"] = None
    examples = golden(tmp_path, name, **columns)
    model = st.Model("m", forest(tmp_path), COLUMNS, examples=examples)
    assert [change.kind for change in engine.apply([model])] == ["+"]
    kept = GoldenRows.read(model_path(engine.store.path, "m", 1).with_name(FILE))
    np.testing.assert_array_equal(kept.inputs[0], X)
    assert kept.expected["output_label"].tolist() == FITTED.predict(X).tolist()
    assert [change.kind for change in engine.apply([model])] == ["="]
    engine.predict("m", {"user_id": 1, "a": 1.0, "c": 2.0})


def test_columns_in_the_wrong_order_are_named(engine: st.Engine, tmp_path: Path) -> None:
    model = st.Model("m", forest(tmp_path), ["request:c", "stats:age", "request:a"], examples=golden(tmp_path))
    said = message(engine, model)
    assert said.startswith("model 'm' version 1: examples: output 'output_label' of row ")
    assert " is expected to be " in said
    assert said.endswith(
        "; with request:c and request:a swapped all rows agree: are the columns in the order of training?"
    )


def test_a_number_or_label_that_differs_is_named(engine: st.Engine, tmp_path: Path) -> None:
    probabilities = FITTED.predict_proba(X)
    probabilities[7] = [0.123, 0.877]
    model = st.Model("m", forest(tmp_path), COLUMNS, examples=golden(tmp_path, output_probability=list(probabilities)))
    assert "output 'output_probability' of row 7 is expected to be [0.123, 0.877] and is [" in message(engine, model)
    labels = FITTED.predict(X).astype(object)
    labels[299] = "maybe"
    model = st.Model("m", forest(tmp_path), COLUMNS, examples=golden(tmp_path, output_label=labels))
    assert "output 'output_label' of row 299 is expected to be 'maybe' and is '" in message(engine, model)
    close = FITTED.predict_proba(X) * (1 + 5e-5)
    engine.apply([st.Model("m", forest(tmp_path), COLUMNS, examples=golden(tmp_path, output_probability=list(close)))])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a": None}, "golden.parquet has no column 'a', which feeds the model; its columns: user_id, stats:age"),
        ({"stats:age": None}, "golden.parquet has no column 'stats:age', which feeds the model"),
        ({"a": ["x"] * 300}, "examples: column 'a' of golden.parquet takes Float64; got 'x'"),
        (
            {"output_label": None, "output_probability": None},
            "golden.parquet has none of the model's outputs: output_label, output_probability",
        ),
        (
            {"output_probability": [[0.5, 0.25, 0.25]] * 300},
            "output 'output_probability' has 2 columns, and the file has 3",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(engine: st.Engine, tmp_path: Path, changes: Any, said: str) -> None:
    model = st.Model("m", forest(tmp_path), COLUMNS, examples=golden(tmp_path, **changes))
    assert said in message(engine, model)


def test_a_file_that_is_gone_or_too_long_is_refused(engine: st.Engine, tmp_path: Path) -> None:
    path = forest(tmp_path)
    assert "no.parquet: No such file or directory" in message(
        engine, st.Model("m", path, COLUMNS, examples=str(tmp_path / "no.parquet"))
    )
    count = LIMITS.example_rows + 1
    long = pd.DataFrame({"a": np.zeros(count), "age": np.zeros(count), "c": np.zeros(count)})
    long.to_parquet(tmp_path / "long.parquet")
    model = st.Model("m", path, COLUMNS, examples=str(tmp_path / "long.parquet"))
    assert "long.parquet has 10,001 rows; give 1 to 10,000" in message(engine, model)


def test_the_examples_are_compared_when_a_version_is_loaded(engine: st.Engine, tmp_path: Path) -> None:
    engine.apply([st.Model("m", forest(tmp_path), COLUMNS, examples=golden(tmp_path))])
    kept = model_path(engine.store.path, "m", 1).with_name(FILE)
    good = GoldenRows.read(kept)
    good.expected["output_probability"][3] = 0.5
    kept.write_bytes(good.to_bytes())
    with pytest.raises(Unavailable, match="model 'm' version 1: examples: output 'output_probability' of row 3"):
        engine.predict("m", {"user_id": 1, "a": 1.0, "c": 2.0})
    kept.unlink()
    with (
        st.Engine.open(engine.store.path) as other,
        pytest.raises(Unavailable, match="its examples cannot be read"),
    ):
        other.predict("m", {"user_id": 1, "a": 1.0, "c": 2.0})


def test_other_examples_make_a_new_version_and_a_deployed_one_brings_its_own(engine: st.Engine, tmp_path: Path) -> None:
    model = st.Model("m", forest(tmp_path), COLUMNS, examples=golden(tmp_path))
    engine.apply([model])
    golden(tmp_path, output_label=None)
    assert [change.detail for change in engine.apply([model])] == ["version 1 -> 2: other examples"]
    new = tmp_path / "new.onnx"
    new.write_bytes(to_onnx(FITTED, X[:1], name="another").SerializeToString())
    with pytest.raises(InvalidArgument, match="version 3: examples: output 'output_label' of row 0"):
        registry.deploy(engine.store, "m", new, examples=golden(tmp_path, output_label=["maybe"] * 300))
    assert registry.deploy(engine.store, "m", new, examples=golden(tmp_path)) == 3
    assert model_path(engine.store.path, "m", 3).with_name(FILE).is_file()
    assert engine.predict("m", {"user_id": 1, "a": 1.0, "c": 2.0}).version == 3


def test_the_commands_compare_too(tmp_path: Path) -> None:
    forest(tmp_path)
    golden(tmp_path)
    (tmp_path / "definitions.py").write_text(
        "import shorttail as st\n"
        "columns = ['request:a', 'request:b', 'request:c']\n"
        "m = st.Model('m', path='m.onnx', inputs=columns, examples='examples.csv')\n"
    )
    pd.DataFrame(X, columns=list("abc")).assign(output_label=FITTED.predict(X)).to_csv(
        tmp_path / "examples.csv", index=False
    )
    apply = ("apply", "definitions.py", "--store", "store", "--create")
    assert commands.run_well(*apply, folder=tmp_path).out.startswith("+ model m  version 1: ")
    (tmp_path / "new.onnx").write_bytes(to_onnx(FITTED, X[:1], name="another").SerializeToString())
    deploy = ("models", "deploy", "m", "new.onnx", "--store", "store")
    commands.run_well(*deploy, "--examples", "examples.csv", folder=tmp_path)
    pd.DataFrame(X, columns=list("cba")).assign(output_label=FITTED.predict(X)).to_csv(
        tmp_path / "examples.csv", index=False
    )
    said = commands.error_of(*apply, folder=tmp_path)
    assert "with request:a and request:c swapped all rows agree: are the columns in the order of training?" in said


def test_rows_are_put_together_as_a_request_would(engine: st.Engine, tmp_path: Path) -> None:
    """Functions, vectors, texts, integers, and missing values with a default, a replacement and NaN."""

    @st.on_demand
    def ratio(visits: st.Float64, amount: st.Float64) -> st.Float32:  # type: ignore[valid-type]
        return amount / visits

    value = helper.make_tensor_value_info
    kinds = {"x": (TensorProto.FLOAT, 5), "tier": (TensorProto.STRING, 1), "n": (TensorProto.INT64, 1)}
    made = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds],
        "g",
        [value(name, kind, [None, width]) for name, (kind, width) in kinds.items()],
        [value(f"{name}_out", kind, [None, width]) for name, (kind, width) in kinds.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    inputs = {
        "x": ["stats:age", "stats:taste", ratio("stats:visits", "request:amount"), "request:amount"],
        "tier": ["stats:tier"],
        "n": ["stats:visits"],
    }
    examples = tmp_path / "golden.parquet"
    pa.parquet.write_table(
        pa.table(
            {
                "age": [1.5, None],
                "taste": [[1.0, 2.0], [3.0, 4.0]],
                "visits": [4, None],
                "amount": [8.0, None],
                "tier": ["gold", None],
                "x_out": [[1.5, 1, 2, 2, 8], [float("nan"), 3, 4, -1, 2]],
                "tier_out": ["gold", "tin"],
                "n_out": [4, -2],
            }
        ),
        examples,
    )
    missing = {"visits": -2, "amount": 2.0}
    engine.apply([st.Model("m", str(path), inputs, missing=missing, examples=str(examples))])
    engine.push("stats", {"user_id": [1], "age": [1.5], "taste": [[1.0, 2.0]], "visits": [4], "tier": ["gold"]})
    answer = engine.predict("m", {"user_id": 1, "amount": 8.0}).outputs
    assert answer["x_out"].tolist() == [[1.5, 1, 2, 2, 8]]


def test_rows_that_depend_on_each_other_may_agree_one_by_one(engine: st.Engine, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=1),
        helper.make_node("Div", ["x", "largest"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [None, 1])], [value("y", TensorProto.FLOAT, [None, 1])]
    )
    path = tmp_path / "m.onnx"
    onnx.save_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    pd.DataFrame({"a": [1.0, 2.0, 4.0], "y": [1.0, 1.0, 1.0]}).to_csv(tmp_path / "alone.csv", index=False)
    pd.DataFrame({"a": [1.0, 2.0, 4.0], "y": [0.25, 0.5, 1.0]}).to_csv(tmp_path / "together.csv", index=False)
    for name in ("alone", "together"):
        engine.apply([st.Model(name, str(path), ["request:a"], examples=str(tmp_path / f"{name}.csv"))])


def test_texts_with_zeros_survive_the_file(tmp_path: Path) -> None:
    texts = np.array([["a\0", "ü"], ["", "x\0"]], object)
    rows = GoldenRows([texts, np.arange(2)], {"p": np.array([1.0, np.nan]), "t": np.array(["é\0", ""], object)})
    (tmp_path / FILE).write_bytes(rows.to_bytes())
    read = GoldenRows.read(tmp_path / FILE)
    assert read.inputs[0].tolist() == texts.tolist()
    assert read.expected["t"].tolist() == ["é\0", ""]
    np.testing.assert_array_equal(read.expected["p"], rows.expected["p"])
    (tmp_path / FILE).write_bytes(rows.to_bytes()[:-30])
    with pytest.raises(InvalidArgument, match="its examples cannot be read"):
        GoldenRows.read(tmp_path / FILE)
