"""The online store: one paged hash table per feature view, in LMDB."""

from shorttail.store.edits import Delete, Edit, Upsert
from shorttail.store.store import Store
from shorttail.store.table import ColumnBatch

__all__ = ["ColumnBatch", "Delete", "Edit", "Store", "Upsert"]
