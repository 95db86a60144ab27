"""The command as a user runs it: its output word for word, its errors in one line, its exit codes."""

from __future__ import annotations

import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest

from shorttail.define.text import parse_columns

pa = pytest.importorskip("pyarrow")
onnx = pytest.importorskip("onnx")
import pyarrow.parquet  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

DEFINITIONS = """
import shorttail as st

plane = st.Entity("plane", keys={"tailnum": st.String})
route = st.Entity("route", keys={"origin": st.String, "dest_id": st.Int64})
planes = st.FeatureView(
    "plane", entity=plane, source=st.ParquetSource("planes.parquet", timestamp="at"),
    features=[
        st.Feature("year", st.Int32),
        st.Feature("seats", st.Float32, default=100.0),
        st.Feature("maker", st.String),
    ],
)
routes = st.FeatureView("route", entity=route, features=[st.Feature("late", st.Float32)])
delay = st.Model("delay", path="delay.onnx", inputs=["plane:year", "plane:seats", "request:hour"])
"""


@dataclass
class Project:
    """A folder with definitions, a model and rows, in which commands are run."""

    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "shorttail", *arguments]

    def process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own: what no test of its output needs."""
        return subprocess.run(self.command(*arguments), cwd=self.folder, capture_output=True, text=True, timeout=60)

    def run(self, *arguments: str) -> commands.Result:
        return commands.run(*arguments, folder=self.folder)

    def ok(self, *arguments: str) -> commands.Result:
        return commands.run_well(*arguments, folder=self.folder)

    def fails(self, *arguments: str, code: int = 1) -> str:
        return commands.error_of(*arguments, code=code, folder=self.folder)


def write_model(path: Path, bias: float) -> None:
    """Save a model: score = the sum of three columns + bias."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["sum"]), helper.make_node("Add", ["sum", "bias"], ["score"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 1])],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
            numpy_helper.from_array(np.array([bias], np.float32), "bias"),
        ],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def write_project(folder: Path) -> Project:
    (folder / "definitions.py").write_text(DEFINITIONS)
    write_model(folder / "delay.onnx", bias=0.0)
    planes = {
        "tailnum": ["N1", "N2", "123"],
        "year": [2001, None, 1999],
        "seats": [50.0, 60.0, 70.0],
        "maker": ["BOEING", "AIRBUS", None],
        "at": pa.array([1, 1, 1], pa.timestamp("us")),
    }
    pyarrow.parquet.write_table(pa.table(planes), folder / "planes.parquet")
    return Project(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with an applied and materialized store; its tests only read."""
    project = write_project(tmp_path_factory.mktemp("project"))
    project.ok("apply", "definitions.py", "--store", "store", "--create")
    project.ok("materialize", "--store", "store")
    return project


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return write_project(tmp_path)


COMMANDS = ["apply", "materialize", "load", "push", "delete", "models", "serve", "predict", "features", "stat"]
COMMANDS += ["verify", "backup", "migrate", "init"]
COMMANDS += ["models list", "models deploy", "models promote", "models rollback", "search", "history"]
COMMANDS += ["views", "views list", "views show", "views get", "views scan"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, tmp_path: Path) -> None:
    out = Project(tmp_path).ok(*command.split(), "--help").out
    assert f"Example:\n    shorttail {command}" in out


def test_help_imports_nothing_heavy() -> None:
    heavy = ("onnxruntime", "pyarrow", "numba", "pandas", "lmdb", "tqdm")
    program = f"import sys, shorttail.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_command_shows_help(tmp_path: Path) -> None:
    result = Project(tmp_path).run()
    assert "Commands:" in result.out
    assert result.code == 2


def test_the_command_says_its_version(tmp_path: Path) -> None:
    assert Project(tmp_path).ok("--version").out.startswith("shorttail, version ")


def test_a_process_of_its_own_prints_and_exits_the_same(loaded: Project) -> None:
    for arguments in (
        ["--version"],
        ["features", "plane:maker", "tailnum=N1", "--store", "store"],
        ["features", "plane:maker", "tail=N1", "--store", "store"],
        ["features", "--store"],
    ):
        alone, here = loaded.process(*arguments), loaded.run(*arguments)
        assert (alone.returncode, alone.stdout, alone.stderr) == (here.code, here.out, here.err), arguments


def test_apply_reports_changes(fresh: Project) -> None:
    expected = [
        "+ entity plane  tailnum String",
        "+ entity route  origin String, dest_id Int64",
        "+ view plane    tailnum -> 3 features",
        "+ view route    origin, dest_id -> 1 feature",
        "+ model delay   version 1: 3 columns -> score",
    ]
    dry = fresh.ok("apply", "definitions.py", "--store", "store", "--create", "--dry-run").out
    assert dry.splitlines() == [*expected, "5 changes; dry run, nothing written"]
    assert not (fresh.folder / "store").exists()

    assert fresh.ok("apply", "definitions.py", "--store", "store", "--create").out.splitlines() == [
        *expected,
        "store: 5 changes",
    ]
    again = fresh.ok("apply", "definitions.py", "--store", "store", "--create", "--json").json
    assert {change["change"] for change in again["changes"]} == {"="}


def test_wrong_definitions_create_no_store(fresh: Project) -> None:
    (fresh.folder / "definitions.py").write_text(DEFINITIONS.replace('"plane:year", ', ""))
    message = fresh.fails("apply", "definitions.py", "--store", "store", "--create")
    assert message == (
        "error: model 'delay': delay.onnx takes 3 columns (input 'x'), but inputs= lists 2;"
        " first: plane:seats, request:hour\n"
    )
    assert not (fresh.folder / "store").exists()


def test_materialize_reports_rows_and_rate(fresh: Project) -> None:
    fresh.ok("apply", "definitions.py", "--store", "store", "--create")
    assert re.fullmatch(
        r"plane: 3 rows in \d+\.\d\d s \([\d,]+ rows/s\); given 3, loaded 3, older 0, duplicate 0\n",
        fresh.ok("materialize", "--store", "store").out,
    )
    planes = pyarrow.parquet.read_table(fresh.folder / "planes.parquet")
    later = planes.set_column(planes.column_names.index("at"), "at", pa.array([2, 1, 1], pa.timestamp("us")))
    pyarrow.parquet.write_table(pa.concat_tables([later.slice(0, 1), planes, planes]), fresh.folder / "planes.parquet")
    assert fresh.ok("materialize", "--store", "store").out.endswith("; given 7, loaded 3, older 2, duplicate 2\n")
    (entry,) = fresh.ok("materialize", "plane", "--store", "store", "--json").json
    assert entry.pop("seconds") > 0
    assert entry == {"view": "plane", "rows": 3, "given": 7, "loaded": 3, "older": 2, "duplicate": 2}
    assert "'route' has no source" in fresh.fails("materialize", "route", "--store", "store")
    assert "no feature view 'plain'; did you mean 'plane'" in fresh.fails("materialize", "plain", "--store", "store")
    (fresh.folder / "planes.parquet").unlink()
    assert "there is no file" in fresh.fails("materialize", "--store", "store")


def test_materialize_refuses_to_lose_rows_unless_told(fresh: Project) -> None:
    fresh.ok("apply", "definitions.py", "--store", "store", "--create")
    fresh.ok("materialize", "--store", "store")
    planes = pyarrow.parquet.read_table(fresh.folder / "planes.parquet")
    pyarrow.parquet.write_table(planes.slice(0, 0), fresh.folder / "planes.parquet")
    assert fresh.fails("materialize", "--store", "store") == (
        "error: view 'plane': the load has 0 rows, and 3 are served; nothing was changed; if so few are right, give"
        " allow_shrink=True (--allow-shrink)\n"
    )
    assert fresh.ok("stat", "--store", "store", "--json").json["views"][0]["rows"] == 3
    out = fresh.ok("materialize", "--store", "store", "--allow-shrink").out
    assert out.endswith("; given 0, loaded 0, older 0, duplicate 0\n")


def test_load_replaces_the_rows_of_a_view_by_files(fresh: Project) -> None:
    fresh.ok("apply", "definitions.py", "--store", "store", "--create")
    (fresh.folder / "days").mkdir()
    for day in (1, 2, 3):
        rows = f"origin,dest_id,late,event_time\nEWR,7,{day}.5,{day}\nJFK,{day},,1\n"
        (fresh.folder / "days" / f"{day}.csv").write_text(rows)
    said = fresh.ok("load", "route", "days/[12].csv", "days/3.csv", "--store", "store").out
    assert re.fullmatch(r"route: 4 rows in .* s \(.* rows/s\); given 6, loaded 4, older 2, duplicate 0\n", said)
    found = fresh.ok("features", "route:late", "origin=EWR", "dest_id=7", "--store", "store", "--json").json
    assert found["features"] == {"route:late": [3.5]}
    said = fresh.ok("load", "route", "days/1.csv", "--store", "store", "--json").json
    assert said.pop("seconds") > 0
    assert said == {"view": "route", "rows": 2, "given": 2, "loaded": 2, "older": 0, "duplicate": 0}
    (fresh.folder / "days" / "1.csv").write_text("origin,dest_id,late\n")
    assert "the load has 0 rows, and 2 are served" in fresh.fails("load", "route", "days/1.csv", "--store", "store")
    assert fresh.ok("load", "route", "days/1.csv", "--store", "store", "--allow-shrink").out.startswith("route: 0 rows")
    assert "no file matches days/*.parquet" in fresh.fails("load", "route", "days/*.parquet", "--store", "store")


def test_a_plan_is_shown_and_carried_out(fresh: Project) -> None:
    where = ("definitions.py", "--store", "store")
    assert "there is no store at store; look at --store, or give --create to make one" in fresh.fails("apply", *where)
    assert "no store at 'store'" in fresh.fails("plan", *where)
    (fresh.folder / "store").mkdir()
    fresh.ok("apply", *where)  # an empty folder is meant to become a store
    fresh.ok("materialize", "--store", "store")
    assert (
        fresh.ok("plan", *where, "--check")
        .out.splitlines()[-1]
        .endswith(": 0 new tables, 0 in place, 0 destroyed, 0 errors")
    )
    narrower = DEFINITIONS.replace('st.Feature("year", st.Int32)', 'st.Feature("year", st.Bool)')
    (fresh.folder / "definitions.py").write_text(narrower)
    wrong = fresh.run("plan", *where)
    assert (wrong.code, wrong.err) == (1, "")
    message = "feature 'year' is Int32, and its values may not fit Bool"
    assert any(line.startswith("! view plane") and message in line for line in wrong.out.splitlines())
    assert message in fresh.fails("apply", *where)
    wider = DEFINITIONS.replace('st.Feature("year", st.Int32)', 'st.Feature("year", st.Int64)')
    (fresh.folder / "definitions.py").write_text(wider)
    found = fresh.run("plan", *where, "--check", "--explain")
    assert found.code == 3
    shown = found.out.splitlines()
    at = next(i for i, line in enumerate(shown) if line.startswith("~ view plane"))
    assert shown[at].endswith("rows change: widened year Int32 -> Int64")
    assert "    3 rows to write, about 1 s, " in shown[at + 1]
    assert shown[at + 3 : at + 5] == [
        "    widened year Int32 -> Int64: changes rows and answers",
        "    model delay v1 moves: compatible",
    ]
    plan_id = shown[-1].split()[3].rstrip("`")
    assert shown[-2].startswith(f"plan {plan_id}: 1 new table, 0 in place")
    assert "plan 00000000 is not what would be done now" in fresh.fails("apply", *where, "--plan", "00000000")
    assert fresh.ok("apply", *where, "--plan", plan_id, "--wait").out.splitlines()[-1] == "store: 1 change"
    assert fresh.run("plan", *where, "--check").code == 0
    document = fresh.ok("plan", *where, "--json").json
    assert {change["change"] for change in document["changes"]} == {"="}
    assert document["errors"] == []


def test_push_writes_rows_of_a_file(fresh: Project) -> None:
    fresh.ok("apply", "definitions.py", "--store", "store", "--create")
    (fresh.folder / "routes.csv").write_text("origin,dest_id,late\nEWR,7,1.5\nJFK,8,\n")
    assert fresh.ok("push", "route", "routes.csv", "--store", "store").out.startswith("route: 2 rows in ")
    found = fresh.ok("features", "route:late", "origin=EWR,JFK", "dest_id=7,8", "--store", "store", "--json").json
    assert found == {"features": {"route:late": [1.5, None]}, "statuses": {"route:late": ["PRESENT", "NULL"]}}
    assert "there is no file" in fresh.fails("push", "route", "gone.csv", "--store", "store")


def test_predict_prints_a_table(loaded: Project) -> None:
    out = loaded.ok("predict", "delay", "tailnum=N1,123,ZZ", "hour=5", "--store", "store").out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["delay", "version", "1"]
    assert lines[1][:3] == ["tailnum", "hour", "score"]
    assert lines[2] == ["N1", "5", "2056"]
    assert lines[3][0] == "123", "a key of digits is text where its type is String"
    assert lines[4][-2:] == ["plane", "NOT_FOUND"]
    answer = loaded.ok("predict", "delay", "tailnum=N1,123", "hour=5,6", "--store", "store", "--json").json
    assert answer["outputs"]["score"] == [[2056.0], [2075.0]]
    assert answer["version"] == 1


def test_features_prints_a_table(loaded: Project) -> None:
    out = loaded.ok("features", "plane:maker", "plane:seats", "tailnum=N1,123,ZZ", "--store", "store").out
    assert [line.split() for line in out.splitlines()] == [
        ["tailnum", "plane:maker", "plane:seats", "status"],
        ["N1", "BOEING", "50"],
        ["123", "-", "70", "plane:maker", "NULL"],
        ["ZZ", "-", "100", "plane", "NOT_FOUND"],
    ]


def test_stat_as_json_lists_the_views(loaded: Project) -> None:
    views = loaded.ok("stat", "--store", "store", "--json").json["views"]
    assert [(view["view"], view["keys"], view["features"], view["rows"]) for view in views] == [
        ("plane", ["tailnum"], 3, 3),
        ("route", ["origin", "dest_id"], 1, 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", "gone.py", "--store", "store"], "gone.py: there is no such definitions file"),
        (["predict", "delays", "tailnum=N1", "--store", "store"], "no model 'delays'; did you mean 'delay'"),
        (["predict", "delay", "tail=N1", "--store", "store"], "no column 'tail'; columns: tailnum String"),
        (["predict", "delay", "tailnum", "--store", "store"], "'tailnum' is not column=value"),
        (["predict", "delay", "tailnum=N1", "hour=five", "--store", "store"], "takes Float64; got 'five' (text)"),
        (["predict", "delay", "tailnum=N1", "--store", "store"], "hour"),
        (["predict", "delay", "tailnum=N1", "hour=1", "--store", "nowhere"], "nowhere"),
        (["predict", "delay", "tailnum=N1", "hour=1", "--server", "unix:nowhere.sock"], "nowhere.sock"),
        (["predict", "delay", "tailnum=N1", "hour=1", "--version", "7", "--store", "store"], "has no version 7"),
        (["features", "plane:yeah", "tailnum=N1", "--store", "store"], "has no feature 'yeah'; did you mean 'year'"),
        (["features", "plane:year", "--store", "store"], "tailnum"),
        (["features", "plane:year", "tailnum=N1", "tailnum=N2", "--store", "store"], "'tailnum' is given twice"),
        (["models", "rollback", "delay", "--store", "store"], "has no earlier version"),
        (["push", "nothing", "planes.parquet", "--store", "store"], "no feature view 'nothing'"),
        (["stat", "--store", "planes.parquet"], "planes.parquet"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(loaded: Project, arguments: list[str], message: str) -> None:
    assert message in loaded.fails(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "delay", "tailnum=N1"],
            "give either --store STORE or --server ADDR (see `shorttail predict --help`)",
        ),
        (["backup", "copy"], "Missing option '--store'"),
        (["stat"], "give either --store STORE or --server ADDR (see `shorttail stat --help`)"),
        (["models", "list"], "give either --store STORE or --server ADDR (see `shorttail models list --help`)"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(loaded: Project, arguments: list[str], message: str) -> None:
    assert message in loaded.fails(*arguments, code=2)


@pytest.mark.parametrize(
    ("argument", "dtype", "value"),
    [
        ("c=123", "String", "123"),
        ("c=123", "Int64", 123),
        ("c=1,2", "Int32", [1, 2]),
        ("c=1,,2", "Float32", [1.0, None, 2.0]),
        ("c=", "String", None),
        ("c=,a", "String", [None, "a"]),
        ('c=""', "String", ""),
        ('c="Doe, J",b', "String", ["Doe, J", "b"]),
        ("c=a=b", "String", "a=b"),
        ("c=true,0", "Bool", [True, False]),
        ("c=1970-01-02", "Timestamp", 86_400_000_000),
        ("c=1970-01-02T00:00:01.5+01:00", "Timestamp", 82_801_500_000),
        ("c=-5", "Timestamp", -5),
        ("c=1,2", "Vector(2)", [(1.0, 2.0)]),
        ("c=1,2;3,4", "Vector(2)", [(1.0, 2.0), (3.0, 4.0)]),
        ("c=1,2;;3,4", "Vector(2)", [(1.0, 2.0), None, (3.0, 4.0)]),
    ],
)
def test_values_are_parsed_by_type(argument: str, dtype: str, value: Any) -> None:
    assert parse_columns([argument], {"c": dtype}, "x") == {"c": value}


def test_versions_of_a_model(fresh: Project) -> None:
    fresh.ok("apply", "definitions.py", "--store", "store", "--create")
    write_model(fresh.folder / "new.onnx", bias=1000.0)
    out = fresh.ok("models", "deploy", "delay", "new.onnx", "--store", "store").out
    assert out == "delay version 2: version 2 serves\n"
    listed = fresh.ok("models", "--store", "store").out.splitlines()
    assert [line.split()[:2] for line in listed] == [["model", "version"], ["delay", "2*"], ["delay", "1"]]
    asked = ["predict", "delay", "tailnum=ZZ", "hour=1", "--store", "store", "--json"]
    assert fresh.ok(*asked).json["version"] == 2
    assert fresh.ok("models", "--store", "store", "rollback", "delay").out == "delay version 1: serves again\n"
    assert fresh.ok(*asked).json["version"] == 1
    assert fresh.ok(*asked, "--version", "2").json["version"] == 2
    promoted = fresh.ok("models", "promote", "delay", "2", "--store", "store", "--json").json
    assert promoted == {"name": "delay", "version": 2, "serving": 2}


@pytest.fixture
def server(loaded: Project) -> Iterator[str]:
    """The address of a server of that store."""
    command = loaded.command("serve", "--store", "store", "--port", "0", "--no-http", "--uds", "s")
    with subprocess.Popen(command, cwd=loaded.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            announced, _, _ = select.select([process.stdout], [], [], 60)
            assert announced, "the server did not start"
            assert process.stdout.readline().startswith(b"serving on ")
            yield f"unix:{loaded.folder / 's'}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def test_a_server_and_a_store_give_the_same_output(loaded: Project, server: str) -> None:
    for question in (
        ["predict", "delay", "tailnum=N1,123,ZZ", "hour=5"],
        ["features", "plane:maker", "plane:seats", "tailnum=N1,123,ZZ"],
    ):
        for options in ([], ["--json"]):
            by_store = loaded.ok(*question, "--store", "store", *options).out
            assert loaded.ok(*question, "--server", server, *options).out == by_store
