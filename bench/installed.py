"""Print one line with the remedy if a script of bench/ or demo/ is started by a Python without a package it needs.

Every script imports this module before any other package. The benchmarks measure shorttail as it is installed; the
sources beside them cannot be imported, since their native code is not built in place.

ONNX Runtime's telemetry is off in these scripts and in the processes that they start.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught ModuleNotFoundError as one line with the remedy, and any other exception as Python does."""
    if isinstance(error, ModuleNotFoundError):
        remedy = "run `make demo` once, then start the script with .venv/bin/python (or: pip install '.[demo]')"
        print(f"error: {sys.executable} has no module {error.name!r}; {remedy}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say
