"""Measure the effect of idle and nearly idle connections on the latency of others and on the worker's memory.

    python bench/connections.py [--json] [--quick] [--rounds N]

Two servers with one worker each share a CPU. One of them has a crowd: 10,000 idle connections, and 1,000 connections
that send one byte per second. A steady open-loop load on a forest of 100 trees goes to the two servers in turn, one
second each. The crowd is silent while the other server is measured. Halfway the servers swap roles.

P99 is taken over all answers with the crowd, and over all answers without it. The machine stops for some milliseconds
now and then; over enough seconds this affects both sides equally. The printed interval is a bootstrap: it contains 90%
of the ratios of as many rounds, drawn from the measured rounds with replacement.

Then clients request large answers and never read them. The benchmark measures when they are cut off and how much memory
the worker keeps. Memory that the first two rounds leave behind is reused by the next two, unless it leaks.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed
import numpy as np
import overload
import report
from loadgen import BenchError
from micro import forest as forests
from numpy.typing import NDArray
from overload import Bench
from serving import start_server, worker_of

import shorttail as st
from shorttail.client import columns as client_columns
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.runner import Load
from shorttail.loadtest.traffic import Workload, plan_rpc

IDLE, SLOW = 10_000, 1_000
OTHER_FILES = 512
SOURCE_PORTS = 5_000  # connections per source address, from 127.0.0.2
RATE_SHARE = 0.3
DRAWS = 500
NEVER_READING = 8
ASKED_ROWS, FEATURES = 4_000, 32  # an answer of 640 kB
WRITE_DEADLINE_S = 2
P99_RATIO_MAX = 1.2
KEPT_MB_MAX = 8.0


def main() -> None:
    if sys.argv[1:2] == ["--dribble"]:
        dribble(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; ends within 50 s")
    parser.add_argument(
        "--rounds", type=int, help="rounds of one second with the crowd and one without (150; 4 with --quick)"
    )
    options = parser.parse_args()
    rounds = options.rounds or (4 if options.quick else 150)
    forests.training_rows = forests.QUICK_TRAINING_ROWS
    try:
        allow_files(IDLE + SLOW + OTHER_FILES)
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "forest.onnx"
            model.write_bytes(forests.MODELS["lightgbm-100x31"]())
            store = overload.make_store(Path(folder) / "store", model, "probabilities")
            figures = {
                **crowd(Path(folder), store, rounds),
                "never_reading": never_reading(Path(folder), store),
            }
    except (BenchError, ShorttailError) as error:
        raise SystemExit(f"error: {error}") from None
    silent = figures["never_reading"]
    bars = [
        report.at_most(
            f"P99 with {IDLE:,} idle and {SLOW:,} slow connections / without", figures["p99_ratio"], P99_RATIO_MAX, "x"
        ),
        report.at_most("failed requests", figures["failed"], 0, "requests"),
        report.at_most("connections lost of those", figures["lost"], 0, "connections"),
        report.at_most("clients that never read: cut after", silent["cut_s"], WRITE_DEADLINE_S + 5, "s"),
        report.at_most("clients that never read: memory kept", silent["kept_mb"], KEPT_MB_MAX, "MB"),
    ]
    if options.json:
        report.print_json(figures, bars)
        return
    for name, value in figures.items():
        print(f"{name}: {value}")
    report.print_bars(bars)


def allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BenchError(f"{wanted:,} open files are needed, {hard:,} are allowed; raise the limit (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def crowd(folder: Path, store: Path, rounds: int) -> dict[str, Any]:
    """Measure a light load at the server with the crowd and at the server without it."""
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    with st.Engine.open(store) as engine:
        plan = plan_rpc(Workload(predict="m", keys=["user_id=uniform:0:999"]), engine.models(), engine.views())
    # No spinning, because the crowd uses the generator's CPU too.
    load = Load(connections=16, duration_s=1.0, warmup_s=0.3, spin_us=0.0)
    took_us: dict[str, list[NDArray[np.float64]]] = {"with": [], "without": []}
    memory: list[float] = []
    failed = lost = 0
    with (
        start_server(store, folder / "log1", "--no-http", cpu=server_cpu) as first,
        start_server(store, folder / "log2", "--no-http", cpu=server_cpu) as second,
    ):
        benches = [
            Bench(plan, target.find(address), worker_of(server), client_cpu, load)
            for address, server in (first, second)
        ]
        closed = Load(connections=16, pipeline=1, closed=True, duration_s=1.0)
        rate_per_s = RATE_SHARE * min(bench.run(closed, None).good_per_s for bench in benches)
        load = replace(load, events=int(1.5 * rate_per_s))
        for place, (address, _) in enumerate((first, second)):
            at = {"with": benches[place], "without": benches[1 - place]}
            with crowded(address) as (idle, slow):
                for number in range(place, rounds, 2):
                    for name in ("with", "without") if number // 2 % 2 == 0 else ("without", "with"):
                        slow.send_signal(signal.SIGCONT if name == "with" else signal.SIGSTOP)
                        step = at[name].run(load, rate_per_s)
                        failed += step.due - step.outcomes["good"]
                        good = step.events[step.events["outcome"] == 0]
                        took_us[name].append((good["done_ns"] - good["intended_ns"]) / 1e3)
                lost += count_lost(idle)
                memory.append(resident_mb(at["with"].worker))
    ratios = drawn_p99_ratios(took_us["with"], took_us["without"])
    found = {name: np.percentile(np.concatenate(seconds), [50, 99, 99.9]) for name, seconds in took_us.items()}
    return {
        "rate_per_s": rate_per_s,
        "rounds": rounds,
        **{name: dict(zip(("p50_us", "p99_us", "p999_us"), map(float, at), strict=True)) for name, at in found.items()},
        "p99_ratio": float(found["with"][1] / found["without"][1]),
        "p99_ratio_of_nine_tenths": [float(ratio) for ratio in np.percentile(ratios, [5, 95])],
        "rss_mb_with": max(memory),
        "failed": failed,
        "lost": lost,
    }


def drawn_p99_ratios(one: list[NDArray[np.float64]], other: list[NDArray[np.float64]]) -> list[float]:
    """Return the bootstrap: the P99 ratios of as many rounds, drawn with replacement."""
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(DRAWS):
        drawn = random.integers(0, len(one), len(one))
        p99s = [np.percentile(np.concatenate([took_us[n] for n in drawn]), 99) for took_us in (one, other)]
        ratios.append(float(p99s[0] / p99s[1]))
    return ratios


@contextlib.contextmanager
def crowded(address: str) -> Iterator[tuple[list[socket.socket], subprocess.Popen[bytes]]]:
    """Open the idle connections, and start a low-priority process for those that send one byte per second."""
    slow = subprocess.Popen([sys.executable, __file__, "--dribble", address], stdout=subprocess.PIPE)
    idle: list[socket.socket] = []
    try:
        idle += (connect(address, n) for n in range(IDLE))
        assert slow.stdout is not None
        if slow.stdout.readline() != b"ready\n":
            raise BenchError("the slow connections could not be made")
        yield idle, slow
        if slow.poll() is not None:
            raise BenchError("the slow connections were lost")
    finally:
        slow.send_signal(signal.SIGKILL)
        slow.wait()
        for one in idle:
            one.close()


def connect(address: str, number: int) -> socket.socket:
    host, _, port = address.rpartition(":")
    source = f"127.0.{1 + number // SOURCE_PORTS}.1"
    return socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))


def count_lost(connections: list[socket.socket]) -> int:
    """Count the idle connections that the server has closed."""
    lost = 0
    for one in connections:
        one.setblocking(False)
        try:
            lost += one.recv(1) == b""
        except BlockingIOError:
            pass
        except ConnectionError:
            lost += 1
    return lost


def dribble(address: str) -> None:
    """Send one byte per second on each of SLOW connections, as a sequence of pings. Runs in a process of its own."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    allow_files(SLOW + OTHER_FILES)
    slow = [connect(address, IDLE + n) for n in range(SLOW)]
    message = client_columns.pack_request(1, "ping", [])
    print("ready", flush=True)
    due_s = time.monotonic()
    for n in itertools.count():
        # Bytes that were due while this process was stopped are not sent later.
        due_s = max(due_s + 1 / SLOW, time.monotonic() - 0.01)
        time.sleep(max(0.0, due_s - time.monotonic()))
        at = n // SLOW % len(message)
        slow[n % SLOW].sendall(message[at : at + 1])


def never_reading(folder: Path, store: Path) -> dict[str, Any]:
    options = ("--no-http", "--write-deadline-s", str(WRITE_DEADLINE_S), "--p99-budget-ms", "1e6")
    with start_server(store, folder / "silent", *options) as (address, server):
        worker = worker_of(server)
        before_mb = resident_mb(worker)
        rounds = [starve(address, worker) for _ in range(4)]
    after_mb = [left_mb for _, _, left_mb in rounds]
    return {
        "clients": NEVER_READING,
        "before_mb": before_mb,
        "peak_mb": max(peak_mb for _, peak_mb, _ in rounds),
        "after_mb": after_mb,
        "kept_mb": max(after_mb[2:]) - min(after_mb[:2]),
        "cut_s": max(cut_s for cut_s, _, _ in rounds),
    }


def starve(address: str, worker: int) -> tuple[float, float, float]:
    """Return (seconds from the last read to the last cut connection, peak memory in MB, memory afterwards in MB)."""
    host, _, port = address.rpartition(":")
    references = [f"stats:f{i}" for i in range(FEATURES)]
    request = client_columns.pack_request(1, "get_online_features", [references, {"user_id": [1] * ASKED_ROWS}])
    greedy = [socket.create_connection((host, int(port))) for _ in range(NEVER_READING)]
    try:
        for one in greedy:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(0.1)
        peak_mb, start_s, waiting = 0.0, time.monotonic(), list(greedy)
        stream, sent = request * 4, dict.fromkeys(greedy, 0)
        full_s = start_s
        while waiting:
            if time.monotonic() - start_s > 60:
                raise BenchError("a client that never reads was not cut off within 60 s")
            for one in list(waiting):
                try:
                    sent[one] += one.send(stream[sent[one] % len(request) :])
                    full_s = time.monotonic()
                except TimeoutError:
                    pass
                except ConnectionError:
                    waiting.remove(one)
            peak_mb = max(peak_mb, resident_mb(worker))
        cut_s = time.monotonic() - full_s
    finally:
        for one in greedy:
            one.close()
    with st.Client(address) as client:
        client.predict("m", {"user_id": 1})
    return cut_s, peak_mb, resident_mb(worker)


def resident_mb(pid: int) -> float:
    """Return the anonymous memory of a process in MB. Pages of the store's file belong to the page cache."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"the memory of process {pid} is not known")


if __name__ == "__main__":
    main()
