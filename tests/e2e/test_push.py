"""Pushes and deletes through `shorttail serve`: two workers, one writer that commits in groups."""

import asyncio
import contextlib
import re
import time

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from commands import run_well
from pushing import PUSHED, Pushing, row, tiers, until
from serving import Server, environment_after, hang_up, make_store

import shorttail as st
from shorttail.config import LIMITS


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    home = tmp_path_factory.mktemp("pushed")
    server = Pushing(make_store(home), "--workers", "2", "--uds", str(home / "socket"), log=home / "log")
    server.store = home / "store"
    server.uds = str(home / "socket")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture(scope="module")
def peers(shared):
    """One connection to each worker."""
    found = []
    for worker in shared.workers():
        with shared.held(*(other for other in shared.workers() if other != worker)):
            found.append(shared.connect())
            assert found[-1].ask(0, 1, "ping", []) == [1, 1, None, "pong"]
    yield found
    for peer in found:
        peer.socket.close()


@pytest.fixture
def server(shared, peers):
    yield shared
    for peer in peers:  # after any test, other requests are served
        assert peer.ask(0, 1, "push", ["stats", row(1)]) == [1, 1, None, PUSHED]
        assert tiers(peer, 1) == ["new"]


# Code for the worker: it receives the data of its writer 0.5 s late.
LATE = """
import sys
if "shorttail.server.worker" in sys.orig_argv:
    from shorttail.server.writer_link import WriterLink
    heard = WriterLink.data_received
    WriterLink.data_received = lambda self, data: self.loop.call_later(0.5, heard, self, data)
"""


def test_a_server_takes_pushes_as_soon_as_it_is_announced(tmp_path):
    late = Server(make_store(tmp_path), log=tmp_path / "log", env=environment_after(tmp_path, LATE))
    try:
        with late.connect() as peer:
            assert peer.ask(0, 1, "push", ["stats", row(1)]) == [1, 1, None, PUSHED]
            assert "reloaded" in hang_up(late)
            with late.connect() as another:
                assert another.ask(0, 2, "push", ["stats", row(1)]) == [1, 2, None, PUSHED]
    finally:
        late.kill()


def commits(store):
    """Return the number of commits so far, from the store's change log."""
    with st.Engine.open(store) as engine, engine.store.environment.read() as txn:
        return engine.store.environment.sequence(txn)


# -- every way to push, seen by every worker ---------------------------------------------------------------------


def push_by_client(server, view, columns):
    with st.Client(server.tcp) as client:
        return client.push(view, columns)


def push_by_async_client(server, view, columns):
    async def push():
        async with await st.AsyncClient.connect(f"unix:{server.uds}") as client:
            return await client.push(view, columns)

    return asyncio.run(push())


def push_by_bytes(server, view, columns):
    lists = {name: np.asarray(values).tolist() for name, values in columns.items()}
    with server.connect() as peer:
        return peer.ask(0, 4_000_000_000, "push", [view, lists, {"deadline_ms": 60_000}])[3]["rows"]


def push_by_command(server, view, columns):
    path = server.store.parent / "rows.parquet"
    table = pa.table({name: np.asarray(values).tolist() for name, values in columns.items()})
    pyarrow.parquet.write_table(table, path)
    done = run_well("push", view, str(path), "--server", server.tcp).out
    end = f"given {len(table):,}, loaded {len(table):,}, older 0, duplicate 0"
    assert re.fullmatch(rf"stats: [\d,]+ rows? in \d+\.\d+ s \([\d,]+ rows/s\); {end}\n", done)
    return int(done.split()[1].replace(",", ""))


@pytest.mark.parametrize("push", [push_by_client, push_by_async_client, push_by_bytes, push_by_command])
def test_acknowledged_rows_are_visible_to_every_worker(server, peers, push):
    users = np.arange(5000) + 10_000
    name = push.__name__
    columns = {
        "user_id": users,
        "age": np.linspace(0, 1, 5000, dtype=np.float32),
        "visits": np.arange(5000) * 3,
        "tier": [f"{name} {user}" for user in users],
        "taste": np.stack([users, -users], 1).astype(np.float32),
    }
    assert push(server, "stats", columns) == 5000
    ask = ["stats:age", "stats:visits", "stats:tier", "stats:taste"], {"user_id": [10_000, 14_999]}
    for peer in peers:
        assert peer.ask(0, 2, "get_online_features", list(ask))[3]["values"] == [
            [0.0, 1.0], [0, 14_997], [f"{name} 10000", f"{name} 14999"], [[10_000.0, -10_000.0], [14_999.0, -14_999.0]],
        ]  # fmt: skip


def test_a_notification_is_written_and_not_answered(server, peers):
    for user, peer in enumerate(peers, 20_000):
        peer.send(msgpack.packb([2, "push", ["stats", row(user, tier="quiet")]]))
        peer.send(msgpack.packb([2, "push", ["nothing", row(user)]]))
        assert peer.ask(0, 5, "ping", []) == [1, 5, None, "pong"]
        for each in peers:
            until(lambda each=each, user=user: tiers(each, user) == ["quiet"], "the row is there")
        peer.send(msgpack.packb([2, "delete", ["stats", {"user_id": user}]]))
        assert peer.ask(0, 6, "ping", []) == [1, 6, None, "pong"]
        until(lambda user=user: tiers(peers[0], user) == [None], "the row is gone")


def test_every_client_can_delete(server, peers):
    columns = {name: [value] * 8 for name, value in row(0).items()} | {"user_id": list(range(30_000, 30_008))}
    address = server.tcp
    with st.Client(address) as client:
        client.push("stats", columns)
        assert client.delete("stats", {"user_id": [30_000, 30_000, 39_999]}) == 1
        assert client.delete("stats", {"user_id": np.array([30_001])}) == 1

    async def delete():
        async with await st.AsyncClient.connect(address) as client:
            return await client.delete("stats", {"user_id": 30_002})

    assert asyncio.run(delete()) == 1
    assert peers[0].ask(0, 7, "delete", ["stats", {"user_id": 30_003}]) == [1, 7, None, {"rows": 1}]
    deleted = run_well("delete", "stats", "user_id=30004,39999", "--server", address).out
    assert deleted == "stats: 1 row deleted of 2 keys\n"
    keys = server.store.parent / "keys.csv"
    keys.write_text("user_id,other\n30005,1\n30006,2\n")
    assert run_well("delete", "stats", "--file", str(keys), "--server", address, "--json").json["rows"] == 2
    for peer in peers:
        assert tiers(peer, *columns["user_id"]) == [None] * 7 + ["new"]
    deleted = run_well("delete", "stats", "user_id=30007", "--store", str(server.store)).out
    assert deleted == "stats: 1 row deleted of 1 key\n"
    for peer in peers:
        assert tiers(peer, 30_007) == [None]


# -- group commit ------------------------------------------------------------------------------------------------


def test_pushes_that_wait_together_share_commits(server, peers):
    before = commits(server.store)
    with contextlib.ExitStack() as stack:
        pushers = [stack.enter_context(server.connect()) for _ in range(50)]
        with server.held():
            for n, pusher in enumerate(pushers):
                pusher.send(msgpack.packb([0, n, "push", ["stats", row(40_000 + n, tier=str(n))]]))
                # When a later request is answered, the worker has forwarded the push.
                assert pusher.ask(0, 1000, "ping", []) == [1, 1000, None, "pong"]
            assert commits(server.store) == before
        assert [pusher.reply() for pusher in pushers] == [[1, n, None, PUSHED] for n in range(50)]
    assert 1 <= commits(server.store) - before <= 5
    for peer in peers:
        assert tiers(peer, *range(40_000, 40_050)) == [str(n) for n in range(50)]


def test_the_latest_event_time_wins_within_a_group_and_between_groups(server, peers):
    peer = peers[0]
    early, late = row(50_000, tier="early", event_time=1_000), row(50_000, tier="late", event_time=2_000)
    other = late | {"user_id": 50_001}
    with server.held():
        for msgid, columns in enumerate((late, early, row(50_001, tier="first", event_time=1_000), other)):
            peer.send(msgpack.packb([0, msgid, "push", ["stats", columns]]))
    rows = [PUSHED, {"rows": 0, "older": 1}, PUSHED, PUSHED]  # a row that a later push replaces was stored first
    assert sorted(peer.reply() for _ in range(4)) == [[1, msgid, None, rows[msgid]] for msgid in range(4)]
    assert [tiers(each, 50_000, 50_001) for each in peers] == [["late", "late"]] * 2
    assert peer.ask(0, 5, "push", ["stats", early])[3] == {"rows": 0, "older": 1}
    assert [tiers(each, 50_000) for each in peers] == [["late"]] * 2
    both = {name: [late[name], early[name]] for name in late} | {"user_id": [50_002, 50_002]}
    assert peer.ask(0, 6, "push", ["stats", both])[3] == {"rows": 1, "older": 1}
    assert [tiers(each, 50_002) for each in peers] == [["late"]] * 2
    # Without an event time the time is now, which is later; a delete of the same group is applied in order.
    with server.held():
        peer.send(msgpack.packb([0, 7, "push", ["stats", row(50_000, tier="now")]]))
        peer.send(msgpack.packb([0, 8, "delete", ["stats", {"user_id": 50_001}]]))
        peer.send(msgpack.packb([0, 9, "push", ["stats", row(50_001, tier="again")]]))
    assert sorted(peer.reply() for _ in range(3)) == [
        [1, 7, None, PUSHED],
        [1, 8, None, {"rows": 1}],
        [1, 9, None, PUSHED],
    ]
    assert [tiers(each, 50_000, 50_001) for each in peers] == [["now", "again"]] * 2


def test_a_push_says_what_became_of_its_rows_in_every_way(server, peers, tmp_path):
    """Ten keys, of which three are stored with a later time; a key is given twice, and another with two times."""
    users, times = [*range(10), 9, 8], [5] * 10 + [5, 4]
    columns = {name: [value] * 12 for name, value in row(0, tier="given").items()}
    for at, push in enumerate(("client", "async", "bytes", "command", "store")):
        given = columns | {"user_id": [70_000 + 100 * at + user for user in users], "event_time": times}
        stored = {name: values[:3] for name, values in (given | {"event_time": [6] * 12}).items()}
        with st.Client(server.tcp) as client:
            assert client.push("stats", stored) == 3
        pyarrow.parquet.write_table(pa.table(given), tmp_path / "rows.parquet")
        if push == "bytes":
            with server.connect() as peer:
                assert peer.ask(0, 1, "push", ["stats", given])[3] == {"rows": 8, "older": 4, "duplicate": 1}
            continue
        if push in ("command", "store"):
            where = ("--server", server.tcp) if push == "command" else ("--store", str(server.store))
            said = run_well("push", "stats", str(tmp_path / "rows.parquet"), *where, "--json").json
            assert said.pop("seconds") > 0
            assert said == {"view": "stats", "rows": 8, "given": 12, "loaded": 7, "older": 4, "duplicate": 1}
            continue
        pushing = push_by_client if push == "client" else push_by_async_client
        count = pushing(server, "stats", given)
        assert (count, count.given, count.loaded, count.older, count.duplicate) == (8, 12, 7, 4, 1)


def test_a_feature_is_pushed_under_the_name_of_its_column(server, peers, tmp_path):
    user = st.Entity("user", keys={"user_id": st.Int64})
    spend = st.FeatureView("spend", entity=user, features=[
        st.Feature("avg_7d", st.Float32, column="7d_avg"), st.Feature("largest", st.Int64, column="max (USD)"),
        st.Feature("tier", st.String),
    ])  # fmt: skip
    with st.Engine.open(server.store) as engine:
        engine.apply([spend])
    rows = {"user_id": [1, 2], "7d_avg": [0.5, None], "max (USD)": [7, 8], "tier": ["a", "b"]}
    served = {"spend:avg_7d": [0.5, None], "spend:largest": [7, 8], "spend:tier": ["a", "b"]}
    with st.Client(server.tcp) as client:
        assert client.push("spend", rows) == 2
        ask = list(served), {"user_id": [1, 2]}
        assert client.get_online_features(*ask).to_dict() == served
        [view] = [view for view in client.views() if view["name"] == "spend"]
        assert view["columns"] == {"avg_7d": "7d_avg", "largest": "max (USD)"}
        with pytest.raises(st.InvalidArgument, match="'spend' has no column 'avg_7d'; feature 'avg_7d' is read from"):
            client.push("spend", {"user_id": 1, "avg_7d": 1.0, "max (USD)": 1, "tier": "a"})
        pyarrow.parquet.write_table(pa.table(rows | {"user_id": [3, 4], "more": [1, 2]}), tmp_path / "rows.parquet")
        run_well("push", "spend", str(tmp_path / "rows.parquet"), "--server", server.tcp)
        assert client.get_online_features(ask[0], {"user_id": [3, 4]}).to_dict() == served
        keys = ("--keys", "user_id=uniform:5:9", "--rate", "50", "--duration", "1", "--warmup", "0")
        run_well("bench", server.tcp, "--push", "spend", "--overwrite-live-rows", *keys, "--json")
        statuses = client.get_online_features(ask[0], {"user_id": [5, 6, 7, 8, 9]}).statuses["spend"]
        assert 0 in statuses.tolist()


WRONG = [
    ("push", ["stats"], "INVALID_ARGUMENT", "push takes [view, {column: value or array}, {option: value}?]"),
    ("delete", [1, {}], "INVALID_ARGUMENT", "delete takes [view, {column: value or array}, {option: value}?]"),
    ("push", ["stats", row(1), {"version": 1}], "INVALID_ARGUMENT", "unknown option 'version'; options: deadline_ms"),
    ("push", ["stats", row(1), {"deadline_ms": 0}], "DEADLINE_EXCEEDED",
     "deadline_ms 0: the deadline had passed when the request came"),
    ("push", ["nothing", row(1)], "NOT_FOUND", "no feature view 'nothing'; views: stats"),
    ("push", ["stats", {"user_id": 1}], "INVALID_ARGUMENT",
     "view 'stats': column 'age' is missing from the rows; they need: ['user_id', 'age', 'visits', 'tier', 'taste']"),
    ("push", ["stats", row(1, Event_time=1)], "INVALID_ARGUMENT",
     "view 'stats' has no column 'Event_time'; there is 'event_time', and case matters"),
    ("push", ["stats", row("1")], "INVALID_ARGUMENT",
     "view 'stats': key 'user_id' takes Int64; got '1' (str)"),
    ("push", ["stats", row(None)], "INVALID_ARGUMENT",
     "view 'stats': key 'user_id' is null at row 0; a key needs a value"),
    ("push", ["stats", row([1, 2], age=[1.0])], "INVALID_ARGUMENT",
     "view 'stats': column 'age' has 1 values where others have 2"),
    ("push", ["stats", row([])], "INVALID_ARGUMENT", "view 'stats': no rows; send at least one"),
    ("push", ["stats", row([[1], [1, 2]])], "INVALID_ARGUMENT",
     "view 'stats': key 'user_id' takes Int64; got [1] (list) at row 0"),
    ("push", ["stats", row(1, taste=[1, 2, 3])], "INVALID_ARGUMENT",
     "view 'stats': column 'taste' takes Vector(2); got 3 numbers"),
    ("push", ["stats", row(1, tier="x" * 65_536)], "INVALID_ARGUMENT",
     "view 'stats': column 'tier' takes String; got text of 65536 bytes, more than 65535"),
    ("push", ["stats", row([1] * 16_385)], "INVALID_ARGUMENT",
     "16385 rows in one request; at most 16384 are taken: send it in parts"),
    ("push", ["stats", row(msgpack.ExtType(1, b"\x03\x01\x02\0\0\0"))], "INVALID_ARGUMENT",
     "tensor of shape (2,): 0 bytes do not hold it"),
    ("push", ["stats", {(1, 2): 3}], "INVALID_ARGUMENT", "a map key or ext value that cannot be read"),
    ("delete", ["stats", {"user": 1}], "INVALID_ARGUMENT", "view 'stats' has no key 'user'; keys: user_id"),
    ("delete", ["stats", {}], "INVALID_ARGUMENT", "view 'stats': key column 'user_id' is missing; keys: user_id"),
]  # fmt: skip


def test_a_wrong_push_gets_an_error_and_its_neighbours_are_written(server, peers):
    peer = peers[1]
    before = commits(server.store)
    with server.held():
        for n, (method, params, _, _) in enumerate(WRONG):
            peer.send(msgpack.packb([0, 2 * n, "push", ["stats", row(60_000 + n)]]))
            peer.send(msgpack.packb([0, 2 * n + 1, method, params]))
        peer.send(b"\x94\x00\xcd\x01\x00\xa4push\x92\xa5stats\x81\xa4tier\xa1\xff")
        twice = msgpack.packb("tier") + msgpack.packb("a")
        peer.send(b"\x94\x00\xcd\x01\x01\xa4push\x92\xa5stats\x82" + twice + twice)
    replies = {reply[1]: reply[2:] for reply in (peer.reply() for _ in range(2 * len(WRONG) + 2))}
    for n, (method, params, code, message) in enumerate(WRONG):
        assert replies[2 * n] == [None, PUSHED]
        error, result = replies[2 * n + 1]
        assert (error["code"], result) == (code, None), (method, params)
        assert error["message"].startswith(message), error
    assert replies[256][0] == {"code": "INVALID_ARGUMENT", "message": "a string is not valid UTF-8"}
    assert replies[257][0] == {"code": "INVALID_ARGUMENT", "message": "column 'tier' is given twice"}
    assert tiers(peers[0], *range(60_000, 60_000 + len(WRONG))) == ["new"] * len(WRONG)
    assert commits(server.store) - before <= 5


def test_a_message_that_is_too_large_ends_its_connection_only(server, peers):
    with server.connect() as large:
        large.send(msgpack.packb([0, 1, "push", ["stats", {"tier": ["x" * 60_000] * 300}]]))
        message = "a message of more than 16777216 bytes; send it in parts"
        assert large.reply() == [1, None, {"code": "RESOURCE_EXHAUSTED", "message": message}, None]
        assert large.reply() is None
    assert peers[0].ask(0, 1, "push", ["stats", row(70_000)]) == [1, 1, None, {"rows": 1, "older": 0}]


def test_a_client_refuses_a_message_that_is_too_large(server):
    with st.Client(f"unix:{server.uds}") as client:
        client.ping()
        mine = client._pool._idle[0]
        with pytest.raises(st.ResourceExhausted, match="push: a message of more than 16777216 bytes; send it in parts"):
            client.push("stats", row(70_001) | {"tier": ["x" * 60_000] * 300})
        assert client.push("stats", row(70_001)) == 1
        assert client._pool._idle[0] is mine


def test_pushes_beyond_the_limit_of_a_connection_are_refused_at_once(server, peers):
    peer, more = peers[0], LIMITS.pushes_per_connection + 3
    with server.held():
        for n in range(more):
            peer.send(msgpack.packb([0, n, "delete", ["stats", {"user_id": n}]]))
        refused = [peer.reply() for _ in range(3)]
        assert tiers(peer, -1) == [None]  # reads are served meanwhile
    assert [reply[1] for reply in refused] == [more - 3, more - 2, more - 1]
    assert {reply[2]["code"] for reply in refused} == {"RESOURCE_EXHAUSTED"}
    assert refused[0][2]["message"].startswith("1024 requests of this connection wait to be written; wait")
    answered = [peer.reply() for _ in range(more - 3)]
    assert sorted(reply[1] for reply in answered) == list(range(more - 3))
    assert all(reply[2] is None for reply in answered)


def test_bytes_beyond_the_limit_of_the_writer_are_refused_at_once(server, peers):
    """Only the writer decodes the columns; here they are not valid columns."""
    large, peer = 15 << 20, peers[0]
    most = LIMITS.forwarded_bytes // large
    nonsense = {"tier": b"x" * large}
    with server.held():
        for n in range(most):
            peer.send(msgpack.packb([0, n, "push", ["stats", nonsense]]))
            assert peer.ask(0, 100, "ping", []) == [1, 100, None, "pong"]
        _, msgid, error, _ = peer.ask(0, most, "push", ["stats", nonsense])
        assert (msgid, error["code"]) == (most, "RESOURCE_EXHAUSTED")
        message = r"\d+ bytes of pushes and deletes wait for the writer; send it again later"
        assert re.fullmatch(message, error["message"])
        peer.send(msgpack.packb([0, 101, "push", ["stats", row(81_000)]]))  # this much fits
    replies = {reply[1]: reply[2:] for reply in (peer.reply() for _ in range(most + 1))}
    assert replies.pop(101) == [None, PUSHED]
    assert sorted(replies) == list(range(most))
    assert {error["code"] for error, _ in replies.values()} == {"INVALID_ARGUMENT"}


def test_a_push_whose_deadline_passes_before_its_commit_is_not_written(server, peers):
    peer = peers[0]
    with server.held():
        peer.send(msgpack.packb([0, 1, "push", ["stats", row(80_000), {"deadline_ms": 20}]]))
        peer.send(msgpack.packb([0, 2, "push", ["stats", row(80_001), {"deadline_ms": 60_000}]]))
        assert peer.ask(0, 3, "ping", []) == [1, 3, None, "pong"]
        time.sleep(0.03)  # longer than the deadline
    late, good = sorted((peer.reply() for _ in range(2)), key=lambda reply: reply[1])
    message = "the deadline passed while the request waited; nothing was written"
    assert late == [1, 1, {"code": "DEADLINE_EXCEEDED", "message": message}, None]
    assert good == [1, 2, None, PUSHED]
    assert tiers(peer, 80_000, 80_001) == [None, "new"]


def test_a_push_of_a_closed_connection_does_no_harm_and_a_half_closed_one_is_answered(server, peers):
    with server.held():
        for user in range(90_000, 90_010):
            with server.connect() as leaving:
                leaving.send(msgpack.packb([0, 1, "push", ["stats", row(user)]]))
                assert leaving.ask(0, 2, "ping", []) == [1, 2, None, "pong"]
        ending = server.connect()
        ending.send(msgpack.packb([0, 1, "push", ["stats", row(90_010)]]))
        ending.socket.shutdown(1)
    with ending:
        assert ending.reply() == [1, 1, None, PUSHED]
        assert ending.reply() is None
    until(lambda: tiers(peers[0], *range(90_000, 90_011)) == ["new"] * 11, "all is written")
