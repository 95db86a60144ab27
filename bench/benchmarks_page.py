"""Write the tables and plots of docs/benchmarks.md and the headline figure of README.md from bench/results/*.json.

    python bench/benchmarks_page.py [--check]

The script replaces the text between `<!-- NAME -->` and `<!-- end -->` on both pages, and bench/results/*.svg. With
--check it writes nothing and fails if a page differs from the results. Plots need `pip install 'shorttail[plots]'`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import installed
import rivals
from compare import FLOOR, IN_FLIGHT, SHORTTAIL, middle

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md")
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"<!-- (?P<name>[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)
PLOTTED = ("ranking", "fraud")
OTHERS = (
    "lookup",
    "load",
    "push",
    "serve",
    "overload",
    "bad_rows",
    "worst",
    "connections",
    "forest",
    "ondemand",
    "predict",
    "swap",
    "change",
    "loadtest",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the results")
    options = parser.parse_args()
    for page in PAGES:
        written = page.read_text()
        made = BLOCK.sub(lambda block: f"<!-- {block['name']} -->\n{content(block['name'])}\n<!-- end -->", written)
        if options.check and made != written:
            sys.exit(f"{page.relative_to(ROOT)} differs from bench/results: run this script without --check")
        page.write_text(made)
    if not options.check:
        plots()


def content(name: str) -> str:
    """Return the text of a block of a page. A name without a function of its own is a scenario."""
    makers = {"floor": floor, "machine": machine, "bars": bars, "features": features, "mixed": mixed, "change": change}
    try:
        return "\n".join(makers[name]() if name in makers else scenario(name))
    except NotMeasured:
        return "Not measured yet."


class NotMeasured(Exception):
    """bench/results has no result for a block."""


def result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def compared(scenario_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the result file that contains a scenario, and the scenario's rows in it. Raises NotMeasured."""
    for path in sorted(RESULTS.glob("compare*.json")):
        whole = json.loads(path.read_text())
        if scenario_name in whole["figures"]["scenarios"]:
            return whole, whole["figures"]["scenarios"][scenario_name]
    raise NotMeasured


def title_of(row: str) -> str:
    """Return the title of a row. Older results name peers by folder; the title is then in the folder's peer.json."""
    folder, *variant = row.split(", ", 1)
    path = rivals.PEERS / folder / "peer.json"
    return ", ".join([json.loads(path.read_text())["title"], *variant]) if path.exists() else row


def renamed(bar: str) -> str:
    """Return the name of a bar of compare.py, with the title of its peer."""
    return re.sub(r"(?<=peak against ).*|(?<=P99 of ).*(?= against ours)", lambda peer: title_of(peer[0]), bar)


def floor() -> Iterator[str]:
    """Yield what the engine adds to a bare echo of messages of the same size, beside the echo of the same rounds."""
    found = result("serve")
    if found is None:
        raise NotMeasured
    figures = found["figures"]
    echo, ours, sleeping = (figures[name]["p50_us"] for name in ("echo_1", "server_1", "sleeping_1"))
    rate, echo_rate = (figures[name]["requests_per_s"]["median"] for name in ("server_64", "echo_64"))
    yield "What shorttail adds to a bare echo server: P50 of a prediction, one request in flight on one TCP connection,"
    yield f"medians of {echo['rounds']} rounds (lowest..highest):"
    yield ""
    yield "| | takes | added to the echo |"
    yield "|---|---:|---:|"
    yield f"| echo server in C (epoll), messages of the same size | {range_us(echo)} | |"
    yield (
        f"| shorttail that sleeps between requests, as the echo does (`--busy-poll-us 0`) | {range_us(sleeping)} "
        f"| {added(figures, 'sleeping_1')} |"
    )
    yield (
        f"| shorttail as it is by default: it polls for up to 100 us before it sleeps | {range_us(ours)} "
        f"| {added(figures, 'server_1')} |"
    )
    yield ""
    yield f"On 64 connections shorttail answers {rate:,.0f} requests/s, and the echo {echo_rate:,.0f}."
    yield ""
    yield f"- Hardware: {hardware(found)}."
    yield "- Load: a closed loop of flights of the demo below. A request is one row. The model is a forest of 100 trees"
    yield "  on 20 columns from four views and 3 from the caller. The server has one CPU, the compiled client another."
    yield "- Method: `bench/serve.py` measures shorttail and the echo in turn in each round, so the echo shows how fast"
    yield "  the machine was in that hour. If a machine wakes slowly, polling can save more than a prediction takes."
    yield f"  Commit {found['commit']}."


def added(figures: dict[str, Any], server: str) -> str:
    """Return how much longer a server takes than the echo: round by round, or from the medians in older results."""
    if "added_us" in figures:
        return range_us(figures["added_us"][server])
    return f"{figures[server]['p50_us']['median'] - figures['echo_1']['p50_us']['median']:.0f} us"


def range_us(spread: dict[str, float]) -> str:
    return f"{spread['median']:.0f} us ({spread['min']:.0f}..{spread['max']:.0f})"


def hardware(found: dict[str, Any]) -> str:
    """Return the machine and the Python of a result, as a phrase."""
    host = found["machine"]
    memory_gib = host["memory_bytes"] / 2**30
    return f"{host['cpu']}, {host['cpus']} CPUs, {memory_gib:.0f} GiB; {host['system']}; Python {host['python']}"


def machine() -> Iterator[str]:
    """Yield the machine and the method of the comparison."""
    whole, _ = compared("ranking")
    figures = whole["figures"]
    yield f"{hardware(whole)}."
    cpus, rounds = figures["server_cpus"], figures["rounds"]
    yield f"Servers on {cpus} of the CPUs, the load generator on the others; medians of {rounds} rounds,"
    yield f"{figures['seconds']:g} s per measurement; commit {whole['commit']}."


def scenario(name: str) -> Iterator[str]:
    whole, rows = compared(name)
    ours = middle(rows[SHORTTAIL], "peak", "good_per_s")
    heads = [
        "peak, requests/s",
        "shorttail / this",
        "alone, P50",
        "P99 below the peak",
        "shorttail's P99 at that rate",
        "this / shorttail",
    ]
    yield f"| | {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for title, row in by_peak(rows):
        peak = middle(row, "peak", "good_per_s")
        if peak is None:
            yield f"| {title_of(title)} | not measured: {reason(row)} | | | | | |"
            continue
        times = ""
        if title != SHORTTAIL and ours is not None:
            times = f"{ours / peak:,.1f}x" if ours > peak else f"{ours / peak:.2g}x"
        theirs, our_p99 = middle(row, "loaded", "p99_us"), middle(row, "shorttail", "p99_us")
        lower = f"{theirs / our_p99:,.1f}x" if theirs and our_p99 else ""
        cells = [f"{peak:,.0f}", times, us(middle(row, "alone", "p50_us")), us(theirs), us(our_p99), lower]
        note = f" (ended early: {reason(row)})" if "failed" in row else ""
        yield f"| {title_of(title)}{note} | {' | '.join(cells)} |"
    missed = [bar for bar in whole["bars"] if bar["bar"].startswith(f"{name}: ") and not bar["ok"]]
    if missed:
        which = "; ".join(f"{renamed(bar['bar'].removeprefix(name + ': '))} {bar['value']:,.1f}x" for bar in missed)
        yield f"\nThe bar is 10x in both ratios. Missed: {which}."
    else:
        yield "\nThe bar is 10x in both ratios. It is met against every peer."
    if name in PLOTTED:
        yield f"\n![{name}](../bench/results/compare-{name}.svg)"


def reason(row: dict[str, Any]) -> str:
    """Return why a peer failed, in a form that a table cell can hold."""
    return " ".join(row.get("failed", "").split()).replace("|", "\\|")


def by_peak(rows: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(rows.items(), key=lambda item: -(middle(item[1], "peak", "good_per_s") or 0.0))


def features() -> Iterator[str]:
    names = [f"features-{rows}x{width}" for width in (50, 250) for rows in (1, 10, 100)]
    found = {name: compared(name)[1] for name in names}
    yield "| | " + " | ".join(name.removeprefix("features-") for name in names) + " |"
    yield "|---|" + "---:|" * len(names)
    titles = list(dict.fromkeys(title for rows in found.values() for title in rows))
    for title in sorted(titles, key=lambda t: middle(found[names[-1]].get(t, {}), "alone", "p50_us") or float("inf")):
        cells = []
        for name in names:
            row = found[name].get(title, {})
            p50, p99 = middle(row, "alone", "p50_us"), middle(row, "alone", "p99_us")
            cells.append(f"{us(p50)} / {us(p99)}" if p50 is not None else reason(row))
        yield f"| {title_of(title)} | {' | '.join(cells)} |"


def mixed() -> Iterator[str]:
    found = result("mixed")
    if found is None:
        raise NotMeasured
    rate = found["figures"]["predictions_per_s"]
    yield f"| pushes/s, at {rate:,.0f} predictions/s | predictions, P50 | P99 | pushes, P50 | P99 |"
    yield "|---|---:|---:|---:|---:|"
    for pushes, measured in found["figures"]["mixes"].items():
        names = [f"{kind}_{p}_us" for kind in ("predict", "push") for p in ("p50", "p99")]
        cells = [us(measured[name]["median"]) if name in measured else "" for name in names]
        yield f"| {pushes} | {' | '.join(cells)} |"


def change() -> Iterator[str]:
    found = result("change")
    if found is None:
        raise NotMeasured
    figures = found["figures"]
    load = f"{figures['rows']:,} rows, {figures['rate_per_s']:,.0f} predictions/s"
    yield f"| {load} | a change takes | P50 | P99 | longest |"
    yield "|---|---:|---:|---:|---:|"
    for kind, row in [("quiet", figures["quiet"]), *figures["kinds"].items()]:
        seconds = f"{row['seconds']['median']:,.2g} s" if "seconds" in row else ""
        yield f"| {kind} | {seconds} | {' | '.join(us(row[name]) for name in ('p50_us', 'p99_us', 'max_us'))} |"
    yield ""
    counts = {name: f"{figures[name]:,}" for name in ("requests", "pushes", "checked", "failed", "wrong", "lost")}
    yield f"Of {counts['requests']} predictions, {counts['pushes']} pushes and {counts['checked']} checked answers,"
    yield f"{counts['failed']} failed and {counts['wrong']} were wrong; {counts['lost']} rows were lost. The machine"
    still, seconds = figures["slices_left_out"], figures["slices"]
    yield f"stood still in {still:,} of {seconds:,} seconds, which the latencies leave out."


def bars() -> Iterator[str]:
    yield "| benchmark | figure | measured | limit | |"
    yield "|---|---|---:|---:|---|"
    for name in OTHERS:
        found = result(name)
        for bar in found["bars"] if found else ():
            met = "" if bar["ok"] else "missed"
            yield f"| {name} | {bar['bar']} | {bar['value']:,.3g} {bar['unit']} | {bar['limit']:,g} | {met} |"


def us(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} us" if value < 10_000 else f"{value / 1000:,.1f} ms"


def plots() -> None:
    """Draw peak throughput and latency of each scenario's rows as horizontal bars on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "shorttail"  # the same figures give the same file
    for name in PLOTTED:
        try:
            every = by_peak(compared(name)[1])[::-1]
        except NotMeasured:
            continue
        rows = [(t, row) for t, row in every if t != FLOOR and not t.endswith(IN_FLIGHT) and row["rounds"]]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.42 * len(rows) + 1.4), sharey=True)
        draw(left, rows, lambda row: middle(row, "peak", "good_per_s"), "peak throughput, requests/s (more is better)")
        draw(
            right, rows, lambda row: middle(row, "alone", "p50_us"), "P50 of one request at a time, us (less is better)"
        )
        figure.suptitle(f"{name}: lookup and inference, one core a stack")
        figure.tight_layout()
        figure.savefig(RESULTS / f"compare-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def draw(axes: Any, rows: list[tuple[str, Any]], value: Callable[[Any], float | None], label: str) -> None:
    values = [value(row) or 0.0 for _, row in rows]
    colours = ["#d95f02" if title.startswith(SHORTTAIL) else "#7570b3" for title, _ in rows]
    axes.barh([title_of(title) for title, _ in rows], values, color=colours)
    for i, number in enumerate(values):
        axes.text(number, i, f" {number:,.0f}", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 6)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
