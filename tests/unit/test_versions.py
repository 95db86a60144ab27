"""Versions of models: their manifests, which versions may serve, canaries, shadows, and the commands."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import shorttail as st
from shorttail._native.columns import Columns
from shorttail._native.route import Route
from shorttail.config import LIMITS
from shorttail.errors import Internal, InvalidArgument, NotFound, ShorttailError, Unavailable
from shorttail.models import serving
from shorttail.registry import versions as registry
from shorttail.server.shadow import TOLERANCE, ShadowBatch, ShadowState, ShadowThread, compare

USER = st.Entity("user", keys={"user_id": st.Int64})
SHOP = st.Entity("shop", keys={"shop": st.String})
STATS = st.FeatureView("stats", entity=USER, features=[st.Feature("age", st.Float32), st.Feature("visits", st.Int64)])
SHOPS = st.FeatureView("shops", entity=SHOP, features=[st.Feature("size", st.Float32)])
COLUMNS = ["stats:age", "request:amount"]
FLOAT = TensorProto.FLOAT


def write(path: Path, scale: float, width: int = 2, output: str = "y", whole: bool = False) -> Path:
    """Save a model y = scale * x. whole: y is the sum over all rows, so it does not have a row for each input row."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["rows" if whole else output])]
    if whole:
        nodes.append(helper.make_node("ReduceSum", ["rows"], [output], keepdims=1))
    graph = helper.make_graph(
        nodes,
        "scaled",
        [helper.make_tensor_value_info("x", FLOAT, [None, width])],
        [helper.make_tensor_value_info(output, FLOAT, [1, 1] if whole else [None, width])],
        [numpy_helper.from_array(np.array([scale], np.float32), "scale")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[st.Engine]:
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        model = st.Model("m", str(write(tmp_path / "m.onnx", 1.0)), COLUMNS, owner="risk", description="scales")
        engine.apply([USER, SHOP, STATS, SHOPS, model])
        engine.push("stats", {"user_id": [1, 2], "age": [10.0, 20.0], "visits": [1, 2]})
        yield engine


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    return lambda scale, **options: write(tmp_path / f"{scale}.onnx", scale, **options)


def same_catalog(engine: st.Engine) -> bytes:
    engine.refresh()
    return engine.store.catalog.to_json()


def entry(engine: st.Engine) -> Any:
    engine.refresh()
    return engine.store.catalog.model("m")


def version(engine: st.Engine, user: int = 1) -> int:
    prediction = engine.predict("m", {"user_id": user, "amount": 1.0})
    assert prediction.outputs["y"][0, 1] == prediction.version
    return prediction.version


# -- manifests ---------------------------------------------------------------------------------------------------


def test_the_manifest_describes_the_version(engine: st.Engine, file: Callable[..., Path]) -> None:
    number = engine.deploy("m", file(2.0), run="mlflow:3f2a", metrics={"auc": 0.91, "rows": 1000})
    folder = registry.model_path(engine.store.path, "m", number).parent
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("name", "version", "owner", "description", "run", "metrics")} == {
        "name": "m",
        "version": 2,
        "owner": "risk",  # as the version before
        "description": "scales",
        "run": "mlflow:3f2a",
        "metrics": {"auc": 0.91, "rows": 1000.0},
    }
    assert manifest["features"] == ["stats:age"]
    assert manifest["inputs"] == [{"name": "x", "dtype": "float", "shape": [None, 2]}]
    assert manifest["outputs"] == [{"name": "y", "dtype": "float", "shape": [None, 2]}]
    assert len(manifest["sha256"]) == 64
    shown = registry.describe(engine.store.catalog, "m")
    assert (shown["run"], shown["metrics"], shown["owner"]) == ("mlflow:3f2a", {"auc": 0.91, "rows": 1000.0}, "risk")
    engine.deploy("m", file(3.0), owner="fraud")
    newest = registry.describe(engine.store.catalog, "m")
    assert (newest["owner"], newest["run"], newest["metrics"]) == ("fraud", "", {}), "a run belongs to one file"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run", "3f2a", "run must be a link such as 'mlflow:3f2a' or 'https://...', not '3f2a'"),
        ("run", "mlflow:a b", "run must be a link"),
        ("run", 7, "run"),
        ("metrics", [("auc", 1)], "metrics must be {name: number}, not list"),
        ("metrics", {"auc": "high"}, "metric 'auc' must be a finite number, not 'high'"),
        ("metrics", {"auc": math.nan}, "metric 'auc' must be a finite number, not nan"),
        ("metrics", {"": 1.0}, "'' is not a name"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        st.Model("m", "m.onnx", COLUMNS, **{field: value})
    assert caught.value.message.startswith("model 'm': ")
    assert message in caught.value.message


def test_definitions_keep_run_and_metrics() -> None:
    model = st.Model("m", "m.onnx", COLUMNS, run="https://runs/7", metrics={"auc": 1})
    assert st.Model.from_json(json.loads(json.dumps(model.to_json()))) == model


# -- which versions may serve ------------------------------------------------------------------------------------


def test_a_model_that_fails_to_run_is_not_registered(engine: st.Engine, file: Callable[..., Path]) -> None:
    before = same_catalog(engine)
    broken = file(2.0, whole=True)
    with pytest.raises(InvalidArgument, match="model 'm' version 2: output 'y' has the shape"):
        engine.deploy("m", broken)
    with pytest.raises(InvalidArgument, match="model 'm' version 2: output 'y' has the shape"):
        engine.apply([USER, STATS, st.Model("m", str(broken), COLUMNS)])
    with pytest.raises(InvalidArgument, match="model 'new' version 1: output 'y' has the shape"):
        engine.apply([USER, STATS, st.Model("new", str(broken), COLUMNS)])
    assert same_catalog(engine) == before
    assert version(engine) == 1
    assert not registry.model_path(engine.store.path, "m", 2).parent.exists()
    assert not registry.model_path(engine.store.path, "new", 1).parent.exists()


CHANGES: dict[str, Callable[[st.Engine], object]] = {
    "promote": lambda engine: registry.promote(engine.store, "m", 2),
    "rollback": lambda engine: registry.rollback(engine.store, "m"),
    "canary": lambda engine: registry.set_canary(engine.store, "m", 10.0, 2),
    "shadow": lambda engine: registry.set_shadow(engine.store, "m", 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_version_changes_nothing(
    engine: st.Engine, file: Callable[..., Path], change: str, damage: str
) -> None:
    engine.deploy("m", file(2.0))
    engine.deploy("m", file(3.0))
    path = registry.model_path(engine.store.path, "m", 2)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: None if damage == "changed" else 20] + b"\0" * (damage == "changed"))
    before = same_catalog(engine)
    with pytest.raises(ShorttailError, match=r"model 'm' version 2: .*(SHA-256 differs|is gone)"):
        CHANGES[change](engine)
    assert same_catalog(engine) == before
    assert version(engine) == 3


def test_an_open_engine_keeps_the_old_version_if_the_new_one_cannot_be_loaded(
    engine: st.Engine, file: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert version(engine) == 1
    engine.deploy("m", file(2.0), promote=False)
    path = registry.model_path(engine.store.path, "m", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with engine.store.edit_catalog() as catalog:  # behind the command's back
        catalog.models["m"] = catalog.models["m"].with_current(2)
    assert [version(engine) for _ in range(3)] == [1, 1, 1]
    [model] = engine.models()
    assert model["version"] == 1
    assert "version 2: model.onnx is not the file that was registered" in model["problem"]
    assert caplog.text.count("SHA-256 differs; version 1 serves") == 1
    with pytest.raises(Unavailable, match="SHA-256 differs"):
        engine.predict("m", {"user_id": 1, "amount": 1.0}, version=2)
    with st.Engine.open(engine.store.path) as other, pytest.raises(Unavailable, match="SHA-256 differs"):
        version(other)
    path.write_bytes(whole)
    engine.deploy("m", file(3.0), promote=False)  # a change of the catalog: it is tried again
    assert version(engine) == 2
    assert engine.models()[0]["problem"] is None


# -- loading in the background -------------------------------------------------------------------------------------


@pytest.fixture
def gate(engine: st.Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine that loads in the background once `gate.open` is set. changed: set when another version answers."""

    class Gate:
        open, reached, changed = threading.Event(), threading.Event(), threading.Event()

    def load_version(*args: Any) -> Any:
        Gate.reached.set()
        assert Gate.open.wait(30)
        return load(*args)

    version(engine)
    load = serving.load_version
    monkeypatch.setattr(serving, "load_version", load_version)
    monkeypatch.setattr(registry, "vet", lambda catalog, info, *args, **options: info)  # it would wait too
    engine.load_in_background(Gate.changed.set)
    yield Gate
    Gate.open.set()


def test_the_old_version_answers_until_the_new_one_is_loaded(
    engine: st.Engine, file: Callable[..., Path], gate: Any
) -> None:
    engine.deploy("m", file(2.0))
    assert [version(engine) for _ in range(3)] == [1, 1, 1]
    assert gate.reached.wait(30), "the new version did not begin to load"
    with pytest.raises(Unavailable, match="model 'm' version 2 is being loaded; send it again"):
        engine.predict("m", {"user_id": 1, "amount": 1.0}, version=2)
    before = engine.plans_version
    plan = engine.plan_for_model("m")
    gate.open.set()
    assert gate.changed.wait(30)
    assert engine.plans_version > before
    assert version(engine) == 2
    columns = plan.new_columns()
    columns.append({"user_id": [1], "amount": [1.0]})
    assert engine.run(Route(plan), columns)[1].version == 1, "a batch parsed for version 1 runs with version 1"
    registry.rollback(engine.store, "m")
    assert version(engine) == 1, "the previous version stays loaded, so this loads nothing"


def test_unused_versions_are_released(engine: st.Engine, file: Callable[..., Path]) -> None:
    for scale in range(2, 12):
        engine.deploy("m", file(float(scale)))
        assert version(engine) == scale
    assert {key.version for key in engine._versions.runners} == {10, 11}
    for number in range(1, 9):
        assert engine.predict("m", {"user_id": 1, "amount": 1.0}, version=number).version == number
    kept = {key.version for key in engine._versions.runners}
    assert kept == {10, 11, *range(9 - LIMITS.versions_asked, 9)}


# -- canaries --------------------------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def oracle(values: list[int | str | None], salt: int) -> int:
    hash = mixed(salt)
    for value in values:
        if value is None:
            hash = mixed(hash ^ 1)
            continue
        data = value.to_bytes(8, "little", signed=True) if isinstance(value, int) else value.encode()
        hash ^= len(data) << 1
        for at in range(0, len(data), 8):
            hash = mixed(hash ^ int.from_bytes(data[at : at + 8], "little"))
    return hash >> 32


def test_the_hash_of_keys_is_the_same_everywhere() -> None:
    columns = Columns(["a", "b", "x"], [st.Int64, st.String, st.Float64])
    rows: list[list[Any]] = [[1, "é"], [-5, ""], [None, "ab" * 9], [2**63 - 1, None], [1, "12345678"]]
    for a, b in rows:
        columns.append({"a": a, "b": b, "x": 0.5})
    for row, keys in enumerate(rows):
        assert columns.hash_row(row, 2, 77) == oracle(keys, 77)
        assert columns.hash_row(row, 1, 77) == oracle(keys[:1], 77)
    assert columns.hash_row(0, 2, 77) != columns.hash_row(0, 2, 78)
    with pytest.raises(IndexError):
        columns.hash_row(len(rows), 2, 77)


def test_a_canary_is_sticky_and_gets_its_share(engine: st.Engine, file: Callable[..., Path]) -> None:
    seed = 20240607
    users = np.random.default_rng(seed).integers(-(2**62), 2**62, 3000).tolist()

    def canaries() -> set[int]:
        return {user for user in users if version(engine, user) == 2}

    engine.deploy("m", file(2.0), canary_percent=10.0)
    assert entry(engine).current == 1
    tenth = canaries()
    assert abs(len(tenth) - 300) < 5 * math.sqrt(3000 * 0.1 * 0.9), f"seed {seed}"
    assert canaries() == tenth
    with st.Engine.open(engine.store.path) as other:
        assert {user for user in users[:300] if version(other, user) == 2} == tenth & set(users[:300])
    registry.set_canary(engine.store, "m", 40.0)
    assert canaries() > tenth, "an entity that had the canary keeps it"
    registry.set_canary(engine.store, "m", 100.0)
    assert canaries() == set(users)
    registry.set_canary(engine.store, "m", 0)
    assert canaries() == set()


def test_a_canary_may_read_other_features_of_the_same_keys(engine: st.Engine, tmp_path: Path) -> None:
    other = st.Model("m", str(write(tmp_path / "two.onnx", 2.0)), ["stats:visits", "request:amount"])
    engine.apply([USER, STATS, other])
    registry.promote(engine.store, "m", 1)
    registry.set_canary(engine.store, "m", 50.0)
    answers = {engine.predict("m", {"user_id": u, "amount": 1.0}).version for u in range(100)}
    assert answers == {1, 2}
    assert version(engine) in (1, 2)


def test_a_canary_ends_when_another_version_serves(engine: st.Engine, file: Callable[..., Path]) -> None:
    engine.deploy("m", file(2.0), promote=False)
    registry.set_shadow(engine.store, "m", 2, 50.0)
    registry.set_canary(engine.store, "m", 10.0)
    assert registry.promote(engine.store, "m") == 1, "the canary, when no version is named"
    assert (entry(engine).current, entry(engine).canary, entry(engine).shadow) == (2, None, None)
    engine.deploy("m", file(3.0), canary_percent=10.0)
    registry.set_shadow(engine.store, "m", 3)
    assert registry.rollback(engine.store, "m") == 1
    assert (entry(engine).canary, entry(engine).shadow.version) == (None, 3)


def test_invalid_canaries_and_shadows_are_refused(engine: st.Engine, file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no version newer than the current one, 1; name a version, or deploy"):
        registry.set_canary(engine.store, "m", 10.0)
    with pytest.raises(InvalidArgument, match="version 1 is the current one; name another version as the canary"):
        registry.set_canary(engine.store, "m", 10.0, 1)
    with pytest.raises(NotFound, match="model 'm' has no version 9; its versions: 1"):
        registry.set_shadow(engine.store, "m", 9)
    wider = st.Model("m", str(write(tmp_path / "wide.onnx", 2.0, 3)), [*COLUMNS, "request:extra"])
    engine.apply([USER, STATS, wider])
    registry.promote(engine.store, "m", 1)
    before = same_catalog(engine)
    with pytest.raises(InvalidArgument, match=r"takes other request columns than version 1 \(extra\)"):
        registry.set_canary(engine.store, "m", 10.0, 2)
    with pytest.raises(InvalidArgument, match="version 2 needs extra, which requests for version 1 lack"):
        registry.set_shadow(engine.store, "m", 2)
    with pytest.raises(InvalidArgument, match="the share must be above 0% and at most 100%, not 101%"):
        registry.set_canary(engine.store, "m", 101.0, 2)
    assert same_catalog(engine) == before
    renamed = st.Model("m", str(file(3.0, output="z")), COLUMNS)
    engine.apply([USER, STATS, renamed])
    with pytest.raises(InvalidArgument, match="have no output in common to compare"):
        registry.set_shadow(engine.store, "m", 1)


def test_a_shadow_keeps_the_features_that_a_view_loses(
    engine: st.Engine, file: Callable[..., Path], tmp_path: Path
) -> None:
    other = st.Model("m", str(write(tmp_path / "two.onnx", 2.0)), ["stats:visits", "request:amount"])
    engine.apply([USER, STATS, other])
    registry.promote(engine.store, "m", 1)
    registry.set_shadow(engine.store, "m", 2)
    fewer = st.FeatureView("stats", entity=USER, features=[st.Feature("age", st.Float32)])
    engine.apply([USER, fewer])
    row = {"user_id": 1, "amount": 1.0}
    assert engine.predict("m", row, version=2).outputs["y"].tolist() == [[2.0, 2.0]]
    with pytest.raises(NotFound, match="has no feature 'visits'"):
        engine.apply([USER, fewer, other])


# -- shadows -----------------------------------------------------------------------------------------------------------


def test_rows_that_count_as_different() -> None:
    nan, inf = math.nan, math.inf
    a = np.array([[1.0, 2.0], [nan, inf], [nan, 1.0], [100.0, 0.0], [100.0, 0.0], [inf, 0.0]], np.float32)
    b = np.array([[1.0, 2.0], [nan, inf], [0.0, 1.0], [100.0 + 50 * TOLERANCE, 0.0], [100.5, 0.0], [1.0, 0.0]])
    differing, largest = compare({"p": a, "only": a}, {"p": b.astype(np.float32)}, 6)
    assert differing.tolist() == [False, False, True, False, True, True]
    assert largest == pytest.approx(0.5, abs=1e-3)
    labels = np.array(["a", "b"], object)
    differing, largest = compare({"p": np.ones(2), "label": labels}, {"p": np.ones(2), "label": labels[::-1].copy()}, 2)
    assert (differing.tolist(), largest) == ([True, True], 0.0)
    assert compare({"p": np.ones((2, 3))}, {"p": np.ones((2, 2))}, 2)[0].tolist() == [True, True]


def test_outputs_without_rows_are_compared_as_a_whole() -> None:
    ours = {"one": np.array(1.0, np.float16), "none": np.empty((0, 3)), "text": np.array("a", object)}
    assert compare(ours, dict(ours), 1)[0].tolist() == [False]
    for name, other in (
        ("one", np.array(2.0, np.float16)),
        ("none", np.empty((3, 0))),
        ("text", np.array("b", object)),
    ):
        assert compare(ours, ours | {name: other}, 1)[0].tolist() == [True], name


@pytest.mark.parametrize("share", [1.0, 0.3, 0.01])
def test_a_shadow_takes_its_share_of_batches(share: float) -> None:
    state = ShadowState()
    assert sum(state.is_due(share) for _ in range(1000)) == round(1000 * share)


def test_a_shadow_with_other_features_looks_up_its_own(engine: st.Engine, tmp_path: Path) -> None:
    other = st.Model("m", str(write(tmp_path / "one.onnx", 1.0)), ["stats:visits", "stats:age"])
    engine.apply([USER, STATS, other])
    registry.promote(engine.store, "m", 1)
    registry.set_shadow(engine.store, "m", 2, 50.0)
    plan = engine.plan_for_model("m")
    assert plan.shadow is not None
    assert (plan.shadow.same_inputs, plan.shadow.share) == (False, 0.5)
    columns = plan.new_columns()
    columns.append({"user_id": [1, 2], "amount": [10.0, 5.0]})
    _, result = engine.run(Route(plan), columns)  # [[10, 10], [20, 5]]; the shadow gives [[1, 10], [2, 20]]
    shadows = ShadowThread(engine.store)
    state = shadows.state("m", 1, 2)
    ShadowBatch(plan.shadow, state, columns, [], result.names, 2, (), result.values).run(engine.store)
    counts = shadows.describe(engine.models())[0]["shadow"]
    assert (counts["batches"], counts["rows"], counts["rows_differing"]) == (1, 2, 2)
    assert counts["largest_difference"] == 18.0

    def fail(inputs: Any) -> Any:
        raise Internal("the model failed")

    assert plan.shadow.plan.runner is not None
    plan.shadow.plan.runner.run = fail  # type: ignore[method-assign]
    ShadowBatch(plan.shadow, state, columns, [], result.names, 2, (), result.values).run(engine.store)
    counts = shadows.describe(engine.models())[0]["shadow"]
    assert (counts["errors"], counts["batches"]) == (1, 1)
    assert "the model failed" in counts["last_error"]


# -- the commands ------------------------------------------------------------------------------------------------------


def cli(*arguments: str, code: int = 0) -> str:
    if code:
        return commands.error_of("models", *arguments, code=code)
    return commands.run_well("models", *arguments).out


def test_the_commands_say_which_version_answers_what(engine: st.Engine, file: Callable[..., Path]) -> None:
    store = ["--store", engine.store.path]
    two = str(file(2.0))
    about = ["--run", "mlflow:3f2a", "--metric", "auc=0.91", "--metric", "loss=2", "--owner", "fraud"]
    out = cli("deploy", "m", two, "--canary", "10%", *about, *store)
    assert out == "m version 2: answers 10% of the requests, version 1 the rest\n"
    listed = cli("list", *store)
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["m", "2"], ["m", "1*"]]
    assert "2 canary 10%" in listed
    shown = cli("show", "m", "--version", "2", *store)
    for line in ("owner:       fraud", "run:         mlflow:3f2a", "metrics:     auc 0.91, loss 2"):
        assert line in shown.splitlines()
    assert cli("canary", "m=0.5%", *store) == "m version 2: answers 0.5% of the requests, version 1 the rest\n"
    assert cli("canary", "m=off", *store) == "m: no canary; version 1 serves\n"
    out = cli("shadow", "m", "--version", "2", "--percent", "25%", *store, "--json")
    assert json.loads(out) == {"name": "m", "serving": 1, "shadow": {"version": 2, "percent": 25.0}}
    assert cli("promote", "m", *store) == "m version 2: serves (before: version 1)\n"
    assert cli("shadow", "m", "--off", *store) == "m: no shadow; version 2 serves\n"
    assert entry(engine).canary is None


def test_wrong_input_is_one_clear_line(engine: st.Engine, file: Callable[..., Path]) -> None:
    store = ["--store", engine.store.path]
    before = same_catalog(engine)
    wrong = [
        (["canary", "m"], 2, "write NAME=10% or NAME=off"),
        (["canary", "m=ten"], 2, "'ten' is not a share; write 10%, 0.5% or off"),
        (["canary", "m=120%"], 2, "'120%' is not a share"),
        (["canary", "m=10%"], 1, "no version newer than the current one"),
        (["shadow", "m"], 2, "give either --version N or --off"),
        (["promote", "m", "2", "--version", "3"], 2, "give the version once"),
        (["deploy", "m", str(file(2.0)), "--metric", "auc"], 2, "write --metric NAME=NUMBER"),
        (["deploy", "m", str(file(2.0)), "--run", "x"], 1, "run must be a link"),
    ]
    for arguments, code, message in wrong:
        assert message in cli(*arguments, *store, code=code)
    assert same_catalog(engine) == before


@pytest.mark.parametrize("command", ["canary", "shadow"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example:\n    shorttail models {command}" in cli(command, "--help")
