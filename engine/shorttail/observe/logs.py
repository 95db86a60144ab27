"""The server's log: one line per event on stderr, as text or JSON.

Lines about requests are limited in rate and written outside the event loop.
"""

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
from shorttail.errors import printable

Format = Literal["text", "json"]
TRACEBACK_CHARS: Final = 4000  # a JSON line holds at most this much of the end of a traceback
TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")  # W3C Trace Context, level 1


def trace_ids(traceparent: str | None) -> dict[str, str]:
    """Return {"trace_id", "parent_id"} of a traceparent header; {} if it is missing or invalid."""
    found = TRACEPARENT.match(traceparent) if traceparent else None
    if found is None or traceparent is None or traceparent.startswith("ff") or not found[1].strip("0"):
        return {}
    more = traceparent[found.end() :]  # later versions may append fields after another dash
    if not found[2].strip("0") or (more and (traceparent.startswith("00") or not more.startswith("-"))):
        return {}
    return {"trace_id": found[1], "parent_id": found[2]}


def format_line(form: Format, level: str, message: str, fields: Mapping[str, Any], time_s: float | None = None) -> str:
    """Return one line of the log, without a newline. time_s: seconds since 1970 UTC; None is now."""
    if form == "text":
        more = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        return f"{level}: {printable(message)}" + (f" ({more})" if more else "")
    when = datetime.fromtimestamp(time.time() if time_s is None else time_s, UTC)
    document = {"time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "level": level}
    return json.dumps(document | {"message": message} | dict(fields), default=str)


def log_now(form: Format, level: str, message: str, **fields: Any) -> None:
    """Write a line immediately. In text form it is for a person: errors get a prefix and fields are left out."""
    if form == "json":
        write_text(format_line(form, level, message, fields))
    else:
        write_text(f"error: {message}" if level == "error" else message)


def write_text(text: str, stream: TextIO | None = None) -> None:
    """Write text and a newline in one piece, so that lines of threads do not mix. stream: stderr if it is None.

    Ignores OSError: a full disk under the log must not stop a server.
    """
    stream = stream or sys.stderr
    with contextlib.suppress(OSError):
        stream.write(text + "\n")
        stream.flush()


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


class Seldom:
    """Limits lines of one kind to one in LIMITS.repeated_line_s, and adds up what the others would have said."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._untold = 0

    def count(self, n: int) -> int:
        """Note n more events, 0 or more. Returns the events to tell in a line now; 0: write no line now."""
        self._untold += n
        if not self._untold or time.monotonic() < self._next_s:
            return 0
        self._next_s = time.monotonic() + LIMITS.repeated_line_s
        told, self._untold = self._untold, 0
        return told


class RequestLog:
    """The log of failed and slow requests of one worker. note() keeps lines in memory; write() writes them.

    failed: log failed requests. slow_us: log requests that take longer; 0 logs none. At most LIMITS.log_lines_per_s
    lines are kept per second, in bursts of up to that many. Other lines are only counted, and the count is logged.
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
        """Keep a line for write(); above the rate limit only count it. Fields that are None or "" are omitted."""
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
        self.waiting.append(format_line(self.form, level, message, given))

    def write(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write the kept lines in a thread, because a write to a full pipe on stderr would block the event loop."""
        if self.dropped:
            self.waiting.append(format_line(self.form, "warning", "log lines left out", {"lines": self.dropped}))
            self.dropped = 0
        if self.waiting:
            text = "\n".join(self.waiting)
            self.waiting.clear()
            loop.run_in_executor(None, write_text, text, self.stream)
