"""What `apply` finds out about a model's rows is recorded with the version, shown, and overridden by the definition."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import pytest
from row_models import FLOAT, X4, graph, op

import shorttail as st
from shorttail.define.catalog import VersionInfo
from shorttail.models import vetting
from shorttail.models.load import load_runner
from shorttail.registry import versions as registry

COLUMNS = ["request:a", "request:b", "request:c", "request:d"]
ALONE = "node Softmax 'softmax_y' works along the rows"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        yield engine


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., st.Model]:
    """Return a function that makes the definition of a model. axis: that of its Softmax; 0: over the rows."""

    def make(axis: int, name: str = "m", **definition: Any) -> st.Model:
        path = tmp_path / f"{axis}.onnx"
        graph(path, [op("Softmax", "x", "y", axis=axis)], X4, {"y": (FLOAT, [None, 4])})
        return st.Model(name, str(path), COLUMNS, **definition)

    return make


def version(engine: st.Engine, number: int | None = None) -> VersionInfo:
    engine.refresh()
    return engine.store.catalog.model("m").version(number)


def test_apply_records_what_it_finds(engine: st.Engine, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine.apply([model(1)])
    assert (version(engine).batching, version(engine).batching_why) == ("rows", "")
    assert not caplog.messages
    engine.apply([model(0)])
    found = version(engine)
    assert found.batching == "request"
    assert found.batching_why is not None
    assert found.batching_why.startswith("the answer for a row changes from ")
    assert found.batching_why.endswith(f" when no other row shares its run: {ALONE}")
    assert caplog.messages == [f"model 'm' version 2 runs one request at a time: {found.batching_why}"]


def test_the_definition_has_the_last_word(engine: st.Engine, model: Any) -> None:
    engine.apply([model(0, batching="rows")])
    found = version(engine)
    assert found.batching == "rows"
    assert found.batching_why is not None
    assert found.batching_why.startswith("by its definition, though the answer for a row changes from ")
    engine.apply([model(1, batching="rows")])
    assert (version(engine).batching, version(engine).batching_why) == ("rows", "")
    engine.apply([model(1, batching="request")])
    assert (version(engine).batching, version(engine).batching_why) == ("request", "by its definition")


def test_deploy_examines_too(engine: st.Engine, model: Any) -> None:
    engine.apply([model(1)])
    registry.deploy(engine.store, "m", model(0).path, promote=False)
    assert version(engine, 2).batching == "request"
    assert version(engine).batching == "rows"


def forget(engine: st.Engine) -> None:
    """Leave all versions as a release without this examination registered them."""
    with engine.store.edit_catalog() as catalog:
        entry = catalog.models["m"]
        old = {number: replace(info, batching="rows", batching_why=None) for number, info in entry.versions.items()}
        catalog.models["m"] = replace(entry, versions=old)
    engine.refresh()


def test_a_catalog_of_an_earlier_release() -> None:
    info = VersionInfo(st.Model("m", "m.onnx", ["request:a"]), "", 0, (), ())
    old = {key: value for key, value in info.to_json().items() if not key.startswith("batching")}
    assert (VersionInfo.from_json(old).batching, VersionInfo.from_json(old).batching_why) == ("rows", None)


def test_a_version_that_is_loaded_runs_as_was_found_later(engine: st.Engine, model: Any) -> None:
    engine.apply([model(0)])
    forget(engine)
    rows = {"a": [1.0, 2.0], "b": 0.0, "c": 0.0, "d": 0.0}
    before = engine.predict("m", rows).outputs["y"]
    assert not engine.plan_for_model("m").runner.by_request  # type: ignore[union-attr]
    engine.apply([model(0)])
    assert (engine.predict("m", rows).outputs["y"] == before).all()
    assert engine.plan_for_model("m").runner.by_request  # type: ignore[union-attr]


@pytest.mark.parametrize("batching", [None, "request"])
def test_a_file_of_fixed_rows_takes_exactly_that_many(batching: Any, engine: st.Engine, tmp_path: Path) -> None:
    takes: Any = {"x": (FLOAT, [3, 4])}
    graph(tmp_path / "3.onnx", [op("Softmax", "x", "y", axis=0)], takes, {"y": (FLOAT, [3, 4])})
    engine.apply([st.Model("m", str(tmp_path / "3.onnx"), COLUMNS, batching=batching)])
    assert version(engine).batching == "request"
    scores = engine.predict("m", {"a": [1.0, 2.0, 3.0], "b": 0.0, "c": 0.0, "d": 0.0}).outputs["y"]
    assert scores.sum(axis=0) == pytest.approx([1.0] * 4)
    with pytest.raises(st.InvalidArgument, match="takes exactly 3 rows a request, not 2"):
        engine.predict("m", {"a": [1.0, 2.0], "b": 0.0, "c": 0.0, "d": 0.0})


def test_a_forest_of_fixed_rows_is_compared_in_batches_of_any_size(tmp_path: Path) -> None:
    nodes = {"nodes_treeids": [0], "nodes_nodeids": [0], "nodes_featureids": [0], "nodes_values": [0.0]}
    nodes |= {"nodes_modes": ["LEAF"], "nodes_truenodeids": [0], "nodes_falsenodeids": [0]}
    target = {"target_treeids": [0], "target_nodeids": [0], "target_ids": [0], "target_weights": [2.5]}
    tree = op("TreeEnsembleRegressor", "x", "y", n_targets=1, **nodes, **target)
    tree.domain = "ai.onnx.ml"
    path = graph(tmp_path / "m.onnx", [tree], {"x": (FLOAT, [3, 4])}, {"y": (FLOAT, [3, 1])})
    assert load_runner(path, ["y"], by_request=True).kind == "forest"


@pytest.mark.parametrize("how", ["apply", "promote", "rollback", "canary", "shadow"])
def test_versions_that_were_never_examined(how: str, engine: st.Engine, model: Any) -> None:
    engine.apply([model(1)])
    registry.deploy(engine.store, "m", model(0).path, promote=False)
    if how in ("apply", "rollback"):
        registry.promote(engine.store, "m", 2)
    if how == "rollback":
        registry.promote(engine.store, "m", 1)
    forget(engine)
    steps: dict[str, Callable[[], Any]] = {
        "apply": lambda: engine.apply([model(0)]),
        "promote": lambda: registry.promote(engine.store, "m", 2),
        "rollback": lambda: registry.rollback(engine.store, "m"),
        "canary": lambda: registry.set_canary(engine.store, "m", 10, 2),
        "shadow": lambda: registry.set_shadow(engine.store, "m", 2),
    }
    steps[how]()
    assert version(engine, 2).batching == "request"
    assert ALONE in str(version(engine, 2).batching_why)
    assert version(engine, 1).batching_why is None


@pytest.mark.usefixtures("trials_here")
def test_a_version_is_examined_once(engine: st.Engine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.apply([model(1)])
    registry.deploy(engine.store, "m", model(0).path)
    before = engine.store.catalog.to_json()
    monkeypatch.setattr(vetting, "examine_rows", None)
    engine.apply([model(0)])
    registry.promote(engine.store, "m", 1)
    registry.rollback(engine.store, "m")
    engine.refresh()
    assert version(engine, 2).batching == "request"
    assert engine.store.catalog.model("m").versions.keys() == {1, 2}
    assert (
        json.loads(before)["models"]["m"]["versions"]
        == json.loads(engine.store.catalog.to_json())["models"]["m"]["versions"]
    )


def test_models_says_so_and_why(engine: st.Engine, model: Any, tmp_path: Path) -> None:
    engine.apply([model(0), model(1, name="plain")])
    why = version(engine).batching_why
    told = {shown["name"]: (shown["batching"], shown["batching_why"]) for shown in engine.models()}
    assert told == {"m": ("request", why), "plain": ("rows", None)}
    store = ("--store", str(tmp_path / "store"))
    lines = commands.run_well("models", *store).out.splitlines()
    assert lines[-1] == f"m version 1 runs one request at a time: {why}"
    assert not any("plain version" in line for line in lines)
    listed = json.loads(commands.run_well("models", "list", *store, "--json").out)
    assert {v["name"]: (v["batching"], v["batching_why"]) for v in listed} == told
    assert f"batching:    runs one request at a time: {why}" in commands.run_well("models", "show", "m", *store).out
    assert "batching:    shares runs between requests\n" in commands.run_well("models", "show", "plain", *store).out
    shown = json.loads(commands.run_well("models", "show", "m", *store, "--json").out)
    assert (shown["batching"], shown["batching_why"]) == ("request", why)
