"""Applies a worker's settings before it serves: access, limits, admission, CPU pinning, open files, malloc, polling."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import platform
import resource
import struct
import time
from collections.abc import Callable
from typing import Final

from shorttail._native.wire import Router
from shorttail.config import LIMITS
from shorttail.server import security
from shorttail.server.accepting import RAISE
from shorttail.server.settings import ERROR_FORMS, ServerSettings

# Files that a worker may have open besides its connections: the store, models, its own sockets, and a socket for each
# request that it passes on to the bulk worker.
OTHER_FILES: Final = 512
# Of these, so many are kept free where the system allows too few files for all connections.
SPARE_FILES: Final = 32
SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}  # the number of the system call sched_setattr(2)
SLICE_NS: Final = 100_000  # the shortest that the system gives
# An accepted request waits for one turn (or running batch), and then for its own turn. Each of the two may take
# BURST_SHARE of the P99 budget. In an overload turns are kept at TARGET_SHARE of it, because longer turns would only
# make every request late (native/wire_limits.pxi).
BURST_SHARE: Final = 0.5
TARGET_SHARE: Final = 0.04
POLL_MEMORY: Final = 0.1  # the weight of the last turn in the moving average that decides whether to poll


def configure(router: Router, settings: ServerSettings, max_connections: int) -> None:
    """Set the router's access, limits and form of errors. Raises InvalidArgument for an unusable token file."""
    if settings.token_file is not None:
        router.limit(auth=security.Tokens.read(settings.token_file).authenticate, access=security.NONE)
    budget_ns = settings.p99_budget_ms * 1e6
    router.limit(
        max_connections=max_connections,
        max_peer_connections=settings.max_peer_connections,
        idle_deadline_s=settings.idle_deadline_s,
        frame_deadline_s=settings.frame_deadline_s,
        write_deadline_s=settings.write_deadline_s,
        auth_deadline_s=LIMITS.stranger_deadline_s,
        target_ns=TARGET_SHARE * budget_ns,
        burst_ns=BURST_SHARE * budget_ns,
        error_form=ERROR_FORMS.index(settings.rpc_errors),
    )


def sweep(router: Router) -> None:
    """Cut connections that are past a deadline. Cheap enough to be called ten times a second."""
    router.sweep(1 + int(time.monotonic()))


def files_wanted(settings: ServerSettings, *, http: bool) -> int:
    """Return how many files a worker may open with these settings."""
    return settings.max_connections + http * (LIMITS.http_connections + LIMITS.http_reserve) + OTHER_FILES


def files_warning(settings: ServerSettings, *, http: bool) -> str:
    """Return a line that says that the system allows a worker too few files, "" if it allows enough."""
    hard, wanted = _most_files(), files_wanted(settings, http=http)
    if hard >= wanted:
        return ""
    return (
        f"the system allows a process {hard:.0f} open files, and --max-connections {settings.max_connections} needs up"
        f" to {wanted}: it takes fewer connections; {RAISE}, or give a smaller --max-connections"
    )


def allow_files(settings: ServerSettings, *, http: bool) -> None:
    """Raise this process's limit of open files to what the settings need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = int(min(files_wanted(settings, http=http), _most_files()))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connections_of(settings: ServerSettings, *, http: bool) -> tuple[int, int]:
    """Return how many connections of MessagePack-RPC and of HTTP this worker takes: fewer where files are scarce.

    HTTP gets a quarter of the files, MessagePack-RPC the others, and each what the other one does not need. Call it
    when the store is open: what is open now, and SPARE_FILES, are left for other things.
    """
    rpc, of_http = settings.max_connections, http * (LIMITS.http_connections + LIMITS.http_reserve)
    if not _is_scarce(settings, http=http):
        return rpc, of_http
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = max(2, files - len(os.listdir("/proc/self/fd")) - SPARE_FILES)  # noqa: PTH208
    of_http = min(of_http, max(files // 4, files - rpc, 1))
    return min(rpc, files - of_http), of_http


def refused_at_once(settings: ServerSettings, *, http: bool) -> int:
    """Return how many connections beyond the limit may wait until their clients have read why they are refused."""
    return (SPARE_FILES if _is_scarce(settings, http=http) else OTHER_FILES) // 2


def _is_scarce(settings: ServerSettings, *, http: bool) -> bool:
    """Whether this process may open fewer files than the settings need."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft != resource.RLIM_INFINITY and soft < files_wanted(settings, http=http)


def _most_files() -> float:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return math.inf if hard == resource.RLIM_INFINITY else hard


def pin(cpu: int) -> None:
    """Pin this process to a CPU. Call it before any thread starts: a running thread would not be pinned."""
    with contextlib.suppress(OSError):  # the CPU is no longer available to this process
        os.sched_setaffinity(0, {cpu})


def go_first() -> None:
    """Ask the system for short slices for this thread: then it runs as soon as it wakes, on Linux 6.12 and later.

    Otherwise a process that runs on its CPU first ends its own slice, of about 3 ms. What a thread gets in all does not
    change. Call it before other threads start, which inherit it.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:  # else an operator has chosen otherwise
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        wanted = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)  # struct sched_attr
        with contextlib.suppress(AttributeError):  # another libc
            ctypes.CDLL(None).syscall(number, 0, wanted, 0)


class BusyPoll:
    """Polls: for a short time after each turn that had work, the loop looks for events without sleeping.

    Waking a sleeping process takes 5 us to 50 us on most machines, and it finds its caches and branch predictors cold;
    a process that polls takes a CPU for itself. The event loop sleeps only when no callback is due, so a callback that
    schedules itself again keeps it from sleeping, and the loop still looks at every socket in each turn. (SO_BUSY_POLL
    is the kernel's way for network cards; on the loopback device it does nothing.)

    run: the turn that is run first; `run` of this object takes its place. spin_us: how long to look for more.
    None is LIMITS.adaptive_poll_us while most requests come within that of the turn before, as a hypervisor decides
    whether to halt a CPU (halt_poll_ns of KVM). So a server that is asked now and then sleeps. It also sleeps while
    `leaves` is true: then a thread that loads a model, or the bulk worker, has what the loop leaves.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        run: Callable[[], object],
        leaves: Callable[[], bool],
        spin_us: int | None,
    ):
        self.loop = loop
        self.leaves = leaves
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
        if not self._spins and (not self.adaptive or (self._soon > 0.5 and not self.leaves())):
            self._spins = True
            self.loop.call_soon(self._spin)

    def _spin(self) -> None:
        if time.monotonic_ns() < self._until_ns and not (self.adaptive and self.leaves()):
            os.sched_yield()  # whoever else wants this CPU comes first
            self.loop.call_soon(self._spin)
        else:
            self._spins = False
