"""Retries: which calls are sent again, after which pause, and how many in all.

A call that failed with Unavailable is sent again if that is safe: if it only reads, or if it certainly did not reach
the server, because no connection was made or not all of its bytes were written to the socket (the "transparent retries"
of gRPC, gRFC A6). A push or delete that was sent is not sent again: the server may have done it, and a second one could
undo another client's write in between. A call that the server refused with RESOURCE_EXHAUSTED is never sent again: the
server is overloaded, and retries would keep it overloaded.

The pause before a retry is random, between 0 and a bound that doubles from 10 ms to 1 s, so that the clients of a
worker that died do not all return at the same moment ("full jitter": M. Brooker, "Exponential Backoff and Jitter", AWS
Architecture Blog, 2015). A pause never goes past the call's deadline: then the call fails at once.

A retry budget, a token bucket, bounds the load of retries on a server that is down: each call adds 0.2 tokens, up to
10,000, and each retry takes one token. (The ratio is that of Finagle's RetryBudget; gRFC A6 and the AWS SDKs have such
buckets too.) A new client has 100 tokens, for clients that call seldom. And each call in flight counts as a token,
because one connection may be lost with a thousand calls on it.
"""

from __future__ import annotations

import random

from shorttail.client.calls import Call
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, Unavailable


class Retries:
    """The retry budget of one client. limit: how often a call is sent again; 0: never.

    Threads share it without a lock: a race can lose the 0.2 tokens of a call, which does no harm.
    """

    def __init__(self, limit: int):
        if not 0 <= limit <= LIMITS.client_retries:
            raise InvalidArgument(f"retries={limit!r}: give a number from 0 to {LIMITS.client_retries}")
        self.limit = limit
        self._saved = LIMITS.client_retry_reserve
        self._ratio = LIMITS.client_retry_ratio
        self._most = LIMITS.client_retries_saved

    def earn(self) -> None:
        """Add the tokens of a call that begins."""
        if self._saved < self._most:
            self._saved += self._ratio

    def pause_s(self, call: Call, error: Unavailable, in_flight: int = 0) -> float:
        """Take a token and return the pause in seconds before `call` is sent again. Raises `error` if it may not be.

        in_flight: how many calls of this client wait for an answer, if calls share connections; else 0.
        """
        if call.retries >= self.limit or (call.sent and not call.is_read):
            raise error
        pause_s = backoff_s(call.retries)
        if pause_s >= call.budget_s() or self._saved + in_flight < 1:
            raise error
        self._saved -= 1
        call.count_retry()
        return pause_s


def backoff_s(failures: int) -> float:
    """Return a random pause in seconds; `failures` is how many attempts failed before the last one."""
    bound_s = LIMITS.client_backoff_min_s * 2 ** min(failures, 20)
    return random.uniform(0, min(bound_s, LIMITS.client_backoff_max_s))
