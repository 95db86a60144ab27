"""`shorttail verify`: checks a whole store without trusting it.

A damaged file can kill the process that maps it (touching a missing page raises SIGBUS). So a child process, checks.py,
does all checks and reports while it runs. The store may be served and written meanwhile.
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
from shorttail.store.opening import check_directory, check_own_files, translate_errors

Progress = Callable[[int, int | None], None]  # receives (pages checked, pages in total)

_DAMAGE_SIGNALS = (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


@dataclass
class Report:
    """The result of verify(). problems: one line per defect. notes: one line per oddity that does no harm.

    commit: the number of the commit whose tables were checked, or None if no commit could be read.
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
        """Whether no problem was found."""
        return not self.problems


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Check a whole store: the file, LMDB's structure, every page, every row by its key, and the models' files.

    Damage is reported, not raised. Raises NotFound or InvalidArgument if there is no store, PermissionDenied, and
    Internal if the check itself failed. Starts a child process; takes about a second per million rows.
    """
    path = Path(path)
    with translate_errors(path):
        if not (path / "data.mdb").is_file():
            check_directory(path, create=False)
        check_own_files(path)
    report = Report(str(path))
    command = [sys.executable, "-P", "-m", "shorttail.store.checks", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as child:
        try:
            assert child.stdout is not None
            doing, error = _read_findings(child.stdout, report, progress)
        except BaseException:
            child.kill()
            raise
        assert child.stderr is not None
        last_words = child.stderr.read().decode(errors="replace").strip().splitlines()
        code = child.wait()
    if error is not None:
        raise error
    if code < 0 and -code in _DAMAGE_SIGNALS:
        name = signal.Signals(-code).name
        report.problems.append(f"{doing}: reading it ended in {name}; the file or the disk is damaged")
    elif code:
        raise Internal(f"store '{path}': the check of {doing} failed: {_exit_reason(code, last_words)}")
    return report


def _read_findings(lines: IO[bytes], report: Report, progress: Progress | None) -> tuple[str, ShorttailError | None]:
    """Enter the child's output in the report. Return what it checked last, and the error that it sent, if any."""
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


def _exit_reason(code: int, last_words: list[str]) -> str:
    """Return why the child ended, as text. code: its exit status. last_words: the lines of its stderr."""
    if code < 0:
        return f"signal {-code}"
    return last_words[-1] if last_words else f"exit code {code}"


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values for JSON."""
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
