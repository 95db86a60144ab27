"""Paths that are not a store, and stores that cannot be used: one line says why, and no data is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from test_store import make_store, rows, scores

from shorttail.config import LIMITS, Limits
from shorttail.errors import InvalidArgument, NotFound, ResourceExhausted
from shorttail.store import Store, leftovers, mapping
from shorttail.store.verify import verify

TXN_ID_AT = 144  # in a meta page of LMDB: the number of its commit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with make_store(path) as store:
        yield store


def test_a_store_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(NotFound, match=r"no store at '.*store'; create it with `shorttail apply"):
        Store.open(path)
    path.mkdir()
    with pytest.raises(NotFound, match="no store"):
        Store.open(path)
    assert list(path.iterdir()) == []


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("hello")
    with pytest.raises(InvalidArgument, match="is a file, not a store"):
        Store.open(file)
    with pytest.raises(InvalidArgument, match="holds other files"):
        Store.open(tmp_path, create=True)
    other = tmp_path / "other"
    lmdb.open(str(other)).close()
    with pytest.raises(NotFound, match="no store at"):  # a creation that failed leaves this
        Store.open(other)
    with lmdb.open(str(other)) as database, database.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(InvalidArgument, match="not a shorttail store"):
        Store.open(other)
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "data.mdb").write_bytes(os.urandom(20_000))
    with pytest.raises(InvalidArgument, match="truncated or damaged"):
        Store.open(garbage)


def test_a_store_of_a_newer_format_is_refused(path: Path) -> None:
    with make_store(path) as store, store.environment.write() as writer:
        writer.txn.put(b"format", b"7")
    with pytest.raises(InvalidArgument, match="format 7, and this shorttail reads 2 and 3; upgrade"):
        Store.open(path)


def test_a_store_of_a_format_that_is_too_old_is_refused(path: Path) -> None:
    with make_store(path) as store, store.environment.write() as writer:
        writer.txn.put(b"format", b"1")
    with pytest.raises(InvalidArgument, match="format 1, and this shorttail reads 2 and 3; make a new store"):
        Store.open(path)


@pytest.mark.parametrize("keep", [0, 100, 8192, 40_000, -4096])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    with make_store(path) as store:
        store.load("stats", [rows(range(5000))])
    data = path / "data.mdb"
    os.truncate(data, keep if keep >= 0 else data.stat().st_size + keep)
    with pytest.raises(InvalidArgument, match="truncated or damaged"):
        Store.open(path)


def test_file_without_its_unused_last_pages_is_sound(path: Path) -> None:
    with make_store(path) as store:
        store.load("stats", [rows(range(5000))])
        store.refresh()
        leftovers.drop_table(store.environment, store.catalog.tables["stats"].id)
        info = store.environment.handle.env.info()
    data = path / "data.mdb"
    pages = data.stat().st_size // 4096
    assert pages == info["last_pgno"] + 1
    shutil.copytree(path, path.with_name("copy"))
    shorter = path.with_name("copy") / "data.mdb"
    for cut in range(1, 6):
        os.truncate(shorter, (pages - cut) * 4096)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                Store.open(path.with_name("copy")).close()
            except InvalidArgument:
                assert cut > 1  # this cut removed a page that is in use
                break


def test_disk_full_fails_the_write_and_keeps_the_rest(store: Store) -> None:
    store.load("stats", [rows(range(100))])
    code = (
        "import sys, resource\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import test_store as t\nfrom shorttail.errors import ResourceExhausted\n"
        "s = t.Store.open(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try:\n    s.load('stats', [t.rows(range(20_000))])\n"
        "except ResourceExhausted as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.path, str(Path(__file__).parent)], timeout=60, capture_output=True, text=True
    )
    assert "is full" in done.stdout, done.stderr
    assert store.count("stats") == 100
    assert store.load("stats", [rows(range(20_000))]) == 20_000


def test_a_full_map_refuses_a_load_and_keeps_its_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "LIMITS", Limits(map_bytes=1 << 20))
    with make_store(path) as store:
        store.load("stats", [rows(range(10))])
        with pytest.raises(ResourceExhausted, match="filled its map"):
            store.load("stats", [rows(range(50_000))])
        assert store.count("stats") == 10


def test_use_after_fork_is_refused(store: Store) -> None:
    store.load("stats", [rows([1])])
    assert scores(store, [1]) == [1.0]
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about fork because of threads of earlier tests
        pid = os.fork()
    if pid == 0:
        said = []
        for use in (store.refresh, lambda: store.upsert("stats", rows([2])), lambda: Store.open(store.path)):
            try:
                use()
                said.append("nothing")
            except InvalidArgument as error:
                said.append(str(error))
        os.write(write_end, "\n".join(said).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read().split("\n")
    assert len(said) == 3
    assert all("before this process forked" in line for line in said)
    assert scores(store, [1]) == [1.0]


def test_one_environment_per_path(store: Store, path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    with Store.open(link) as other:
        assert other.environment is store.environment
    store.load("stats", [rows([1])])
    assert store.count("stats") == 1
    assert LIMITS.readers > 1


def test_closed_store_says_so(path: Path) -> None:
    store = make_store(path)
    store.close()
    store.close()
    with pytest.raises(InvalidArgument, match="is closed"):
        store.refresh(force=True)


@pytest.mark.parametrize("page", [0, 1])
def test_two_meta_pages_of_one_number_do_not_bring_an_older_commit_back(path: Path, page: int) -> None:
    """LMDB would take the first one, silently."""
    with make_store(path) as store:
        store.load("stats", [rows(range(10))])
    sound = (path / "data.mdb").read_bytes()
    for bit in range(3):
        data = bytearray(sound)
        data[page * 4096 + TXN_ID_AT] ^= 1 << bit
        (path / "data.mdb").write_bytes(data)
        assert verify(path).problems
        if bit == 0:
            with pytest.raises(InvalidArgument, match="which are not consecutive"):
                Store.open(path)
