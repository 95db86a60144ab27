"""`shorttail bench`: runs load tests of a server, and compares their results."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shorttail.cli.output import print_json
from shorttail.config import LIMITS
from shorttail.define.inputs import read_input
from shorttail.errors import InvalidArgument, NotFound, ShorttailError

if TYPE_CHECKING:
    from shorttail.loadtest.rates import Objective, Rate
    from shorttail.loadtest.result import Step
    from shorttail.loadtest.runner import Capacity, Interrupts, LiveLine, Load
    from shorttail.loadtest.stages import StageWatch
    from shorttail.loadtest.target import Target
    from shorttail.loadtest.traffic import Traffic, Workload

MIXED = ("predict", "features", "push")
FLAGS = {"headers": "header"}  # flags that differ from the option's Python name
HTTP_CONNECTIONS = 64  # more than CONNECTIONS, because each has only one request in flight
CONNECTIONS = 16
STEP_OF_SEARCH_S = 3.0

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options_of(*decorators: Decorator) -> Decorator:
    """Combine the decorators of several options, in the order in which --help shows them."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return apply


request_options = options_of(
    click.option("--predict", "--model", "predict", metavar="MODEL", help="Send predictions with this model."),
    click.option("--features", metavar="REF,...", help="Send lookups of these features (view:feature), a row of CSV."),
    click.option("--push", metavar="VIEW", help="Push rows to this view, to keys that no row has; they are deleted at"
                 " the end."),
    click.option("--overwrite-live-rows", is_flag=True, help="Push to the keys of --keys, and so overwrite rows with"
                 " made-up values."),
    click.option("--mix", metavar="WEIGHTS", help="Weights of the kinds of requests: predict=8,features=1,push=1."),
    click.option("--rows", type=click.IntRange(1, LIMITS.rows_per_request), default=1, show_default=True,
                 help="Rows per request."),
    click.option("--push-rows", type=click.IntRange(1, LIMITS.rows_per_request), default=1, show_default=True,
                 help="Rows per push."),
    click.option("--shared", metavar="COLUMN", multiple=True, help="Column with the same value in all rows of a"
                 " request; may be repeated."),
    click.option("--keys", metavar="SPEC", multiple=True, help="Keys of the requests: COLUMN=uniform:1:1M,"
                 " COLUMN=zipf:1:1M:0.99, file:PATH or store:PATH; may be repeated."),
    click.option("--draw", default="uniform", show_default=True, metavar="DRAW",
                 help="How rows of file: and store: are chosen: uniform, zipf:0.99 or in-turn."),
    click.option("--value", "values", metavar="SPEC", multiple=True, help="Values of a column that is not a key:"
                 " COLUMN=5, COLUMN=uniform:0:100 or COLUMN=choice:a,b; may be repeated. Other columns get values of"
                 " their type."),
    click.option("--encoding", type=click.Choice(["tensor", "list"]), default="tensor", show_default=True,
                 help="How requests encode arrays."),
    click.option("--deadline-ms", type=click.FloatRange(0, min_open=True), metavar="MS", help="Tell the server how long"
                 " the caller of each request waits."),
    click.option("--body", metavar="FILE", help="HTTP: file with a JSON body. {{column}} becomes a value, {{column...}}"
                 " as many values as --rows, {{nonce}} a number that the answer must contain."),
    click.option("--header", "headers", metavar="LINE", multiple=True,
                 help="HTTP: additional header; may be repeated."),
)  # fmt: skip

load_options = options_of(
    click.option("--rate", metavar="RATE", show_default="1k", help="Requests per second: 10k, 1k,2k,5k, a sweep"
                 " 1k:50k:x1.5 or 1k:10k:+1k, or a ramp 1k..10k."),
    click.option("--find-capacity", is_flag=True, help="Search for the highest rate that meets --slo."),
    click.option("--slo", metavar="SLO", help="Latency objective for --find-capacity, such as p99=5ms."),
    click.option("--closed", is_flag=True, help="Closed loop: send the next request when an answer arrives."),
    click.option("--inflight", type=click.IntRange(1, 65_536), default=1, show_default=True,
                 help="Closed loop: requests in flight on each connection."),
    click.option("--arrivals", type=click.Choice(["poisson", "constant"]), default="poisson",
                 show_default=True, help="Times of the requests: random (poisson) or evenly spaced (constant)."),
    click.option("--duration", default="20s", show_default=True, metavar="TIME",
                 help="Duration of each rate, after the warm-up."),
    click.option("--warmup", default="1s", show_default=True, metavar="TIME",
                 help="Duration of the load that is not counted."),
    click.option("--timeout", default="5s", show_default=True, metavar="TIME",
                 help="Time after which a request has failed."),
    click.option("--connections", type=click.IntRange(1, 65_536), show_default="16; HTTP 64",
                 help="Number of connections."),
    click.option("--pipeline", type=click.IntRange(1, 65_536), default=64, show_default=True,
                 help="Maximum requests in flight on each connection; HTTP always has 1."),
    click.option("--threads", type=click.IntRange(1, LIMITS.bench_threads), default=1, show_default=True,
                 help="Generator threads."),
    click.option("--spin-us", type=click.FloatRange(0, 1000), show_default="50; with a single CPU 0",
                 help="Microseconds before each request in which the generator polls instead of sleeping."),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), show_default="random",
                 help="Seed of arrival times and values."),
    click.option("--verify", type=click.IntRange(1, LIMITS.bench_verified), metavar="N",
                 help="Send N sampled requests again after the run, and compare the answers."),
)  # fmt: skip

output_options = options_of(
    click.option(
        "--metrics",
        metavar="URL",
        help="The server's /metrics, which shows where its time goes; off: do not read it.",
        show_default="http://127.0.0.1:7712/metrics for a server on this machine",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object."),
    click.option("--report", metavar="FILE", help="Write an HTML report."),
    click.option("--hdr", metavar="FILE", help="Write a log of HdrHistograms."),
    click.option("--label", default="", help="Name of this run in reports."),
)


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="ADDR | compare FILE...")
@request_options
@load_options
@output_options
def bench(words: tuple[str, ...], **options: Any) -> int:
    """Load-test a server, or compare results of load tests.

    ADDR is host:port or unix:/path.sock of a shorttail server, or http://host:port/path of any HTTP
    server. Latency is measured from the time at which a request was due, also if it could only be sent
    later. Ctrl-C ends a run early and prints its result. `compare` takes results of --json.

    \b
    Example:
      shorttail bench :7711 --predict fraud --keys user_id=zipf:1:1M --rate 10k --report out.html
      shorttail bench :7711 --predict fraud --keys store:store --rate 1k:50k:x1.5 --json > a.json
      shorttail bench :7711 --predict fraud --keys store:store --find-capacity --slo p99=5ms
      shorttail bench http://127.0.0.1:8000/predict --body body.json --keys id=uniform:1:1000
      shorttail bench compare a.json b.json --report out.html
    """
    from shorttail.loadtest import histogram

    histogram.require_library()
    for name in ("report", "hdr"):
        if options[name]:
            check_writable(f"--{name} {options[name]}", Path(options[name]))
    if words[0] == "compare":
        return compare(words[1:], options)
    if len(words) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({words[1]})", click.get_current_context())
    return run(words[0], options)


def check_writable(what: str, path: Path) -> None:
    """Raise NotFound or InvalidArgument if a file cannot be written. what: the option, for errors."""
    if not path.absolute().parent.is_dir():
        raise NotFound(f"{what}: there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidArgument(f"{what}: this is a folder; give the name of a file")
    is_new = not path.exists()
    with writing(what):
        # Without O_NONBLOCK this would wait until somebody reads, if it is a FIFO.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644))
        if is_new:
            path.unlink()


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Translate the system's errors of a `with` block that writes a file to InvalidArgument."""
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"{what}: cannot be written: {os.strerror(error.errno or 0)}") from None


def compare(paths: tuple[str, ...], options: dict[str, Any]) -> int:
    """Print several results of --json side by side, and write them to --report."""
    from shorttail.loadtest import text
    from shorttail.loadtest.document import read_document
    from shorttail.loadtest.report import write_report

    if not paths:
        raise click.UsageError("compare needs results of `shorttail bench --json`", click.get_current_context())
    documents = [read_document(path) for path in paths]
    if options["report"]:
        with writing(f"--report {options['report']}"):
            write_report(options["report"], documents)
    if options["as_json"]:
        print_json(documents)
        return 0
    rows = [{"run": d["label"], **text.step_row(step)} for d in documents for step in d["steps"]]
    for line in text.table(rows):
        click.echo(line)
    return 0


def run(address: str, options: dict[str, Any]) -> int:
    """Run a load test and print its result. Returns the exit code."""
    from shorttail.loadtest import runner, stages, text
    from shorttail.loadtest import target as targets
    from shorttail.loadtest.document import make_document

    # The options are checked before anything is sent to the server.
    rates, objective = parse_rates(options)
    load = make_load(options, is_http=address.startswith("http"))
    workload = make_workload(options, load.seed, is_http=address.startswith("http"))
    found = targets.find(address)
    load.check(found.protocol)
    watch = stages.find(options["metrics"], found)
    plan = make_plan(workload, found)
    if plan.own_keys is not None:
        plan.own_keys.check_unused(found.text)
    started_s, removed = time.time(), None
    with runner.Interrupts() as interrupts:
        try:
            steps, capacity = run_steps(plan, found, load, rates, objective, watch, interrupts)
        finally:
            if plan.own_keys is not None:
                removed = plan.own_keys.remove(found.text)
    verified = check_answers(found, load, steps)
    document = make_document(
        label=options["label"],
        target=found,
        workload=workload,
        plan=plan,
        load=load,
        command=shlex.join(["shorttail", *sys.argv[1:]]),
        started_s=started_s,
        steps=steps,
        capacity=capacity,
        verified=verified,
        watch=watch,
        own_keys=removed,
    )
    try:
        write_files(options, document, steps, started_s)
    finally:
        if options["as_json"]:
            print_json(document)
        else:
            for line in text.summary(document):
                click.echo(line)
    failed = any(step.fatal for step in steps) or (verified is not None and verified.different > 0)
    return 1 if failed else 130 if interrupts.count else 0


def parse_rates(options: dict[str, Any]) -> tuple[list[Rate | None], Objective | None]:
    """Return the rates to run (None: closed loop), and the objective to search for. Raises InvalidArgument."""
    from shorttail.loadtest import rates

    objective = rates.parse_objective(options["slo"]) if options["slo"] else None
    if options["find_capacity"]:
        if objective is None:
            raise InvalidArgument("--find-capacity needs an objective: --slo p99=5ms")
        if options["closed"]:
            raise InvalidArgument("--find-capacity searches for a rate, and --closed has none; leave one of them out")
        start = rates.parse_rates(options["rate"] or "1k")
        if len(start) > 1 or start[0].start != start[0].end:
            raise InvalidArgument(f"--rate {options['rate']}: --find-capacity starts at a single rate, such as 1k")
        return [start[0]], objective
    if objective is not None:
        raise InvalidArgument("--slo is an option of --find-capacity; add --find-capacity")
    if options["closed"]:
        if options["rate"]:
            raise InvalidArgument("--closed sends when answers arrive and has no --rate; leave one of them out")
        return [None], None
    return list(rates.parse_rates(options["rate"] or "1k")), None


def make_load(options: dict[str, Any], is_http: bool) -> Load:
    from shorttail.loadtest.rates import parse_seconds
    from shorttail.loadtest.runner import Load, new_seed

    spin_us = options["spin_us"]
    if spin_us is None:
        spin_us = 50.0 if len(os.sched_getaffinity(0)) > 1 else 0.0
    if options["verify"] and is_http:
        raise InvalidArgument(
            "--verify needs a shorttail server, because it does not use HTTP; use {{nonce}} in the body instead"
        )
    return Load(
        connections=options["connections"] or (HTTP_CONNECTIONS if is_http else CONNECTIONS),
        pipeline=1 if is_http else options["inflight"] if options["closed"] else options["pipeline"],
        closed=options["closed"],
        poisson=options["arrivals"] == "poisson",
        duration_s=parse_seconds(options["duration"], "--duration"),
        warmup_s=parse_seconds(options["warmup"], "--warmup", zero=True),
        timeout_s=parse_seconds(options["timeout"], "--timeout"),
        threads=options["threads"],
        seed=new_seed() if options["seed"] is None else options["seed"],
        spin_us=spin_us,
        verified=options["verify"] or 0,
    )


def make_workload(options: dict[str, Any], seed: int, is_http: bool) -> Workload:
    from shorttail.define.text import csv_row
    from shorttail.loadtest.traffic import Workload

    only_rpc = ("predict", "features", "push", "overwrite_live_rows", "mix", "shared", "deadline_ms")
    only_http = ("body", "headers")
    for name in only_rpc if is_http else only_http:
        if options[name]:
            other = "a shorttail server, host:port" if is_http else "HTTP servers, http://host:port/path"
            raise InvalidArgument(f"--{FLAGS.get(name, name.replace('_', '-'))} is only for {other}")
    if options["overwrite_live_rows"] and not options["push"]:
        raise InvalidArgument("--overwrite-live-rows says what --push does; give --push VIEW too")
    body = None
    if options["body"]:
        try:
            body = read_input(options["body"]).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise NotFound(f"--body {options['body']}: cannot be read: {reason}") from None
    return Workload(
        predict=options["predict"],
        features=[item.strip() for item in csv_row("--features", options["features"] or "") if item],
        push=options["push"],
        overwrite=options["overwrite_live_rows"],
        mix=parse_mix(options["mix"] or ""),
        rows=options["rows"],
        push_rows=options["push_rows"],
        shared=options["shared"],
        keys=options["keys"],
        values=options["values"],
        draw=options["draw"],
        encoding=options["encoding"],
        deadline_ms=options["deadline_ms"],
        body=body,
        headers=options["headers"],
        seed=seed,
    )


def parse_mix(text: str) -> dict[str, float]:
    """Return "predict=8,push=1" as {"predict": 8.0, "push": 1.0}. Raises InvalidArgument."""
    weights: dict[str, float] = {}
    for part in text.split(",") if text else []:
        kind, _, weight = part.partition("=")
        try:
            weights[kind.strip()] = float(weight)
        except ValueError:
            weights[kind.strip()] = -1.0
        if kind.strip() not in MIXED or not 0 <= weights[kind.strip()] < float("inf"):
            raise InvalidArgument(f"--mix '{part}' is not understood; write predict=8,features=1,push=1")
    if weights and not any(weights.values()):
        raise InvalidArgument(f"--mix {text}: all weights are 0")
    return weights


def make_plan(workload: Workload, target: Target) -> Traffic:
    from shorttail.loadtest import traffic as plan

    if target.protocol == "http":
        return plan.plan_http(workload, target)
    models, views = plan.list_catalog(target.text, timeout_s=5.0)
    return plan.plan_rpc(workload, models, views)


def run_steps(
    plan: Traffic,
    target: Target,
    load: Load,
    rates: list[Rate | None],
    objective: Objective | None,
    watch: StageWatch | None,
    interrupts: Interrupts,
) -> tuple[list[Step], Capacity | None]:
    from shorttail.loadtest import runner

    line = runner.LiveLine()

    def run_one(load: Load, rate: Rate | None) -> Step:
        def run() -> Step:
            return runner.run_step(plan, target, load, rate, line, interrupts)

        return watch.around(run) if watch else run()

    try:
        if objective is None:
            return each_rate(run_one, load, rates, line, interrupts), None

        def try_rate(rate: Rate, seconds: float) -> Step:
            line.begin(f"{rate}/s  ")
            return run_one(replace(load, duration_s=seconds), rate)

        assert rates[0] is not None
        capacity, steps = runner.find_capacity(try_rate, objective, rates[0].start, search_step_s(load))
        return steps, capacity
    finally:
        line.clear()


def search_step_s(load: Load) -> float:
    return min(load.duration_s, STEP_OF_SEARCH_S)


def each_rate(
    run_one: Callable[[Load, Rate | None], Step],
    load: Load,
    rates: list[Rate | None],
    line: LiveLine,
    interrupts: Interrupts,
) -> list[Step]:
    """Run a step for each rate, until a step fails or is interrupted."""
    steps: list[Step] = []
    for i, rate in enumerate(rates):
        line.begin(
            f"{'closed loop' if rate is None else f'{rate}/s'} ({i + 1}/{len(rates)})  " if len(rates) > 1 else ""
        )
        try:
            steps.append(run_one(load, rate))
        except ShorttailError:
            if not steps:
                raise
            break  # the server stopped between two steps: report the steps before
        if steps[-1].fatal or interrupts.count:
            break
    return steps


def check_answers(target: Target, load: Load, steps: list[Step]) -> Any:
    from shorttail.loadtest.verify import verify

    if not load.verified or any(step.fatal for step in steps):
        return None
    return verify(target.text, [pair for step in steps for pair in step.captures][-load.verified :], load.timeout_s)


def write_files(options: dict[str, Any], document: dict[str, Any], steps: list[Step], started_s: float) -> None:
    from shorttail.loadtest.histogram import write_log
    from shorttail.loadtest.report import write_report

    if options["report"]:
        with writing(f"--report {options['report']}"):
            write_report(options["report"], [document])
    if options["hdr"]:
        slices = []
        for number, step in enumerate(steps):
            tag = f"step{number + 1}" if len(steps) > 1 else ""
            slices += [(tag, part.start_s, part.length_s, part.latency) for part in step.slices]
        with writing(f"--hdr {options['hdr']}"):
            write_log(options["hdr"], started_s, slices)
