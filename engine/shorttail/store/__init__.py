"""The online store: paged hash tables in LMDB."""

from shorttail.store.store import Store
from shorttail.store.table import ColumnBatch

__all__ = ["ColumnBatch", "Store"]
