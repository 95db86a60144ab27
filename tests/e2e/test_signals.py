"""Signals to the processes of a server and to commands: none ends a process by surprise, and Ctrl-C leaves nothing."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving import (
    PREDICT,
    PREDICTED,
    TIMEOUT_S,
    Server,
    alive,
    children_of,
    environment_after,
    make_store,
    until,
)

import shorttail as st

SHORTTAIL = [sys.executable, "-m", "shorttail"]
ROWS = 2_000_000


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("served"))


def wait_for(condition, process):
    """Wait until a process makes `condition` true, and return its result. No time is asserted."""
    end_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < end_s
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    return found


@pytest.fixture
def begin(tmp_path):
    """Return begin(*arguments, script=""), which starts a command in a process group of its own, as a terminal does."""
    begun = []

    def begin_command(*arguments, script=""):
        folder = tmp_path / f"site{len(begun)}"
        folder.mkdir()
        process = subprocess.Popen(
            [*SHORTTAIL, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env=environment_after(folder, script),
        )
        begun.append(process)
        return process

    yield begin_command
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def interrupt(process):
    """Press Ctrl-C: SIGINT for the whole group. Return (exit code, stderr), when all processes have ended."""
    children = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    end_s = time.monotonic() + TIMEOUT_S
    while any(map(alive, children)):
        assert time.monotonic() < end_s, "children are left"
        time.sleep(0.01)
    return process.returncode, errors


def is_locked(path):
    if not path.exists():
        return False
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# -- servers ---------------------------------------------------------------------------------------------------------


def test_no_signal_ends_a_process_of_a_server(store, tmp_path):
    server = Server(store, "--workers", "2", log=tmp_path / "log")
    try:
        until(lambda: server.children("writer"), server)
        with server.connect() as peer:
            until(lambda: peer.ask(0, 1, "delete", ["stats", {"user_id": -1}])[2] is None, server)
        children = [*server.children("writer"), *server.workers()]
        for pid in [server.process.pid, *children]:
            before = len(server.log.read_text())
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGUSR1)
            until(lambda before=before: "(most recent call first)" in server.log.read_text()[before:], server)
        for pid in children:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
                os.kill(pid, number)
        with server.connect() as one, server.connect() as other:
            assert one.ask(*PREDICT) == PREDICTED
            assert other.ask(*PREDICT) == PREDICTED
        assert [*server.children("writer"), *server.workers()] == children
        assert not re.search("died|error", server.log.read_text())
        assert server.stop(signal.SIGQUIT) == 0
        assert not any(map(alive, children))
    finally:
        server.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGQUIT, 0)])
def test_a_server_is_interrupted_while_it_starts(begin, store, tmp_path, number, code):
    slow = "import sys, time\nif 'shorttail.server.worker' in sys.orig_argv: time.sleep(600)"
    socket = tmp_path / "socket"
    process = begin("serve", "--store", store, "--port", "0", "--http-port", "0", "--uds", socket, script=slow)
    wait_for(lambda: len(children_of(process.pid)) == 2, process)
    children = children_of(process.pid)
    process.send_signal(number)
    assert process.communicate(timeout=TIMEOUT_S) == ("", "")
    assert process.returncode == code
    assert not any(map(alive, children))
    assert not socket.exists()


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    ones = pa.array([1] * ROWS)
    taste = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 2 * ROWS, pa.float32()), 2)
    columns = {"age": ones, "visits": ones, "tier": pa.array(["new"] * ROWS), "taste": taste}
    pq.write_table(pa.table({"user_id": pa.array(range(ROWS))} | columns), path)
    return path


def tier(store, user):
    with st.Engine.open(store) as engine:
        return engine.get_online_features(["stats:tier"], {"user_id": user})["stats:tier"].tolist()


def test_a_load_is_interrupted(begin, rows, tmp_path):
    store = make_store(tmp_path)
    command = ("load", "stats", rows, "--store", store)
    process = begin(*command)
    wait_for(lambda: is_locked(store / "load.lock"), process)
    assert interrupt(process) == (130, "\nerror: interrupted\n")
    assert tier(store, 1) == ["gold"]
    with st.Engine.open(store) as engine:
        assert engine.load("stats", {"user_id": [1, 2], "age": [1.0] * 2, "visits": [1] * 2, "tier": ["x"] * 2,
                                     "taste": [[1.0, 2.0]] * 2}) == 2  # fmt: skip


def test_a_push_is_interrupted(begin, rows, tmp_path):
    """The rows that were committed before stay."""
    store = make_store(tmp_path)
    process = begin("push", "stats", rows, "--store", store)
    wait_for(lambda: tier(store, 3) == ["new"], process)
    assert interrupt(process) == (130, "\nerror: interrupted\n")
    assert tier(store, 3) == ["new"]
    assert tier(store, ROWS - 1) == [None]
    done = subprocess.run([*SHORTTAIL, "verify", "--store", store], capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0


def test_a_backup_is_interrupted(begin, store, tmp_path):
    slow = "import os, time\nreal = os.fsync\nos.fsync = lambda fd: (time.sleep(1), real(fd))"
    process = begin("backup", tmp_path / "copy", "--store", store, script=slow)
    wait_for(lambda: list(tmp_path.glob(".copy*")), process)
    assert interrupt(process) == (130, "\nerror: interrupted\n")
    assert not list(tmp_path.glob("*copy*"))


def test_a_verify_is_interrupted(begin, store):
    slow = "import sys, time\nif 'shorttail.store.checks' in sys.orig_argv: time.sleep(600)"
    process = begin("verify", "--store", store, script=slow)
    wait_for(lambda: children_of(process.pid), process)
    assert interrupt(process) == (130, "\nerror: interrupted\n")


def test_a_command_is_interrupted_while_it_is_imported(begin):
    script = """
import builtins
real = builtins.__import__
def importing(name, *arguments, **more):
    if name == "click":
        raise KeyboardInterrupt
    return real(name, *arguments, **more)
builtins.__import__ = importing
"""
    process = begin("stat", "--store", "nowhere", script=script)
    assert process.communicate(timeout=TIMEOUT_S) == ("", "error: interrupted\n")
    assert process.returncode == 130


def test_no_signal_ends_a_command_by_surprise(begin, rows, tmp_path):
    store = make_store(tmp_path)
    process = begin("load", "stats", rows, "--store", store)
    wait_for(lambda: is_locked(store / "load.lock"), process)
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "(most recent call first)" in errors
    assert tier(store, ROWS - 1) == ["new"]
