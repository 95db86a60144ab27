"""`shorttail init`: what it makes and says, and what it refuses. tests/e2e/test_wheel.py runs what it makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest

from shorttail.cli.init import TEMPLATES

SOURCES = Path(__file__).resolve().parents[2] / "engine" / "shorttail" / "templates"


def content(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of the files in a folder, which has no folders but those of compiled files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "__pycache__"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_template_has_a_folder() -> None:
    assert {path.name for path in SOURCES.iterdir()} == set(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
def test_init_copies_the_template(template: str, tmp_path: Path) -> None:
    commands.run_well("init", "made", "--template", template, folder=tmp_path)
    assert content(tmp_path / "made") == content(SOURCES / template)


def test_init_says_what_it_made_and_the_next_command(tmp_path: Path) -> None:
    assert commands.run_well("init", "my churn", folder=tmp_path).out == (
        "my churn: README.md, definitions.py, make_data.py, test_answers.py, train.py (template churn)\n"
        "next: cd 'my churn' && python train.py\n"
    )
    assert commands.run_well("init", "empty", "--template", "blank", folder=tmp_path).out == (
        "empty: README.md, definitions.py, make_data.py, test_answers.py (template blank)\n"
        "next: cd empty && python make_data.py\n"
    )


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    commands.run_well("init", ".", folder=tmp_path)
    assert content(tmp_path) == content(SOURCES / "churn")


@pytest.mark.parametrize(
    ("name", "template"), [("fraud", "fraud"), ("./ranking", "ranking"), ("payments", "churn"), ("churn-2", "churn")]
)
def test_a_folder_named_as_a_template_gets_it(name: str, template: str, tmp_path: Path) -> None:
    assert commands.run_well("init", name, folder=tmp_path).out.splitlines()[0].endswith(f" (template {template})")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_readme_has_five_commands(template: str) -> None:
    _, five, rest = re.split(
        r"^## .*\n", (SOURCES / template / "README.md").read_text(), maxsplit=2, flags=re.MULTILINE
    )
    assert len(re.findall(r"^\$ ", five, re.MULTILINE)) == 5
    assert re.findall(r"^\d+(?=\.)", five, re.MULTILINE) == list("12345")
    assert re.search(r"^\$ ", rest, re.MULTILINE)


@pytest.mark.parametrize(("template", "script", "missing"), [
    ("churn", "train.py", "sklearn"),
    ("churn", "train.py", "pyarrow"),
    ("fraud", "train.py", "skl2onnx"),
    ("ranking", "train.py", "pandas"),
    ("blank", "make_data.py", "pyarrow"),
])  # fmt: skip
def test_a_script_says_what_to_install(template: str, script: str, missing: str, tmp_path: Path) -> None:
    commands.run_well("init", "made", "--template", template, folder=tmp_path)
    program = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "made", capture_output=True, text=True, timeout=60
    )
    found = re.fullmatch(r"error: (\w+)[\w.]* is missing; run: (pip install .+)\n", done.stderr)
    assert found, done.stderr
    assert (done.returncode, found[1]) == (1, missing)
    assert f"`{found[2]}`" in (tmp_path / "made" / "README.md").read_text()
    assert not (tmp_path / "made" / "data").exists()


NO_NAME = "is not the name of a folder; write for example: shorttail init churn"
REFUSED = {
    "a folder that is not empty": ("full", "full: the folder is not empty; choose another name"),
    "a file": ("file", "file: the folder cannot be made: File exists"),
    "a link to nothing": ("link", "link: the folder cannot be made: File exists"),
    "a folder in no folder": ("no/where", "no/where: the folder cannot be made: No such file or directory"),
    "a folder in a file": ("file/made", "file/made: the folder cannot be made: Not a directory"),
    "a name that is too long": ("a" * 300, f"{'a' * 300}: the folder cannot be made: File name too long"),
    "no name": ("", f"'' {NO_NAME}"),
    "what cd takes for an option": ("-", f"'-' {NO_NAME}"),
    "a line break": ("a\nb", f"'a\\nb' {NO_NAME}"),
    "a null byte": ("a\0b", f"'a\\x00b' {NO_NAME}"),
    "bytes that are no text": ("a\udcff", f"'a\\udcff' {NO_NAME}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_name_changes_nothing(case: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("nothing")
    name, message = REFUSED[case]
    assert commands.error_of("init", name, folder=tmp_path) == f"error: {message}\n"
    assert names(tmp_path) == ["file", "full", "link"]
    assert content(tmp_path / "full") == {"notes": b"kept"}


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    error = commands.error_of("init", "made", "--template", "frau", code=2, folder=tmp_path)
    assert "'frau' is not one of 'churn', 'fraud', 'ranking', 'blank'" in error
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["made", "empty"])
def test_a_folder_that_cannot_be_written_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    """The system refuses files of more than 1,000 bytes here."""
    (tmp_path / "empty").mkdir()
    program = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.argv = ["shorttail", "init", {name!r}]
from shorttail.cli import main
main()
"""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, f"error: {name}: the folder cannot be made: File too large\n")
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []
