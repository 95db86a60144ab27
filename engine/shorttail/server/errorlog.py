"""The log of unexpected exceptions: those that are not ShorttailErrors, one line each."""

from __future__ import annotations

import asyncio
import os
import traceback
from collections import Counter

from shorttail.observe.logs import TRACEBACK_CHARS, Format, format_line, write_text


def one_line(error: BaseException) -> str:
    """The type and the first line of an exception, for a message of one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


class ErrorLog:
    """Counts unexpected exceptions and writes them to stderr later, so that the event loop never waits for stderr.

    Equal exceptions become one line with their number. In JSON the line holds the traceback of the first of them.
    """

    def __init__(self, form: Format = "text") -> None:
        self.form = form
        self.seen: Counter[str] = Counter()
        self.total = 0  # exceptions so far
        self._traces: dict[str, str] = {}

    def __call__(self, error: Exception) -> None:
        self.total += 1
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""  # noqa: PTH119
        if len(self.seen) < 100:  # texts that differ from call to call must not fill the memory
            text = one_line(error) + place
            self.seen[text] += 1
            if self.form == "json" and text not in self._traces:
                self._traces[text] = "".join(traceback.format_exception(error))[-TRACEBACK_CHARS:]

    def write(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.seen:
            times = {text: f" ({n} times)" if n > 1 else "" for text, n in self.seen.items()}
            lines = [format_line(self.form, "error", text + times[text], self._fields(text)) for text in times]
            self.seen.clear()
            self._traces.clear()
            loop.run_in_executor(None, write_text, "\n".join(lines))

    def _fields(self, text: str) -> dict[str, str]:
        return {"traceback": self._traces[text]} if text in self._traces else {}
