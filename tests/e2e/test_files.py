"""Processes that may open no more files: what is open is served, and what cannot be served is refused at once."""

import contextlib
import re
import resource
import socket
from pathlib import Path

import pytest
from http_asking import Asking, ask, http_port
from prometheus_client.parser import text_string_to_metric_families
from serving import PREDICT, PREDICTED, TIMEOUT_S, Server, until

FEW = 200


def limited(store, log, *options, files=FEW):
    """Start a server whose processes may open so few files."""
    return Server(store, *options, log=log, prefix=["prlimit", f"--nofile={files}", "--"])


def value(text, name, **labels):
    """Return the value of a metric in the text of /metrics."""
    [found] = [
        sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == f"shorttail_{name}" and sample.labels == labels
    ]
    return found


def is_closed(peer):
    """Wait until the server has closed a connection; False if it sends something instead."""
    peer.settimeout(TIMEOUT_S)
    try:
        return peer.recv(65536) == b""
    except ConnectionError:
        return True


@pytest.fixture
def kill_at_end():
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.callback(server.kill)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_with_few_files_refuses_connections_and_says_why(store, tmp_path, workers, kill_at_end):
    server = limited(store, tmp_path / "log", "--workers", str(workers))
    kill_at_end(server)
    [line] = server.log.read_text().splitlines()
    assert re.fullmatch(
        rf"the system allows a process {FEW} open files, and --max-connections 16384 needs up to \d+: it takes fewer"
        r" connections; raise the limit \(ulimit -n, .*", line
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        peers, answers = [], []
        for _ in range(workers * FEW):
            peers.append(stack.enter_context(server.connect()))
            answers.append(answer_of(peers[-1]))
        refused = [answer for answer in answers if answer not in (PREDICTED, None)]
        assert answers.count(PREDICTED) >= workers * 30
        assert len(refused) >= workers * 10
        for answer in refused:
            assert answer[2]["code"] == "RESOURCE_EXHAUSTED"
            assert re.fullmatch(r"more than \d+ connections; connect again later", answer[2]["message"])
        served = [peer for peer, answer in zip(peers, answers, strict=True) if answer == PREDICTED]
        assert [peer.ask(*PREDICT) for peer in served] == [PREDICTED] * len(served)
        assert ask(server, "GET", "/readyz")[0] == 200
        until(lambda: value(read(server), "connections_refused_total", protocol="rpc") >= len(refused), server)
        until(lambda: "connections refused: this process may open so few files" in server.log.read_text(), server)
    assert len(server.log.read_text().splitlines()) <= 1 + 2 * workers + 1
    until(lambda: served_again(server), server)
    assert server.stop() == 0


def answer_of(peer):
    """Return the answer to a prediction, None if the connection was closed."""
    try:
        return peer.ask(*PREDICT)
    except ConnectionError:
        return None


def served_again(server):
    with server.connect() as peer:
        return answer_of(peer) == PREDICTED


def probe(server):
    """Return the status of /livez, 0 if the connection was closed."""
    try:
        return ask(server, "GET", "/livez")[0]
    except ConnectionError:
        return 0


def read(server):
    status, text = ask(server, "GET", "/metrics")
    assert status == 200
    return text


def test_http_connections_that_take_all_files_leave_room_for_probes(store, tmp_path, kill_at_end):
    server = limited(store, tmp_path / "log")
    kill_at_end(server)
    with contextlib.ExitStack() as stack:
        busy = []
        with contextlib.suppress(ConnectionError):
            for _ in range(FEW):
                busy.append(Asking(server, stack))
                busy[-1].begin(1000)
        until(lambda: probe(server) == 200, server)  # the others in the reserve have been answered
        until(lambda: value(read(server), "connections_refused_total", protocol="http") > 0, server)
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
    lines = [line for line in server.log.read_text().splitlines() if "HTTP connections, none of them idle" in line]
    assert len(lines) == 1, "many refused connections are one line"
    assert server.stop() == 0


@contextlib.contextmanager
def without_files(pid):
    """Let a process open no further file within the block."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    lowest = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


# Who has no file left, and how many workers there are: one worker accepts by itself, several get what the supervisor
# accepts.
CASES = {"the worker": 1, "all workers": 2, "the supervisor": 2}


@pytest.mark.parametrize("who", CASES)
def test_without_any_file_a_connection_is_closed_at_once_and_counted(store, tmp_path, who, kill_at_end):
    server = Server(store, "--workers", str(CASES[who]), log=tmp_path / "log")
    kill_at_end(server)
    pids = [server.process.pid] if who == "the supervisor" else server.workers()
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(server.connect()) for _ in range(4)]
        assert [peer.ask(*PREDICT) for peer in peers] == [PREDICTED] * 4
        http = [Asking(server, stack) for _ in range(8)]
        assert [asking.probe() for asking in http] == [200] * 8
        with contextlib.ExitStack() as starved:
            for pid in pids:
                starved.enter_context(without_files(pid))
            for n in range(1, 6):
                with socket.create_connection(server.address) as extra:
                    assert is_closed(extra)
                until(lambda n=n: value(metrics(http[0]), "file_shortages_total") >= n, server)
            if who != "the supervisor":
                with socket.create_connection(("127.0.0.1", http_port(server))) as extra:
                    assert is_closed(extra)
            assert [peer.ask(*PREDICT) for peer in peers] == [PREDICTED] * 4
            assert [asking.probe() for asking in http] == [200] * 8
            assert server.workers() == pids if who != "the supervisor" else True
        lines = server.log.read_text().splitlines()
        assert 1 <= len(lines) <= len(pids)
        assert all("may open no more files; raise the limit (ulimit -n" in line for line in lines)
        for _ in range(8):  # all is well again
            with server.connect() as peer:
                assert peer.ask(*PREDICT) == PREDICTED
        assert ask(server, "GET", "/readyz")[0] == 200
    assert server.stop() == 0


def metrics(asking):
    """Return the text of /metrics over a connection that is open."""
    asking.send("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    status, text = asking.answer()
    assert status == 200
    return text
