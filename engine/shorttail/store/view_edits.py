"""The edits of a view, encoded for each of its tables that takes them.

Lookups read one table. A table that is about to replace it takes the same edits; one that is being filled gets them
later, from a list. The table that `views rollback` returns to takes deletes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shorttail.define.catalog import Catalog
from shorttail.define.tables import Stored, TableInfo
from shorttail.errors import ShorttailError
from shorttail.store import pending
from shorttail.store.commits import is_current
from shorttail.store.edits import Delete, Edit, TableDamaged, TableEdits
from shorttail.store.environment import WriteTransaction
from shorttail.store.erased import Erased


@dataclass(slots=True)
class ViewEdits:
    """The edits of one view, in the order given.

    roles: the tables of the view by their role in the catalog. erased: the keys of its entity that were erased.
    """

    stored: Stored
    roles: dict[str, TableInfo]
    erased: Erased
    tables: dict[str, TableEdits] = field(default_factory=dict)  # by the role of the table

    @classmethod
    def encode(
        cls, catalog: Catalog, name: str, edits: Sequence[tuple[int, Edit]], separately: bool, erased: Erased
    ) -> tuple[ViewEdits, dict[int, ShorttailError]]:
        """Encode numbered edits, and return the errors of those that are wrong by number. Raises NotFound.

        separately: see TableEdits.encode().
        """
        stored, roles = catalog.stored(name), catalog.edited(name)
        found = cls(stored, roles, erased)
        errors: dict[int, ShorttailError] = {}
        for role, table in roles.items():
            taken = [(n, edit) for n, edit in edits if role != "previous" or isinstance(edit, Delete)]
            encoded = TableEdits.of(Stored(stored.definition, table), erased)
            errors |= encoded.encode([item for item in taken if item[0] not in errors], separately)
            if encoded.steps:
                found.tables[role] = encoded
        return found, errors

    @property
    def numbers(self) -> list[int]:
        """The numbers of the edits that are not wrong."""
        return list(self.tables["tables"].numbers) if "tables" in self.tables else []

    def is_current(self, catalog: Catalog, writer: WriteTransaction) -> bool:
        """Whether the edits still fit the view and all its tables, and no more keys were erased."""
        same = is_current(catalog, self.stored) and catalog.edited(self.stored.view.name) == self.roles
        return same and self.erased.is_current(writer.txn)

    def apply(self, writer: WriteTransaction, now_us: int) -> dict[int, int]:
        """Apply the edits to all tables. now_us, and the result: see TableEdits.apply(). Raises TableDamaged."""
        outcomes = self.tables["tables"].apply(writer, now_us)
        for role, edits in self.tables.items():
            if role == "filling":
                pending.append(writer, edits, now_us)
            elif role == "coming":
                edits.apply(writer, now_us)
            elif role == "previous":
                try:
                    edits.apply(writer, now_us)
                except TableDamaged:  # no lookup reads it: there is nothing to go back to any more
                    self._forget_previous(writer)
        return outcomes

    def _forget_previous(self, writer: WriteTransaction) -> None:
        catalog = Catalog.from_json(writer.get_catalog())
        del catalog.previous[self.stored.view.name]
        writer.put_catalog(catalog.to_json())
