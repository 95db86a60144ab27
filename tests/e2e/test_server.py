"""`shorttail serve` as a process, spoken to through plain sockets in MessagePack that any language could have sent."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import shorttail as st

DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64})
stats = st.FeatureView("stats", entity=user, features=[
    st.Feature("age", st.Float32, default=1.5),
    st.Feature("visits", st.Int64),
    st.Feature("tier", st.String),
    st.Feature("taste", st.Vector(2)),
])
total = st.Model("total", path="total.onnx", inputs=["stats:age", "stats:visits", "request:amount"])
"""
ROWS = {
    "user_id": [1, 2, 3],
    "age": [10.0, 20.0, None],
    "visits": [1, 2, 3],
    "tier": ["gold", None, "tin"],
    "taste": [[1, 2], [3, 4], [5, 6]],
}
SERVE = [sys.executable, "-m", "shorttail", "serve"]
TIMEOUT_S = 20.0


def write_sum(path: Path, factor: float) -> None:
    """A model [rows, 3] float32 -> total [rows]: the sum of the columns times `factor`."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "factor"], ["total"]),
        ],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
            helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def make_store(home: Path) -> Path:
    (home / "definitions.py").write_text(DEFINITIONS)
    write_sum(home / "total.onnx", 1.0)
    with st.Engine.open(home / "store", create=True) as engine:
        engine.apply(home / "definitions.py")
        engine.push("stats", ROWS)
    return home / "store"


class Peer:
    """A plain socket, and msgpack to read with."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(TIMEOUT_S)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        if not isinstance(address, str):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.unpacker = msgpack.Unpacker()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def reply(self):
        """The next reply, or None when the server has closed."""
        while True:
            for message in self.unpacker:
                return message
            data = self.socket.recv(65536)
            if not data:
                return None
            self.unpacker.feed(data)

    def ask(self, *message):
        self.send(msgpack.packb(message))
        return self.reply()


class Server:
    """A running `shorttail serve` on a free port."""

    def __init__(self, store, *options, log):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*SERVE, "--store", str(store), "--port", "0", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        self.line = self.process.stdout.readline() if ready else ""
        found = re.match(r"serving on 127\.0\.0\.1:(\d+)", self.line)
        if found is None:
            self.kill()
            pytest.fail(f"no announcement: {self.line!r}; stderr: {log.read_text()}")
        self.address = ("127.0.0.1", int(found[1]))

    def connect(self):
        return Peer(self.address)

    def workers(self):
        return self.children("worker")

    def children(self, kind):
        """Process ids of its workers, or of its writer."""
        pid = self.process.pid
        found = []
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if f"shorttail.server.{kind}\0" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
        return found

    def stop(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        return self.wait()

    def wait(self):
        code = self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
        return code

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def shared(store):
    """One server for all tests that leave it as it was."""
    server = Server(store, "--uds", str(store.parent / "socket"), log=store.parent / "log")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


@pytest.fixture
def server(shared):
    yield shared
    with shared.connect() as peer:  # whatever the test did, others are still served
        assert peer.ask(*PREDICT) == PREDICTED
    assert shared.process.poll() is None


@pytest.fixture
def start(store, tmp_path):
    """Starts servers that the test may treat as it likes."""
    servers = []

    def start_server(*options, of=store):
        servers.append(Server(of, *options, log=tmp_path / f"log{len(servers)}"))
        return servers[-1]

    yield start_server
    for one in servers:
        one.kill()


PREDICT = [0, 1, "predict", ["total", {"user_id": [1, 2, 9], "amount": 0.5}]]
PREDICTED = [1, 1, None, {"outputs": {"total": [11.5, 22.5, pytest.approx(float("nan"), nan_ok=True)]}, "version": 1}]
FEATURES = [0, 2, "get_online_features", [
    ["stats:age", "stats:visits", "stats:tier", "stats:taste"], {"user_id": [3, 2, 9]},
]]  # fmt: skip
FEATURED = [1, 2, None, {
    "feature_names": ["stats:age", "stats:visits", "stats:tier", "stats:taste"],
    "values": [[1.5, 20.0, 1.5], [3, 2, None], ["tin", None, None], [[5.0, 6.0], [3.0, 4.0], None]],
    "has_default": [True, False, False, False],
    "statuses": [[1, 0, 2], [0, 0, 2], [0, 1, 2], [0, 0, 2]],
}]  # fmt: skip


def test_the_announcement_names_all_that_is_served(server, store):
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
            time.sleep(0.001)  # so that the server reads the first part by itself
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


def test_tensors_both_ways_are_the_numbers_of_lists(server):
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
def test_bad_input_is_answered_by_its_code_and_the_connection_goes_on(server, method, params, code, message):
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
def test_what_is_no_request_is_answered_and_ends_that_connection_only(server, data, code):
    with server.connect() as bystander, server.connect() as peer:
        peer.send(data + b"\xc1" * 300_000)  # the answer must arrive although the server reads no further
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


def test_announced_elements_cost_no_memory(server):
    [worker] = server.workers()
    before = resident_bytes(worker)
    # 5 KB that announce 10,000 elements each, nested as deep as allowed, from 50 peers that never send the rest
    peers = [server.connect() for _ in range(50)]
    for peer in peers:
        peer.send(b"\x94\x00\x01\xa7predict" + b"\xdd\x00\x00\x27\x10" * 7 + bytes(5000))
    with server.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
    assert resident_bytes(worker) - before < 8 << 20
    for peer in peers:
        peer.socket.close()


def test_a_peer_that_does_not_read_is_held_back_and_loses_nothing(server, store):
    n, rows = 300, 4096
    request = msgpack.packb([0, 1, "get_online_features", [["stats:age", "stats:taste"], {"user_id": [1] * rows}]])
    [worker] = server.workers()
    with Peer(str(store.parent / "socket")) as slow:  # its buffers are small; TCP's would take it all
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


def test_a_peer_that_ends_after_its_requests_is_answered(server):
    with server.connect() as peer:
        peer.send(msgpack.packb(PREDICT) + msgpack.packb(FEATURES))
        peer.socket.shutdown(socket.SHUT_WR)
        assert [peer.reply(), peer.reply(), peer.reply()] == [PREDICTED, FEATURED, None]


def test_the_unix_socket(server, store):
    with Peer(str(store.parent / "socket")) as peer:
        assert peer.ask(*PREDICT) == PREDICTED


def test_the_client(server):
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
        while newer["version"] == 1 and time.monotonic() < end_s:  # it goes on while version 2 is loaded
            assert newer["outputs"]["total"][0] == 101.5
            newer = peer.ask(*PREDICT)[3]
        assert (newer["version"], newer["outputs"]["total"][0]) == (2, 203.0)
        older = peer.ask(0, 1, "predict", [*PREDICT[3], {"version": 1}])[3]
        assert (older["version"], older["outputs"]["total"][0]) == (1, 101.5)
        assert peer.ask(*PREDICT)[3]["version"] == 2


def test_sigterm_answers_what_is_in_flight_and_exits_with_0(start, store, tmp_path):
    server = start("--uds", str(tmp_path / "socket"))
    with server.connect() as peer, server.connect() as idle:
        assert peer.ask(*PREDICT) == PREDICTED
        peer.send(msgpack.packb(PREDICT) * 500)
        started_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert [peer.reply() for _ in range(500)] == [PREDICTED] * 500
        assert peer.reply() is None
        assert idle.reply() is None
    assert server.wait() == 0
    assert time.monotonic() - started_s < 5.0
    assert not (tmp_path / "socket").exists()
    assert server.log.read_text() == ""
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_sigint_is_the_same(start):
    assert start("--workers", "2").stop(signal.SIGINT) == 0


def test_a_second_signal_does_not_wait(start):
    server = start()
    with server.connect() as peer:
        request = [0, 1, "get_online_features", [["stats:taste"], {"user_id": [1] * 16_000}]]
        peer.send(msgpack.packb(request) * 40)  # replies that nobody reads keep the worker from ending
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        assert server.stop() == 1


def refused(*options):
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == ""
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_port_in_use(server, store):
    port = server.address[1]
    assert refused("--store", str(store), "--port", str(port)) == (
        f"error: port {port} on 127.0.0.1 is in use; stop the other process or choose another with --port\n"
    )


def test_a_unix_socket_in_use_and_a_stale_one(server, store, start, tmp_path):
    said = refused("--store", str(store), "--port", "0", "--uds", str(store.parent / "socket"))
    assert said.startswith(f"error: unix socket {store.parent}/socket is in use; ")
    (tmp_path / "file").write_text("mine")
    said = refused("--store", str(store), "--port", "0", "--uds", str(tmp_path / "file"))
    assert said.startswith(f"error: {tmp_path}/file exists and is not a socket; ")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "stale"))
    start("--uds", str(tmp_path / "stale"))
    with Peer(str(tmp_path / "stale")) as peer:
        assert peer.ask(*PREDICT) == PREDICTED


def test_addresses_that_cannot_be_served(store):
    assert "give --token-file or --tls-client-ca" in refused("--store", str(store), "--host", "0.0.0.0", "--port", "0")
    assert "is not known" in refused("--store", str(store), "--host", "no such host", "--port", "0")
    assert "is not a port" in refused("--store", str(store), "--port", "70000")
    assert "cannot listen on unix socket" in refused(
        "--store", str(store), "--port", "0", "--uds", "/nowhere/" + "x" * 200
    )


def test_a_store_that_cannot_be_opened_is_said_once_and_not_retried(store, tmp_path):
    missing = refused("--store", str(tmp_path / "none"), "--port", "0", "--workers", "2")
    assert missing.startswith("error: ")
    assert str(tmp_path / "none") in missing
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("not a store")
    assert str(tmp_path / "other") in refused("--store", str(tmp_path / "other"), "--port", "0")
    broken = make_store(tmp_path)
    next((broken / "models").rglob("*.onnx")).write_bytes(b"not a model")
    assert "total" in refused("--store", str(broken), "--port", "0")
    assert "total" in refused("--store", str(broken), "--check")


def test_check_says_what_would_be_served(store):
    done = subprocess.run([*SERVE, "--store", str(store), "--check"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok · models: total v1 · views: stats\n", "")


def test_two_workers_share_the_sockets_and_a_killed_one_is_replaced(start, tmp_path):
    server = start("--workers", "2", "--uds", str(tmp_path / "socket"))
    assert "· 2 workers ·" in server.line
    first = server.workers()
    assert len(first) == 2
    for address in (server.address, str(tmp_path / "socket")):
        for _ in range(20):
            with Peer(address) as peer:
                assert peer.ask(*PREDICT) == PREDICTED
    os.kill(first[0], signal.SIGKILL)
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s and (len(server.workers()) < 2 or first[0] in server.workers()):
        time.sleep(0.05)
    assert len(set(server.workers()) - set(first)) == 1
    assert re.fullmatch(
        rf"worker \d \(pid {first[0]}\) died: signal 9 \(SIGKILL\); starting it again in 0\.1 s\n",
        server.log.read_text(),
    )
    os.kill(first[1], signal.SIGSTOP)  # so that the new one must answer
    time.sleep(1.5)  # a worker is given connections until it has not been heard for a second
    try:
        with server.connect() as peer:
            assert peer.ask(*PREDICT) == PREDICTED
        with Peer(str(tmp_path / "socket")) as peer:
            assert peer.ask(*PREDICT) == PREDICTED
    finally:
        os.kill(first[1], signal.SIGCONT)
    assert server.stop() == 0


def test_workers_end_when_their_supervisor_is_killed(start):
    server = start("--workers", "2")
    workers = server.workers()
    server.kill()
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s and any(map(alive, workers)):
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
