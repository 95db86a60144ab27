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
from shorttail.server.model_threads import PreparedBatch

SLICE_NS: Final = int(1e3 * LIMITS.loop_stall_us)
# For each ns in which other batches have run, batches in parts may run so long: a fifth of the time in all.
SHARE: Final = 0.25


class Slices:
    """Batches that run in parts. Those of several models take turns, one run each."""

    def __init__(self, router: Router):
        self.router = router
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
            error = None
            assert prepared.parts is not None
            try:
                prepared.parts.step()
            except Exception as failure:
                error = failure
            if error is not None or prepared.parts.is_done:
                prepared.answered(prepared, error)
                self.router.resume(prepared.batch.route)
            else:
                self.waiting.append(prepared)
            now_ns = time.perf_counter_ns()
            self.credit_ns -= now_ns - start_ns
            start_ns = now_ns
        if self.waiting:
            self.router.wake()
