"""Runs models that are too slow for the loop, in threads. All methods are called in the loop's thread but `end`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from shorttail import pipeline
from shorttail._native.wire import Router
from shorttail.config import LIMITS
from shorttail.models.load import Runner
from shorttail.pipeline import BatchResult
from shorttail.server.runnable import Runnable
from shorttail.server.shadow import ShadowBatch

# The loop rests this many times as long as its last turn took, and never longer than this: it then finds many requests
# in each socket, and leaves the CPU to the models.
REST_TURNS: Final = 4
REST_MAX_S: Final = 0.001


@dataclass(slots=True)
class PreparedBatch:
    """A batch that lacks nothing but `infer`.

    answered: called in the loop's thread when the batch has run, with what the run raised, or None.
    """

    batch: Runnable
    runner: Runner
    result: BatchResult
    shadowed: ShadowBatch | None
    answered: Callable[[PreparedBatch, BaseException | None], object]


class ModelThreads:
    """Batches that would stall the loop. Each model runs one at a time, in a thread of its own if it has one.

    The others share some threads, so that a slow model keeps only as slow ones waiting, and only so many of them.
    While a batch of a route is here, the route's next requests gather in one batch.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, router: Router):
        self.loop = loop
        self.router = router
        self.threads: ThreadPoolExecutor | None = None
        self.lanes: dict[Runner, deque[PreparedBatch]] = {}  # the first of each runs, or waits for a thread
        self.ended = threading.Event()  # a batch has, and `finish` does not know yet
        self.closed = False

    def put(self, prepared: PreparedBatch) -> None:
        prepared.batch.leave_loop()
        lane = self.lanes.setdefault(prepared.runner, deque())
        lane.append(prepared)
        if len(lane) == 1:
            self.start(prepared.runner, lane)

    def start(self, runner: Runner, lane: deque[PreparedBatch]) -> None:
        """Run the first batch that somebody still waits for: it may have waited long."""
        while lane:
            first = lane[0]
            if first.batch.wanted():
                thread = runner.executor or self.shared()
                done = thread.submit(pipeline.infer, runner, first.result)
                done.add_done_callback(lambda future: self.end(runner, lane, future))
                return
            self.router.resume(lane.popleft().batch.route)
        del self.lanes[runner]

    def shared(self) -> ThreadPoolExecutor:
        if self.threads is None:
            self.threads = ThreadPoolExecutor(LIMITS.model_threads, "model")
        return self.threads

    def end(self, runner: Runner, lane: deque[PreparedBatch], done: Future[None]) -> None:
        """In the model's thread."""
        self.ended.set()
        self.tell(self.finish, runner, lane, done)

    def finish(self, runner: Runner, lane: deque[PreparedBatch], done: Future[None]) -> None:
        self.ended.clear()
        if self.closed:
            return  # nobody is left to be answered
        prepared = lane.popleft()
        prepared.answered(prepared, done.exception())
        self.router.resume(prepared.batch.route)
        self.start(runner, lane)

    def rest(self) -> None:
        """After a turn that refused requests, or answered none: read no more for a moment, unless a batch ends.

        A turn has a price of its own, a read and a write a connection. While a batch runs here and nothing else is
        asked for, the loop would pay it for every few requests that come, only to let them wait or to refuse them.
        """
        if self.lanes:
            self.ended.wait(min(REST_TURNS * self.router.last_turn_ns / 1e9, REST_MAX_S))

    def tell(self, function: Callable[..., object], *args: Any) -> None:
        """Call it in the loop's thread, from another one; not at all when the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Once every connection is closed."""
        self.closed = True
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)
