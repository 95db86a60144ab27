"""The catalog of a store: its entities, aliases, views, tables and models, kept as a single JSON document.

A catalog that readers use is never changed in place: a writer edits a copy() and commits the copy.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final

from shorttail.config import LIMITS
from shorttail.define.dtypes import Bool, DType, Float32, Float64, Int32, Int64, String
from shorttail.define.entities import Alias, Entity
from shorttail.define.identity import Definition, define
from shorttail.define.models import Model
from shorttail.define.names import REQUEST, lookup_of, quoted, split_reference, suggestion
from shorttail.define.tables import Column, Stored, TableInfo
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import Internal, NotFound

Json = dict[str, Any]

PAGE_FORMAT: Final = 3  # of the pages of new tables

# ONNX element type -> our type. A model with another type (float16, a map, a sequence) is refused at registration.
TENSOR_TYPES: dict[str, DType] = {
    "float": Float32,
    "double": Float64,
    "int64": Int64,
    "int32": Int32,
    "bool": Bool,
    "string": String,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of an ONNX file. dtype: a key of TENSOR_TYPES, or ONNX Runtime's name of another type.

    any_rank: the file declares no shape at all. `shape` is () then, as for a single value.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]  # None: any length
    any_rank: bool = False

    @property
    def text(self) -> str:
        """The type and the shape, for people: "float16 [-1, 3]", in which -1 is any size; "float" of any rank."""
        return self.dtype if self.any_rank else f"{self.dtype} {[-1 if size is None else size for size in self.shape]}"

    def to_json(self) -> Json:
        any_rank = {"any_rank": True} if self.any_rank else {}
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), **any_rank}

    @classmethod
    def from_json(cls, data: Json) -> TensorInfo:
        return cls(data["name"], data["dtype"], tuple(data["shape"]), data.get("any_rank", False))


@dataclass(frozen=True)
class VersionInfo:
    """A version of a model: its file's hash, inputs and outputs, and the definition that it was registered with.

    Each version has its own definition, because versions may differ in their columns; a rollback restores both.
    sha256: of the file, in hexadecimal. created_us: microseconds since 1970 UTC. outputs: those that the definition
    selects, in its order. tuning: host description -> settings (shorttail.models.settings).
    batching: "rows" if requests share runs, "request" if each has runs of its own. batching_why: the reason, in one
    line, "" if there is nothing to say, None if the version was never examined. replacements: the value that replaces a
    missing one, by "request:column" or "view:feature". forest_differs: why its compiled forest may not answer, as `vet`
    found, "" if it may. examples_sha256: of the file of the model's examples, "" if it has none. pins: view -> the id
    of the definition of which it takes features; the newest one for a view that is not in it.
    """

    model: Model
    sha256: str
    created_us: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    tuning: dict[str, Json] = field(default_factory=dict)
    batching: str = "rows"
    batching_why: str | None = None
    replacements: dict[str, Any] = field(default_factory=dict)
    forest_differs: str = ""
    examples_sha256: str = ""
    pins: dict[str, str] = field(default_factory=dict)

    @cached_property
    def views(self) -> frozenset[str]:
        """The names of the views whose features it takes."""
        lookups = map(lookup_of, self.model.references)
        return frozenset(lookup.rpartition(":")[2] for lookup in lookups if lookup != REQUEST)

    def to_json(self) -> Json:
        return {
            "model": self.model.to_json(),
            "sha256": self.sha256,
            "created_us": self.created_us,
            "inputs": [tensor.to_json() for tensor in self.inputs],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "tuning": self.tuning,
            "batching": self.batching,
            "batching_why": self.batching_why,
            "replacements": self.replacements,
            "forest_differs": self.forest_differs,
            "examples_sha256": self.examples_sha256,
            "pins": self.pins,
        }

    @classmethod
    def from_json(cls, data: Json) -> VersionInfo:
        given = data["model"].get("missing", {})  # versions older than `replacements` have request columns there alone
        return cls(
            Model.from_json(data["model"]),
            data["sha256"],
            data["created_us"],
            tuple(TensorInfo.from_json(item) for item in data["inputs"]),
            tuple(TensorInfo.from_json(item) for item in data["outputs"]),
            data.get("tuning", {}),
            data.get("batching", "rows"),
            data.get("batching_why"),
            data.get("replacements", {f"request:{name}": value for name, value in given.items()}),
            data.get("forest_differs", ""),
            data.get("examples_sha256", ""),
            data.get("pins", {}),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """A version that gets a percentage of the requests. percent: above 0, at most 100."""

    version: int
    percent: float

    def to_json(self) -> Json:
        return {"version": self.version, "percent": self.percent}


@dataclass(frozen=True)
class ModelEntry:
    """The versions of a model.

    current: the version that answers. previous: the version that `rollback` returns to.
    canary: another version, which answers a share of the requests in place of the current one.
    shadow: another version, which runs on a share of the current one's requests; its answers are only compared.
    """

    current: int
    previous: int | None
    versions: dict[int, VersionInfo]
    canary: Share | None = None
    shadow: Share | None = None

    @property
    def model(self) -> Model:
        """The definition of the current version."""
        return self.versions[self.current].model

    def version(self, number: int | None = None) -> VersionInfo:
        """Return a version (None: the current one). Raises NotFound that lists the versions."""
        if number is None:
            number = self.current
        if number not in self.versions:
            known = ", ".join(str(n) for n in sorted(self.versions))
            raise NotFound(f"model '{self.model.name}' has no version {number}; its versions: {known}")
        return self.versions[number]

    def with_version(self, number: int, info: VersionInfo) -> ModelEntry:
        """Return the entry with that version added or replaced."""
        return replace(self, versions={**self.versions, number: info})

    def with_current(self, number: int) -> ModelEntry:
        """Return the entry with that version as the current one. Raises NotFound.

        A canary ends, because it was compared with the version that was current before.
        """
        self.version(number)
        if number == self.current:
            return self
        shadow = None if self.shadow and self.shadow.version == number else self.shadow
        return replace(self, current=number, previous=self.current, canary=None, shadow=shadow)

    @property
    def live(self) -> dict[int, VersionInfo]:
        """The versions that answer, or may answer at once: current, previous, canary and shadow."""
        shares = [share.version for share in (self.canary, self.shadow) if share is not None]
        numbers = {self.current, self.previous, *shares}
        return {number: info for number, info in self.versions.items() if number in numbers}

    def to_json(self) -> Json:
        return {
            "current": self.current,
            "previous": self.previous,
            "versions": {str(number): version.to_json() for number, version in sorted(self.versions.items())},
            "canary": self.canary and self.canary.to_json(),
            "shadow": self.shadow and self.shadow.to_json(),
        }

    @classmethod
    def from_json(cls, data: Json) -> ModelEntry:
        versions = {int(number): VersionInfo.from_json(item) for number, item in data["versions"].items()}
        shares = (Share(**data[name]) if data.get(name) else None for name in ("canary", "shadow"))
        return cls(data["current"], data["previous"], versions, *shares)


@dataclass
class Catalog:
    """All definitions and settings of a store. The keys of each dict are names; every view has a table.

    columns: the columns of each view's features, in their order. next_columns: the next free number of a column.
    tables: what lookups read. filling: tables that a load is making, whose edits wait in a list. coming: tables that
    are complete and take every edit, until they replace those in `tables`. previous: what `views rollback` returns to.
    definitions: those that versions of models pin, by id. max_clock_skew_us: how far event times may be ahead of the
    clock of the process that takes them.
    """

    entities: dict[str, Entity] = field(default_factory=dict)
    views: dict[str, FeatureView] = field(default_factory=dict)
    tables: dict[str, TableInfo] = field(default_factory=dict)
    models: dict[str, ModelEntry] = field(default_factory=dict)
    next_table_id: int = 1
    max_clock_skew_us: int = LIMITS.max_clock_skew_us
    aliases: dict[str, Alias] = field(default_factory=dict)
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    next_columns: dict[str, int] = field(default_factory=dict)
    filling: dict[str, TableInfo] = field(default_factory=dict)
    coming: dict[str, TableInfo] = field(default_factory=dict)
    previous: dict[str, TableInfo] = field(default_factory=dict)
    definitions: dict[str, Definition] = field(default_factory=dict)

    def copy(self) -> Catalog:
        """Return a copy whose dicts may be changed. The definitions in them are immutable and shared."""
        own: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        dicts: dict[str, Any] = {name: dict(value) for name, value in own.items() if isinstance(value, dict)}
        return replace(self, **dicts)

    def definition(self, name: str) -> Definition:
        """Return the newest definition of a view. Raises NotFound that suggests a name."""
        return Definition(self.view(name), self.columns[name])

    def stored(self, name: str) -> Stored:
        """Return the newest definition of a view with the table that lookups read. Raises NotFound."""
        return Stored(self.definition(name), self.tables[name])

    def edited(self, name: str) -> dict[str, TableInfo]:
        """Return the tables of a view, the one that lookups read first, by their role. Raises NotFound."""
        self.view(name)
        roles = {"tables": self.tables, "coming": self.coming, "filling": self.filling, "previous": self.previous}
        return {role: tables[name] for role, tables in roles.items() if name in tables}

    def all_tables(self) -> list[tuple[str, TableInfo]]:
        """Return all tables, each with the name of its view: those that lookups read come first."""
        roles = (self.tables, self.coming, self.filling, self.previous)
        return [item for tables in roles for item in tables.items()]

    def as_pinned(self, info: VersionInfo) -> Catalog:
        """Return the catalog as a version of a model sees it: with the definitions that it pins."""
        pins = {name: pin for name, pin in info.pins.items() if name in self.views and pin in self.definitions}
        found = {name: self.definitions[pin] for name, pin in pins.items()}
        if not found:
            return self
        return replace(
            self,
            views=self.views | {name: definition.view for name, definition in found.items()},
            columns=self.columns | {name: definition.columns for name, definition in found.items()},
        )

    def pin(self, info: VersionInfo) -> VersionInfo:
        """Return a version that takes its features of the newest definitions of its views."""
        return replace(info, pins={name: self.definition(name).id for name in sorted(info.views)})

    def read_definition(self, name: str) -> Definition:
        """Return the definition by which a view's source is read: the newest, and the features that are only pinned.

        The latter have names of their own, and come last. Raises NotFound.
        """
        newest = self.definition(name)
        features, columns = list(newest.view.features), list(newest.columns)
        for pinned in self.definitions.values():
            for number, feature in zip(pinned.columns, pinned.view.features, strict=True):
                if pinned.view.name == name and number not in columns:
                    own = f"{feature.name}_{number}"
                    while own in (known.name for known in features) or own in newest.view.keys:
                        own += "_"
                    features.append(replace(feature, name=own, column=feature.source_column))
                    columns.append(number)
        return Definition(replace(newest.view, features=features), tuple(columns))

    def with_kept_pins(self, info: VersionInfo) -> VersionInfo:
        """Return a version that pins the newest definitions if one of those that it pins was forgotten."""
        known = self.definitions.keys() | {self.definition(name).id for name in info.pins if name in self.views}
        return info if known >= set(info.pins.values()) else self.pin(info)

    def keep_pinned(self) -> None:
        """Forget the definitions that no live version of a model pins."""
        pins = {pin for entry in self.models.values() for info in entry.live.values() for pin in info.pins.values()}
        newest = {self.definition(name).id for name in self.views}
        self.definitions = {pin: each for pin, each in self.definitions.items() if pin in pins - newest}

    def entity(self, name: str) -> Entity:
        """Return an entity. Raises NotFound that suggests a name."""
        if name not in self.entities:
            alias = self.aliases.get(name)
            hint = suggestion(name, self.entities, "entities") if alias is None else ""
            of = f": it is an alias of entity '{alias.entity.name}'" if alias is not None else ""
            raise NotFound(f"no entity {quoted(name)}{of}{hint}")
        return self.entities[name]

    def view(self, name: str) -> FeatureView:
        """Return a view. Raises NotFound that suggests a name."""
        if alias := self.aliases.get(name):
            known = ", ".join(f"{name}:{view}" for view in self.views_of(alias)) or "there are none yet"
            raise NotFound(
                f"no feature view '{name}': it is an alias of entity '{alias.entity.name}'; its views: {known}"
            )
        if name not in self.views:
            raise NotFound(f"no feature view {quoted(name)}{suggestion(name, self.views, 'views')}")
        return self.views[name]

    def model(self, name: str) -> ModelEntry:
        """Return the entry of a model. Raises NotFound that suggests a name."""
        if name not in self.models:
            raise NotFound(f"no model {quoted(name)}{suggestion(name, self.models, 'models')}")
        return self.models[name]

    def set_version(self, name: str, number: int, info: VersionInfo) -> None:
        """Replace a version of a model."""
        self.models[name] = self.models[name].with_version(number, info)

    def views_of(self, alias: Alias) -> list[str]:
        """Return the names of the views that an alias can look up: those of its entity."""
        return [name for name, view in self.views.items() if alias.fits(view.entity)]

    def looked_up(self, lookup: str) -> tuple[FeatureView, list[str]]:
        """Return the view of a lookup, "view" or "alias:view", and the request column of each of its keys, in order.

        Raises NotFound that suggests a name.
        """
        name, _, view_name = lookup.rpartition(":")
        if not name:
            view = self.view(view_name)
            return view, list(view.keys)
        if name not in self.aliases:
            raise NotFound(f"no alias {quoted(name)}{suggestion(name, self.aliases, 'aliases')}")
        view, alias = self.view(view_name), self.aliases[name]
        if not alias.fits(view.entity):
            raise NotFound(
                f"alias '{name}' is of entity '{alias.entity.name}' ({', '.join(alias.entity.keys)}), and feature view"
                f" '{view_name}' of entity '{view.entity.name}' ({', '.join(view.keys)})"
                f"{suggestion(view_name, self.views_of(alias), 'views of the alias')}"
            )
        return view, list(alias.request_columns(view.keys).values())

    def feature(self, reference: str) -> tuple[FeatureView, Feature]:
        """Return the view and the feature that "view:feature" or "alias:view:feature" names.

        Raises NotFound if one of them does not exist, InvalidArgument if the text is not a reference.
        """
        lookup, name = split_reference(reference)
        view, _ = self.looked_up(lookup)
        if name not in view.feature_index:
            known = suggestion(name, view.feature_index, "features")
            raise NotFound(f"feature view '{view.name}' has no feature {quoted(name)}{known}")
        return view, view.features[view.feature_index[name]]

    def new_table(self, definition: Definition, columns: Sequence[Column] = ()) -> TableInfo:
        """Return a new, empty table for a view, which belongs to nothing yet. columns: more than the definition has."""
        # The seed has 63 bits, so that every JSON reader keeps it exact. It is random, so that nobody can choose keys
        # that collide.
        table = TableInfo.of(definition, self.next_table_id, secrets.randbits(63), page_format=PAGE_FORMAT)
        self.next_table_id += 1
        return replace(table, columns=(*table.columns, *columns))

    def add(self, view: FeatureView) -> None:
        """Add a view with its entity and an empty table. A view of that name loses its rows."""
        before = self.definition(view.name) if view.name in self.views else None
        definition = define(view, before, self.next_columns.get(view.name, 0))
        self.entities[view.entity.name] = view.entity
        self.define(definition)
        self.tables[view.name] = self.new_table(definition)
        for tables in (self.coming, self.filling, self.previous):
            tables.pop(view.name, None)

    def define(self, definition: Definition) -> None:
        """Make this the newest definition of its view."""
        name = definition.view.name
        if name in self.views:
            before = self.definition(name)
            self.definitions[before.id] = before  # until keep_pinned()
        self.views[name], self.columns[name] = definition.view, definition.columns
        self.next_columns[name] = max(self.next_columns.get(name, 0), *(number + 1 for number in definition.columns))

    def drop_view(self, name: str) -> None:
        """Remove a view with all its tables."""
        roles = (self.tables, self.coming, self.filling, self.previous)
        for each in (self.views, self.columns, self.next_columns, *roles):
            each.pop(name, None)

    def to_json(self) -> bytes:
        """Return the catalog as the JSON document that the store keeps."""
        roles = {"tables": self.tables, "filling": self.filling, "coming": self.coming, "previous": self.previous}
        document = {
            "entities": [entity.to_json() for entity in self.entities.values()],
            "views": [view.to_json() for view in self.views.values()],
            "columns": self.columns,
            "next_columns": self.next_columns,
            **{role: {name: table.to_json() for name, table in tables.items()} for role, tables in roles.items()},
            "models": {name: entry.to_json() for name, entry in self.models.items()},
            "next_table_id": self.next_table_id,
            "max_clock_skew_us": self.max_clock_skew_us,
            "aliases": [alias.to_json() for alias in self.aliases.values()],
            "definitions": {pin: definition.to_json() for pin, definition in self.definitions.items()},
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes | memoryview | None) -> Catalog:
        """Return the catalog of a document, an empty one for None. Raises Internal if the document is damaged."""
        if data is None:
            return cls()
        try:
            document = json.loads(bytes(data))
            entities = {item["name"]: Entity.from_json(item) for item in document["entities"]}
            views = {item["name"]: FeatureView.from_json(item) for item in document["views"]}
            # A view of an older version has its columns in the order of its features.
            older = {name: range(len(view.features)) for name, view in views.items()}
            columns = {name: tuple(document.get("columns", older)[name]) for name in views}

            def tables(role: str) -> dict[str, TableInfo]:
                given = document.get(role, {}).items()
                return {n: TableInfo.from_json(each, Definition(views[n], columns[n])) for n, each in given}

            return cls(
                entities,
                views,
                tables("tables"),
                {name: ModelEntry.from_json(item) for name, item in document["models"].items()},
                document["next_table_id"],
                # Stores of older versions have none of the following.
                document.get("max_clock_skew_us", LIMITS.max_clock_skew_us),
                {item["name"]: Alias.from_json(item, entities) for item in document.get("aliases", ())},
                columns,
                document.get("next_columns", {name: len(numbers) for name, numbers in columns.items()}),
                tables("filling"),
                tables("coming"),
                tables("previous"),
                {pin: Definition.from_json(item) for pin, item in document.get("definitions", {}).items()},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise Internal(f"the store's catalog is damaged ({error!r}); restore the store from a backup") from None
