"""Writes a self-contained HTML page about one or several runs: findings, figures, tables, and how they were run."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Final

from shorttail.loadtest import text
from shorttail.loadtest.findings import findings, main_step
from shorttail.loadtest.histogram import Histogram
from shorttail.loadtest.svg import COLORS, Layer, Scale, Series, bars, figure, number
from shorttail.loadtest.text import rate, us

CURVES: Final = COLORS  # with more lines than colours, lines would look the same
PERCENTILE_AXIS: Final = Scale("percentile of requests (log 1/(1-p))", "percentile")
STAGE_COLORS: Final = dict(zip(text.STAGES, (7, 0, 4, 1, 2), strict=True))
BARS: Final = 10  # the names of more bars do not fit
SHOWN_AGAINST_RATE: Final = ("50", "99", "99.9")

Document = Mapping[str, Any]
Step = Mapping[str, Any]


def write_report(path: str, documents: Sequence[Document]) -> None:
    Path(path).write_text(render(documents), encoding="utf-8")


def render(documents: Sequence[Document]) -> str:
    template = string.Template(resources.files("shorttail.loadtest").joinpath("report.html").read_text("utf-8"))
    names = [run_name(document) for document in documents]
    return template.substitute(
        title=escape("Load test: " + " against ".join(names)),
        subtitle=escape("; ".join(f"{document['started']}, shorttail {document['version']}" for document in documents)),
        findings="".join(f"<li>{escape(sentence)}</li>" for sentence in all_findings(documents)),
        figures="".join(figures(documents)),
        steps=steps_table(documents),
        stages=stages_table(documents),
        errors=errors_table(documents),
        facts=facts_table(documents),
    )


def run_name(document: Document) -> str:
    return str(document["label"] or document["target"]["address"])


def all_findings(documents: Sequence[Document]) -> list[str]:
    if len(documents) == 1:
        return findings(documents[0])
    return [f"{run_name(document)}: {sentence}" for document in documents for sentence in findings(document)]


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(documents: Sequence[Document]) -> Iterable[str]:
    yield percentile_curves(documents)
    if any(step["rate_per_s"] for document in documents for step in document["steps"]):
        yield throughput(documents)
        yield latency_against_rate(documents)
    yield over_time(documents)
    yield from stage_bars(documents)
    yield disturbance(documents)
    yield noise_curves(documents)


def unit_of(values: Iterable[float]) -> tuple[float, str]:
    """Return (microseconds per unit, name of the unit) for an axis: ms if a value is above 10 ms, else us."""
    return (1e3, "ms") if max(values, default=0.0) > 10_000 else (1.0, "µs")


def histogram_of(part: Mapping[str, Any]) -> Histogram:
    return Histogram.decoded(part["hdr"], round(part["max_us"] * 1e3), part["mean_us"] * 1e3)


def curve_of(name: str, part: Mapping[str, Any], color: int, scale: float, dashed: bool = False) -> Series:
    points = [(1 / (1 - p / 100), value / scale) for p, value in histogram_of(part).curve()]

    def hint(x: float, y: float) -> str:
        return f"P{(1 - 1 / x) * 100:.5g} {us(y * scale)}"

    return Series(name, points, color, dashed, hint)


def step_name(document: Document, step: Step, several: bool) -> str:
    name = "closed loop" if step["rate_per_s"] is None else f"{rate(step['offered_per_s'])}/s"
    return f"{run_name(document)}, {name}" if several else name


def spread_out(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` evenly spaced items, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def percentile_curves(documents: Sequence[Document]) -> str:
    several = len(documents) > 1
    if several:
        chosen = [(document, main_step(document["steps"])) for document in documents[:CURVES]]
    else:
        ordered = sorted(documents[0]["steps"], key=lambda step: float(step["offered_per_s"]))
        chosen = [(documents[0], step) for step in spread_out(ordered, CURVES)]
    scale, unit = unit_of(step["latency"]["max_us"] for _, step in chosen)
    series = [
        curve_of(step_name(document, step, several), step["latency"], i, scale)
        for i, (document, step) in enumerate(chosen)
    ]
    note = "For each run: the fastest rate that the server kept up with." if several else ""
    return figure("Latency by percentile", PERCENTILE_AXIS, Scale(f"latency ({unit}, log)", "log"), series, note)


def throughput(documents: Sequence[Document]) -> str:
    series, most = [], 0.0
    for i, document in enumerate(documents):
        steps = sorted(document["steps"], key=lambda step: float(step["offered_per_s"]))
        name = f"{run_name(document)}, " if len(documents) > 1 else ""
        most = max(most, *(step["offered_per_s"] for step in steps))

        def hint(x: float, y: float) -> str:
            return f"{y:,.0f}/s of {x:,.0f}/s"

        good = [(step["offered_per_s"], step["good_per_s"]) for step in steps]
        answered = [(step["offered_per_s"], step["achieved_per_s"]) for step in steps]
        series.append(Series(f"{name}good answers", good, 2 * i, hint=hint))
        if any(a[1] > 1.001 * g[1] for a, g in zip(answered, good, strict=True)):
            series.append(Series(f"{name}all answers", answered, 2 * i + 1, dashed=True, hint=hint))
    ideal = Series("as offered", [(0.0, 0.0), (most, most)], 7, dashed=True)
    x, y = Scale("offered (requests/s)"), Scale("answered (requests/s)")
    return figure("Throughput against offered rate", x, y, [*series, ideal])


def latency_against_rate(documents: Sequence[Document]) -> str:
    several = len(documents) > 1
    measured = [step["latency"]["percentiles_us"] for document in documents for step in document["steps"]]
    scale, unit = unit_of(value for percentiles in measured for value in percentiles.values())
    highest = next((p for p in ("99", "90", "50") if any(p in percentiles for percentiles in measured)), "99")
    series = []
    for i, document in enumerate(documents):
        steps = sorted(document["steps"], key=lambda step: float(step["offered_per_s"]))
        for j, p in enumerate((highest,) if several else SHOWN_AGAINST_RATE):
            found = [(step["offered_per_s"], step["latency"]["percentiles_us"].get(p)) for step in steps]
            points = [(x, None if value is None else value / scale) for x, value in found]

            def hint(x: float, y: float) -> str:
                return f"{us(y * scale)} at {x:,.0f}/s"

            name = f"{run_name(document)}, P{p}" if several else f"P{p}"
            series.append(Series(name, points, i if several else j, hint=hint))
    x, y = Scale("offered (requests/s)"), Scale(f"latency ({unit}, log)", "log")
    return figure("Latency against offered rate", x, y, series)


def slices_of(step: Step, name: str, scale: float) -> list[tuple[float, float | None]]:
    return [
        (part["start_s"] + part["length_s"] / 2, None if part[name] is None else part[name] / scale)
        for part in step["over_time"]
    ]


def over_time(documents: Sequence[Document]) -> str:
    several = len(documents) > 1
    chosen = [(document, main_step(document["steps"])) for document in documents]
    scale, unit = unit_of(step["latency"]["max_us"] for _, step in chosen)

    def hint(x: float, y: float) -> str:
        return f"{us(y * scale)} at {x:.2f} s"

    series = []
    for i, (document, step) in enumerate(chosen):
        lines = [("P99", "p99_us")] if several else [("P50", "p50_us"), ("P99", "p99_us"), ("max", "max_us")]
        for j, (name, field) in enumerate(lines):
            label = f"{step_name(document, step, True)}, {name}" if several else name
            series.append(Series(label, slices_of(step, field, scale), i if several else j, hint=hint))
    note = "" if several else f"At {step_name(*chosen[0], False)}, by the time at which requests were due."
    x, y = Scale("time (s)"), Scale(f"latency ({unit}, log)", "log")
    return figure("Latency over time", x, y, series, note)


def disturbance(documents: Sequence[Document]) -> str:
    """Draw the delays that the server did not cause: pauses of the machine and the generator's send lag."""
    document = documents[0]
    step = main_step(document["steps"])
    scale, unit = unit_of([step["latency"]["max_us"]])

    def hint(x: float, y: float) -> str:
        return f"{us(y * scale)} at {x:.2f} s"

    lines = [
        ("latency, max", "max_us", 0),
        ("machine hiccup, max", "hiccup_max_us", 1),
        ("send lag, max", "lag_max_us", 2),
    ]
    series = [Series(name, slices_of(step, field, scale), color, hint=hint) for name, field, color in lines]
    x, y = Scale("time (s)"), Scale(f"delay ({unit}, log)", "log")
    note = f"{step_name(document, step, len(documents) > 1)}. Where the machine pauses too, it may cause the latency."
    return figure("Machine and generator over time", x, y, series, note)


def noise_curves(documents: Sequence[Document]) -> str:
    document = documents[0]
    step = main_step(document["steps"])
    scale, unit = unit_of([step["latency"]["max_us"]])
    parts = [("latency since the request was due", "latency"), ("service time since it was sent", "service_time")]
    parts += [("machine hiccups", "machine_hiccups"), ("send lag", "send_lag")]
    series = [
        curve_of(name, step[field], i, scale, i > 1) for i, (name, field) in enumerate(parts) if step[field]["count"]
    ]
    note = f"{step_name(document, step, len(documents) > 1)}. Latency minus service time is the wait before sending."
    y = Scale(f"time ({unit}, log)", "log")
    return figure("Latency, service time and noise by percentile", PERCENTILE_AXIS, y, series, note)


def stage_bars(documents: Sequence[Document]) -> Iterable[str]:
    """Draw the server's time by stage: in us, and as shares, which stay readable if the queue takes seconds."""
    several = len(documents) > 1
    chosen = [(d, main_step(d["steps"])) for d in documents] if several else steps_of(documents[0])
    chosen = spread_out([(d, step) for d, step in chosen if step.get("server")], BARS)
    if not chosen:
        return
    found = [step["server"] for _, step in chosen]
    names = [run_name(d) if several else step_name(d, step, False).removesuffix("/s") for d, step in chosen]
    scale, unit = unit_of(server["total"]["mean_us"] for server in found)
    x_label = "run" if several else "offered (requests/s)"

    def layers(field: str, factor: float) -> list[Layer]:
        stacked = []
        for stage in text.STAGES:
            parts = [server["stages"].get(stage, {"mean_us": 0.0, "share": 0.0}) for server in found]
            if any(part["mean_us"] for part in parts):
                hints = [f"{us(part['mean_us'])}, {part['share']:.1%}" for part in parts]
                stacked.append(Layer(stage, [part[field] * factor for part in parts], STAGE_COLORS[stage], hints))
        return stacked

    note = "Mean per batch by the server's own metrics, with the warm-up; queue is the wait of its oldest request."
    note += " For each run: the fastest rate that the server kept up with." if several else ""
    times, shares = Scale(f"time ({unit})"), Scale("share of the time (%)")
    yield bars("Time in the server by stage", x_label, times, names, layers("mean_us", 1 / scale), note)
    note = "Share of the time from reading a batch's first request to writing its replies."
    yield bars("Share of the server's time by stage", x_label, shares, names, layers("share", 100.0), note)


def steps_of(document: Document) -> list[tuple[Document, Step]]:
    return [(document, step) for step in sorted(document["steps"], key=lambda step: float(step["offered_per_s"]))]


# -- tables ------------------------------------------------------------------------------------------------------------


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}">{head}{body}</table>'


def steps_table(documents: Sequence[Document]) -> str:
    rows = [{"run": run_name(d), **text.step_row(step)} for d in documents for step in d["steps"]]
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    return html_table(names, [[row[name] for name in names] for row in rows])


def stages_table(documents: Sequence[Document]) -> str:
    """Return the table of all stages of all steps, and why steps have none."""
    rows = [
        [
            run_name(d), text.offered(step), stage, us(part["mean_us"]), f"{part['share']:.1%}",
            us(part["p50_us"]), us(part["p99_us"]),
        ]
        for d in documents
        for step in d["steps"]
        if step.get("server")
        for stage, part in [*step["server"]["stages"].items(), ("total", step["server"]["total"])]
    ]  # fmt: skip
    notes = [d["metrics"]["note"] for d in documents if d.get("metrics") and d["metrics"]["note"]]
    found = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    if rows:
        head = ["run", "offered/s", "stage", "mean per batch", "share", "~P50", "~P99"]
        found = (
            f'<div class="wide">{html_table(head, rows)}</div><p class="note">P50 and P99 are interpolated within the '
            f"buckets of the server's histograms (1, 2, 5, 10 us and so on).</p>{found}"
        )
    return f"<h2>Time in the server</h2>{found}" if found else ""


def errors_table(documents: Sequence[Document]) -> str:
    rows = [
        [run_name(d), rate(step["offered_per_s"]), code, number(error["count"]), error["message"]]
        for d in documents
        for step in d["steps"]
        for code, error in step["errors"].items()
    ]
    warnings = [
        [run_name(d), rate(step["offered_per_s"]), warning]
        for d in documents
        for step in d["steps"]
        for warning in step["warnings"]
    ]
    found = ""
    if rows:
        head = ["run", "offered/s", "code", "count", "first message"]
        found += f'<h2>Errors</h2><div class="wide">{html_table(head, rows)}</div>'
    if warnings:
        found += (
            f'<h2>Warnings</h2><div class="wide">{html_table(["run", "offered/s", "warning"], warnings, "facts")}</div>'
        )
    return found


def facts_table(documents: Sequence[Document]) -> str:
    facts = [facts_of(document) for document in documents]
    names = list(dict.fromkeys(name for run in facts for name in run))
    rows = [[name, *(run.get(name, "") for run in facts)] for name in names]
    return html_table(["", *map(run_name, documents)], rows, "facts")


def facts_of(document: Document) -> dict[str, str]:
    machine, load, work = document["machine"], document["load"], document["workload"]
    found = {
        "command": document["command"],
        "target": f"{document['target']['address']} ({document['target']['protocol']})",
        "requests": ", ".join(f"{name} (weight {weight:g})" for name, weight in work["requests"].items()),
        "rows per request": str(work["rows"]),
        **{f"column {name}": source for name, source in work["columns"].items()},
        "load": f"{load['loop']} loop" + (f", {load['arrivals']} arrivals" if load["arrivals"] else ""),
        "connections": f"{load['connections']}, up to {load['in_flight_a_connection']} in flight on each",
        "warm-up, timeout": f"{load['warmup_s']:g} s, {load['timeout_s']:g} s",
        "generator": f"{load['threads']} thread(s), polling for the last {load['spin_us']:g} us, seed {load['seed']}",
        "generator's machine": f"{machine['host']}: {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, Python {machine['python']}",
    }
    if document["verified"]:
        checked = document["verified"]
        found["answers compared"] = f"{checked['compared']:,}, of which {checked['different']:,} differ"
    return found
