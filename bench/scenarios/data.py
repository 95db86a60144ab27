"""Make the files of a scenario."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

SEED = 7
CHECKED_REQUESTS = 64
TRAINING_ROWS, TRAINING_ROWS_MIN, ROWS_MIN = 20_000, 4_000, 1_000
EVENT_TIME_US = 1_790_000_000_000_000

Matrix = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class View:
    """A view with keys 1 .. rows."""

    key: str
    rows: int
    features: Sequence[str]
    widths: Mapping[str, int] = field(default_factory=dict)  # of the features that are vectors


@dataclass(frozen=True)
class Scenario:
    """A workload.

    inputs: the columns of the model's matrix, in order: "view:feature", "request:column", "on_demand:name". on_demand:
    name -> arguments. shared: key columns with one value in a request of several rows. values: the range of each
    request column. model: makes the ONNX file from example rows; None: only features. column: the column of the model's
    output that is the score.
    """

    name: str
    views: Mapping[str, View]
    inputs: Sequence[str]
    rows: int
    files: Path | None = None  # the folder of definitions.py and transforms.py
    on_demand: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shared: Sequence[str] = ()
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    model: Callable[[Matrix], bytes] | None = None
    output: str | None = None
    column: int | None = None

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(view.key for view in self.views.values()))

    @property
    def one_row(self) -> bool:
        """Whether a request has plain values. Lookups of features always have lists."""
        return self.rows == 1 and self.model is not None


def write(scenario: Scenario, folder: Path, divisor: int) -> None:
    random = np.random.default_rng(SEED)
    rows = {name: max(ROWS_MIN, view.rows // divisor) for name, view in scenario.views.items()}
    frames = {name: write_view(folder, name, view, rows[name], random) for name, view in scenario.views.items()}
    ranges = {view.key: [1, rows[name]] for name, view in scenario.views.items()}
    if scenario.files is not None:
        for name in ("definitions.py", "transforms.py"):
            shutil.copy(scenario.files / name, folder / name)
    else:
        (folder / "definitions.py").write_text(definitions_of(scenario))
    if scenario.model is not None:
        n = max(TRAINING_ROWS_MIN, TRAINING_ROWS // divisor)
        example = matrix(scenario, folder, frames, draw(scenario, ranges, n, random, training=True))
        (folder / "model.onnx").write_bytes(scenario.model(example))
    requests = [draw(scenario, ranges, scenario.rows, random) for _ in range(CHECKED_REQUESTS)]
    answers = [answer(scenario, folder, matrix(scenario, folder, frames, request)) for request in requests]
    write_json(
        folder / "requests.json",
        [{"columns": request, "scores": scores} for request, scores in zip(requests, answers, strict=True)],
    )
    write_json(
        folder / "scenario.json",
        {
            "name": scenario.name,
            "kind": "features" if scenario.model is None else "model",
            "views": {
                name: {
                    "entity": view.key,
                    "features": list(view.features),
                    "widths": dict(view.widths),
                    "rows": rows[name],
                }
                for name, view in scenario.views.items()
            },
            "inputs": list(scenario.inputs),
            "on_demand": {name: list(arguments) for name, arguments in scenario.on_demand.items()},
            "shared": list(scenario.shared),
            "rows": scenario.rows,
            "keys": ranges,
            "values": {name: list(limits) for name, limits in scenario.values.items()},
            "output": scenario.output,
            "column": scenario.column,
        },
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_view(folder: Path, name: str, view: View, rows: int, random: np.random.Generator) -> pd.DataFrame:
    """Write the rows of a view. Features are normal, or log-normal if their name contains "amount"."""
    frame: dict[str, Any] = {view.key: np.arange(1, rows + 1)}
    table = {view.key: pa.array(frame[view.key])}
    for feature in view.features:
        width = view.widths.get(feature)
        values = random.normal(size=(rows, width) if width else rows).astype(np.float32)
        if "amount" in feature:
            values = np.exp(values)
        frame[feature] = list(values) if width else values
        table[feature] = (
            pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width) if width else pa.array(values)
        )
    times = np.full(rows, EVENT_TIME_US, "datetime64[us]")
    table["event_time"] = pa.array(times, pa.timestamp("us", tz="UTC"))
    parquet.write_table(pa.table(table), folder / f"{name}.parquet")
    return pd.DataFrame(frame)


def draw(
    scenario: Scenario,
    ranges: Mapping[str, Sequence[int]],
    rows: int,
    random: np.random.Generator,
    training: bool = False,
) -> dict[str, Any]:
    """Return the columns of a request, in the form of a JSON body. training: rows share no key."""
    columns: dict[str, Any] = {}
    for key in scenario.keys:
        low, high = ranges[key]
        one = key in scenario.shared and not training
        columns[key] = int(random.integers(low, high + 1)) if one else random.integers(low, high + 1, rows).tolist()
    for name, (bottom, top) in scenario.values.items():
        columns[name] = np.round(random.uniform(bottom, top, rows), 3).tolist()
    if scenario.one_row and not training:
        columns = {name: value[0] if isinstance(value, list) else value for name, value in columns.items()}
    return columns


def matrix(scenario: Scenario, folder: Path, frames: Mapping[str, pd.DataFrame], request: Mapping[str, Any]) -> Matrix:
    """Return the model's input for a request, from a pandas join and the NumPy transforms."""
    rows = max(np.size(value) for value in request.values())
    asked = pd.DataFrame({name: np.broadcast_to(value, rows) for name, value in request.items()})
    joined = asked
    for name, view in scenario.views.items():
        prefixed = frames[name].rename(columns={feature: f"{name}:{feature}" for feature in view.features})
        joined = joined.merge(prefixed, on=view.key, how="left", validate="many_to_one")

    def column(reference: str) -> Any:
        kind, _, name = reference.partition(":")
        if kind == "request":
            return asked[name].to_numpy(np.float64)
        if kind == "on_demand":
            arguments = [column(argument) for argument in scenario.on_demand[name]]
            return getattr(transforms(folder), name)(*arguments)
        values = joined[reference].to_numpy()
        return np.stack(list(values)) if values.dtype == object else values

    parts = [np.asarray(column(reference), np.float32).reshape(rows, -1) for reference in scenario.inputs]
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def transforms(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("transforms", folder / "transforms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(scenario: Scenario, folder: Path, fed: Matrix) -> list[float]:
    """Return the scores of the rows, or without a model all features, row by row."""
    if scenario.model is None:
        return fed.ravel().tolist()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run([scenario.output], {session.get_inputs()[0].name: fed})
    picked = scores if scenario.column is None else scores[:, scenario.column]
    scores_of_rows: list[float] = np.ravel(picked).tolist()
    return scores_of_rows


def definitions_of(scenario: Scenario) -> str:
    """Return definitions.py for a scenario of plain features."""
    lines = ["import shorttail as st", ""]
    for name, view in scenario.views.items():
        lines += [
            f"{name} = st.FeatureView(",
            f'    "{name}", entity=st.Entity("{view.key}", keys={{"{view.key}": st.Int64}}),',
            f'    source=st.ParquetSource("{name}.parquet", timestamp="event_time"),',
            f"    features=[st.Feature(name, st.Float32) for name in {list(view.features)!r}],",
            ")",
        ]
    return "\n".join(lines) + "\n"


def gradient_boosting(trees: int) -> Callable[[Matrix], bytes]:
    """Train LightGBM with trees of 31 leaves, on labels that depend on a few columns."""

    def make(rows: Matrix) -> bytes:
        import lightgbm
        import onnxmltools
        from onnxmltools.convert.common.data_types import FloatTensorType

        random = np.random.default_rng(SEED)
        centred = (rows - rows.mean(axis=0)) / (rows.std(axis=0) + 1e-6)
        weights = random.normal(size=rows.shape[1])
        score = centred @ weights / np.sqrt(len(weights)) + np.sin(2 * centred[:, 0] * centred[:, 1])
        labels = (score + 0.5 * random.normal(size=len(rows)) > 0).astype(int)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lightgbm.LGBMClassifier(n_estimators=trees, num_leaves=31, verbose=-1, n_jobs=1).fit(rows, labels)
            kind = [("X", FloatTensorType([None, rows.shape[1]]))]
            converted = onnxmltools.convert_lightgbm(model, initial_types=kind, zipmap=False)
        return bytes(converted.SerializeToString())

    return make


def perceptron(*widths: int) -> Callable[[Matrix], bytes]:
    """Make layers of these widths with ReLU and one logistic output. Weights are random; they do not affect speed."""

    def make(rows: Matrix) -> bytes:
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        random = np.random.default_rng(SEED)
        nodes, tensors, last, fan_in = [], [], "X", rows.shape[1]
        for i, width in enumerate((*widths, 1)):
            weights = (random.normal(size=(fan_in, width)) / np.sqrt(fan_in)).astype(np.float32)
            tensors += [numpy_helper.from_array(weights, f"w{i}")]
            tensors += [numpy_helper.from_array(np.zeros(width, np.float32), f"b{i}")]
            nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [f"h{i}"]))
            nodes.append(helper.make_node("Relu" if i < len(widths) else "Sigmoid", [f"h{i}"], [f"a{i}"]))
            last, fan_in = f"a{i}", width
        nodes[-1].output[0] = "score"
        graph = helper.make_graph(
            nodes,
            "perceptron",
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, rows.shape[1]])],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])],
            tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())

    return make
