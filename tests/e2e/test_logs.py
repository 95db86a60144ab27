"""The server's stderr: with `--log json` each line is a JSON object, also the output of libraries and children."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys

import msgpack
import pytest
from serving import PREDICT, PREDICTED, SERVE, TIMEOUT_S, until

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import NotFound
from shorttail.observe import stderr
from shorttail.observe.logs import trace_ids
from shorttail.server.errorlog import ErrorLog

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
LEVELS = {"info", "warning", "error", "critical"}


def lines(server):
    """Return the complete lines so far. Each has to be a JSON object."""
    written = server.log.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in written if line.endswith("\n")]
    for line in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in LEVELS
        assert isinstance(line["message"], str)
    return found


def line_with(server, message, **fields):
    """Wait for the line whose message matches and that has these fields, and return it."""

    def found():
        for line in lines(server):
            if re.search(message, line["message"]) and fields.items() <= line.items():
                return line
        return None

    return until(found, server)


def test_every_line_is_json_whatever_happens(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # a worker that aborts prints a traceback of many lines
    tokens = tmp_path / "tokens"
    tokens.write_text(f"admin {'a' * 32}\n")
    tokens.chmod(0o600)
    server = start("--workers", 2, "--log", "json", "--log-failed", "--slow-ms", 1e-4, "--token-file", tokens)
    assert server.line.startswith("serving on 127.0.0.1:")  # stdout stays text
    assert line_with(server, "serving on .* 2 workers", level="info")["message"] == server.line.rstrip("\n")
    with server.connect() as peer:
        peer.ask(0, 1, "predict", PREDICT[3])
        peer.ask(0, 2, "auth", ["a" * 32])
        assert peer.ask(*PREDICT) == PREDICTED
        peer.ask(0, 3, "predict", ["fraud\n{}", {"user_id": 1}])
    line_with(server, "request failed", code="UNAUTHENTICATED", level="warning")
    line_with(server, "request failed", code="NOT_FOUND", request_id="3")
    line_with(server, "slow batch", model="total")
    killed, aborted = server.workers()
    os.kill(killed, signal.SIGKILL)
    line_with(server, rf"worker \d \(pid {killed}\) died: signal 9 \(SIGKILL\); starting it again", level="warning")
    until(lambda: len(server.workers()) == 2, server)
    os.kill(aborted, signal.SIGABRT)
    line_with(server, "Fatal Python error: Aborted", level="warning", process=line_of(server, aborted))
    [writer] = server.children("writer")
    os.kill(writer, signal.SIGKILL)
    line_with(server, rf"writer \(pid {writer}\) died")
    tokens.chmod(0o644)
    server.process.send_signal(signal.SIGHUP)
    line_with(server, "reload refused: token file", level="warning")
    tokens.chmod(0o600)
    server.process.send_signal(signal.SIGHUP)
    line_with(server, "reloaded: 2 workers replaced", level="info")
    assert server.stop() == 0
    assert [line["message"] for line in lines(server)][-2:] == ["stopping", "stopped"]


def line_of(server, pid):
    return re.match(r"worker \d", line_with(server, rf"\(pid {pid}\) died")["message"])[0]


@pytest.mark.parametrize("what", ["store", "model", "token file"])
def test_a_server_that_does_not_start_says_so_in_json(store, tmp_path, what):
    options = ["--store", str(tmp_path / "absent" if what == "store" else store), "--port", "0", "--log", "json"]
    if what == "model":
        options += ["--device", "cuda:99"]
    if what == "token file":
        options += ["--token-file", str(tmp_path / "absent")]
    done = subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = map(json.loads, done.stderr.splitlines())
    assert line["level"] == "error"
    assert not line["message"].startswith("error")


def test_output_of_the_interpreter_is_a_line_with_its_traceback():
    """These are exceptions that end a thread or the process, warnings, and logs of libraries."""
    program = """
import asyncio, logging, threading, warnings
from shorttail.observe import stderr
stderr.log_as_json("json")
warnings.warn("old")
logging.getLogger("asyncio").error("lost\\nit")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
class Ends:
    def __del__(self): raise OSError("in del")
Ends()
raise KeyError("last")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    warned, logged, thread, unraisable, last = map(json.loads, done.stderr.splitlines())
    assert (warned["level"], logged["level"], last["level"]) == ("warning", "error", "critical")
    assert "UserWarning: old" in warned["message"]
    assert (logged["message"], logged["logger"]) == ("lost\nit", "asyncio")
    assert "ZeroDivisionError: division by zero" in thread["traceback"]
    assert "OSError: in del" in unraisable["traceback"]
    assert last["message"] == "KeyError: 'last'"
    assert last["traceback"].startswith("Traceback (most recent call last):")


def test_unexpected_exceptions_are_logged_with_their_traceback(capsys):
    async def fault():
        faults = ErrorLog("json")
        for _ in range(3):
            try:
                raise RuntimeError("unforeseen\nof two lines")
            except RuntimeError as error:
                faults(error)
        faults.write(asyncio.get_running_loop())
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(fault())
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"RuntimeError: unforeseen \(test_logs\.py:\d+\) \(3 times\)", line["message"])
    assert line["traceback"].endswith("RuntimeError: unforeseen\nof two lines\n")


def test_json_lines_of_a_child_pass_unchanged_and_others_are_wrapped(capsys):
    written = b'{"a": 1}\nraw \xff\n\n{not json}\n[1]\n' + b"x" * (stderr.RAW_LINE_BYTES + 1) + b"\nno end"
    read, write = os.pipe()
    thread = stderr.relay(os.fdopen(read, "rb"), "worker 7")
    with os.fdopen(write, "wb") as out:
        out.write(written)
    thread.join(TIMEOUT_S)
    first, *others = map(json.loads, capsys.readouterr().err.splitlines())
    assert first == {"a": 1}
    assert {line["process"] for line in others} == {"worker 7"}
    texts = [line["message"] for line in others]
    assert texts[:3] == ["raw \ufffd", "{not json}", "[1]"]
    assert [len(text) for text in texts[3:]] == [stderr.RAW_LINE_BYTES, 1, 6]


# -- W3C trace context on the wire -----------------------------------------------------------------------------------

INVALID = [
    TRACEPARENT.upper(),
    TRACEPARENT[:-1],
    TRACEPARENT.replace("-", "_"),
    f"00-{'0' * 32}-{PARENT_ID}-01",
    f"00-{TRACE_ID}-{'0' * 16}-01",
    "ff" + TRACEPARENT[2:],
    TRACEPARENT + "-more",
    "01" + TRACEPARENT[2:] + "more",
    "01" + TRACEPARENT[2:] + "-" + "x" * LIMITS.traceparent_bytes,
    "",
    "\u00e9" * 55,
]
IDS = {"trace_id": TRACE_ID, "parent_id": PARENT_ID}


def test_a_traceparent_is_checked_as_w3c_recommends():
    assert trace_ids(TRACEPARENT) == trace_ids("01" + TRACEPARENT[2:] + "-more") == IDS
    assert not any(map(trace_ids, [*INVALID[:8], *INVALID[9:]]))  # the ninth is valid but too long


@pytest.fixture(scope="module")
def logged(tmp_path_factory, store):
    from serving import Server

    server = Server(store, "--log", "json", "--log-failed", log=tmp_path_factory.mktemp("logged") / "log")
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("msgid", "method", "params", "options", "code"),
    [
        (101, "predict", ["fraud", {"user_id": 1}], {}, "NOT_FOUND"),
        (102, "predict", ["total", {"user_id": "one", "amount": 1}], {"priority": 2}, "INVALID_ARGUMENT"),
        (103, "predict", ["total", {"user_id": 1, "amount": 1}], {"vresion": 1}, "INVALID_ARGUMENT"),
        (104, "predict", ["total", {"user_id": 1, "amount": 1}], {"deadline_ms": 1e-6}, "DEADLINE_EXCEEDED"),
        (105, "get_online_features", [["stats:aeg"], {"user_id": 1}], {}, "NOT_FOUND"),
        (106, "push", ["nothing", {"user_id": 1}], {}, "NOT_FOUND"),
        (107, "delete", ["stats", {"user": 1}], {}, "INVALID_ARGUMENT"),
        (108, "push", ["stats"], {}, "INVALID_ARGUMENT"),
    ],
)
def test_failed_requests_are_logged_with_their_trace(logged, msgid, method, params, options, code):
    with logged.connect() as peer:
        for given in ({**options, "traceparent": TRACEPARENT}, {"traceparent": TRACEPARENT, **options}):
            reply = peer.ask(0, msgid, method, [*params, given])
            assert reply[1:3] == [msgid, {"code": code, "message": reply[2]["message"]}]
            if len(params) == 1:
                return  # this request has no options at the place where they are read
    line_with(logged, "request failed", method=method, code=code, request_id=str(msgid), protocol="rpc", **IDS)


def test_the_clients_send_a_traceparent(logged):
    address = f"{logged.address[0]}:{logged.address[1]}"
    parents = [f"{n:016x}" for n in range(31, 39)]
    traces = iter([f"00-{TRACE_ID}-{parent}-01" for parent in parents])
    with st.Client(address) as client:
        for call in (
            lambda trace: client.predict("nobody", {"user_id": 1}, traceparent=trace),
            lambda trace: client.get_online_features(["nothing:x"], {"user_id": 1}, traceparent=trace),
            lambda trace: client.push("nothing", {"user_id": [1]}, traceparent=trace),
            lambda trace: client.delete("nothing", {"user_id": [1]}, traceparent=trace),
        ):
            with pytest.raises(NotFound):
                call(next(traces))

    async def pipelined():
        async with await st.AsyncClient.connect(address) as client:
            for call in (
                lambda trace: client.predict("nobody", {"user_id": 1}, traceparent=trace),
                lambda trace: client.get_online_features(["nothing:x"], {"user_id": 1}, traceparent=trace),
                lambda trace: client.push("nothing", {"user_id": [1]}, traceparent=trace),
                lambda trace: client.delete("nothing", {"user_id": [1]}, traceparent=trace),
            ):
                with pytest.raises(NotFound):
                    await call(next(traces))

    asyncio.run(pipelined())
    for parent in parents:
        line_with(logged, "request failed", code="NOT_FOUND", trace_id=TRACE_ID, parent_id=parent)


def test_each_failure_with_a_trace_has_a_line_and_the_others_share_one(logged):
    traces = [f"00-{TRACE_ID}-{n:016x}-01" for n in range(1, 4)]
    with logged.connect() as peer:
        requests = [[0, 200 + n, "predict", ["total", {}, {"traceparent": trace}]] for n, trace in enumerate(traces)]
        requests += [[0, 210 + n, "predict", ["total", {}]] for n in range(4)]
        peer.send(b"".join(map(msgpack.packb, requests)))
        assert {peer.reply()[2]["code"] for _ in requests} == {"INVALID_ARGUMENT"}
    for n, trace in enumerate(traces):
        line_with(logged, "request failed", request_id=str(200 + n), parent_id=trace[36:52], model="total")
    assert "trace_id" not in line_with(logged, "request failed", request_id="213", requests=4)


@pytest.mark.parametrize("trace", INVALID)
def test_a_traceparent_that_is_not_valid_is_ignored(logged, trace):
    msgid = 300 + INVALID.index(trace)
    with logged.connect() as peer:
        assert peer.ask(0, msgid, "predict", [*PREDICT[3], {"traceparent": trace}])[2:] == PREDICTED[2:]
        assert peer.ask(0, msgid, "predict", ["fraud", {}, {"traceparent": trace}])[2]["code"] == "NOT_FOUND"
    line = line_with(logged, "request failed", request_id=str(msgid))
    assert "trace_id" not in line


def test_the_length_of_a_traceparent_is_limited(logged):
    longest = f"01{TRACEPARENT[2:]}-".ljust(LIMITS.traceparent_bytes, "x")
    with logged.connect() as peer:
        assert peer.ask(0, 400, "predict", ["fraud", {}, {"traceparent": longest}])[2]["code"] == "NOT_FOUND"
    line_with(logged, "request failed", request_id="400", **IDS)


def test_a_traceparent_must_be_a_string_or_nil(logged):
    with logged.connect() as peer:
        for method, params in (("predict", PREDICT[3]), ("delete", ["stats", {"user_id": [77]}])):
            assert peer.ask(0, 1, method, [*params, {"traceparent": None}])[2] is None
            assert peer.ask(0, 1, method, [*params, {"traceparent": TRACEPARENT}])[2] is None
            error = peer.ask(0, 1, method, [*params, {"traceparent": 7}])[2]
            assert (error["code"], error["message"]) == (
                "INVALID_ARGUMENT",
                "option 'traceparent' must be a string; got 7",
            )


def test_slow_requests_are_logged_with_their_trace(start):
    server = start("--log", "json", "--slow-ms", 1e-4)
    with server.connect() as peer:
        traced = msgpack.packb([0, 11, "predict", [*PREDICT[3], {"traceparent": TRACEPARENT}]])
        peer.send(msgpack.packb(PREDICT) + traced)
        assert {peer.reply()[1], peer.reply()[1]} == {1, 11}
        reply = peer.ask(0, 12, "delete", ["stats", {"user_id": [77]}, {"traceparent": TRACEPARENT}])
        assert reply[2:] == [None, {"rows": 0}]
        assert peer.ask(*PREDICT) == PREDICTED
    line = line_with(server, "slow request", request_id="11", method="predict", model="total", **IDS)
    assert line["duration_ms"] > 0
    line_with(server, "slow request", request_id="12", method="delete", **IDS)
    line_with(server, "slow batch", model="total")
    assert server.stop() == 0
    assert [line["request_id"] for line in lines(server) if "trace_id" in line] == ["11", "12"]
