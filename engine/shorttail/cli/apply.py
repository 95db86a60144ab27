"""`shorttail plan` and `shorttail apply`: what a definitions file changes in a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shorttail.cli.caller import DefinitionsFile
from shorttail.cli.options import by_option, json_option, opened, progress_bar, vet_option
from shorttail.cli.output import echo_line, print_json
from shorttail.cli.store_settings import as_duration, skew_change
from shorttail.cli.where import store_or_server
from shorttail.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from shorttail.registry.changes import Change
    from shorttail.registry.planning import ChangePlan

CHANGES_CODE: Final = 3  # the exit status of `plan --check` if there are changes
ID_DIGITS: Final = 8  # of a plan, as they are shown

prune_option = click.option(
    "--prune", is_flag=True, help="Remove views and models that the file lacks, and rows that fit no view any more."
)
accept_option = click.option(
    "--accept", is_flag=True, help="Let models that are not deployed anew take changed definitions too."
)
explain_option = click.option("--explain", is_flag=True, help="Say which id of a view each difference changes.")


@click.command()
@click.argument("definitions", type=DefinitionsFile())
@store_or_server
@prune_option
@accept_option
@explain_option
@click.option("--check", is_flag=True, help=f"Exit with status {CHANGES_CODE} if there are changes.")
@json_option
def plan(definitions: Any, store: str, prune: bool, accept: bool, explain: bool, check: bool, as_json: bool) -> int:
    """Show what `apply` would change, and write nothing.

    DEFINITIONS is a Python file. A line begins with + for what is new, ~ for what changes, = for what stays,
    - for what the file does not mention, and ! for what is wrong. `9c02 is built beside a41f` says that the
    rows of a view change: it gets a new table, and the old one serves until that is complete.

    \b
    Example:
      shorttail plan definitions.py --store store
      shorttail plan definitions.py --store store --check --explain
    """
    from shorttail.registry import apply as applying
    from shorttail.registry.planning import Options

    prepared, options = applying.prepare(definitions), Options(prune, accept, explain)
    with opened(store) as target:
        found = applying.plan(target, prepared, options)
    changed = is_changed(found.changes)
    if as_json:
        errors = [error.message for error in found.errors]
        print_json({"store": store, "plan": found.id, "errors": errors, **listed(found.changes + found.kept)})
    else:
        show(found.changes + found.kept)
        click.echo(summary(found))
        if changed and not found.errors:
            click.echo(f"`shorttail apply --plan {found.id[:ID_DIGITS]}` does exactly this or nothing")
    return 1 if found.errors else CHANGES_CODE if check and changed else 0


def summary(found: ChangePlan) -> str:
    """Return what a plan does, in numbers."""
    made, errors = len(found.tables), len(found.errors)
    in_place = sum(each.kind in "+~" and each.what.partition(" ")[2] not in found.tables for each in found.changes)
    destroyed = sum(is_removal(each) for each in found.changes)
    return (
        f"plan {found.id[:ID_DIGITS]}: {made} new table{'s' * (made != 1)}, {in_place} in place, {destroyed} destroyed,"
        f" {errors} error{'s' * (errors != 1)}"
    )


def is_removal(change: Change) -> bool:
    return change.kind == "-"


def is_changed(changes: list[Change]) -> bool:
    """Whether a change adds, changes or removes something; lines for what stays or is kept do not count."""
    return any(each.kind in "+~" or is_removal(each) for each in changes)


def listed(changes: list[Change]) -> dict[str, Any]:
    return {"changes": [change.to_json() for change in changes]}


def show(changes: list[Change]) -> None:
    """Print changes, a line each, with further lines below it."""
    width = max((len(change.what) for change in changes), default=0)
    for change in changes:
        echo_line(f"{change.kind} {change.what:<{width}}  {change.detail}".rstrip())
        for line in change.more:
            echo_line(f"    {line}")


@click.command()
@click.argument("definitions", type=DefinitionsFile())
@store_or_server
@click.option("--create", is_flag=True, help="Make the store if there is none.")
@click.option("--plan", "plan_id", metavar="ID", default="", help="Do what this plan says, or nothing.")
@click.option("--dry-run", is_flag=True, help="Show the changes and write nothing.")
@prune_option
@accept_option
@explain_option
@click.option("--wait", is_flag=True, help="Return when all processes that use the store answer from the new state.")
@click.option(
    "--max-clock-skew",
    "skew_us",
    metavar="TIME",
    callback=as_duration,
    help="Let event times be so far ahead of the clock, such as 5m; a new store allows 1h.",
)
@vet_option
@by_option
@json_option
def apply(
    definitions: Any,
    store: str,
    create: bool,
    plan_id: str,
    dry_run: bool,
    prune: bool,
    accept: bool,
    explain: bool,
    wait: bool,
    skew_us: int | None,
    vet_timeout: str | None,
    as_json: bool,
) -> None:
    """Register the views and models of a definitions file.

    DEFINITIONS is a Python file. All of its definitions are registered, or none if any of them is wrong.
    Views and models that the file does not mention are kept. A view whose rows change gets a new table,
    filled from the old one and from the view's source; the old one serves until then, and pushes go to both.

    \b
    Example:
      shorttail apply definitions.py --store store --create
      shorttail apply definitions.py --store store --plan 5be1d0c2 --wait
    """
    from shorttail.define.catalog import Catalog
    from shorttail.registry import apply as applying
    from shorttail.registry.planning import Options, plan_changes

    options = Options(prune, accept, explain)
    prepared, before = applying.prepare(definitions, vet_timeout), Catalog()
    is_new, arrived = not Path(store).exists(), True
    if is_new:
        if not create:
            raise NotFound(f"there is no store at {store}; look at --store, or give --create to make one")
        # The definitions are checked against an empty catalog first, so that wrong ones create no folder.
        first = applying.checked(plan_changes(Catalog(), prepared, lambda view: 0, options), plan_id)
        applying.vet_new(first, prepared)
        changes = first.changes + prepared.warnings
    if not (is_new and dry_run):
        with opened(store, create=create or is_empty(store)) as target:
            before = target.catalog
            with progress_bar("rows") as progress:
                report = counted(progress)
                changes = applying.apply(target, prepared, dry_run, None, options, plan_id, report)
            if skew_us is not None and not dry_run:
                target.set_max_clock_skew(skew_us)
            arrived = dry_run or not wait or applying.wait_for_readers(target)
    if skew_us is not None:
        changes.append(skew_change(before, skew_us))
    if as_json:
        print_json({"store": store, "dry_run": dry_run, **listed(changes)})
    else:
        show(changes)
        count = sum(change.kind in "+~" or is_removal(change) for change in changes)
        text = f"{count} change{'' if count == 1 else 's'}" if count else "no changes"
        click.echo(f"{text}; dry run, nothing written" if dry_run else f"{store}: {text}")
    if not arrived:
        raise InvalidArgument(
            f"the changes are made, but after {applying.WAIT_S:g} s a process still reads {store} as it was before;"
            " see `shorttail stat`"
        )


def is_empty(store: str) -> bool:
    """Whether a store's path is a folder with nothing in it."""
    path = Path(store)
    return path.is_dir() and not any(path.iterdir())


def counted(progress: Callable[[int, int | None], None]) -> Callable[[int], None]:
    """Return a function of the rows done since its last call, for one of all the rows done."""
    done = 0

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        progress(done, None)

    return report
