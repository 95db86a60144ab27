"""Partial pushes through `shorttail serve`: features that are not given keep what is stored, for every worker."""

import asyncio
import re

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import error_of, run_well
from pushing import PUSHED, Pushing, row
from serving import make_store

import shorttail as st

REFERENCES = ["stats:age", "stats:visits", "stats:tier", "stats:taste"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("partial")
    server = Pushing(make_store(home), "--workers", "2", "--uds", str(home / "socket"), log=home / "log")
    server.store = home / "store"
    server.uds = str(home / "socket")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture(scope="module")
def peers(server):
    """One connection to each worker."""
    found = []
    for worker in server.workers():
        with server.held(*(other for other in server.workers() if other != worker)):
            found.append(server.connect())
            assert found[-1].ask(0, 1, "ping", []) == [1, 1, None, "pong"]
    yield found
    for peer in found:
        peer.socket.close()


def rows_of(peers, *users):
    """Return [age, visits, tier, taste] of each user, of which all workers say the same."""
    answers = [peer.ask(0, 9, "get_online_features", [REFERENCES, {"user_id": list(users)}]) for peer in peers]
    assert all(answer[2] is None for answer in answers)
    first, *others = [answer[3]["values"] for answer in answers]
    assert others == [first] * len(others)
    return [list(values) for values in zip(*first, strict=True)]


def push_by_client(server, columns):
    with st.Client(server.tcp) as client:
        return client.push("stats", columns, partial=True)


def push_by_async_client(server, columns):
    async def push():
        async with await st.AsyncClient.connect(f"unix:{server.uds}") as client:
            return await client.push("stats", columns, partial=True)

    return asyncio.run(push())


def lists(columns):
    return {name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in columns.items()}


def push_by_bytes(server, columns):
    with server.connect() as peer:
        return peer.ask(0, 1, "push", ["stats", lists(columns), {"partial": True}])[3]["rows"]


def push_by_command(server, columns, *where):
    path = server.store.parent / "rows.parquet"
    pyarrow.parquet.write_table(pa.table(lists(columns)), path)
    done = run_well("push", "stats", str(path), "--partial", *(where or ("--server", server.tcp))).out
    assert re.search(r"; given [\d,]+, loaded ", done)
    return int(done.split()[1].replace(",", ""))


def push_to_the_store(server, columns):
    return push_by_command(server, columns, "--store", str(server.store))


WAYS = [push_by_client, push_by_async_client, push_by_bytes, push_by_command, push_to_the_store]


@pytest.mark.parametrize("push", WAYS)
def test_features_that_are_not_given_stay_for_every_worker(server, peers, push):
    first = 100_000 * (WAYS.index(push) + 1)
    users = np.arange(3000) + first
    whole = {
        "user_id": users,
        "age": np.linspace(0, 1, 3000, dtype=np.float32),
        "visits": np.arange(3000),
        "tier": [f"tier {user}" for user in users],
        "taste": np.stack([users, -users], 1).astype(np.float32),
    }
    with st.Client(server.tcp) as client:
        assert client.push("stats", whole) == 3000
    assert push(server, {"user_id": users + 1, "tier": [f"new {user + 1}" for user in users]}) == 3000
    assert push(server, {"user_id": users[:2], "taste": [[0.5, 0.25], None], "visits": [-1, -2]}) == 2
    assert rows_of(peers, first, first + 1, first + 2999, first + 3000) == [
        [0.0, -1, f"tier {first}", [0.5, 0.25]],
        [whole["age"][1], -2, f"new {first + 1}", None],
        [1.0, 2999, f"new {first + 2999}", [first + 2999.0, -first - 2999.0]],
        [1.5, None, f"new {first + 3000}", None],  # a new row; 1.5 is the default of age
    ]


def test_a_push_of_more_rows_than_a_request_has_is_partial_in_every_part(server, peers):
    users = np.arange(20_000) + 1_000_000
    with st.Client(server.tcp) as client:
        client.push("stats", row(1_019_999, tier="kept"))
        assert client.push("stats", {"user_id": users, "visits": users}, partial=True) == 20_000
    assert rows_of(peers, 1_000_000, 1_019_999) == [
        [1.5, 1_000_000, None, None],
        [1.0, 1_019_999, "kept", [1.0, 2.0]],
    ]


def test_pushes_of_different_features_that_wait_share_a_commit(server, peers):
    peer = peers[0]
    columns = [
        (row(7, event_time=1_000), False),
        ({"user_id": 7, "tier": "a", "event_time": 3_000}, True),
        ({"user_id": 7, "age": 5.0, "event_time": 2_000}, True),  # older than the one before: dropped as a whole
        ({"user_id": [7, 8], "visits": [70, 80], "event_time": [3_000, 1_000]}, True),
        (row(8, event_time=2_000, tier="eight"), False),
        ({"user_id": 8, "taste": [9.0, 8.0]}, True),
    ]
    with st.Engine.open(server.store) as engine, engine.store.environment.read() as txn:
        before = engine.store.environment.sequence(txn)
    with server.held():
        for msgid, (values, partial) in enumerate(columns):
            peer.send(msgpack.packb([0, msgid, "push", ["stats", values, {"partial": partial}]]))
        assert peer.ask(0, 50, "ping", []) == [1, 50, None, "pong"]
    answers = [PUSHED, PUSHED, {"rows": 0, "older": 1}, {"rows": 2, "older": 0}, PUSHED, PUSHED]
    assert sorted(peer.reply() for _ in columns) == [[1, n, None, answer] for n, answer in enumerate(answers)]
    with st.Engine.open(server.store) as engine, engine.store.environment.read() as txn:
        assert engine.store.environment.sequence(txn) - before <= 2  # the writer may read them in two pieces
    assert rows_of(peers, 7, 8) == [[1.0, 70, "a", [1.0, 2.0]], [1.0, 1, "eight", [9.0, 8.0]]]


@pytest.mark.parametrize(
    ("columns", "partial", "message"),
    [
        ({"user_id": 1, "age": 2.0}, False,
         "view 'stats': column 'visits' is missing from the rows; "
         "they need: ['user_id', 'age', 'visits', 'tier', 'taste'], "
         "or push with partial=True (--partial), which keeps what is stored"),
        ({"age": 2.0}, True, "view 'stats': key column 'user_id' is missing; keys: user_id"),
        ({"user_id": 1}, True,
         "view 'stats': the rows have no feature; give at least one of: age, visits, tier, taste"),
        ({"user_id": 1, "age": 2.0, "viists": 1}, True,
         "view 'stats' has no column 'viists', and a partial push takes no others; did you mean 'visits'?"),
        ({"user_id": 1, "age": "old"}, True, "view 'stats': column 'age' takes Float32; got 'old' (str)"),
    ],
)  # fmt: skip
def test_wrong_partial_pushes_are_named_and_write_nothing(server, peers, columns, partial, message):
    before = rows_of(peers, 1)
    with st.Client(server.tcp) as client, pytest.raises(st.InvalidArgument) as caught:
        client.push("stats", columns, partial=partial)
    assert caught.value.message == message
    assert rows_of(peers, 1) == before


def test_the_command_says_how_to_push_some_features(server, peers, tmp_path):
    (tmp_path / "rows.csv").write_text("user_id,tier\n1,x\n")
    before = rows_of(peers, 1)
    for where in (("--server", server.tcp), ("--store", str(server.store))):
        error = error_of("push", "stats", str(tmp_path / "rows.csv"), *where)
        assert error.endswith("or push with partial=True (--partial), which keeps what is stored\n")
    assert rows_of(peers, 1) == before
