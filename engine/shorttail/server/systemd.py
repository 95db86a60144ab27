"""What systemd offers a service: sockets, readiness messages and the watchdog. Without systemd nothing happens."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Final

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
NOTIFY_TIMEOUT_S: Final = 1.0


def inherited_sockets() -> list[socket.socket]:
    """The sockets that systemd listens on for this process (sd_listen_fds(3)); empty if it listens on none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)  # children must not see them
    found = []
    for position in range(count):
        fd = FIRST_FD + position
        os.set_inheritable(fd, False)
        if names[position : position + 1] != ["http"]:
            found.append(socket.socket(fileno=fd))
    return found


class Notifier:
    """Sends states to systemd (sd_notify(3)) and feeds its watchdog."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = int(os.environ.pop("WATCHDOG_USEC", "0") or 0)
        mine = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.period_s = watchdog_us / 2e6 if self._address and mine and watchdog_us else None
        self.due_s = 0.0 if self.period_s is not None else None

    def say(self, *states: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(NOTIFY_TIMEOUT_S)  # systemd's queue is short, and no state may be lost
            out.sendto("\n".join(states).encode(), address)

    def reloading(self) -> None:
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def beat(self) -> None:
        """Feed the watchdog if that is due."""
        now_s = time.monotonic()
        if self.period_s is not None and self.due_s is not None and now_s >= self.due_s:
            self.due_s = now_s + self.period_s
            self.say("WATCHDOG=1")
