"""The server's log: one line an event on stderr, as text or as JSON, written off the loop and bounded in rate."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from shorttail.config import LIMITS

Format = Literal["text", "json"]
TRACEBACK_CHARS: Final = 4000  # the end of a traceback that a line of JSON has
TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")  # W3C Trace Context, level 1


def trace_ids(traceparent: str | None) -> dict[str, str]:
    """{"trace_id", "parent_id"} of a traceparent header; {} if there is none, or none that is valid."""
    found = TRACEPARENT.match(traceparent) if traceparent else None
    if found is None or traceparent is None or traceparent.startswith("ff") or not found[1].strip("0"):
        return {}
    more = traceparent[found.end() :]  # of versions to come, after another dash
    if not found[2].strip("0") or (more and (traceparent.startswith("00") or not more.startswith("-"))):
        return {}
    return {"trace_id": found[1], "parent_id": found[2]}


def line(form: Format, level: str, message: str, fields: Mapping[str, Any], time_s: float | None = None) -> str:
    """One line of the log, without its end."""
    if form == "text":
        more = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        return f"{level}: {message}" + (f" ({more})" if more else "")
    when = datetime.fromtimestamp(time.time() if time_s is None else time_s, UTC)
    document = {"time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "level": level}
    return json.dumps(document | {"message": message} | dict(fields), default=str)


def say(form: Format, level: str, message: str, **fields: Any) -> None:
    """Write a line now. As text it is what a person at the terminal reads: an error is named as such, fields go."""
    if form == "json":
        put(line(form, level, message, fields))
    else:
        put(f"error: {message}" if level == "error" else message)


def put(text: str, stream: TextIO | None = None) -> None:
    """Write lines to stderr in one piece, as other threads do. A stderr that is closed stops nobody."""
    stream = stream or sys.stderr
    with contextlib.suppress(OSError):
        stream.write(text + "\n")
        stream.flush()


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


class RequestLog:
    """Failed and slow requests of one worker: kept as they come, written later by `write`.

    failed: requests that fail are wanted. slow_us: and those that take longer; 0: none. No more than
    LIMITS.log_lines_per_s are kept, in bursts of as many; what is left out is counted and said.
    """

    def __init__(self, form: Format = "text", slow_us: float = 0.0, failed: bool = False, stream: TextIO | None = None):
        self.form = form
        self.failed = failed
        self.slow_ns = int(slow_us * 1000)
        self.stream = stream
        self.waiting: list[str] = []
        self.dropped = 0
        self.dropped_in_all = 0
        self._tokens = float(LIMITS.log_lines_per_s)
        self._filled_s = time.monotonic()

    def note(self, level: str, message: str, **fields: Any) -> None:
        """Keep a line, unless there are too many. fields: what is None or "" is left out."""
        now_s = time.monotonic()
        most = float(LIMITS.log_lines_per_s)
        self._tokens = min(most, self._tokens + (now_s - self._filled_s) * most)
        self._filled_s = now_s
        if self._tokens < 1.0:
            self.dropped += 1
            self.dropped_in_all += 1
            return
        self._tokens -= 1.0
        given = {name: value for name, value in fields.items() if value not in (None, "")}
        self.waiting.append(line(self.form, level, message, given))

    def write(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what was kept, in a thread: stderr may be a pipe that nobody empties."""
        if self.dropped:
            self.waiting.append(line(self.form, "warning", "log lines left out", {"lines": self.dropped}))
            self.dropped = 0
        if self.waiting:
            text = "\n".join(self.waiting)
            self.waiting.clear()
            loop.run_in_executor(None, put, text, self.stream)
