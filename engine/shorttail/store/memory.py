"""Keeping a store's file in memory: pages mapped before they are needed, and locked so that they stay."""

from __future__ import annotations

import logging
import os
import resource

from shorttail._native.pages import Tree
from shorttail.errors import ResourceExhausted
from shorttail.store.mapping import size_text

log = logging.getLogger(__name__)


class Residence:
    """How much of one snapshot's map is locked. None of it until lock()."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._locked_bytes: int | None = None  # from the start of the map; None: nothing is to be locked

    def lock(self, tree: Tree) -> None:
        """Lock the file, and what it grows by from now on. Raises ResourceExhausted when the system refuses."""
        self._lock(tree, 0)

    def follow(self, tree: Tree) -> None:
        """Lock what the file has grown by. If the system refuses, say so in the log and try no more."""
        if self._locked_bytes is None or tree.map_bytes <= self._locked_bytes:
            return
        try:
            self._lock(tree, self._locked_bytes)
        except ResourceExhausted as error:
            self._locked_bytes = None
            log.warning("%s; what the file grows by is not locked", error.message)

    def forget(self) -> None:
        """The map is another one now; follow() locks all of it."""
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
