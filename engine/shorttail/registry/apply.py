"""Registers the definitions of a file in a store: all of them, or none if any of them is wrong.

Views and models that the file does not mention stay as they are, unless they are pruned. The tables of views whose rows
change are made first, beside those that serve (store/rebuild.py). Then one commit changes all that the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from shorttail.define import clock
from shorttail.define.catalog import Catalog
from shorttail.define.collect import Definitions, collect
from shorttail.define.identity import Definition
from shorttail.errors import InvalidArgument
from shorttail.models.signature import ModelFile
from shorttail.models.trial import trial_limit_s
from shorttail.models.vetting import vet
from shorttail.ondemand.trust import functions_of, note_known
from shorttail.registry import versions as registry
from shorttail.registry.changes import Change, plural
from shorttail.registry.examples import read_examples
from shorttail.registry.history import line
from shorttail.registry.planning import ChangePlan, NewTable, Options, Prepared, plan_changes
from shorttail.store.load import Budget
from shorttail.store.mapping import size_text
from shorttail.store.preparing import wait_until_ready
from shorttail.store.rebuild import Filling, Rebuild, rebuilding

if TYPE_CHECKING:
    from shorttail.store import Store

ROWS_PER_S: Final = 1_000_000  # of a load, to say about how long it takes
SAMPLE_ROWS: Final = 65_536  # whose event times are looked at
WAIT_S: Final = 60.0

Progress = Callable[[int], object]  # receives the number of rows done since its last call


def prepare(definitions: Any, vet_timeout: str | timedelta | None = None) -> Prepared:
    """Collect definitions (a file's path, objects, or Definitions), read their files, compile their functions.

    This makes every check that needs no store. vet_timeout: as for `apply`. Raises NotFound, InvalidArgument.
    """
    vet_s = trial_limit_s(vet_timeout)
    collected = collect(definitions)
    files = {name: ModelFile.read(model.path, name, vet_s) for name, model in collected.models.items()}
    compile_functions(collected)
    return Prepared(collected, files)


def plan(store: Store, definitions: Any, options: Options | None = None) -> ChangePlan:
    """Return what `apply` would change, with the sizes of the tables that it would make. Writes nothing.

    Raises NotFound or InvalidArgument if the definitions cannot be read; what is wrong with them beside the store is
    among the errors of the plan.
    """
    prepared = definitions if isinstance(definitions, Prepared) else prepare(definitions)
    store.refresh()
    found = plan_changes(store.catalog.copy(), prepared, store.count, options)
    if not found.errors:
        estimate(store, found)
    return found


def apply(
    store: Store,
    definitions: Any,
    dry_run: bool = False,
    vet_timeout: str | timedelta | None = None,
    options: Options | None = None,
    plan_id: str = "",
    progress: Progress | None = None,
    memory_bytes: int | None = None,
) -> list[Change]:
    """Register definitions. Returns the changes, in order.

    definitions: what `prepare` takes, or what it returned. dry_run: return the changes and write nothing. vet_timeout:
    how long a trial of a model's file may take ("10m"; LIMITS.vet_s by default); the process that tries it is killed
    then. plan_id: the first digits of the id of the plan that must be carried out, and no other. progress,
    memory_bytes: of the loads of new tables, as for store.load.

    Raises NotFound, InvalidArgument, Internal (a model fails when it runs), DeadlineExceeded (its trial takes too long)
    or ResourceExhausted (too many views, too little memory) for the first error found; nothing is written then.
    """
    prepared = definitions if isinstance(definitions, Prepared) else prepare(definitions, vet_timeout)
    if dry_run:
        store.refresh()
    else:
        see_last_commit(store)
    first = checked(plan_changes(store.catalog.copy(), prepared, store.count, options), plan_id)
    vet_new(first, prepared)
    if dry_run or (first.catalog == store.catalog and not prepared.vetted):
        return first.changes + prepared.warnings
    budget = Budget.of(memory_bytes)
    if first.tables:
        with rebuilding(store.environment, budget, progress) as work:
            for name, table in first.tables.items():
                fill(store, work, first.catalog.read_definition(name), table)
            work.make_ready()
            done = commit(store, prepared, options, plan_id, first, work)
    else:
        done = commit(store, prepared, options, plan_id, first, None)
    store.refresh()
    return done.changes + prepared.warnings


def see_last_commit(store: Store) -> None:
    """Move to the newest snapshot, also if its writer was killed right after the commit.

    Readers miss such a commit until a write begins. Without this, the plan would be made without the commit, and then
    be refused because the store was changed meanwhile.
    """
    with store.environment.write():
        pass
    store.refresh(force=True)


def checked(found: ChangePlan, plan_id: str) -> ChangePlan:
    """Return a plan that can be carried out and is the one that was asked for. Raises its first error."""
    if found.errors:
        raise found.errors[0]
    if plan_id and not found.id.startswith(plan_id):
        raise InvalidArgument(
            f"plan {plan_id} is not what would be done now: the store, the definitions or their files have changed, or"
            " there was no such plan; see `shorttail plan`"
        )
    return found


def fill(store: Store, work: Rebuild, read: Definition, table: NewTable) -> None:
    """Fill the new table of a view with its stored rows, and with those of its source. read: how that is read."""
    view = table.change.after.view
    rows = Filling(table.change.after, carried=table.carried, extra=table.extra, was=table.change.was)
    if table.reads and view.source is not None:
        from shorttail.sources.batches import open_source, row_batches

        source, skew_us = open_source(view.source.path, read.view), store.catalog.max_clock_skew_us
        batches = row_batches(source, read.view, view.timestamp, skew_us, needed_features=len(view.features))
        rows = replace(rows, batches=batches, read=read)
    work.fill(table.before, rows)


def commit(
    store: Store, prepared: Prepared, options: Options | None, plan_id: str, first: ChangePlan, work: Rebuild | None
) -> ChangePlan:
    """Carry a plan out in one commit. It is made again, because another process may have committed meanwhile.

    The files are in memory and checked, and the tables are made, so this is quick. first: the plan that the tables were
    made for. Raises InvalidArgument if it does not hold any more.
    """
    detail: dict[str, Any] = dict(prepared.definitions.origin)

    def count(view: str) -> int:
        return first.tables[view].rows if view in first.tables else store.count(view)

    with edited(store, work, detail) as latest:
        before = latest.copy()
        done = checked(plan_changes(latest, prepared, count, options), plan_id)
        if done.tables.keys() != first.tables.keys() or any(
            (now.before, now.change.after, now.extra) != (then.before, then.change.after, then.extra)
            for now, then in zip(done.tables.values(), first.tables.values(), strict=True)
        ):
            last = store.history()[-1]
            raise InvalidArgument(
                f"the store was changed while {', '.join(first.tables) or 'the definitions'} was prepared"
                f" ({last.who} {line(last)}); look at `shorttail plan`, and apply again"
            )
        for name in done.tables:
            assert work is not None
            work.put_in_place(latest, name, keep=False)
        vet_new(done, prepared)
        detail["changes"] = [[each.kind, each.what, each.detail] for each in done.changes if each.kind in "+~-"]
        for name, vetted in prepared.vetted.items():
            entry = latest.models[name]
            latest.models[name] = registry.with_examined(entry, entry.current, vetted)
        for name, number in done.new_versions.items():
            info = latest.models[name].version()
            registry.write_version(store.path, number, info, prepared.files[name], prepared.golden[name])
        gone = before.models.keys() - latest.models.keys()
    for name in gone:  # processes that serve them have them in memory
        registry.remove_files(store.path, name)
    return done


@contextmanager
def edited(store: Store, work: Rebuild | None, detail: dict[str, Any]) -> Iterator[Catalog]:
    """Yield a copy of the newest catalog, which is committed at the end of the block."""
    if work is None:
        with store.edit_catalog("applied", "", detail) as catalog:
            yield catalog
    else:
        with work.swap(store.event("applied", "", detail)) as catalog:
            yield catalog


def estimate(store: Store, found: ChangePlan) -> None:
    """Add to a plan how many rows new tables take, and how many rows another time to live makes stale."""
    lines: dict[str, list[str]] = {}
    for name, table in found.tables.items():
        with store.reading():
            directory = store.directory(name)
            stored_bytes = 0 if directory is None else directory.measure()[2]
        rows = table.rows if table.carried else 0
        source = table.change.after.view.source
        if table.reads and source is not None:
            from shorttail.sources.batches import open_source

            rows += open_source(source.path, table.change.after.view).rows or 0
        size = stored_bytes * max(1, rows) / max(1, table.rows) / (1 + (table.carried and table.reads))
        seconds = max(1, round(rows / ROWS_PER_S))
        lines[name] = [f"{plural(rows, 'row')} to write, about {seconds} s, {size_text(int(size))}"]
    for change in found.changes:
        kind, _, name = change.what.partition(" ")
        if kind == "view" and change.kind == "~" and name in store.catalog.views:
            before, after = store.catalog.views[name].ttl_us, found.catalog.views[name].ttl_us
            if before != after and (text := stale_text(store, name, before, after)):
                lines.setdefault(name, []).append(text)
    found.changes[:] = [
        replace(each, more=(*lines[each.what[5:]], *each.more))
        if each.kind == "~" and each.what.startswith("view ") and each.what[5:] in lines
        else each
        for each in found.changes
    ]


def stale_text(store: Store, name: str, before_us: int, after_us: int) -> str:
    """Say which share of a view's rows another time to live makes STALE or fresh, by a sample; "" if it has no rows."""
    n = stale_before = stale_after = 0
    now_us = clock.now_us()
    with store.open_scan(name, lambda view: [len(view.keys)]) as scan:
        for (times,) in scan:
            n += times.n
            stale_before += int((times.values < now_us - before_us).sum()) if before_us else 0
            stale_after += int((times.values < now_us - after_us).sum()) if after_us else 0
            if n >= SAMPLE_ROWS:
                break
    if not n:
        return ""
    word = "become STALE" if stale_after >= stale_before else "are STALE no more"
    return f"about {abs(stale_after - stale_before) / n:.1%} of {n:,} sampled rows {word}"


def wait_for_readers(store: Store) -> bool:
    """Wait until every process that has the store open answers from the newest commit. Return False after WAIT_S."""
    return wait_until_ready(store.environment, WAIT_S)


def vet_new(plan: ChangePlan, prepared: Prepared) -> None:
    """Load, warm, check and examine every version that is new, or that an older release left unexamined.

    Raises InvalidArgument or Internal for one that cannot serve.
    """
    for name, file in prepared.files.items():
        entry = plan.catalog.models[name]
        if name not in prepared.vetted and entry.version().batching_why is None:
            said: list[str] = []
            golden = prepared.golden[name] = read_examples(plan.catalog, entry.version())
            with file.on_disk() as path:
                prepared.vetted[name] = vet(
                    plan.catalog, entry.version(), entry.current, path, said.append, golden, file.vet_s
                )
            prepared.warnings.extend(Change("!", f"model {name}", text) for text in said)


def compile_functions(definitions: Definitions) -> None:
    """Compile every on-demand function once. Raises InvalidArgument for a function that does not compile."""
    functions = dict.fromkeys(function for model in definitions.models.values() for function in functions_of(model))
    if functions:
        from shorttail.ondemand.compile import compile_on_demand

        for function in functions:
            compile_on_demand(function)
        note_known(functions)  # they are the user's own
