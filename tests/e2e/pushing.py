"""Helpers for push tests: a server whose writer can be found and stopped, and rows to push."""

import time
from pathlib import Path

from serving import TIMEOUT_S, Server, stopped

PUSHED = {"rows": 1, "older": 0}  # the answer to a push of one row that is not older than the stored one


def row(user, **changed):
    """Return one row of view "stats" of the store of serving.py, as columns."""
    return {"user_id": user, "age": 1.0, "visits": 1, "tier": "new", "taste": [1.0, 2.0]} | changed


def until(condition, what):
    """Wait until another process makes `condition` true, and return its result. No time is asserted."""
    end_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, f"timed out waiting until {what}"
        time.sleep(0.01)
    return found


class Pushing(Server):
    """A running server, with access to its writer."""

    def writer(self):
        """Wait for the writer and return its process id."""
        [pid] = until(lambda: self.children("writer"), "there is a writer")
        return pid

    def held(self, *pids):
        """Stop these processes, by default the writer, within the block."""
        return stopped(*(pids or (self.writer(),)))

    @property
    def tcp(self):
        """The address of the server, for a client."""
        return f"127.0.0.1:{self.address[1]}"

    def worker_path(self):
        """The Unix socket on which the writer accepts workers."""
        arguments = Path(f"/proc/{self.workers()[0]}/cmdline").read_text().split("\0")
        return Path(arguments[arguments.index("--sockets") + 1]) / "writer"


def tiers(peer, *users):
    """Ask on this connection for the feature stats:tier of users."""
    _, _, error, result = peer.ask(0, 9, "get_online_features", [["stats:tier"], {"user_id": list(users)}])
    assert error is None
    return result["values"][0]
