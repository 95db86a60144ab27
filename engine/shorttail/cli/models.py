"""`shorttail models`: versions of models and which of them serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from shorttail.cli.options import json_option, opened
from shorttail.cli.values import print_json, print_table

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

    \b
    Example:
      shorttail models list --store store
    """
    from shorttail.models import registry

    with opened(required_store(store)) as target:
        versions = registry.list_versions(target.catalog)
    if as_json:
        return print_json(versions)
    if not versions:
        click.echo("no models; register one with `shorttail apply`")
        return
    header = ["model", "version", "created", "columns", "outputs"]
    rows = [
        [v["name"], f"{v['version']}{'*' * v['serving']}", v["created"], len(v["columns"]), ", ".join(v["outputs"])]
        for v in versions
    ]
    print_table(header, rows)


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
