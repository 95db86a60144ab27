"""Imports each file of bench/ in its own process, and runs the scripts with --help, for test_bench_scripts.py.

Reads JSON: {"paths": {path: folders added to sys.path}, "scripts": paths with --help, "foreign": packages}. Prints the
result for each path as JSON: {"error": a traceback or "", "did": audit events, "printed": output of the import, "help":
text}. A package of `foreign` that is not installed is replaced by a stub whose names do nothing.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import multiprocessing
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# These imports take most of the time, so do them once, before forking.
import numpy  # noqa: F401
import onnxruntime  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401

ACTS = ("subprocess.Popen", "os.fork", "os.exec", "os.posix_spawn", "os.mkdir", "socket.bind", "socket.connect")


class Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Foreign(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def attempt(path: str, folders: list[str], has_help: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"error": "", "did": [], "help": ""}
    sys.path[:1] = [str(Path(path).parent), *folders]
    sys.addaudithook(lambda event, _: found["did"].append(event) if event in ACTS else None)
    try:
        found["printed"], namespace = printed_by(lambda: runpy.run_path(path, run_name="imported"))
        if has_help:
            sys.argv = [path, "--help"]
            found["help"], _ = printed_by(namespace["main"])
    except BaseException:
        found["error"] = traceback.format_exc()
    return found


def printed_by(call: Callable[[], Any]) -> tuple[str, Any]:
    """Return the output and the result of a function; the result is None if it exits with success."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            returned = call()
        except SystemExit as end:
            if end.code:
                raise
            returned = None
    return printed.getvalue(), returned


def main() -> None:
    asked = json.load(sys.stdin)
    sys.meta_path.append(Foreign(asked["foreign"]))
    tasks = [(path, folders, path in asked["scripts"]) for path, folders in asked["paths"].items()]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(attempt, tasks, chunksize=1)
    print(json.dumps(dict(zip(asked["paths"], found, strict=True))))


if __name__ == "__main__":
    main()
