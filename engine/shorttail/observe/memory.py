"""The metrics counters of all processes of a server, in one shared memory file.

The supervisor makes the file and its children inherit it. The worker that answers a request for /metrics adds up the
counters of all processes. Each process writes its own region (native/metrics.pyx describes the layout), and its own
table of counters with labels (tallies.py). When a process ends, its successor continues to count in the same region,
so no counter decreases while the server runs. The tables follow the regions, in the same order.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shorttail._native import metrics as native
from shorttail._native.metrics import Recorder
from shorttail.errors import Internal, ResourceExhausted
from shorttail.observe import tallies
from shorttail.observe.tallies import Labels, Tallies

REGION_BYTES: Final = 8 * native.REGION_WORDS
# Whose region it is: there is one supervisor, one writer and one bulk worker; workers use the others.
SUPERVISOR, WRITER, BULK, FIRST_WORKER = 0, 1, 2, 3

# The words of a region's header. Gauges are valid only while the region's process runs.
HEADER: Final = (
    "pid",
    "started_ns",  # since 1970
    "heartbeat_ns",  # time.monotonic_ns() of the last turn of the event loop
    "generation",
    "reader_age_us",
    "connections",
    "http_connections",
    "in_flight",
    "http_in_flight",
    "connections_total",
    "http_connections_total",
    "received_bytes",
    "sent_bytes",
    "http_received_bytes",
    "http_sent_bytes",
    "refused",  # connections, because there were too many
    "http_refused",
    "cut",  # connections, by a deadline or to make room for others
    "http_cut",
    "handshakes_failed",
    "file_shortages",
    "requests_shed",
    "waiting_rows",
    "waiting_bytes",
    "large_in_flight",
    "http_large_in_flight",
    "suspects",
    "unexpected_errors",
    "gc_collections",
    "gc_pause_ns",
    "log_lines_dropped",
    "worker_restarts",
    "writer_restarts",
    "bulk_restarts",
    "hung_workers",
    "banned_models",
    "queued_rows",  # of the writer
    "queued_bytes",
    "writes_refused",
)
# These do not outlive the process.
GAUGES: Final = (
    "connections",
    "http_connections",
    "in_flight",
    "http_in_flight",
    "heartbeat_ns",
    "waiting_rows",
    "waiting_bytes",
    "large_in_flight",
    "http_large_in_flight",
    "suspects",
    "banned_models",
    "queued_rows",
    "queued_bytes",
)
WORD: Final = {name: number for number, name in enumerate(HEADER)}


@dataclass(slots=True)
class SlotCounts:
    """The counters of one method with one model, summed over all processes. See native/metrics.pyx for the lists."""

    rows: int = 0
    requests: list[int] = field(default_factory=lambda: [0] * (len(native.PROTOCOLS) * len(native.CODES)))
    batches: list[int] = field(default_factory=lambda: [0] * (len(native.ROW_BOUNDS) + 1))
    stages: list[list[int]] = field(default_factory=lambda: [[0] * native.STAGE_WORDS for _ in native.STAGES])

    def add(self, words: list[int]) -> None:
        self.rows += words[native.ROWS_AT]
        _add(self.requests, words, native.REQUESTS_AT)
        _add(self.batches, words, native.BATCHES_AT)
        for number, stage in enumerate(self.stages):
            _add(stage, words, native.STAGES_AT + number * native.STAGE_WORDS)


def _add(into: list[int], words: list[int], at: int) -> None:
    for i in range(len(into)):
        into[i] += words[at + i]


@dataclass(slots=True)
class Process:
    """The header of one region. living: whether its process still runs."""

    region: int
    header: dict[str, int]
    living: bool

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker, and not the supervisor, the writer or the bulk worker."""
        return self.region >= FIRST_WORKER

    @property
    def has_loop(self) -> bool:
        """Whether it is a worker or the bulk worker, which has the event loop of a worker too."""
        return self.region >= BULK

    @property
    def name(self) -> str:
        """The value of the label `worker`."""
        return "bulk" if self.region == BULK else str(self.region - FIRST_WORKER + 1)


class MetricsMemory:
    """The shared memory file. It exists as long as a process has it open.

    create() makes the file; attach() maps an inherited descriptor.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self.map = mmap.mmap(fd, os.fstat(fd).st_size)
        words = memoryview(self.map).cast("Q")
        self.regions = len(words) // (native.REGION_WORDS + tallies.TABLE_WORDS)
        self.words = words[: self.regions * native.REGION_WORDS]
        self._tables = words[self.regions * native.REGION_WORDS :]
        self.region = -1  # that this process has claimed

    @classmethod
    def create(cls, workers: int) -> MetricsMemory:
        """Make the file for `workers` workers, and for the supervisor, the writer and the bulk worker.

        There are two regions per worker, because a replacement may start while its predecessor is still stopping.
        Raises ResourceExhausted if there is no memory for them: a write to a page without memory would end in SIGBUS.
        """
        fd = os.memfd_create("shorttail-metrics")
        size_bytes = (REGION_BYTES + 8 * tallies.TABLE_WORDS) * (FIRST_WORKER + 2 * workers)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            os.close(fd)
            raise ResourceExhausted(f"no {size_bytes:,} bytes for the server's counters: {error.strerror}") from None
        return cls(fd)

    @classmethod
    def attach(cls, fd: int) -> MetricsMemory:
        """Map the file that a parent process made."""
        return cls(fd)

    def claim(self, only: int | None = None) -> Recorder:
        """Claim a region until this process ends: `only` this one, or a worker's. Return a Recorder for it.

        The claim is a lock on the file's range, which the system releases when the process ends in any way. Raises
        Internal if no region is free.
        """
        for region in range(FIRST_WORKER, self.regions) if only is None else [only]:
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, region * REGION_BYTES)
            except OSError:
                continue
            recorder = Recorder(self.words, region)
            for name in GAUGES:
                recorder.put(WORD[name], 0)
            recorder.put(WORD["started_ns"], time.time_ns())
            recorder.put(WORD["pid"], os.getpid())
            self.region = region
            return recorder
        raise Internal(f"all {self.regions} regions for metrics are in use by running processes")

    def tallies(self) -> Tallies:
        """Return the table of this process, which belongs to the region that it has claimed."""
        return Tallies(self._table(self.region))

    def _table(self, region: int) -> memoryview:
        return self._tables[region * tallies.TABLE_WORDS : (region + 1) * tallies.TABLE_WORDS]

    def tallied(self) -> dict[tuple[int, Labels], list[int]]:
        """Return the counters with labels of all processes: {(the kind's number, labels): values}."""
        return tallies.summed([self._table(region) for region in range(self.regions)])

    def processes(self) -> list[Process]:
        """Return the header of every region that was ever claimed."""
        found = []
        for region in range(self.regions):
            at = region * native.REGION_WORDS
            header = dict(zip(HEADER, self.words[at : at + len(HEADER)].tolist(), strict=True))
            if header["pid"]:
                found.append(Process(region, header, Path(f"/proc/{header['pid']}").exists()))
        return found

    def slots(self) -> dict[tuple[str, str], SlotCounts]:
        """Return the counters of all processes, summed by (method, model)."""
        merged: dict[tuple[str, str], SlotCounts] = {}
        for region in range(self.regions):
            at = region * native.REGION_WORDS + native.HEADER_WORDS
            for slot in range(at, at + native.SLOTS * native.SLOT_WORDS, native.SLOT_WORDS):
                if not self.words[slot]:
                    break
                words = self.words[slot : slot + native.SLOT_WORDS].tolist()
                name = b"".join(word.to_bytes(8, "little") for word in words[3 : 3 + native.NAME_BYTES // 8])
                key = (native.METHODS[words[1]], name[: words[2]].decode("utf-8", "replace"))
                merged.setdefault(key, SlotCounts()).add(words)
        return merged
