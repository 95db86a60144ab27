"""`shorttail load`, `push` and `delete`: commands that change rows, in a store or, except a load, through a server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from shorttail.cli.options import (
    by_option,
    changed_by,
    connect,
    json_option,
    load_options,
    opened,
    progress_bar,
    source_options,
    store_option,
)
from shorttail.cli.output import count_document, count_line, print_json
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, ShorttailError

if TYPE_CHECKING:
    from shorttail.client import Client
    from shorttail.define.views import FeatureView
    from shorttail.results import RowCount
    from shorttail.store import ColumnBatch, Store

REQUEST_ROWS = 4096  # most rows in a request to a server
REQUEST_BYTES = LIMITS.frame_bytes // 4
TIMEOUT_S = 60.0  # long, because a server may be busy with other writes


@click.command()
@click.argument("view")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@store_option
@load_options
@by_option
@json_option
def load(view: str, files: tuple[str, ...], store: str, memory_mib: int, allow_shrink: bool, as_json: bool) -> None:
    """Replace all rows of VIEW by the rows of files.

    FILE is a Parquet, Arrow (.arrow, .feather) or CSV (.csv) file, a folder of such files, or a pattern such
    as 'day/*.parquet'. Their columns are matched by name. The new rows replace all old rows in a single
    commit. Of rows with the same key, the one with the latest event time is loaded.

    \b
    Example:
      shorttail load user_stats today.parquet --store store
      shorttail load user_stats 'stats/country=*/*.parquet' --store store
    """
    from shorttail.engine import Engine
    from shorttail.sources import batches  # noqa: F401  imported before the time is measured

    with Engine.open(store, by=changed_by()) as engine, progress_bar(view) as progress:
        engine.refresh()
        start_s = time.perf_counter()
        count = engine.load(view, list(files), progress, memory_bytes=memory_mib << 20, allow_shrink=allow_shrink)
        seconds = time.perf_counter() - start_s
    if as_json:
        return print_json(count_document(view, count, seconds))
    click.echo(count_line(view, count, seconds))


@click.command()
@click.argument("view")
@click.argument("file")
@click.option("--partial", is_flag=True, help="Only some features: the others keep what is stored.")
@source_options
@json_option
def push(view: str, file: str, partial: bool, store: str | None, server: str | None, as_json: bool) -> None:
    """Insert or replace rows of VIEW from a file.

    FILE is a Parquet, Arrow (.arrow, .feather) or CSV (.csv) file, a folder of such files, or a pattern such
    as 'day/*.parquet'. Its columns are matched by name. A row whose event time is older than that of the
    stored row is ignored. With --server, at most 4,096 rows are sent in a request.

    With --partial, a file has the keys and only some features, and no columns that the view does not have. The
    other features keep what is stored; in a new row they are null.

    \b
    Example:
      shorttail push user_stats today.parquet --store store
      shorttail push user_stats tiers.csv --partial --store store
      shorttail push user_stats today.parquet --server 127.0.0.1:7711
    """
    from shorttail.results import RowCount
    from shorttail.sources.batches import open_source, row_batches

    with open_writer(store, server) as writer:
        definition = writer.view(view)
        source = open_source(file, definition)
        batches = row_batches(source, definition, definition.timestamp, writer.max_clock_skew_us, partial)
        pushed, start_s = RowCount.total([]), time.perf_counter()
        try:
            with progress_bar(view) as progress:
                for batch in batches:
                    for count in writer.push(definition, batch, partial):
                        pushed = RowCount.total([pushed, count])
                        progress(pushed.given, source.rows)
        except ShorttailError as error:
            raise with_progress(error, pushed.given, "pushed") from None
        seconds = time.perf_counter() - start_s
    if as_json:
        return print_json(count_document(view, pushed, seconds))
    click.echo(count_line(view, pushed, seconds))


@click.command()
@click.argument("view")
@click.argument("values", nargs=-1, metavar="KEY=VALUE...")
@click.option("--file", metavar="FILE", help="Parquet, Arrow or CSV file with the keys to delete.")
@source_options
@json_option
def delete(
    view: str, values: tuple[str, ...], file: str | None, store: str | None, server: str | None, as_json: bool
) -> None:
    """Delete rows of VIEW by their keys.

    KEY=a,b,c deletes three rows. A key with a single value has it in all rows. A view without keys has one
    row, which is deleted without KEY=VALUE.

    \b
    Example:
      shorttail delete user_stats user_id=42 --store store
      shorttail delete user_stats user_id=1,2,3 --server 127.0.0.1:7711
      shorttail delete user_stats --file gone.parquet --store store
    """
    usage = click.UsageError("give either KEY=VALUE... or --file FILE", click.get_current_context())
    if values and file is not None:
        raise usage
    with open_writer(store, server) as writer:
        definition = writer.view(view)
        if definition.keys and not values and file is None:
            raise usage
        keys = rows = 0
        try:
            with progress_bar(view) as progress:
                for count, total, columns in key_columns(definition, values, file):
                    rows += writer.delete(definition, columns)
                    keys += count
                    progress(keys, total)
        except ShorttailError as error:
            raise with_progress(error, rows, "deleted") from None
    if as_json:
        return print_json({"view": view, "keys": keys, "rows": rows})
    of = f" of {keys:,} key{'' if keys == 1 else 's'}" if definition.keys else ""
    click.echo(f"{view}: {rows:,} row{'' if rows == 1 else 's'} deleted{of}")


def with_progress(error: ShorttailError, rows: int, done: str) -> ShorttailError:
    """Return the error with the number of rows that were changed before it. done: "pushed" or "deleted"."""
    return type(error)(f"{error.message} (before the error {rows:,} rows were {done})") if rows else error


@contextlib.contextmanager
def open_writer(store: str | None, server: str | None) -> Iterator[StoreWriter | ServerWriter]:
    """Yield a writer to the store or to the server; exactly one of the two is given."""
    if (store is None) == (server is None):
        raise click.UsageError("give either --store STORE or --server ADDR", click.get_current_context())
    if store is not None:
        with opened(store) as found:
            yield StoreWriter(found)
    else:
        assert server is not None
        with connect(server, TIMEOUT_S) as client:
            yield ServerWriter(client)


class StoreWriter:
    """Changes rows of a store in this process."""

    def __init__(self, store: Store):
        self.store = store
        self.max_clock_skew_us: int = store.catalog.max_clock_skew_us

    def view(self, name: str) -> FeatureView:
        return self.store.catalog.view(name)

    def push(self, view: FeatureView, batch: ColumnBatch, partial: bool) -> Iterator[RowCount]:
        yield self.store.upsert(view.name, batch)

    def delete(self, view: FeatureView, columns: dict[str, Any]) -> int:
        from shorttail.sources.rows import key_arrays

        return self.store.delete(view.name, key_arrays(view, columns))


class ServerWriter:
    """Changes rows through a server, in requests that fit into a message. The server's clock judges event times."""

    max_clock_skew_us = None

    def __init__(self, client: Client):
        self.client = client

    def view(self, name: str) -> FeatureView:
        """Return a view with the fields that reading a file needs. Raises NotFound."""
        from shorttail.define.dtypes import parse_dtype
        from shorttail.define.entities import Entity
        from shorttail.define.names import quoted, suggestion
        from shorttail.define.sources import ParquetSource
        from shorttail.define.views import Feature, FeatureView

        views = {view["name"]: view for view in self.client.views()}
        if name not in views:
            raise NotFound(f"no feature view {quoted(name)}{suggestion(name, views, 'views')}")
        view = views[name]
        keys = {key: parse_dtype(dtype) for key, dtype in view["keys"].items()}
        renamed = view.get("columns", {})  # older servers have none
        features = [
            Feature(feature, parse_dtype(dtype), column=renamed.get(feature))
            for feature, dtype in view["features"].items()
        ]
        source = ParquetSource("-", view["timestamp"]) if view["timestamp"] else None
        return FeatureView(name, Entity("entity", keys), features, source=source)

    def push(self, view: FeatureView, batch: ColumnBatch, partial: bool) -> Iterator[RowCount]:
        """Send the batch, and yield the count of each request."""
        for start in range(0, len(batch), REQUEST_ROWS):
            for part in split_batch(batch.slice(start, start + REQUEST_ROWS)):
                yield self.client.push(view.name, wire_columns(view, part), partial=partial)

    def delete(self, view: FeatureView, columns: dict[str, Any]) -> int:
        return self.client.delete(view.name, columns)


def split_batch(batch: ColumnBatch) -> Iterator[ColumnBatch]:
    """Halve a batch until each part fits into a message."""
    rows = len(batch)
    if rows == 1 or wire_bytes(batch) <= REQUEST_BYTES:
        yield batch
    else:
        yield from split_batch(batch.slice(0, rows // 2))
        yield from split_batch(batch.slice(rows // 2, rows))


def wire_bytes(batch: ColumnBatch) -> int:
    """Estimate the bytes of the columns in a message."""
    from shorttail.store.table import Texts

    total = 0
    for values in (*batch.keys, *(values for values, _ in batch.features)):
        if isinstance(values, Texts):
            total += int(values.offsets[-1] - values.offsets[0]) + 5 * len(values)
        elif values.dtype == object:
            total += sum(len(value.encode()) + 5 for value in values if value is not None)
        else:
            total += 9 * values.size
    return total


def wire_columns(view: FeatureView, batch: ColumnBatch) -> dict[str, Any]:
    """Return the columns of a batch as Client.push takes them. Raises InvalidArgument."""
    from shorttail.sources.rows import time_column
    from shorttail.store.table import UNTIMED

    given: list[tuple[str, Any, Any]] = [
        (name, values, None) for name, values in zip(view.keys, batch.keys, strict=True)
    ]
    names = [view.features[f].source_column for f in batch.numbers(view)]
    given += [(name, *column) for name, column in zip(names, batch.features, strict=True)]
    columns = {}
    for name, values, nulls in given:
        try:
            columns[name] = wire_values(values, nulls)
        except UnicodeDecodeError:
            raise InvalidArgument(f"view '{view.name}': column '{name}' holds a string that is not UTF-8") from None
    if (timestamp := time_column(view)) is not None and not (batch.event_time_us == UNTIMED).all():
        columns[timestamp] = batch.event_time_us.view("datetime64[us]")  # not numbers: their unit was checked here
    return columns


def wire_values(values: Any, nulls: Any) -> Any:
    if nulls is None or not nulls.any():
        return values if hasattr(values, "dtype") else values.tolist()
    return [None if null else value for value, null in zip(values.tolist(), nulls.tolist(), strict=True)]


def key_columns(
    view: FeatureView, values: tuple[str, ...], file: str | None
) -> Iterator[tuple[int, int | None, dict[str, Any]]]:
    """Yield (number of keys, number of all keys if known, columns) for each request."""
    if file is None:
        from shorttail.define.text import parse_columns

        dtypes = {name: dtype.name for name, dtype in view.keys.items()}
        columns = parse_columns(values, dtypes, f"view '{view.name}'")
        count = max((len(value) for value in columns.values() if isinstance(value, list)), default=1)
        yield count, count, columns
        return
    from shorttail.sources.batches import key_batches, open_source

    if not view.keys:
        raise InvalidArgument(f"view '{view.name}' has no keys: delete its only row without --file")
    source = open_source(file, view)
    for arrays in key_batches(source, view, REQUEST_ROWS):
        yield len(arrays[0]), source.rows, dict(zip(view.keys, arrays, strict=True))
