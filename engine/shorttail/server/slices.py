"""Runs batches in parts on the event loop, in slices of time, so that other models keep most of the loop.

A thread would have to take the GIL from the loop after each run, and for runs of some microseconds that takes longer
than the run. Batches whose runs take milliseconds do go to threads (model_threads.py).
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from shorttail._native.wire import Router
from shorttail.config import LIMITS
from shorttail.models.session import RunTimedOut
from shorttail.server.model_threads import ModelThreads, PreparedBatch

SLICE_NS: Final = int(1e3 * LIMITS.loop_stall_us)
# For each ns in which other batches have run, batches in parts may run so long: a fifth of the time in all.
SHARE: Final = 0.25


class Slices:
    """Batches that run in parts. Those of several models take turns, one run each.

    threads: takes over a batch whose run turns out to be too long for the loop.
    """

    def __init__(self, router: Router, threads: ModelThreads):
        self.router = router
        self.threads = threads
        self.waiting: deque[PreparedBatch] = deque()
        self.credit_ns = 0.0  # time to run in; below 0: others run first

    def put(self, prepared: PreparedBatch) -> None:
        prepared.batch.leave_loop()
        if prepared.begin():
            self.waiting.append(prepared)
            self.router.wake()
        else:
            self.router.resume(prepared.batch.route)

    def run(self, others_ns: int) -> None:
        """Run for a slice of time. others_ns: how long other batches ran in this turn; 0: the loop was free."""
        if others_ns:
            self.credit_ns = min(self.credit_ns + SHARE * others_ns, SLICE_NS)
        else:
            self.credit_ns = SLICE_NS
        start_ns = time.perf_counter_ns()
        while self.waiting and self.credit_ns > 0:
            prepared = self.waiting.popleft()
            if not self.step(prepared):
                self.waiting.append(prepared)
            now_ns = time.perf_counter_ns()
            self.credit_ns -= now_ns - start_ns
            start_ns = now_ns
        if self.waiting:
            self.router.wake()

    def step(self, prepared: PreparedBatch) -> bool:
        """Make one run of a batch. Returns True if it was the last run on the loop."""
        error = None
        try:
            if not prepared.step():
                return False
        except RunTimedOut:
            prepared.runner.note_slow(ended=True)
            self.threads.go_on(prepared)
            return True
        except Exception as failure:
            error = failure
        prepared.batch.took(prepared.run_ns)
        prepared.answered(prepared, error)
        self.router.resume(prepared.batch.route)
        return True
