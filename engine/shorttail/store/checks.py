"""The checks of verify.py, in a process of their own: `python -m shorttail.store.checks STORE`.

Prints a JSON pair a line: ["problem", text], ["note", text], ["doing", what], ["progress", [pages, of]], ["error",
[code, message]], and figures of the report by their names.

First the file is read without LMDB; only when its structure is sound the tables are read in the map. Meanwhile a read
transaction is open, which costs the writer pages, but keeps it from writing again what is being read.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from shorttail._native.columns import Columns
from shorttail._native.pages import Directory, Layout, Lookup, Tree, lookup
from shorttail.config import LIMITS
from shorttail.define.catalog import Catalog, TableInfo
from shorttail.define.views import FeatureView
from shorttail.errors import ShorttailError
from shorttail.results import Status
from shorttail.store.checksums import KEY as SUMS_KEY
from shorttail.store.checksums import Checksums
from shorttail.store.environment import (
    BUCKET_KEY_BYTES,
    FORMAT_VERSION,
    ROOT_TRIES,
    Transaction,
    log_entries,
    table_ids,
    table_pages,
)
from shorttail.store.files import model_path
from shorttail.store.lmdb_file import header_problems
from shorttail.store.mapping import plan_map
from shorttail.store.opening import LMDB_ENGINE, translated
from shorttail.store.stat import count_table_pages
from shorttail.store.table import Array, decode_keys, make_layout, row_dtype

STRUCTURE_TRIES = 3  # what was written while it was read may look damaged, once
SHOWN_PER_VIEW = 20
PROGRESS_PAGES = 2048
BATCH_ROWS = 8192
_KEYS = {b"catalog", b"format", b"state", SUMS_KEY}


def say(kind: str, value: Any) -> None:
    print(json.dumps([kind, value]), flush=True)


def check(path: Path) -> None:
    """Check everything, and say what is wrong. Raises ShorttailError for what is no damage."""
    problems = header_problems(path)
    if problems:
        return say_structure(problems)
    with (
        translated(path),
        lmdb.open(
            str(path),
            map_size=plan_map(path),
            max_readers=LIMITS.readers,
            readonly=True,
            create=False,
            lib_version=LMDB_ENGINE,
        ) as env,
    ):
        with env.begin():  # pins the pages of this commit and of later ones
            problems = structure(env, path)
        if problems:
            return say_structure(problems)
        with pinned(env) as (txn, tree):
            catalog = check_entries(txn)
            if catalog is not None:
                total_pages = env.stat()["overflow_pages"]
                Tables(txn, tree, total_pages).check(catalog)
                check_models(path, catalog)


def say_structure(problems: list[str]) -> None:
    for problem in problems:
        say("problem", f"data.mdb: {problem}")
    say("note", "the tables were not read, as LMDB's structure is damaged")


def structure(env: Any, path: Path) -> list[str]:
    """The problems that a process finds which does not map the file."""
    say("doing", "LMDB's structure")
    for _ in range(STRUCTURE_TRIES):
        before = env.info()["last_txnid"]
        command = [sys.executable, "-P", "-m", "shorttail.store.lmdb_file", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return [(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]]
        problems: list[str] = json.loads(done.stdout)
        if not problems or env.info()["last_txnid"] == before:
            break
    return problems


@contextmanager
def pinned(env: Any) -> Iterator[tuple[Transaction, Tree]]:
    """A read transaction and its tree."""
    for _ in range(ROOT_TRIES):
        with env.begin(buffers=True) as txn:
            anything = next(iter(txn.cursor()), (None, b""))[1]
            tree = Tree(anything, txn.id())
            if not tree.gone:
                yield txn, tree
                return
    say("problem", "commits follow each other too fast to read between them; run verify again")


def check_entries(txn: Transaction) -> Catalog | None:
    """All that is not in tables. The catalog, or None if the tables cannot be read by it."""
    say("doing", "the catalog")
    version = txn.get(b"format")
    if version is None or bytes(version) != str(FORMAT_VERSION).encode():
        shown = None if version is None else bytes(version)
        say("problem", f"the format is {shown!r}, where this shorttail reads {FORMAT_VERSION}")
        return None
    for key in keys_outside_tables(txn):
        if key not in _KEYS and not (key[:1] == b"l" and len(key) == 9):
            say("problem", f"LMDB holds the unknown key {key!r}")
    check_log(txn)
    try:
        catalog = Catalog.from_json(txn.get(b"catalog"))
    except ShorttailError as error:
        say("problem", error.message)
        return None
    if catalog.tables.keys() != catalog.views.keys():
        say("problem", "the catalog is damaged: its views and its tables differ")
        return None
    ids = {table.id for table in catalog.tables.values()}
    if len(ids) < len(catalog.tables) or max(ids, default=0) >= catalog.next_table_id:
        say("problem", "the catalog is damaged: two views have one table, or a table an impossible number")
    return catalog


def keys_outside_tables(txn: Transaction) -> Iterator[bytes]:
    cursor = txn.cursor()
    for key in cursor.iternext(keys=True, values=False):
        if bytes(key[:1]) >= b"t":
            break
        yield bytes(key)
    if cursor.set_range(b"u"):
        yield from (bytes(key) for key in cursor.iternext(keys=True, values=False))


def check_log(txn: Transaction) -> None:
    """Change log, state, and the checksums of these and of the catalog."""
    state = txn.get(b"state")
    entries = list(log_entries(txn))
    if state is None or len(state) != 24:
        return say("problem", "the state of the change log is missing or damaged")
    last, oldest, log_bytes = (int.from_bytes(state[at : at + 8], "little") for at in (0, 8, 16))
    numbers = [int.from_bytes(key[1:], "big") for key, _ in entries]
    lengths = [len(value) for _, value in entries]
    if last - oldest + 1 != len(numbers) or numbers != list(range(oldest, oldest + len(numbers))):
        say("problem", f"the change log does not hold the commits {oldest} to {last}, as it should")
    if sum(lengths) != log_bytes or any(length % 12 for length in lengths):
        say("problem", "an entry of the change log has a wrong length")
    sums = Checksums.unpack(txn.get(SUMS_KEY))
    if sums is None:
        say("note", "no checksums of the catalog and the change log yet; the next commit writes them")
    else:
        now = Checksums.of(txn.get(b"catalog"), state, entries)
        for what, was, found in (
            ("the catalog", sums.catalog, now.catalog),
            ("the state of the change log", sums.state, now.state),
            ("the change log", sums.log, now.log),
        ):
            if was != found:
                say("problem", f"{what} is damaged: its checksum is wrong")
    say("commit", last)


class Tables:
    """Every page, and every row by its key."""

    def __init__(self, txn: Transaction, tree: Tree, total_pages: int) -> None:
        self.txn, self.tree, self.total_pages = txn, tree, total_pages
        self.pages = self.rows = self.tables = 0

    def check(self, catalog: Catalog) -> None:
        for name, table in catalog.tables.items():
            say("doing", f"view '{name}'")
            _View(self, catalog.views[name], table).check()
            self.tables += 1
        named = {table.id for table in catalog.tables.values()}
        for table_id in table_ids(self.txn):
            if table_id not in named:
                self._leftover(table_id)
        for kind in ("tables", "pages", "rows"):
            say(kind, getattr(self, kind))

    def _leftover(self, table_id: int) -> None:
        n = count_table_pages(self.txn, table_id)
        say("note", f"table {table_id} is in no catalog ({n} pages): of a load at work, or left by a killed one")

    def count_page(self) -> None:
        self.pages += 1
        if self.pages % PROGRESS_PAGES == 0:
            say("progress", [self.pages, self.total_pages])


class _View:
    def __init__(self, tables: Tables, view: FeatureView, table: TableInfo) -> None:
        self.tables, self.view, self.table = tables, view, table
        self.n_problems = 0
        self.directory: Directory | None = None
        self.keys: list[list[Array]] = []  # of pages, by column
        self.buckets: list[tuple[bytes, int]] = []  # key and rows of these pages
        self.waiting = 0

    def problem(self, what: str, bucket: bytes | None = None) -> None:
        self.n_problems += 1
        where = f"view '{self.view.name}' (table {self.table.id})"
        if bucket is not None:
            where += f", bucket {bucket.hex()}"
        if self.n_problems <= SHOWN_PER_VIEW:
            say("problem", f"{where}: {what}")

    def check(self) -> None:
        try:
            layout = make_layout(self.view, self.table)
        except ShorttailError as error:
            return self.problem(error.message)
        directory, wrong = Directory(layout, self.table.id), None
        try:
            directory.build(self.tables.tree)
            self.directory = directory
        except ValueError as error:
            wrong = str(error)
        self._check_pages(layout)
        if wrong is not None and not self.n_problems:  # or a page that was named already is the reason
            self.problem(wrong)
        if self.n_problems > SHOWN_PER_VIEW:
            say("problem", f"view '{self.view.name}': and {self.n_problems - SHOWN_PER_VIEW} problems more")

    def _check_pages(self, layout: Layout) -> None:
        dtype = row_dtype(layout)
        names = list(self.view.keys)
        columns = Columns(names, list(self.view.keys.values()))
        plan = Lookup(layout, range(len(names)), [], 0)
        for bucket, page in table_pages(self.tables.txn, self.table.id):
            self.tables.count_page()
            try:
                layout.check(page, bucket, self.table.id)
                keys = decode_keys(layout, dtype, page)
            except (ValueError, UnicodeDecodeError) as error:
                self.problem(str(error), bucket)
                continue
            self.keys.append(keys)
            self.buckets.append((bucket, len(keys[0])))
            self.waiting += len(keys[0])
            if self.waiting >= BATCH_ROWS:
                self._look_up(columns, plan)
        if self.waiting:
            self._look_up(columns, plan)

    def _look_up(self, columns: Columns, plan: Lookup) -> None:
        """Ask for the rows of the pages in hand as a client would."""
        batch = [np.concatenate(parts) for parts in zip(*self.keys, strict=True)]
        n = len(batch[0])
        for name, values in zip(columns.names, batch, strict=True):
            if len(batch) == 1 and values.dtype != object and len(np.unique(values)) < n:
                self.problem(f"a row of key {name}={_repeated(values.tolist())!r} is there twice")
        if len(batch) > 1 or batch[0].dtype == object:
            rows = list(zip(*(values.tolist() for values in batch), strict=True))
            if len(set(rows)) < n:
                self.problem(f"a row of key {_repeated(rows)!r} is there twice")
        if self.directory is not None:
            for start in range(0, n, LIMITS.rows_per_request):
                self._look_up_rows(columns, plan, batch, start)
        self.tables.rows += n
        self.keys, self.buckets, self.waiting = [], [], 0

    def _look_up_rows(self, columns: Columns, plan: Lookup, batch: list[Array], start: int) -> None:
        part = [values[start : start + LIMITS.rows_per_request] for values in batch]
        columns.reset()
        columns.append({name: values.tolist() for name, values in zip(columns.names, part, strict=True)})
        statuses = np.full((1, len(part[0])), Status.NOT_FOUND, np.uint8)
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
    """The file of each version that the catalog names, by its sha256."""
    n = 0
    for name, entry in catalog.models.items():
        for number, info in entry.versions.items():
            say("doing", f"model '{name}' version {number}")
            n += 1
            file = model_path(path, name, number)
            try:
                with file.open("rb") as data:
                    found = hashlib.file_digest(data, "sha256").hexdigest()
                manifest = json.loads((file.parent / "manifest.json").read_bytes())
            except (OSError, ValueError) as error:
                say("problem", f"model '{name}' version {number}: {error}")
                continue
            if found != info.sha256:
                say("problem", f"model '{name}' version {number}: {file.name} has another sha256 than the catalog says")
            if not isinstance(manifest, dict) or manifest.get("sha256") != info.sha256:
                say(
                    "problem",
                    f"model '{name}' version {number}: manifest.json is not of the file that the catalog says",
                )
    say("model_versions", n)


def main() -> int:
    try:
        check(Path(sys.argv[1]))
    except ShorttailError as error:
        say("error", [error.code, error.message])
    return 0


if __name__ == "__main__":
    sys.exit(main())
