"""Which calls are sent again, how soon, and how many in all.

A call that failed with Unavailable is sent again if that can do no harm: if it only reads, or if it has certainly not
reached the server, since no connection was made or not all of it was handed to the system (gRPC's "transparent"
retries, gRFC A6). A push or delete that was sent is not: it may have been done, and doing it again after somebody
else's write would undo that. What the server answers with RESOURCE_EXHAUSTED is never sent again: it is what an
overloaded server says, and retries would keep it so.

The pause before the nth time is random between 0 and a bound that doubles, so that clients of a worker that died do not
come back in step ("full jitter": M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015). It never
goes past the call's deadline.

A budget keeps a server that is down from being asked many times as much as one that is up: each call earns a client
a fifth of a retry, up to some thousands; each retry costs one (as the token buckets of Finagle's RetryBudget, whose
fifth this is, of gRFC A6 and of the AWS SDKs). Two things beside: a reserve to start with, for clients that call now
and then; and each call in flight lends one, for a connection may be lost with a thousand calls on it.
"""

from __future__ import annotations

import random

from shorttail.client.calls import Call
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, Unavailable


class Retries:
    """The retries of one client. limit: so many times is a call sent again; 0 never.

    Threads share it without a lock: what a race may lose is one call's fifth of a retry.
    """

    def __init__(self, limit: int):
        if not 0 <= limit <= LIMITS.client_retries:
            raise InvalidArgument(f"retries={limit!r}: give a number from 0 to {LIMITS.client_retries}")
        self.limit = limit
        self._saved = LIMITS.client_retry_reserve
        self._ratio = LIMITS.client_retry_ratio
        self._most = LIMITS.client_retries_saved

    def earn(self) -> None:
        """Of a call that begins."""
        if self._saved < self._most:
            self._saved += self._ratio

    def pause_s(self, call: Call, error: Unavailable, in_flight: int = 0) -> float:
        """The pause before `call` is sent again. Raises `error` if it is not to be.

        in_flight: the calls of this client that wait for their answer, if these share connections.
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
    """How long to wait after so many failures before this one."""
    bound_s = LIMITS.client_backoff_min_s * 2 ** min(failures, 20)
    return random.uniform(0, min(bound_s, LIMITS.client_backoff_max_s))
