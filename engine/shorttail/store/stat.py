"""`shorttail stat`: statistics of a store's file, readers and views."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from shorttail.store.environment import Environment, Transaction, count_pages, log_entries, table_ids, table_prefix
from shorttail.store.format import read_format
from shorttail.store.lmdb_file import FORMAT_KEY, PAGE_BYTES
from shorttail.store.mapping import PAGE_HEADER_BYTES
from shorttail.store.settings import StoreSettings
from shorttail.store.snapshot import Snapshot

META_PAGES = 2

Stats = dict[str, Any]


def store_stats(store: Snapshot) -> Stats:
    """Return the statistics of a store as plain values; `shorttail stat --json` prints the same.

    Reads header and footer of every page, so a store that is not in memory is read from disk. Raises Internal (damaged
    table).
    """
    views = view_stats(store)
    environment = store.environment
    with environment.read() as txn:
        info = environment.handle.env.info()
        last = environment.sequence(txn)
        log = [(int.from_bytes(key[1:], "big"), len(value)) for key, value in log_entries(txn)]
        readers = _readers(environment, info["last_txnid"])
        used = META_PAGES + count_pages(txn)
        return {
            "store": str(environment.path),
            "format": read_format(environment.path, txn.get(FORMAT_KEY)),
            "commit": last,
            "max_clock_skew_us": store.catalog.max_clock_skew_us,
            "file_bytes": (environment.path / "data.mdb").stat().st_size,
            "free_bytes": max(info["last_pgno"] + 1 - used, 0) * PAGE_BYTES,
            "map_bytes": min(info["map_size"], StoreSettings.of(txn).map_size or info["map_size"]),
            "change_log": {
                "oldest_commit": log[0][0] if log else None,
                "commits": len(log),
                "bytes": sum(n for _, n in log),
            },
            "readers": readers,
            "oldest_snapshot_commits_behind": max(
                (reader["commits_behind"] for reader in readers if reader["snapshots"]), default=None
            ),
            "leftover_tables": _leftovers(txn, {table.id for _, table in store.catalog.all_tables()}),
            "views": views,
        }


def view_stats(store: Snapshot) -> list[Stats]:
    """Return per view: rows, fill (used share of its pages, 0 to 1), bytes and number of pages, and directory depth."""
    listed = []
    for name in store.catalog.views:
        with store.reading():
            view, directory = store.catalog.view(name), store.directory(name)
            buckets, rows, image_bytes, used_bytes = (0, 0, 0, 0) if directory is None else directory.measure()
            listed.append(
                {
                    "view": name,
                    "keys": list(view.keys),
                    "features": len(view.features),
                    "rows": rows,
                    "fill": used_bytes / image_bytes if image_bytes else None,
                    "bytes": image_bytes + buckets * PAGE_HEADER_BYTES,
                    "buckets": buckets,
                    "depth": 0 if directory is None else directory.depth,
                }
            )
    return listed


def _readers(environment: Environment, last_txn_id: int) -> list[Stats]:
    """Return per other process that has the store open: its snapshots, and how many commits the oldest is behind."""
    held: dict[int, list[int]] = defaultdict(list)
    for line in environment.handle.env.readers().splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[0].isdigit() and int(fields[0]) != os.getpid():
            held[int(fields[0])] += [int(fields[2])] if fields[2].isdigit() else []
    return [
        {"pid": pid, "snapshots": len(ids), "commits_behind": max(last_txn_id - min(ids), 0) if ids else None}
        for pid, ids in sorted(held.items())
    ]


def _leftovers(txn: Transaction, named: set[int]) -> list[Stats]:
    """Return id and number of pages of each table that the catalog does not name. named: the ids in the catalog."""
    ids = [table_id for table_id in table_ids(txn) if table_id not in named]
    return [{"table": table_id, "pages": count_table_pages(txn, table_id)} for table_id in ids]


def count_table_pages(txn: Transaction, table_id: int) -> int:
    """Return the number of pages of a table, by reading only the keys."""
    cursor, prefix, n = txn.cursor(), table_prefix(table_id), 0
    if cursor.set_range(prefix):
        for key in cursor.iternext(keys=True, values=False):
            if bytes(key[: len(prefix)]) != prefix:
                break
            n += 1
    return n
