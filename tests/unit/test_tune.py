"""tune measures how a model runs fastest on this host and stores it in the catalog; `models` shows how models run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail.cli import cli
from shorttail.errors import InvalidArgument, NotFound
from shorttail.models import settings
from shorttail.models.load import Runner
from shorttail.models.settings import DEFAULT, RunSettings, tuned
from shorttail.registry import tune

USER = st.Entity("user", keys={"id": st.Int64})
VIEW = st.FeatureView(
    "v", entity=USER, features=[st.Feature("a", st.Float32, default=1.0), st.Feature("b", st.Float32)]
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.tree import DecisionTreeRegressor

    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    model = DecisionTreeRegressor(max_depth=3).fit(x, x[:, 0] * x[:, 1])
    path = tmp_path_factory.mktemp("models") / "tree.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = convert_sklearn(model, initial_types=[("x", FloatTensorType([None, 3]))])
    path.write_bytes(converted.SerializeToString())
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [None, 3])],
        [value("y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.array([[1], [2], [3]], np.float32), "w")],
    )
    path = tmp_path / "linear.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def store(tmp_path: Path, tree: Path, linear: Path) -> str:
    columns = ["v:a", "v:b", "request:c"]
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        forest = st.Model("forest", path=str(tree), inputs=columns, description="guesses", owner="team@example.org")
        engine.apply([USER, VIEW, forest, st.Model("linear", path=str(linear), inputs=columns)])
    return str(tmp_path / "store")


@pytest.fixture
def run(store: str) -> Callable[..., Any]:
    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(cli, [*arguments, "--store", store], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.output) if "--json" in arguments else result.output

    return run


def times(monkeypatch: pytest.MonkeyPatch, cost: Callable[[Runner, int], float]) -> None:
    """Replace the clock: a batch takes the time that `cost` returns for its rows."""

    def measure(targets: Any, example: Any, rows: int, seconds: float) -> None:
        for us, runner in targets:
            assert len(runner.run(example(rows, np.random.default_rng(0)))[0]) == rows
            us[rows] = cost(runner, rows)

    monkeypatch.setattr(tune, "measure", measure)


def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.os, "sched_getaffinity", lambda pid: {0, 1})


def runs_with(store: str, model: str) -> str:
    with st.Engine.open(store) as engine:
        runner = engine.plan_for_model(model).runner
        assert runner is not None
        return runner.description


def test_every_way_to_run_a_forest_is_measured_on_new_rows(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two_cpus(monkeypatch)
    with st.Engine.open(store) as engine:
        result = tune.tune(engine.store, "forest", seconds=0)
        assert engine.store.catalog.model("forest").version().tuning == {}
    ways = [
        candidate.runner.model.description.replace(f", {settings.simd_level()}", "") for candidate in result.candidates
    ]
    assert ways == [
        "compiled forest, 1 tree",
        "ONNX Runtime, 1 thread",
        "ONNX Runtime, 1 thread, padded batches",
        "ONNX Runtime, 2 threads",
    ]
    assert [candidate.settings for candidate in result.candidates] == [
        DEFAULT,
        RunSettings("onnxruntime"),
        RunSettings("onnxruntime", padded=True),
        RunSettings("onnxruntime", threads=2),
    ]
    assert all(list(candidate.median_us) == [1, 8, 64, 512] for candidate in result.candidates)
    assert all(us > 0 for candidate in result.candidates for us in candidate.median_us.values())


def test_rows_are_new_in_every_turn_and_the_same_for_all() -> None:
    seen: list[list[Any]] = [[], []]

    class Noting:
        def __init__(self, number: int):
            self.run = lambda inputs: seen[number].append(inputs[0].tobytes())

    def example(rows: int, random: np.random.Generator) -> list[Any]:
        return [random.normal(size=(rows, 2))]

    targets: Any = [({}, Noting(0)), ({}, Noting(1))]
    tune.measure(targets, example, 4, 0.0)
    measured = [rows[1:] for rows in seen]  # the first is to warm up
    assert measured[0] == measured[1]
    assert len(set(measured[0])) == len(measured[0]) == tune.TURNS_MIN
    assert all(us[4] > 0 for us, _ in targets)


@pytest.mark.parametrize(
    ("factor", "threads"),
    [(0.95, 1), (1.3, 2)],  # two threads must gain a quarter
)
def test_threads_are_taken_only_where_they_gain_enough(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, factor: float, threads: int
) -> None:
    two_cpus(monkeypatch)
    times(monkeypatch, lambda runner, rows: rows / (factor if "2 threads" in runner.description else 1))
    assert run("tune", "linear", "--json")["chosen"] == {"runner": "auto", "threads": threads, "padded": False}


def test_tuned_settings_are_stored_and_used(
    store: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, lambda runner, rows: 5.0 if runner.kind == "forest" else 1.0 * rows)
    with st.Engine.open(store) as running:
        forest = running.predict("forest", {"id": [1, 2], "c": [0.5, -3]})
        assert running.models()[0]["runs"].startswith("compiled forest, ")
        dry = run("tune", "forest", "--dry-run", "--json")
        assert (dry["written"], dry["chosen"]["runner"]) == (False, "auto")  # on the whole: 1, 8, 64 and 512 rows
        assert runs_with(store, "forest").startswith("compiled forest, ")

        times(monkeypatch, lambda runner, rows: 500.0 if runner.kind == "forest" else 1.0 * rows)
        output = run("tune", "forest")
        assert output.splitlines()[-1].startswith("chosen: ONNX Runtime, 1 thread; written to ")
        assert runs_with(store, "forest") == "ONNX Runtime, 1 thread: measured faster here by `shorttail tune`"
        answer = running.predict("forest", {"id": [1, 2], "c": [0.5, -3]})
        assert running.models()[0]["runs"].startswith("ONNX Runtime, 1 thread: measured faster")  # with no restart
        np.testing.assert_allclose(answer.outputs["variable"], forest.outputs["variable"], rtol=1e-6)
    shown = run("models", "show", "forest", "--json")
    assert shown["kind"] == "onnxruntime"
    assert shown["tuning"] == f"tuned on {settings.host()}"


def test_settings_of_another_cpu_are_not_used(
    store: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    times(monkeypatch, lambda runner, rows: 500.0 if runner.kind == "forest" else 1.0)
    with monkeypatch.context() as other:
        other.setattr(settings, "cpu", lambda: "Other CPU, avx9, 64 CPUs")
        run("tune", "forest")
        assert runs_with(store, "forest").startswith("ONNX Runtime")
    assert runs_with(store, "forest").startswith("compiled forest")
    note = run("models", "show", "forest", "--json")["tuning"]
    assert note == f"tuned on Other CPU, avx9, 64 CPUs, which this host is not ({settings.host()})"
    run("tune", "forest")
    assert runs_with(store, "forest").startswith("ONNX Runtime")
    with st.Engine.open(store) as engine:
        assert set(engine.store.catalog.model("forest").version().tuning) == {
            settings.host(),
            "Other CPU, avx9, 64 CPUs",
        }


def test_a_new_version_starts_without_tuned_settings(store: str, run: Callable[..., Any], linear: Path) -> None:
    run("tune", "forest", "--seconds", "0")
    with st.Engine.open(store) as engine:
        assert engine.deploy("forest", linear) == 2
        versions = engine.store.catalog.model("forest").versions
    assert [bool(info.tuning) for info in versions.values()] == [True, False]


def test_a_cpu_and_a_gpu_have_separate_settings() -> None:
    choice = {settings.host("cuda:1"): RunSettings("onnxruntime").to_json()}
    assert settings.host("cuda:1") == f"{settings.host()}, cuda"
    assert tuned(choice, "cuda:0") == (RunSettings("onnxruntime"), f"tuned on {settings.host()}, cuda")
    assert tuned(choice)[0] == DEFAULT
    assert tuned({}) == (DEFAULT, "")


def test_tune_refuses_unknown_models_versions_and_devices(store: str) -> None:
    with st.Engine.open(store) as engine:
        with pytest.raises(NotFound, match="no model 'fores'; did you mean 'forest'"):
            tune.tune(engine.store, "fores")
        with pytest.raises(NotFound, match="has no version 9"):
            tune.tune(engine.store, "forest", 9)
    with pytest.raises(InvalidArgument, match="device 'tpu': it must be cpu, cuda or cuda:N"):
        CliRunner().invoke(cli, ["tune", "forest", "--store", store, "--device", "tpu"], catch_exceptions=False)


# -- shorttail models ------------------------------------------------------------------------------------------


def test_the_list_shows_how_models_run_and_why(run: Callable[..., Any]) -> None:
    runs = {model["name"]: model["runs"] for model in run("models", "list", "--json")}
    assert runs == {
        "forest": f"compiled forest, {settings.simd_level()}, 1 tree",
        "linear": "ONNX Runtime, 1 thread: it has a node of type MatMul",
    }
    table = run("models").splitlines()
    assert table[0].split()[-1] == "runs"
    assert table[2].endswith("ONNX Runtime, 1 thread: it has a node of type MatMul")


def test_the_list_is_complete_if_a_file_is_broken(store: str, run: Callable[..., Any]) -> None:
    (Path(store) / "models" / "forest" / "1" / "model.onnx").write_bytes(b"not a model")
    runs = {model["name"]: model["runs"] for model in run("models", "list", "--json")}
    assert runs["forest"].startswith("nothing: model.onnx: ONNX Runtime cannot load this model: ")
    assert runs["linear"].startswith("ONNX Runtime, 1 thread")


def test_show_describes_a_version(run: Callable[..., Any]) -> None:
    shown = run("models", "show", "forest", "--json")
    assert shown["inputs"] == {"x": ["v:a", "v:b", "request:c"]}
    assert shown["outputs"] == {"variable": "float"}
    assert shown["features"] == ["v:a", "v:b"]
    assert shown["columns"] == {"id": "Int64", "c": "Float64"}
    assert (shown["name"], shown["version"], shown["versions"], shown["serving"]) == ("forest", 1, [1], True)
    assert (shown["description"], shown["owner"]) == ("guesses", "team@example.org")
    assert (shown["kind"], shown["why"], shown["tuning"]) == ("forest", None, None)
    assert {"1", "8", "64", "512"} <= set(shown["us"])
    assert all(us > 0 for us in shown["us"].values())
    assert shown["loop_rows_max"] > 1

    text = run("models", "show", "linear")
    assert "runs:        ONNX Runtime, 1 thread: it has a node of type MatMul\n" in text
    assert "input x:     v:a\n             v:b\n             request:c\n" in text
    assert text.split("\n\n")[1].split()[:3] == ["rows", "us/batch", "us/row"]


def test_show_of_another_version(store: str, run: Callable[..., Any], linear: Path) -> None:
    with st.Engine.open(store) as engine:
        engine.deploy("forest", linear)
    assert run("models", "show", "forest", "--json")["kind"] == "onnxruntime"
    first = run("models", "show", "forest", "--version", "1", "--json")
    assert (first["kind"], first["serving"], first["versions"]) == ("forest", False, [1, 2])
    listed = run("models", "list", "--json")
    assert [(model["version"], model["runs"] is None) for model in listed[:2]] == [(2, False), (1, True)]
