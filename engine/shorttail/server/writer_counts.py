"""What the writer counts for /metrics, in its region of the memory that all processes of a server share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from shorttail._native.metrics import METHODS, STAGES
from shorttail.errors import ShorttailError
from shorttail.observe.memory import WORD, WRITER, MetricsMemory
from shorttail.observe.tallies import WRITES
from shorttail.results import RowCount
from shorttail.store import Edit

Outcome = int | ShorttailError  # of a push or delete: its rows, or why nothing was written

PUSH: Final = METHODS.index("push")
TOTAL: Final = STAGES.index("total")


class WriterCounts:
    """The counters of the writer. They are up to date before the requests of a commit get their answers."""

    def __init__(self, memory: MetricsMemory):
        self._recorder = memory.claim(WRITER)
        self._tallies = memory.tallies()
        self._faults = 0

    def refused(self) -> None:
        """Count a request that was refused as it came."""
        self._recorder.add(WORD["writes_refused"], 1)

    def took(self, commit_ns: int) -> None:
        """Count a commit, which took so long."""
        self._recorder.stage(self._recorder.slot(PUSH, ""), TOTAL, commit_ns)

    def committed(self, edits: Sequence[Edit], outcomes: Sequence[Outcome]) -> None:
        """Count the rows of some edits by view: one update of the memory for each view, however many edits."""
        by_view: dict[str, list[int]] = defaultdict(lambda: [0] * len(WRITES.values))
        for edit, outcome in zip(edits, outcomes, strict=True):
            if isinstance(outcome, ShorttailError):
                continue
            rows = by_view[edit.view]
            if isinstance(outcome, RowCount):
                rows[0] += outcome.loaded
                rows[1] += outcome.older
                rows[2] += outcome.duplicate
            else:
                rows[3] += outcome
        for view, rows in by_view.items():
            self._tallies.add(WRITES, (view,), rows)

    def tick(self, queued_rows: int, queued_bytes: int, faults: int) -> None:
        """Set the gauges. faults: unexpected exceptions of this process so far."""
        self._recorder.put(WORD["queued_rows"], queued_rows)
        self._recorder.put(WORD["queued_bytes"], queued_bytes)
        self._recorder.add(WORD["unexpected_errors"], faults - self._faults)
        self._faults = faults
