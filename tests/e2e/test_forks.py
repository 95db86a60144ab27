"""Forks: what a child does with the clients and the engines of its parent, beside a real server and a real store."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import select
import signal
import socket
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from serving import ROWS, TIMEOUT_S, make_store

import shorttail as st
from shorttail.client.calls import Call, Deadline
from shorttail.client.retries import backoff_s
from shorttail.store import Store

TOKEN = "n" * 32
USERS = 200


def in_child(act):
    """Run `act` in a forked child and return its result, or the child's exception as text. A child that hangs fails."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about fork because of threads of the test
        pid = os.fork()
    if pid == 0:
        try:
            said = act()
        except st.errors.ShorttailError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = traceback.format_exc()
        os.write(write_end, json.dumps(said).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        ready, _, _ = select.select([pipe], [], [], TIMEOUT_S)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        said = pipe.read()
    os.waitpid(pid, 0)
    assert ready, "the child hangs"
    return json.loads(said)


@contextlib.contextmanager
def held(lock):
    """Let another thread hold a lock during the block."""
    taken, release = threading.Event(), threading.Event()

    def run():
        with lock:
            taken.set()
            release.wait(TIMEOUT_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert taken.wait(TIMEOUT_S)
        yield
    finally:
        release.set()
        thread.join()


# -- clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """A store in which the visits of user i are 1000 * i."""
    path = make_store(tmp_path_factory.mktemp("users"))
    with st.Engine.open(path) as engine:
        rows = {name: [values[0]] * USERS for name, values in ROWS.items()}
        engine.push("stats", rows | {"user_id": range(USERS), "visits": [1000 * i for i in range(USERS)]})
    return path


@pytest.fixture(params=["plain", "tls and a token"])
def served(request, start, users, tmp_path):
    """A running server, as (address, options of its clients)."""
    if request.param == "plain":
        host, port = start(of=users).address
        return f"{host}:{port}", {}
    certificates = request.getfixturevalue("certificates")
    (tmp_path / "tokens").touch(0o600)
    (tmp_path / "tokens").write_text(f"serve {TOKEN}\n")
    server = start(
        *("--token-file", tmp_path / "tokens"),
        *("--tls-cert", certificates / "server.pem", "--tls-key", certificates / "server.key"),
        of=users,
    )
    return f"127.0.0.1:{server.address[1]}", {"token": TOKEN, "tls": str(certificates / "ca.pem")}


def visits(client, user):
    return client.get_online_features(["stats:visits"], {"user_id": [user]})["stats:visits"].tolist()


def wrong_of_child(client, first, gate, out):
    gate.wait(TIMEOUT_S)
    try:
        out.put([user for user in range(first, first + 20) if visits(client, user) != [1000 * user]])
    except BaseException as error:
        out.put(repr(error))


def test_children_and_their_parent_share_a_client_and_get_their_own_answers(served):
    address, options = served
    context = multiprocessing.get_context("fork")
    with st.Client(address, **options) as client:
        assert visits(client, 7) == [7000]  # its connection is idle in the pool now
        mine = client._pool._idle[0].socket
        before = mine.getsockname()
        for _ in range(3):
            out, gate = context.Queue(), context.Barrier(5)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                children = [context.Process(target=wrong_of_child, args=(client, 20 * i, gate, out)) for i in range(4)]
                for child in children:
                    child.start()
            gate.wait(TIMEOUT_S)
            assert [user for user in range(100, 160) if visits(client, user) != [1000 * user]] == []
            assert [out.get(timeout=TIMEOUT_S) for _ in children] == [[]] * 4
            for child in children:
                child.join()
        assert client._pool._idle[0].socket is mine, "the parent's own connection goes on"
        assert mine.getsockname() == before


def open_files():
    """Return what the descriptors of this process are: "socket:[INODE]", paths."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing
            found.append(str(descriptor.readlink()))
    return found


def test_a_child_lets_go_of_the_connections_of_its_parent(served):
    address, options = served

    async def run():
        async with await st.AsyncClient.connect(address, connections=2, **options) as theirs:
            descriptors = [line.stream._transport.get_extra_info("socket").fileno() for line in theirs._lines]
            with st.Client(address, **options) as client:
                client.ping()
                descriptors.append(client._pool._idle[0].socket.fileno())
                sockets = {str(Path(f"/proc/self/fd/{number}").readlink()) for number in descriptors}
                assert len(sockets) == 3
                assert sockets.isdisjoint(in_child(open_files))
                client.ping()
            await theirs.ping()

    asyncio.run(run())


def test_an_async_client_connects_again_in_the_event_loop_of_a_child(served):
    address, options = served

    async def ask(client, first):
        found = await asyncio.gather(
            *(client.get_online_features(["stats:visits"], {"user_id": [first + i]}) for i in range(20))
        )
        return [f["stats:visits"].tolist() for f in found]

    async def run():
        async with await st.AsyncClient.connect(address, connections=2, **options) as client:
            for first in (0, 40):
                in_flight = asyncio.gather(*(ask(client, 100 + i) for i in range(5)))
                await asyncio.sleep(0)  # the requests are sent now, and the child is forked meanwhile
                said = in_child(lambda first=first: asyncio.run(ask(client, first)))
                assert said == [[1000 * user] for user in range(first, first + 20)]
                assert await in_flight == [[[1000 * (100 + i + j)] for j in range(20)] for i in range(5)]

    asyncio.run(run())


def test_a_client_that_was_never_connected_works_in_a_child(served):
    address, options = served

    async def ask():
        async with client:
            return (await client.get_online_features(["stats:visits"], {"user_id": [3]}))["stats:visits"].tolist()

    client = st.AsyncClient(address, **options)
    assert in_child(lambda: asyncio.run(ask())) == [3000]
    assert asyncio.run(ask()) == [3000]


def test_locks_that_are_held_at_a_fork_do_not_hang_the_child(start, users):
    host, port = start(of=users).address
    with st.Client(f"{host}:{port}", max_connections=1) as client:
        client.ping()
        with held(client._pool._lock):
            assert in_child(lambda: visits(client, 5)) == [5000]


def test_a_connection_that_is_in_use_at_a_fork_is_free_in_the_child(start, users):
    host, port = start(of=users).address
    with st.Client(f"{host}:{port}", max_connections=1) as client:
        client.ping()
        taken = client._pool.take(Call(client.address, 0, "ping", [], Deadline(5.0)))
        assert in_child(lambda: visits(client, 5)) == [5000]
        client._pool.give(taken)
        assert visits(client, 6) == [6000]


def test_the_server_sees_that_the_parent_closes_although_a_child_lives():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        go_on, stop = os.pipe()

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(TIMEOUT_S)
                connection.recv(1000)
                connection.sendall(b"\x94\x01\x00\xc0\xa4pong")
                received.append(connection.recv(1000))

        received = []
        thread = threading.Thread(target=answer)
        thread.start()
        client = st.Client(address)
        client.ping()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            os.close(stop)
            os.read(go_on, 1)  # until the parent has closed the other end
            os._exit(0)
        try:
            client.close()
            thread.join()
            assert received == [b""]
        finally:
            os.close(stop)
            os.waitpid(pid, 0)
            os.close(go_on)


def test_children_do_not_pause_for_the_same_times():
    """The random pauses before retries keep clients apart that lost their server at the same moment."""
    pauses = [in_child(lambda: [backoff_s(10) for _ in range(5)]) for _ in range(3)]
    assert len({tuple(one) for one in pauses}) == 3


# -- engines ---------------------------------------------------------------------------------------------------------

ASKED = {"user_id": [1, 2], "amount": 0.5}
FORKED = "before this process forked"


def use(engine):
    """Predict, look up and write. Returns what predict answered."""
    engine.push("stats", ROWS)
    engine.get_online_features(["stats:tier"], {"user_id": [1]})
    return engine.predict("total", ASKED).outputs["total"].tolist()


def test_an_engine_that_was_closed_before_a_fork_may_be_opened_in_the_child(tmp_path):
    path = make_store(tmp_path)
    with st.Engine.open(path) as first, st.Engine.open(path) as second:
        assert use(first) == use(second) == [11.5, 22.5]
    said = in_child(lambda: [use(st.Engine.open(path)), in_child(lambda: "of a child")])
    assert said == [[11.5, 22.5], "of a child"]
    with st.Engine.open(path) as engine:
        assert use(engine) == [11.5, 22.5]


USES = {
    "predict": lambda e: e.predict("total", ASKED),
    "predict a version": lambda e: e.predict("total", ASKED, version=1),
    "look up": lambda e: e.get_online_features(["stats:age"], {"user_id": [1]}),
    "look up what has no plan yet": lambda e: e.get_online_features(["stats:taste"], {"user_id": [1]}),
    "push": lambda e: e.push("stats", ROWS),
    "delete": lambda e: e.delete("stats", {"user_id": [1]}),
    "load": lambda e: e.load("stats", pa.table(ROWS)),
    "models": lambda e: e.models(),
    "views": lambda e: e.views(),
    "refresh": lambda e: e.refresh(),
    "scan": lambda e: list(e.store.scan("stats")),
    "count": lambda e: e.store.count("stats"),
    "pretouch": lambda e: e.store.pretouch(),
    "open": lambda e: st.Engine.open(e.store.path),
}
LOCKS = {
    "no lock": lambda e: contextlib.nullcontext(),
    "versions": lambda e: e._versions.lock,
    "snapshot": lambda e: e.store._lock,
    "directories": lambda e: e.store._build_lock,
    "write": lambda e: e.store.environment.handle.write_lock,
    "reads": lambda e: e.store.environment.handle._reads,
    "environments": lambda e: e.store.environment._registry_lock,
}


def refusal(act, engine):
    """Return what an engine that must not be used says."""
    try:
        return f"nothing: {act(engine)}"
    except st.errors.ShorttailError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("lock", LOCKS)
def test_an_engine_that_is_still_open_raises_one_clear_error_in_a_child(lock, tmp_path):
    with st.Engine.open(make_store(tmp_path)) as engine:
        assert use(engine) == [11.5, 22.5]
        engine.push("stats", ROWS)  # the snapshot is released, as after every write
        with held(LOCKS[lock](engine)):
            said = in_child(
                lambda: {name: refusal(act, engine) for name, act in USES.items()} | {"close": engine.close()}
            )
        assert said.pop("close") is None
        assert said == dict.fromkeys(USES, said["predict"])
        assert said["predict"].startswith("InvalidArgument: store '")
        assert FORKED in said["predict"]


def test_a_thread_inside_the_store_at_a_fork_does_not_hang_the_child(tmp_path):
    with st.Engine.open(make_store(tmp_path)) as engine:
        use(engine)
        with engine.store.reading():
            said = in_child(lambda: [refusal(USES[name], engine) for name in ("predict", "models", "refresh")])
            assert all(FORKED in line for line in said), said
            assert in_child(engine.close) is None
        assert use(engine) == [11.5, 22.5]


def test_a_child_that_closes_what_its_parent_reads_leaves_the_parents_snapshot(tmp_path):
    """LMDB keeps its readers in shared memory: to end a transaction in the child would end the parent's."""
    path = make_store(tmp_path)
    with st.Engine.open(path) as engine:
        engine.push("stats", {name: [values[0]] * 2000 for name, values in ROWS.items()} | {"user_id": range(2000)})
    with Store.open(path) as store:
        scan = store.scan("stats", batch_rows=100)
        next(scan)

        def readers():  # a thread whose transaction has ended keeps its slot, with "-"
            return [line for line in store.environment.handle.env.readers().splitlines() if not line.endswith("-")]

        before = readers()
        assert len(before) == 3  # a line of titles, the snapshot and the scan

        def leave():
            scan.close()
            store.close()

        assert in_child(leave) is None
        assert FORKED in in_child(lambda: len(list(scan)))
        assert readers() == before
        assert len(list(scan)) > 1


def test_a_load_ends_although_a_child_that_was_forked_in_it_lives(tmp_path):
    go_on, stop = os.pipe()
    children = []

    def batches():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            children.append(os.fork())
        if not children[-1]:
            os.close(stop)
            os.read(go_on, 1)
            os._exit(0)
        yield pa.RecordBatch.from_pydict(ROWS | {"age": np.float32([1, 2, 3])})

    path = make_store(tmp_path)
    try:
        with st.Engine.open(path) as engine:
            schema = next(iter(pa.table(ROWS | {"age": np.float32([1, 2, 3])}).to_batches())).schema
            assert engine.load("stats", pa.RecordBatchReader.from_batches(schema, batches())) == 3
            done = []
            again = threading.Thread(target=lambda: done.append(engine.load("stats", pa.table(ROWS))), daemon=True)
            again.start()
            again.join(TIMEOUT_S)
            assert done == [3], "a second load waits for the lock of the first"
    finally:
        os.close(stop)
        for child in children:
            os.waitpid(child, 0)
        os.close(go_on)
