"""Registers the definitions of a file in a store: all of them, or none if any of them is wrong.

Views and models that the file does not mention stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from unicodedata import normalize

from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog, ModelEntry, VersionInfo
from shorttail.define.collect import Definitions, collect
from shorttail.define.entities import Alias, Entity
from shorttail.define.models import Model
from shorttail.define.views import FeatureView
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted
from shorttail.models.golden import GoldenRows
from shorttail.models.signature import ModelFile, check_inputs, column_width
from shorttail.models.trial import trial_limit_s
from shorttail.models.vetting import vet
from shorttail.ondemand.trust import functions_of, note_known
from shorttail.registry import versions as registry
from shorttail.registry.examples import read_examples

if TYPE_CHECKING:
    from shorttail.store import Store

NO_KEYS: Final = "no keys"  # of an entity, in a change


@dataclass(frozen=True, slots=True)
class Change:
    """A line of the report of `apply`. kind: '+' new, '~' changed, '=' unchanged, '!' a warning. what: "view plane"."""

    kind: str
    what: str
    detail: str = ""


@dataclass
class ChangePlan:
    """The new catalog, its differences from the old one, and the model versions whose files must be written first."""

    catalog: Catalog
    changes: list[Change] = field(default_factory=list)
    new_versions: dict[str, int] = field(default_factory=dict)  # model -> version

    def note(self, kind: str, what: str, detail: str = "") -> None:
        self.changes.append(Change(kind, what, detail))


@dataclass(frozen=True)
class Prepared:
    """Definitions, and the content of the model files that they name."""

    definitions: Definitions
    files: dict[str, ModelFile]
    vetted: dict[str, VersionInfo] = field(default_factory=dict)  # versions that were loaded, run and examined
    warnings: list[Change] = field(default_factory=list)  # about these versions
    golden: dict[str, GoldenRows | None] = field(default_factory=dict)  # their examples


def prepare(definitions: Any, vet_timeout: str | timedelta | None = None) -> Prepared:
    """Collect definitions (a file's path, objects, or Definitions), read their files, compile their functions.

    This makes every check that needs no store. vet_timeout: as for `apply`. Raises NotFound, InvalidArgument.
    """
    vet_s = trial_limit_s(vet_timeout)
    collected = collect(definitions)
    files = {name: ModelFile.read(model.path, name, vet_s) for name, model in collected.models.items()}
    compile_functions(collected)
    return Prepared(collected, files)


def apply(
    store: Store,
    definitions: Any,
    dry_run: bool = False,
    reset: bool = False,
    vet_timeout: str | timedelta | None = None,
) -> list[Change]:
    """Register definitions. Returns the changes, in order.

    definitions: what `prepare` takes, or what it returned. dry_run: return the changes and write nothing.
    reset: drop a view's rows if its schema changes, instead of raising InvalidArgument. vet_timeout: how long a trial
    of a model's file may take ("10m"; LIMITS.vet_s by default); the process that tries it is killed then.
    Raises NotFound, InvalidArgument, Internal (a model fails when it runs), DeadlineExceeded (its trial takes too long)
    or ResourceExhausted (too many views, too little memory) for the first error found; nothing is written then.
    """
    prepared = definitions if isinstance(definitions, Prepared) else prepare(definitions, vet_timeout)
    store.refresh()
    plan = plan_changes(store.catalog.copy(), prepared, store.count, reset)
    vet_new(plan, prepared)
    if dry_run or (plan.catalog == store.catalog and not prepared.vetted):
        return plan.changes + prepared.warnings
    detail: dict[str, Any] = dict(prepared.definitions.origin)
    with store.edit_catalog("applied", "", detail) as latest:
        # The changes are planned again, because another process may have committed meanwhile. The files are in memory
        # and checked, so this is quick.
        plan = plan_changes(latest, prepared, store.count, reset)
        vet_new(plan, prepared)
        detail["changes"] = [[each.kind, each.what, each.detail] for each in plan.changes if each.kind in "+~-"]
        for name, vetted in prepared.vetted.items():
            entry = latest.models[name]
            latest.models[name] = registry.with_examined(entry, entry.current, vetted)
        for name, number in plan.new_versions.items():
            info = latest.models[name].version()
            registry.write_version(store.path, number, info, prepared.files[name], prepared.golden[name])
    store.refresh()
    return plan.changes + prepared.warnings


def plan_changes(catalog: Catalog, prepared: Prepared, count: Callable[[str], int], reset: bool = False) -> ChangePlan:
    """Change `catalog` to what the definitions say, and check all of it. Writes nothing to the store.

    count: returns the number of rows of a view's table. After an error the catalog is half changed: discard it.
    """
    definitions, plan = prepared.definitions, ChangePlan(catalog)
    known = {*catalog.views}, {*catalog.models}
    for name, entity in definitions.entities.items():
        keys = show_keys(entity)
        old = catalog.entities.get(name)
        plan.note("+" if old is None else "=" if old == entity else "~", f"entity {name}", keys)
        plan.catalog.entities[name] = entity
    plan_aliases(plan, definitions)
    for view in definitions.views.values():
        plan_view(plan, catalog.views.get(view.name), view, count, reset)
    if len(plan.catalog.views) > LIMITS.views:
        raise ResourceExhausted(f"a store holds at most {LIMITS.views} feature views, not {len(plan.catalog.views)}")
    for model in definitions.models.values():
        plan_model(plan, model, prepared.files[model.name])
    check_folders("feature view", plan.catalog.views, known[0])
    check_folders("model", plan.catalog.models, known[1])
    for name in plan.catalog.aliases.keys() & plan.catalog.views.keys():
        raise InvalidArgument(
            f"'{name}' is the name of both an alias and a feature view; references have either, so rename one"
        )
    check_other_models(plan.catalog, definitions)
    return plan


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
    shown = (key if column == key else f"{key} = {column}" for key, column in columns)
    return f"{alias.entity.name} by {', '.join(shown)}"


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


def plan_view(
    plan: ChangePlan, old: FeatureView | None, view: FeatureView, count: Callable[[str], int], reset: bool
) -> None:
    """Put a view into the new catalog, with a new table if its schema changes."""
    what = f"view {view.name}"
    plan.catalog.views[view.name] = view
    if old is None:
        plan.catalog.new_table(view.name)
        plan.note("+", what, f"{', '.join(view.keys) or NO_KEYS} -> {plural(len(view.features), 'feature')}")
        return
    schema = schema_changes(old, view)
    if schema:
        rows = count(view.name)
        if rows and not reset:
            raise InvalidArgument(
                f"feature view '{view.name}' holds {plural(rows, 'row')} and its schema changes ({'; '.join(schema)});"
                " --reset drops those rows, to be materialized again"
            )
        plan.catalog.new_table(view.name)
        if rows:
            schema.append(f"{plural(rows, 'row')} dropped")
    differences = schema + setting_changes(old, view)
    plan.note("~" if differences else "=", what, "; ".join(differences))


def schema_changes(old: FeatureView, new: FeatureView) -> list[str]:
    """Describe the differences in the layout of rows. A table that holds rows cannot change its layout."""
    found = []
    if list(old.keys.items()) != list(new.keys.items()):
        found.append(f"keys {show_keys(old.entity)} -> {show_keys(new.entity)}")
    before_types = {feature.name: feature.dtype for feature in old.features}
    after_types = {feature.name: feature.dtype for feature in new.features}
    added = [name for name in after_types if name not in before_types]
    removed = [name for name in before_types if name not in after_types]
    kept = [name for name in after_types if name in before_types]
    retyped = [f"{n} {before_types[n]} -> {after_types[n]}" for n in kept if before_types[n] != after_types[n]]
    for verb, names in (("added", added), ("removed", removed), ("retyped", retyped)):
        if names:
            found.append(f"{verb} {', '.join(names)}")
    if kept != [name for name in before_types if name in after_types]:
        found.append("features in another order")
    return found


def setting_changes(old: FeatureView, new: FeatureView) -> list[str]:
    """Describe the differences in how rows are read and documented. They leave the stored rows alone."""
    found = []
    if old.ttl_us != new.ttl_us:
        found.append(f"ttl {show_ttl(old.ttl_us)} -> {show_ttl(new.ttl_us)}")
    if old.source != new.source:
        found.append("source")
    before = {feature.name: feature for feature in old.features}
    both = [(before[feature.name], feature) for feature in new.features if feature.name in before]
    # Defaults are compared as text, because a default that is NaN does not equal itself.
    found += [f"default of {b.name}" for a, b in both if repr(a.default) != repr(b.default) and a.dtype == b.dtype]
    found += [f"column of {b.name}" for a, b in both if a.source_column != b.source_column]
    texts = [(a.description, b.description) for a, b in both]
    texts += [(old.description, new.description), (old.entity.description, new.entity.description)]
    if old.owner != new.owner or any(a != b for a, b in texts):
        found.append("descriptions")
    tags = [(a.tags, b.tags) for a, b in both] + [(old.tags, new.tags), (old.entity.tags, new.entity.tags)]
    if any(a != b for a, b in tags):
        found.append("tags")
    return found


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
            try:
                check_inputs(catalog, entry.model, entry.version().inputs, f"version {entry.current}")
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
            check_inputs(catalog, info.model, info.inputs, f"version {share.version}")
            check(catalog, entry, info, share.version)
        except (InvalidArgument, NotFound) as error:
            raise InvalidArgument(
                f"{error.message} (it is the {what}; `shorttail models {what} {off}` ends that)"
            ) from None


def compile_functions(definitions: Definitions) -> None:
    """Compile every on-demand function once. Raises InvalidArgument for a function that does not compile."""
    functions = dict.fromkeys(function for model in definitions.models.values() for function in functions_of(model))
    if functions:
        from shorttail.ondemand.compile import compile_on_demand

        for function in functions:
            compile_on_demand(function)
        note_known(functions)  # they are the user's own


def show_keys(entity: Entity) -> str:
    return ", ".join(f"{key} {dtype}" for key, dtype in entity.keys.items()) or NO_KEYS


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_ttl(ttl_us: int) -> str:
    """Return a time to live in microseconds as text: "2d" for 172800000000, "none" for 0."""
    if not ttl_us:
        return "none"
    units = (("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1000), ("us", 1))
    return next(f"{ttl_us // unit_us}{unit}" for unit, unit_us in units if ttl_us % unit_us == 0)
