"""The online store: paged hash tables in LMDB."""

from shorttail.store.edits import Delete, Edit, Upsert
from shorttail.store.store import Store
from shorttail.store.table import ColumnBatch

__all__ = ["ColumnBatch", "Delete", "Edit", "Store", "Upsert"]
