"""The worst requests for their size: how long they hold up the event loop, what they cost, and what memory they leave.

    python bench/worst.py [--json] [--quick] [--rounds N] [CASE ...]

Each case sends one kind of request, as large as the server takes it, on a connection of its own, one after the other.
Meanwhile an open loop of one-row predicts on another connection measures the delay that others see. The longest answer
less the machine's own longest pause (a thread that only sleeps) bounds from above how long the event loop stood still.
In turn, the same predicts are measured with nothing beside them. The server has one worker and the bulk worker; the
worker has one CPU, and the generators another.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import os
import re
import socket
import statistics
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import installed
import loadgen
import msgpack
import numpy as np
import onnx
import report
from loadgen import BenchError
from onnx import TensorProto, helper
from serving import http_address, start_server, worker_of

import shorttail as st
from shorttail.config import LIMITS
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.result import Step
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_rpc

SECONDS, ROUNDS = 4.0, 3
PROBES_PER_S = 1000.0
ROWS = LIMITS.rows_per_request
COLUMNS, WIDTH = 200, 240
PAUSE_MAX_MS, P99_MAX, REST_S = 5.0, 2.0, 10.0
MEMORY_MAX_BYTES = 16 << 20  # what may stay of a case's memory after REST_S
MIB = 1 << 20
# What a network holds of a message. Without a limit one call of send would push up to 4 MiB through the loopback
# device, and the kernel lets nobody else run meanwhile: a process that only reads and drops such messages makes the P99
# of others ten times as long.
SEND_BUFFER_BYTES = 64 << 10

Send = Callable[[], int]  # sends one request, reads its answer, and returns the bytes of the request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="one round of 1 s a case, without the wait for memory")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of (3; 1 with --quick)")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of: {', '.join(CASES)}")
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        raise SystemExit(f"error: no case {unknown[0]!r}; cases: {', '.join(CASES)}")
    names = options.cases or list(CASES)
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), names, options.rounds or (1 if options.quick else ROUNDS), options.quick)
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    if options.json:
        report.print_json(figures, bars_of(figures))
        return
    show(figures)
    report.print_bars(bars_of(figures))


def bars_of(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    pauses_ms = {name: case["pause_ms"]["median"] for name, case in figures["cases"].items()}
    # Requests that the loop takes cost others what they take.
    ratios = {
        name: case["p99_ratio"]["median"] for name, case in figures["cases"].items() if not name.endswith("_on_loop")
    }
    longest = max(pauses_ms, key=pauses_ms.__getitem__)
    bars = [report.at_most(f"longest pause of the loop ({longest})", pauses_ms[longest], PAUSE_MAX_MS, "ms")]
    if ratios:
        worst, middle = max(ratios, key=ratios.__getitem__), statistics.median(ratios.values())
        bars.append(report.at_most(f"P99 of others / quiet ({worst})", ratios[worst], P99_MAX, "x"))
        bars.append(report.at_most(f"P99 of others / quiet, median of {len(ratios)} cases", middle, P99_MAX, "x"))
    for process, kept in figures.get("kept_bytes", {}).items():
        if process != "writer":  # LMDB keeps the pages of the largest commit, for the next one
            what = f"memory that the {process} keeps {REST_S:g} s after all cases"
            bars.append(report.at_most(what, kept / MIB, MEMORY_MAX_BYTES / MIB, "MiB"))
    return bars


# -- the cases -------------------------------------------------------------------------------------------------------


def packed(method: str, *params: Any) -> bytes:
    return bytes(msgpack.packb([0, 1, method, list(params)]))


def repeated(params: bytes, item: bytes, count: int, tail: bytes = b"") -> bytes:
    """A predict request whose column "a" is an array of `count` items."""
    return params + b"\xdd" + struct.pack(">I", count) + item * count + tail


def integers() -> bytes:
    """As many values in as few bytes as possible."""
    rows = LIMITS.declared_elements // (COLUMNS + 1)
    return packed("predict", "wide", {f"a{i}": [1] * min(ROWS, rows) for i in range(COLUMNS)})


def texts_for_numbers() -> bytes:
    """Values that Python has to convert, one by one."""
    return packed("predict", "wide", {f"a{i}": [float("nan"), True] * (ROWS // 8) for i in range(COLUMNS)})


def vectors() -> bytes:
    rows = LIMITS.declared_elements // (WIDTH + 2)
    return packed("predict", "vector", {"a": [[1] * WIDTH] * rows})


def texts() -> bytes:
    return packed("predict", "text", {"a": ["x" * 1000] * (LIMITS.frame_bytes // 1010)})


def features() -> bytes:
    """A short request with a long answer."""
    names = [f"v:f{i}" for i in range(32)] * (LIMITS.reply_values // ROWS // 32)
    return packed("get_online_features", names, {"id": list(range(ROWS))})


def refused_features() -> bytes:
    names = [f"v:f{i % 32}" for i in range(LIMITS.feature_list_bytes // 7)]
    return packed("get_online_features", names, {"id": list(range(ROWS))})


def nested() -> bytes:
    """Values for a method that takes none."""
    return packed("ping", *[[] for _ in range(3_900_000)])


def options() -> bytes:
    return packed("predict", "one", {"a": 1.5}, {"priority": [[]] * 3_900_000})


def unknown_columns() -> bytes:
    return packed("predict", "one", {f"column {i}": 1.5 for i in range(900_000)})


def pushed() -> bytes:
    return packed("push", "v", {"id": list(range(ROWS)), **{f"f{i}": [0.5] * ROWS for i in range(32)}})


def json_values() -> bytes:
    return head_and_many(b'{"inputs": [{"name": "a", "datatype": "FP64", "shape": [1], "data": [', b"1,", b"1]}]}")


def json_lists() -> bytes:
    return head_and_many(b'{"instances": [', b"[],", b"[]]}")


def json_maps() -> bytes:
    return head_and_many(b'{"instances": [', b'{"a":1},', b'{"a":1}]}')


def json_numbers() -> bytes:
    """A number of many digits, which is not one of 64 bits."""
    return b'{"instances": [' + b"1" * (LIMITS.frame_bytes - 32) + b"]}"


def head_and_many(head: bytes, item: bytes, tail: bytes, size: int = LIMITS.frame_bytes) -> bytes:
    return head + item * ((size - len(head) - len(tail)) // len(item)) + tail


def csv_fields() -> bytes:
    return (b",".join([b"1"] * COLUMNS) + b"\n") * (LIMITS.frame_bytes // (2 * COLUMNS))


def csv_lines() -> bytes:
    return b"1\n" * (LIMITS.frame_bytes // 2)


def csv_quotes() -> bytes:
    return b'"' * LIMITS.frame_bytes


def tensor(kind: str, shape: list[int], data: bytes) -> tuple[bytes, int]:
    entry = {"name": "a", "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [entry]}).encode()
    return head + data, len(head)


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "integers": ("rpc", integers),
    "uncommon": ("rpc", texts_for_numbers),
    "vectors": ("rpc", vectors),
    "texts": ("rpc", texts),
    "features": ("rpc", features),
    "refused_features": ("rpc", refused_features),
    "nested": ("rpc", nested),
    "options": ("rpc", options),
    "unknown_columns": ("rpc", unknown_columns),
    "pushed": ("rpc", pushed),
    "json_values": ("/v2/models/one/infer", json_values),
    "json_lists": ("/invocations", json_lists),
    "json_maps": ("/invocations", json_maps),
    "json_numbers": ("/invocations", json_numbers),
    "csv_fields": ("csv /invocations", csv_fields),
    "csv_lines": ("csv /invocations", csv_lines),
    "csv_quotes": ("csv /invocations", csv_quotes),
    "tensors": ("/v2/models/one/infer", lambda: tensor("FP32", [4 * MIB - 64], bytes(4 * (4 * MIB - 64)))),
    "tensor_texts": ("/v2/models/text/infer", lambda: tensor("BYTES", [4 * MIB - 64], bytes(4 * (4 * MIB - 64)))),
    "gzip": ("gzip /invocations", lambda: gzip.compress(bytes(1 << 30), 6)),
    "deflate": ("deflate /invocations", lambda: zlib.compress(bytes(1 << 30), 6)),
    "chunks": ("chunked /invocations", lambda: b"1\r\nx\r\n" * (4 * MIB // 6) + b"0\r\n\r\n"),
    "json_on_loop": (
        "/invocations",
        lambda: head_and_many(b'{"instances": [', b"[],", b"[]]}", LIMITS.loop_text_bytes),
    ),
    "instances_on_loop": (
        "/invocations",
        lambda: head_and_many(b'{"instances": [', b'{"a":1},', b'{"a":1}]}', LIMITS.loop_text_bytes),
    ),
    "values_on_loop": (
        "/v2/models/one/infer",
        lambda: head_and_many(
            b'{"inputs": [{"name": "a", "datatype": "FP64", "shape": [16000], "data": [',
            b"1,",
            b"1]}]}",
            min(LIMITS.loop_text_bytes, 2 * 16_000 + 76),
        ),
    ),
    "csv_on_loop": ("csv /invocations", lambda: b"1\n" * (LIMITS.loop_csv_fields - 1)),
    "integers_on_loop": (
        "rpc",
        lambda: packed(
            "predict", "wide", {f"a{i}": [1] * (LIMITS.loop_elements // COLUMNS - 2) for i in range(COLUMNS)}
        ),
    ),
    "texts_on_loop": ("rpc", lambda: packed("predict", "text", {"a": ["x" * 90] * (LIMITS.loop_bytes // 100)})),
    "uncommon_on_loop": (
        "rpc",
        lambda: packed("predict", "one", {"a": ["1"] * (LIMITS.loop_uncommon_values - 1)}),
    ),
}


def sender(kind: str, made: Any, address: str, http: str) -> Send:
    """Return a function that sends the case's request once, on a new connection."""
    if kind == "rpc":
        return lambda: send_rpc(address, made)
    *form, path = kind.split()
    headers = {"Content-Type": "application/json"}
    body, chunked = made, False
    if isinstance(made, tuple):
        body, headers["Inference-Header-Content-Length"] = made[0], str(made[1])
    if "/invocations" in path:
        headers["X-Amzn-SageMaker-Target-Model"] = "wide" if form == ["csv"] and b"," in body[:400] else "one"
    if form == ["csv"]:
        headers["Content-Type"] = "text/csv"
    elif form in (["gzip"], ["deflate"]):
        headers["Content-Encoding"] = form[0]
    elif form == ["chunked"]:
        headers["Transfer-Encoding"], chunked = "chunked", True
    return lambda: send_http(http, path, body, headers, chunked)


def send_rpc(address: str, message: bytes) -> int:
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 60.0) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        peer.sendall(message)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(MIB):
            pass
    return len(message)


def send_http(address: str, path: str, body: bytes, headers: dict[str, str], chunked: bool) -> int:
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=60.0)
    try:
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if chunked:
            connection.putrequest("POST", path)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            connection.send(body)
        else:
            connection.request("POST", path, body, headers)
        connection.getresponse().read()
    except (ConnectionError, http.client.HTTPException):
        pass  # refused before all of it was sent
    finally:
        connection.close()
    return len(body)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(folder: Path, names: list[str], rounds: int, quick: bool) -> dict[str, Any]:
    cpus = sorted(os.sched_getaffinity(0))
    client_cpu = cpus[-1] if len(cpus) > 1 else None
    store, log = make_store(folder), folder / "log"
    with start_server(store, log, "--pin-cpus") as (address, server):
        http = http_address(log)
        with st.Client(address) as client:
            probe = plan_rpc(Workload(predict="probe", keys=["id=uniform:0:99999"]), client.models(), client.views())
        load = Load(connections=1, pipeline=256, duration_s=1.0 if quick else SECONDS, warmup_s=0.2, spin_us=0.0)
        bench = Bench(target.find(address), probe, load, client_cpu, server)
        bench.step()  # the first answers pay for caches
        sends = {name: sender(CASES[name][0], CASES[name][1](), address, http) for name in names}
        send_rpc(address, vectors())  # the bulk worker starts
        time.sleep(1.0)
        before = bench.memory()
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                found[name].append(bench.case(sends[name]))
        figures: dict[str, Any] = {"cases": {name: summary(each) for name, each in found.items()}}
        if not quick:
            time.sleep(REST_S)
            figures["kept_bytes"] = {kind: now - before[kind] for kind, now in bench.memory().items()}
    return figures


class Bench:
    """A server under worst requests. server: the process id of its supervisor."""

    def __init__(self, where: target.Target, probe: Traffic, load: Load, cpu: int | None, server: int):
        self.where, self.probe, self.load, self.cpu, self.server = where, probe, load, cpu, server

    def step(self) -> Step:
        with loadgen.pinned(self.cpu), ahead():
            step = run_step(self.probe, self.where, self.load, Rate(PROBES_PER_S, PROBES_PER_S))
        if step.fatal:
            raise BenchError(step.fatal)
        return step

    def case(self, send: Send) -> dict[str, Any]:
        """Measure the one-row predicts alone, and beside the case's requests."""
        quiet = self.step()
        stop, sent = threading.Event(), [0, 0]

        def attack() -> None:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # it shares a CPU with what measures
            while not stop.is_set():
                sent[0] += send()
                sent[1] += 1

        cpu_s, before = self.cpu_s(), self.memory()
        self.forget_peak()
        with loadgen.pinned(self.cpu):
            thread = threading.Thread(target=attack)
            thread.start()
        try:
            beside = self.step()
        finally:
            stop.set()
            thread.join()
        cpu_s = {name: after - cpu_s.get(name, 0.0) for name, after in self.cpu_s().items()}
        mib = max(1, sent[0]) / MIB
        return {
            "pause_ms": max(0.0, beside.latency.max_ns - beside.hiccups.max_ns) / 1e6,
            "longest_ms": beside.latency.max_ns / 1e6,
            "quiet_longest_ms": quiet.latency.max_ns / 1e6,
            "hiccup_ms": beside.hiccups.max_ns / 1e6,
            "p99_us": beside.latency.percentile(99) / 1e3,
            "quiet_p99_us": quiet.latency.percentile(99) / 1e3,
            "p99_ratio": beside.latency.percentile(99) / quiet.latency.percentile(99),
            "held_a_byte": max(0.0, self.peak() - sum(before.values())) * max(1, sent[1]) / max(1, sent[0]),
            "failed": sum(error.count for error in beside.errors.values()),
            "mib": mib / max(1, sent[1]),
            "requests": sent[1],
            "loop_ms_a_mib": 1e3 * cpu_s["worker"] / mib,
            "ms_a_mib": 1e3 * sum(cpu_s.values()) / mib,
        }

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of the worker, the bulk worker and the writer so far."""
        found = {"worker": 0.0, "other": 0.0}
        for pid in self._children():
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            is_worker = pid == worker_of(self.server)
            found["worker" if is_worker else "other"] += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        return found

    def memory(self) -> dict[str, int]:
        """Resident bytes that are not of files, of the worker, the bulk worker and the writer."""
        found = {}
        for pid in self._children():
            words = Path(f"/proc/{pid}/cmdline").read_text()
            kind = "bulk worker" if "--bulk\0" in words else "writer" if "server.writer" in words else "worker"
            [kib] = re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            found[kind] = int(kib) * 1024
        return found

    def forget_peak(self) -> None:
        """Let the peak of each process's memory begin at what it has now (proc(5), clear_refs)."""
        for pid in self._children():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Sum of the peaks of the processes' anonymous memory, as far as the system tells it."""
        found = 0
        for pid in self._children():
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            of_files = sum(int(status[name].split()[0]) for name in ("RssFile", "RssShmem"))
            found += 1024 * (int(status["VmHWM"].split()[0]) - of_files)
        return found

    def _children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.server}/task/{self.server}/children").read_text().split()]


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Let threads that are started here run before all others, where that is allowed: they stand for other machines."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: report.spread([each[name] for each in rounds]) for name in rounds[0]}


# -- the store -------------------------------------------------------------------------------------------------------


def make_store(folder: Path) -> Path:
    item = st.Entity("item", keys={"id": st.Int64})
    view = st.FeatureView("v", entity=item, features=[st.Feature(f"f{i}", st.Float32) for i in range(32)])
    wide = [f"request:a{i}" for i in range(COLUMNS)]
    models = [
        st.Model("one", mean(folder / "one.onnx", 1), ["request:a"]),
        st.Model("probe", mean(folder / "one.onnx", 1), ["v:f0"]),
        st.Model("wide", mean(folder / "wide.onnx", COLUMNS), wide),
        st.Model("vector", mean(folder / "vector.onnx", WIDTH), ["request:a"]),
        st.Model("text", identity(folder / "text.onnx"), ["request:a"]),
    ]
    with st.Engine.open(folder / "store", create=True) as engine:
        engine.apply([view, *models])
        ids = np.arange(100_000)
        engine.load("v", {"id": ids, **{f"f{i}": np.full(len(ids), 0.5, np.float32) for i in range(32)}})
    return folder / "store"


def mean(path: Path, width: int) -> str:
    """Write a model that returns the mean of each row of `width` numbers."""
    return write(path, helper.make_node("ReduceMean", ["x"], ["y"], axes=[1]), TensorProto.FLOAT, width)


def identity(path: Path) -> str:
    """Write a model that returns each text."""
    return write(path, helper.make_node("Identity", ["x"], ["y"]), TensorProto.STRING, 1)


def write(path: Path, node: onnx.NodeProto, kind: int, width: int) -> str:
    graph = helper.make_graph(
        [node],
        "worst",
        [helper.make_tensor_value_info("x", kind, [None, width])],
        [helper.make_tensor_value_info("y", kind, [None, 1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return str(path)


def show(figures: Mapping[str, Any]) -> None:
    print(
        "case                  MiB     n  pause  longest (quiet) ms   P99 / quiet us   ms a MiB: loop, all held failed"
    )
    for name, case in figures["cases"].items():
        of = {key: value["median"] for key, value in case.items()}
        print(
            f"{name:18} {of['mib']:6.2f} {of['requests']:5.0f} {of['pause_ms']:6.1f} {of['longest_ms']:8.1f}"
            f" ({of['quiet_longest_ms']:.1f}) {of['p99_us']:9.0f} / {of['quiet_p99_us']:.0f} = {of['p99_ratio']:.2f}"
            f" {of['loop_ms_a_mib']:9.2f} {of['ms_a_mib']:8.2f} {of['held_a_byte']:5.1f} {of['failed']:5.0f}"
        )
    if kept := figures.get("kept_bytes"):
        print("kept: " + ", ".join(f"{process} {of / MIB:.1f} MiB" for process, of in kept.items()))


if __name__ == "__main__":
    main()
