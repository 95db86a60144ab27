"""The end of a server's writer, killed, stopped or with its server, and the outcome of the pushes that it has."""

import os
import re
import signal
import stat
import threading

import msgpack
import pytest
from pushing import Pushing, row, tiers, until
from serving import Peer, alive, make_store

import shorttail as st

DIED = "the writer died before it answered; the rows may or may not be stored: push again, which is safe"
AWAY = "the writer is starting again; send it again"


@pytest.fixture
def start(tmp_path):
    servers = []

    def start_server(*options):
        store = make_store(tmp_path)
        servers.append(Pushing(store, "--workers", "2", *options, log=tmp_path / "log"))
        servers[-1].store = store
        # An answer other than UNAVAILABLE means that the writer runs. Connections go to the workers in turn, so ask
        # each.
        with servers[-1].connect() as one, servers[-1].connect() as other:
            for peer in (one, other):
                until(lambda peer=peer: peer.ask(0, 0, "delete", ["stats", {"user_id": -1}])[2] is None, "it is there")
        return servers[-1]

    yield start_server
    for one in servers:
        one.kill()


def test_a_killed_writer_is_replaced_and_its_pushes_get_an_error(start):
    server = start()
    writer = server.writer()
    with server.connect() as peer:
        with server.held():
            peer.send(msgpack.packb([0, 1, "push", ["stats", row(1)]]))
            peer.send(msgpack.packb([2, "push", ["stats", row(2)]]))
            assert peer.ask(0, 2, "ping", []) == [1, 2, None, "pong"]
            os.kill(writer, signal.SIGKILL)
            assert peer.reply() == [1, 1, {"code": "UNAVAILABLE", "message": DIED}, None]
            away = peer.ask(0, 3, "push", ["stats", row(1)])
            if away[2] is not None:  # or the writer was quick
                assert away == [1, 3, {"code": "UNAVAILABLE", "message": AWAY}, None]
            assert tiers(peer, 3) == ["tin"]
        until(lambda: peer.ask(0, 4, "push", ["stats", row(3)])[2] is None, "the next writer takes it")
        assert tiers(peer, 3) == ["new"]
    assert server.writer() != writer
    assert server.stop() == 0
    said = rf"writer \(pid {writer}\) died: signal 9 \(SIGKILL\); starting it again in 0\.1 s\n"
    assert re.fullmatch(said, server.log.read_text())


def test_a_writer_that_is_stopped_answers_first(start):
    server = start()
    writer = server.writer()
    with server.connect() as peer:
        with server.held():
            os.kill(writer, signal.SIGTERM)
            for n in range(100):
                peer.send(msgpack.packb([0, n, "push", ["stats", row(1000 + n)]]))
        replies = [peer.reply() for _ in range(100)]
        until(lambda: peer.ask(0, 0, "push", ["stats", row(1)])[2] is None, "the next writer takes it")
        stored = dict(zip(range(100), tiers(peer, *range(1000, 1100)), strict=True))
    for _, n, error, _ in replies:
        assert error is None or error["code"] == "UNAVAILABLE"
        assert error is not None or stored[n] == "new"


def test_pushes_acknowledged_before_sigterm_are_stored_and_all_are_answered_or_closed(start):
    server = start()
    acknowledged, begun = set(), threading.Barrier(9)

    def push(first):
        with server.connect() as peer:
            begun.wait()
            for user in range(first, first + 100_000):
                try:
                    reply = peer.ask(0, user, "push", ["stats", row(user)])
                except OSError:
                    return
                if reply is None:
                    return
                assert reply[1] == user
                if reply[2] is None:
                    acknowledged.add(user)
                else:
                    assert reply[2]["code"] == "UNAVAILABLE"

    pushers = [threading.Thread(target=push, args=(100_000 * n,)) for n in range(1, 9)]
    for pusher in pushers:
        pusher.start()
    begun.wait()
    until(lambda: len(acknowledged) > 200, "some are written")
    path = server.worker_path()
    assert server.stop() == 0
    for pusher in pushers:
        pusher.join()
    assert server.log.read_text() == ""
    assert not path.parent.exists()
    with st.Engine.open(server.store) as engine:
        users = sorted(acknowledged)
        found = engine.get_online_features(["stats:tier"], {"user_id": users})["stats:tier"]
    assert set(found) == {"new"}


def test_pushes_in_flight_at_sigterm_are_answered(start):
    server = start()
    with server.connect() as peer:
        with server.held():
            for n in range(20):
                peer.send(msgpack.packb([0, n, "push", ["stats", row(n)]]))
            peer.send(msgpack.packb([2, "push", ["stats", row(20)]]))
            assert peer.ask(0, 99, "ping", []) == [1, 99, None, "pong"]
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(server.address), "it listens no more")
        assert sorted(peer.reply() for _ in range(20)) == [[1, n, None, {"rows": 1, "older": 0}] for n in range(20)]
        assert peer.reply() is None
    assert server.wait() == 0
    assert server.log.read_text() == ""
    with st.Engine.open(server.store) as engine:
        found = engine.get_online_features(["stats:tier"], {"user_id": list(range(21))})["stats:tier"]
    assert found.tolist() == ["new"] * 21


def refuses(address):
    try:
        Peer(address).socket.close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_writer_accepts_workers_only_and_ends_with_its_supervisor(start):
    server = start()
    folder = server.worker_path().parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    writer = server.writer()
    server.kill()
    until(lambda: not alive(writer), "the writer has ended")
    assert not folder.exists()


def test_the_writer_follows_writes_of_other_processes(start):
    """The next push uses the definitions and rows that another process has written."""
    server = start()
    user = st.Entity("user", keys={"user_id": st.Int64})
    more = st.FeatureView("more", entity=user, features=[st.Feature("x", st.Bool)])
    with st.Engine.open(server.store) as engine, server.connect() as peer:
        assert peer.ask(0, 1, "push", ["more", {"user_id": 1, "x": True}])[2]["code"] == "NOT_FOUND"
        engine.apply([user, more])
        assert peer.ask(0, 2, "push", ["more", {"user_id": 1, "x": True}]) == [1, 2, None, {"rows": 1, "older": 0}]
        assert engine.get_online_features(["more:x"], {"user_id": 1}).to_dict() == {"more:x": [True]}
        assert engine.push("more", {"user_id": 1, "x": False}) == 1
        assert peer.ask(0, 3, "get_online_features", [["more:x"], {"user_id": 1}])[3]["values"] == [[False]]
