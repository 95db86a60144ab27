"""Formats results for a terminal: a row for each step, then notes and warnings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shorttail._native.metrics import STAGES as MEASURED
from shorttail.loadtest.histogram import SHOWN

STAGES = MEASURED[:-1]  # the last of MEASURED is the total


def us(value: float | None) -> str:
    """Return microseconds as text with three digits and a unit: "85.1 us", "1.24 ms", "2.10 s"; "-" for None."""
    if value is None:
        return "-"
    for limit, scale, unit in ((1e3, 1.0, "us"), (1e6, 1e3, "ms"), (float("inf"), 1e6, "s")):
        if value < limit * 0.9995:
            return f"{value / scale:#.3g}".rstrip(".") + f" {unit}"
    return "-"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def step_row(step: Mapping[str, Any]) -> dict[str, str]:
    latency = step["latency"]["percentiles_us"]
    bad = step["error"] + step["timeout"] + step["lost"]
    lag = step["send_lag"]
    return {
        "offered/s": offered(step),
        "achieved/s": rate(step["achieved_per_s"]),
        "good/s": rate(step["good_per_s"]),
        "bad": f"{bad:,}",
        **{f"P{p:g}": us(latency.get(f"{p:g}")) for p in SHOWN},
        "max": us(step["latency"]["max_us"] if step["latency"]["count"] else None),
        "lag P99": us(lag["p99_us"]) if lag["count"] else "-",
        "hiccup max": us(step["machine_hiccups"]["max_us"]),
    }


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of a table, aligned to the right. Columns that are "-" in all rows are left out."""
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = ["  ".join(f"{name:>{widths[name]}}" for name in names)]
    return lines + ["  ".join(f"{row[name]:>{widths[name]}}" for name in names) for row in rows]


def summary(document: Mapping[str, Any]) -> list[str]:
    """Return all lines of a result."""
    load, work = document["load"], document["workload"]
    shape = "closed loop" if load["loop"] == "closed" else f"open loop, {load['arrivals']} arrivals"
    lines = [
        f"{document['target']['address']}: {', '.join(work['requests'])}; {shape}; {load['connections']} connections, "
        f"up to {load['in_flight_a_connection']} in flight on each; seed {load['seed']}",
        "",
        *table([step_row(step) for step in document["steps"]]),
        "",
    ]
    if any(step.get("server") for step in document["steps"]):
        lines += ["in the server, mean per batch:", *table(server_rows(document["steps"])), ""]
    lines += notes(document)
    return lines


def server_rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a row for each step that has the server's times: each stage's mean and its share of the total."""
    rows = []
    for step in steps:
        if not (found := step.get("server")):
            continue
        stages = {
            name: f"{us(part['mean_us'])} {part['share']:4.0%}" if (part := found["stages"].get(name)) else "-"
            for name in STAGES
        }
        total = found["total"]
        rows.append(
            {
                "offered/s": offered(step),
                "requests": f"{found['requests'] / found['batches']:.3g}",
                **stages,
                "total": us(total["mean_us"]),
                "~P50": us(total["p50_us"]),
                "~P99": us(total["p99_us"]),
                "worker CPU": "-" if found["worker_cpu"] is None else f"{found['worker_cpu']:.0%}",
            }
        )
    return rows


def offered(step: Mapping[str, Any]) -> str:
    return "closed loop" if step["rate_per_s"] is None else rate(step["offered_per_s"])


def notes(document: Mapping[str, Any]) -> list[str]:
    steps = document["steps"]
    lines = []
    for step in steps:
        name = f"at {rate(step['offered_per_s'])}/s: " if len(steps) > 1 else ""
        lines += kinds(step, name)
        for code, error in step["errors"].items():
            message = f", first: {error['message']}" if error["message"] else ""
            lines.append(f"{name}{error['count']:,} x {code}{message}")
        if step["timeout"]:
            late = (
                f"; {step['counts']['late_answers']:,} of them were answered later"
                if step["counts"]["late_answers"]
                else ""
            )
            lines.append(f"{name}{step['timeout']:,} timeouts after {document['load']['timeout_s']:g} s{late}")
        if step["interrupted"]:
            lines.append(f"{name}interrupted after {step['duration_s']:.1f} s")
        if step["fatal"]:
            lines.append(f"{name}FAILED: {step['fatal']}")
    if own := document["workload"].get("own_keys"):
        lines.append(own_keys_line(own))
    lines += warnings(steps)
    if metrics := document.get("metrics"):
        lines += filter(None, [metrics["finding"], metrics["note"]])
    if document["capacity"]:
        found = document["capacity"]
        lines.append(
            f"capacity: {rate(found['rate_per_s'])} requests/s with P{found['percentile']:g} <= "
            f"{us(found['limit_us'])} ({found['reason']})"
        )
    if document["verified"]:
        checked = document["verified"]
        differ = (
            f"{checked['different']:,} differ, first: {checked['example']}" if checked["different"] else "all equal"
        )
        lines.append(f"{checked['compared']:,} sampled requests sent again, answers compared: {differ}")
    return lines


def own_keys_line(own: Mapping[str, Any]) -> str:
    """Return what became of the rows that were pushed. own: what OwnKeys.remove() returned."""
    end = f"rows may be left: {own['problem']}" if own["problem"] else f"{own['removed']:,} rows removed at the end"
    return f"pushes to '{own['view']}' had {own['keys']:,} keys of their own; {end}"


def warnings(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each kind of warning once, from the step with the highest rate, with the number of steps that have it."""
    found: dict[str, list[str]] = {}
    for step in sorted(steps, key=lambda step: float(step["offered_per_s"])):
        for warning in step["warnings"]:
            kind = re.sub(r"[\d,.]+", "", warning)
            found.setdefault(kind, []).append(f"at {rate(step['offered_per_s'])}/s: {warning}")
    if len(steps) == 1:
        return [f"warning: {warning}" for warning in steps[0]["warnings"]]
    return [f"warning at {len(texts)} of {len(steps)} rates; {texts[-1]}" for texts in found.values()]


def kinds(step: Mapping[str, Any], name: str) -> list[str]:
    lines = []
    for kind, latency in step["by_kind"].items():
        found = ", ".join(f"P{p} {us(value)}" for p, value in latency["percentiles_us"].items())
        lines.append(
            f"{name}{kind}: {latency['count']:,} answers, {found or 'too few for percentiles'},"
            f" max {us(latency['max_us'])}"
        )
    return lines
