"""The online store: paged hash tables in LMDB."""

from shorttail.store.store import Delete, Edit, Store, Upsert
from shorttail.store.table import ColumnBatch

__all__ = ["ColumnBatch", "Delete", "Edit", "Store", "Upsert"]
