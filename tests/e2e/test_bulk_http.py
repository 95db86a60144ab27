"""Large HTTP requests: the bulk worker answers them, and limits of bodies hold while they arrive."""

import contextlib
import gzip
import json
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from http_asking import Asking, ask, ask_json
from serving import Server, until
from wide import (
    INFER,
    TOKEN,
    WIDE,
    columns_of,
    doubled,
    doubles,
    infer_body,
    make_wide_store,
    message,
    read_reply,
)

import shorttail as st
from shorttail.config import LIMITS


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_wide_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    one = Server(store, log=tmp_path_factory.mktemp("log") / "log")
    yield one
    assert one.stop() == 0
    assert one.log.read_text() == ""


@pytest.mark.parametrize("compressed", ["", "gzip", "deflate", "raw deflate"])
@pytest.mark.parametrize("rows", [2, 3000])
def test_json_of_any_size_is_answered(server, rows, compressed):
    body = json.dumps(infer_body(rows)).encode()
    headers = {"Content_Encoding": compressed.split()[-1]} if compressed else {}
    if compressed == "gzip":
        body = gzip.compress(body[:100]) + gzip.compress(body[100:])  # of two members
    elif compressed:
        stream = zlib.compressobj(wbits=15 if compressed == "deflate" else -15)
        body = stream.compress(body) + stream.flush()
    status, answer = ask(server, "POST", INFER, body, **headers)
    assert status == 200, answer
    np.testing.assert_array_equal(doubles(json.loads(answer), rows), doubled(rows))


@pytest.mark.parametrize("rows", [2, 3000])
def test_csv_of_any_size_is_answered(server, rows):
    asked = columns_of(rows)
    lines = (",".join(map(str, row)) for row in zip(*asked.values(), strict=True))
    body = "\n".join([",".join(asked), *lines]).encode()
    headers = {"Content_Type": "text/csv", "X_Amzn_SageMaker_Target_Model": "wide"}
    status, answer = ask(server, "POST", "/invocations", body, **headers)
    assert status == 200, answer
    found = [line.split(",") for line in answer.decode().splitlines()]
    np.testing.assert_array_equal(np.array([row[:WIDE] for row in found], np.float32), doubled(rows))
    assert [row[WIDE] for row in found] == asked["text"]


def test_tensors_of_many_texts_are_answered(server):
    rows = 4000
    texts = b"".join(struct.pack("<I", 12) + f"text {n:07}".encode() for n in range(rows))
    numbers = doubled(rows) / 2
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [rows, 1], "parameters": {"binary_data_size": len(texts)}}]
    inputs.append(
        {"name": "x", "datatype": "FP32", "shape": [rows, WIDE], "parameters": {"binary_data_size": numbers.nbytes}}
    )
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = head + texts + numbers.astype("<f4").tobytes()
    status, answer = ask(server, "POST", INFER, body, Inference_Header_Content_Length=str(len(head)))
    assert status == 200, answer[:300]
    assert doubled(rows).astype("<f4").tobytes() in answer
    assert texts in answer


def test_a_body_in_tiny_chunks_is_the_same_body(server):
    for rows in (2, 200):
        body = json.dumps(infer_body(rows)).encode()
        with contextlib.ExitStack() as stack:
            peer = Asking(server, stack)
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
            threading.Thread(target=peer.peer.sendall, args=(head.encode() + chunks,)).start()
            received = b""
            while data := peer.peer.recv(1 << 16):
                received += data
        head, _, answer = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        if b"chunked" in head:
            answer = b"".join(dechunked(answer))
        np.testing.assert_array_equal(doubles(json.loads(answer), rows), doubled(rows))


def dechunked(data):
    while data:
        size, _, data = data.partition(b"\r\n")
        yield data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]


@pytest.mark.parametrize("length", [LIMITS.frame_bytes + 1, 99_999_999_999, 2**63])
def test_a_length_above_the_limit_is_refused_at_once(server, length):
    with contextlib.ExitStack() as stack:
        peer = Asking(server, stack)
        peer.begin(length)
        status, _ = peer.answer()
    assert status in (400, 413)
    assert status == 413 or length == 2**63


def test_a_small_body_that_inflates_without_end_is_refused(server):
    (worker,) = server.workers()
    before = peak_bytes(worker)
    for encoding, bomb, status in (
        ("gzip", gzip.compress(bytes(64 << 20)), 413),
        ("deflate", zlib.compress(bytes(64 << 20)), 413),
        ("gzip", gzip.compress(b" ") * 200_000, 400),
    ):
        found, answer = ask(server, "POST", INFER, bomb, Content_Encoding=encoding)
        assert found == status, answer
    assert peak_bytes(worker) - before < 32 << 20


def peak_bytes(pid):
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", b'{"inputs": []}', 400),
        ("gzip", gzip.compress(b"{}")[:-5], 400),
        ("gzip", gzip.compress(b"{}") + b"more", 400),
        ("deflate", b'{"inputs": []}', 400),
        ("br", b"x", 415),
        ("gzip, gzip", b"x", 415),
    ],
    ids=["plain", "cut", "more", "plain deflate", "unknown", "twice"],
)
def test_a_body_that_is_not_compressed_as_it_says_is_refused(server, encoding, body, status):
    found, answer = ask(server, "POST", INFER, body, Content_Encoding=encoding)
    assert found == status
    assert json.loads(answer)["error"]


def test_a_deadline_of_a_large_http_request_holds(server):
    assert ask_json(server, "POST", INFER, infer_body(3000), X_Deadline_Ms="0.01")[0] == 504


def test_large_requests_need_a_token_too(store, start, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"serve {TOKEN}\n")
    tokens.chmod(0o600)
    one = start("--token-file", tokens, of=store)
    body = infer_body(3000)
    assert ask_json(one, "POST", INFER, body)[0] == 401
    assert ask_json(one, "POST", INFER, body, Authorization="Bearer wrong")[0] == 403
    assert one.children("bulk") == []
    status, answer = ask_json(one, "POST", INFER, body, Authorization=f"Bearer {TOKEN}")
    assert status == 200
    np.testing.assert_array_equal(doubles(answer, 3000), doubled(3000))
    with one.connect() as peer:
        with contextlib.suppress(ConnectionError):
            peer.send(message("predict", "wide", columns_of(9000)))
        _, _, error, _ = read_reply(peer)
        assert error["code"] == "UNAUTHENTICATED"
    with st.Client("{}:{}".format(*one.address), token=TOKEN) as client:
        np.testing.assert_array_equal(client.predict("wide", columns_of(9000)).outputs["double"], doubled(9000))


def test_metrics_count_each_large_request_once(store, start):
    one = start(of=store)

    def counted():
        text = ask(one, "GET", "/metrics")[1].decode()
        lines = [line for line in text.splitlines() if line.startswith("shorttail_requests_total") and "wide" in line]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    with st.Client("{}:{}".format(*one.address)) as client:
        client.predict("wide", columns_of(9000))
    assert ask_json(one, "POST", INFER, infer_body(3000))[0] == 200
    until(lambda: sum(counted().values()) == 2, one)
    assert all('code="OK"' in name for name in counted())
