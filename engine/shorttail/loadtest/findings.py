"""Explains a run in sentences: where the server's limit is, and which delays the generator or its machine caused."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from shorttail.loadtest.result import KEPT_UP
from shorttail.loadtest.text import rate, us

Step = Mapping[str, Any]

QUEUED = 0.5  # share of the server's time from which on the queue is long: more than the wait for a batch before
SATURATED = 0.85  # share of a core from which on a worker is busy; reading and writing sockets take the rest
SLOW_SLICE = 3.0  # a slice of the run is slow if its P99 is above this multiple of the median slice's P99


def findings(document: Mapping[str, Any]) -> list[str]:
    """Return the sentences about a run, the most important first."""
    steps = document["steps"]
    found = [f"The run failed: {step['fatal']}." for step in steps if step["fatal"]]
    if document["capacity"]:
        capacity = document["capacity"]
        found.append(
            f"Capacity: {rate(capacity['rate_per_s'])} requests/s with P{capacity['percentile']:g} at most "
            f"{us(capacity['limit_us'])} ({capacity['reason']})."
        )
    found += throughput(steps)
    found += filter(None, [server(steps)])
    found += generator(steps)
    found += failures(steps, document["load"]["timeout_s"])
    best = main_step(steps)
    found += tail(best)
    found += noise(best)
    return found


def kept_up(step: Step) -> bool:
    return bool(step["achieved_per_s"] >= KEPT_UP * step["offered_per_s"])


def main_step(steps: Sequence[Step]) -> Step:
    """Return the fastest step that the server kept up with, or the first step if it kept up with none."""
    good = [step for step in steps if kept_up(step)]
    return max(good, key=lambda step: float(step["offered_per_s"])) if good else steps[0]


def throughput(steps: Sequence[Step]) -> list[str]:
    if steps[0]["rate_per_s"] is None:
        step = steps[0]
        return [
            f"Closed loop: {rate(step['good_per_s'])} good answers/s. The load waits for the server, so a stall hides "
            "the requests that would have come meanwhile. Use --rate for latencies as users would see them."
        ]
    missed = [step for step in steps if not kept_up(step)]
    best = main_step(steps)
    if not missed:
        more = "" if len(steps) > 1 else "; a sweep (--rate 1k:50k:x1.5) shows where its limit lies"
        return [f"The server kept up with every rate offered, up to {rate(best['offered_per_s'])}/s{more}."]
    first = min(missed, key=lambda step: float(step["offered_per_s"]))
    most = max(float(step["good_per_s"]) for step in steps)
    held = f"It kept up with {rate(best['offered_per_s'])}/s. " if kept_up(best) else ""
    return [
        f"{held}At {rate(first['offered_per_s'])}/s offered it answered {rate(first['achieved_per_s'])}/s: requests "
        f"queue, and latency there only shows how long the load lasted. The most good answers were {rate(most)}/s."
    ]


REMEDIES = {
    "lookup": "fewer feature views, or a store that fits into memory",
    "transform": "fewer or cheaper on-demand functions",
    "infer": "shorttail tune, or a smaller model",
    "encode": "smaller answers, or --encoding tensor",
}


def server(steps: Sequence[Step]) -> str:
    """Say which stage limits the server, at the first rate that it did not keep up with, else at the highest.

    Returns "" if no step has the server's times by stage.
    """
    measured = [step for step in steps if step.get("server")]
    if not measured:
        return ""
    missed = [step for step in measured if not kept_up(step)]
    step = min(missed, key=lambda step: float(step["offered_per_s"])) if missed else main_step(measured)
    found = step["server"]
    total_us, queue_us = found["total"]["mean_us"], found["stages"]["queue"]["mean_us"]
    work = {stage: part["mean_us"] for stage, part in found["stages"].items() if stage != "queue"}
    worst = max(work, key=lambda stage: float(work[stage]), default="")
    if not worst or total_us <= queue_us:
        return ""
    share = work[worst] / (total_us - queue_us)
    return (
        f"Of {us(total_us)} that a batch takes in the server at {rate(step['offered_per_s'])}/s, {us(queue_us)} "
        f"({queue_us / total_us:.0%}) are queue: {saturation(found, queue_us / total_us, bool(missed))}. Of the other "
        f"{us(total_us - queue_us)}, {worst} takes {share:.0%}; to reduce it: {REMEDIES[worst]}."
    )


def saturation(found: Mapping[str, Any], queued: float, missed: bool) -> str:
    """Judge by the queue's share and the workers' CPU: "it is saturated (its worker uses 98% of a core)".

    found: the server's times of a step. queued: the queue's share of the time. missed: the server did not keep up.
    """
    cpu = found["worker_cpu"]
    if cpu is None:
        return "it is saturated" if missed else "requests wait for each other" if queued >= QUEUED else "few wait"
    workers = "its worker uses" if found["workers"] == 1 else f"each of its {found['workers']} workers uses"
    used = f"{workers} {cpu:.0%} of a core"
    if cpu >= SATURATED:
        return f"it is {'saturated' if queued >= QUEUED or missed else 'near its limit'} ({used})"
    if queued < QUEUED:
        return f"it is not saturated ({used})"
    return f"requests wait although {used}: they arrive in bursts, or other processes use its machine's cores"


def generator(steps: Sequence[Step]) -> list[str]:
    """Say whether the generator limited the run, and from which rate on all connections were full."""
    found = []
    lagging = [step for step in steps if any("generator could not" in text for text in step["warnings"])]
    if lagging:
        worst = max(lagging, key=lambda step: float(step["send_lag"]["p99_us"]))
        lag = worst["send_lag"]["p99_us"]
        found.append(
            f"The generator is a limit too: at {rate(worst['offered_per_s'])}/s its own send lag has a P99 of "
            f"{us(lag)}, which is part of the reported latency."
        )
    full = [step for step in steps if step["counts"]["blocked"]]
    if full:
        step = full[0]
        found.append(
            f"From {rate(step['offered_per_s'])}/s on every connection was full at times "
            f"({step['counts']['blocked']:,} requests waited for one): the server had its full share of work in flight."
        )
    return found


def failures(steps: Sequence[Step], timeout_s: float) -> list[str]:
    found = []
    for step in steps:
        bad = step["error"] + step["timeout"] + step["lost"]
        if not bad:
            continue
        causes = [f"{error['count']:,} x {code}" for code, error in step["errors"].items()]
        if step["timeout"]:
            causes.append(f"{step['timeout']:,} without an answer within {timeout_s:g} s")
        share = bad / max(step["requests"], 1)
        found.append(f"At {rate(step['offered_per_s'])}/s {share:.2%} of the requests failed: {', '.join(causes)}.")
    return found


def tail(step: Step) -> list[str]:
    """Say whether slow answers come in bursts (stalls) or are spread over the run (queueing, expensive requests)."""
    slices = [part for part in step["over_time"] if part["p99_us"] is not None]
    where = f"at {rate(step['offered_per_s'])}/s"
    if len(slices) < 8:
        return []
    middle = statistics.median(part["p99_us"] for part in slices)
    slow = [part for part in slices if part["p99_us"] > SLOW_SLICE * middle]
    if not slow:
        return [f"Latency is even over time {where}: in no slice is the P99 above three times the median slice's."]
    worst = max(slow, key=lambda part: float(part["p99_us"]))
    paused = sum(max(part["hiccup_max_us"], part["lag_max_us"]) > part["p99_us"] / 2 for part in slow)
    blame = (
        f"in {paused} of them the generator's machine paused too"
        if paused
        else "the generator's machine paused much less then, so the server paused"
    )
    return [
        f"The tail comes in bursts {where}: in {len(slow)} of {len(slices)} slices the P99 is above three times the "
        f"median of {us(middle)}, up to {us(worst['p99_us'])} at {worst['start_s']:.1f} s; {blame}."
    ]


def noise(step: Step) -> list[str]:
    """Say how much of the latency the noise of the generator's machine may explain."""
    hiccups, latency = step["machine_hiccups"]["percentiles_us"], step["latency"]["percentiles_us"]
    shared = [p for p in hiccups if p in latency]
    if not shared:
        return []
    p = shared[-1]
    share = hiccups[p] / latency[p] if latency[p] else 0.0
    explains = "much" if share > 0.5 else "some" if share > 0.2 else "little"
    verdict = f"noise of the generator's machine may explain {explains} of it"
    return [f"P{p} of the latency is {us(latency[p])}, of the machine's hiccups {us(hiccups[p])}: {verdict}."]
