"""`shorttail migrate`: rewrites the tables of a store of an older format, while the store is read.

Each table is written anew beside the old one, with the same rows, hashes and buckets. Then one commit gives the new
tables to their views and changes the format. Until then the store is as it was, but for the ids that are reserved; a
process that is killed leaves tables that the catalog does not name, which the next migration or load deletes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from shorttail._native.pages import PageImages, PageRewrite
from shorttail.config import LIMITS
from shorttail.define.catalog import PAGE_FORMAT, Catalog
from shorttail.define.identity import Definition
from shorttail.define.tables import Stored, TableInfo
from shorttail.errors import Internal, ResourceExhausted, ShorttailError, Unavailable
from shorttail.store import history
from shorttail.store.environment import Environment, count_pages
from shorttail.store.format import FORMAT_VERSION, migrating, read_format
from shorttail.store.history import Event
from shorttail.store.leftovers import drop_leftovers, drop_table, load_lock
from shorttail.store.lmdb_file import FORMAT_KEY, PAGE_BYTES
from shorttail.store.load import last_commit, put_images
from shorttail.store.mapping import size_text, usable_pages
from shorttail.store.stat import count_table_pages
from shorttail.store.table import depth_to_grow, make_layout

Progress = Callable[[int, int | None], None]  # receives (rows written, rows in total, which are not known)
SPARE_DIVISOR = 32  # one page more for this many: LMDB's tree, and buckets that are split


@dataclass(frozen=True)
class Migration:
    """The result of a migration. from_format: FORMAT_VERSION if there was nothing to do. rows, tables: rewritten."""

    path: str
    from_format: int
    tables: int = 0
    rows: int = 0


def migrate(environment: Environment, by: str = "", progress: Progress | None = None) -> Migration:
    """Rewrite a store in the format that this shorttail writes. Nothing to do for a store that has it.

    Other processes can read the store meanwhile, and move to the new tables with the last commit. by: who migrates, for
    the history; "" is the user of the process.

    Raises ResourceExhausted (the disk or the map has no room for all tables once more), Internal (a damaged page),
    Unavailable (the store at the path is another one, or a process of an older shorttail wrote to it meanwhile); the
    store is as before then.
    """
    environment.handle.check_files()
    with load_lock(environment), migrating():
        drop_leftovers(environment)
        found, catalog = _present(environment)
        if found == FORMAT_VERSION:
            return Migration(str(environment.path), found)
        old = {name: table for name, table in catalog.tables.items() if table.page_format < PAGE_FORMAT}
        _check_room(environment)
        try:
            new = _reserve_tables(environment, old)
            commit, rows = last_commit(environment), 0
            for name, table in old.items():
                view = catalog.definition(name)
                rows = _rewrite_table(environment, view, (table, new[name]), commit, rows, progress)
            done = Migration(str(environment.path), found, len(old), rows)
            _switch(environment, commit, new, done, by)
        except BaseException:
            with suppress(ShorttailError):  # on failure the next migration deletes them
                drop_leftovers(environment)
            raise
        for table in old.values():
            with suppress(ResourceExhausted):  # the next load deletes the rest
                drop_table(environment, table.id)
        return done


def _present(environment: Environment) -> tuple[int, Catalog]:
    """Return the format and the catalog as of the last commit."""
    with environment.read() as txn:
        found = read_format(environment.path, txn.get(FORMAT_KEY))
        return found, Catalog.from_json(environment.read_catalog_json(txn))


def _check_room(environment: Environment) -> None:
    """Raise ResourceExhausted unless the disk and the map have room for all tables once more."""
    path = environment.path
    with environment.read() as txn:
        info, used = environment.handle.env.info(), count_pages(txn)
        values = int(txn.stat()["overflow_pages"])
    needed = (values + values // SPARE_DIVISOR) * PAGE_BYTES
    free = max(info["last_pgno"] + 1 - used, 0) * PAGE_BYTES
    disk = os.statvfs(path)
    for what, room in (
        ("disk", free + disk.f_bavail * disk.f_frsize),
        ("map (SHORTTAIL_MAP_GIB)", (usable_pages(info["map_size"]) - used) * PAGE_BYTES),
    ):
        if room < needed:
            raise ResourceExhausted(
                f"store '{path}': all tables are written once more, which takes {size_text(needed)}, and its {what} "
                f"has room for {size_text(max(room, 0))}; make room, then migrate again"
            )


def _reserve_tables(environment: Environment, old: dict[str, TableInfo]) -> dict[str, TableInfo]:
    """Reserve table ids. Return for each view its new table, of which the catalog says nothing yet.

    The catalog stays in the form that the older shorttail reads.
    """
    if not old:
        return {}
    with environment.write() as writer:
        document = json.loads(bytes(writer.get_catalog() or b"{}"))
        first = int(document["next_table_id"])
        document["next_table_id"] = first + len(old)
        writer.put_catalog(json.dumps(document, separators=(",", ":")).encode())
    return {name: replace(table, id=first + i, page_format=PAGE_FORMAT) for i, (name, table) in enumerate(old.items())}


def _rewrite_table(
    environment: Environment,
    definition: Definition,
    tables: tuple[TableInfo, TableInfo],
    commit: int,
    rows: int,
    progress: Progress | None,
) -> int:
    """Write the pages of the first table into the second, in several commits. Return `rows` and the rows of the table.

    commit: the number that the pages get.
    """
    old, new = tables
    layout = make_layout(Stored(definition, old))
    images = PageImages(make_layout(Stored(definition, new)), new.id, LIMITS.load_commit_bytes, commit)
    txn, tree = environment.read_tree()
    try:
        depth_grow = depth_to_grow(count_table_pages(txn, old.id))
        rewrite, done = PageRewrite(layout, old.id, tree, depth_grow), False
        while not done:
            done = rewrite.fill(images)
            if len(images):
                put_images(environment, images)
                rows += images.rows
                images.clear()
                if progress is not None:
                    progress(rows, None)
    except ValueError as error:
        raise Internal(
            f"store '{environment.path}': the table of view '{definition.view.name}' is damaged ({error}); restore the"
            " store from a backup, and migrate that"
        ) from None
    finally:
        environment.handle.end_read(txn)
    return rows


def _switch(environment: Environment, commit: int, new: dict[str, TableInfo], done: Migration, by: str) -> None:
    """Give the views their new tables and the store its new format, in one durable commit.

    commit: the number of the last commit when the first table was read.
    """
    with environment.write() as writer:
        if environment.sequence(writer.txn) != commit:
            raise Unavailable(
                f"store '{environment.path}' was written by a process of an older shorttail while it was migrated; "
                "stop that process and migrate again"
            )
        before = Catalog.from_json(writer.get_catalog())
        after = before.copy()
        after.tables |= new
        writer.put_catalog(after.to_json())
        writer.txn.put(FORMAT_KEY, str(FORMAT_VERSION).encode())
        detail: dict[str, Any] = {"to": f"format {FORMAT_VERSION}", "from_format": done.from_format, "rows": done.rows}
        history.append(writer.txn, Event("migrated", "", by, detail=detail), before, after)
