"""Exceptions that nobody foresaw: one line each, in the server's log."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections import Counter

from shorttail.monitor.logs import Format, line


def one_line(error: BaseException) -> str:
    """The type and the first line of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


class FaultLog:
    """Unforeseen exceptions, counted as they come and written to stderr later: the loop does not wait."""

    def __init__(self, form: Format = "text") -> None:
        self.form = form
        self.seen: Counter[str] = Counter()

    def __call__(self, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""  # noqa: PTH119
        if len(self.seen) < 100:  # a text that varies from call to call must not fill the memory
            self.seen[one_line(error) + place] += 1

    def write(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.seen:
            times = {text: f" ({n} times)" if n > 1 else "" for text, n in self.seen.items()}
            lines = [line(self.form, "error", text + more, {}) for text, more in times.items()]
            self.seen.clear()
            loop.run_in_executor(None, lambda: print("\n".join(lines), file=sys.stderr, flush=True))
