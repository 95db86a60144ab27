"""The child process of `shorttail verify`: `python -m shorttail.store.checks STORE` runs all checks of a store.

The process prints one JSON pair per line: ["problem", text], ["note", text], ["doing", text], ["progress", [pages
checked, pages in total]], ["error", [code, message]], or [field, value] for a field of verify.Report.

First LMDB's structure is checked without LMDB; the tables are read only if it is sound. A read transaction stays open
during all checks: it keeps writers from reusing pages that are being read, at the price of a file that may grow.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from shorttail._native.columns import Columns
from shorttail._native.pages import Directory, Layout, Lookup, Tree, lookup
from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog
from shorttail.define.inputs import check_regular, read_input
from shorttail.define.tables import Stored
from shorttail.errors import ShorttailError
from shorttail.results import Status
from shorttail.store import erased, history, pending
from shorttail.store.checksums import KEY as CHECKSUMS_KEY
from shorttail.store.checksums import Checksums
from shorttail.store.environment import (
    BUCKET_KEY_BYTES,
    Transaction,
    log_entries,
    table_ids,
    table_pages,
)
from shorttail.store.files import model_path
from shorttail.store.format import FORMAT_VERSION, read_format
from shorttail.store.history import Event
from shorttail.store.lmdb_file import SETTINGS_KEY, header_problems, mapped, structure_problems
from shorttail.store.lmdb_handle import ROOT_TRIES
from shorttail.store.mapping import plan_map
from shorttail.store.opening import LMDB_ENGINE, reserve_lock_file, translate_errors
from shorttail.store.settings import decode
from shorttail.store.stat import count_table_pages
from shorttail.store.table import Array, count_rows, decode_keys, make_layout, row_dtype

SHOWN_PER_VIEW = 20  # problems; the rest is only counted
PROGRESS_PAGES = 2048
BATCH_ROWS = 8192
NUMBERED = {b"l": 9, b"h": 9, pending.PREFIX: pending.KEY_BYTES}  # first byte of keys with a number -> their length
_KEYS = {b"catalog", b"format", b"state", CHECKSUMS_KEY, SETTINGS_KEY}


def emit(kind: str, value: Any) -> None:
    """Print one JSON pair for the parent process."""
    print(json.dumps([kind, value]), flush=True)


def check(path: Path) -> None:
    """Run all checks and emit the problems. Raises ShorttailError for errors that are not damage to the store."""
    problems = header_problems(path)
    if problems:
        return emit_structure_problems(problems)
    with translate_errors(path):
        try:
            reserve_lock_file(path)
        except OSError as error:
            if error.errno != errno.EROFS:  # on such a file system LMDB does without locks
                raise
    with (
        translate_errors(path),
        lmdb.open(
            str(path),
            map_size=plan_map(path),
            max_readers=LIMITS.readers,
            readonly=True,
            create=False,
            lib_version=LMDB_ENGINE,
        ) as env,
    ):
        emit("doing", "LMDB's structure")
        with env.begin():  # no page of this commit or a later one is reused while this transaction is open
            problems = structure_problems(path)
        if problems:
            return emit_structure_problems(problems)
        with open_tree(env, path) as (txn, tree):
            catalog = check_entries(txn, path)
            if catalog is not None:
                total_pages = env.stat()["overflow_pages"]
                Tables(txn, tree, total_pages, last_commit(txn)).check(catalog)
                check_models(path, catalog)


def emit_structure_problems(problems: list[str]) -> None:
    for problem in problems:
        emit("problem", f"data.mdb: {problem}")
    emit("note", "the tables were not read, as LMDB's structure is damaged")


@contextmanager
def open_tree(env: Any, path: Path) -> Iterator[tuple[Transaction, Tree]]:
    """Yield a read transaction and its tree. If no try succeeds, emit a problem and yield nothing."""
    for _ in range(ROOT_TRIES):
        with env.begin(buffers=True) as txn, mapped(path) as (data, _):
            tree = Tree(data, txn.id())
            if not tree.gone:
                yield txn, tree
                return
    emit("problem", "commits follow each other too fast to read between them; run verify again")


def check_entries(txn: Transaction, path: Path) -> Catalog | None:
    """Check all entries outside tables. Return the catalog, or None if the tables cannot be read with it."""
    emit("doing", "the catalog")
    try:
        version = read_format(path, txn.get(b"format"))
    except ShorttailError as error:
        emit("problem", error.message)
        return None
    if version < FORMAT_VERSION:
        emit("note", f"the store has format {version}, which is only read; run `shorttail migrate --store {path}`")
    for key in keys_outside_tables(txn):
        if key not in _KEYS and key[:1] != erased.PREFIX and len(key) != NUMBERED.get(key[:1]):
            emit("problem", f"LMDB holds the unknown key {key!r}")
    for problem in pending.check(txn):
        emit("problem", problem)
    check_log(txn)
    check_history(txn)
    value = txn.get(SETTINGS_KEY)
    if value is not None and decode(bytes(value)) is None:
        emit("problem", "the settings are damaged; the defaults hold until `shorttail settings set` writes them again")
    for problem in erased.problems(erased_entries(txn)):
        emit("problem", problem)
    try:
        catalog = Catalog.from_json(txn.get(b"catalog"))
    except ShorttailError as error:
        emit("problem", error.message)
        return None
    if catalog.tables.keys() != catalog.views.keys():
        emit("problem", "the catalog is damaged: its views and its tables differ")
        return None
    for name, table in catalog.all_tables():
        if table.page_format != version:
            emit(
                "problem", f"the store has format {version}, and view '{name}' has pages of format {table.page_format}"
            )
    ids = [table.id for _, table in catalog.all_tables()]
    if len(set(ids)) < len(ids) or max(ids, default=0) >= catalog.next_table_id:
        emit("problem", "the catalog is damaged: two views share a table, or a table id is too large")
    return catalog


def keys_outside_tables(txn: Transaction) -> Iterator[bytes]:
    """Yield the keys that do not begin with "t"."""
    cursor = txn.cursor()
    for key in cursor.iternext(keys=True, values=False):
        if bytes(key[:1]) >= b"t":
            break
        yield bytes(key)
    if cursor.set_range(b"u"):
        yield from (bytes(key) for key in cursor.iternext(keys=True, values=False))


def erased_entries(txn: Transaction) -> list[tuple[bytes, bytes]]:
    """Return the entries of the lists of erased keys."""
    cursor = txn.cursor()
    if not cursor.set_range(erased.PREFIX):
        return []
    entries = ((bytes(key), bytes(value)) for key, value in cursor)
    return list(takewhile(lambda entry: entry[0][:1] == erased.PREFIX, entries))


def check_log(txn: Transaction) -> None:
    """Check the change log, the state, and the checksums of both and of the catalog."""
    state = txn.get(b"state")
    entries = list(log_entries(txn))
    if state is None or len(state) != 24:
        return emit("problem", "the state of the change log is missing or damaged")
    last, oldest, log_bytes = (int.from_bytes(state[at : at + 8], "little") for at in (0, 8, 16))
    numbers = [int.from_bytes(key[1:], "big") for key, _ in entries]
    lengths = [len(value) for _, value in entries]
    if last - oldest + 1 != len(numbers) or numbers != list(range(oldest, oldest + len(numbers))):
        emit("problem", f"the change log lacks some of the commits {oldest} to {last}")
    if sum(lengths) != log_bytes or any(length % 12 for length in lengths):
        emit("problem", "an entry of the change log has a wrong length")
    value = txn.get(CHECKSUMS_KEY)
    sums = Checksums.unpack(value)
    if value is not None and sums is None:
        emit("problem", "the checksums of the catalog and the change log have a wrong length")
    elif sums is None:
        emit("note", "no checksums of the catalog and the change log yet; the next commit writes them")
    else:
        now = Checksums.of(txn.get(b"catalog"), state, entries)
        for what, was, found in (
            ("the catalog", sums.catalog, now.catalog),
            ("the state of the change log", sums.state, now.state),
            ("the change log", sums.log, now.log),
        ):
            if was != found:
                emit("problem", f"{what} is damaged: its checksum is wrong")
    emit("commit", last)


def check_history(txn: Transaction) -> None:
    """Check that no event of the history is missing or damaged."""
    for expected, (key, value) in enumerate(history.events(txn), 1):
        try:
            number = Event.decode(key, value).number
        except (ValueError, TypeError) as error:
            return emit("problem", f"event {expected} of the history is damaged: {error}")
        if number != expected:
            return emit("problem", f"the history lacks its event {expected}")


def last_commit(txn: Transaction) -> int:
    """Return the number of the last commit; 0 if the state is missing."""
    return int.from_bytes((txn.get(b"state") or b"")[:8], "little")


class Tables:
    """Checks every page of every table, and looks up every row by its key."""

    def __init__(self, txn: Transaction, tree: Tree, total_pages: int, commit: int) -> None:
        self.txn, self.tree, self.total_pages, self.commit = txn, tree, total_pages, commit
        self.pages = self.rows = self.tables = 0

    def check(self, catalog: Catalog) -> None:
        for name, table in catalog.tables.items():
            emit("doing", f"view '{name}'")
            _View(self, Stored(catalog.definition(name), table)).check()
            self.tables += 1
        for what, tables in (("comes", catalog.coming), ("is kept for `views rollback`", catalog.previous)):
            for name, table in tables.items():
                _View(self, Stored(catalog.definition(name), table), f", which {what}").check()
        named = {table.id for _, table in catalog.all_tables()}
        for table_id in table_ids(self.txn):
            if table_id not in named:
                self._leftover(table_id)
        for kind in ("tables", "pages", "rows"):
            emit(kind, getattr(self, kind))

    def _leftover(self, table_id: int) -> None:
        n = count_table_pages(self.txn, table_id)
        emit("note", f"table {table_id} is not in the catalog ({n} pages): a load is running, or a killed load left it")

    def count_page(self) -> None:
        self.pages += 1
        if self.pages % PROGRESS_PAGES == 0:
            emit("progress", [self.pages, self.total_pages])


class _View:
    """Checks the table of one view."""

    def __init__(self, tables: Tables, stored: Stored, role: str = "") -> None:
        """role: of a table that no lookup reads. Its damage is noted, and does no harm."""
        self.tables, self.stored, self.view, self.table = tables, stored, stored.view, stored.table
        self.role = role
        self.n_problems = 0
        self.directory: Directory | None = None
        # Pages whose rows are still to be looked up, until there are BATCH_ROWS rows:
        self.keys: list[list[Array]] = []  # key columns of each page
        self.buckets: list[tuple[bytes, int]] = []  # bucket key and number of rows of each page
        self.waiting = 0  # rows of these pages

    def problem(self, what: str, bucket: bytes | None = None) -> None:
        self.n_problems += 1
        where = f"view '{self.view.name}' (table {self.table.id})"
        if bucket is not None:
            where += f", bucket {bucket.hex()}"
        if self.n_problems <= SHOWN_PER_VIEW:
            emit("note" if self.role else "problem", f"{where}{self.role}: {what}")

    def check(self) -> None:
        try:
            layout = make_layout(self.stored)
        except ShorttailError as error:
            return self.problem(error.message)
        directory, wrong = Directory(layout, self.table.id), None
        try:
            directory.build(self.tables.tree)
            self.directory = directory
        except ValueError as error:
            wrong = str(error)
        self._check_pages(layout)
        if wrong is not None and not self.n_problems:  # otherwise a page reported above is the likely reason
            self.problem(wrong)
        if self.n_problems > SHOWN_PER_VIEW:
            emit("problem", f"view '{self.view.name}': {self.n_problems - SHOWN_PER_VIEW} more problems")

    def _check_pages(self, layout: Layout) -> None:
        dtype = row_dtype(layout)
        names = list(self.view.keys)
        columns = Columns(names, list(self.view.keys.values()))
        plan = Lookup(layout, range(len(names)), [], 0)
        for bucket, page in table_pages(self.tables.txn, self.table.id):
            self.tables.count_page()
            try:
                layout.check(page, bucket, self.table.id)
                keys, n = decode_keys(layout, dtype, page), count_rows(page)
            except (ValueError, UnicodeDecodeError) as error:
                self.problem(str(error), bucket)
                continue
            if layout.commit(page) > self.tables.commit:
                self.problem("its commit number is greater than that of the last commit", bucket)
            self.keys.append(keys)
            self.buckets.append((bucket, n))
            self.waiting += n
            if self.waiting >= BATCH_ROWS:
                self._look_up(columns, plan)
        if self.waiting:
            self._look_up(columns, plan)

    def _look_up(self, columns: Columns, plan: Lookup) -> None:
        """Ask for the rows of the pages in hand as a client would."""
        batch, n = [np.concatenate(parts) for parts in zip(*self.keys, strict=True)], self.waiting
        if not batch and n > 1:
            self.problem(f"{n} rows in a view without keys, which has one")
        for name, values in zip(columns.names, batch, strict=True):
            if len(batch) == 1 and values.dtype != object and len(np.unique(values)) < n:
                self.problem(f"a row of key {name}={_repeated(values.tolist())!r} is there twice")
        if len(batch) > 1 or (batch and batch[0].dtype == object):
            rows = list(zip(*(values.tolist() for values in batch), strict=True))
            if len(set(rows)) < n:
                self.problem(f"a row of key {_repeated(rows)!r} is there twice")
        if self.directory is not None:
            for start in range(0, n, LIMITS.rows_per_request):
                self._look_up_rows(columns, plan, batch, start)
        self.tables.rows += 0 if self.role else n
        self.keys, self.buckets, self.waiting = [], [], 0

    def _look_up_rows(self, columns: Columns, plan: Lookup, batch: list[Array], start: int) -> None:
        part = [values[start : start + LIMITS.rows_per_request] for values in batch]
        columns.reset()
        columns.append({name: values.tolist() for name, values in zip(columns.names, part, strict=True)})
        statuses = np.full((1, columns.n_rows), Status.NOT_FOUND, np.uint8)
        lookup([self.directory], [plan], columns, [], statuses, 0)
        for row in np.nonzero(statuses[0] != Status.PRESENT)[0].tolist():
            self.problem("a row is not found by its key", self._bucket_of(start + row))

    def _bucket_of(self, row: int) -> bytes:
        for bucket, n in self.buckets:
            if row < n:
                return bucket
            row -= n
        return bytes(BUCKET_KEY_BYTES)


def _repeated(rows: list[Any]) -> Any:
    return next(row for row, n in Counter(rows).items() if n > 1)


def check_models(path: Path, catalog: Catalog) -> None:
    """Compare the SHA-256 of each model version's file with the catalog and with its manifest."""
    n = 0
    for name, entry in catalog.models.items():
        for number, info in entry.versions.items():
            emit("doing", f"model '{name}' version {number}")
            n += 1
            file = model_path(path, name, number)
            try:
                check_regular(file)
                with file.open("rb") as data:
                    found = hashlib.file_digest(data, "sha256").hexdigest()
                manifest = json.loads(read_input(file.parent / "manifest.json"))
            except (OSError, ValueError) as error:
                emit("problem", f"model '{name}' version {number}: {error}")
                continue
            if found != info.sha256:
                emit("problem", f"model '{name}' version {number}: the sha256 of {file.name} is not the catalog's")
            if not isinstance(manifest, dict) or manifest.get("sha256") != info.sha256:
                emit(
                    "problem",
                    f"model '{name}' version {number}: the sha256 in manifest.json is not the catalog's",
                )
    emit("model_versions", n)


def main() -> int:
    try:
        check(Path(sys.argv[1]))
    except ShorttailError as error:
        emit("error", [error.code, error.message])
    return 0


if __name__ == "__main__":
    sys.exit(main())
