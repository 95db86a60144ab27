"""Plans what definitions change in a store: the new catalog, its differences, and the tables that must be made anew.

Planning writes nothing. `apply` (apply.py) does what a plan says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unicodedata import normalize

from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog, ModelEntry, VersionInfo
from shorttail.define.collect import Definitions
from shorttail.define.entities import Alias
from shorttail.define.identity import Definition, define, shown
from shorttail.define.models import Model
from shorttail.define.tables import Column, Stored
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted, ShorttailError
from shorttail.models.golden import GoldenRows
from shorttail.models.signature import ModelFile, check_inputs, column_width
from shorttail.registry import versions as registry
from shorttail.registry.changes import NO_KEYS, Change, ViewChange, plural, show_keys, users
from shorttail.registry.examples import digest

Count = Callable[[str], int]  # returns the number of rows of a view's table


@dataclass(frozen=True)
class Options:
    """What `plan` and `apply` may do beside adding and changing.

    prune: remove the views and models that the file does not mention, and rows that fit no new table. accept: move
    versions of models to the newest definitions, also where their answers change. explain: say what changed an id.
    """

    prune: bool = False
    accept: bool = False
    explain: bool = False


@dataclass(frozen=True)
class Prepared:
    """Definitions, and the content of the model files that they name."""

    definitions: Definitions
    files: dict[str, ModelFile]
    vetted: dict[str, VersionInfo] = field(default_factory=dict)  # versions that were loaded, run and examined
    warnings: list[Change] = field(default_factory=list)  # about these versions
    golden: dict[str, GoldenRows | None] = field(default_factory=dict)  # their examples

    def to_json(self) -> dict[str, Any]:
        """Return what these definitions say, for the id of a plan: not where the files of models are."""
        made = self.definitions
        features = [feature for view in made.views.values() for feature in view.features]
        return {
            "entities": [entity.to_json() for entity in made.entities.values()],
            "aliases": [alias.to_json() for alias in made.aliases.values()],
            "views": [view.to_json() for view in made.views.values()],
            "renamed": [[feature.name, feature.renamed_from] for feature in features],
            "models": [replace(model, path="x", examples=None).to_json() for model in made.models.values()],
            "files": [(self.files[name].sha256, digest(m.examples, name)) for name, m in made.models.items()],
        }


@dataclass(frozen=True)
class NewTable:
    """A view whose rows change. carried: its stored rows are kept. reads: its source is read."""

    before: Stored
    change: ViewChange
    rows: int
    carried: bool
    reads: bool
    extra: tuple[Column, ...] = ()


@dataclass
class ChangePlan:
    """The new catalog, its differences from the old one, and what must be written first.

    new_versions: model -> version. tables: view -> the table that it needs. empty: views whose rows change but have
    none, before the change. kept: views and models that the definitions do not have. errors: what makes the plan
    impossible.
    """

    catalog: Catalog
    changes: list[Change] = field(default_factory=list)
    new_versions: dict[str, int] = field(default_factory=dict)
    tables: dict[str, NewTable] = field(default_factory=dict)
    empty: dict[str, Stored] = field(default_factory=dict)
    kept: list[Change] = field(default_factory=list)
    errors: list[ShorttailError] = field(default_factory=list)
    id: str = ""

    def note(self, kind: str, what: str, detail: str = "", more: Iterable[str] = ()) -> None:
        self.changes.append(Change(kind, what, detail, tuple(more)))

    def fail(self, what: str, error: ShorttailError) -> None:
        self.errors.append(error)
        self.note("!", what, error.message)


def plan_changes(catalog: Catalog, prepared: Prepared, count: Count, options: Options | None = None) -> ChangePlan:
    """Change `catalog` to what the definitions say, and check all of it. Writes nothing to the store.

    The errors are those of the plan; with them, the catalog is half changed. Raises nothing for wrong definitions.
    """
    options = options or Options()
    definitions, plan = prepared.definitions, ChangePlan(catalog, id=plan_id(catalog, prepared, options))
    before, known = catalog.copy(), ({*catalog.views}, {*catalog.models})
    for name, entity in definitions.entities.items():
        keys = show_keys(entity)
        old = catalog.entities.get(name)
        plan.note("+" if old is None else "=" if old == entity else "~", f"entity {name}", keys)
        plan.catalog.entities[name] = entity
    _try(plan, "aliases", lambda: plan_aliases(plan, definitions))
    changed: dict[str, ViewChange] = {}
    for view in definitions.views.values():
        _try(plan, f"view {view.name}", partial(plan_view, plan, changed, view, count, options))
    if len(plan.catalog.views) > LIMITS.views:
        n_views = len(plan.catalog.views)
        plan.fail("views", ResourceExhausted(f"a store holds at most {LIMITS.views} feature views, not {n_views}"))
    if options.prune:
        prune_models(plan, definitions)
    for model in definitions.models.values():
        _try(plan, f"model {model.name}", partial(plan_model, plan, model, prepared.files[model.name]))
    if options.prune and not plan.errors:
        prune_views(plan, definitions)
    _try(plan, "views", lambda: check_folders("feature view", plan.catalog.views, known[0]))
    _try(plan, "models", lambda: check_folders("model", plan.catalog.models, known[1]))
    for name in plan.catalog.aliases.keys() & plan.catalog.views.keys():
        plan.fail(
            f"alias {name}",
            InvalidArgument(
                f"'{name}' is the name of both an alias and a feature view; references have either, so rename one"
            ),
        )
    if plan.errors:
        return plan
    move_pins(plan, before, changed, options)
    for name, table in plan.tables.items():
        plan.tables[name] = replace(table, extra=extra_columns(plan.catalog, table.before))
    for name, stored in plan.empty.items():
        catalog.tables[name] = catalog.new_table(catalog.definition(name), extra_columns(catalog, stored))
        catalog.previous.pop(name, None)
    _try(plan, "models", lambda: check_other_models(plan.catalog, definitions))
    if not options.prune:
        note_kept(plan, definitions)
    return plan


def _try(plan: ChangePlan, what: str, act: Callable[[], object]) -> None:
    try:
        act()
    except (InvalidArgument, NotFound, ResourceExhausted) as error:
        plan.fail(what, error)


def plan_id(catalog: Catalog, prepared: Prepared, options: Options) -> str:
    """Return the hash of all that a plan depends on: the catalog, without tables in the making, and the definitions."""
    base = replace(catalog, filling={}, coming={}, next_table_id=0)
    document = [prepared.to_json(), [options.prune, options.accept]]
    text = json.dumps(document, sort_keys=True, default=repr).encode()
    return hashlib.sha256(base.to_json() + text).hexdigest()


def plan_aliases(plan: ChangePlan, definitions: Definitions) -> None:
    """Put the aliases into the new catalog, and the new entities into those that are there. Raises InvalidArgument."""
    catalog = plan.catalog
    for name, alias in definitions.aliases.items():
        old = catalog.aliases.get(name)
        detail = " -> ".join(dict.fromkeys(show_alias(item) for item in (old, alias) if item is not None))
        plan.note("+" if old is None else "=" if show_alias(old) == show_alias(alias) else "~", f"alias {name}", detail)
        catalog.aliases[name] = alias
    for name, alias in catalog.aliases.items():
        try:
            catalog.aliases[name] = replace(alias, entity=catalog.entities[alias.entity.name])
        except InvalidArgument as error:
            raise InvalidArgument(
                f"{error.message} ('{name}' is in the store but not in these definitions: add it, changed to fit)"
            ) from None


def show_alias(alias: Alias) -> str:
    columns = alias.request_columns(alias.entity.keys).items()
    shown_columns = (key if column == key else f"{key} = {column}" for key, column in columns)
    return f"{alias.entity.name} by {', '.join(shown_columns)}"


def check_folders(what: str, names: Iterable[str], known: set[str]) -> None:
    """Check that no new name differs from another only in case: a file system may take both as one folder.

    names: those in `known`, then the new ones. Raises InvalidArgument.
    """
    found: dict[str, str] = {}
    for name in names:
        first = found.setdefault(normalize("NFC", name.casefold()), name)
        if first != name and name not in known:
            raise InvalidArgument(
                f"{what} '{name}' differs from '{first}' only in upper and lower case, and some file systems take both"
                " as one folder; choose another name"
            )


def plan_view(
    plan: ChangePlan, changed: dict[str, ViewChange], view: FeatureView, count: Count, options: Options
) -> None:
    """Put a view into the new catalog. If its rows change and it has any, note the table that it needs.

    Raises InvalidArgument for rows that would be lost.
    """
    catalog, what = plan.catalog, f"view {view.name}"
    if view.name not in catalog.views:
        catalog.add(view)
        plan.note("+", what, f"{', '.join(view.keys) or NO_KEYS} -> {plural(len(view.features), 'feature')}")
        return
    before = catalog.stored(view.name)
    change = ViewChange(before.definition, define(view, before.definition, catalog.next_columns[view.name]))
    rows = count(view.name) if change.needs_table else 0
    if rows:
        change.check_types()
        carried, reads = not change.changes_keys, reads_source(change)
        if not carried and not reads and not options.prune:
            raise InvalidArgument(
                f"feature view '{view.name}' holds {plural(rows, 'row')}, its keys change"
                f" ({show_keys(change.before.view.entity)} -> {show_keys(view.entity)}), and it has no source to load;"
                " --prune drops these rows"
            )
        if carried or reads:
            plan.tables[view.name] = NewTable(before, change, rows, carried, reads)
    catalog.define(change.after)
    changed[view.name] = change
    if change.needs_table and view.name not in plan.tables:
        plan.empty[view.name] = before
    describe_view_change(plan, change, rows, options)


def reads_source(change: ViewChange) -> bool:
    """Whether the rows of a view's source must be read, because they have what the stored rows lack."""
    source = change.after.view.source
    if source is None:
        return False
    if change.changes_keys or change.changes_times:
        return True
    from shorttail.sources.batches import open_source
    from shorttail.sources.source import column_names

    view, definition = change.after.view, change.after
    widened = {
        definition.column_of(new.name) for old, new in change.pairs if old is not None and old.dtype != new.dtype
    }
    names = [name for name in change.new_columns if definition.column_of(name) not in widened]
    wanted = {view.features[view.feature_index[name]].source_column for name in names}
    return bool(wanted) and bool(wanted & set(column_names(open_source(source.path, view))))


def describe_view_change(plan: ChangePlan, change: ViewChange, rows: int, options: Options) -> None:
    """Note what changes a view, and who uses it."""
    of_rows, of_answers, texts = change.of_rows(), change.of_answers(), change.of_texts()
    name = change.after.view.name
    ids = shown([change.before.rows_id, change.after.rows_id])
    kinds = (("rows", of_rows), ("answers", of_answers))
    parts = [f"{word} change: {'; '.join(found)}" for word, found in kinds if found]
    parts += ["; ".join(texts)] if texts else []
    if not parts:
        plan.note("=", f"view {name}", ids[change.before.rows_id])
        return
    arrow = " -> ".join(dict.fromkeys((ids[change.before.rows_id], ids[change.after.rows_id])))
    more = []
    table = plan.tables.get(name)
    if table is not None:
        kept = f"{plural(rows, 'stored row')} kept" if table.carried else f"{plural(rows, 'stored row')} dropped"
        loaded = f", and {change.after.view.source.path} is read" if table.reads and change.after.view.source else ""
        more.append(f"{ids[change.after.rows_id]} is built beside {ids[change.before.rows_id]}: {kept}{loaded}")
    elif rows:
        more.append(f"{plural(rows, 'stored row')} dropped")
    if options.explain:
        more += explain(change)
    plan.note("~", f"view {name}", f"{arrow}  {'; '.join(parts)}", more)


def explain(change: ViewChange) -> list[str]:
    """Say which id each difference has changed."""
    kinds = (("rows and answers", change.of_rows()), ("answers", change.of_answers()), ("no id", change.of_texts()))
    return [f"{each}: changes {what}" for what, found in kinds for each in found]


def extra_columns(catalog: Catalog, before: Stored) -> tuple[Column, ...]:
    """Return the columns of a view's table that only pinned definitions have."""
    name = before.view.name
    pins = [info.pins.get(name) for _, _, info in users(catalog, name)]
    pinned = [catalog.definitions[pin] for pin in pins if pin in catalog.definitions]
    wanted = {number for definition in pinned for number in definition.columns} - set(catalog.columns[name])
    return tuple(column for column in before.table.columns if column.number in wanted)


def move_pins(plan: ChangePlan, before: Catalog, changed: dict[str, ViewChange], options: Options) -> None:
    """Let versions of models take the new definitions if their answers stay, or if the user accepts the change.

    The others keep the definitions that they pin. Notes both.
    """
    for view in changed:
        notes = []
        for name, number, info in users(plan.catalog, view):
            if plan.new_versions.get(name) != number and info.pins.get(view) != plan.catalog.definition(view).id:
                pinned = plan.catalog.definitions.get(info.pins.get(view, "")) or before.definition(view)
                notes += _settle(plan, pinned, name, number, options)
        add_notes(plan, f"view {view}", notes)


def _settle(plan: ChangePlan, pinned: Definition, name: str, number: int, options: Options) -> list[str]:
    """Move a version from the definition that it pins to the newest one, or leave it. Return what to say of it."""
    catalog, view = plan.catalog, pinned.view.name
    entry = catalog.models[name]
    newest, info, what = catalog.definition(view), entry.version(number), f"model {name}"
    change = ViewChange(pinned, newest)
    moved = replace(info, pins={**info.pins, view: newest.id})
    differs, fault = change.kept_answers(info), check_moved(catalog, moved, number)
    may_stay = not change.changes_keys  # otherwise no table has its rows any more
    if number == entry.previous and not may_stay:
        catalog.set_version(name, number, moved)  # a rollback to it checks whether it fits
    elif (differs or fault is not None) and not options.accept:
        if may_stay:
            catalog.set_version(name, number, replace(info, pins={**info.pins, view: pinned.id}))
            kept = ", ".join(differs) or "the old types"
            return [f"model {name} v{number} keeps {kept} until it is deployed or accepted"]
        plan.fail(
            what,
            InvalidArgument(
                f"model '{name}' version {number} takes features of view '{view}', whose keys change; give it a new"
                " version in the same file, or --accept"
            ),
        )
    elif fault is not None:
        plan.fail(what, fault)
    else:
        catalog.set_version(name, number, moved)
        if pinned.id != newest.id:
            return [f"model {name} v{number} moves: {'accepted' if differs else 'compatible'}"]
    return []


def check_moved(catalog: Catalog, info: VersionInfo, number: int) -> ShorttailError | None:
    """Return why a version does not fit the definitions that it pins, None if it does."""
    try:
        check_inputs(catalog.as_pinned(info), info.model, info.inputs, f"version {number}")
    except (InvalidArgument, NotFound) as error:
        return error
    return None


def add_notes(plan: ChangePlan, what: str, notes: list[str]) -> None:
    """Append lines to what the plan says of a view, which changes if a model moves."""
    moves = any(" moves: " in note for note in notes)
    plan.changes[:] = [
        replace(each, kind="~" if moves else each.kind, more=(*each.more, *notes)) if each.what == what else each
        for each in plan.changes
    ]


def prune_models(plan: ChangePlan, definitions: Definitions) -> None:
    """Remove the models that the definitions do not have. Notes what is removed."""
    models = plan.catalog.models
    for name in [name for name in models if name not in definitions.models]:
        plan.note("-", f"model {name}", f"removed with {plural(len(models.pop(name).versions), 'version')}")


def prune_views(plan: ChangePlan, definitions: Definitions) -> None:
    """Remove the views, aliases and entities that the definitions do not have, once no model takes their features."""
    catalog = plan.catalog
    for name in [name for name in catalog.views if name not in definitions.views]:
        used = [
            f"model '{model}' version {number}"
            for model, number, _ in users(catalog, name)
            if number != catalog.models[model].previous
        ]
        if used:
            error = InvalidArgument(f"feature view '{name}' cannot be removed: {', '.join(used)} takes its features")
            plan.fail(f"view {name}", error)
            continue
        catalog.drop_view(name)
        plan.note("-", f"view {name}", "removed with its rows")
    for name in [name for name in catalog.aliases if name not in definitions.aliases]:
        del catalog.aliases[name]
        plan.note("-", f"alias {name}", "removed")
    needed = {view.entity.name for view in catalog.views.values()} | definitions.entities.keys()
    for name in [name for name in catalog.entities if name not in needed]:
        del catalog.entities[name]
        plan.note("-", f"entity {name}", "removed")


def note_kept(plan: ChangePlan, definitions: Definitions) -> None:
    """Note the views and models that the definitions do not have."""
    catalog = plan.catalog
    for name in catalog.views:
        if name not in definitions.views:
            used = list(dict.fromkeys(f"model {model}" for model, _, _ in users(catalog, name)))
            note = (
                f"{', '.join(used)} use{'s' * (len(used) == 1)} it" if used else "--prune removes it (no model uses it)"
            )
            plan.kept.append(Change("-", f"view {name}", f"in the store, not in the file: kept; {note}"))
    for name in catalog.models:
        if name not in definitions.models:
            kept = "in the store, not in the file: kept; --prune removes it"
            plan.kept.append(Change("-", f"model {name}", kept))


def plan_model(plan: ChangePlan, model: Model, file: ModelFile) -> None:
    """Put a model into the new catalog, as a new version if its file, inputs or outputs differ from the current one."""
    what = f"model {model.name}"
    entry = plan.catalog.models.get(model.name)
    old = entry.version() if entry else None
    info = registry.inspect(plan.catalog, model, file, known=old)
    reasons = version_reasons(old, info) if old else []
    if entry is not None and old is not None and not reasons:
        versions = {**entry.versions, entry.current: replace(old, model=info.model)}
        plan.catalog.models[model.name] = replace(entry, versions=versions)
        unchanged = registry.documentation(old.model) == registry.documentation(model)
        detail = f"version {entry.current}" + ("" if unchanged else ": descriptions")
        plan.note("=" if unchanged else "~", what, detail)
        return
    number = registry.next_version(entry)
    plan.catalog.models[model.name] = registry.with_version(entry, number, info)
    plan.new_versions[model.name] = number
    outputs = ", ".join(tensor.name for tensor in info.outputs)
    if entry is None:
        plan.note("+", what, f"version {number}: {takes(plan.catalog, info)} -> {outputs}")
    else:
        plan.note("~", what, f"version {entry.current} -> {number}: {', '.join(reasons)}")


def version_reasons(old: VersionInfo, new: VersionInfo) -> list[str]:
    """Return the differences that require a new version, in words; empty if the current version stays."""
    reasons = ["new file"] if old.sha256 != new.sha256 else []
    if old.model.inputs != new.model.inputs:
        reasons.append("other inputs")
    if old.model.outputs != new.model.outputs:
        reasons.append("other outputs")
    if old.replacements != new.replacements:
        reasons.append("other values for what is missing")
    if old.model.batching != new.model.batching:
        reasons.append("other batching")
    if old.model.run_timeout != new.model.run_timeout:
        reasons.append("other run_timeout")
    if old.examples_sha256 != new.examples_sha256:
        reasons.append("other examples")
    return reasons


def takes(catalog: Catalog, info: VersionInfo) -> str:
    """Describe what feeds a version: "3 columns", or "tensors x, y" of a model without columns."""
    if info.model.is_raw:
        return f"tensors {', '.join(tensor.name for tensor in info.inputs)}" if info.inputs else "no inputs"
    return plural(total_width(catalog, info), "column")


def total_width(catalog: Catalog, info: VersionInfo) -> int:
    """Return the number of columns of all inputs together; a vector counts its length."""
    by_input = info.model.inputs_by_name([tensor.name for tensor in info.inputs])
    entries = [
        (column, tensor, len(by_input[tensor.name])) for tensor in info.inputs for column in by_input[tensor.name]
    ]
    return sum(column_width(catalog, *entry) for entry in entries)


def check_other_models(catalog: Catalog, definitions: Definitions) -> None:
    """Check that models which these definitions do not mention still fit the changed views. Raises InvalidArgument."""
    for name, entry in catalog.models.items():
        if name not in definitions.models:
            info = entry.version()
            try:
                check_inputs(catalog.as_pinned(info), entry.model, info.inputs, f"version {entry.current}")
            except (InvalidArgument, NotFound) as error:
                raise InvalidArgument(
                    f"{error.message} ('{name}' is in the store but not in these definitions: add it, changed to fit)"
                ) from None
        check_shares(catalog, name, entry)


def check_shares(catalog: Catalog, name: str, entry: ModelEntry) -> None:
    """Check that a model's canary and shadow still fit the changed views. Raises InvalidArgument."""
    shares = (("canary", entry.canary, registry.check_canary), ("shadow", entry.shadow, registry.check_shadow))
    for what, share, check in shares:
        if share is None:
            continue
        off = f"{name}=off" if what == "canary" else f"{name} --off"
        try:
            info = entry.version(share.version)
            check_inputs(catalog.as_pinned(info), info.model, info.inputs, f"version {share.version}")
            check(catalog, entry, info, share.version)
        except (InvalidArgument, NotFound) as error:
            raise InvalidArgument(
                f"{error.message} (it is the {what}; `shorttail models {what} {off}` ends that)"
            ) from None
