"""The map of a store: its size, a full map, and mapping and locking it in advance."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
from test_care import in_child, wide_rows, wide_store
from test_store import make_store, rows, scores

from shorttail.errors import InvalidArgument, ResourceExhausted
from shorttail.store import Store
from shorttail.store.stat import store_stats
from shorttail.store.verify import verify

# -- the map -------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with make_store(tmp_path / "store") as store:
        store.load("stats", [rows(range(3000))])
        store.delete("stats", [np.arange(2900, 2950)])
    return tmp_path / "store"


def test_full_map_still_serves_and_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTTAIL_MAP_GIB", str(8 / 1024))
    path = tmp_path / "store"
    with wide_store(path, 100) as store:
        assert store_stats(store)["map_bytes"] == 8 << 20
        n, said = 0, []
        for step in (1000, 100, 10):
            try:
                while True:
                    store.upsert("wide", wide_rows(range(n, n + step), 100))
                    n += step
            except ResourceExhausted as error:
                said.append(str(error))
        assert all("has filled its map; delete rows" in text for text in said)
        assert store.count("wide") == n > 5000
        assert store.upsert("wide", wide_rows(range(100), 100)) == 100  # existing rows can still be replaced
        for start in range(0, n // 2, 100):
            assert store.delete("wide", [np.arange(start, start + 100)]) == 100
        left = store.count("wide")
        for start in range(n, n + 1000, 100):
            assert store.upsert("wide", wide_rows(range(start, start + 100), 100)) == 100
        assert store.count("wide") == left + 1000
    monkeypatch.setenv("SHORTTAIL_MAP_GIB", str(32 / 1024))
    with Store.open(path) as store:
        assert store.upsert("wide", wide_rows(range(2 * n), 100)) == 2 * n
    assert verify(path).ok


@pytest.mark.parametrize("text", ["much", "-1", "0", "1e-9", "nan", "1e30"])
def test_invalid_map_size_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SHORTTAIL_MAP_GIB", text)
    with pytest.raises(InvalidArgument, match=f"SHORTTAIL_MAP_GIB={text} is not a valid map size; give a number"):
        Store.open(path)


def test_little_address_space(path: Path) -> None:
    code = (
        "import resource, sys\nfrom shorttail.errors import ShorttailError\nfrom test_store import *\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "limit = used + int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n"
        "    with Store.open(sys.argv[1]) as store:\n"
        "        store.upsert('stats', rows(range(5000, 6000)))\n"
        "        print(store.count('stats'), store.environment.handle.env.info()['map_size'] < limit // 2)\n"
        "except ShorttailError as error:\n    print(error)\n"
    )
    assert in_child(code, path, 512 << 20).stdout == "3950 True\n"
    said = in_child(code, path, 2 << 20).stdout
    assert said.startswith(f"store '{path}' has ")
    assert said.endswith("(ulimit -v)\n")


# -- memory --------------------------------------------------------------------------------------------------------

LOCK = """
import os, resource, sys
from shorttail.errors import ResourceExhausted
from test_store import *

def locked():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmLck"))

store = Store.open(sys.argv[1])
if sys.argv[2] == "refused":
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 65534)  # the memlock limit does not apply to root
    try:
        store.pretouch(lock=True)
    except ResourceExhausted as error:
        print(error)
else:
    store.pretouch(lock=True)
    before, size = locked(), os.stat(sys.argv[1] + "/data.mdb").st_size
    store.upsert("stats", rows(range(50_000)))
    store.refresh()
    store.lock_growth()
    after, grown = locked(), os.stat(sys.argv[1] + "/data.mdb").st_size
    print(grown > size, 0.8 < before / size <= 1, 0.8 < after / grown <= 1)
"""


def can_lock(n_bytes: int) -> bool:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return os.getuid() == 0 or limit == resource.RLIM_INFINITY or limit >= n_bytes


@pytest.mark.skipif(not can_lock(32 << 20), reason="may not lock 32 MiB of memory")
def test_locked_memory_follows_the_file(path: Path) -> None:
    done = in_child(LOCK, path, "allowed")
    assert done.stdout == "True True True\n", done.stderr


def test_memlock_limit_is_reported(path: Path) -> None:
    done = in_child(LOCK, path, "refused")
    assert done.stdout.startswith(f"store '{path}': its "), done.stderr
    assert "the limit is 64.0 KiB); raise it (ulimit -l, or LimitMEMLOCK= of systemd)" in done.stdout


def test_pretouch_builds_directories(path: Path) -> None:
    with Store.open(path) as store:
        store.pretouch()
        assert list(store.directories) == [store.catalog.tables["stats"].id]
        assert scores(store, [1, 2900]) == [1.0, None]
