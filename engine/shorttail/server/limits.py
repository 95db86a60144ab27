"""What a worker is set to before it serves: access, limits, admission (native/wire_limits.pxi), CPUs, open files."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shorttail._native.wire import Router
from shorttail.config import LIMITS
from shorttail.server import security
from shorttail.server.settings import ServerSettings

if TYPE_CHECKING:
    from shorttail.engine import Engine

# Files that a worker has open besides its connections: the store, models, sockets of its own.
OTHER_FILES: Final = 512
# An accepted request waits for the turn before its own, or for the batch that runs, and then for its own: each may take
# half of the P99 budget. In an overload they are kept short, as a longer wait only makes everybody late
# (native/wire_limits.pxi).
BURST_SHARE: Final = 0.5
TARGET_SHARE: Final = 0.04
# Of glibc's malloc.h. More free memory at the end of the heap than the one is given back; what is larger than the other
# is mapped and unmapped by itself, and so rare that this costs nothing.
M_TRIM_THRESHOLD: Final = (-1, 4 << 20)
M_MMAP_THRESHOLD: Final = (-3, 4 << 20)
POLL_MEMORY: Final = 0.1  # what the last turn weighs in whether to poll


def configure(router: Router, settings: ServerSettings) -> None:
    """Raises InvalidArgument for a token file that does not serve."""
    if settings.token_file is not None:
        router.limit(auth=security.Tokens.read(settings.token_file).authenticate, access=security.NONE)
    budget_ns = settings.p99_budget_ms * 1e6
    router.limit(
        max_connections=settings.max_connections,
        max_peer_connections=settings.max_peer_connections,
        idle_deadline_s=settings.idle_deadline_s,
        frame_deadline_s=settings.frame_deadline_s,
        write_deadline_s=settings.write_deadline_s,
        auth_deadline_s=LIMITS.stranger_deadline_s,
        target_ns=TARGET_SHARE * budget_ns,
        burst_ns=BURST_SHARE * budget_ns,
    )


def sweep(router: Router) -> None:
    """Cut connections that are past a deadline. Cheap enough for every tenth of a second."""
    router.sweep(1 + int(time.monotonic()))


def allow_files(count: int) -> None:
    """Raise this process's limit of open files to `count` and some more, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES if hard == resource.RLIM_INFINITY else min(count + OTHER_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def return_memory() -> None:
    """Have malloc give back what a few large answers took. Left to itself, glibc keeps up to 64 MiB for others."""
    with contextlib.suppress(AttributeError):  # another libc
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(*option)


def pin(cpu: int) -> None:
    """Run on this CPU only. Before anything starts a thread, which would have to be pinned by itself."""
    with contextlib.suppress(OSError):  # it was taken away from this process since
        os.sched_setaffinity(0, {cpu})


class BusyPoll:
    """For a while after each turn that had work, the loop looks for more without going to sleep.

    A process that sleeps has to be woken, which costs some 5 us to 50 us on most machines, and finds its caches and
    branch predictors cold; one that spins takes a CPU for itself. The loop waits for events only when nothing is due at
    once, so a callback that asks to be called again keeps it from waiting, and it still looks at every socket in each
    turn. (SO_BUSY_POLL is the kernel's way for network cards; on the loopback it does nothing.)

    run: the turn that is run first; `run` of this object takes its place. spin_us: how long to look for more.
    None is LIMITS.adaptive_poll_us while most requests come within that of the turn before, as a hypervisor decides
    whether to halt a CPU (halt_poll_ns of KVM). So a server that is asked now and then sleeps, and so does one
    that loads a model: the thread that does it has what the loop leaves.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, run: Callable[[], object], engine: Engine, spin_us: int | None):
        self.loop = loop
        self.engine = engine
        self.adaptive = spin_us is None
        self.spin_ns = 1000 * (LIMITS.adaptive_poll_us if spin_us is None else spin_us)
        self._soon = 0.0  # share of the turns, of late, that began within spin_ns of the one before
        self._until_ns = 0
        self._spins = False
        self._run = run

    def run(self) -> None:
        if self.adaptive:
            # _until_ns is spin_ns after the last turn, whether the loop spun or slept since.
            self._soon += ((time.monotonic_ns() < self._until_ns) - self._soon) * POLL_MEMORY
        self._run()
        self._until_ns = time.monotonic_ns() + self.spin_ns
        if not self._spins and (not self.adaptive or (self._soon > 0.5 and not self.engine.is_loading)):
            self._spins = True
            self.loop.call_soon(self._spin)

    def _spin(self) -> None:
        if time.monotonic_ns() < self._until_ns and not (self.adaptive and self.engine.is_loading):
            os.sched_yield()  # whoever else wants this CPU comes first
            self.loop.call_soon(self._spin)
        else:
            self._spins = False
