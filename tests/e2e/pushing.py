"""A server that is pushed to: what the tests of pushes share."""

import time
from pathlib import Path

from serving import TIMEOUT_S, Server, stopped


def row(user, **changed):
    return {"user_id": user, "age": 1.0, "visits": 1, "tier": "new", "taste": [1.0, 2.0]} | changed


def until(condition, what):
    """Wait for what another process does on its own; its outcome is asserted, not its time."""
    end_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end_s, f"timed out waiting until {what}"
        time.sleep(0.01)
    return found


class Pushing(Server):
    def writer(self):
        [pid] = until(lambda: self.children("writer"), "there is a writer")
        return pid

    def held(self, *pids):
        """Processes that do nothing meanwhile; the writer if none is named."""
        return stopped(*(pids or (self.writer(),)))

    @property
    def tcp(self):
        return f"127.0.0.1:{self.address[1]}"

    def worker_path(self):
        """The socket that its workers reach the writer by."""
        arguments = Path(f"/proc/{self.workers()[0]}/cmdline").read_text().split("\0")
        return Path(arguments[arguments.index("--writer") + 1])


def tiers(peer, *users):
    _, _, error, result = peer.ask(0, 9, "get_online_features", [["stats:tier"], {"user_id": list(users)}])
    assert error is None
    return result["values"][0]
