"""What runs outside the loop's thread: models too slow for it, and shadows. All methods are called in that thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shorttail import pipeline
from shorttail._native.wire import Batch, Router
from shorttail.models.load import Runner
from shorttail.models.shadow import Shadow, ShadowBatch
from shorttail.pipeline import BatchResult

if TYPE_CHECKING:
    from shorttail.store import Store


@dataclass(slots=True)
class Prepared:
    """A batch that lacks nothing but `infer`."""

    batch: Batch
    runner: Runner
    result: BatchResult
    shadowed: ShadowBatch | None


class Apart:
    """Batches that would stall the loop, each run in a thread: the model's own if it has one, else one for all.

    While a batch of a route is here, the route's next requests gather in one batch. answered: called with each batch
    when it has run and what became of it: None, or what it raised.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        router: Router,
        answered: Callable[[Prepared, BaseException | None], object],
    ):
        self.loop = loop
        self.router = router
        self.answered = answered
        self.shared: ThreadPoolExecutor | None = None
        self.lanes: dict[Executor, deque[Prepared]] = {}  # by thread; the first of each runs

    def put(self, prepared: Prepared) -> None:
        route = prepared.batch.route
        route.busy = route.apart = True
        prepared.batch.leave_loop()
        thread = prepared.runner.executor
        if thread is None:
            thread = self.shared = self.shared or ThreadPoolExecutor(1, "model")
        lane = self.lanes.setdefault(thread, deque())
        lane.append(prepared)
        if len(lane) == 1:
            self.start(thread, lane)

    def start(self, thread: Executor, lane: deque[Prepared]) -> None:
        """Run the first batch that somebody still waits for: it may have waited long."""
        while lane:
            first = lane[0]
            if first.batch.wanted():
                done = thread.submit(pipeline.infer, first.runner, first.result)
                done.add_done_callback(lambda future: self.tell(self.finish, thread, lane, future))
                return
            self.router.resume(lane.popleft().batch.route)
        del self.lanes[thread]

    def finish(self, thread: Executor, lane: deque[Prepared], done: Future[None]) -> None:
        prepared = lane.popleft()
        self.answered(prepared, done.exception())
        self.router.resume(prepared.batch.route)
        self.start(thread, lane)

    def tell(self, function: Callable[..., object], *args: Any) -> None:
        """Call it in the loop's thread, from another one; not at all when the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        if self.shared is not None:
            self.shared.shutdown(wait=False, cancel_futures=True)


class ShadowThread:
    """Runs shadows on what was answered: of each model one batch at a time, and none waits but those of one turn."""

    def __init__(self, store: Store):
        self.store = store
        self.thread: ThreadPoolExecutor | None = None
        self.waiting: list[ShadowBatch] = []

    def take(self, shadow: Shadow, batch: Batch, result: BatchResult) -> ShadowBatch | None:
        """Before a batch's model runs: what its shadow will need, or None if this batch is none of its share."""
        if not shadow.is_due():
            return None
        if shadow.running:
            shadow.counts.skipped += 1
            return None
        columns = None
        if not shadow.same_inputs:
            columns = batch.columns
            batch.keep = True
        return ShadowBatch(shadow, columns, result.values, result.names)

    def add(self, shadowed: ShadowBatch, result: BatchResult) -> None:
        """Once its answers are made."""
        shadowed.answered = result.values
        self.waiting.append(shadowed)

    def start(self) -> None:
        """Once the answers of this turn are sent."""
        waiting, self.waiting = self.waiting, []
        for shadowed in waiting:
            shadow = shadowed.shadow
            if shadow.running:
                shadow.counts.skipped += 1
                continue
            shadow.running = True
            assert shadow.plan.runner is not None
            thread = shadow.plan.runner.executor
            if thread is None:
                thread = self.thread = self.thread or ThreadPoolExecutor(1, "shadow")
            thread.submit(shadowed.run, self.store)

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)
