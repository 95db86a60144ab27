"""Large requests: the bulk worker answers them as the other workers answer the same rows in small requests."""

import contextlib
import os
import signal
import socket
import ssl
import threading
from pathlib import Path

import msgpack
import numpy as np
import pytest
from http_asking import ask, ask_json
from serving import FEATURED, FEATURES, PREDICT, PREDICTED, Peer, Server, alive, environment_with, until
from wide import (
    INFER,
    ROWS,
    columns_of,
    doubled,
    infer_body,
    make_wide_store,
    message,
    read_reply,
)

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_wide_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    one = Server(store, log=tmp_path_factory.mktemp("log") / "log")
    yield one
    assert one.stop() == 0
    assert one.log.read_text() == ""


@pytest.fixture
def client(server):
    with st.Client("{}:{}".format(*server.address)) as client:
        yield client


def test_a_small_request_starts_no_bulk_worker(store, start):
    one = start(of=store)
    with one.connect() as peer:
        assert peer.ask(*PREDICT) == PREDICTED
        assert peer.ask(*FEATURES) == FEATURED
    assert ask_json(one, "GET", "/v2")[0] == 200
    assert one.children("bulk") == []


def test_a_large_request_is_answered_by_the_bulk_worker(server, client):
    asked = columns_of(ROWS)
    answer = client.predict("wide", asked)
    assert np.array_equal(answer.outputs["double"], doubled(ROWS))
    assert np.ravel(answer.outputs["same"]).tolist() == asked["text"]
    assert len(server.children("bulk")) == 1
    (bulk,), (worker,) = server.children("bulk"), server.workers()
    assert os.getpriority(os.PRIO_PROCESS, bulk) > os.getpriority(os.PRIO_PROCESS, worker)


@pytest.mark.parametrize(
    "values",
    [["1.5"], [[1]], [True, None], [float("nan")], [b"x"], [1, "a"], [None]],
    ids=["text", "list", "bool", "nan", "bytes", "mixed", "nil"],
)
def test_many_values_that_python_has_to_read_are_read_as_few_are(server, values):
    few, many = 8, 2 * LIMITS.loop_uncommon_values
    answers = []
    for rows in (few, many):
        asked = columns_of(rows) | {"a3": (values * rows)[:rows]}
        with server.connect() as peer:
            peer.send(message("predict", "wide", asked))
            answers.append(read_reply(peer))
    (_, _, error, result), (_, _, error_of_many, result_of_many) = answers
    assert error_of_many == error
    if result is not None:
        first = [row[3] for row in result_of_many["outputs"]["double"][:few]]
        np.testing.assert_array_equal(first, [row[3] for row in result["outputs"]["double"]])


def test_features_of_many_rows_are_those_of_few(server, client):
    names, users = ["stats:age", "stats:visits", "stats:tier", "stats:taste"] * 16, [3, 2, 9]
    few = client.get_online_features(names, {"user_id": users})
    many = client.get_online_features(names, {"user_id": users * 5000})
    assert many.feature_names == names
    for name in names[:4]:
        column, part = many[name], few[name]
        assert len(column) == 15_000
        for at in (0, 14_997):
            assert repr(column[at : at + 3].tolist()) == repr(part.tolist())


def test_a_long_list_of_features_is_answered_by_the_bulk_worker(server):
    names = ["stats:age", "stats:visits"] * LIMITS.loop_references
    with server.connect() as peer:
        peer.send(message("get_online_features", names, {"user_id": [1, 2]}))
        _, _, error, result = read_reply(peer)
    assert error is None
    assert result["feature_names"] == names
    assert result["values"] == [[10.0, 20.0], [1, 2]] * LIMITS.loop_references


def test_an_answer_that_would_be_too_long_is_refused(server):
    names = ["stats:age"] * 1000
    with server.connect() as peer:
        peer.send(message("get_online_features", names, {"user_id": [1] * ROWS}))
        _, _, error, _ = read_reply(peer)
        assert error == {
            "code": "RESOURCE_EXHAUSTED",
            "message": f"{ROWS} rows of 1000 values; at most 4000000 values are answered at once: send it in parts",
        }
        assert peer.ask(*PREDICT) == PREDICTED


def test_texts_in_an_answer_are_limited_by_their_bytes(store, tmp_path):
    (tmp_path / "limits").mkdir()
    env = environment_with(tmp_path / "limits", reply_bytes=100_000)
    one = Server(store, log=tmp_path / "log", env=env)
    try:
        for rows, text in ((4, "x" * 30_000), (2, "x" * 60_000), (4000, "x" * 1000)):
            with one.connect() as peer:
                peer.send(message("predict", "wide", columns_of(rows) | {"text": [text] * rows}))
                _, _, error, _ = read_reply(peer)
            assert error == {
                "code": "RESOURCE_EXHAUSTED",
                "message": "an answer of more than 100000 bytes; ask for fewer rows",
            }
    finally:
        one.kill()


def test_errors_of_large_requests_are_those_of_small_ones(server):
    for rows in (2, ROWS):
        for asked, code, says in (
            (("nope", columns_of(rows)), "NOT_FOUND", "nope"),
            (("wide", {"b": [1.5] * rows}), "INVALID_ARGUMENT", "unknown column 'b'"),
            (("wide", columns_of(rows), {"version": 9}), "NOT_FOUND", "9"),
            (("wide", columns_of(rows), {"wrong": 1}), "INVALID_ARGUMENT", "unknown option 'wrong'"),
        ):
            with server.connect() as peer:
                peer.send(message("predict", *asked))
                _, msgid, error, _ = read_reply(peer)
            assert (msgid, error["code"], says in error["message"]) == (7, code, True), error


def test_a_deadline_holds_for_large_requests(client):
    with pytest.raises(DeadlineExceeded):
        client.predict("wide", columns_of(ROWS), deadline_ms=0.01)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_requests_of_all_sizes_share_a_connection(store, tmp_path, certificates, tls):
    """Replies come whole, each once, whatever is sent before and after, and however the bytes are cut."""
    options = ("--tls-cert", str(certificates / "server.pem")) if tls else ()
    one = Server(store, *options, log=tmp_path / "log")
    try:
        sizes = [1, 9000, 3, 6000, 6000, 2, 1, 12_000, 1]
        sent = b"".join(
            message("predict", "wide", columns_of(rows, first=100 * number), msgid=number)
            for number, rows in enumerate(sizes)
        )
        with one.connect() as peer:
            if tls:
                context = ssl.create_default_context(cafile=certificates / "ca.pem")
                peer.socket = context.wrap_socket(peer.socket, server_hostname="127.0.0.1")

            def send():
                cuts = np.random.default_rng(3).integers(1, len(sent), 20)
                parts = np.split(np.frombuffer(sent, np.uint8), np.sort(cuts))
                for part in parts:
                    peer.socket.sendall(part.tobytes())

            sender = threading.Thread(target=send)
            sender.start()
            unpacker = msgpack.Unpacker(max_buffer_size=1 << 30)
            answers = {}
            while len(answers) < len(sizes):
                data = peer.socket.recv(1 << 16)
                assert data
                unpacker.feed(data)
                for _, msgid, error, result in unpacker:
                    assert error is None
                    assert msgid not in answers
                    answers[msgid] = result["outputs"]
            sender.join()
        for number, rows in enumerate(sizes):
            np.testing.assert_array_equal(answers[number]["double"], doubled(rows, 100 * number))
        assert one.stop() == 0
    finally:
        one.kill()


def test_a_client_that_closes_early_harms_nobody(server):
    for _ in range(3):
        with server.connect() as peer:
            peer.send(message("predict", "wide", columns_of(ROWS)))
    with server.connect() as peer:
        peer.send(message("predict", "wide", columns_of(ROWS))[:-1000])
    with server.connect() as peer:
        peer.send(msgpack.packb([2, "predict", ["wide", columns_of(9000)]]))  # a notification
        assert peer.ask(*PREDICT) == PREDICTED


def test_a_client_that_ends_its_sending_still_gets_the_reply(server):
    with server.connect() as peer:
        peer.send(message("predict", "wide", columns_of(ROWS)))
        peer.socket.shutdown(socket.SHUT_WR)
        _, msgid, error, result = read_reply(peer)
    assert (msgid, error) == (7, None)
    np.testing.assert_array_equal(result["outputs"]["double"], doubled(ROWS))


def test_a_bulk_worker_that_dies_fails_its_requests_and_no_others(store, start):
    one = start(of=store)
    with st.Client("{}:{}".format(*one.address), retries=0) as client, one.connect() as peer:
        client.predict("wide", columns_of(9000))
        (bulk,) = one.children("bulk")
        os.kill(bulk, signal.SIGSTOP)
        failures = []

        def call():
            with contextlib.suppress(Unavailable):
                client.predict("wide", columns_of(9000))
                failures.append("answered")

        def http():
            failures.append(ask_json(one, "POST", INFER, infer_body(3000)))

        callers = [threading.Thread(target=target) for target in (call, http)]
        for caller in callers:
            caller.start()
        assert peer.ask(*PREDICT) == PREDICTED
        until(lambda: large_in_flight(one) == 2, one)
        os.kill(bulk, signal.SIGKILL)
        for caller in callers:
            caller.join()
        assert [status for status, _ in failures] == [503]
        assert "bulk worker died" in failures[0][1]["error"]
        until(lambda: not alive(bulk), one)
        with st.Client("{}:{}".format(*one.address)) as patient:
            answer = patient.predict("wide", columns_of(9000))
        np.testing.assert_array_equal(answer.outputs["double"], doubled(9000))
    assert "bulk worker (pid" in one.log.read_text()


def large_in_flight(server):
    lines = ask(server, "GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("shorttail_large_requests_in_flight{"))


def test_a_reload_replaces_the_bulk_worker(store, start):
    one = start(of=store)
    with st.Client("{}:{}".format(*one.address)) as client:
        client.predict("wide", columns_of(9000))
        (before,) = one.children("bulk")
        one.process.send_signal(signal.SIGHUP)
        until(lambda: not alive(before), one)
        np.testing.assert_array_equal(client.predict("wide", columns_of(9000)).outputs["double"], doubled(9000))
        (after,) = one.children("bulk")
        assert after != before
    assert one.stop() == 0


def test_an_idle_bulk_worker_ends_and_starts_again(store, tmp_path):
    (tmp_path / "limits").mkdir()
    one = Server(store, log=tmp_path / "log", env=environment_with(tmp_path / "limits", bulk_idle_s=0.2))
    try:
        with st.Client("{}:{}".format(*one.address)) as client:
            for _ in range(2):
                np.testing.assert_array_equal(client.predict("wide", columns_of(9000)).outputs["double"], doubled(9000))
                until(lambda: not one.children("bulk"), one)
        assert one.stop() == 0
        assert one.log.read_text() == ""
    finally:
        one.kill()


def test_without_a_bulk_worker_large_requests_are_refused(store, start):
    one = start("--no-bulk", of=store)
    with st.Client("{}:{}".format(*one.address), retries=0) as client:
        with pytest.raises(ResourceExhausted, match="--no-bulk: send it in parts"):
            client.predict("wide", columns_of(9000))
        np.testing.assert_array_equal(client.predict("wide", columns_of(50)).outputs["double"], doubled(50))
    status, answer = ask_json(one, "POST", INFER, infer_body(3000))
    assert (status, "--no-bulk: send it in parts" in answer["error"]) == (429, True)
    assert one.children("bulk") == []


def test_a_method_with_long_params_is_refused(server):
    for method in ("ping", "models", "views", "auth", "nope"):
        with server.connect() as peer:
            peer.send(message(method, "x" * LIMITS.call_bytes))
            _, _, error, _ = read_reply(peer)
            assert (error["code"], f"calls '{method}'; at most" in error["message"]) == ("INVALID_ARGUMENT", True)
            assert peer.ask(*PREDICT) == PREDICTED


def test_long_options_are_refused(server):
    with server.connect() as peer:
        peer.send(message("predict", "total", {"user_id": 1, "amount": 1.0}, {"priority": [[]] * 100_000}))
        _, _, error, _ = read_reply(peer)
    assert error == {"code": "INVALID_ARGUMENT", "message": "options of 100015 bytes; at most 16384 are taken"}


def test_invalid_requests_are_the_same_in_the_bulk_worker(client):
    with pytest.raises(InvalidArgument, match="column 'a0' takes Float64; got 'x'"):
        client.predict("wide", columns_of(9000) | {"a0": ["x"] * 9000})


def test_only_the_user_of_the_server_reaches_the_sockets_of_the_bulk_worker(server):
    (worker,) = server.workers()
    words = Path(f"/proc/{worker}/cmdline").read_text().split("\0")
    folder = Path(words[words.index("--sockets") + 1])
    assert {path.name for path in folder.iterdir()} == {"writer", "bulk", "bulk-http"}
    assert folder.stat().st_mode & 0o077 == 0


def test_a_reader_that_stops_reading_is_cut(store, start):
    one = start("--write-deadline-s", "1", of=store)
    (worker,) = one.workers()
    with Peer(one.address) as peer:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.send(message("predict", "wide", columns_of(ROWS), {"encoding": "list"}) * 3)
        until(lambda: "wide" in ask(one, "GET", "/metrics")[1].decode(), one)
        until(lambda: connections(one) == 0, one)
    assert alive(worker)
    with one.connect() as other:
        assert other.ask(*PREDICT) == PREDICTED


def connections(server):
    text = ask(server, "GET", "/metrics")[1].decode()
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("shorttail_connections{") and "rpc" in line
    )
