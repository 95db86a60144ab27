"""Importing a file of bench/ does nothing, each script has a --help, and the fast scripts run with --quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from numbers import Real
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
OWN = sorted([*BENCH.glob("*.py"), *BENCH.glob("micro/*.py")])
SCRIPTS = [path for path in OWN if "__main__" in path.read_text()]
PEERS = sorted(BENCH.glob("peers/**/*.py"))
WITHOUT_FIGURES = ["benchmarks_page.py"]  # it measures nothing
# With --quick these take 4 to 6 s of CPU time; the next, gpu.py and micro/ondemand.py, take 12, most others 30 to 60.
QUICK = ["micro/lookup.py", "micro/predict.py"]
# Peers run in their own environments, with these packages.
FOREIGN = [
    *("bentoml", "fastapi", "feast", "litserve", "mlserver", "mosec", "pytriton", "ray", "redis", "rocksdict"),
    *("starlette", "triton_python_backend_utils", "uvicorn"),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(BENCH))


@pytest.fixture(scope="module")
def imported() -> dict[str, dict[str, Any]]:
    """The result of importing.py for each file."""
    paths: dict[str, list[str]] = {str(path): [] for path in [*OWN, *PEERS]}
    paths[str(BENCH / "peers" / "rayserve" / "replica.py")] = [str(BENCH / "peers")]  # as serve.py beside it starts it
    asked = {"paths": paths, "scripts": list(map(str, SCRIPTS)), "foreign": FOREIGN}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("importing.py"))],
        input=json.dumps(asked),
        env={**os.environ, "PEER_WORKERS": "1"},  # as bentoml/serve.py tells it to bentoml/service.py
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name_of(Path(path)): found for path, found in json.loads(done.stdout).items()}


def test_the_scripts_are_found() -> None:
    assert {"serve.py", "micro/lookup.py", "compare.py"} <= set(map(name_of, SCRIPTS))
    assert {"peers/scorer.py", "peers/sqlite/local.py"} <= set(map(name_of, PEERS))


@pytest.mark.parametrize("name", [name_of(path) for path in [*OWN, *PEERS]])
def test_importing_a_script_does_nothing(name: str, imported: dict[str, dict[str, Any]]) -> None:
    found = imported[name]
    assert not found["error"], found["error"]
    assert (found["did"], found["printed"]) == ([], "")


@pytest.mark.parametrize("name", [name_of(path) for path in SCRIPTS])
def test_it_says_how_it_is_used(name: str, imported: dict[str, dict[str, Any]]) -> None:
    usage = imported[name]["help"].partition("\n\n")[0]
    assert usage.startswith(f"usage: {Path(name).name} ")
    for option in ("[--json]", "[--quick]"):
        assert (option in usage) != (name in WITHOUT_FIGURES)


@pytest.mark.parametrize("name", QUICK)
def test_a_fast_script_prints_what_it_measured(name: str) -> None:
    document: dict[str, Any] = json.loads(run(BENCH / name, "--quick", "--json").stdout)
    assert set(document) == {"machine", "commit", "figures", "bars"}
    assert document["machine"]["cpus"] > 0
    assert document["figures"]
    assert document["bars"]
    for bar in document["bars"]:
        assert set(bar) == {"bar", "value", "limit", "unit", "ok"}
        assert isinstance(bar["value"], Real), bar
        assert isinstance(bar["limit"], Real), bar
        assert isinstance(bar["ok"], bool), bar


def test_the_benchmarks_page_matches_the_results() -> None:
    run(BENCH / "benchmarks_page.py", "--check")


@pytest.mark.parametrize("name", ["serve.py", "micro/lookup.py", "peers/shorttail_embedded/local.py", "../demo/run.py"])
def test_a_python_without_the_package_says_what_to_do(name: str) -> None:
    """The option -S hides the installed packages."""
    (line,) = run("-S", BENCH / name, code=1).stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no module ")
    assert "make demo" in line


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done
