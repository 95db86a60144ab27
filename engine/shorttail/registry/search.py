"""Finds entities, views, features and models by a word in their names, tags, owners and descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shorttail.define.catalog import Catalog

FIELDS = ("name", "tags", "owner", "description")  # the best first


def search(catalog: Catalog, word: str) -> list[dict[str, Any]]:
    """Return [{"kind", "name", "matched": [field], "owner", "tags", "description"}], those with the best matches first.

    kind: entity, view, feature or model, of which the version that serves counts. A feature is named "view:feature".
    matched: the fields that hold the word, whatever its case. Items without an owner have "".
    """
    wanted = word.casefold()
    found = []
    for item in _items(catalog):
        own_name = item["name"].rpartition(":")[2]
        texts = {"name": [own_name], "tags": item["tags"], **{f: [item[f]] for f in ("owner", "description")}}
        matched = [field for field in FIELDS if any(wanted in text.casefold() for text in texts[field])]
        if matched:
            found.append((own_name.casefold() != wanted, FIELDS.index(matched[0]), {**item, "matched": matched}))
    return [item for *_, item in sorted(found, key=lambda entry: entry[:2])]


def _items(catalog: Catalog) -> Iterator[Mapping[str, Any]]:
    for entity in catalog.entities.values():
        yield _item("entity", entity.name, entity)
    for view in catalog.views.values():
        yield _item("view", view.name, view)
        for feature in view.features:
            yield _item("feature", f"{view.name}:{feature.name}", feature)
    for name, entry in catalog.models.items():
        yield _item("model", name, entry.model)


def _item(kind: str, name: str, definition: Any) -> dict[str, Any]:
    owner = getattr(definition, "owner", "")
    about = {"owner": owner, "tags": list(definition.tags), "description": definition.description}
    return {"kind": kind, "name": name, **about}
