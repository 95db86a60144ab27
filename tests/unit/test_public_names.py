"""Every public name is listed by `dir`, completes in a notebook, can be imported, and is seen by type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shorttail as st


def run(code: str) -> list[str]:
    """Run code in a new Python process, and return the words that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_public_name_is_listed_and_completes_before_it_is_imported() -> None:
    code = """
import rlcompleter, sys
import shorttail as st
assert "shorttail.engine" not in sys.modules
print(*sorted(set(st.__all__) - set(dir(st))))
complete = rlcompleter.Completer({"st": st}).complete
found = set()
while (match := complete("st.", len(found))) is not None:
    found.add(match.removeprefix("st.").rstrip("()"))
print(*sorted(set(st.__all__) - found))
"""
    assert run(code) == []


def test_every_public_name_is_imported_by_a_star_and_by_itself() -> None:
    names = run("import shorttail as st; print(*st.__all__)")
    assert len(names) == len(set(names)) > 25
    for name in names:
        assert getattr(st, name) is not None
    code = "from shorttail import *; print(*(name for name in list(globals()) if not name.startswith('_')))"
    assert sorted(run(code)) == sorted(names)
    run("; ".join(f"from shorttail import {name}" for name in names))


def test_type_checkers_see_every_public_name() -> None:
    """Type checkers read `__all__` and the imports, also under TYPE_CHECKING, and run no code."""
    path = Path(st.__file__)
    tree = ast.parse(path.read_text())
    imported = {
        name.asname or name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert set(st.__all__) <= imported
    assert (path.parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="module 'shorttail' has no attribute 'Egnine'"):
        st.Egnine  # noqa: B018
