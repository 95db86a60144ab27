"""A store that is deleted, moved or replaced while it is open: no write is acknowledged that would be lost.

Readers go on with the store that they have mapped, the server says that it is not ready, and one line in the log says
why. Only a file whose content was overwritten cannot be read any more.
"""

import os
import shutil
import signal

import pytest
from http_asking import ask
from serving import PREDICT, PREDICTED, Server, hang_up, make_store, until, write_sum

import shorttail as st
from shorttail.errors import NotFound, Unavailable
from shorttail.store.backup import backup


def row(user, tier="new"):
    return {"user_id": user, "age": 1.0, "visits": 1, "tier": tier, "taste": [1.0, 2.0]}


def other_store(home):
    """Make a store in which all rows of the usual keys are others, and return its path."""
    (home / "other").mkdir()
    other = make_store(home / "other")
    with st.Engine.open(other) as engine:
        engine.push("stats", row([1, 2, 3], "other") | {"user_id": [1, 2, 3]})
    return other


def delete(home):
    shutil.rmtree(home / "store")


def delete_and_make_again(home):
    other = other_store(home)
    shutil.rmtree(home / "store")
    shutil.copytree(other, home / "store")


def move(home):
    (home / "store").rename(home / "moved")


def move_and_put_another(home):
    other = other_store(home)
    (home / "store").rename(home / "moved")
    other.rename(home / "store")


def restore_a_backup(home):
    """As `rsync` does it: each file is written beside the old one and takes its place."""
    backup(home / "store", home / "backup")
    (home / "backup" / "data.mdb").replace(home / "store" / "data.mdb")


def delete_the_lock_file(home):
    """Then another process would make a new one, and both would write at once."""
    (home / "store" / "lock.mdb").unlink()


def delete_the_generation(home):
    """Then no reader would see the commits of another process."""
    (home / "store" / "generation").unlink()


def switch_the_symlink(home):
    other = other_store(home)
    (home / "next").symlink_to(other)
    (home / "next").rename(home / "store")


CHANGES = {
    delete: "deleted",
    delete_and_make_again: "replaced",
    move: "deleted",
    move_and_put_another: "replaced",
    restore_a_backup: "replaced",
    delete_the_lock_file: "deleted",
    delete_the_generation: "deleted",
    switch_the_symlink: "replaced",
}


def make(home, change):
    store = make_store(home)
    if change is switch_the_symlink:
        store.rename(home / "first")
        store.symlink_to(home / "first")
    return store


def message(store, what):
    return f"store '{store}' was {what} while it was open, and takes no writes: restart the server, or reopen the store"


@pytest.fixture
def start(tmp_path):
    servers = []

    def start_server(store, *options):
        servers.append(Server(store, "--http-port", "0", *options, log=tmp_path / "log"))
        return servers[-1]

    yield start_server
    for one in servers:
        one.kill()


def readyz(server):
    status, body = ask(server, "GET", "/readyz")
    return status, body.decode()


@pytest.mark.parametrize("change", CHANGES)
def test_a_server_stops_taking_writes(start, tmp_path, change):
    store = make(tmp_path, change)
    server = start(store)
    expected = message(store, CHANGES[change])
    refused = {"code": "UNAVAILABLE", "message": expected}
    with server.connect() as peer:
        until(lambda: peer.ask(0, 1, "push", ["stats", row(7)])[2] is None, server)
        change(tmp_path)
        assert peer.ask(0, 2, "push", ["stats", row(8)]) == [1, 2, refused, None]
        assert peer.ask(0, 3, "delete", ["stats", {"user_id": 1}]) == [1, 3, refused, None]
        until(lambda: readyz(server) == (503, f"{expected}\n"), server)
        until(server.log.read_text, server)
        assert peer.ask(*PREDICT) == PREDICTED
        found = peer.ask(0, 4, "get_online_features", [["stats:tier"], {"user_id": [1, 7, 8]}])
        assert found[3]["values"] == [["gold", "new", None]]
        assert peer.ask(0, 5, "push", ["stats", row(8)]) == [1, 5, refused, None]
    assert server.stop() == 0
    assert server.log.read_text() == f"error: {expected}\n"


def test_a_server_whose_store_comes_back_takes_writes_again(start, tmp_path):
    store = make_store(tmp_path)
    server = start(store)
    with server.connect() as peer:
        until(lambda: peer.ask(0, 1, "push", ["stats", row(7)])[2] is None, server)
        store.rename(tmp_path / "moved")
        until(server.log.read_text, server)
        assert peer.ask(0, 2, "push", ["stats", row(8)])[2]["code"] == "UNAVAILABLE"
        (tmp_path / "moved").rename(store)
        until(lambda: peer.ask(0, 3, "push", ["stats", row(8)])[2] is None, server)
        until(lambda: readyz(server) == (200, "ok\n"), server)
        until(lambda: "takes writes" in server.log.read_text(), server)
    assert server.stop() == 0
    assert server.log.read_text() == (
        f"error: {message(store, 'deleted')}\nstore '{store}' is at its place again, and takes writes\n"
    )
    assert tiers(store, [7, 8]) == ["new", "new"]


def tiers(store, users):
    with st.Engine.open(store) as engine:
        return engine.get_online_features(["stats:tier"], {"user_id": users})["stats:tier"].tolist()


def test_no_acknowledged_row_is_lost(start, tmp_path):
    """Pushes run while the store is moved away: what was acknowledged is in it."""
    store = make_store(tmp_path)
    server = start(store, "--workers", "2")
    acknowledged = []
    with server.connect() as peer:
        until(lambda: peer.ask(0, 1, "push", ["stats", row(7)])[2] is None, server)
        for user in range(1000, 10_000):
            if user == 1200:
                store.rename(tmp_path / "moved")
            error = peer.ask(0, user, "push", ["stats", row(user)])[2]
            if error is not None:
                break
            acknowledged.append(user)
    assert error == {"code": "UNAVAILABLE", "message": message(store, "deleted")}
    assert acknowledged == list(range(1000, 1200))
    assert server.stop() == 0
    assert set(tiers(tmp_path / "moved", acknowledged)) == {"new"}


def test_a_file_that_is_overwritten_in_place_is_not_read_any_more(start, tmp_path):
    """As `cp` does it, which writes into the file that is mapped: its pages hold other rows at once."""
    store = make_store(tmp_path)
    with st.Engine.open(store) as engine:
        for tier in ("one", "two", "three"):
            engine.push("stats", row(1, tier))
    backup(store, tmp_path / "backup")
    server = start(store)
    refused = {"code": "UNAVAILABLE", "message": message(store, "overwritten")}
    with server.connect() as peer:
        until(lambda: peer.ask(0, 1, "push", ["stats", row(7)])[2] is None, server)
        overwrite(store / "data.mdb", (tmp_path / "backup" / "data.mdb").read_bytes())
        assert peer.ask(0, 2, "push", ["stats", row(8)]) == [1, 2, refused, None]
        until(lambda: readyz(server) == (503, f"{refused['message']}\n"), server)
        until(lambda: peer.ask(*PREDICT)[2] == refused, server)
        assert peer.ask(0, 4, "get_online_features", [["stats:tier"], {"user_id": [1, 7]}])[2] == refused
        until(server.log.read_text, server)
    assert server.stop() == 0
    assert server.log.read_text() == f"error: {refused['message']}\n"
    assert tiers(store, [1, 7, 8]) == ["three", None, None]


def overwrite(file, data):
    """Write into a file, which is never empty meanwhile: touching the map then would end in SIGBUS."""
    with file.open("r+b") as opened:
        opened.write(data)
        opened.truncate(len(data))


@pytest.mark.parametrize("change", CHANGES)
def test_an_embedded_engine_stops_taking_writes(tmp_path, change):
    store = make(tmp_path, change)
    write_sum(tmp_path / "next.onnx", 2.0)
    with st.Engine.open(store) as engine:
        change(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        shop = st.Entity("shop", keys={"shop_id": st.Int64})
        view = st.FeatureView("more", entity=shop, features=[st.Feature("x", st.Float32)])
        for write in (
            lambda: engine.push("stats", row(8)),
            lambda: engine.delete("stats", {"user_id": 1}),
            lambda: engine.load("stats", row([8]) | {"user_id": [8]}),
            lambda: engine.apply([shop, view]),
            lambda: engine.deploy("total", tmp_path / "next.onnx"),
            lambda: backup(engine.store, tmp_path / "copy"),
        ):
            with pytest.raises(Unavailable) as caught:
                write()
            assert caught.value.message == message(store, CHANGES[change])
        assert sorted(tmp_path.rglob("*")) == before
        assert engine.store.changed == message(store, CHANGES[change])
        found = engine.get_online_features(["stats:tier"], {"user_id": [1, 8]})["stats:tier"]
        assert found.tolist() == ["gold", None]
        if change is restore_a_backup:  # the store that is there now has the old one's lock file
            with pytest.raises(Unavailable, match="is open in this process"):
                st.Engine.open(store)
        elif CHANGES[change] == "replaced":
            with st.Engine.open(store) as second:  # of the same process, and of the store that is there now
                assert second.push("stats", row(8)) == 1
        elif not store.exists():
            with pytest.raises(NotFound):
                st.Engine.open(store)


def test_a_store_that_was_moved_is_not_opened_twice(tmp_path):
    """LMDB does not work if one process opens a file twice."""
    store = make_store(tmp_path)
    with st.Engine.open(store) as engine:
        move(tmp_path)
        old, new = store, tmp_path / "moved"
        expected = f"store '{new}' is open in this process as '{old}', where it is not any more; close it first"
        with pytest.raises(Unavailable) as caught:
            st.Engine.open(tmp_path / "moved")
        assert caught.value.message == expected
        assert engine.get_online_features(["stats:tier"], {"user_id": [1]})["stats:tier"].tolist() == ["gold"]
    assert tiers(tmp_path / "moved", [1]) == ["gold"]


def test_a_process_that_changes_its_folder_still_writes(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    with st.Engine.open("store") as engine:
        monkeypatch.chdir("/")
        assert engine.push("stats", row(8)) == 1
    assert tiers(store, [8]) == ["new"]


def test_an_embedded_engine_does_not_read_a_file_that_was_overwritten(tmp_path):
    store = make_store(tmp_path)
    backup(store, tmp_path / "backup")
    with st.Engine.open(store) as engine:
        for tier in ("one", "two", "three"):
            engine.push("stats", row(1, tier))
        overwrite(store / "data.mdb", (tmp_path / "backup" / "data.mdb").read_bytes())
        with pytest.raises(Unavailable, match="was overwritten while it was open"):
            engine.push("stats", row(8))
        engine.store.release_if_overwritten()  # which a thread does once a second
        with pytest.raises(Unavailable, match="was overwritten while it was open"):
            engine.get_online_features(["stats:tier"], {"user_id": [1]})
    assert tiers(store, [1, 8]) == ["gold", None]


def test_a_worker_does_not_push_to_a_store_that_it_does_not_serve(start, tmp_path):
    """A writer that is started again has the store that is at the path, while its worker still has the old one."""
    store = make_store(tmp_path)
    server = start(store)
    with server.connect() as peer:
        until(lambda: peer.ask(0, 1, "push", ["stats", row(7)])[2] is None, server)
        delete_and_make_again(tmp_path)
        until(server.log.read_text, server)
        [writer] = server.children("writer")
        os.kill(writer, signal.SIGKILL)
        until(lambda: server.children("writer") not in ([], [writer]), server)
        until(lambda: readyz(server)[0] == 503, server)
        refused = {"code": "UNAVAILABLE", "message": message(store, "replaced")}
        assert peer.ask(0, 2, "push", ["stats", row(8)])[2] == refused
    hang_up(server)  # the next worker has the new store too
    with server.connect() as peer:
        until(lambda: peer.ask(0, 3, "push", ["stats", row(9)])[2] is None, server)
        found = peer.ask(0, 4, "get_online_features", [["stats:tier"], {"user_id": [1, 7, 9]}])
        assert found[3]["values"] == [["other", None, "new"]]
    until(lambda: readyz(server)[0] == 200, server)
