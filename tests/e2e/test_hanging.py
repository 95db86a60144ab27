"""Workers that hang are killed and replaced; workers that were paused with the whole machine are not.

These tests wait, until a timeout has passed or for the time that a machine is paused.
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


def test_workers_are_not_killed_after_a_pause_of_the_whole_machine(start):
    """As if a container was frozen: the supervisor is paused too."""
    server = start("--workers", "2", "--hang-deadline-s", "3")
    workers = server.workers()
    server.process.send_signal(signal.SIGSTOP)
    with stopped(*workers):
        time.sleep(5)  # not for synchronisation: the length of the pause
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


def test_a_supervisor_that_was_paused_kills_no_worker(store, tmp_path):
    """It may be paused at any place in its loop."""
    flag, log, folder = tmp_path / "flag", tmp_path / "log", tmp_path / "path"
    folder.mkdir()
    environment = environment_after(folder, SLEEPS.format(flag=str(flag)))
    server = Server(store, "--workers", "2", "--hang-deadline-s", "2", log=log, env=environment)
    try:
        flag.touch()
        until(lambda: not flag.exists(), server)
        time.sleep(3.5)  # not for synchronisation: the supervisor sleeps and then checks its workers
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
        assert server.stop() == 0
    finally:
        server.kill()
    assert log.read_text() == ""
