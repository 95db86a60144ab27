"""What a change of definitions does to a view and to the versions of models that take its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shorttail.define.catalog import Catalog, VersionInfo
from shorttail.define.entities import Entity
from shorttail.define.identity import Definition, predecessor, widens
from shorttail.define.names import split_reference
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import InvalidArgument

NO_KEYS: Final = "no keys"  # of an entity, in a change


@dataclass(frozen=True, slots=True)
class Change:
    """A line of a plan. kind: '+' new, '~' changed, '=' unchanged, '-' not in the file, '!' a warning or an error.

    what: "view plane". more: further lines.
    """

    kind: str
    what: str
    detail: str = ""
    more: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {"change": self.kind, "what": self.what, "detail": self.detail, "more": list(self.more)}


@dataclass(frozen=True)
class ViewChange:
    """A view before and after a change."""

    before: Definition
    after: Definition

    @property
    def pairs(self) -> list[tuple[Feature | None, Feature]]:
        """Each feature after the change, with the one before that it continues."""
        return [(predecessor(self.before, feature), feature) for feature in self.after.view.features]

    @property
    def removed(self) -> list[str]:
        """The features that are gone."""
        continued = {old.name for old, _ in self.pairs if old is not None}
        return [feature.name for feature in self.before.view.features if feature.name not in continued]

    @property
    def was(self) -> dict[int, int]:
        """The number of each new column that takes stored values -> the number of the one that has them."""
        return {
            self.after.column_of(new.name): self.before.column_of(old.name)
            for old, new in self.pairs
            if old is not None
            and (widens(old.dtype, new.dtype) or old.dtype == new.dtype)
            and self.after.column_of(new.name) != self.before.column_of(old.name)
        }

    @property
    def new_columns(self) -> list[str]:
        """The features whose columns the table before does not have."""
        return [f.name for f in self.after.view.features if self.after.column_of(f.name) not in self.before.columns]

    @property
    def changes_keys(self) -> bool:
        """Whether the types of the keys change, so that no stored row has the keys after the change."""
        return list(self.before.view.keys.values()) != list(self.after.view.keys.values())

    @property
    def changes_times(self) -> bool:
        """Whether the event times are read from another column of the source."""
        sources = self.before.view.source, self.after.view.source
        return None not in sources and self.before.view.timestamp != self.after.view.timestamp

    @property
    def needs_table(self) -> bool:
        """Whether the rows change."""
        return self.changes_keys or self.changes_times or bool(self.new_columns)

    def check_types(self) -> None:
        """Raise InvalidArgument for a feature whose stored values may not fit its new type."""
        for old, new in self.pairs:
            if old is not None and old.dtype != new.dtype and not widens(old.dtype, new.dtype):
                raise InvalidArgument(
                    f"feature view '{self.after.view.name}': feature '{new.name}' is {old.dtype}, and its values may"
                    f" not fit {new.dtype}; add a feature of another name, and remove this one"
                )

    def of_rows(self) -> list[str]:
        """Describe what changes the rows."""
        found = []
        if self.changes_keys:
            found.append(f"keys {show_keys(self.before.view.entity)} -> {show_keys(self.after.view.entity)}")
        if self.changes_times:
            found.append(f"event times from '{self.after.view.timestamp}' instead of '{self.before.view.timestamp}'")
        kinds: dict[str, list[str]] = {"new feature": [], "widened": [], "read from another column": []}
        for old, new in self.pairs:
            if old is None:
                kinds["new feature"].append(new.name)
            elif old.dtype != new.dtype:
                kinds["widened"].append(f"{new.name} {old.dtype} -> {new.dtype}")
            elif self.before.column_of(old.name) != self.after.column_of(new.name):
                kinds["read from another column"].append(f"{new.name} from '{new.source_column}'")
        return found + _listed(kinds)

    def of_answers(self) -> list[str]:
        """Describe what changes the answers, but not the rows."""
        before, after = self.before.view, self.after.view
        found = [f"ttl {show_ttl(before.ttl_us)} -> {show_ttl(after.ttl_us)}"] if before.ttl_us != after.ttl_us else []
        if not self.changes_keys and list(before.keys) != list(after.keys):
            found.append(f"keys named {', '.join(after.keys)} instead of {', '.join(before.keys)}")
        both = [(old, new) for old, new in self.pairs if old is not None]
        kinds = {
            "renamed": [f"{old.name} -> {new.name}" for old, new in both if old.name != new.name],
            "removed": self.removed,
            "default": [
                f"of {new.name} {old.default!r} -> {new.default!r}" for old, new in both if not same_default(old, new)
            ],
        }
        found += _listed(kinds)
        order = [old.name for old, _ in both]
        if order != [f.name for f in before.features if f.name in order]:
            found.append("features in another order")
        return found

    def of_texts(self) -> list[str]:
        """Describe what changes neither rows nor answers."""
        before, after = self.before.view, self.after.view
        found = ["source"] if before.source != after.source and not self.changes_times else []
        both = [(old, new) for old, new in self.pairs if old is not None]
        found += [
            f"column of {new.name}"
            for old, new in both
            if old.column != new.column and self.before.column_of(old.name) == self.after.column_of(new.name)
        ]
        texts = [(old.description, new.description) for old, new in both]
        texts += [(before.description, after.description), (before.entity.description, after.entity.description)]
        if any(old != new for old, new in texts):
            found.append("descriptions")
        if before.owner != after.owner:
            found.append("owner")
        tags = [(old.tags, new.tags) for old, new in both]
        tags += [(before.tags, after.tags), (before.entity.tags, after.entity.tags)]
        if any(old != new for old, new in tags):
            found.append("tags")
        if before.entity.name != after.entity.name:
            found.append(f"entity {after.entity.name}")
        return found

    def kept_answers(self, info: VersionInfo) -> list[str]:
        """Describe what answers of a version differ between the two definitions, beside features that are widened."""
        before, after, found = self.before.view, self.after.view, []
        if before.ttl_us != after.ttl_us:
            found.append(f"ttl {show_ttl(before.ttl_us)}")
        if list(before.keys.items()) != list(after.keys.items()):
            found.append(f"keys {show_keys(before.entity)}")
        for name in used_features(info, before):
            old = before.features[before.feature_index[name]]
            index = after.feature_index.get(name)
            new = None if index is None else after.features[index]
            if new is None:
                found.append(f"'{name}'")
            elif self.before.column_of(name) != self.after.column_of(name) and not widens(old.dtype, new.dtype):
                found.append(f"the values of '{name}'")
            elif not same_default(old, new):
                found.append(f"default {old.default!r} of '{name}'")
        return found


def same_default(old: Feature, new: Feature) -> bool:
    """Whether two features have one default, which may be in two types."""
    # Compared as text too, because a default that is NaN does not equal itself.
    return bool(old.default == new.default) or repr(old.default) == repr(new.default)


def _listed(kinds: dict[str, list[str]]) -> list[str]:
    return [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]


def used_features(info: VersionInfo, view: FeatureView) -> list[str]:
    """Return the names of the features of a view that a version takes, which the view has."""
    found: dict[str, None] = {}
    for reference in info.model.references:
        lookup, name = split_reference(reference)
        if lookup.rpartition(":")[2] == view.name and name in view.feature_index:
            found[name] = None
    return list(found)


def users(catalog: Catalog, view: str) -> Iterator[tuple[str, int, VersionInfo]]:
    """Yield the live versions of models that take features of a view, as (model, version, info)."""
    for name, entry in catalog.models.items():
        for number, info in sorted(entry.live.items()):
            if view in info.views:
                yield name, number, info


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
