"""What a store holds, how its parts belong together, and how they came to be: the part of Engine that answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shorttail.registry.cards import StoredModels, StoredViews
from shorttail.registry.history import History
from shorttail.registry.lineage import Lineage, lineage
from shorttail.registry.search import search
from shorttail.store import Store

if TYPE_CHECKING:
    from shorttail.models.serving import Versions


class StoreContents:
    """The questions to an open store that need no plan and no model. Engine is the only subclass."""

    _store: Store
    _versions: Versions

    def history(self, name: str | None = None) -> History:
        """What was changed, oldest first (docs/history.md). Raises NotFound.

        name: a view, a model or an entity; None: all.
        """
        return History(self._store.history()).of(name)

    @property
    def views(self) -> StoredViews:
        """The views by name: `engine.views["user_stats"].to_pandas(limit=20)`. Called, a list of what each takes."""
        return StoredViews(self._store)

    def search(self, word: str) -> list[dict[str, Any]]:
        """Find entities, views, features and models by a part of a name, tag, owner or description: see search()."""
        self._store.refresh()
        return search(self._store.catalog, word)

    def lineage(self, name: str) -> Lineage:
        """What `name` comes from, and what comes from it: see lineage(). Printed, it is a tree. Raises NotFound."""
        self._store.refresh()
        return lineage(self._store.catalog, name)

    @property
    def models(self) -> StoredModels:
        """The models by name: `engine.models["fraud"].show()`. Called, a list of what serves and what it takes."""
        return StoredModels(self._store, self._versions)
