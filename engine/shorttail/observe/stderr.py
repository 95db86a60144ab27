"""Makes every line on stderr a JSON object under `--log json`, including lines that other code writes.

log_as_json() turns the output of Python code (uncaught exceptions, warnings, log records of libraries) into JSON lines
with tracebacks. Native libraries and a crashing interpreter write to stderr directly; the supervisor reads the stderr
of its children and converts these lines: relay().
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from types import TracebackType
from typing import IO, Final

from shorttail.observe.logs import TRACEBACK_CHARS, Format, format_line, write_text


class _Handler(logging.Handler):
    """Writes log records as JSON lines."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)[-TRACEBACK_CHARS:]
        write_text(format_line("json", record.levelname.lower(), record.getMessage(), fields))


def log_as_json(form: Format) -> None:
    """If form is "json", write uncaught exceptions, warnings and log records of this process as JSON lines."""
    if form != "json":
        return
    logging.basicConfig(handlers=[_Handler()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    log = logging.getLogger("shorttail")

    def ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))

    def thread_ended(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            ended(args.exc_type, args.exc_value, args.exc_traceback)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is not None:
            log.error("%s", args.err_msg or "exception ignored", exc_info=args.exc_value)

    sys.excepthook = ended
    threading.excepthook = thread_ended
    sys.unraisablehook = unraisable


RAW_LINE_BYTES: Final = 65_536  # longer lines are split


def relay(source: IO[bytes], process: str) -> threading.Thread:
    """Start a thread that copies a child's stderr to this process's stderr until the child closes it.

    source: the read end of the child's stderr. process: the child's name, for the log. JSON lines are copied as they
    are; other lines become the message of a JSON line.
    """
    thread = threading.Thread(target=_relay, args=(source, process), name=f"stderr of {process}", daemon=True)
    thread.start()
    return thread


def _relay(source: IO[bytes], process: str) -> None:
    with source:
        while written := source.readline(RAW_LINE_BYTES):
            text = written.decode(errors="replace").rstrip()
            if not text:
                continue
            if not _is_object(text):
                text = format_line("json", "warning", text, {"process": process})
            write_text(text)


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except ValueError:
        return False
