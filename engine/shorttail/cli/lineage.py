"""`shorttail lineage`: what a source, a view, a feature or a model comes from, and what comes from it."""

from __future__ import annotations

import click

from shorttail.cli.options import json_option, opened, store_option
from shorttail.cli.output import print_json


@click.command()
@click.argument("name")
@store_option
@click.option(
    "--format", "kind", type=click.Choice(["text", "dot", "mermaid"]), default="text", show_default=True, help="Output."
)
@json_option
def lineage(name: str, store: str, kind: str, as_json: bool) -> None:
    """Show what NAME comes from, and what comes from it.

    NAME is the path of a source, an entity, an alias, a view, VIEW:FEATURE, request:COLUMN, an on-demand
    function, a model, or MODEL@VERSION. The way is from sources to views, features, functions, models and
    their versions.

    \b
    Example:
      shorttail lineage user_stats:tier --store store
      shorttail lineage fraud --format dot --store store | dot -Tsvg > fraud.svg
    """
    from shorttail.registry.lineage import lineage as lineage_of

    if as_json and kind != "text":
        raise click.UsageError(f"--json and --format {kind} contradict each other", click.get_current_context())
    with opened(store) as target:
        found = lineage_of(target.catalog, name)
    if as_json:
        return print_json(found.to_dict())
    click.echo({"text": found.text, "dot": found.dot, "mermaid": found.mermaid}[kind]())
