"""What tests of pushes share: a server whose writer they can hold and find, and rows to push."""

import time
from pathlib import Path

from serving import TIMEOUT_S, Server, stopped


def row(user, **changed):
    """One row of view "stats" of serving.py's store, as columns."""
    return {"user_id": user, "age": 1.0, "visits": 1, "tier": "new", "taste": [1.0, 2.0]} | changed


def until(condition, what):
    """Wait for what another process does by itself; its outcome is asserted, not its time; what `condition` gave."""
    end_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, f"timed out waiting until {what}"
        time.sleep(0.01)
    return found


class Pushing(Server):
    """A running server, and what becomes of its writer."""

    def writer(self):
        """The process id of its writer, once there is one."""
        [pid] = until(lambda: self.children("writer"), "there is a writer")
        return pid

    def held(self, *pids):
        """These of its processes, or else its writer, do nothing within the block."""
        return stopped(*(pids or (self.writer(),)))

    @property
    def tcp(self):
        """Its address, as a client takes it."""
        return f"127.0.0.1:{self.address[1]}"

    def worker_path(self):
        """The Unix socket by which its workers reach the writer."""
        arguments = Path(f"/proc/{self.workers()[0]}/cmdline").read_text().split("\0")
        return Path(arguments[arguments.index("--writer") + 1])


def tiers(peer, *users):
    """The feature stats:tier of these users, as the server at this connection has it."""
    _, _, error, result = peer.ask(0, 9, "get_online_features", [["stats:tier"], {"user_id": list(users)}])
    assert error is None
    return result["values"][0]
