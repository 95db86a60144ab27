"""Tables of views for tests that write rows without a store."""

from __future__ import annotations

from shorttail._native.pages import Layout
from shorttail.define.catalog import PAGE_FORMAT
from shorttail.define.identity import define
from shorttail.define.tables import Stored, TableInfo
from shorttail.define.views import FeatureView
from shorttail.store.table import make_layout


def stored(
    view: FeatureView, seed: int = 1, table_id: int = 1, page_bytes: int = 0, page_format: int = PAGE_FORMAT
) -> Stored:
    """Return a view with a table of exactly its columns."""
    definition = define(view, None, 0)
    return Stored(definition, TableInfo.of(definition, table_id, seed, page_bytes, page_format))


def layout_of(
    view: FeatureView, seed: int = 1, table_id: int = 1, page_bytes: int = 0, page_format: int = PAGE_FORMAT
) -> Layout:
    """Return the row layout of such a table."""
    return make_layout(stored(view, seed, table_id, page_bytes, page_format))
