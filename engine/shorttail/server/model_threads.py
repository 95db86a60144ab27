"""Runs batches in threads: models that are too slow for the event loop, and batches that have to run in parts.

All methods are called in the loop's thread, except `end`, which the model's thread calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from shorttail import pipeline
from shorttail._native.wire import Router, WireRoute
from shorttail.config import LIMITS
from shorttail.models.load import Runner
from shorttail.models.request_runs import BadShare, PartRun
from shorttail.models.session import ModelFailed
from shorttail.pipeline import BatchResult
from shorttail.server.runnable import Runnable
from shorttail.server.shadow import ShadowBatch

# After a turn in which no model ran in the loop, the loop rests REST_TURNS times as long as that turn took, at most
# REST_MAX_S. It then finds many requests in each socket, and the models have the CPU meanwhile.
REST_TURNS: Final = 4
REST_MAX_S: Final = 0.001


def bad_share(route: WireRoute, runner: Runner) -> BadShare:
    """Return the estimate of the share of bad requests of a route, and make it at the first call."""
    return route.bad or route.estimate_bad(BadShare(runner))


@dataclass(slots=True)
class PreparedBatch:
    """A batch whose features are looked up and transformed: only its model has not run.

    answered: called in the loop's thread when the model has run, with the exception that it raised, or None. in_parts:
    a few requests run at a time. failed: a run of all requests has failed. parts: makes the runs of a batch in parts,
    once it begins to run. run_ns: how long they took so far, on the event loop.
    """

    batch: Runnable
    runner: Runner
    result: BatchResult
    shadowed: ShadowBatch | None
    answered: Callable[[PreparedBatch, BaseException | None], object]
    in_parts: bool = False
    failed: bool = False
    parts: PartRun | None = None
    run_ns: int = 0

    @property
    def lane(self) -> Hashable:
        """Batches of one lane run one after the other. The requests of suspects hold up nobody else."""
        return self.runner, self.batch.route.for_suspects

    def split(self) -> None:
        """Have the batch run in parts, because its model has failed."""
        self.in_parts = self.failed = True
        bad_share(self.batch.route, self.runner).learn(1, self.batch.n_requests, self.batch.n_rows)

    def begin(self) -> bool:
        """Drop the requests that are past their deadline. Returns False if none remains."""
        batch = self.batch
        if not batch.drop_expired():
            return False
        if self.in_parts and self.parts is None:
            bad = bad_share(batch.route, self.runner)
            most = max(1, batch.n_requests // 2) if self.failed else batch.n_requests
            self.parts = pipeline.infer_in_parts(self.runner, self.result, batch.n_rows, batch.requests(), bad, most)
        return True

    def run(self) -> None:
        """Run the model, in any thread."""
        if self.parts is None:
            pipeline.infer(self.runner, self.result)
            return
        while not self.parts.is_done:
            self.parts.step()

    def step(self) -> bool:
        """Make one run of a batch in parts on the event loop. Returns whether it was the last. Raises RunTimedOut."""
        start_ns = time.perf_counter_ns()
        assert self.parts is not None
        try:
            if not self.parts.is_done:  # it is if all requests were refused without a run
                self.parts.step(on_loop=True)
        finally:
            self.run_ns += time.perf_counter_ns() - start_ns
        return self.parts.is_done


class ModelThreads:
    """Batches that would stall the loop. Each model runs one batch at a time.

    A model that has an executor of its own (a GPU's owner thread) runs there. All others share LIMITS.model_threads
    threads, so that slow models delay only each other. While a batch of a route runs here, the route's next requests
    gather in one batch.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, router: Router):
        self.loop = loop
        self.router = router
        self.threads: ThreadPoolExecutor | None = None
        # The batches of each lane in order; the first runs or waits for a thread.
        self.lanes: dict[Hashable, deque[PreparedBatch]] = {}
        self.ended = threading.Event()  # a batch has run, and `finish` was not called for it yet
        self.closed = False

    def put(self, prepared: PreparedBatch) -> None:
        prepared.batch.leave_loop()
        self.go_on(prepared)

    def go_on(self, prepared: PreparedBatch) -> None:
        """Run a batch that has left the loop, or the rest of it."""
        lane = self.lanes.setdefault(prepared.lane, deque())
        lane.append(prepared)
        if len(lane) == 1:
            self.start(prepared.lane, lane)

    def start(self, key: Hashable, lane: deque[PreparedBatch]) -> None:
        """Run the first batch that still has a waiting request; deadlines may have passed while the batch waited."""
        while lane:
            first = lane[0]
            if first.begin():
                thread = first.runner.executor or self.shared()
                done = thread.submit(first.run)
                done.add_done_callback(lambda future: self.end(key, lane, future))
                return
            self.router.resume(lane.popleft().batch.route)
        del self.lanes[key]

    def shared(self) -> ThreadPoolExecutor:
        if self.threads is None:
            self.threads = ThreadPoolExecutor(LIMITS.model_threads, "model")
        return self.threads

    def end(self, key: Hashable, lane: deque[PreparedBatch], done: Future[None]) -> None:
        """Tell the loop that a batch has run. Called in the model's thread."""
        self.ended.set()
        self.tell(self.finish, key, lane, done)

    def finish(self, key: Hashable, lane: deque[PreparedBatch], done: Future[None]) -> None:
        self.ended.clear()
        if self.closed:
            return  # every connection is closed
        prepared, error = lane.popleft(), done.exception()
        if time.perf_counter_ns() - prepared.batch.started_ns < 1e3 * LIMITS.loop_stall_us:
            prepared.runner.note_quick(in_thread=True)
        if isinstance(error, ModelFailed):
            prepared.runner.counts.note(error)
            prepared.split()
            lane.appendleft(prepared)
            self.start(key, lane)
            return
        prepared.answered(prepared, error)
        self.router.resume(prepared.batch.route)
        self.start(key, lane)

    def rest(self) -> None:
        """Wait for a moment, or until a batch ends. Called after a turn in which no model ran in the loop.

        A turn has fixed costs: one read and one write per connection. While a batch runs in a thread and no other model
        is asked for, the loop would pay these costs for a few requests at a time, only to queue or to refuse them.
        """
        if self.lanes:
            self.ended.wait(min(REST_TURNS * self.router.last_turn_ns / 1e9, REST_MAX_S))

    def tell(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the loop's thread, from another thread. Does nothing if the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Stop; called when every connection is closed. Batches that still run end without being answered."""
        self.closed = True
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)
