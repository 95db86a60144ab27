"""A fork server for test_flips.py: flips bits of a store's file one at a time, and tries all that a store is used for.

Run as a program, it reads lines `offset bit`. For each it writes the file of a store with that bit flipped, and forks a
child that verifies the store, reads, copies and writes it. It answers a line of JSON: what the child found, or the
signal that killed it. `none` instead of a position leaves the file as it is.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PAGE, HEADER, META_USED = 4096, 16, 152
BIG = 1  # a value in overflow pages
HANG_S = 60
STORE_MODULES = ("shorttail.sources.rows", "shorttail.store.backup", "shorttail.store.checks")
MODULES = ("lmdb._envid", "numpy.ma", "numpy.random", *STORE_MODULES)  # that a child would import for itself


# -- the places to flip ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A range of bytes of the file. used: whether LMDB or a store reads them; the others are a page's free space."""

    kind: str
    start: int
    stop: int
    used: bool


def places(data: bytes) -> list[Place]:
    """Return all bytes of the newest commit that are not rows: a checksum in each page image covers those.

    These are the meta pages, the pages of both trees, header, tags and footer of each page image, and all of the other
    values.
    """
    newer = max((0, PAGE), key=lambda at: struct.unpack_from("<Q", data, at + 144)[0])
    found = [place for at in (0, PAGE) for place in split("meta", at, at + META_USED, at + PAGE)]
    for tree, record in (("free list", 40), ("entries", 88)):
        (root,) = struct.unpack_from("<Q", data, newer + record + 40)
        found += places_below(data, tree, root)
    return found


def split(kind: str, start: int, middle: int, stop: int) -> Iterator[Place]:
    yield Place(kind, start, middle, True)
    yield Place(f"unused in {kind}", middle, stop, False)


def places_below(data: bytes, tree: str, number: int) -> Iterator[Place]:
    page = number * PAGE
    flags, lower, upper = struct.unpack_from("<HHH", data, page + 10)
    kind = f"{tree}: {'branch' if flags == 1 else 'leaf'}"
    yield from split(kind, page, page + lower, page + upper)
    yield Place(kind, page + upper, page + PAGE, True)
    for offset in struct.unpack_from(f"<{(lower - HEADER) // 2}H", data, page + HEADER):
        low, high, key_bytes = struct.unpack_from("<IHH", data, page + offset)
        if flags == 1:
            yield from places_below(data, tree, low | high << 32)
        elif high & BIG:
            key = data[page + offset + 8 :][:key_bytes]
            (first,) = struct.unpack_from("<Q", data, page + offset + 8 + key_bytes)
            start, stop = first * PAGE, first * PAGE + HEADER + low
            if tree == "entries" and key[:1] == b"t":
                (tags,) = struct.unpack_from("<H", data, start + HEADER + 2)
                yield Place("image", start, start + HEADER + 8 + tags, True)
                yield Place("image", stop - 24, stop, True)
            else:
                yield Place(f"{tree}: value", start, stop, True)


# -- the store -------------------------------------------------------------------------------------------------------


def make_store(path: Path, definitions: Path, commits: int) -> None:
    """Make a store with several views, edits, a load, a model, a change log, and free pages of many commits."""
    import workload

    from shorttail.registry.apply import apply
    from shorttail.store import Store

    workload.create(path)
    with Store.open(path) as store:
        for step in range(1, len(workload.CYCLE)):
            workload.take(store, step)
        store.load("other", [workload.batch_of(list(range(50)), 1)])
        apply(store, str(definitions))
        with store.environment.read():  # keeps the pages that are freed from now on in the list of free pages
            for number in range(commits):
                store.upsert("other", workload.batch_of([number], number))


# -- the work of a child ---------------------------------------------------------------------------------------------


def check(path: Path) -> list[str]:
    """Return the problems that `verify` finds, without a process of its own."""
    from shorttail.store import checks

    found: list[Any] = []
    checks.emit = lambda kind, value: found.append((kind, value))  # type: ignore[assignment]
    checks.check(path)
    return [str(value) for kind, value in found if kind == "problem"]


def read(path: Path) -> Any:
    """Open a store and return all that can be read of it: by lookups, a prediction, scans and statistics."""
    import workload

    import shorttail as st
    from shorttail.store.stat import store_stats

    with st.Engine.open(path) as engine:
        store, keys = engine.store, list(range(-1, workload.N_KEYS + 20))
        found: list[Any] = [workload.look_up_all(store), workload.scan_all(store)]
        for view in ("stats", "extra", "other", "scored"):
            names = [f"{view}:{feature.name}" for feature in store.catalog.views[view].features if feature.name != "v"]
            columns = engine.get_online_features(names, {"user_id": keys})
            found += [(name, str(np.asarray(columns[name]).tolist())) for name in names]
            found += [store.count(view)]
        found += [engine.predict("score", {"user_id": keys}).outputs["y"].tolist(), engine.models(), engine.views()]
        return [*found, {name: value for name, value in store_stats(store).items() if name not in ("store", "readers")}]


def rows_of(store: Any, view: str) -> Iterable[str]:
    for batch in store.scan(view):
        columns = [*batch.keys, batch.event_time_us, *(values for values, _ in batch.features)]
        yield from (str(row) for row in zip(*(column.tolist() for column in columns), strict=True))


def copy(path: Path) -> Any:
    """Back a store up in both ways and return what the compact copy holds."""
    import workload

    from shorttail.store import Store
    from shorttail.store.backup import backup

    target, found = path.with_name(f"{path.name}.copy"), []
    try:
        for compact in (False, True):
            shutil.rmtree(target, ignore_errors=True)
            done = backup(path, target, compact=compact)
            found.append([done.commit, done.views, done.model_versions])
        with Store.open(target) as store:
            return [found, workload.scan_all(store), sorted(rows_of(store, "other")), list(store.catalog.models)]
    finally:
        shutil.rmtree(target, ignore_errors=True)


def write(path: Path) -> Any:
    """Push, delete, load and change the catalog, and return what is read then and after opening the store again.

    A store of format 2 is migrated first.
    """
    import workload

    import shorttail as st
    from shorttail.store import Store
    from shorttail.store.lmdb_file import structure_problems
    from shorttail.store.migrate import migrate
    from shorttail.store.stat import store_stats

    first = len(workload.CYCLE)
    with st.Engine.open(path) as engine:
        store = engine.store
        if store_stats(store)["format"] == 2:
            migrate(store.environment)
        for kind in ("edit", "shrink", "load", "catalog"):
            workload.take(store, workload.first_of(kind, first))
        engine.push("scored", {"user_id": [1, 2, 3], "event_time": np.full(3, 5), "a": [1.5, 2.5, 3.5]})
        engine.delete("scored", {"user_id": [2]})
        engine.delete("other", {"user_id": list(range(0, 400, 2))})
        found: list[Any] = [workload.look_up_all(store), workload.scan_all(store), sorted(rows_of(store, "scored"))]
    with Store.open(path) as store:
        found += [workload.scan_all(store), sorted(rows_of(store, "other")), store.catalog.views["extra"].description]
    return [*found, structure_problems(path)]


USES: dict[str, Callable[[Path], Any]] = {"read": read, "copy": copy, "write": write}


def use(path: Path) -> dict[str, Any]:
    """Verify a store and use it. Returns the problems, and per use a digest, or the error, or what no user may see."""
    from shorttail.errors import ShorttailError

    found: dict[str, Any] = {}
    for name, work in ({"verify": check} | USES).items():
        try:
            result = work(path)
            found[name] = result if name == "verify" else digest(result)
        except ShorttailError as error:
            found[name] = [error.message] if name == "verify" else {"error": error.message}
        except AssertionError as error:
            found[name] = {"wrong": str(error)[:300]}
        except Exception:
            found[name] = {"raised": traceback.format_exc()[-1500:]}
    return found


def digest(result: Any) -> str:
    """Return a hash of a result, whatever the order of its dicts: tables have random seeds."""
    return hashlib.sha256(repr(ordered(result)).encode()).hexdigest()


def ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted(value.items(), key=str)
    return [ordered(item) for item in value] if isinstance(value, list | tuple) else value


# -- the server ------------------------------------------------------------------------------------------------------


def main() -> None:
    base, work = map(Path, sys.argv[1:3])
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import workload  # imports all that a child needs

    import shorttail as st
    from shorttail.store import lmdb_file

    workload.set_limits()
    lmdb_file.TRY_WAIT_S = 0
    assert st.Engine
    work.mkdir()
    for module in MODULES:
        importlib.import_module(module)
    shutil.copytree(base / "models", work / "models")
    good = bytearray((base / "data.mdb").read_bytes())
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        if line.strip() == "none":
            answer = fork(work, good)
        else:
            at, bit = map(int, line.split())
            good[at] ^= 1 << bit
            answer = fork(work, good)
            good[at] ^= 1 << bit
        print(json.dumps(answer), flush=True)


def fork(work: Path, data: bytearray) -> dict[str, Any]:
    for name in ("data.mdb", "lock.mdb", "generation", "load.lock"):
        (work / name).unlink(missing_ok=True)
    (work / "data.mdb").write_bytes(data)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(HANG_S)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            found = use(work)
            os.write(writer, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(said) if said else {"killed": -status}


class FlipServer:
    """The test's side of this program; a context manager. `sound` is what the uses of the store give without a flip."""

    def __init__(self, base: Path, work: Path) -> None:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), str(base), str(work)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.sound = self._ask("none")
        assert self.sound["verify"] == []
        assert all(isinstance(self.sound[name], str) for name in USES), self.sound

    def __enter__(self) -> FlipServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"killed": "the server"}')
        return answer

    def flip(self, at: int, bit: int) -> tuple[str, str]:
        """Flip one bit. Returns the outcome and what happened: `found`, `harmless`, or a failure of the store."""
        found = self._ask(f"{at} {bit}")
        if "killed" in found:
            return "killed", str(found["killed"])
        raised = [value for value in found.values() if isinstance(value, dict) and "raised" in value]
        if raised:
            return "raised", raised[0]["raised"]
        if found["verify"]:
            return "found", found["verify"][0]
        different = [name for name in USES if found[name] != self.sound[name]]
        return ("missed", f"{different[0]}: {found[different[0]]}") if different else ("harmless", "")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
