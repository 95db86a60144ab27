"""Compare the server with a bare echo: the cost of lookup, model and encoding beyond moving the same bytes.

    python bench/serve.py [--json] [--quick] [--rounds N]

One worker with the demo's model and a bare epoll echo in C (bench/c/echo.c) with messages of the same size are measured
in turn, by the same compiled client (bench/c/loadgen.c). A request is one row; there are thousands of distinct flights
that the model was not trained on. The runs have 1 and 64 connections; with 1 connection there are also servers that
always poll and that never poll (--busy-poll-us). Two runs have no rival: 4 connections with 32 requests in flight on
each, and requests of one user and 500 items (bench/candidates.py). Servers run on one CPU, the client on another. Needs
the demo's store; if there is none, the script runs demo/run.py first, which takes half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import installed
import candidates
import loadgen
import report
import serving
from loadgen import BenchError

from shorttail import protocol
from shorttail.client import columns as client_columns

DEMO = Path(__file__).resolve().parents[1] / "demo"
STORE = DEMO / "out" / "store"
MODEL = "late"
FLIGHTS = 20_000
P50_RATIO_MAX, P99_RATIO_MAX, POLLING_RATIO_MAX = 1.25, 1.4, 1.0
RATE_RATIO_MIN = 0.62
PIPELINED_PER_S_MIN = 400_000
CANDIDATES_P50_US_MAX, CANDIDATES_PER_S_MIN = 450, 2_500
BUSY_POLL_US = 200

# name -> (which server, payload, connections, requests in flight on each)
RUNS = {
    "server_1": ("server", "requests", 1, 1),
    "echo_1": ("echo", "blanks", 1, 1),
    "polling_1": ("polling", "requests", 1, 1),
    "sleeping_1": ("sleeping", "requests", 1, 1),
    "server_64": ("server", "requests", 64, 1),
    "echo_64": ("echo", "blanks", 64, 1),
    "server_4x32": ("server", "requests", 4, 32),
    "candidates_1": ("candidates", "candidates", 1, 1),
    "candidates_4": ("candidates", "candidates", 4, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; ends within 50 s")
    parser.add_argument("--rounds", type=int, help="rounds to take the medians of (9; 3 with --quick)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 9)
    duration_s = 1.0 if options.quick else 4.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), rounds, duration_s)
    except BenchError as error:
        raise SystemExit(f"error: {error}") from None
    bars = judge(figures)
    if options.json:
        report.print_json(figures, bars)
    else:
        show(figures)
        report.print_bars(bars)


def judge(figures: dict[str, Any]) -> list[dict[str, Any]]:
    ratios = {name: value["median"] for name, value in figures["ratios"].items()}
    pipelined, many = figures["server_4x32"]["requests_per_s"], figures["candidates_4"]["requests_per_s"]
    return [
        report.at_most("P50, 1 connection: server / C echo", ratios["p50_1"], P50_RATIO_MAX, "x"),
        report.at_most("P99, 1 connection: server / C echo", ratios["p99_1"], P99_RATIO_MAX, "x"),
        report.at_least("requests/s, 64 connections: server / C echo", ratios["rate_64"], RATE_RATIO_MIN, "x"),
        report.at_least("requests/s, 4 x 32 in flight", pipelined["median"], PIPELINED_PER_S_MIN, "/s"),
        report.at_most("500 candidates, P50", figures["candidates_1"]["p50_us"]["median"], CANDIDATES_P50_US_MAX, "us"),
        report.at_least("500 candidates, requests/s", many["median"], CANDIDATES_PER_S_MIN, "/s"),
        report.at_most("P50, 1 connection: polling server / C echo", ratios["p50_polling"], POLLING_RATIO_MAX, "x"),
    ]


def measure(folder: Path, rounds: int, duration_s: float) -> dict[str, Any]:
    """Return all figures. Every round makes all runs; every second round makes them in the opposite order."""
    if not STORE.exists():
        make_store()
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    requests = flight_requests()
    loadgen.write_payload(folder / "requests", requests)
    request_bytes = round(statistics.mean(map(len, requests)))
    loadgen.write_payload(folder / "blanks", [bytes(request_bytes)])
    candidates.make_store(folder / "store")
    loadgen.write_payload(folder / "candidates", candidates.requests())

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with contextlib.ExitStack() as stack:

        def start(name: str, store: Path, *options: str) -> str:
            log = folder / f"{name}.log"
            return stack.enter_context(serving.start_server(store, log, "--no-http", *options, cpu=server_cpu))[0]

        servers = {
            "server": start("server", STORE),
            "polling": start("polling", STORE, "--busy-poll-us", str(BUSY_POLL_US)),
            "sleeping": start("sleeping", STORE, "--busy-poll-us", "0"),
            "candidates": start("candidates", folder / "store"),
        }
        answer_bytes = mean_reply_bytes(servers["server"], requests[:500])
        servers["echo"] = stack.enter_context(loadgen.start_echo(request_bytes, answer_bytes, server_cpu))
        for number in range(rounds):
            for name, (server, payload, connections, in_flight) in list(RUNS.items())[:: 1 if number % 2 == 0 else -1]:
                raw = answer_bytes if server == "echo" else None
                run = loadgen.run(
                    *(servers[server], folder / payload, connections, duration_s, in_flight, 0.3, client_cpu),
                    raw_reply_bytes=raw,
                )
                check(run, name)
                runs[name].append(run)
    return {
        "request_bytes": request_bytes,
        "reply_bytes": answer_bytes,
        "pinned": server_cpu is not None,
        **{
            name: {key: report.spread([run[key] for run in all_runs]) for key in ("requests_per_s", "p50_us", "p99_us")}
            for name, all_runs in runs.items()
        },
        "ratios": {
            "p50_1": ratio(runs["server_1"], runs["echo_1"], "p50_us"),
            "p99_1": ratio(runs["server_1"], runs["echo_1"], "p99_us"),
            "p50_sleeping": ratio(runs["sleeping_1"], runs["echo_1"], "p50_us"),
            "p50_polling": ratio(runs["polling_1"], runs["echo_1"], "p50_us"),
            "rate_64": ratio(runs["server_64"], runs["echo_64"], "requests_per_s"),
        },
    }


def ratio(server: list[dict[str, Any]], echo: list[dict[str, Any]], key: str) -> dict[str, float | int]:
    """Return server / echo of each round, whose two figures saw the machine in the same state."""
    return report.spread([ours[key] / floor[key] for ours, floor in zip(server, echo, strict=True)])


def check(figures: dict[str, Any], name: str) -> None:
    failed = {key: figures[key] for key in ("errors", "bad_nonce", "unanswered") if figures[key]}
    if failed or not figures["requests"]:
        raise BenchError(f"{name}: not every request was answered correctly: {failed} {figures.get('first_error', '')}")


def make_store() -> None:
    print("no demo store yet: running demo/run.py", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, str(DEMO / "run.py")], stdout=subprocess.DEVNULL)
    if done.returncode != 0 or not STORE.exists():
        raise BenchError("demo/run.py did not make demo/out/store; run it by itself to see why")


def flight_requests() -> list[bytes]:
    """Return predict requests of one flight each, as any client would send them."""
    sys.path.insert(0, str(DEMO))
    import flights as data

    _, held_out = data.load()
    chosen = held_out.sample(min(FLIGHTS, len(held_out)), random_state=1)
    columns = [chosen[name].tolist() for name in data.REQUEST]
    rows = (dict(zip(data.REQUEST, values, strict=True)) for values in zip(*columns, strict=True))
    # The compiled client overwrites the message id, which has to take five bytes.
    return [client_columns.pack_request(protocol.MSGID_LIMIT - 1, "predict", [MODEL, row]) for row in rows]


def mean_reply_bytes(address: str, requests: list[bytes]) -> int:
    """Return the mean size of the answers to a few requests, sent one at a time."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), 10) as connection:
        return round(statistics.mean(reply_bytes(connection, request) for request in requests))


def reply_bytes(connection: socket.socket, request: bytes) -> int:
    connection.sendall(request)
    unpacker, size = protocol.new_unpacker(), 0
    while data := connection.recv(65_536):
        size += len(data)
        unpacker.feed(data)
        for message in unpacker:
            if error := protocol.read_response(message)[1]:
                raise BenchError(f"the server refuses the demo's requests: {error}")
            return size
    raise BenchError("the server closed the connection")


def show(figures: dict[str, Any]) -> None:
    print(f"one row per request; {figures['request_bytes']} bytes in, {figures['reply_bytes']} out; median (min..max)")
    for name in RUNS:
        row = figures[name]
        rate, p50, p99 = row["requests_per_s"], row["p50_us"], row["p99_us"]
        print(
            f"{name:13} {rate['median']:9,.0f}/s ({rate['min']:,.0f}..{rate['max']:,.0f})"
            f"   P50 {p50['median']:7.1f} us ({p50['min']:.1f}..{p50['max']:.1f})"
            f"   P99 {p99['median']:7.1f} us ({p99['min']:.1f}..{p99['max']:.1f})"
        )
    for name, value in figures["ratios"].items():
        print(f"over the echo, {name:11} {value['median']:.3f} ({value['min']:.3f}..{value['max']:.3f})")


if __name__ == "__main__":
    main()
