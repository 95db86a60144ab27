"""Workers that hang are killed and replaced; those that only stood still with everything else are not.

These tests wait: for a deadline to pass, or for as long as a machine is supposed to have stood still.
"""

import re
import signal
import time

import pytest
from serving import PREDICT, PREDICTED, Server, environment_after, replaced, stopped, until


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_hangs_for_long_is_killed_and_replaced(start, workers):
    server = start("--workers", workers, "--hang-deadline-s", "1")
    hung = server.workers()[0]
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
        with stopped(hung):
            replaced(server, hung, workers)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert re.fullmatch(
        rf"worker \d \(pid {hung}\) died: it hung for 1 s, and was killed; starting it again in 0\.1 s\n",
        server.log.read_text(),
    )
    assert server.stop() == 0


def test_workers_are_not_killed_for_the_time_in_which_nothing_ran(start):
    """As when a container is frozen: the supervisor too goes on where it was."""
    server = start("--workers", "2", "--hang-deadline-s", "3")
    workers = server.workers()
    server.process.send_signal(signal.SIGSTOP)
    with stopped(*workers):
        time.sleep(5)  # no synchronisation: this is the time
        server.process.send_signal(signal.SIGCONT)
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert server.stop() == 0
    assert server.log.read_text() == ""


SLEEPS = """
import os, time
from shorttail.server.systemd import Notifier

def beat(self, flag={flag!r}):  # it comes between two waits for events
    if os.path.exists(flag):
        os.remove(flag)
        time.sleep(3)

Notifier.beat = beat
"""


def test_a_supervisor_that_stood_still_blames_nobody(store, tmp_path):
    """Wherever it was just then."""
    flag, log, folder = tmp_path / "flag", tmp_path / "log", tmp_path / "path"
    folder.mkdir()
    environment = environment_after(folder, SLEEPS.format(flag=str(flag)))
    server = Server(store, "--workers", "2", "--hang-deadline-s", "2", log=log, env=environment)
    try:
        flag.touch()
        until(lambda: not flag.exists(), server)
        time.sleep(3.5)  # no synchronisation: it sleeps, and then looks
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
        assert server.stop() == 0
    finally:
        server.kill()
    assert log.read_text() == ""
