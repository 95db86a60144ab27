"""`shorttail views` and `search`: what they show, write and refuse."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import commands
import pytest
from views_store import COLUMNS, NOW, N, by_key, expected, fails, make_folder, nan_is_none, ok

import shorttail as st

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
import pyarrow.parquet  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of two views and a model. Its tests only read the store."""
    return make_folder(tmp_path_factory.mktemp("views"))


# -- list, show, get ---------------------------------------------------------------------------------------------------


def test_views_alone_lists_them(folder: Path) -> None:
    out = ok(folder, "views").out
    assert ok(folder, "views", "list").out == out
    assert commands.run_well("views", "--store", "store", "list", folder=folder).out == out
    newest = f"{NOW.isoformat()[:26].rstrip('0')}Z"
    assert [line.split() for line in out.splitlines()] == [
        ["view", "entity", "features", "rows", "owner", "last", "event"],
        ["stats", "user", "6", "40", "fraud-team", newest],
        ["empty", "item", "1", "0", "-"],
    ]
    assert ok(folder, "views", "list", "--json").json == [
        {"name": "stats", "entity": "user", "features": 6, "rows": N, "owner": "fraud-team",
         "tags": ["pii", "daily"], "newest": newest},
        {"name": "empty", "entity": "item", "features": 1, "rows": 0, "owner": "", "tags": [], "newest": None},
    ]  # fmt: skip


def test_show_a_view(folder: Path) -> None:
    out = ok(folder, "views", "show", "stats").out
    lines = out.splitlines()
    assert lines[:6] == [
        "view:        stats",
        "description: what a user did",
        "owner:       fraud-team",
        "tags:        pii, daily",
        "entity:      user (user_id Int64, site String): a customer",
        "entity tags: core",
    ]
    assert f"source:      {folder}/users.parquet, event times in updated_at" in lines
    assert "ttl:         30d" in lines
    assert any(line.startswith("rows:        40, ") and line.endswith(" bytes a row in the file") for line in lines)
    assert any(line.startswith("event times: ") and line.endswith("Z, 25.0% STALE") for line in lines)
    assert "tier     String           -          billing  gold or silver" in lines
    assert "age      Int32           30" in lines
    assert "since    Timestamp        -  Since" in lines
    assert "\x1b" not in out
    shown = ok(folder, "views", "show", "stats", "--json").json
    assert (shown["rows"], shown["stale_rows"], shown["stale_share"]) == (N, 10, 0.25)
    assert shown["features"][1] == {
        "name": "tier", "type": "String", "default": None, "column": "tier", "description": "gold or silver",
        "tags": ["billing"],
    }  # fmt: skip
    assert len(shown["sample"]) == 5
    assert all(list(row) == COLUMNS for row in shown["sample"])
    nothing = ok(folder, "views", "show", "empty").out
    assert "rows:        0\n" in nothing
    assert "event times" not in nothing
    assert fails(folder, "views", "show", "stat").startswith("error: no feature view 'stat'; did you mean 'stats'?")


def test_get_rows_by_key(folder: Path) -> None:
    got = ok(folder, "views", "get", "stats", "user_id=3,36,5,3", "site=a,a,a,b", "--json").json
    assert [item["status"] for item in got] == ["PRESENT", "STALE", "NOT_FOUND", "NOT_FOUND"]
    assert list(got[0]["row"]) == COLUMNS
    assert got[0]["row"] | {"updated_at": 0} == {
        "user_id": 3, "site": "a", "age": 3, "tier": None, "score": pytest.approx(0.3), "taste": None, "new": False,
        "since": "2020-01-01T03:00:00.000003Z", "updated_at": 0,
    }  # fmt: skip
    assert {name: value for name, value in got[2]["row"].items() if value is not None} == {"user_id": 5, "site": "a"}
    assert [list(item["row"].values())[:2] for item in got] == [[3, "a"], [36, "a"], [5, "a"], [3, "b"]]
    out = ok(folder, "views", "get", "stats", "user_id=4", 'site="b,c"').out.splitlines()
    assert (out[0].split()[0], out[0].split()[-1], out[1].split()[-1]) == ("user_id", "status", "PRESENT")
    assert r"\x1b[31m&\n" in out[1]
    assert [item["status"] for item in ok(folder, "views", "get", "empty", "id=1", "--json").json] == ["NOT_FOUND"]
    assert "takes no column 'user'; columns: user_id Int64, site String" in fails(
        folder, "views", "get", "stats", "user=3"
    )
    assert "column 'user_id' takes Int64; got 'x'" in fails(folder, "views", "get", "stats", "user_id=x", "site=a")
    assert "'site'" in fails(folder, "views", "get", "stats", "user_id=3")
    assert "Missing argument" in fails(folder, "views", "get", "stats", code=2)


# -- scan --------------------------------------------------------------------------------------------------------------


def test_scan_as_json(folder: Path) -> None:
    out = ok(folder, "views", "scan", "stats", "--json").out
    assert out.count("\n") == N + 2
    rows = by_key(json.loads(out))
    for row, right in zip(rows, expected(), strict=True):
        assert list(row) == COLUMNS
        for name in ("since", "updated_at"):
            assert datetime.datetime.fromisoformat(row.pop(name)) == right.pop(name)
        numbers = [row.pop("score"), *(row.pop("taste") or [None])]
        wanted = [right.pop("score"), *(right.pop("taste") or [None])]
        assert numbers == [None if x is None else pytest.approx(x, abs=1e-6) for x in wanted]
        assert row == right
    assert '"taste": [5.0, 0.1]' in out, "Float32 values are as short as they were given"
    assert ok(folder, "views", "scan", "stats", "--format", "json", "--limit", "0").out == "[]\n"
    assert ok(folder, "views", "scan", "empty", "--json").json == []


def test_scan_with_conditions_and_columns(folder: Path) -> None:
    scan = ["views", "scan", "stats", "--json", "--columns", "tier,user_id"]
    gold = ok(folder, *scan, "--where", "tier=gold", "--where", "age>=10").json
    wanted = expected(columns=["tier", "user_id"], holds=lambda r: r["tier"] == "gold" and (r["age"] or 0) >= 10)
    assert by_key(gold) == wanted
    assert list(gold[0]) == ["tier", "user_id"]
    assert len(ok(folder, *scan, "--where", "tier=gold", "--limit", "3").json) == 3
    assert ok(folder, *scan, "--where", "tier=iron").json == []
    missing = ok(folder, *scan, "--where", "tier=").json
    assert by_key(missing) == expected(columns=["tier", "user_id"], holds=lambda r: r["tier"] is None)
    recent = f"updated_at>{(NOW - datetime.timedelta(days=2.5)).isoformat()[:19]}Z"
    assert [row["user_id"] for row in by_key(ok(folder, *scan, "--where", recent).json)] == [0, 1, 2]


def test_scan_as_csv_is_a_file_that_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    out = ok(folder, "views", "scan", "stats", "--format", "csv").out
    assert out.splitlines()[0] == ",".join(f'"{name}"' for name in COLUMNS)
    with st.Engine.open(folder / "store") as engine:
        definition = engine.views["stats"].definition
    features = [
        st.Feature(f.name, f.dtype)
        for f in definition.features  # without the source's column names
    ]
    view = st.FeatureView(
        "stats", entity=definition.entity, features=features, source=st.ParquetSource("x", timestamp="updated_at")
    )
    (tmp_path / "rows.csv").write_text(out)
    with st.Engine.open(folder / "store") as old, st.Engine.open(tmp_path / "copy", create=True) as new:
        new.apply([view])
        new.load("stats", str(tmp_path / "rows.csv"))
        copied, whole = (engine.views["stats"].to_arrow() for engine in (new, old))
    assert copied.schema == whole.schema
    assert by_key(nan_is_none(copied.to_pylist())) == by_key(nan_is_none(whole.to_pylist())) == expected()


def test_scan_to_files(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    assert ok(folder, "views", "scan", "stats", "--output", str(file)).out == f"{file}: 40 rows\n"
    found = pyarrow.parquet.read_table(file)
    assert [str(field.type) for field in found.schema] == [
        "int64", "string", "int32", "string", "float", "fixed_size_list<element: float>[2]", "bool",
        "timestamp[us, tz=UTC]", "timestamp[us, tz=UTC]",
    ]  # fmt: skip
    assert by_key(nan_is_none(found.to_pylist())) == expected()
    for name in ("rows.csv", "rows.json"):
        ok(folder, "views", "scan", "stats", "--limit", "1", "--columns", "user_id", "--output", str(tmp_path / name))
    assert (tmp_path / "rows.csv").read_text().startswith('"user_id"\n')
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 1
    ok(folder, "views", "scan", "empty", "--output", str(tmp_path / "none.parquet"))
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").num_rows == 0
    ok(folder, "views", "scan", "stats", "--format", "table", "--output", str(tmp_path / "all.txt"))
    assert len((tmp_path / "all.txt").read_text().splitlines()) == N + 1
    ok(folder, "views", "scan", "stats", "--where", "tier=gold", "--output", str(file))
    assert pyarrow.parquet.read_table(file).num_rows == 8, "an older file is replaced"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all.txt", "none.parquet", "rows.csv", "rows.json", "rows.parquet"
    ]  # fmt: skip


def test_a_scan_that_fails_leaves_the_file_that_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shorttail.store.scan import TableScan

    file = tmp_path / "rows.json"
    file.write_text("precious")
    monkeypatch.setattr(TableScan, "__next__", lambda scan: (_ for _ in ()).throw(st.errors.Internal("the disk burns")))
    assert fails(folder, "views", "scan", "stats", "--output", str(file)) == "error: the disk burns\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert file.read_text() == "precious"
    assert "No such file" in fails(folder, "views", "scan", "stats", "--output", str(tmp_path / "no" / "x.csv"))


def test_tables_of_a_scan(folder: Path) -> None:
    out = ok(folder, "views", "scan", "stats").out.splitlines()
    assert out[0].split() == COLUMNS
    assert (len(out), out[-1]) == (22, "at most 20 rows are shown; --limit N shows N")
    assert len(ok(folder, "views", "scan", "stats", "--limit", "30").out.splitlines()) == 31
    assert len(ok(folder, "views", "scan", "stats", "--where", "tier=gold").out.splitlines()) == 9
    assert ok(folder, "views", "scan", "empty").out == "id  x  event_time\n"


def test_wrong_uses_of_scan(folder: Path) -> None:
    scan = ["views", "scan", "stats"]
    assert "has no column 'tiar'; did you mean 'tier'?" in fails(folder, *scan, "--where", "tiar=gold")
    assert "has no column 'scroe'; did you mean 'score'?" in fails(folder, *scan, "--columns", "user_id,scroe")
    assert "column 'age' takes Int32; got 'old'" in fails(folder, *scan, "--where", "age>old")
    assert "no feature view 'statz'" in fails(folder, "views", "scan", "statz")
    assert "contradict" in fails(folder, *scan, "--json", "--format", "csv", code=2)
    assert "give either --store STORE or --server ADDR" in commands.error_of(*scan, code=2, folder=folder)
    assert "no store at" in commands.error_of(*scan, "--store", "nowhere", folder=folder)


def process(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", ["table", "csv", "json", "parquet"])
def test_a_closed_pipe_ends_a_scan_quietly(folder: Path, kind: str) -> None:
    command = f"{sys.executable} -m shorttail views scan stats --store store --limit 40 --format {kind}"
    assert process(folder, f"{command} | true").stderr == ""
    if kind != "parquet":
        done = process(folder, f"{command} | head -n 1")
        assert (done.stderr, len(done.stdout.splitlines())) == ("", 1)


def test_parquet_goes_through_a_pipe(folder: Path) -> None:
    command = [sys.executable, "-m", "shorttail", "views", "scan", "stats", "--store", "store", "--format", "parquet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=True)
    assert pyarrow.parquet.read_table(pa.BufferReader(done.stdout)).num_rows == N


def on_a_terminal(folder: Path, columns: int, *arguments: str) -> str:
    """Return what the command writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "shorttail", *arguments, "--store", "store"]
    running = subprocess.Popen(command, cwd=folder, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    found = b""
    try:
        while part := os.read(ours, 1 << 16):
            found += part
    except OSError:  # the other end is closed
        pass
    assert running.wait(60) == 0, found
    os.close(ours)
    return found.decode().replace("\r\n", "\n")


def test_tables_wider_than_the_terminal_become_records(folder: Path) -> None:
    wide = on_a_terminal(folder, 300, "views", "scan", "stats", "--limit", "2").splitlines()
    assert (len(wide), wide[0].split()) == (3, COLUMNS)
    narrow = on_a_terminal(folder, 60, "views", "scan", "stats", "--limit", "2").splitlines()
    assert [line.split(" ")[0] for line in narrow] == [*COLUMNS, "", *COLUMNS]
    assert narrow[0].startswith("user_id     ")
    refused = process(folder, f"script -qec '{sys.executable} -m shorttail views scan stats --store store "
                              "--format parquet' /dev/null")  # fmt: skip
    assert "Parquet is binary" in refused.stdout or refused.returncode == 127


# -- search ------------------------------------------------------------------------------------------------------------


def test_search(folder: Path) -> None:
    def found(word: str) -> list[tuple[str, str, list[str]]]:
        return [(i["kind"], i["name"], i["matched"]) for i in ok(folder, "search", word, "--json").json]

    assert found("gold") == [("model", "delay", ["tags"]), ("feature", "stats:tier", ["description"])]
    assert found("STATS") == [("view", "stats", ["name"])], "the features of a view do not bear its name"
    assert found("user") == [("entity", "user", ["name"]), ("view", "stats", ["description"])]
    assert found("fraud") == [("view", "stats", ["owner"])]
    assert found("new") == [("feature", "stats:new", ["name"])]
    assert found("billing") == [("feature", "stats:tier", ["tags"])]
    assert found("core") == [("entity", "user", ["tags"]), ("feature", "stats:score", ["name"])][::-1]
    assert ok(folder, "search", "zebra").out == "nothing in store has 'zebra' in its name, tags, owner or description\n"
    lines = ok(folder, "search", "gold").out.splitlines()
    assert [line.split() for line in lines] == [
        ["kind", "name", "matched", "owner", "tags", "description"],
        ["model", "delay", "tags", "risk", "gold", "lateness"],
        ["feature", "stats:tier", "description", "billing", "gold", "or", "silver"],
    ]
