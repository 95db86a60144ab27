"""Forks: a child lets go of the connections of its parent, and its calls connect anew, each in the child's event loop.

Two processes that use one connection get each other's answers. A child must not close it either: a TLS session would
send its end, and an event loop would take the socket out of the epoll set that the child shares with its parent. So
each descriptor becomes one of /dev/null in the child. Nothing that the child does then reaches the connection, and it
ends when the parent closes it. A fork in C that runs none of Python's hooks is not noticed.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Owner(Protocol):
    """An object that must let go of connections in a forked child."""

    def disown(self) -> list[int]:
        """Forget all connections and make new locks: threads that the child does not have may hold the old ones.

        Returns the descriptors of the connections that this object is, none if it only refers to them.
        """


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def watch(owner: Owner) -> None:
    """Call owner.disown() in each child that this process forks from now on."""
    _owners.add(owner)


def _after_fork() -> None:
    owners = list(_owners)  # keeps them alive: a socket that is freed closes its descriptor
    descriptors = [descriptor for owner in owners for descriptor in owner.disown()]
    if descriptors:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in descriptors:
            os.dup2(null, descriptor, inheritable=False)
        os.close(null)


os.register_at_fork(after_in_child=_after_fork)
