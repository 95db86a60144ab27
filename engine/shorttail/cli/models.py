"""`shorttail models`: versions of models and which of them serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shorttail.cli.options import json_option, opened
from shorttail.cli.output import print_json, print_table
from shorttail.errors import ShorttailError

if TYPE_CHECKING:
    from shorttail.define.catalog import Share
    from shorttail.store import Store

F = TypeVar("F", bound=Callable[..., Any])


@click.group(invoke_without_command=True)
@click.option("--store", metavar="STORE", help="Folder of the online store.")
@json_option
@click.pass_context
def models(context: click.Context, store: str | None, as_json: bool) -> None:
    """List models; choose which version serves.

    \b
    Example:
      shorttail models --store store
      shorttail models show fraud --store store
      shorttail models deploy fraud fraud-new.onnx --store store
      shorttail models canary fraud=10% --store store
      shorttail models rollback fraud --store store
    """
    if context.invoked_subcommand is None:
        context.invoke(models_list, store=store, as_json=as_json)


def models_command(name: str) -> Callable[[F], click.Command]:
    """A command of `models`; --store may stand before or after its name."""

    def decorate(function: F) -> click.Command:
        option = click.option("--store", callback=inherited_store, metavar="STORE", help="Folder of the online store.")
        return models.command(name)(option(json_option(function)))

    return decorate


def inherited_store(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value or (context.parent.params.get("store") if context.parent else None)


def required_store(store: str | None) -> str:
    if store is None:
        raise click.UsageError("Missing option '--store'.", click.get_current_context())
    return store


def parse_share(text: str) -> float:
    """ "10%" as 10.0, and "off" as 0.0."""
    if text == "off":
        return 0.0
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not text.endswith("%") or not 0 <= percent <= 100:
        raise click.UsageError(f"{text!r} is no share; write 10%, 0.5% or off", click.get_current_context())
    return percent


def parse_percent(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    return None if value is None else parse_share(value)


def parse_metrics(given: tuple[str, ...]) -> dict[str, float]:
    metrics = {}
    for item in given:
        name, _, number = item.partition("=")
        try:
            metrics[name] = float(number)
        except ValueError:
            raise click.UsageError(f"{item!r}: write --metric NAME=NUMBER", click.get_current_context()) from None
    return metrics


@models_command("list")
def models_list(store: str | None, as_json: bool) -> None:
    """List every version of every model; `*` marks the one that serves.

    Beside it a canary has its share of the requests, and a shadow its share of what is compared. `runs` says
    what runs those, and why: a compiled forest, or ONNX Runtime.

    \b
    Example:
      shorttail models list --store store
    """
    from shorttail.registry import versions as registry

    with opened(required_store(store)) as target:
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
            f"{v['version']}{'*' * v['serving']}{part(v)}",
            v["created"],
            len(v["columns"]),
            ", ".join(v["outputs"]),
            v["runs"],
        ]
        for v in versions
    ]
    print_table(header, rows)


def part(version: dict[str, Any]) -> str:
    """ " canary 10%", for the version that is one."""
    shares = ((what, version[what]) for what in ("canary", "shadow"))
    return "".join(f" {what} {percent:g}%" for what, percent in shares if percent is not None)


def runs_as(store: Store, name: str, version: int) -> str:
    """What runs a version here, and why; or why nothing does."""
    from shorttail.models.load import load_runner
    from shorttail.models.settings import tuned
    from shorttail.store.files import model_path

    info = store.catalog.model(name).version(version)
    outputs = [tensor.name for tensor in info.outputs]
    try:
        return load_runner(model_path(store.path, name, version), outputs, tuned(info.tuning)[0]).description
    except ShorttailError as error:
        return f"nothing: {error.message}"


@models_command("show")
@click.argument("name")
@click.option("--version", type=int, help="A version other than the one that serves.")
def models_show(store: str | None, as_json: bool, name: str, version: int | None) -> None:
    """Show one version of a model: what feeds it, what runs it and why, and what a batch costs.

    The costs are measured now, on this host.

    \b
    Example:
      shorttail models show fraud --store store
    """
    from shorttail.engine import Engine
    from shorttail.models.settings import tuned
    from shorttail.registry.versions import describe

    with Engine.open(required_store(store)) as engine:
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
        click.echo(f"{label + ':' * bool(label):<13}{value}")
    click.echo("")
    print_table(["rows", "us a batch", "us a row"], [[n, us, round(us / n, 3)] for n, us in shown["us"].items()])


def show_lines(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what `models show` prints; long lists go on in lines of their own."""
    lines = [
        ("model", f"{shown['name']} version {shown['version']}{' (serves)' * shown['serving']}{part(shown)}"),
        ("versions", ", ".join(map(str, shown["versions"]))),
        ("created", shown["created"]),
        ("sha256", shown["sha256"]),
        ("description", shown["description"]),
        ("owner", shown["owner"]),
        ("run", shown["run"]),
        ("metrics", ", ".join(f"{name} {number:g}" for name, number in shown["metrics"].items())),
    ]
    for tensor, columns in shown["inputs"].items():
        lines += [(f"input {tensor}" if i == 0 else "", column) for i, column in enumerate(columns)]
    lines += [
        ("outputs", ", ".join(shown["outputs"])),
        ("features", ", ".join(shown["features"]) or "none"),
        ("request", ", ".join(f"{column} {dtype}" for column, dtype in shown["columns"].items())),
        ("runs", shown["runs"]),
        ("tuning", shown["tuning"] or "none; `shorttail tune` measures what is best on this host"),
        ("on the loop", f"batches of up to {shown['loop_rows_max']} rows; larger ones would stall it"),
    ]
    return [(label, value) for label, value in lines if value]


@models_command("deploy")
@click.argument("name")
@click.argument("path")
@click.option("--no-promote", is_flag=True, help="Register it, but let the current version go on serving.")
@click.option(
    "--canary", metavar="10%", callback=parse_percent, help="Let it answer so much, the current one the rest."
)
@click.option("--owner", help="Who looks after it; unless given that of the current version.")
@click.option("--description", help="What it is; unless given that of the current version.")
@click.option("--run", default="", metavar="LINK", help="Its training run: mlflow:ID or any URL.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="What it was measured at; repeat it.")
def models_deploy(
    store: str | None,
    as_json: bool,
    name: str,
    path: str,
    no_promote: bool,
    canary: float | None,
    owner: str | None,
    description: str | None,
    run: str,
    metrics: tuple[str, ...],
) -> None:
    """Register an ONNX file as the next version.

    PATH becomes the next version of the model NAME and serves. It takes the same inputs as the current
    version; to change them, edit the definitions and apply. It is loaded and run first; a file that fails
    is not registered.

    \b
    Example:
      shorttail models deploy fraud fraud-new.onnx --store store
      shorttail models deploy fraud fraud-new.onnx --store store --canary 10% --run mlflow:3f2a --metric auc=0.91
    """
    from shorttail.models.serving import run_at_low_priority
    from shorttail.registry import versions as registry

    if canary == 0:
        raise click.UsageError("--canary 0%: leave a version idle with --no-promote", click.get_current_context())
    about: dict[str, Any] = {"owner": owner, "description": description, "run": run, "metrics": parse_metrics(metrics)}
    with opened(required_store(store)) as target:
        before = target.catalog.model(name).current
        # This host may be serving, and checking a model takes a CPU for a while.
        version = run_at_low_priority(
            lambda: registry.deploy(target, name, path, not no_promote, canary_percent=canary, **about)
        )
        serving = target.catalog.model(name).current
    if version == before:
        note = "unchanged: it is that file already"
    elif canary is not None:
        note = f"answers {canary:g}% of the requests, version {serving} the rest"
    else:
        note = f"version {serving} serves"
    show_serving(as_json, name, version, serving, note)


@models_command("promote")
@click.argument("name")
@click.argument("number", metavar="[VERSION]", type=int, required=False)
@click.option("--version", type=int, help="The same as VERSION.")
def models_promote(store: str | None, as_json: bool, name: str, number: int | None, version: int | None) -> None:
    """Let VERSION of the model NAME serve.

    Without VERSION: its canary, or else its newest version. A canary ends.

    \b
    Example:
      shorttail models promote fraud 2 --store store
    """
    from shorttail.registry import versions as registry

    if number is not None and version is not None:
        raise click.UsageError("give the version once", click.get_current_context())
    with opened(required_store(store)) as target:
        before = registry.promote(target, name, version if number is None else number)
        serving = target.catalog.model(name).current
    show_serving(as_json, name, serving, serving, f"serves (before: version {before})")


@models_command("rollback")
@click.argument("name")
def models_rollback(store: str | None, as_json: bool, name: str) -> None:
    """Let the version of the model NAME serve that served before.

    A canary ends. To end only that: `shorttail models canary NAME=off`.

    \b
    Example:
      shorttail models rollback fraud --store store
    """
    from shorttail.registry import versions as registry

    with opened(required_store(store)) as target:
        version = registry.rollback(target, name)
    show_serving(as_json, name, version, version, "serves again")


@models_command("canary")
@click.argument("share", metavar="NAME=10%|NAME=off")
@click.option("--version", type=int, help="Of the canary; unless given the one there is, or the newest version.")
def models_canary(store: str | None, as_json: bool, share: str, version: int | None) -> None:
    """Let a version answer a part of the requests.

    Which ones is decided by their entity keys: an entity gets the same version every time. 0% or off ends
    it; `promote` makes the canary the version that serves.

    \b
    Example:
      shorttail models canary fraud=10% --store store
      shorttail models canary fraud=off --store store
    """
    from shorttail.registry import versions as registry

    name, equals, percent = share.partition("=")
    if not name or not equals:
        raise click.UsageError(f"{share!r}: write NAME=10% or NAME=off", click.get_current_context())
    with opened(required_store(store)) as target:
        canary = registry.set_canary(target, name, parse_share(percent), version)
        serving = target.catalog.model(name).current
    show_part(as_json, name, serving, "canary", canary, "answers {:g}% of the requests, version {} the rest")


@models_command("shadow")
@click.argument("name")
@click.option("--version", type=int, help="The version to run.")
@click.option("--percent", metavar="100%", callback=parse_percent, help="Of the batches; all unless given.")
@click.option("--off", is_flag=True, help="End it.")
def models_shadow(
    store: str | None, as_json: bool, name: str, version: int | None, percent: float | None, off: bool
) -> None:
    """Run a version beside the one that serves, and compare.

    A server runs it on what it has answered, after the answers are sent. Its answers are compared and counted,
    never returned: `models` of the server tells the counts.

    \b
    Example:
      shorttail models shadow fraud --version 3 --store store
      shorttail models shadow fraud --off --store store
    """
    from shorttail.registry import versions as registry

    if off == (version is not None):
        raise click.UsageError("give either --version N or --off", click.get_current_context())
    with opened(required_store(store)) as target:
        shadow = registry.set_shadow(target, name, version, 100.0 if percent is None else percent)
        serving = target.catalog.model(name).current
    show_part(as_json, name, serving, "shadow", shadow, "runs on {:g}% of what version {} answers")


def show_part(as_json: bool, name: str, serving: int, what: str, share: Share | None, text: str) -> None:
    """A canary or a shadow as it is now."""
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
