"""Operating a store: `verify` finds damage and survives it, `stat` and its statistics, backups of a store in use."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_store import make_store, rows, scanned, scores

from shorttail._native.pages import crc32c
from shorttail.define import dtypes
from shorttail.define.entities import Entity
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import InvalidArgument, NotFound
from shorttail.store import ColumnBatch, Store
from shorttail.store import verify as verify_module
from shorttail.store.backup import backup
from shorttail.store.environment import table_pages
from shorttail.store.lmdb_file import structure_problems
from shorttail.store.stat import store_stats
from shorttail.store.verify import verify

TESTS = str(Path(__file__).parent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make a store of 3000 rows, some of them overwritten, with a change log and free pages."""
    with make_store(tmp_path / "store") as store:
        store.load("stats", [rows(range(3000))])
        store.upsert("stats", rows(range(0, 3000, 50), 1, 1))
        store.delete("stats", [np.arange(2900, 2950)])
    return tmp_path / "store"


def wide_store(path: Path, width: int) -> Store:
    """Make a store with an empty view `wide`, whose rows have a little more than 4 * width bytes."""
    user = Entity("user", keys={"id": dtypes.Int64})
    store = Store.open(path, create=True)
    with store.edit_catalog() as catalog:
        catalog.add(FeatureView("wide", entity=user, features=[Feature("v", dtypes.Vector(width))]))
    return store


def wide_rows(ids: range, width: int) -> ColumnBatch:
    n = len(ids)
    return ColumnBatch([np.asarray(ids)], np.zeros(n, np.int64), [(np.ones((n, width), np.float32), None)])


def page_places(path: Path) -> list[tuple[str, int]]:
    """Return (bucket key, offset in the file) of each page image of view `stats`."""
    with Store.open(path) as store, store.environment.read() as txn:
        table = store.catalog.tables["stats"].id
        images = [(key.hex(), bytes(page)) for key, page in table_pages(txn, table)]
    data = (path / "data.mdb").read_bytes()
    return [(bucket, data.rindex(image)) for bucket, image in images]


def in_child(code: str, *arguments: Any, timeout_s: float = 60, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, *sys.path]), **environ},
    )


# -- verify --------------------------------------------------------------------------------------------------------


def test_a_sound_store_has_no_problems(path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    report = verify(path, lambda done, of: seen.append((done, of)))
    assert (report.ok, report.problems, report.notes) == (True, [], [])
    with Store.open(path) as store:
        pages = store_stats(store)["views"][0]["buckets"]
        with store.environment.read() as txn:
            commit = store.environment.sequence(txn)
    assert (report.tables, report.rows, report.pages, report.commit) == (1, 2950, pages, commit)


def test_paths_that_are_not_a_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no store at"):
        verify(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgument, match="is a file"):
        verify(tmp_path / "file")


FLIPS = """
import hashlib, json, os, sys
from pathlib import Path
from shorttail.store import Store, checks, lmdb_file

lmdb_file.TRY_WAIT_S = 0  # without other writers, no try is better than the first

def digest(path):
    found = hashlib.sha256()
    with Store.open(path) as store:
        with store.environment.read() as txn:
            found.update(store.environment.read_catalog_json(txn) + b"%d" % store.environment.sequence(txn))
        for view in store.catalog.views:
            for batch in store.scan(view):
                for column in [*batch.keys, batch.event_time_us, *(values for values, _ in batch.features)]:
                    found.update(repr(column.tolist()).encode())
    return found.hexdigest()

def forked(work, data, action):
    for file in work.iterdir():
        file.unlink()
    (work / "data.mdb").write_bytes(data)
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        sys.stdout = os.fdopen(w, "w", buffering=1)
        try:
            print(json.dumps(["result", action(work)]))
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.close(w)
    with os.fdopen(r) as pipe:
        lines = [json.loads(line) for line in pipe]
    return os.waitpid(pid, 0)[1], lines

good, work = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
wanted = forked(work, good, digest)[1]
for at, bit in json.load(sys.stdin):
    data = bytearray(good)
    data[at] ^= 1 << bit
    status, lines = forked(work, data, checks.check)
    problems = [text for kind, text in lines if kind in ("problem", "error")]
    ended = status == 0 and lines[-1:] == [["result", None]]
    harmless = not problems and forked(work, data, digest)[1] == wanted
    print(json.dumps([at, bit, ended, problems, harmless]))
"""


def flip(path: Path, tmp_path: Path, positions: list[tuple[int, int]]) -> list[tuple[int, int, bool, list[str], bool]]:
    """Flip each bit in turn. Return per flip (position, bit, ended well, problems, whether the content is the same)."""
    work = tmp_path / "flipped"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, path / "data.mdb", work],
        input=json.dumps(positions),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_bits_flipped_anywhere_never_kill_verify(path: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    places = page_places(path)
    in_pages = {}
    for _ in range(16):
        bucket, start = rng.choice(places)
        in_pages[start + rng.randrange(4080), rng.randrange(8)] = bucket
    size = (path / "data.mdb").stat().st_size
    anywhere = [(rng.randrange(size), rng.randrange(8)) for _ in range(24)]
    metas = [(4096 * rng.randrange(2) + rng.randrange(16, 152), rng.randrange(8)) for _ in range(12)]
    results = flip(path, tmp_path, [*in_pages, *anywhere, *metas])
    assert len(results) == len(in_pages) + 36
    for at, bit, ended, problems, harmless in results:
        assert ended, (at, bit, problems)
        if (at, bit) in in_pages:
            assert any(f"bucket {in_pages[at, bit]}: " in problem for problem in problems), (at, bit, problems)
        else:
            assert problems or harmless, (at, bit)


def test_flipped_bits_outside_the_tables(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # a compact copy has no old versions of pages in free pages
    backup(path, copy)
    with Store.open(copy) as store, store.environment.read() as txn:
        entries = [(bytes(key), bytes(value)) for key, value in txn.cursor() if bytes(key[:1]) != b"t"]
    data = (copy / "data.mdb").read_bytes()
    places = []
    for key, value in entries:
        at = data.find(key + value)
        places.append((at + len(key) if at > 0 else data.index(value), len(value)))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    positions = [(at + rng.randrange(length), rng.randrange(8)) for at, length in places for _ in "123"]
    assert {key for key, _ in entries} >= {b"format", b"catalog", b"state", b"sums"}
    for at, bit, ended, problems, _ in flip(copy, tmp_path, positions):
        assert ended, (at, bit)
        assert problems, (at, bit)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_a_problem(path: Path, keep: float) -> None:
    data = path / "data.mdb"
    os.truncate(data, int(data.stat().st_size * keep))
    report = verify(path)
    assert not report.ok
    assert all(problem.startswith("data.mdb: ") and "\n" not in problem for problem in report.problems)


def test_end_of_a_long_value_is_missing(tmp_path: Path) -> None:
    """The file ends within a page image of several LMDB pages."""
    n = 40
    with wide_store(tmp_path / "store", 1500) as store:
        store.load("wide", [wide_rows(range(n), 1500)])
    store_path = tmp_path / "store"
    assert structure_problems(store_path) == []
    data, whole = store_path / "data.mdb", (store_path / "data.mdb").read_bytes()
    lengths = list(range(len(whole) - 4096, len(whole) - 8 * 4096, -4096))
    found = []
    for length in lengths:
        data.write_bytes(whole[:length])
        problems = structure_problems(store_path)
        if problems:
            found.append(length)
            with pytest.raises(InvalidArgument, match=r"is truncated or damaged \(data.mdb has"):
                Store.open(store_path)
        else:  # the cut removed only unused pages
            with Store.open(store_path) as store:
                assert store.count("wide") == n
    assert found


def image_with(path: Path, change: Any) -> None:
    """Apply `change(image, layout)` to a page of `stats` and write it with a valid checksum."""
    with Store.open(path) as store:
        table, layout = store.catalog.tables["stats"], store.layout("stats")
        with store.environment.write() as writer:
            key, page = next((key, bytearray(page)) for key, page in table_pages(writer.txn, table.id) if page[0] > 3)
            change(page, layout)
            page[-4:] = crc32c(bytes(page[:-4])).to_bytes(4, "little")
            writer.put_page(table.id, key, bytes(page))


def test_duplicate_row(path: Path) -> None:
    def change(page: bytearray, layout: Any) -> None:
        first, n = 8 + int.from_bytes(page[2:4], "little"), layout.row_bytes
        page[first + n : first + 2 * n] = page[first : first + n]
        page[9] = page[8]  # its tag

    image_with(path, change)
    report = verify(path)
    assert len(report.problems) == 1
    assert report.problems[0].startswith("view 'stats' (table 2): a row of key user_id=")
    assert report.problems[0].endswith(" is there twice")


def test_row_with_a_wrong_tag_or_in_a_wrong_bucket(path: Path) -> None:
    def change(page: bytearray, layout: Any) -> None:
        first = 8 + int.from_bytes(page[2:4], "little")
        page[first : first + 8] = (10**12).to_bytes(8, "little")

    image_with(path, change)
    (problem,) = verify(path).problems
    assert problem.endswith((": a row lies in the wrong bucket", ": a tag does not match its row")), problem


def test_a_missing_bucket_is_a_problem(path: Path) -> None:
    with Store.open(path) as store, store.environment.write() as writer:
        table = store.catalog.tables["stats"].id
        keys = [key for key, _ in table_pages(writer.txn, table)]
        writer.delete_page(table, keys[3])
    (problem,) = verify(path).problems
    assert "view 'stats' (table 2): bucket " in problem


def test_leftover_table_and_missing_log(path: Path) -> None:
    with Store.open(path) as store, store.environment.write() as writer:
        writer.put_page(77, bytes(8), bytes(4080))
        writer.txn.delete(b"l" + (2).to_bytes(8, "big"))
    report = verify(path)
    assert report.notes == ["table 77 is not in the catalog (1 pages): a load is running, or a killed load left it"]
    assert any("the change log lacks some of the commits 1 to " in problem for problem in report.problems)


def test_store_that_is_written_during_verify(path: Path) -> None:
    stop = threading.Event()
    commits = 0

    def write() -> None:
        nonlocal commits
        with Store.open(path) as store:
            while not stop.is_set():
                store.upsert("stats", rows(range(commits % 7, 40_000, 97), commits + 2, commits + 2))
                commits += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            report = verify(path)
            assert report.problems == []
    finally:
        stop.set()
        writer.join()
    assert commits > 3
    assert report.rows > 3000


def test_check_killed_by_a_damaged_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '[\"doing\", \"view '\"'stats'\"'\"]'\nkill -BUS $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(verify_module.sys, "executable", str(python))
    report = verify(path)
    assert report.problems == ["view 'stats': reading it ended in SIGBUS; the file or the disk is damaged"]


# -- stat ----------------------------------------------------------------------------------------------------------


def test_stat_of_readers(path: Path) -> None:
    code = (
        "import sys\nfrom shorttail.store import Store\nstore = Store.open(sys.argv[1])\n"
        "with store.reading():\n    print('in', flush=True)\n    sys.stdin.readline()\n"
    )
    with (
        subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
        Store.open(path) as store,
    ):
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"in\n"
        before = store_stats(store)
        for n in range(3):
            store.upsert("stats", rows([n], 9, 9))
        store.refresh()
        after = store_stats(store)
        child.stdin.write(b"\n")
    assert before["readers"] == [{"pid": child.pid, "snapshots": 1, "commits_behind": 0}]
    assert after["readers"] == [{"pid": child.pid, "snapshots": 1, "commits_behind": 3}]
    assert after["oldest_snapshot_commits_behind"] == 3
    assert after["commit"] == before["commit"] + 3
    assert after["change_log"]["commits"] == before["change_log"]["commits"] + 3


def test_stat_of_views(path: Path) -> None:
    with Store.open(path) as store:
        found = store_stats(store)
        with store.environment.read() as txn:
            pages = [bytes(page) for _, page in table_pages(txn, store.catalog.tables["stats"].id)]
    (view,) = found["views"]
    assert (view["rows"], view["buckets"], view["bytes"]) == (2950, len(pages), 4096 * len(pages))
    gaps = [page.count(0) for page in pages]
    assert 0.3 < view["fill"] < 1
    assert view["fill"] >= 1 - sum(gaps) / (4080 * len(pages))  # gaps are zeros, but other bytes are zero as well
    assert found["file_bytes"] == (path / "data.mdb").stat().st_size
    assert found["free_bytes"] < found["file_bytes"]
    assert found["leftover_tables"] == []


# -- backup --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [True, False])
def test_backup_of_a_store_in_use(path: Path, tmp_path: Path, compact: bool) -> None:
    """One commit writes all rows of a version, so a copy must hold exactly one version."""
    stop, started = threading.Event(), threading.Event()
    ids = list(range(0, 3000, 3))

    def write() -> None:
        with Store.open(path) as store:
            version = 10
            while not stop.is_set():
                store.upsert("stats", rows(ids, version, version))
                started.set()
                version += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(30)
        done = [backup(path, tmp_path / f"copy {n}", compact=compact) for n in range(3)]
    finally:
        stop.set()
        writer.join()
    commits = [copy.commit for copy in done]
    assert commits == sorted(commits)
    for n, copy in enumerate(done):
        report = verify(tmp_path / f"copy {n}")
        assert (report.problems, report.commit) == ([], copy.commit)
        with Store.open(tmp_path / f"copy {n}") as restored:
            found = scanned(restored)
            assert len({found[i][0] for i in ids}) == 1
            restored.upsert("stats", rows([5], 10**6, 7))  # the copy is a store that can be written
            assert scores(restored, [5]) == [5.7]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["copy 0", "copy 1", "copy 2", "store"]


def test_backup_of_an_open_store(path: Path, tmp_path: Path) -> None:
    path.chmod(0o750)
    with Store.open(path) as store, store.reading():
        done = backup(store, tmp_path / "copy")
        found = store_stats(store)
    assert (done.commit, done.views, done.model_versions) == (found["commit"], 1, 0)
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o750
    assert done.bytes <= found["file_bytes"]


def test_a_backup_goes_to_a_new_folder_outside_of_the_store(path: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidArgument, match=r"'.*there' exists"):
        backup(path, tmp_path / "there")
    with pytest.raises(InvalidArgument, match="is inside the store"):
        backup(path, path / "copy")
    with pytest.raises(InvalidArgument, match="does not exist; create it"):
        backup(path, tmp_path / "none" / "copy")
    with pytest.raises(NotFound, match="no store at"):
        backup(tmp_path / "nowhere", tmp_path / "copy")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["store", "there"]


def test_backup_to_a_full_disk(path: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom shorttail.errors import ResourceExhausted\n"
        "from shorttail.store.backup import backup\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))\n"
        "try:\n    backup(sys.argv[1], sys.argv[2])\nexcept ResourceExhausted as error:\n    print(error)\n"
    )
    size = (path / "data.mdb").stat().st_size
    assert size > 1 << 17
    done = in_child(code, path, tmp_path / "copy")
    assert done.stdout == f"the disk of '{tmp_path / 'copy'}' is full or failing; no backup was made\n", done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]
    assert verify(path).ok


def test_backup_of_a_damaged_store(path: Path, tmp_path: Path) -> None:
    backup(path, tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / "data.mdb").read_bytes())
    data[data.index(b'{"entities":')] = 0
    (tmp_path / "damaged" / "data.mdb").write_bytes(data)
    code = (
        "import sys\nfrom shorttail.errors import ShorttailError\nfrom shorttail.store.backup import backup\n"
        "try:\n    backup(sys.argv[1], sys.argv[2])\nexcept ShorttailError as error:\n    print(error)\n"
    )
    done = in_child(code, tmp_path / "damaged", tmp_path / "copy")
    assert "damaged" in done.stdout, done
    assert not (tmp_path / "copy").exists()
