"""Locking a store's file in memory, so that a lookup never waits for the disk."""

from __future__ import annotations

import logging
import os
import resource

from shorttail._native.pages import Tree
from shorttail.errors import ResourceExhausted
from shorttail.store.mapping import size_text

log = logging.getLogger(__name__)


class PageLock:
    """Locks the map of one snapshot in memory. Nothing is locked until lock() is called."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._locked_bytes: int | None = None  # locked from the start of the map; None: locking is off

    def lock(self, tree: Tree) -> None:
        """Lock the whole file, and make follow() lock its growth. Raises ResourceExhausted if the system refuses."""
        self._lock(tree, 0)

    def follow(self, tree: Tree) -> None:
        """Lock the part by which the file has grown. If the system refuses, log a warning and stop locking."""
        if self._locked_bytes is None or tree.map_bytes <= self._locked_bytes:
            return
        try:
            self._lock(tree, self._locked_bytes)
        except ResourceExhausted as error:
            self._locked_bytes = None
            log.warning("%s; the growth of the file is no longer locked", error.message)

    def reset(self) -> None:
        """Tell that LMDB was reopened with a new map. The next follow() locks all of it, if locking is on."""
        if self._locked_bytes is not None:
            self._locked_bytes = 0

    def _lock(self, tree: Tree, from_bytes: int) -> None:
        try:
            tree.lock(from_bytes)
        except OSError as error:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            shown = "unlimited" if limit == resource.RLIM_INFINITY else size_text(limit)
            raise ResourceExhausted(
                f"store '{self.path}': its {size_text(tree.map_bytes)} cannot be locked in memory ({error.strerror}; "
                f"the limit is {shown}); raise it (ulimit -l, or LimitMEMLOCK= of systemd)"
            ) from error
        self._locked_bytes = tree.map_bytes
