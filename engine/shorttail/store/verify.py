"""`shorttail verify`: whether a store is sound, found out without trusting it.

A damaged file can kill the process that maps it (a page that is not there is SIGBUS), so all of it happens in a child,
checks.py, which reports as it goes. A store may be served and written to meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from shorttail.errors import Internal, ShorttailError, from_code
from shorttail.store.opening import check_directory, translated

Progress = Callable[[int, int | None], None]  # pages checked, pages in all

_OF_DAMAGE = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


@dataclass
class Report:
    """What verify() found. problems: one line each; notes: what is odd and does no harm.

    commit: the number of the commit whose tables were checked; None when none could be.
    """

    path: str
    commit: int | None = None
    tables: int = 0
    pages: int = 0
    rows: int = 0
    model_versions: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Check a store in full: the file, LMDB's structure, every page, every row by its key, the models' files.

    Raises NotFound or InvalidArgument when there is no store at all, and PermissionDenied; whatever else is wrong is in
    the report. Takes a process of its own and about a second for a million rows.
    """
    path = Path(path)
    with translated(path):
        if not (path / "data.mdb").is_file():
            check_directory(path, create=False)
    report = Report(str(path))
    command = [sys.executable, "-P", "-m", "shorttail.store.checks", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as child:
        try:
            assert child.stdout is not None
            doing, error = _hear(child.stdout, report, progress)
        except BaseException:
            child.kill()
            raise
        assert child.stderr is not None
        last_words = child.stderr.read().decode(errors="replace").strip().splitlines()
        code = child.wait()
    if error is not None:
        raise error
    if code < 0 and -code in _OF_DAMAGE:
        name = signal.Signals(-code).name
        report.problems.append(f"{doing}: reading it ended in {name}; the file or the disk is damaged")
    elif code:
        raise Internal(
            f"store '{path}': the check did not end well while it looked at {doing}: {_why(code, last_words)}"
        )
    return report


def _hear(lines: IO[bytes], report: Report, progress: Progress | None) -> tuple[str, ShorttailError | None]:
    """Enter what the child says in the report. Returns what it looked at last, and the error that it met."""
    doing, error = "the file", None
    for line in lines:
        kind, value = json.loads(line)
        if kind == "problem":
            report.problems.append(value)
        elif kind == "note":
            report.notes.append(value)
        elif kind == "doing":
            doing = value
        elif kind == "error":
            error = from_code(*value)
        elif kind == "progress":
            if progress is not None:
                progress(*value)
        else:
            setattr(report, kind, value)
    return doing, error


def _why(code: int, last_words: list[str]) -> str:
    if code < 0:
        return f"signal {-code}"
    return last_words[-1] if last_words else f"exit code {code}"


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "store": report.path,
        "ok": report.ok,
        "commit": report.commit,
        "tables": report.tables,
        "pages": report.pages,
        "rows": report.rows,
        "model_versions": report.model_versions,
        "problems": report.problems,
        "notes": report.notes,
    }
