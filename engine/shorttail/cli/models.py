"""`shorttail models`: lists, registers and promotes versions of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from shorttail.cli.caller import InputFile
from shorttail.cli.options import (
    by_option,
    code_option,
    json_option,
    opened,
    vet_option,
)
from shorttail.cli.output import echo_line, print_json, print_table
from shorttail.cli.where import subcommands_of, where_options
from shorttail.errors import ShorttailError

if TYPE_CHECKING:
    from shorttail.define.catalog import Share
    from shorttail.store import Store


@click.group(invoke_without_command=True)
@where_options
@json_option
@click.pass_context
def models(context: click.Context, store: str | None, server: str | None, as_json: bool) -> None:
    """List models, register new versions, and choose which version serves.

    Without a subcommand: list the models.

    \b
    Example:
      shorttail models --store store
      shorttail models show fraud --store store
      shorttail models deploy fraud fraud-new.onnx --store store
      shorttail models canary fraud=10% --store store
      shorttail models rollback fraud --store store
    """
    if context.invoked_subcommand is None:
        context.invoke(models_list, store=store, server=server, as_json=as_json)


models_command = subcommands_of(models)


def parse_share(text: str) -> float:
    """Return "10%" as 10.0, and "off" as 0.0. Raises UsageError."""
    if text == "off":
        return 0.0
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not text.endswith("%") or not 0 <= percent <= 100:
        raise click.UsageError(f"{text!r} is not a share; write 10%, 0.5% or off", click.get_current_context())
    return percent


def parse_percent(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    return None if value is None else parse_share(value)


def parse_metrics(items: tuple[str, ...]) -> dict[str, float]:
    """Return ("auc=0.91", ...) as {"auc": 0.91, ...}. Raises UsageError."""
    metrics = {}
    for item in items:
        name, _, number = item.rpartition("=")
        try:
            metrics[name] = float(number)
        except ValueError:
            raise click.UsageError(f"{item!r}: write --metric NAME=NUMBER", click.get_current_context()) from None
    return metrics


@models_command("list")
def models_list(store: str, as_json: bool) -> None:
    """List every version of every model.

    `*` marks the version that serves. A canary is shown with its percentage of the requests, a shadow with
    its percentage of the compared requests. `runs` shows how the serving version runs on this host, as a
    compiled forest or in ONNX Runtime, and why. A model whose answer for a row depends on other rows runs one
    request at a time, which is said below the table, with the reason.

    \b
    Example:
      shorttail models list --store store
    """
    from shorttail.registry import versions as registry

    with opened(store) as target:
        versions = registry.list_versions(target.catalog)
        for version in versions:
            version["runs"] = runs_as(target, version["name"], version["version"]) if version["serving"] else None
    if as_json:
        return print_json(versions)
    if not versions:
        click.echo("no models; register one with `shorttail apply`")
        return
    header = ["model", "version", "created", "columns", "outputs", "runs"]
    rows = [
        [
            v["name"],
            f"{v['version']}{'*' * v['serving']}{share_text(v)}",
            v["created"],
            len(v["columns"]) or "tensors",
            ", ".join(v["outputs"]),
            v["runs"],
        ]
        for v in versions
    ]
    print_table(header, rows)
    for v in versions:
        if v["batching_why"]:
            click.echo(f"{v['name']} version {v['version']} {batching_text(v)}")


def share_text(version: dict[str, Any]) -> str:
    """Return " canary 10%" for a canary, " shadow 100%" for a shadow, else ""."""
    shares = ((what, version[what]) for what in ("canary", "shadow"))
    return "".join(f" {what} {percent:g}%" for what, percent in shares if percent is not None)


def batching_text(version: dict[str, Any]) -> str:
    """Return how requests share the runs of a version, and why: "runs one request at a time: by its definition"."""
    from shorttail.define.models import BATCHING

    why = version["batching_why"]
    return BATCHING[version["batching"]] + (f": {why}" if why else "")


def runs_as(store: Store, name: str, version: int) -> str:
    """Return how a version runs on this host and why, or why it cannot run."""
    from shorttail.config import LIMITS
    from shorttail.models.trial import try_file
    from shorttail.models.vetting import describe_run
    from shorttail.store.files import model_path

    info = store.catalog.model(name).version(version)
    path = model_path(store.path, name, version)
    try:
        return try_file(describe_run, path, info, version, model=name, limit_s=LIMITS.vet_s)
    except ShorttailError as error:
        return f"nothing: {error.message}"


@models_command("show")
@click.argument("name")
@click.option("--version", type=int, help="Version of the model; without it, the version that serves.")
@code_option
def models_show(store: str, as_json: bool, name: str, version: int | None, no_code: bool) -> None:
    """Show a version of the model NAME.

    Shows its inputs and outputs, the columns of a request, how it runs on this host and why, and how long
    batches take. The times are measured now, on this host.

    \b
    Example:
      shorttail models show fraud --store store
    """
    from shorttail.engine import Engine
    from shorttail.models.settings import tuned
    from shorttail.registry.versions import describe

    with Engine.open(store, code=not no_code) as engine:
        engine.refresh()
        shown = describe(engine.store.catalog, name, version)
        info = engine.store.catalog.model(name).version(version)
        runner = engine.plan_for_model(name, version).runner
        assert runner is not None
    shown |= {
        "kind": runner.kind,
        "runs": runner.description,
        "why": runner.why or None,
        "tuning": tuned(info.tuning)[1] or None,
        "us": {rows: round(us, 1) for rows, us in runner.measured_us.items()},
        "loop_rows_max": runner.loop_rows_max,
    }
    if as_json:
        return print_json(shown)
    for label, value in show_lines(shown):
        echo_line(f"{label + ':' * bool(label):<13}{value}")
    click.echo("")
    print_table(["rows", "us/batch", "us/row"], [[n, us, round(us / n, 3)] for n, us in shown["us"].items()])


def show_lines(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of `models show` as (label, text). Each column of an input has a line of its own."""
    lines = [
        ("model", f"{shown['name']} version {shown['version']}{' (serves)' * shown['serving']}{share_text(shown)}"),
        ("versions", ", ".join(map(str, shown["versions"]))),
        ("created", shown["created"]),
        ("sha256", shown["sha256"]),
        ("description", shown["description"]),
        ("owner", shown["owner"]),
        ("tags", ", ".join(shown["tags"])),
        ("run", shown["run"]),
        ("metrics", ", ".join(f"{name} {number:g}" for name, number in shown["metrics"].items())),
    ]
    for tensor, columns in shown["inputs"].items():
        lines += [(f"input {tensor}" if i == 0 else "", column) for i, column in enumerate(columns)]
    lines += [
        ("outputs", ", ".join(shown["outputs"])),
        ("features", ", ".join(shown["features"]) or "none"),
        ("request", ", ".join(f"{column} {dtype}" for column, dtype in shown["columns"].items())),
        ("missing", ", ".join(f"{name} {value!r}" for name, value in shown["replacements"].items())),
        ("runs", shown["runs"]),
        ("batching", batching_text(shown)),
        ("tuning", shown["tuning"] or "none; `shorttail tune` finds the fastest settings on this host"),
        ("event loop", f"runs batches of up to {shown['loop_rows_max']} rows; larger ones run in another thread"),
    ]
    return [(label, value) for label, value in lines if value]


@models_command("deploy")
@click.argument("name")
@click.argument("path", type=InputFile("model"))
@click.option("--no-promote", is_flag=True, help="Register the version; the current version goes on serving.")
@click.option(
    "--canary",
    metavar="PERCENT",
    callback=parse_percent,
    help="Let the new version answer this percentage of the requests, such as 10%, and the current one the rest.",
)
@click.option("--owner", help="Owner of the version; without it, that of the current version.")
@click.option("--description", help="Description of the version; without it, that of the current version.")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    help="Tag; may be repeated. Without it, those of the current version.",
)
@click.option("--run", default="", metavar="LINK", help="Link to the training run: mlflow:ID or any URL.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME=NUMBER",
    help="Measured figure of the version, such as auc=0.91; may be repeated.",
)
@click.option(
    "--examples",
    type=InputFile("examples"),
    metavar="FILE",
    help="Rows with the outputs expected of this version, to compare.",
)
@vet_option
@by_option
def models_deploy(
    store: str,
    as_json: bool,
    name: str,
    path: str,
    no_promote: bool,
    canary: float | None,
    owner: str | None,
    description: str | None,
    tags: tuple[str, ...],
    run: str,
    metrics: tuple[str, ...],
    examples: str | None,
    vet_timeout: str | None,
) -> None:
    """Register an ONNX file as the next version of a model.

    The ONNX file PATH becomes the next version of the model NAME, and serves. It gets the same inputs as
    the current version; to change them, edit the definitions and apply them. The file is loaded and run
    first; if that fails, it is not registered.

    \b
    Example:
      shorttail models deploy fraud fraud-new.onnx --store store
      shorttail models deploy fraud fraud-new.onnx --store store --canary 10% --run mlflow:3f2a --metric auc=0.91
    """
    from shorttail.models.trial import low_priority
    from shorttail.registry import versions as registry

    if canary == 0:
        raise click.UsageError(
            "--canary 0%: to register a version that answers nothing, use --no-promote", click.get_current_context()
        )
    about: dict[str, Any] = {"owner": owner, "description": description, "run": run, "metrics": parse_metrics(metrics)}
    about |= {"tags": tags or None, "examples": examples, "vet_timeout": vet_timeout}
    # A server may run on this host, and trying a model keeps a CPU busy for a while.
    with opened(store) as target, low_priority():
        before = target.catalog.model(name).current
        version = registry.deploy(target, name, path, not no_promote, canary_percent=canary, **about)
        serving = target.catalog.model(name).current
    if version == before:
        note = "unchanged: this version has the same file already"
    elif canary is not None:
        note = f"answers {canary:g}% of the requests, version {serving} the rest"
    else:
        note = f"version {serving} serves"
    show_serving(as_json, name, version, serving, note)


@models_command("promote")
@click.argument("name")
@click.argument("number", metavar="[VERSION]", type=int, required=False)
@click.option("--version", type=int, help="Another way to give VERSION.")
@vet_option
@by_option
def models_promote(
    store: str, as_json: bool, name: str, number: int | None, version: int | None, vet_timeout: str | None
) -> None:
    """Make VERSION of the model NAME the one that serves.

    Without VERSION: the canary if there is one, else the newest version. A canary ends.

    \b
    Example:
      shorttail models promote fraud 2 --store store
    """
    from shorttail.registry import versions as registry

    if number is not None and version is not None:
        raise click.UsageError("give the version once", click.get_current_context())
    with opened(store) as target:
        before = registry.promote(target, name, version if number is None else number, vet_timeout)
        serving = target.catalog.model(name).current
    show_serving(as_json, name, serving, serving, f"serves (before: version {before})")


@models_command("rollback")
@click.argument("name")
@vet_option
@by_option
def models_rollback(store: str, as_json: bool, name: str, vet_timeout: str | None) -> None:
    """Make the previous version of the model NAME serve again.

    A canary ends. To end only the canary: `shorttail models canary NAME=off`.

    \b
    Example:
      shorttail models rollback fraud --store store
    """
    from shorttail.registry import versions as registry

    with opened(store) as target:
        version = registry.rollback(target, name, vet_timeout)
    show_serving(as_json, name, version, version, "serves again")


@models_command("canary")
@click.argument("share", metavar="NAME=10%|NAME=off")
@click.option("--version", type=int, help="Version to use; without it, the present canary, else the newest version.")
@vet_option
@by_option
def models_canary(store: str, as_json: bool, share: str, version: int | None, vet_timeout: str | None) -> None:
    """Let a version answer a percentage of the requests.

    A hash of the entity keys chooses the requests, so an entity gets the same version every time. 0% or
    off ends the canary; `promote` makes it the version that serves.

    \b
    Example:
      shorttail models canary fraud=10% --store store
      shorttail models canary fraud=off --store store
    """
    from shorttail.registry import versions as registry

    name, equals, percent = share.partition("=")
    if not name or not equals:
        raise click.UsageError(f"{share!r}: write NAME=10% or NAME=off", click.get_current_context())
    with opened(store) as target:
        canary = registry.set_canary(target, name, parse_share(percent), version, vet_timeout)
        serving = target.catalog.model(name).current
    show_share(as_json, name, serving, "canary", canary, "answers {:g}% of the requests, version {} the rest")


@models_command("shadow")
@click.argument("name")
@click.option("--version", type=int, help="Version to run as the shadow.")
@click.option(
    "--percent",
    metavar="PERCENT",
    show_default="100%",
    callback=parse_percent,
    help="Percentage of the batches to run it on.",
)
@click.option("--off", is_flag=True, help="End the shadow.")
@vet_option
@by_option
def models_shadow(
    store: str,
    as_json: bool,
    name: str,
    version: int | None,
    percent: float | None,
    off: bool,
    vet_timeout: str | None,
) -> None:
    """Run a version beside the one that serves, and compare their answers.

    After a server has sent its answers, it runs the shadow on the same requests, and counts the answers
    that differ. The shadow's answers are never returned; the server's `models` method returns the counts.

    \b
    Example:
      shorttail models shadow fraud --version 3 --store store
      shorttail models shadow fraud --off --store store
    """
    from shorttail.registry import versions as registry

    if off == (version is not None):
        raise click.UsageError("give either --version N or --off", click.get_current_context())
    with opened(store) as target:
        shadow = registry.set_shadow(target, name, version, 100.0 if percent is None else percent, vet_timeout)
        serving = target.catalog.model(name).current
    show_share(as_json, name, serving, "shadow", shadow, "runs on {:g}% of the requests that version {} answers")


def show_share(as_json: bool, name: str, serving: int, what: str, share: Share | None, text: str) -> None:
    """Print the present canary or shadow. what: "canary" or "shadow"; text: filled with percent and version."""
    if as_json:
        return print_json({"name": name, "serving": serving, what: share.to_json() if share else None})
    if share is None:
        click.echo(f"{name}: no {what}; version {serving} serves")
    else:
        click.echo(f"{name} version {share.version}: {text.format(share.percent, serving)}")


def show_serving(as_json: bool, name: str, version: int, serving: int, note: str) -> None:
    if as_json:
        return print_json({"name": name, "version": version, "serving": serving})
    click.echo(f"{name} version {version}: {note}")
