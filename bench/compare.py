"""Compare shorttail and its peers in turn on the same data, model, keys, answers and CPUs.

    python bench/compare.py [--scenario ranking,fraud] [--peers NAME,...] [--rounds N] [--seconds S] [--quick] [--json]

For each scenario (bench/scenarios/), every round starts each peer (bench/peers/) with its Redis on one set of CPUs. The
generator of `shorttail bench` drives it from another set:

- closed loops with several numbers of connections find the peak throughput;
- an open loop at 90% of the peak, or less if the peer cannot keep up, gives the latency;
- shorttail is measured at the same rate, over the same number of connections.

The compared peaks have one request in flight on each connection, as HTTP allows no more; shorttail and the floor with
many requests in flight are separate rows. A peer's first answers are compared with ONNX Runtime on a pandas join. If a
peer does not install, start or answer correctly, its row says so. Scenarios of features alone are closed loops with one
request at a time.

--json prints one object, from which bench/benchmarks_page.py makes the tables and plots of docs/benchmarks.md. The
environments of peers are built once, in bench/peers/.environments. Needs redis-server and the packages of
`pip install 'shorttail[bench,test]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import installed
import loadgen
import numpy as np
import report
import rivals
import scenarios
import serving
from rivals import Peer, Unusable

import shorttail as st
from shorttail import protocol
from shorttail.client import columns as client_columns
from shorttail.config import LIMITS
from shorttail.errors import ShorttailError
from shorttail.loadtest import target
from shorttail.loadtest.rates import Rate
from shorttail.loadtest.runner import Load, run_step
from shorttail.loadtest.traffic import Traffic, Workload, plan_http, plan_raw, plan_rpc

DATA = Path(__file__).resolve().parents[1] / "build" / "scenarios"
CONNECTIONS = (4, 16, 64)  # with one request in flight on each
PIPELINED = (4, 32)  # connections, and requests in flight on each, if the protocol allows that
SHARES_OF_PEAK = (0.9, 0.7, 0.5)  # tried in turn: the latency of a server that cannot keep up is useless
KEPT_UP = 0.9  # answers per second / requests due per second
WARMUP_S = 0.5
QUICK_DIVISOR = 20
TIMES_BETTER = 10.0
SHORTTAIL, SHORTTAIL_HTTP, FLOOR = "shorttail", "shorttail over HTTP", "C echo"
IN_FLIGHT = f", {PIPELINED[1]} in flight on each connection"  # the end of the titles of those rows


class Run:
    """A Run is one scenario: its data, its CPUs, and the load."""

    def __init__(
        self, name: str, folder: Path, quick: bool, seconds: float, server: set[int], client: set[int], redis_url: str
    ):
        self.data = DATA / (f"{name}-quick" if quick else name)
        scenarios.build(name, self.data, QUICK_DIVISOR if quick else 1)
        self.described = json.loads((self.data / "scenario.json").read_text())
        self.folder, self.seconds, self.redis_url = folder, seconds, redis_url
        self.server, self.client = server, client
        keys = [f"{key}=zipf:{low}:{high}:0.99" for key, (low, high) in self.described["keys"].items()]
        values = [f"{name}=uniform:{low}:{high}" for name, (low, high) in self.described["values"].items()]
        self.workload = Workload(rows=self.described["rows"], shared=self.described["shared"], keys=keys, values=values)

    def rpc(self, address: str) -> Traffic:
        """Return the method that the scenario calls: predictions, or features if it has no model."""
        if self.described["kind"] == "model":
            workload = replace(self.workload, predict=self.described["name"])
        else:
            workload = replace(self.workload, features=self.described["inputs"])
        with st.Client(address) as client:
            return plan_rpc(workload, client.models(), client.views())

    def http(self, url: str, body: str) -> Traffic:
        return plan_http(replace(self.workload, body=body), target.find(url))

    def drive(
        self, plan: Traffic, address: str, rate: float | None, connections: int, in_flight: int = 1, raw: int = 0
    ) -> dict[str, Any]:
        """Run one step of load: an open loop at a rate, or a closed loop."""
        load = Load(
            connections=connections,
            pipeline=in_flight,
            closed=rate is None,
            duration_s=self.seconds,
            warmup_s=min(WARMUP_S, self.seconds / 2),
            threads=min(len(self.client), connections, LIMITS.bench_threads),
            raw_reply_bytes=raw,
        )
        with rivals.pinned(self.client):
            step = run_step(plan, target.find(address), load, None if rate is None else Rate(rate, rate))
        if step.fatal or not step.outcomes["good"]:
            raise Unusable(f"under load: {step.fatal or step.outcomes}")
        p50, p99 = (ns / 1e3 for ns in step.latency.at([50, 99]))
        bad = step.due - step.outcomes["good"]
        return {
            "connections": connections,
            "in_flight": in_flight,
            "offered_per_s": rate,
            "good_per_s": step.good_per_s,
            "bad": bad,
            "kept_up": rate is None or step.achieved_per_s >= KEPT_UP * step.offered_per_s,
            "p50_us": p50,
            "p99_us": p99,
            "samples": step.latency.total,
        }

    def peak(self, plan: Traffic, address: str, raw: int = 0) -> dict[str, Any]:
        """Return the closed loop with the highest throughput, preferring loops without an error."""
        steps = [self.drive(plan, address, None, connections, 1, raw) for connections in CONNECTIONS]
        return max(steps, key=lambda step: (step["bad"] == 0, step["good_per_s"]))

    def peak_and_alone(self, plan: Traffic, address: str, raw: int = 0) -> dict[str, Any]:
        return {"peak": self.peak(plan, address, raw), "alone": self.drive(plan, address, None, 1, 1, raw)}

    def open_loop(self, plan: Traffic, address: str, rate: float) -> dict[str, Any]:
        return self.drive(plan, address, rate, CONNECTIONS[-1])

    def below_peak(self, plan: Traffic, address: str, peak: dict[str, Any]) -> dict[str, Any]:
        """Run an open loop at the largest share of the peak that the server can keep up with; {} if there is none."""
        for share in SHARES_OF_PEAK:
            step = self.open_loop(plan, address, share * peak["good_per_s"])
            if step["kept_up"]:
                return {**step, "share_of_peak": share}
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="ranking,fraud", help="names; 'features': all of that kind")
    parser.add_argument("--peers", default="", help="folders of bench/peers (default: all)")
    parser.add_argument("--rounds", type=int, help="number of rounds (3; 1 with --quick)")
    parser.add_argument("--seconds", type=float, help="seconds per measurement (2.5; 0.5 with --quick)")
    parser.add_argument("--cores", type=int, help="CPUs for each server, and as many for the load (half of all)")
    parser.add_argument("--quick", action="store_true", help="small data, and only FastAPI unless --peers is given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    names = [part for name in options.scenario.split(",") for part in expand(parser, name)]
    peers = [name for name in (options.peers or ("fastapi" if options.quick else "")).split(",") if name]
    for name in peers:
        if not (rivals.PEERS / name / "peer.json").exists():
            parser.error(f"--peers {name}: there is no folder bench/peers/{name} with a peer.json")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        parser.error("one CPU is too few: servers and the load need one each")
    half = options.cores or len(cpus) // 2
    if not 0 < half <= len(cpus) // 2:
        parser.error(f"--cores {half}: servers and the load need as many each, and there are {len(cpus)}")
    rounds, seconds = options.rounds or (1 if options.quick else 3), options.seconds or (0.5 if options.quick else 2.5)
    figures: dict[str, Any] = {"server_cpus": half, "rounds": rounds, "seconds": seconds, "quick": options.quick}
    figures["scenarios"] = {}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="shorttail-compare-") as folder,
            rivals.redis_server(Path(folder), set(cpus[:half])) as redis_url,
        ):
            for name in names:
                run = Run(
                    name, Path(folder), options.quick, seconds, set(cpus[:half]), set(cpus[half : 2 * half]), redis_url
                )
                measure = models if run.described["kind"] == "model" else features
                figures["scenarios"][name] = measure(run, peers, rounds)
    except (loadgen.BenchError, ShorttailError, Unusable) as error:
        raise SystemExit(f"error: {error}") from None
    bars = judge(figures["scenarios"])
    if options.json:
        report.print_json(figures, bars)
    else:
        for name, found in figures["scenarios"].items():
            print(f"\n{name}\n" + "\n".join(lines_of(found)))
        report.print_bars(bars)


def expand(parser: argparse.ArgumentParser, name: str) -> list[str]:
    found = [known for known in scenarios.SCENARIOS if known == name or known.startswith(f"{name}-")]
    if not found:
        parser.error(f"--scenario {name}: there are {', '.join(scenarios.SCENARIOS)}")
    return found


# -- models ------------------------------------------------------------------------------------------------------------


def models(run: Run, names: list[str], rounds: int) -> dict[str, Any]:
    """Measure every peer in rounds: its peak, its latency at a share of the peak, and shorttail's at the same rate."""
    peers = rivals.find("model", names)
    own_titles = [SHORTTAIL, SHORTTAIL_HTTP, FLOOR]
    if run.described["rows"] == 1:  # a request of many rows is a batch already
        own_titles += [SHORTTAIL + IN_FLIGHT, FLOOR + IN_FLIGHT]
    found: dict[str, dict[str, Any]] = {title: {"rounds": []} for title in own_titles}
    found |= {peer.title: {"describe": peer.describe, "rounds": []} for peer in peers}
    with ExitStack() as stack:
        own = stack.enter_context(own_server(run))
        load_redis(run)
        plan = run.rpc(own["rpc"])
        check_own(run, own["rpc"])
        for number in range(rounds):
            note(f"{run.described['name']}: round {number + 1} of {rounds}")
            measure_own(run, own, plan, found)
            for peer in peers[:: 1 if number % 2 == 0 else -1]:
                if "failed" not in found[peer.title]:
                    measure_peer(run, peer, own["rpc"], plan, found[peer.title])
    return found


@contextmanager
def own_server(run: Run) -> Iterator[dict[str, Any]]:
    """Start shorttail's server, with the scenario loaded by the commands that a user would run."""
    store = run.folder / f"store-{run.described['name']}"
    with st.Engine.open(store, create=True) as engine:
        engine.apply(str(run.data / "definitions.py"))
        for view in run.described["views"]:
            engine.materialize(view)
    log = run.folder / "shorttail.log"
    with (
        rivals.pinned(run.server),
        serving.start_server(store, log, "--http-port", "0", workers=len(run.server)) as (rpc, _),
    ):
        yield {"rpc": rpc, "http": serving.http_address(log)}


def check_own(run: Run, address: str) -> None:
    """Check that shorttail gives the answers that its peers have to give."""
    with st.Client(address) as client:
        for number, request in enumerate(json.loads((run.data / "requests.json").read_text())):
            outputs = client.predict(run.described["name"], request["columns"]).outputs[run.described["output"]]
            picked = outputs if run.described["column"] is None else outputs[:, run.described["column"]]
            if not np.allclose(picked.ravel(), request["scores"], rtol=rivals.TOLERANCE, atol=rivals.TOLERANCE):
                raise loadgen.BenchError(f"shorttail gave a wrong answer to request {number} of {run.data.name}")


def measure_own(run: Run, own: dict[str, Any], plan: Traffic, found: dict[str, Any]) -> None:
    request, reply = message_bytes(run)
    url = f"http://{own['http']}/v2/models/{run.described['name']}/infer"
    describe = {
        SHORTTAIL: "one worker a core, MessagePack, arrays as tensors; nothing else runs",
        SHORTTAIL_HTTP: "the same server by the Open Inference Protocol v2: JSON, every row with all its keys",
        FLOOR: f"bench/c/echo.c: {request} bytes there and {reply} back, on one core",
    }
    for title in found:
        if text := describe.get(title.removesuffix(IN_FLIGHT)):
            found[title]["describe"] = text
    found[SHORTTAIL]["rounds"].append(run.peak_and_alone(plan, own["rpc"]))
    found[SHORTTAIL_HTTP]["rounds"].append(run.peak_and_alone(run.http(url, http_body(run)), url))
    with loadgen.start_echo(request, reply, min(run.server)) as address:
        raw = plan_raw(request)
        found[FLOOR]["rounds"].append(run.peak_and_alone(raw, address, reply))
        if FLOOR + IN_FLIGHT in found:
            found[FLOOR + IN_FLIGHT]["rounds"].append({"peak": run.drive(raw, address, None, *PIPELINED, reply)})
    if SHORTTAIL + IN_FLIGHT in found:
        found[SHORTTAIL + IN_FLIGHT]["rounds"].append({"peak": run.drive(plan, own["rpc"], None, *PIPELINED)})


def measure_peer(run: Run, peer: Peer, own: str, plan: Traffic, found: dict[str, Any]) -> None:
    """Run one round of a peer, and shorttail at the same rate. A failure is recorded and ends the peer's rounds."""
    note(f"  {peer.title}")
    log = run.folder / f"{peer.name}.log"
    try:
        with rivals.serving(peer, run.data, run.redis_url, len(run.server), run.server, log) as url:
            asked = run.http(url, rivals.body(peer, run.described))
            measured = run.peak_and_alone(asked, url)
            loaded = run.below_peak(asked, url, measured["peak"])
    except Unusable as failure:
        found["failed"] = str(failure)
    except Exception as error:  # a peer must not end the comparison
        traceback.print_exc(file=sys.stderr)
        found["failed"] = f"{type(error).__name__}: {error}"[:300]
    else:  # outside the try, because an error of shorttail is not the peer's
        if loaded:
            measured |= {"loaded": loaded, "shorttail": run.open_loop(plan, own, loaded["offered_per_s"])}
        found["rounds"].append(measured)


def load_redis(run: Run) -> None:
    """Load the data into Redis with a peer's Python, so that this one needs no Redis client."""
    python = rivals.environment(Peer("fastapi", ""))  # this environment has pyarrow
    code = "import sys; sys.path.insert(0, sys.argv[1]); import scorer; scorer.load(*sys.argv[2:])"
    command = [str(python), "-c", code, str(rivals.PEERS), str(run.data), run.redis_url]
    done = subprocess.run(command, capture_output=True, text=True, env=rivals.clean())
    if done.returncode != 0:
        raise loadgen.BenchError(f"Redis could not be loaded: {(done.stderr.splitlines() or [''])[-1]}")


def message_bytes(run: Run) -> tuple[int, int]:
    """Return the size of a request and of its answer on shorttail's wire."""
    first = json.loads((run.data / "requests.json").read_text())[0]
    columns = {name: np.asarray(v) if isinstance(v, list) else v for name, v in first["columns"].items()}
    params = [run.described["name"], client_columns.encode_columns(columns), {"encoding": "tensor"}]
    width = 1 if run.described["column"] is None else 2
    reply = 60 + 4 * width * run.described["rows"]
    return len(client_columns.pack_request(protocol.MSGID_LIMIT - 1, "predict", params)), reply


def http_body(run: Run) -> str:
    """Return a v2 request of the scenario's columns. Each has a value per row: v2 has no values that rows share."""
    count = run.described["rows"]
    inputs = []
    for names, kind in ((run.described["keys"], "INT64"), (run.described["values"], "FP64")):
        for name in names:
            data = f"{{{{{name}}}}}" if count == 1 else f"{{{{{name}...}}}}"
            inputs.append(f'{{"name": "{name}", "datatype": "{kind}", "shape": [{count}], "data": [{data}]}}')
    return f'{{"inputs": [{", ".join(inputs)}]}}'


# -- features alone ----------------------------------------------------------------------------------------------------


def features(run: Run, names: list[str], rounds: int) -> dict[str, Any]:
    """Measure every peer in rounds: one request at a time, in its own process or through a server."""
    peers = rivals.find("features", names)
    found: dict[str, dict[str, Any]] = {SHORTTAIL: {"rounds": [], "describe": "a server, MessagePack, tensors"}}
    found |= {peer.title: {"describe": peer.describe, "rounds": []} for peer in peers}
    with ExitStack() as stack:
        own = stack.enter_context(own_server(run))
        plan = run.rpc(own["rpc"])
        for number in range(rounds):
            note(f"{run.described['name']}: round {number + 1} of {rounds}")
            found[SHORTTAIL]["rounds"].append({"alone": run.drive(plan, own["rpc"], None, 1)})
            for peer in peers[:: 1 if number % 2 == 0 else -1]:
                if "failed" not in found[peer.title]:
                    note(f"  {peer.title}")
                    look_up(run, peer, found[peer.title])
    return found


def look_up(run: Run, peer: Peer, found: dict[str, Any]) -> None:
    try:
        if peer.is_local:
            result = rivals.measure_local(peer, run.data, run.seconds, run.redis_url, run.server)
            found["rounds"].append({"alone": {**result, "good_per_s": result["requests_per_s"]}})
            return
        with rivals.serving(peer, run.data, run.redis_url, len(run.server), run.server, run.folder / "peer.log") as url:
            asked = run.http(url, rivals.body(peer, run.described))
            found["rounds"].append({"alone": run.drive(asked, url, None, 1)})
    except Unusable as failure:
        found["failed"] = str(failure)
    except Exception as error:  # a peer must not end the comparison
        traceback.print_exc(file=sys.stderr)
        found["failed"] = f"{type(error).__name__}: {error}"[:300]


# -- results and bars --------------------------------------------------------------------------------------------------


def middle(found: dict[str, Any], *path: str) -> float | None:
    """Return the median of a figure over the rounds, or None if no round has it."""
    values = []
    for entry in found.get("rounds", ()):
        for step in path:
            entry = entry.get(step) if entry is not None else None
        if entry is not None:
            values.append(entry)
    return statistics.median(values) if values else None


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the two bars of each peer with a model: our peak / its peak, and its P99 / our P99."""
    bars = []
    for scenario, rows in found.items():
        ours = middle(rows[SHORTTAIL], "peak", "good_per_s")
        for title, row in rows.items():
            theirs = middle(row, "peak", "good_per_s")
            p99, our_p99 = middle(row, "loaded", "p99_us"), middle(row, "shorttail", "p99_us")
            if ours is None or theirs is None or p99 is None or our_p99 is None:
                continue
            bars.append(report.at_least(f"{scenario}: peak against {title}", ours / theirs, TIMES_BETTER, "x"))
            bars.append(report.at_least(f"{scenario}: P99 of {title} against ours", p99 / our_p99, TIMES_BETTER, "x"))
    return bars


def lines_of(found: dict[str, Any]) -> Iterator[str]:
    yield f"{'':44}{'peak/s':>10}{'alone P50':>12}{'P99 at 90%':>12}{'shorttail there':>17}"
    for title, row in found.items():
        if "failed" in row and not row["rounds"]:
            yield f"{title:44}{row['failed']}"
            continue
        peak, alone = middle(row, "peak", "good_per_s"), middle(row, "alone", "p50_us")
        p99, ours = middle(row, "loaded", "p99_us"), middle(row, "shorttail", "p99_us")
        yield f"{title:44}" + "".join(
            f"{'' if value is None else format(value, ',.0f'):>{width}}"
            for value, width in ((peak, 10), (alone, 12), (p99, 12), (ours, 17))
        )


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
