"""Run the `shorttail` command in this process, where starting Python would take longer than most commands do."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from shorttail.cli import main


@dataclass
class Result:
    """What a command left behind: its exit code, and all that it wrote to stdout and to stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: str, folder: Path | None = None) -> Result:
    """`shorttail ARGUMENTS`, started in that folder, or in the present one. Not for `serve`, which wants a process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder or Path.cwd()),
        mock.patch.object(sys, "argv", ["shorttail", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def run_well(*arguments: str, folder: Path | None = None) -> Result:
    """The same, of a command that has to succeed and to write nothing to stderr."""
    result = run(*arguments, folder=folder)
    assert (result.code, result.err) == (0, ""), result
    return result


def error_of(*arguments: str, code: int = 1, folder: Path | None = None) -> str:
    """The line `error: ...` of a command that has to fail with that exit code."""
    result = run(*arguments, folder=folder)
    assert result.code == code, result
    assert re.fullmatch(r"error: .+\n", result.err), result.err
    return result.err
