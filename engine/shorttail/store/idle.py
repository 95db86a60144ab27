"""A thread that looks after the snapshots of a process while nobody uses them."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Generic, Protocol, TypeVar

from shorttail.config import LIMITS


class MaybeIdle(Protocol):
    """What may be idle: a snapshot."""

    @property
    def is_open(self) -> bool: ...
    def release_if_stale(self) -> None: ...
    def release_if_overwritten(self) -> None: ...
    def lock_growth(self) -> None: ...
    def end_idle_scans(self) -> None: ...


S = TypeVar("S", bound=MaybeIdle)


class IdleThread(Generic[S]):
    """Releases stale snapshots that are not in use, and idle scans. One thread serves all snapshots of a process."""

    def __init__(self) -> None:
        self._snapshots: weakref.WeakSet[S] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, snapshot: S) -> None:
        with self._lock:
            self._snapshots.add(snapshot)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="shorttail-idle", daemon=True)
                self._thread.start()

    def snapshots(self) -> list[S]:
        """Return the open snapshots."""
        return [snapshot for snapshot in self._snapshots if snapshot.is_open]

    def _run(self) -> None:
        while True:
            time.sleep(LIMITS.idle_rest_ms / 1000)
            with self._lock:
                snapshots = self.snapshots()
                if not snapshots:
                    self._thread = None
                    return
            for snapshot in snapshots:
                snapshot.release_if_stale()
                snapshot.release_if_overwritten()
                snapshot.lock_growth()
                snapshot.end_idle_scans()
            del snapshot, snapshots  # these references would keep closed snapshots alive during the sleep
