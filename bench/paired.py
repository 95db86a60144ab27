"""Measure two checkouts of this repository in turn in one run, to see whether a change made anything slower.

    python bench/paired.py OLD NEW [--rounds 10] [--only serve lookup ...] [--quick] [--json]

OLD and NEW are folders of checkouts, each with shorttail installed in its own .venv (`make demo` does that). For
`serve`, a server of each side serves the demo's store of OLD, and another one that OLD made, and the same compiled
client drives both in turn. For the scripts of bench/micro, each round runs `SCRIPT --quick --json` of both sides. The
side that goes first changes in every round. The ratio is NEW / OLD for times and OLD / NEW for rates, so a ratio above
1 means slower. The output is the median and the quartiles of the ratios of all rounds. A ratio compares both sides in
the same hour of the machine; single figures do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import installed
import candidates
import loadgen
import report
import serve
import serving
from loadgen import BenchError

RATIO_MAX = 1.03
# Scripts of bench/micro, with options that make a round short.
MICRO: dict[str, list[str]] = {
    "predict": [],
    "lookup": [],
    "ondemand": [],
    "forest": ["--seconds", "0.1", "--models", "{folder}"],
    "push": ["--minutes", "0.05"],
    "load": [],
}
# name -> (payload, connections, requests in flight on each)
SERVED = {
    "1 connection": ("requests", 1, 1),
    "64 connections": ("requests", 64, 1),
    "4 x 32 in flight": ("requests", 4, 32),
    "500 candidates": ("candidates", 1, 1),
}
# A figure of a rival begins or ends so; a figure that holds one of the other words is a ratio or a size.
RIVAL_BEGINS = ("onnx", "memory,", "getmulti", "tree", "plain")
RIVAL_ENDS = (", c", ", numpy", ", numba")
OTHERS = (" / ", "times", "bytes", "mib", "rounds", "turns", "trees", "leaves", "growth")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=("serve", *MICRO), default=("serve", *MICRO))
    parser.add_argument("--quick", action="store_true", help="only serve and predict, two rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds, only = (2, ("serve", "predict")) if options.quick else (options.rounds, options.only)
    sides = [folder.resolve() for folder in (options.old, options.new)]
    try:
        for folder in sides:
            if not python(folder).exists():
                raise BenchError(f"{folder} has no .venv; run `make demo` there")
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in only:
                found |= (
                    served(sides, Path(folder), rounds) if name == "serve" else micro(sides, name, Path(folder), rounds)
                )
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures = {name: spread(ratios) for name, ratios in found.items()}
    bars = [report.at_most(name, figure["median"], RATIO_MAX, "NEW/OLD") for name, figure in figures.items()]
    if options.json:
        report.print_json(figures, bars)
    else:
        for name, figure in figures.items():
            print(
                f"{figure['median']:.3f} ({figure['p25']:.3f}..{figure['p75']:.3f}, {figure['rounds']} pairs)  {name}"
            )
        print(f"{sum(not bar['ok'] for bar in bars)} of {len(bars)} medians are above {RATIO_MAX}")
    return 0


def spread(ratios: list[float]) -> dict[str, float | int]:
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "p25": low, "p75": high, "rounds": len(ratios)}


def python(folder: Path) -> Path:
    return folder / ".venv" / "bin" / "python"


def in_turn(number: int) -> list[int]:
    return [0, 1] if number % 2 == 0 else [1, 0]


# -- the server ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server_of(side: Path, store: Path, log: Path, cpu: int | None) -> Iterator[str]:
    """Start a server with the Python of that checkout. Yields its address."""
    ours = sys.executable
    sys.executable = str(python(side))
    try:
        with serving.start_server(store, log, "--no-http", cpu=cpu) as (address, _):
            yield address
    finally:
        sys.executable = ours


def make_candidates(side: Path, store: Path) -> None:
    """Make the store of candidates with that checkout: the other one reads older formats, and not the reverse."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import candidates; from pathlib import Path; "
    code += "candidates.make_store(Path(sys.argv[2]))"
    done = subprocess.run([str(python(side)), "-c", code, str(side / "bench"), str(store)], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise BenchError(f"{side} did not make the store of candidates")


def served(sides: list[Path], folder: Path, rounds: int) -> dict[str, list[float]]:
    store = sides[0] / "demo" / "out" / "store"
    if not store.exists():
        raise BenchError(f"no demo store in {sides[0]}; run `make demo` there")
    cpus = sorted(os.sched_getaffinity(0))
    server_cpu, client_cpu = (cpus[0], cpus[1]) if len(cpus) > 1 else (None, None)
    loadgen.write_payload(folder / "requests", serve.flight_requests())
    loadgen.write_payload(folder / "candidates", candidates.requests())
    make_candidates(sides[0], folder / "store")
    found: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        address = {
            (number, payload): stack.enter_context(
                server_of(side, path, folder / f"{number}-{payload}.log", server_cpu)
            )
            for number, side in enumerate(sides)
            for payload, path in (("requests", store), ("candidates", folder / "store"))
        }
        for number in range(rounds):
            for name, (payload, connections, in_flight) in SERVED.items():
                runs: dict[int, dict[str, Any]] = {}
                for side in in_turn(number):
                    runs[side] = loadgen.run(
                        *(address[side, payload], folder / payload, connections, 1.0, in_flight, 0.2, client_cpu)
                    )
                    serve.check(runs[side], name)
                for key in ("p50_us", "p99_us"):
                    found.setdefault(f"serve: {name}, {key}", []).append(runs[1][key] / runs[0][key])
                rate = runs[0]["requests_per_s"] / runs[1]["requests_per_s"]
                found.setdefault(f"serve: {name}, requests/s", []).append(rate)
    return found


# -- bench/micro -----------------------------------------------------------------------------------------------


def micro(sides: list[Path], name: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        figures: dict[int, dict[str, float]] = {}
        for side in in_turn(number):
            script = sides[side] / "bench" / "micro" / f"{name}.py"
            options = [option.format(folder=folder) for option in MICRO[name]]
            command = [python(sides[side]), script, "--quick", "--json", *options]
            done = subprocess.run(command, cwd=sides[side], capture_output=True, text=True)
            if done.returncode != 0:
                raise BenchError(f"{script}: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
            figures[side] = dict(medians(json.loads(done.stdout)["figures"], ""))
        for key in figures[0].keys() & figures[1].keys():
            ratio = figures[1][key] / figures[0][key]
            found.setdefault(f"{name}: {key}", []).append(1 / ratio if is_rate(key) else ratio)
    return dict(sorted(found.items()))


def is_rate(key: str) -> bool:
    return "/s" in key or "_per_s" in key


def medians(figures: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield (name, median) of shorttail's own times and rates in the figures of a script."""
    if isinstance(figures, list):
        for item in figures:
            label = item.get("model", item.get("batch", "")) if isinstance(item, dict) else ""
            yield from medians(item, f"{path} {label}".strip())
    elif isinstance(figures, dict) and "median" in figures:
        last = path.rpartition("|")[2].lower()
        rival = last.startswith(RIVAL_BEGINS) or last.endswith(RIVAL_ENDS)
        other = any(word in last for word in OTHERS)
        if not rival and not other and figures["median"]:
            yield path.replace("|", " "), float(figures["median"])
    elif isinstance(figures, dict):
        for name, item in figures.items():
            yield from medians(item, f"{path}|{name}".strip("|"))


if __name__ == "__main__":
    sys.exit(main())
