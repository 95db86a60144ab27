"""`shorttail views` and `search`, `engine.views` and `engine.models`: what they show, write and refuse."""

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
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from test_cli import write_model

import shorttail as st
from shorttail.errors import InvalidArgument, NotFound

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
import pyarrow.parquet  # noqa: E402

NOW = datetime.datetime.now(datetime.UTC)
EVIL = "<script>alert('x')</script>\x1b[31m&\n"
DEFINITIONS = """
import shorttail as st

user = st.Entity("user", keys={"user_id": st.Int64, "site": st.String}, description="a customer", tags=["core"])
stats = st.FeatureView(
    "stats", entity=user, owner="fraud-team", tags=["pii", "daily"], ttl="30d", description="what a user did",
    source=st.ParquetSource("users.parquet", timestamp="updated_at"),
    features=[
        st.Feature("age", st.Int32, default=30),
        st.Feature("tier", st.String, description="gold or silver", tags=["billing"]),
        st.Feature("score", st.Float32),
        st.Feature("taste", st.Vector(2)),
        st.Feature("new", st.Bool),
        st.Feature("since", st.Timestamp, column="Since"),
    ],
)
empty = st.FeatureView("empty", entity=st.Entity("item", keys={"id": st.Int64}), features=[st.Feature("x", st.Float64)])
delay = st.Model("delay", path="delay.onnx", inputs=["stats:age", "stats:score", "request:hour"], owner="risk",
                 tags=["gold"], description="lateness")
"""
N = 40
COLUMNS = ["user_id", "site", "age", "tier", "score", "taste", "new", "since", "updated_at"]


def table() -> Any:
    def at(i: int) -> datetime.datetime:
        return datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=i, microseconds=i)

    return pa.table(
        {
            "user_id": list(range(N)),
            "site": ["a", "b,c", ""] * (N // 3) + ["é"],
            "age": pa.array([None if i % 7 == 0 else i for i in range(N)], pa.int32()),
            "tier": [["gold", "silver", "", None, EVIL][i % 5] for i in range(N)],
            "score": np.where(np.arange(N) % 6 == 5, np.nan, np.arange(N) / 10).astype(np.float32),
            "taste": [None if i == 3 else [float(i), None if i == 4 else 0.1] for i in range(N)],
            "new": [i % 2 == 0 for i in range(N)],
            "Since": pa.array([at(i) for i in range(N)], pa.timestamp("us", "UTC")),
            "updated_at": pa.array([NOW - datetime.timedelta(days=i) for i in range(N)], pa.timestamp("us", "UTC")),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of two views and a model. Its tests only read the store."""
    made = tmp_path_factory.mktemp("views")
    (made / "definitions.py").write_text(DEFINITIONS)
    write_model(made / "delay.onnx", bias=0.0)
    pyarrow.parquet.write_table(table(), made / "users.parquet")
    commands.run_well("apply", "definitions.py", "--store", "store", "--create", folder=made)
    commands.run_well("materialize", "--store", "store", folder=made)
    return made


def ok(folder: Path, *arguments: str) -> commands.Result:
    return commands.run_well(*arguments, "--store", "store", folder=folder)


def fails(folder: Path, *arguments: str, code: int = 1) -> str:
    return commands.error_of(*arguments, "--store", "store", code=code, folder=folder)


def expected(*, columns: list[str] | None = None, holds: Any = lambda row: True) -> list[dict[str, Any]]:
    """Return the rows that were loaded, as the store holds them, sorted by user_id."""
    rows = table().rename_columns(["since" if name == "Since" else name for name in table().column_names]).to_pylist()
    for row in rows:
        row["score"] = None if row["score"] is None or np.isnan(row["score"]) else row["score"]
        if row["taste"] is not None:
            row["taste"] = [None if x is None else float(np.float32(x)) for x in row["taste"]]
    return [{name: row[name] for name in columns or COLUMNS} for row in rows if holds(row)]


def by_key(rows: Any) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["user_id"])


def nan_is_none(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and np.isnan(value) else value

    return [{name: plain(value) for name, value in row.items()} for row in rows]


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


# -- engine.views and engine.models ------------------------------------------------------------------------------------


def test_mappings_of_an_engine(folder: Path) -> None:
    with st.Engine.open(folder / "store") as engine:
        assert (list(engine.views), len(engine.views), "stats" in engine.views) == (["stats", "empty"], 2, True)
        assert (list(engine.models), len(engine.models), "stats" in engine.models) == (["delay"], 1, False)
        assert engine.views.get("statz") is None
        for mapping, name in ((engine.views, "statz"), (engine.models, "dellay")):
            for kind in (NotFound, KeyError):
                with pytest.raises(kind, match=r"did you mean '(stats|delay)'") as raised:
                    mapping[name]  # type: ignore[index]
                assert str(raised.value).startswith("no ")
        assert [view["name"] for view in engine.views()] == ["stats", "empty"]
        assert engine.views()[0]["keys"] == {"user_id": "Int64", "site": "String"}
        assert [model["name"] for model in engine.models()] == ["delay"]
        assert repr(engine.views["stats"]) == "StoredView('stats')"
        assert engine.views["stats"].definition.tags == ("pii", "daily")
        assert repr(engine.views) == "StoredViews(['stats', 'empty'])"
        engine.push("empty", {"id": [7], "x": [1.5]})
        try:
            assert engine.views["empty"].to_pandas()["x"].tolist() == [1.5]
        finally:
            engine.delete("empty", {"id": [7]})


def test_rows_as_arrow_and_pandas(folder: Path) -> None:
    with st.Engine.open(folder / "store") as engine:
        stats = engine.views["stats"]
        assert by_key(nan_is_none(stats.to_arrow().to_pylist())) == expected()
        stats.to_arrow().validate(full=True)
        gold = stats.to_arrow(where=["tier=gold", "score<1"])
        gold.validate(full=True)
        assert by_key(nan_is_none(gold.to_pylist())) == expected(
            holds=lambda row: row["tier"] == "gold" and row["score"] is not None and row["score"] < 1
        )
        assert (stats.to_arrow(limit=3).num_rows, stats.to_arrow(limit=0).num_rows) == (3, 0)
        assert stats.to_arrow(columns=["tier", "since"], limit=1).column_names == ["tier", "since"]
        frame = stats.to_pandas(where="tier=gold").sort_values("user_id")
        assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
            "user_id": "Int64", "site": "string", "age": "Int32", "tier": "string", "score": "float32",
            "taste": "object", "new": "boolean", "since": "datetime64[us, UTC]", "updated_at": "datetime64[us, UTC]",
        }  # fmt: skip
        wanted = expected(holds=lambda row: row["tier"] == "gold")
        assert frame["age"].isna().tolist() == [row["age"] is None for row in wanted]
        assert frame["since"].tolist() == [row["since"] for row in wanted]
        assert len(stats.to_pandas(limit=20)) == 20
        assert stats.to_pandas(limit=0).dtypes.equals(stats.to_pandas().dtypes)
        whole = stats.to_pandas().sort_values("user_id")
        assert whole["score"].isna().tolist() == [row["score"] is None for row in expected()]
        assert whole["taste"].isna().tolist() == [row["taste"] is None for row in expected()]
        with stats.rows(where="new=true") as rows:
            assert sum(len(batch) for batch in rows) == N // 2
        with pytest.raises(InvalidArgument, match="column 'age' takes Int32"):
            stats.to_arrow(where="age=x")
        assert engine.views["empty"].to_arrow().schema.names == ["id", "x", "event_time"]
        got = stats.get({"user_id": [3, 99], "site": "a"})
        assert [item["status"] for item in got] == ["PRESENT", "NOT_FOUND"]
        assert got[0]["row"]["since"] == 1_577_847_600_000_003
        assert [(item["kind"], item["name"]) for item in engine.search("billing")] == [("feature", "stats:tier")]


def test_names_and_times_at_the_edges(tmp_path: Path) -> None:
    """Columns that bear the names of others, and times of years that Arrow's CSV cannot write."""
    names = ["status", "event_time", "event_time_", "a=b", "x.y", 'q"c']
    features = [*(st.Feature(name, st.Int64) for name in names), st.Feature("at", st.Timestamp)]
    view = st.FeatureView("v", entity=st.Entity("e", keys={"id": st.Int64}), features=features)
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view])
        rows = {"id": [1, 2], **{name: [i, None] for i, name in enumerate(names)}, "at": [2**62, -(2**60)]}
        engine.push("v", rows)
        found = engine.views["v"].get({"id": 1})
    row = found[0]["row"]
    assert list(row) == ["id", *names, "at", "event_time__"]
    assert [row[name] for name in names] == list(range(6))
    scan = ["views", "scan", "v", "--where", "a=b=3"]
    (line,) = ok(tmp_path, *scan, "--json").json
    assert (line["a=b"], line["at"]) == (3, "148108-07-06T14:00:27.387904Z")
    out = ok(tmp_path, *scan, "--format", "csv", "--columns", 'at,"q""c",x.y').out
    assert out == '"at","q""c","x.y"\n"148108-07-06T14:00:27.387904Z",5,4\n'
    ok(tmp_path, *scan, "--output", str(tmp_path / "v.parquet"))
    assert pyarrow.parquet.read_table(tmp_path / "v.parquet").column_names[1:7] == names
    (got,) = ok(tmp_path, "views", "get", "v", "id=2", "--json").json
    assert (got["status"], got["row"]["status"]) == ("PRESENT", None)


class Checked(HTMLParser):
    """Collects the tags and the text of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_cards_escape_all_that_they_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m.onnx", bias=0.0)
    text = "<b>&\"' \x1b[31m"
    item = st.Entity("<i>&", keys={"<id>": st.Int64}, description=text, tags=["<u>"])
    feature = st.Feature("<s>", st.String, default="<img>", description=text)
    others = [st.Feature(name, st.Float32) for name in ("a", "b")]
    view = st.FeatureView("v", entity=item, features=[feature, *others], description=text, owner=text, tags=["<em>"])
    inputs = ["v:a", "v:b", "request:<q>"]
    model = st.Model("m", str(tmp_path / "m.onnx"), inputs, description=text, owner=text, tags=["<em>"])
    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([item, view, model])
        engine.push("v", {"<id>": [1], "<s>": [EVIL], "a": [0.5], "b": [1.0]})
        cards = [engine.views["v"], engine.views, engine.models["m"], engine.models]
        for card in cards:
            html = card._repr_html_()
            found = Checked(html)
            assert found.tags == {"table", "thead", "tbody", "tr", "th", "td"}, html
            assert "\x1b" not in html
            assert "<em>" in found.text
        shown = Checked(engine.views["v"]._repr_html_()).text
        for part in ("<script>alert('x')</script>", "<img>", "<i>&", "<u>", "<id> Int64"):
            assert part in shown
        engine.views["v"].show()
        engine.models["m"].show()
        printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "view:        v\n" in printed
    assert "model:       m version 1\n" in printed
    assert "tags:        <em>" in printed


# -- tags --------------------------------------------------------------------------------------------------------------


def test_tags_are_documentation(tmp_path: Path) -> None:
    def views(tags: list[str]) -> list[Any]:
        item = st.Entity("item", keys={"id": st.Int64}, tags=tags)
        return [item, st.FeatureView("v", entity=item, features=[st.Feature("x", st.Float64, tags=tags)], tags=tags)]

    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply(views([]))
        engine.push("v", {"id": [1], "x": [2.0]})
        assert [c.kind for c in engine.apply(views([]))] == ["=", "="]
        changes = engine.apply(views(["a", "b c"]))
        shown = engine.store.catalog.definition("v").rows_id[:4]
        assert [(c.kind, c.detail) for c in changes] == [("~", "id Int64"), ("~", f"{shown}  tags")]
        found = engine.views["v"].describe()
        assert (found["tags"], found["entity"]["tags"], found["features"][0]["tags"]) == (["a", "b c"],) * 3
        assert found["rows"] == 1, "tags do not touch rows"


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("pii", "tags must be a list of names, not 'pii'"),
        (7, "tags must be a list of names, not 7"),
        ([7], "tag 7: a name is a string"),
        ([""], "tag '': a name has at least one character"),
        (["a", "a"], "a tag is given twice: a, a"),
        (["a\nb"], "a name has printable characters only"),
    ],
)
def test_wrong_tags(tags: Any, message: str) -> None:
    item = st.Entity("item", keys={"id": st.Int64})
    feature = st.Feature("x", st.Float64)
    makers: list[Any] = [
        lambda: st.Entity("item", keys={"id": st.Int64}, tags=tags),
        lambda: st.Feature("x", st.Float64, tags=tags),
        lambda: st.FeatureView("v", entity=item, features=[feature], tags=tags),
        lambda: st.Model("m", "m.onnx", ["v:x"], tags=tags),
    ]
    for make, what in zip(makers, ["entity 'item'", "feature 'x'", "feature view 'v'", "model 'm'"], strict=True):
        with pytest.raises(InvalidArgument) as raised:
            make()
        assert message in str(raised.value)
        assert str(raised.value).startswith(what)


def test_a_catalog_without_tags_is_read() -> None:
    from shorttail.define.catalog import Catalog

    item = st.Entity("item", keys={"id": st.Int64}, tags=["a"])
    view = st.FeatureView("v", entity=item, features=[st.Feature("x", st.Float64, tags=["b"])], tags=["c"])
    catalog = Catalog()
    catalog.add(view)

    def without_tags(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_tags(part) for name, part in value.items() if name != "tags"}
        return [without_tags(part) for part in value] if isinstance(value, list) else value

    read = Catalog.from_json(json.dumps(without_tags(json.loads(catalog.to_json()))).encode())
    assert (read.entities["item"].tags, read.views["v"].tags, read.views["v"].features[0].tags) == ((), (), ())
    assert Catalog.from_json(catalog.to_json()) == catalog


def test_models_show_and_deploy_tags(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "store", tmp_path / "store")
    assert (
        "tags:        gold\n" in commands.run_well("models", "show", "delay", "--store", "store", folder=tmp_path).out
    )
    for bias, tags, shown in ((1.0, [], ["gold"]), (2.0, ["--tag", "x", "--tag", "y"], ["x", "y"])):
        write_model(tmp_path / "delay.onnx", bias)
        deploy = ["models", "deploy", "delay", "delay.onnx", "--store", "store", *tags]
        commands.run_well(*deploy, folder=tmp_path)
        listed = commands.run_well("models", "list", "--store", "store", "--json", folder=tmp_path).json
        assert listed[0]["tags"] == shown
