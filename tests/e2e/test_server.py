"""`shorttail serve` as a process, with plain sockets and MessagePack that any language could send."""

import os
import re
import select
import socket
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from serving import FEATURED, FEATURES, PREDICT, PREDICTED, ROWS, TIMEOUT_S, Peer, Server, make_store, write_sum

import shorttail as st


@pytest.fixture(scope="module")
def shared(store):
    """A server for all tests that do not change it."""
    options = ["--uds", str(store.parent / "socket"), "--p99-budget-ms", "1e6"]  # refuses nothing when busy
    server = Server(store, *options, log=store.parent / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture
def server(shared):
    yield shared
    with shared.connect() as peer:  # after any test, other requests are served
        assert peer.ask(*PREDICT) == PREDICTED
    assert shared.process.poll() is None


def test_the_announcement_names_models_and_views(server, store):
    where = rf"127\.0\.0\.1:\d+ \(unix:{store.parent}/socket too\) · http on 127\.0\.0\.1:\d+"
    assert re.fullmatch(rf"serving on {where} · 1 worker · models: total v1 · views: stats\n", server.line)


def test_requests_typed_by_hand(server):
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
        assert peer.ask(*FEATURES) == FEATURED
        assert peer.ask(0, 3, "predict", ["total", {"user_id": 1, "amount": 1}, {"statuses": True, "version": 1}]) == [
            1, 3, None, {"outputs": {"total": [12.0]}, "version": 1, "statuses": {"stats": [0]}},
        ]  # fmt: skip
        assert peer.ask(0, 4, "ping", []) == [1, 4, None, "pong"]
        assert peer.ask(0, 5, "auth", ["token"]) == [1, 5, None, True]
        [model] = peer.ask(0, 6, "models", [])[3]
        assert model["name"] == "total"
        assert model["columns"] == {"user_id": "Int64", "amount": "Float64"}
        [view] = peer.ask(0, 7, "views", [])[3]
        assert view["features"] == {"age": "Float32", "visits": "Int64", "tier": "String", "taste": "Vector(2)"}


def test_requests_split_at_every_byte(server):
    stream = msgpack.packb(PREDICT) + msgpack.packb(FEATURES)
    with server.connect() as peer:
        for cut in range(1, len(stream)):
            peer.send(stream[:cut])
            time.sleep(0.001)  # so that the server reads the first part alone
            peer.send(stream[cut:])
            assert [peer.reply(), peer.reply()] == [PREDICTED, FEATURED]
        for byte in stream:
            peer.send(bytes([byte]))
            time.sleep(0.0005)
        assert [peer.reply(), peer.reply()] == [PREDICTED, FEATURED]


def test_several_requests_in_one_write(server):
    rng = np.random.default_rng(7)
    amounts = rng.integers(0, 1000, 2000).tolist()
    with server.connect() as peer:
        peer.send(b"".join(
            msgpack.packb([0, msgid, "predict", ["total", {"user_id": 1, "amount": amount}]])
            for msgid, amount in enumerate(amounts)
        ))  # fmt: skip
        replies = [peer.reply() for _ in amounts]
    assert {reply[1]: reply[3]["outputs"]["total"] for reply in replies} == {
        msgid: [11.0 + amount] for msgid, amount in enumerate(amounts)
    }


def test_tensors_give_the_same_numbers_as_lists(server):
    rng = np.random.default_rng(7)
    users, amounts = rng.integers(1, 5, 500), rng.random(500).astype(np.float32)
    tensors = [
        msgpack.ExtType(1, bytes([code, 1]) + len(array).to_bytes(4, "little") + array.tobytes())
        for code, array in ((3, users), (4, amounts))
    ]
    with server.connect() as peer:
        lists = peer.ask(0, 1, "predict", ["total", {"user_id": users.tolist(), "amount": amounts.tolist()}])
        params = ["total", dict(zip(("user_id", "amount"), tensors, strict=True)), {"encoding": "tensor"}]
        answer = peer.ask(0, 1, "predict", params)
    data = answer[3]["outputs"]["total"].data
    assert data[:6] == bytes([4, 1]) + (500).to_bytes(4, "little")
    np.testing.assert_array_equal(np.frombuffer(data, "<f4", offset=6), np.float32(lists[3]["outputs"]["total"]))


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("predict", ["fraud", {"user_id": 1}], "NOT_FOUND", "fraud"),
        ("predict", ["total", {"user_id": 1}], "INVALID_ARGUMENT", "missing column 'amount'"),
        ("predict", ["total", {"user_id": 1, "amont": 2}], "INVALID_ARGUMENT", "unknown column 'amont'"),
        ("predict", ["total", {"user_id": "1", "amount": 2}], "INVALID_ARGUMENT", "takes Int64; got '1' (str)"),
        ("predict", ["total", {"user_id": [1, 2], "amount": [1, 2, 3]}], "INVALID_ARGUMENT", "has 2 values"),
        ("predict", ["total", {"user_id": [], "amount": []}], "INVALID_ARGUMENT", "is empty"),
        ("predict", ["total", {"user_id": [1] * 16_385, "amount": 1}], "INVALID_ARGUMENT", "16385 rows"),
        ("predict", ["total", {"user_id": 1, "amount": 2}, {"vresion": 1}], "INVALID_ARGUMENT", "'vresion'"),
        ("predict", ["total", {"user_id": 1, "amount": 2}, {"version": 7}], "NOT_FOUND", "7"),
        ("predict", ["total", {"user_id": 1, "amount": 2}, {"deadline_ms": 0}], "DEADLINE_EXCEEDED", "deadline_ms 0"),
        ("predict", ["total"], "INVALID_ARGUMENT", "predict takes"),
        ("predict", "total", "INVALID_ARGUMENT", "must be an array"),
        ("get_online_features", [["stats:aeg"], {"user_id": 1}], "NOT_FOUND", "aeg"),
        ("get_online_features", [["nothing:age"], {"user_id": 1}], "NOT_FOUND", "nothing"),
        ("get_online_features", [["age"], {"user_id": 1}], "INVALID_ARGUMENT", "age"),
        ("get_online_features", [[], {"user_id": 1}], "INVALID_ARGUMENT", ""),
        ("get_online_features", [["stats:age"], {"user": 1}], "INVALID_ARGUMENT", "unknown column 'user'"),
        ("ping", [1], "INVALID_ARGUMENT", "ping takes no params"),
        ("auth", [], "INVALID_ARGUMENT", "auth takes [token]"),
        ("prdict", [], "NOT_FOUND", "unknown method 'prdict'; methods: predict, get_online_features"),
    ],
)
def test_bad_input_gets_its_error_code_and_the_connection_continues(server, method, params, code, message):
    with server.connect() as peer:
        reply = peer.ask(0, 77, method, params)
        assert reply[:2] == [1, 77]
        assert reply[2]["code"] == code
        assert message in reply[2]["message"]
        assert "\n" not in reply[2]["message"]
        assert reply[3] is None
        assert peer.ask(*PREDICT) == PREDICTED


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "INVALID_ARGUMENT"),
        (b"\xc1", "INVALID_ARGUMENT"),
        (msgpack.packb({"jsonrpc": "2.0"}), "INVALID_ARGUMENT"),
        (msgpack.packb([0, -1, "ping", []]), "INVALID_ARGUMENT"),
        (b"\xdd\x00\x00\x27\x10" * 1000, "RESOURCE_EXHAUSTED"),
        (b"\x94\x00\x01\xa4ping\xdd\xff\xff\xff\xff", "RESOURCE_EXHAUSTED"),
        (b"\x94\x00\x01\xa4ping\xc6\xff\xff\xff\xff", "RESOURCE_EXHAUSTED"),
        (b"\x94\x00\x01\xa4ping" + b"\x91" * 50, "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_message_that_is_no_request_gets_an_error_and_ends_only_that_connection(server, data, code):
    with server.connect() as bystander, server.connect() as peer:
        peer.send(data + b"\xc1" * 300_000)  # the reply must arrive although the server reads no more
        reply = peer.reply()
        assert reply[:2] == [1, None]
        assert reply[2]["code"] == code
        assert peer.reply() is None
        assert bystander.ask(*PREDICT) == PREDICTED


def test_random_bytes_never_stop_the_server(server):
    rng = np.random.default_rng(7)
    head = msgpack.packb(PREDICT)
    for _ in range(100):
        noise = bytearray(head)
        for place in rng.integers(0, len(noise), 3):
            noise[place] = rng.integers(0, 256)
        with server.connect() as peer:
            peer.send(bytes(noise) + rng.bytes(20))
            peer.socket.shutdown(socket.SHUT_WR)
            while peer.socket.recv(65536):
                pass


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_declared_elements_take_no_memory(server):
    [worker] = server.workers()
    before = resident_bytes(worker)
    # 50 peers send 5 KB that declare 10,000 elements each, nested as deep as allowed, and never send the rest
    peers = [server.connect() for _ in range(50)]
    for peer in peers:
        peer.send(b"\x94\x00\x01\xa7predict" + b"\xdd\x00\x00\x27\x10" * 7 + bytes(5000))
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert resident_bytes(worker) - before < 8 << 20
    for peer in peers:
        peer.socket.close()


def test_a_peer_that_does_not_read_is_not_read_and_loses_nothing(server, store):
    n, rows = 300, 4096
    request = msgpack.packb([0, 1, "get_online_features", [["stats:age", "stats:taste"], {"user_id": [1] * rows}]])
    [worker] = server.workers()
    with Peer(str(store.parent / "socket")) as slow:  # TCP buffers would hold all replies
        before = resident_bytes(worker)
        slow.socket.setblocking(False)
        sent, stream = 0, request * n
        quiet_since = time.monotonic()
        while sent < len(stream) and time.monotonic() - quiet_since < 0.5:
            try:
                sent += slow.socket.send(stream[sent : sent + 65536])
                quiet_since = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < len(stream), "the server read it all without having its replies read"
        assert resident_bytes(worker) - before < 128 << 20
        with server.connect() as other:
            assert other.ask(*PREDICT) == PREDICTED
        replies = 0
        slow.socket.settimeout(TIMEOUT_S)
        while replies < n:
            while sent < len(stream) and select.select([], [slow.socket], [], 0)[1]:
                sent += slow.socket.send(stream[sent : sent + 65536])
            reply = slow.reply() if sent == len(stream) or select.select([slow.socket], [], [], 0.01)[0] else None
            if reply is not None:
                assert reply[3]["values"][0] == [10.0] * rows
                replies += 1


def test_a_half_closed_connection_is_answered(server):
    with server.connect() as peer:
        peer.send(msgpack.packb(PREDICT) + msgpack.packb(FEATURES))
        peer.socket.shutdown(socket.SHUT_WR)
        assert [peer.reply(), peer.reply(), peer.reply()] == [PREDICTED, FEATURED, None]


def test_the_unix_socket_answers_as_tcp_does(server, store):
    with Peer(str(store.parent / "socket")) as peer:
        assert peer.ask(*PREDICT) == PREDICTED


def test_the_client_of_this_package_is_answered(server):
    with st.Client(f"127.0.0.1:{server.address[1]}") as client:
        prediction = client.predict("total", {"user_id": [1, 2], "amount": [0.5, 1.0]}, statuses=True)
        assert prediction.outputs["total"].tolist() == [11.5, 23.0]
        assert prediction.statuses["stats"].tolist() == [0, 0]
        features = client.get_online_features(["stats:tier"], {"user_id": [1, 9]})
        assert features.to_dict() == {"stats:tier": ["gold", None]}


def test_pushed_rows_and_new_versions_are_served_without_a_restart(start, tmp_path):
    store = make_store(tmp_path)
    with start(of=store).connect() as peer, st.Engine.open(store) as engine:
        assert peer.ask(*PREDICT) == PREDICTED
        engine.push("stats", {key: value[:1] for key, value in ROWS.items()} | {"age": [100.0]})
        assert peer.ask(*PREDICT)[3]["outputs"]["total"][0] == 101.5
        write_sum(tmp_path / "twice.onnx", 2.0)
        assert engine.deploy("total", tmp_path / "twice.onnx") == 2
        newer = peer.ask(*PREDICT)[3]
        end_s = time.monotonic() + TIMEOUT_S
        while newer["version"] == 1 and time.monotonic() < end_s:  # version 1 answers while version 2 is loaded
            assert newer["outputs"]["total"][0] == 101.5
            newer = peer.ask(*PREDICT)[3]
        assert (newer["version"], newer["outputs"]["total"][0]) == (2, 203.0)
        older = peer.ask(0, 1, "predict", [*PREDICT[3], {"version": 1}])[3]
        assert (older["version"], older["outputs"]["total"][0]) == (1, 101.5)
        assert peer.ask(*PREDICT)[3]["version"] == 2
