"""Under `--log json` every line on stderr is a JSON object: also those that others write.

What a process's own interpreter would print (exceptions that end it, warnings, what libraries log) becomes a line with
its traceback by `everything`. What comes by no such way (a native library, the last words of an interpreter that dies)
is read from the process's stderr by its supervisor: `relay`.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from types import TracebackType
from typing import IO, Final

from shorttail.observe.logs import TRACEBACK_CHARS, Format, line, put


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)[-TRACEBACK_CHARS:]
        put(line("json", record.levelname.lower(), record.getMessage(), fields))


def everything(form: Format) -> None:
    """Have this process write JSON lines, if form is "json": exceptions, warnings, and what libraries log."""
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


RAW_LINE_BYTES: Final = 65_536  # what is longer is cut in pieces


def relay(source: IO[bytes], process: str) -> threading.Thread:
    """Pass on to stderr what a child writes to its own, until it ends: lines of JSON as they are, others made such."""
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
                text = line("json", "warning", text, {"process": process})
            put(text)


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except ValueError:
        return False
