"""Greedy batching: whatever arrived while the last batch ran is the next batch.

`data_received` appends requests to the open batch of their model; at the end of the same loop turn `run` answers all
of them. So a batch is one request when the server is idle, with no window to wait for, and hundreds under load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shorttail._native.wire import Batch, Router
from shorttail.errors import ShorttailError
from shorttail.server.faults import one_line

if TYPE_CHECKING:
    from shorttail.engine import Engine


class Batcher:
    """Runs the batches of one worker. fault: told of every exception that nobody foresaw."""

    def __init__(self, router: Router, engine: Engine, fault: Callable[[Exception], None]):
        self.router = router
        self.engine = engine
        self.fault = fault
        self.catalog_version = engine.store.catalog_version
        router.run = self.run
        router.fault = fault

    def run(self) -> None:
        """One loop turn: answer everything that waits, then one write a connection."""
        for batch in self.router.take():
            if batch.wanted():
                self.answer(batch)
        self.router.flush()
        self.follow_catalog()

    def answer(self, batch: Batch) -> None:
        try:
            batch.reply(self.engine.run(batch.route.plan, batch.columns))
        except ShorttailError as error:
            batch.fail(error.code, error.message)
        except Exception as error:
            # The cause goes to the server's log, one line of it to the callers.
            batch.fail("INTERNAL", f"{describe(batch)}: {one_line(error)}")
            self.fault(error)

    def follow_catalog(self) -> None:
        """Drop the plans made for another catalog. Run between batches: requests that wait hold theirs."""
        version = self.engine.store.catalog_version
        if version != self.catalog_version:
            self.catalog_version = version
            self.router.forget_plans()


def describe(batch: Batch) -> str:
    plan = batch.route.plan
    return f"model '{plan.model}'" if plan.kind == "predict" else "get_online_features"
