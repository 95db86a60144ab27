"""The on-demand functions of a store are Python source: they are announced before they run here, or do not run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import pytest
from bad_models import sound

import shorttail as st
from shorttail.define.catalog import Share
from shorttail.define.ondemand import OnDemand, OnDemandFeature
from shorttail.errors import Unavailable
from shorttail.ondemand import compile as compiler
from shorttail.ondemand import trust
from shorttail.registry.versions import deploy

pytest.importorskip("numba")

NEW = "model 'm': the store holds Python code that has not run here before, and runs now: on-demand functions twice"
REFUSED = r"model 'm' needs the on-demand functions of the store \(twice\), and the store was opened without code"


@st.on_demand
def twice(x: st.Float64) -> st.Float32:  # type: ignore[valid-type]
    return 2.0 * x


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a view and two models, of which m has a function."""
    user = st.Entity("user", keys={"user_id": st.Int64})
    view = st.FeatureView("stats", entity=user, features=[st.Feature("age", st.Float32)])
    path = sound(tmp_path / "m.onnx")
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view, st.Model("m", path, [twice("request:a")]), st.Model("plain", path, ["stats:age"])])
        engine.push("stats", {"user_id": [1], "age": [0.0]})
    return tmp_path / "store"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is on another machine from now on, whose user has run none of the code. Returns the cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("SHORTTAIL_CACHE_DIR", str(cache))
    monkeypatch.setattr(trust, "_known", set())
    return cache


def plant_source(store: Path, source: str) -> None:
    """Replace the source of the function in the catalog, as somebody who can write the store may do."""
    with st.Engine.open(store) as engine, engine.store.edit_catalog() as catalog:
        entry = catalog.model("m")
        function = OnDemand(twice.name, twice.params, twice.returns, source)
        inputs = (OnDemandFeature(function, ("request:a",)),)
        info = replace(entry.version(), model=replace(entry.model, inputs=inputs))
        catalog.models["m"] = entry.with_version(1, info)


def test_code_of_ones_own_is_not_announced(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with st.Engine.open(store) as engine:
        assert engine.predict("m", {"a": 0.0}).outputs["y"].tolist() == [[0.5]]
    assert caplog.text == ""


def test_code_from_elsewhere_is_announced_once(
    store: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with st.Engine.open(store) as engine:
            engine.predict("plain", {"user_id": 1})
            engine.predict("m", {"a": 0.0})
        monkeypatch.setattr(trust, "_known", set())  # as in another process
    assert [record.message for record in caplog.records] == [f"{NEW} (--no-code, or code=False, runs none)"]
    assert caplog.records[0].levelno == logging.WARNING


def test_code_that_changed_is_announced_again_and_before_it_runs(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ran = tmp_path / "ran"
    plant_source(store, f"open({str(ran)!r}, 'w').close()\ndef twice(x):\n    return 2.0 * x\n")
    seen: list[bool] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(ran.exists())  # type: ignore[method-assign]
    trust.log.addHandler(handler)
    try:
        with st.Engine.open(store) as engine:
            engine.predict("m", {"a": 0.0})
    finally:
        trust.log.removeHandler(handler)
    assert NEW in caplog.text
    assert seen == [False]
    assert ran.exists(), "whoever can write a store can run code"


def test_without_code_nothing_of_it_runs(store: Path, tmp_path: Path, elsewhere: Path) -> None:
    ran = tmp_path / "ran"
    plant_source(store, f"open({str(ran)!r}, 'w').close()\ndef twice(x):\n    return 2.0 * x\n")
    with st.Engine.open(store, code=False) as engine:
        for _ in range(2):
            with pytest.raises(Unavailable, match=REFUSED):
                engine.predict("m", {"a": 0.0})
        assert engine.predict("plain", {"user_id": 1}).outputs["y"].tolist() == [[0.5]]
        assert engine.get_online_features(["stats:age"], {"user_id": 1}).to_dict() == {"stats:age": [0.0]}
        assert list(engine.unavailable()) == ["m"]
        engine.push("stats", {"user_id": [2], "age": [1.0]})
    assert not ran.exists()
    assert not elsewhere.exists(), "nor is anything cached"


def test_code_that_is_cached_does_not_run_either(store: Path) -> None:
    with st.Engine.open(store) as engine:
        engine.predict("m", {"a": 0.0})
    with st.Engine.open(store, code=False) as engine, pytest.raises(Unavailable, match=REFUSED):
        engine.predict("m", {"a": 0.0})


def test_an_examples_file_is_put_together_without_code_or_not_at_all(store: Path, tmp_path: Path) -> None:
    (tmp_path / "examples.csv").write_text("a,y\n0.0,0.5\n")
    path = sound(tmp_path / "new.onnx")
    Path(path).write_bytes(Path(path).read_bytes() + b"\x28\x02")  # model_version
    with st.Engine.open(store, code=False) as engine:
        with pytest.raises(Unavailable, match=REFUSED):
            deploy(engine.store, "m", path, examples=tmp_path / "examples.csv")
        assert deploy(engine.store, "m", path) == 2, "without examples no code is needed"


def test_versions_are_tried_and_promoted_without_code(store: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    plant_source(store, f"open({str(ran)!r}, 'w').close()\ndef twice(x):\n    return 2.0 * x\n")
    path = sound(tmp_path / "new.onnx")
    Path(path).write_bytes(Path(path).read_bytes() + b"\x28\x02")
    for command in (
        ("deploy", "m", path, "--no-promote"),
        ("promote", "m", "2"),
        ("rollback", "m"),
        ("shadow", "m", "--version", "2"),
        ("list",),
    ):
        commands.run_well("models", *command, "--store", str(store))
    assert not ran.exists()


def test_a_shadow_that_needs_code_does_not_stop_the_version_that_serves(store: Path, tmp_path: Path) -> None:
    with st.Engine.open(store, code=False) as engine:
        path = sound(tmp_path / "m.onnx")
        engine.apply([st.Model("m", path, ["request:a"])])
        with engine.store.edit_catalog() as catalog:
            catalog.models["m"] = replace(catalog.model("m"), shadow=Share(1, 100.0))
        assert engine.predict("m", {"a": 0.0}).version == 2


def test_a_function_that_does_not_compile_is_compiled_once(
    store: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes its model unavailable, and no further request pays for the attempt."""
    plant_source(store, "def twice(x):\n    return x.no_such_thing\n")
    tried: list[OnDemand] = []
    compile_it = compiler.machine_code
    monkeypatch.setattr(
        compiler, "machine_code", lambda function, *rest: tried.append(function) or compile_it(function, *rest)
    )
    with st.Engine.open(store) as engine:
        for _ in range(3):
            with pytest.raises(Unavailable, match=r"model 'm' version 1: on-demand function 'twice'"):
                engine.predict("m", {"a": 0.0})
        assert list(engine.unavailable()) == ["m"]
        assert engine.predict("plain", {"user_id": 1}).version == 1
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("predict", "m", "a=0"), "error: model 'm' needs the on-demand functions of the store (twice), and"),
        (("models", "show", "m"), "error: model 'm' needs the on-demand functions of the store (twice), and"),
    ],
)
def test_commands(store: Path, command: tuple[str, ...], error: str) -> None:
    done = commands.run(*command, "--store", str(store), "--no-code")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(error)
    assert commands.run_well(*command, "--store", str(store)).out


def test_serve(store: Path, elsewhere: Path, tmp_path: Path) -> None:
    def check(*options: str) -> Any:
        command = [sys.executable, "-m", "shorttail", "serve", "--store", str(store), "--check", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)

    done = check("--no-code")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model 'm' needs the on-demand functions of the store (twice), and the store")
    assert done.stderr.count("\n") == 1
    first, second = check(), check()
    assert first.returncode == second.returncode == 0
    assert first.stderr.startswith(NEW)
    assert first.stderr.count("\n") == 1
    assert second.stderr == ""


def make_writable(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def make_link(cache: Path) -> None:
    theirs = cache.with_name("theirs")
    theirs.mkdir(mode=0o700)
    cache.symlink_to(theirs)


@pytest.mark.parametrize("make", [make_writable, make_link])
def test_a_cache_that_others_can_write_is_not_believed(
    store: Path, elsewhere: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make(elsewhere)
    (elsewhere / f"{trust.digest(twice)}.known").touch()
    with st.Engine.open(store) as engine:
        engine.predict("m", {"a": 0.0})
    assert NEW in caplog.text
