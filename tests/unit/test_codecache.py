"""Compiled functions are cached for the next start, in a directory that only this user can write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shorttail.ondemand import codecache
from shorttail.ondemand import compile as transforms

pytest.importorskip("numba")

CHILD = r"""
import sys, numpy as np
from shorttail.define.ondemand import OnDemand
from shorttail.define.dtypes import Float64
from shorttail.ondemand.compile import compile_on_demand
from shorttail._native.transforms import TransformProgram
f = OnDemand("half", (("x", Float64),), Float64, "def half(x):\n    return math.sin(x) / 2.0\n")
out = [np.ones(3), np.zeros(3)]
TransformProgram([(compile_on_demand(f), [(0, float, 1)], (1, float, 1, 0))]).run(out, 3)
assert np.allclose(out[1], np.sin(1) / 2), out
print("compiled" if "numba" in sys.modules else "loaded")
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"SHORTTAIL_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.strip()


def test_a_second_start_needs_no_numba_and_parallel_starts_work(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    together = [start(cache), start(cache)]
    for process in together:
        outcome(process)
    assert (cache.stat().st_mode & 0o777) == 0o700
    (stored,) = cache.iterdir()
    assert outcome(start(cache)) == "loaded"
    data = stored.read_bytes()
    stored.write_bytes(data[:-9] + b"123456789")
    assert outcome(start(cache)) == "compiled"
    assert stored.read_bytes() == data


@pytest.mark.parametrize("kind", ["a file", "a link", "open to others", "cannot be made"])
def test_a_cache_that_is_not_private_is_not_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    if kind == "a file":
        path.write_text("")
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "open to others":
        path.mkdir()
        path.chmod(0o777)
    else:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "cache"
    monkeypatch.setenv("SHORTTAIL_CACHE_DIR", str(path))
    codecache.store("ab", b"code")
    assert codecache.load("ab") is None


def test_the_cache_returns_exactly_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTTAIL_CACHE_DIR", str(tmp_path / "cache"))
    codecache.store("ab", b"code")
    codecache.store("ab", b"newer")
    assert (codecache.load("ab"), codecache.load("cd")) == (b"newer", None)
    file = tmp_path / "cache" / "ab.code"
    file.chmod(0o666)
    assert codecache.load("ab") is None
    file.chmod(0o600)
    for data in (b"", b"x" * 100, codecache.MAGIC, file.read_bytes()[:-1]):
        file.write_bytes(data)
        assert codecache.load("ab") is None


def test_code_with_an_undefined_symbol_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "undefined_symbols", lambda code: ["no_such_symbol"])
    with pytest.raises(transforms.NotLoadable, match="no_such_symbol"):
        transforms.load_object(b"", "x")
