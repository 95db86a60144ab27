"""The views and models of a store as mappings, whose items show themselves as text or as cards in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from shorttail.define.views import FeatureView
from shorttail.errors import NotFound, printable
from shorttail.registry import describe, versions
from shorttail.registry.inside import describe_view, feature_table, list_views, show_lines
from shorttail.store import Store
from shorttail.store.rows import ViewRows, get_rows

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from shorttail.models.serving import Versions

Rows = Sequence[Sequence[Any]]


class UnknownItem(NotFound, KeyError):
    """Raised for a name that a mapping of this module does not have: it is a KeyError too, as for every mapping."""

    __str__ = Exception.__str__


class StoredView:
    """A view in a store: its definition and its rows. Each use reads the newest commit."""

    def __init__(self, store: Store, name: str):
        self._store = store
        self.name = name

    @property
    def definition(self) -> FeatureView:
        """The view's definition. Raises NotFound."""
        self._store.refresh()
        return self._store.catalog.view(self.name)

    def rows(
        self, limit: int | None = None, where: str | Sequence[str] = (), columns: Sequence[str] | None = None
    ) -> ViewRows:
        """Begin a pass over the rows, which yields a batch at a time; use it in a `with` block.

        limit: the most rows. where: conditions such as "tier=gold" or ["tier=gold", "age>=30"], all of which a row
        satisfies. columns: names, in this order; None: keys, features and the event time. Rows have no order. Raises
        NotFound and InvalidArgument; iteration raises Internal for a damaged table, and DeadlineExceeded if no batch
        was taken for LIMITS.scan_idle_s.
        """
        return ViewRows(self._store, self.name, columns, where, limit)

    def to_arrow(
        self, limit: int | None = None, where: str | Sequence[str] = (), columns: Sequence[str] | None = None
    ) -> pyarrow.Table:
        """Return rows as an Arrow table, of the types of `Features.to_arrow`. For arguments and errors see `rows`."""
        with self.rows(limit, where, columns) as rows:
            return rows.to_arrow()

    def to_pandas(
        self, limit: int | None = None, where: str | Sequence[str] = (), columns: Sequence[str] | None = None
    ) -> pandas.DataFrame:
        """Return rows as a DataFrame, of the types of `Features.to_pandas`. For arguments and errors see `rows`."""
        with self.rows(limit, where, columns) as rows:
            return rows.to_pandas()

    def get(self, keys: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the stored rows of {key column: value or values} as [{"status", "row"}].

        status: PRESENT, STALE or NOT_FOUND. row: {column: value}, also with the event time; a time is in microseconds
        since 1970 UTC. Defaults are not filled in. Raises NotFound, InvalidArgument, Internal (damaged table).
        """
        from shorttail.sources.rows import key_arrays

        found = get_rows(self._store, self.name, key_arrays(self.definition, keys))
        return [{"status": status.name, "row": row} for status, row in found]

    def describe(self) -> dict[str, Any]:
        """Return what `shorttail views show --json` prints: definition, size, freshness, and a few rows.

        Reads the event times of all rows. Raises NotFound, and Internal for a damaged table.
        """
        self._store.refresh()
        return describe_view(self._store, self.name)

    def show(self) -> None:
        """Print what `describe` returns."""
        found = self.describe()
        print(card_text(show_lines(found), *feature_table(found)))

    def __repr__(self) -> str:
        return f"StoredView({self.name!r})"

    def _repr_html_(self) -> str:
        found = self.describe()
        sample = found["sample"]
        rows = html_table(list(sample[0]), [list(row.values()) for row in sample]) if sample else ""
        return card_html(show_lines(found), html_table(*feature_table(found)), rows)


class StoredModel:
    """A model in a store: the definition of the version that serves."""

    def __init__(self, store: Store, name: str):
        self._store = store
        self.name = name

    def describe(self) -> dict[str, Any]:
        """Return the version that serves: its definition, inputs and outputs, and the columns of a request."""
        self._store.refresh()
        return versions.describe(self._store.catalog, self.name)

    def show(self) -> None:
        """Print what `describe` returns."""
        print(card_text(*model_card(self.describe())))

    def __repr__(self) -> str:
        return f"StoredModel({self.name!r})"

    def _repr_html_(self) -> str:
        lines, header, rows = model_card(self.describe())
        return card_html(lines, html_table(header, rows))


class StoredViews(Mapping[str, StoredView]):
    """The views of a store by name, as of the newest commit. Raises UnknownItem, which is NotFound and a KeyError."""

    def __init__(self, store: Store):
        self._store = store

    def __call__(self) -> list[dict[str, Any]]:
        """[{"name", "keys": {column: type}, "features": {feature: type}, "columns": {feature: column}, "timestamp",
        "aliases": {alias: {key column: request column}}}].

        columns: of the features that have another name in rows that are pushed. timestamp: a column, or None.
        """
        self._store.refresh()
        return describe.views(self._store.catalog)

    def __getitem__(self, name: str) -> StoredView:
        self._store.refresh()
        try:
            self._store.catalog.view(name)
        except NotFound as error:
            raise UnknownItem(error.message) from None
        return StoredView(self._store, name)

    def __iter__(self) -> Iterator[str]:
        self._store.refresh()
        return iter(list(self._store.catalog.views))

    def __len__(self) -> int:
        self._store.refresh()
        return len(self._store.catalog.views)

    def __repr__(self) -> str:
        return f"StoredViews({list(self)})"

    def _repr_html_(self) -> str:
        self._store.refresh()
        listed = list_views(self._store)
        header = ["name", "entity", "features", "rows", "owner", "tags", "newest"]
        return html_table(header, [[view[name] for name in header] for view in listed])


class StoredModels(Mapping[str, StoredModel]):
    """The models of a store by name, as of the newest commit. Raises UnknownItem, which is NotFound and a KeyError."""

    def __init__(self, store: Store, loaded: Versions):
        self._store = store
        self._loaded = loaded

    def __call__(self) -> list[dict[str, Any]]:
        """[{"name", "version", "columns": {column: type}, "outputs": [name], "runs": text, "batching",
        "batching_why", "canary", "shadow", "problem"}] of the versions that serve.

        runs: what runs the model and why; None until it is loaded. batching: "rows" if requests share runs, "request"
        if each has runs of its own; batching_why: the reason or a remark, or None. canary, shadow: {"version",
        "percent"} or None; a server adds what its shadows were found to answer. problem: why what the catalog names
        does not serve, or None. A model that takes tensors has "tensors" too: {input: type and shape}; its columns are
        {}.
        """
        self._store.refresh()
        return describe.models(self._store.catalog, self._loaded)

    def __getitem__(self, name: str) -> StoredModel:
        self._store.refresh()
        try:
            self._store.catalog.model(name)
        except NotFound as error:
            raise UnknownItem(error.message) from None
        return StoredModel(self._store, name)

    def __iter__(self) -> Iterator[str]:
        self._store.refresh()
        return iter(list(self._store.catalog.models))

    def __len__(self) -> int:
        self._store.refresh()
        return len(self._store.catalog.models)

    def __repr__(self) -> str:
        return f"StoredModels({list(self)})"

    def _repr_html_(self) -> str:
        self._store.refresh()
        header = ["name", "version", "columns", "outputs", "owner", "tags"]
        listed = versions.list_versions(self._store.catalog)
        return html_table(header, [[model[name] for name in header] for model in listed if model["serving"]])


def model_card(found: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[str], Rows]:
    """Return the lines of a model's card, and the header and the rows of its table of columns."""
    lines = [
        ("model", f"{found['name']} version {found['version']}"),
        ("description", found["description"]),
        ("owner", found["owner"]),
        ("tags", ", ".join(found["tags"])),
        ("created", found["created"]),
        ("run", found["run"]),
        ("metrics", ", ".join(f"{name} {number:g}" for name, number in found["metrics"].items())),
        ("features", ", ".join(found["features"])),
        ("outputs", ", ".join(found["outputs"])),
    ]
    table = [[column, dtype] for column, dtype in found["columns"].items()]
    return [(label, text) for label, text in lines if text], ["column of a request", "type"], table


# -- text and HTML -----------------------------------------------------------------------------------------------------


def card_text(lines: Sequence[tuple[str, Any]], header: Sequence[str], rows: Rows) -> str:
    """Return the lines and an aligned table as text. Characters that are not printable are escaped."""
    cells = [[cell_text(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*(f"{label + ':':<13}{cell_text(text)}" for label, text in lines), "", *table])


def cell_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value))
    return "" if value is None else printable(f"{value:.6g}" if isinstance(value, float) else str(value))


def card_html(lines: Sequence[tuple[str, Any]], *tables: str) -> str:
    """Return the lines as a table of HTML with `tables`, which are HTML, below."""
    facts = "".join(
        f"<tr><th style='text-align:left'>{escape(label)}</th><td style='text-align:left'>{escape(cell_text(text))}"
        "</td></tr>"
        for label, text in lines
    )
    return f"<table>{facts}</table>{''.join(tables)}"


def html_table(header: Sequence[str], rows: Rows) -> str:
    """Return a table of HTML. Every name and value is escaped: rows may hold any text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell_text(value))}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
