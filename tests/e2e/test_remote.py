"""Commands with --server print, write and exit as they do with --store."""

import os
import pty
import re
import subprocess
import sys

import commands
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from remote import Remote, finished, make_project

from shorttail.cli import cli
from shorttail.cli.caller import COMMANDS


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("remote") / "project")


@pytest.fixture(scope="module")
def remote(project):
    """A server of a copy of the project's store. The tests do the same to both."""
    server = Remote(project, project.parent)
    yield server
    server.wait_until_clean()
    assert server.server.stop() == 0
    assert (server.home / "log").read_text() == ""


# Words -> exit code. All of them run on both stores, in this order, because some change the stores.
SAME = {
    "apply definitions.py --by ci": 0,
    "apply changed.py --dry-run": 0,
    "apply changed.py --dry-run --json": 0,
    "apply changed.py --by ci": 0,
    "apply changed.py --max-clock-skew 30m --by ci --json": 0,
    "apply nothing.py": 1,
    "apply raises.py": 1,
    "apply compiles.py": 1,
    "apply lost.py": 1,
    "apply unlike.py": 1,
    "apply no_csv.py": 1,
    "apply dropped.py": 1,
    "apply definitions.py --vet-timeout never": 1,
    "apply --nonsense": 2,
    "apply": 2,
    "plan definitions.py": 0,
    "plan changed.py --explain": 0,
    "plan definitions.py --check": 3,
    "plan changed.py --json --prune --accept": 0,
    "plan lost.py": 1,
    "views rollback stats --by ci": 1,
    "models": 0,
    "models --json": 0,
    "models list": 0,
    "models nonsense": 2,
    "models show total": 0,
    "models show total --version 1 --json": 0,
    "models show totl": 1,
    "models deploy total newer.onnx --by ci --tag quick --metric auc=0.5 --run mlflow:3f --examples examples.csv": 1,
    "models deploy total newer.onnx --by ci --tag quick --metric auc=0.5 --run mlflow:3f --examples thrice.csv": 0,
    "models deploy total newer.onnx --json --by ci": 0,
    "models deploy total lost.onnx": 1,
    "models deploy total text.onnx": 1,
    "models deploy total total.onnx --examples lost.csv": 1,
    "models deploy totl total.onnx": 1,
    "models deploy total total.onnx --canary 0%": 2,
    "models promote total 1 --by ci": 0,
    "models promote total 9": 1,
    "models rollback total --by ci --json": 0,
    "models rollback totl": 1,
    "models canary total=10% --version 1 --by ci": 0,
    "models canary total=off --by ci --json": 0,
    "models canary total=200%": 2,
    "models shadow total --version 2 --by ci": 0,
    "models shadow total --off --by ci": 0,
    "models shadow total": 2,
    "views": 0,
    "views list --json": 0,
    "views show stats": 0,
    "views show stats --json": 0,
    "views show stat": 1,
    "views get stats user_id=1,2,9": 0,
    "views get stats user_id=x": 1,
    "views scan stats": 0,
    "views scan stats --where tier=gold --columns tier,age --json": 0,
    "views scan stats --format csv --where visits>=2": 0,
    "views scan stats --limit 0 --format csv": 0,
    "views scan stats --where agee=3": 1,
    "views scan stats --output nowhere/rows.csv": 1,
    "search words": 0,
    "search nothing --json": 0,
    "settings list": 0,
    "settings set max_clock_skew 45m --by ci": 0,
    "settings set max_clock_skew never": 1,
    "settings set nothing 1h": 2,
    "verify": 0,
    "verify --json": 0,
    "tune total --seconds 0 --dry-run": 0,
    "tune totl": 1,
    "stat": 0,
    "stat --json": 0,
    "history": 0,
    "history total --json": 0,
    "history totl": 1,
    "history --at 2099-01-01": 0,
    "history --at 1999-01-01": 1,
    "history --at noon": 2,
    "materialize --by ci": 0,
    "materialize stats --json --by ci": 0,
    "materialize stat": 1,
    "materialize stats --memory-mib 1": 2,
    "history --limit 2": 0,
}
MASKS = (
    (r"\d{4}-\d\d-\d\dT[\d:]+Z", "TIME"),
    (r'"(seconds|time_us|loop_rows_max|table|pid|commit|oldest_commit|file_bytes|free_bytes)": [\d.]+', r'"\1": N'),
    (r"in [\d.]+ s( \([\d,]+ rows/s\))?", "in N s"),
    (r"up to \d+ rows", "up to N rows"),
    (r"\bcommit:? \d+", "commit N"),
    (r"file: .*free;", "file: N free;"),
    (r"readers: .*", "readers: N"),
    (r"\btable \d+", "table N"),
    (r'_behind": (null|\d+)', '_behind": N'),
)


def masked(text, words):
    """The output without times and what follows from them, and without what the processes of a server do to a file."""
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    if words[0] == "tune" or words[:2] == ["models", "show"]:
        text = re.sub(r"\b[\d.]+\b", "N", text)  # what was measured, and the digits of the host's name
        text = re.sub(r" +", " ", text)
    if words[0] == "plan":  # its id depends on when each store was made
        text = re.sub(r'(plan |"plan": ")[0-9a-f]{8,}', r"\1ID", text)
    if words == ["stat", "--json"]:
        text = re.sub(r'"readers": \[.*?\]', '"readers": []', text, flags=re.DOTALL)
    return text


@pytest.mark.parametrize("line", SAME)
def test_a_server_prints_what_the_command_prints_here(line, project, remote):
    words = line.split()
    here = commands.run(*words, "--store", "store", folder=project)
    there = remote.run(*words)
    assert (there.code, masked(there.err, words)) == (here.code, masked(here.err, words))
    assert masked(there.out, words) == masked(here.out, words)
    assert here.code == SAME[line], here
    assert (here.err == "") == (here.code in (0, 3)), here
    assert remote.is_clean()


def test_every_command_is_compared():
    assert {line.split()[0] for line in SAME} == set(COMMANDS)
    groups = {name: cli.commands[name].commands for name in COMMANDS if hasattr(cli.commands[name], "commands")}
    compared = {" ".join(line.split()[:2]) for line in SAME}
    assert {f"{group} {name}" for group, subcommands in groups.items() for name in subcommands} <= compared


def test_the_commands_that_take_a_server_are_those_that_it_runs():
    """Of these, the server answers others by methods of their own."""
    own = {"predict", "features", "push", "delete"}

    def takes_server(command):
        return any("--server" in param.opts for param in command.params) or any(
            takes_server(each) for each in getattr(command, "commands", {}).values()
        )

    assert {name for name, command in cli.commands.items() if takes_server(command)} == own | set(COMMANDS)


def test_options_of_a_group_stand_before_its_subcommand(remote):
    words = remote.words()
    before = commands.run_well("models", *words, "show", "total", "--json", folder=remote.project)
    assert before.json["name"] == "total"
    assert "give either --store STORE or --server ADDR" in commands.error_of(
        "models", "list", "--store", "store", *words, code=2
    )
    assert "give either --store STORE or --server ADDR" in commands.error_of("history", code=2)


def test_a_token_may_come_from_a_pipe(remote):
    words = ["models", "--json", "--server", remote.address, "--token-file"]
    ours, theirs = os.pipe()
    os.write(theirs, (remote.tokens / "admin").read_bytes())
    os.close(theirs)
    try:
        assert commands.run_well(*words, f"/dev/fd/{ours}").json[0]["name"] == "total"
    finally:
        os.close(ours)


def test_a_file_of_output_is_written_here(remote, project, tmp_path):
    path = tmp_path / "rows.parquet"
    assert remote.run("views", "scan", "stats", "--output", str(path)).out == f"{path}: 3 rows\n"
    assert sorted(pq.read_table(path)["user_id"].to_pylist()) == [1, 2, 3]
    empty = tmp_path / "none.csv"
    assert remote.run("views", "scan", "stats", "--where", "visits>99", "--output", str(empty)).code == 0
    commands.run_well(
        "views", "scan", "stats", "--where", "visits>99", "--output", "none.csv", "--store", "store", folder=project
    )
    assert empty.read_bytes() == (project / "none.csv").read_bytes() != b""
    failed = remote.run("views", "scan", "stats", "--where", "nothing=1", "--output", str(tmp_path / "failed.csv"))
    assert failed.code == 1
    assert sorted(tmp_path.iterdir()) == [empty, path]


def test_bytes_on_stdout_are_those_that_the_server_wrote(remote, tmp_path):
    with (tmp_path / "rows.parquet").open("wb") as file:
        process = remote.popen("views", "scan", "stats", "--format", "parquet", stdout=file)
        assert finished(process) == (0, None, "")
    assert sorted(pq.read_table(tmp_path / "rows.parquet")["user_id"].to_pylist()) == [1, 2, 3]
    process = remote.popen("views", "get", "stats", "user_id=3", env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert "tin, old" in finished(process)[1]


def test_text_is_in_the_encoding_of_the_client(remote, project):
    words = [sys.executable, "-m", "shorttail", "search", "größe", *remote.words()]
    for encoding, said in (("utf-8", "'größe'".encode()), ("latin-1", "'größe'".encode("latin-1"))):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(words, capture_output=True, env=env, check=True)
        assert said in done.stdout
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    here = [*words[:-4], "--store", "store"]
    one, other = (
        subprocess.run(each, capture_output=True, env=ascii_only, check=True, cwd=project) for each in (words, here)
    )
    assert one.stdout == other.stdout


def test_the_history_has_the_login_and_the_label_of_the_token(remote):
    for words, token, who in (
        (["11m"], "admin", "anna (ci)"),
        (["12m"], "unlabelled", "anna"),
        (["13m", "--by", "nightly"], "admin", "nightly"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOGNAME", "anna")
            assert remote.run("settings", "set", "max_clock_skew", *words, token=token).code == 0
        [event] = commands.run_well("history", "--limit", "1", "--json", *remote.words(), folder=remote.project).json
        assert (event["action"], event["who"]) == ("set", who)


def on_terminal(command, cwd, columns):
    """Run a command whose stdout and stderr are a terminal of that width, and return its output."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", str(columns)], stdin=theirs, check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    output = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        output += data
    os.close(ours)
    assert process.wait() == 0, output
    return output.decode()


def test_a_terminal_shows_progress_and_records(remote, project):
    program = [sys.executable, "-m", "shorttail"]
    shown = on_terminal([*program, "verify", *remote.words()], project, 100)
    assert "verify:" in shown
    assert re.search(r"store: sound as of commit \d+", shown)
    words = [*program, "views", "get", "stats", "user_id=1"]
    there, here = (on_terminal([*words, *where], project, 30) for where in (remote.words(), ["--store", "store"]))
    assert there == here
    assert re.search(r"^user_id +1\r$", there, re.MULTILINE)


def test_much_output_comes_through_and_a_closed_pipe_ends_the_command(remote, project, tmp_path):
    n = 60_000
    rows = {"user_id": list(range(100, 100 + n)), "age": [1.0] * n, "visits": [7] * n, "tier": ["x" * 20] * n}
    times = pa.array([1_700_000_000_000_000] * n, pa.timestamp("us"))
    pq.write_table(pa.table(rows | {"at": times}), tmp_path / "many.parquet")
    words = ["push", "stats", str(tmp_path / "many.parquet"), "--server", remote.address]
    commands.run_well(*words, "--token-file", str(remote.tokens / "admin"))
    whole = remote.run("views", "scan", "stats", "--format", "csv", "--where", "visits=7", "--columns", "user_id")
    assert (whole.code, whole.err) == (0, "")
    assert sorted(map(int, whole.out.splitlines()[1:])) == rows["user_id"]
    process = remote.popen("views", "scan", "stats", "--format", "csv")
    assert process.stdout.readline().startswith('"user_id"')
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == ""
    process.stderr.close()
    remote.wait_until_clean()
    deleted = ["delete", "stats", "--file", str(tmp_path / "many.parquet"), "--server", remote.address]
    commands.run_well(*deleted, "--token-file", str(remote.tokens / "admin"))
