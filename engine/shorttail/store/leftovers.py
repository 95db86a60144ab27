"""The lock of those that make tables, and what a killed one left: its tables, and the edits that wait for them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog
from shorttail.errors import ResourceExhausted
from shorttail.store import pending
from shorttail.store.environment import CATALOG_CHANGE, Environment, WriteTransaction, table_ids, table_prefix
from shorttail.store.opening import translate_errors

LOCK_FILE = "load.lock"
FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def load_lock(environment: Environment) -> Iterator[None]:
    """Hold the store's load lock, which only one process can hold. The system releases it if the process dies."""
    with translate_errors(environment.path):
        fd = os.open(environment.path / LOCK_FILE, FLAGS, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # to close it is not enough: a child forked meanwhile has the descriptor too
        os.close(fd)


def forget_dead(writer: WriteTransaction, catalog: Catalog) -> Catalog:
    """Return the catalog without the tables that a process was making that has died, and write it if it differs.

    Otherwise the list of edits that wait for such a table would grow for ever. The next load deletes what is left.
    """
    if not (catalog.filling or catalog.coming) or _is_held(writer):
        return catalog
    catalog = catalog.copy()
    catalog.filling, catalog.coming = {}, {}
    writer.put_catalog(catalog.to_json())
    return catalog


def _is_held(writer: WriteTransaction) -> bool:
    """Whether somebody holds the load lock."""
    with translate_errors(writer.path):
        fd = os.open(writer.path / LOCK_FILE, FLAGS, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def drop_leftovers(environment: Environment) -> None:
    """Forget the tables that are being made, and delete all that the catalog does not name. Hold the load lock.

    They are left from loads that failed or were killed, and from views that are gone. Waits until the next load can use
    their pages again, so that loads that fail again and again do not grow the file.
    """
    # A write transaction, although nothing may be written: if a writer dies right after its commit, readers miss that
    # commit until the next write transaction starts. A reader could then take the newest table for a leftover.
    with environment.write() as writer:
        catalog = Catalog.from_json(writer.get_catalog())
        if catalog.filling or catalog.coming:
            catalog.filling, catalog.coming = {}, {}
            writer.put_catalog(catalog.to_json())
        used = {table.id for _, table in catalog.all_tables()}
        leftovers = {*table_ids(writer.txn), *pending.tables(writer.txn)} - used
    for table_id in sorted(leftovers):
        drop_table(environment, table_id)
    if leftovers:
        environment.handle.wait_for_readers(2 * LIMITS.idle_rest_ms / 1000)


def drop_unused(environment: Environment, before: Catalog, after: Catalog) -> int:
    """Delete the tables that only the catalog before a commit names. Return the number of their pages.

    Call it after the commit. What the disk has no room for, the next load does.
    """
    kept, pages = {table.id for _, table in after.all_tables()}, 0
    for _, table in before.all_tables():
        if table.id not in kept:
            with suppress(ResourceExhausted):
                pages += drop_table(environment, table.id)
    return pages


def drop_table(environment: Environment, table_id: int) -> int:
    """Delete all pages of a table that the catalog no longer names. Return how many.

    With them go the edits that wait for it. Each commit deletes LIMITS.drop_commit_pages, so that other writers do not
    wait until a large table is deleted. The last commit deletes nothing and enters the change log. LMDB uses a page
    again when every reader is at a later commit than the one that deleted it, and a reader moves only to a commit in
    the change log. Damaged pages are left.
    """
    prefix, left, dropped = table_prefix(table_id), True, 0
    start = prefix
    while left:
        with environment.write() as writer:
            cursor = writer.txn.cursor()
            left = cursor.set_range(start) and bytes(cursor.key()).startswith(prefix)
            for _ in range(LIMITS.drop_commit_pages if left else 0):
                key = bytes(cursor.key())
                if not key.startswith(prefix):
                    break
                if environment.handle.may_free(cursor.value(), key):
                    dropped += cursor.delete()
                else:
                    start = key + b"\0"
                    cursor.next()
            if not left:
                edits = pending.drop(writer, table_id, LIMITS.drop_commit_pages)
                dropped, left = dropped + edits, edits > 0
            if dropped and not left:
                writer.changed(CATALOG_CHANGE)
    return dropped
