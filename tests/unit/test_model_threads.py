"""Models outside the loop, when the server ends."""

import asyncio
import threading
from types import SimpleNamespace

from shorttail.config import LIMITS
from shorttail.server.model_threads import ModelThreads, PreparedBatch


class FakeRunner:
    """Runs until it may end."""

    executor = None

    def __init__(self, may_end):
        self.may_end = may_end

    def run(self, values):
        self.may_end.wait()
        return values


def test_batches_that_run_or_wait_when_it_is_closed_end_in_silence():
    """More models than threads; of each one batch that runs, or waits for a thread, and one behind it."""
    may_end, said, answered = threading.Event(), [], []

    async def serve():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: said.append(context))
        threads = ModelThreads(loop, SimpleNamespace(resume=lambda route: None))
        for _ in range(LIMITS.model_threads + 2):
            runner = FakeRunner(may_end)
            for _ in range(2):
                batch = SimpleNamespace(
                    route=SimpleNamespace(for_suspects=False), leave_loop=lambda: None, drop_expired=lambda: 1
                )
                result = SimpleNamespace(values=[], inferred_ns=0)
                ended = lambda prepared, error: answered.append(error)  # noqa: E731
                threads.put(PreparedBatch(batch, runner, result, None, ended))
        running = threads.threads
        threads.close()
        may_end.set()
        await loop.run_in_executor(None, running.shutdown)
        await asyncio.sleep(0)  # what its threads have told the loop

    asyncio.run(serve())
    assert (said, answered) == ([], [])
