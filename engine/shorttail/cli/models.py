"""`shorttail models`: versions of models and which of them serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shorttail.cli.options import json_option, opened
from shorttail.cli.values import print_json, print_table
from shorttail.errors import ShorttailError

if TYPE_CHECKING:
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


@models_command("list")
def models_list(store: str | None, as_json: bool) -> None:
    """List every version of every model; `*` marks the one that serves.

    `runs` says what runs those, and why: a compiled forest, or ONNX Runtime.

    \b
    Example:
      shorttail models list --store store
    """
    from shorttail.models import registry

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
            f"{v['version']}{'*' * v['serving']}",
            v["created"],
            len(v["columns"]),
            ", ".join(v["outputs"]),
            v["runs"],
        ]
        for v in versions
    ]
    print_table(header, rows)


def runs_as(store: Store, name: str, version: int) -> str:
    """What runs a version here, and why; or why nothing does."""
    from shorttail.models.load import load
    from shorttail.models.registry import model_path
    from shorttail.models.settings import tuned

    info = store.catalog.model(name).version(version)
    outputs = [tensor.name for tensor in info.outputs]
    try:
        return load(model_path(store.path, name, version), outputs, tuned(info.tuning)[0]).description
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
    from shorttail.models.registry import describe
    from shorttail.models.settings import tuned

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
        ("model", f"{shown['name']} version {shown['version']}{' (serves)' * shown['serving']}"),
        ("versions", ", ".join(map(str, shown["versions"]))),
        ("created", shown["created"]),
        ("sha256", shown["sha256"]),
        ("description", shown["description"]),
        ("owner", shown["owner"]),
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
def models_deploy(store: str | None, as_json: bool, name: str, path: str, no_promote: bool) -> None:
    """Register an ONNX file as the next version.

    PATH becomes the next version of the model NAME and serves. It takes the same inputs as the current
    version; to change them, edit the definitions and apply.

    \b
    Example:
      shorttail models deploy fraud fraud-new.onnx --store store
    """
    from shorttail.models import registry

    with opened(required_store(store)) as target:
        before = target.catalog.model(name).current
        version = registry.deploy(target, name, path, promote=not no_promote)
    serving = before if no_promote else version
    note = "unchanged: it is that file already" if version == before else f"version {serving} serves"
    show_serving(as_json, name, version, serving, note)


@models_command("promote")
@click.argument("name")
@click.argument("version", type=int)
def models_promote(store: str | None, as_json: bool, name: str, version: int) -> None:
    """Let VERSION of the model NAME serve.

    \b
    Example:
      shorttail models promote fraud 2 --store store
    """
    from shorttail.models import registry

    with opened(required_store(store)) as target:
        before = registry.promote(target, name, version)
    show_serving(as_json, name, version, version, f"serves (before: version {before})")


@models_command("rollback")
@click.argument("name")
def models_rollback(store: str | None, as_json: bool, name: str) -> None:
    """Let the version of the model NAME serve that served before.

    \b
    Example:
      shorttail models rollback fraud --store store
    """
    from shorttail.models import registry

    with opened(required_store(store)) as target:
        version = registry.rollback(target, name)
    show_serving(as_json, name, version, version, "serves again")


def show_serving(as_json: bool, name: str, version: int, serving: int, note: str) -> None:
    if as_json:
        return print_json({"name": name, "version": version, "serving": serving})
    click.echo(f"{name} version {version}: {note}")
