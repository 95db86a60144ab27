"""The wheel of `make wheel` works in an empty environment: the quick start, and what `shorttail init` makes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from shorttail.cli.init import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "docs"))

from story import Story  # noqa: E402

QUICK_START = (ROOT / "docs" / "quickstart.md").read_text()

# The steps of the quick start with the client and with the embedded engine; there is no user 99999.
ASK = """
import re, signal, subprocess, sys
import shorttail as st

asked = {"user_id": [42, 43, 99999], "amount": 120.0}
row = {"user_id": [42], "age": [33.0], "txn_7d": [9], "tier": ["gold"]}
server = subprocess.Popen([sys.argv[1], "serve", "--store", "store", "--port", "0"], stdout=subprocess.PIPE, text=True)
try:
    address = re.search(r"serving on (\\S+)", server.stdout.readline())[1]
    with st.Client(address) as client:
        served = client.predict("fraud", asked, statuses=True)
        client.push("user_stats", row)
        pushed = client.get_online_features(["user_stats:age", "user_stats:tier"], {"user_id": 42}).to_dict()
    by_command = subprocess.run([sys.argv[1], "predict", "fraud", "user_id=42,43", "amount=120", "--server", address],
                                capture_output=True, text=True, check=True).stdout
finally:
    server.send_signal(signal.SIGTERM)
assert server.wait(30) == 0
with st.Engine.open("store") as engine:
    embedded = engine.predict("fraud", asked)
    engine.delete("user_stats", {"user_id": [43]})
assert served.outputs["probabilities"].shape == (3, 2)
assert (served.outputs["probabilities"][1] == embedded.outputs["probabilities"][1]).all()
assert served.statuses["user_stats"].tolist() == [0, 0, 2]
assert [value[0] for value in pushed.values()] == [33.0, "gold"]
assert by_command.startswith("fraud version 1\\n")
print(st.__file__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command and return its output. Its environment has nothing of this process or of a `make` around it."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "LD_PRELOAD", "MAKEFLAGS")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def example(containing: str) -> str:
    """Return the Python block of the quick start that contains this text."""
    (found,) = (block for block in re.findall(r"```python\n(.*?)```", QUICK_START, re.S) if containing in block)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run("make", "wheel", f"VENV={sys.prefix}", f"DIST={folder}", cwd=ROOT)
    (path,) = folder.iterdir()
    return path


def test_the_tag_of_the_wheel_is_manylinux(wheel: Path) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platforms = r"manylinux_2_\d+_(x86_64|aarch64)(\.manylinux\w+)*"
    assert re.fullmatch(rf"shorttail-[\d.]+-{python}-{python}-{platforms}\.whl", wheel.name)


def install(wheel: Path, home: Path, *packages: str) -> None:
    """Make an environment with these packages, of which shorttail is the wheel, without building any package."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]]))
    venv.create(home, with_pip=uv is None)
    python = home / "bin" / "python"
    command = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    named = [f"{name} @ {wheel.as_uri()}" if name.startswith("shorttail[") else name for name in packages]
    run(*command, "--quiet", "--only-binary", ":all:", *named, cwd=home)


def test_the_quick_start_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    install(wheel, home, "shorttail[arrow,numba]")
    run(sys.executable, "-c", example("skl2onnx"), cwd=tmp_path)  # writes the data and the model
    (tmp_path / "definitions.py").write_text(example("st.FeatureView("))
    (tmp_path / "ask.py").write_text(ASK)
    assert not any(shutil.which(compiler, path=str(home / "bin")) for compiler in ("cc", "gcc", "clang", "c++"))

    def here(program: str, *arguments: str) -> str:
        return run(home / "bin" / program, *arguments, cwd=tmp_path, PATH=str(home / "bin"), CC="/bin/false")

    assert re.search(
        r"\+ model fraud +version 1", here("shorttail", "apply", "definitions.py", "--store", "store", "--create")
    )
    assert re.match(r"user_stats: 1,000 rows ", here("shorttail", "materialize", "--store", "store"))
    assert str(home) in here("python", "ask.py", str(home / "bin" / "shorttail"))


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One environment for all templates, because the first import of a package in an environment takes long."""
    return tmp_path_factory.mktemp("growing") / "env"


# Each needs all that the one before it needs, so none finds more in that environment than its README says.
GROWING = ["blank", "churn", "ranking", "fraud"]


@pytest.mark.parametrize("template", GROWING)
def test_the_readme_of_a_template_runs_as_it_stands(
    wheel: Path, growing: Path, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its test passes, with what the README says to install and pytest."""
    home, made = growing, tmp_path / "made"
    readme = (ROOT / "engine" / "shorttail" / "templates" / template / "README.md").read_text()
    (packages,) = re.findall(r"`pip install (.+?)`", readme)
    install(wheel, home, *shlex.split(packages), "pytest")
    python = home / "bin" / "python"
    where = run(python, "-c", "import shorttail; print(*shorttail.__path__)", cwd=home).strip()
    run(python, "-m", "compileall", "-q", f"{where}/templates", cwd=home)  # as pip does when it installs

    run(home / "bin" / "shorttail", "init", "made", "--template", template, cwd=tmp_path)
    assert not (made / "__pycache__").exists()
    monkeypatch.chdir(made)
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    Story(made / "README.md", made).run()
    run(python, "-m", "pytest", "-q", "-W", "error", cwd=made)


def test_all_templates_run() -> None:
    assert sorted(GROWING) == sorted(TEMPLATES)
