"""Commands that change rows: `shorttail push` and `shorttail delete`, of a store or through a server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from shorttail.cli.options import connect, json_option, opened, progress_bar, source_options
from shorttail.cli.output import print_json, rate
from shorttail.config import LIMITS
from shorttail.errors import InvalidArgument, NotFound, ShorttailError

if TYPE_CHECKING:
    from shorttail.client import Client
    from shorttail.define.views import FeatureView
    from shorttail.store import ColumnBatch, Store

REQUEST_ROWS = 4096  # sent to a server at a time
REQUEST_BYTES = LIMITS.frame_bytes // 4
TIMEOUT_S = 60.0  # a server may be busy with other writes


@click.command()
@click.argument("view")
@click.argument("file")
@source_options
@json_option
def push(view: str, file: str, store: str | None, server: str | None, as_json: bool) -> None:
    """Upsert the rows of a file into VIEW.

    FILE is Parquet, Arrow (.arrow, .feather) or CSV (.csv). Columns are found by name. A row older
    than the one stored is dropped. Through a server, rows are sent some thousand at a time.

    \b
    Example:
      shorttail push user_stats today.parquet --store store
      shorttail push user_stats today.parquet --server 127.0.0.1:7711
    """
    from shorttail.sources.parquet import parquet_batches

    with target(store, server) as rows_of:
        definition = rows_of.view(view)
        total, batches = parquet_batches(file, definition, definition.timestamp)
        rows, start_s = 0, time.perf_counter()
        try:
            with progress_bar(view) as progress:
                for batch in batches:
                    for taken in rows_of.push(definition, batch):
                        rows += taken
                        progress(rows, total)
        except ShorttailError as error:
            raise after(error, rows, "pushed") from None
        seconds = time.perf_counter() - start_s
    if as_json:
        return print_json({"view": view, "rows": rows, "seconds": round(seconds, 6)})
    click.echo(f"{view}: {rate(rows, seconds)}")


@click.command()
@click.argument("view")
@click.argument("values", nargs=-1, metavar="KEY=VALUE...")
@click.option("--file", metavar="FILE", help="Take the keys from a Parquet, Arrow or CSV file.")
@source_options
@json_option
def delete(
    view: str, values: tuple[str, ...], file: str | None, store: str | None, server: str | None, as_json: bool
) -> None:
    """Delete rows of VIEW by their keys.

    `a,b,c` deletes several; one value beside it is repeated.

    \b
    Example:
      shorttail delete user_stats user_id=42 --store store
      shorttail delete user_stats user_id=1,2,3 --server 127.0.0.1:7711
      shorttail delete user_stats --file gone.parquet --store store
    """
    if bool(values) == (file is not None):
        raise click.UsageError("give either KEY=VALUE... or --file FILE", click.get_current_context())
    with target(store, server) as rows_of:
        definition = rows_of.view(view)
        keys = rows = 0
        try:
            with progress_bar(view) as progress:
                for count, total, columns in key_columns(definition, values, file):
                    rows += rows_of.delete(definition, columns)
                    keys += count
                    progress(keys, total)
        except ShorttailError as error:
            raise after(error, rows, "deleted") from None
    if as_json:
        return print_json({"view": view, "keys": keys, "rows": rows})
    click.echo(f"{view}: {rows:,} row{'' if rows == 1 else 's'} deleted of {keys:,} key{'' if keys == 1 else 's'}")


def after(error: ShorttailError, rows: int, done: str) -> ShorttailError:
    """The error, and what is stored in spite of it."""
    return type(error)(f"{error.message} ({rows:,} rows before were {done})") if rows else error


@contextlib.contextmanager
def target(store: str | None, server: str | None) -> Iterator[RowsOfStore | RowsOfServer]:
    """Whose rows are changed."""
    if (store is None) == (server is None):
        raise click.UsageError("give either --store STORE or --server ADDR", click.get_current_context())
    if store is not None:
        with opened(store) as found:
            yield RowsOfStore(found)
    else:
        assert server is not None
        with connect(server, TIMEOUT_S) as client:
            yield RowsOfServer(client)


class RowsOfStore:
    def __init__(self, store: Store):
        self.store = store

    def view(self, name: str) -> FeatureView:
        return self.store.catalog.view(name)

    def push(self, view: FeatureView, batch: ColumnBatch) -> Iterator[int]:
        yield self.store.upsert(view.name, batch)

    def delete(self, view: FeatureView, columns: dict[str, Any]) -> int:
        from shorttail.sources.rows import key_arrays

        return self.store.delete(view.name, key_arrays(view, columns))


class RowsOfServer:
    def __init__(self, client: Client):
        self.client = client

    def view(self, name: str) -> FeatureView:
        """As far as reading a file needs it. Raises NotFound."""
        from shorttail.define.dtypes import parse_dtype
        from shorttail.define.entities import Entity
        from shorttail.define.sources import ParquetSource
        from shorttail.define.views import Feature, FeatureView

        views = {view["name"]: view for view in self.client.views()}
        if name not in views:
            raise NotFound(f"no feature view '{name}'; views: {', '.join(views) or 'none'}")
        view = views[name]
        keys = {key: parse_dtype(dtype) for key, dtype in view["keys"].items()}
        features = [Feature(feature, parse_dtype(dtype)) for feature, dtype in view["features"].items()]
        source = ParquetSource("-", view["timestamp"]) if view["timestamp"] else None
        return FeatureView(name, Entity("entity", keys), features, source=source)

    def push(self, view: FeatureView, batch: ColumnBatch) -> Iterator[int]:
        """Yields the rows of each request."""
        for start in range(0, len(batch), REQUEST_ROWS):
            for part in parts(batch.slice(start, start + REQUEST_ROWS)):
                yield self.client.push(view.name, wire_columns(view, part))

    def delete(self, view: FeatureView, columns: dict[str, Any]) -> int:
        return self.client.delete(view.name, columns)


def parts(batch: ColumnBatch) -> Iterator[ColumnBatch]:
    """Batches that a message can hold."""
    rows = len(batch)
    if rows == 1 or weight(batch) <= REQUEST_BYTES:
        yield batch
    else:
        yield from parts(batch.slice(0, rows // 2))
        yield from parts(batch.slice(rows // 2, rows))


def weight(batch: ColumnBatch) -> int:
    """About the bytes of the columns on the wire."""
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
    """The batch as Client.push takes it."""
    from shorttail.sources.rows import time_column

    given: list[tuple[str, Any, Any]] = [
        (name, values, None) for name, values in zip(view.keys, batch.keys, strict=True)
    ]
    given += [(feature.name, *column) for feature, column in zip(view.features, batch.features, strict=True)]
    columns = {}
    for name, values, nulls in given:
        try:
            columns[name] = wire_values(values, nulls)
        except UnicodeDecodeError:
            raise InvalidArgument(f"view '{view.name}': column '{name}' holds a string that is not UTF-8") from None
    if (timestamp := time_column(view)) is not None:
        columns[timestamp] = batch.event_time_us
    return columns


def wire_values(values: Any, nulls: Any) -> Any:
    if nulls is None or not nulls.any():
        return values if hasattr(values, "dtype") else values.tolist()
    return [None if null else value for value, null in zip(values.tolist(), nulls.tolist(), strict=True)]


def key_columns(
    view: FeatureView, values: tuple[str, ...], file: str | None
) -> Iterator[tuple[int, int | None, dict[str, Any]]]:
    """(keys, keys in all if known, columns) of each request."""
    if file is None:
        from shorttail.define.text import parse_columns

        dtypes = {name: dtype.name for name, dtype in view.keys.items()}
        columns = parse_columns(values, dtypes, f"view '{view.name}'")
        count = max((len(value) for value in columns.values() if isinstance(value, list)), default=1)
        yield count, count, columns
        return
    from shorttail.sources.keys import key_batches

    total, batches = key_batches(file, view, REQUEST_ROWS)
    for arrays in batches:
        yield len(arrays[0]), total, dict(zip(view.keys, arrays, strict=True))
