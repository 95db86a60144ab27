"""What commands with --server may not do, and what becomes of them when a client or a process of the server dies."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import commands
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from remote import TOKENS, Remote, finished, make_project
from serving import alive, environment_with, hang_up, replaced, until

from shorttail.config import COMMANDS_VERSION, LIMITS

SILENCE_S = 5.0
LONG = ("tune", "total", "--seconds", "600", "--dry-run")  # it runs until it is ended
ID = "0" * 32
BEGIN = {"id": ID, "token": TOKENS["admin"], "login": "me", "version": COMMANDS_VERSION}
REQUEST = {
    "words": ["views", "--server", "x"],
    "folder": "/",
    "files": [],
    "encoding": "utf-8",
    "columns": None,
    "progress_columns": None,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("remote") / "project")


@pytest.fixture(scope="module")
def remote(project, tmp_path_factory):
    """A server that soon ends commands whose clients are gone. The tests change nothing in its store."""
    limits = environment_with(tmp_path_factory.mktemp("site"), command_silence_s=SILENCE_S)
    server = Remote(project, project.parent, env=limits)
    yield server
    server.wait_until_clean()
    assert server.server.stop() == 0
    assert (server.home / "log").read_text() == ""


@pytest.fixture(autouse=True)
def _closed():
    yield
    while Remote.peers:
        Remote.peers.pop().__exit__()


@pytest.fixture
def own(project, tmp_path):
    """A server that the test may kill."""
    server = Remote(project, tmp_path)
    yield server
    server.kill()


def started(remote, *words):
    """Start a command with --server and wait until the server runs it. Returns its client and its process id."""
    client = remote.popen(*words)
    [pid] = until(remote.served, remote.server)
    return client, pid


def error_of(client):
    """Wait for a client that has to fail with one line, and return the line."""
    code, out, err = finished(client)
    assert (code, out, err.count("\n")) == (1, "", 1), (code, out, err)
    return err


# -- who may --------------------------------------------------------------------------------------------------------


def test_a_server_without_tokens_runs_no_commands(project, start, tmp_path):
    server = start("--uds", tmp_path / "s", of=project / "store")
    for address in ("{}:{}".format(*server.address), f"unix:{tmp_path / 's'}"):
        for words in (["models"], ["apply", "definitions.py"], ["history", "--token-file", __file__]):
            (project / "word").write_text("x" * 32)
            words = [word.replace(__file__, "word") for word in words]
            said = commands.error_of(*words, "--server", address, folder=project)
            assert "commands need an admin token, on the server's own machine too" in said
            assert "shorttail serve --token-file FILE" in said


def test_commands_can_be_turned_off(project, tmp_path):
    off = Remote(project, tmp_path, "--no-commands")
    try:
        said = commands.error_of("models", *off.words(), folder=project)
        assert "runs no commands: it was started with --no-commands" in said
        assert off.run("predict", "total", "user_id=1", "amount=4").code == 0
    finally:
        off.kill()


def test_only_an_admin_token_runs_commands(remote):
    assert "command needs the admin token" in remote.run("history", token="serve").err
    step = remote.steps("serve")
    assert step("begin", **BEGIN)[0]["code"] == "PERMISSION_DENIED"
    step = remote.steps()  # the connection has an admin token; the command must have one too
    for token in (TOKENS["serve"], "", "x" * 32):
        assert step("begin", **BEGIN | {"token": token})[0]["code"] == "PERMISSION_DENIED"
    assert step("alive", id=ID)[0]["code"] == "NOT_FOUND"
    with remote.server.connect() as stranger:
        assert stranger.ask(0, 1, "command", ["begin", BEGIN])[2]["code"] == "UNAUTHENTICATED"


def test_http_has_no_commands(remote):
    import urllib.error
    import urllib.request

    port = remote.server.line.split("http on 127.0.0.1:")[1].split()[0]
    headers = {"Authorization": f"Bearer {TOKENS['admin']}"}
    for path in ("command", "v1/command", "v1/commands"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", b"{}", headers, method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 404
        refused.value.close()


# -- steps -----------------------------------------------------------------------------------------------------------


def test_steps_may_come_twice(remote):
    step, data = remote.steps(), json.dumps(REQUEST).encode()
    assert [step("begin", **BEGIN), step("begin", **BEGIN)] == [[None, {}], [None, {}]]
    for _ in range(2):
        assert step("send", id=ID, file="request", offset=0, data=data[:50]) == [None, {}]
    for _ in range(2):
        assert step("send", id=ID, file="request", offset=50, data=data[50:]) == [None, {}]
    sums = {"request": hashlib.sha256(data).hexdigest()}
    assert [step("run", id=ID, sums=sums), step("run", id=ID, sums=sums)] == [[None, {}], [None, {}]]
    first = until(lambda: (answer := step("output", id=ID, seen=0)[1])["code"] is not None and answer, remote.server)
    assert step("output", id=ID, seen=0) == [None, first]
    assert (first["first"], first["code"]) == (0, 0)
    assert b"".join(piece for _, piece in first["pieces"]).startswith(b"view ")
    n = len(first["pieces"])
    assert step("output", id=ID, seen=n) == [None, {"first": n, "pieces": [], "code": 0}]
    assert step("output", id=ID, seen=0)[0]["code"] == "INVALID_ARGUMENT"  # they are gone
    assert [step("end", id=ID), step("end", id=ID)] == [[None, {}], [None, {}]]
    remote.wait_until_clean()


@pytest.mark.parametrize(
    ("name", "given", "code", "said"),
    [
        ("send", {"file": "../x", "offset": 0, "data": b""}, "INVALID_ARGUMENT", "'../x' is not the name of a file"),
        ("send", {"file": "/etc/x", "offset": 0, "data": b""}, "INVALID_ARGUMENT", "is not the name of a file"),
        ("send", {"file": "", "offset": 0, "data": b""}, "INVALID_ARGUMENT", "is not the name of a file"),
        ("send", {"file": "x", "offset": 1, "data": b"x"}, "INVALID_ARGUMENT", "has 0 bytes, and a piece begins at 1"),
        ("send", {"file": "x", "offset": -1, "data": b"xy"}, "INVALID_ARGUMENT", "a piece begins at -1"),
        ("send", {"file": "x", "offset": 0, "data": "text"}, "INVALID_ARGUMENT", "'data' must be bytes, not str"),
        ("send", {"file": "x", "data": b""}, "INVALID_ARGUMENT", "'offset' must be int, not NoneType"),
        ("send", {"file": "x", "offset": 0, "data": bytes(LIMITS.command_piece_bytes + 1)}, "INVALID_ARGUMENT", "most"),
        ("run", {"sums": {"request": "0" * 64}}, "INVALID_ARGUMENT", "did not arrive as it was sent; run"),
        ("run", {"sums": {}}, "INVALID_ARGUMENT", "file begun did not arrive as it was sent"),
        ("run", {"sums": {1: 2}}, "INVALID_ARGUMENT", "did not arrive as it was sent"),
        ("run", {}, "INVALID_ARGUMENT", "'sums' must be dict"),
        ("output", {"seen": 7}, "INVALID_ARGUMENT", "output from piece 7 on is not kept"),
        ("stop", {}, "INVALID_ARGUMENT", "command has no step 'stop'; its steps: begin, send, run, output, alive, end"),
        ("alive", {"id": "1" * 32}, "NOT_FOUND", "`shorttail history` shows what was done"),
        ("alive", {"id": 7}, "INVALID_ARGUMENT", "'id' must be str, not int"),
        ("begin", BEGIN | {"id": "../x"}, "INVALID_ARGUMENT", "must be 32 hexadecimal digits, not '../x'"),
        ("begin", BEGIN | {"id": "1" * 32, "version": 0}, "INVALID_ARGUMENT", "of another version of shorttail"),
        ("begin", BEGIN | {"id": "1" * 32, "login": 7}, "INVALID_ARGUMENT", "'login' must be str"),
    ],
)
def test_wrong_steps_are_refused_and_leave_the_command_as_it_was(remote, name, given, code, said):
    step = remote.steps()
    assert step("begin", **BEGIN) == [None, {}]
    try:
        assert step("send", id=ID, file="begun", offset=0, data=b"abc") == [None, {}]
        error, result = step(name, **{"id": ID, **given})
        assert (error["code"], result) == (code, None)
        assert said in error["message"]
        assert step("send", id=ID, file="begun", offset=3, data=b"def") == [None, {}]
        assert step("run", id=ID, sums={"begun": hashlib.sha256(b"abcdef").hexdigest()}) == [None, {}]
    finally:
        assert step("end", id=ID) == [None, {}]
    remote.wait_until_clean()


def test_params_of_another_form_are_refused(remote):
    with remote.server.connect() as peer:
        peer.ask(0, 0, "auth", [TOKENS["admin"]])
        for params in ([], ["begin"], [7, {}], ["begin", []], ["begin", BEGIN, {"nothing": 1}], "begin"):
            error = peer.ask(0, 1, "command", params)[2]
            assert error["code"] == "INVALID_ARGUMENT"
        assert "command takes [step, {name: value}]" in peer.ask(0, 1, "command", [])[2]["message"]
        assert peer.ask(0, 1, "command", ["alive", {"id": ID}])[2]["code"] == "NOT_FOUND"


def test_more_commands_than_run_at_once_are_told_who_runs(remote):
    step, ids = remote.steps(), [f"{n:032}" for n in range(LIMITS.commands + 1)]
    for number in ids[:-1]:
        assert step("begin", **BEGIN | {"id": number}) == [None, {}]
    error, _ = step("begin", **BEGIN | {"id": ids[-1]})
    assert error["code"] == "RESOURCE_EXHAUSTED"
    assert f"this server runs {LIMITS.commands} commands already: me (ci) since " in error["message"]
    assert "this server runs" in remote.run("history").err
    for number in ids:
        step("end", id=number)
    assert remote.run("history").code == 0


def test_files_of_too_many_bytes_are_refused(project, tmp_path):
    piece = bytes(LIMITS.command_piece_bytes)
    limits = environment_with(tmp_path, command_bytes=3 * len(piece) + 1, command_files=2)
    (tmp_path / "home").mkdir()
    remote = Remote(project, tmp_path / "home", env=limits)
    try:
        step = remote.steps()
        step("begin", **BEGIN)
        for number in range(3):
            assert step("send", id=ID, file="a", offset=number * len(piece), data=piece) == [None, {}]
        error, _ = step("send", id=ID, file="b", offset=0, data=b"xx")
        assert (error["code"], "copy them to the server" in error["message"]) == ("RESOURCE_EXHAUSTED", True)
        assert step("send", id=ID, file="b", offset=0, data=b"x") == [None, {}]
        assert step("send", id=ID, file="c", offset=0, data=b"")[0]["code"] == "RESOURCE_EXHAUSTED"
        step("end", id=ID)
        (project / "long.csv").write_text("age,visits,amount,total\n" + "1,2,4,5\n" * 200_000)
        said = remote.run("models", "deploy", "total", "newer.onnx", "--examples", "long.csv")
        assert (said.code, said.err.count("\n")) == (1, 1)
        assert "the files of a command have more than" in said.err
        remote.wait_until_clean()
    finally:
        remote.kill()


# -- what a client may send -----------------------------------------------------------------------------------------


def output_of(remote, request, **files):
    """Run a command that a client has made by hand. Returns (exit code, what it printed)."""
    step = remote.steps()
    files["request"] = request if isinstance(request, bytes) else json.dumps(request).encode()
    assert step("begin", **BEGIN) == [None, {}]
    for name, data in files.items():
        assert step("send", id=ID, file=name, offset=0, data=data) == [None, {}]
    assert step("run", id=ID, sums={name: hashlib.sha256(data).hexdigest() for name, data in files.items()}) == [
        None,
        {},
    ]
    seen, text, code = 0, b"", None
    while code is None:
        answer = step("output", id=ID, seen=seen)[1]
        seen, code = answer["first"] + len(answer["pieces"]), answer["code"]
        text += b"".join(data for _, data in answer["pieces"])
    step("end", id=ID)
    remote.wait_until_clean()
    return code, text.decode()


@pytest.mark.parametrize(
    ("request_", "files", "code", "said"),
    [
        (REQUEST, {}, 0, "stats"),
        (REQUEST | {"words": ["serve", "--store", "store"]}, {}, 2, "a server does not run 'serve'; it runs apply,"),
        (REQUEST | {"words": ["backup", "/tmp/x", "--store", "store"]}, {}, 2, "a server does not run 'backup'"),
        (REQUEST | {"words": ["init", "churn"]}, {}, 2, "a server does not run 'init'"),
        (REQUEST | {"words": []}, {}, 2, "a server does not run ''"),
        (REQUEST | {"words": ["--version"]}, {}, 2, "a server does not run '--version'"),
        (REQUEST | {"words": ["views", "--store", "/etc", "--server", "x"]}, {}, 2, "give either --store STORE or"),
        (REQUEST | {"words": ["views", "--store", "/etc"]}, {}, 2, "give either --store STORE or --server ADDR"),
        (REQUEST | {"words": ["views", "--nonsense"]}, {}, 2, "No such option"),
        (REQUEST | {"words": ["views", "\0"]}, {}, 1, "'words' of its request must be strings"),
        (REQUEST | {"words": "views"}, {}, 1, "'words' of its request is missing or of another type"),
        (REQUEST | {"words": [["views"]]}, {}, 1, "'words' of its request must be strings"),
        (REQUEST | {"files": [["x"]]}, {}, 1, "'files' pairs of strings"),
        (REQUEST | {"columns": "wide"}, {}, 1, "'columns' of its request is missing or of another type"),
        (REQUEST | {"encoding": "none"}, {}, 0, "stats"),
        (b"\xff", {}, 1, "its request cannot be read"),
        (b"[]", {}, 1, "'words' of its request is missing"),
        (REQUEST | {"files": [["../x", "0"]]}, {"0": b""}, 1, "'../x' is not the whole path of a file"),
        (REQUEST | {"files": [["/x", "../request"]]}, {}, 1, "'/x' is not the whole path of a file"),
        (REQUEST | {"files": [["/x\0", "0"]]}, {"0": b""}, 1, "the server cannot keep a copy"),
        (REQUEST | {"files": [["/" + "x" * 300, "0"]]}, {"0": b""}, 1, "cannot keep a copy: File name too long"),
        (REQUEST | {"files": [["/x", "0"]]}, {}, 1, "/x: the server cannot keep a copy: No such file"),
        (REQUEST | {"files": [["/a/../../../../../../escaped", "0"]]}, {"0": b""}, 0, "stats"),
        (REQUEST | {"words": ["apply", "d.py", "--server", "x"]}, {"definitions": b"{}"}, 1, "of another version"),
        (REQUEST | {"words": ["apply", "d.py", "--server", "x"]}, {}, 2, "the client has sent no definitions"),
        (
            REQUEST | {"words": ["models", "deploy", "total", __file__, "--server", "x"]},
            {},
            1,
            f"model 'total': there is no file {__file__}",  # of the client: the server does not read its own
        ),
        (
            REQUEST
            | {"words": ["models", "deploy", "total", "a.onnx", "--server", "x", "--token-file", "/etc/shadow"]},
            {},
            1,
            "model 'total': there is no file /a.onnx",
        ),
    ],
)
def test_what_a_client_sends_reaches_only_the_store(remote, request_, files, code, said):
    found, text = output_of(remote, request_, **files)
    assert found == code, text
    assert said in text
    assert code == 0 or (text.startswith("error: ") and text.count("\n") == 1), text
    assert not list(remote.temporary.rglob("escaped"))
    assert not Path("/escaped").exists()


def test_definitions_run_where_the_client_is(remote, project):
    before = remote.run("history").out
    (project / "exits.py").write_text("import os\nprint('hello', flush=True)\nos._exit(3)\n")
    assert finished(remote.popen("apply", "exits.py")) == (3, "hello\n", "")
    (project / "prints.py").write_text("print('hello')\n" + (project / "definitions.py").read_text())
    shown = remote.run("apply", "prints.py", "--dry-run")
    assert shown.code == 0
    assert shown.out.startswith("hello\n= entity user")
    (project / "helper.py").write_text("HOURS = '48h'\n")
    text = "from helper import HOURS\n" + (project / "definitions.py").read_text().replace('"2d"', "HOURS")
    (project / "imports.py").write_text(text)
    assert "\n= view stats " in remote.run("apply", "imports.py", "--dry-run").out
    assert remote.run("history").out == before


def test_a_symbolic_link_is_no_model_file(remote, project):
    with contextlib.suppress(FileExistsError):
        (project / "link.onnx").symlink_to("newer.onnx")
    words = ["models", "deploy", "total", "link.onnx"]
    here = commands.error_of(*words, "--store", "store", folder=project)
    assert "is a symbolic link" in here
    assert remote.run(*words).err == here


# -- clients and processes that die ---------------------------------------------------------------------------------


def test_ctrl_c_ends_the_command_on_the_server(remote):
    client, pid = started(remote, *LONG)
    client.send_signal(signal.SIGINT)
    assert finished(client) == (130, "", "\nerror: interrupted\n")
    assert not alive(pid)
    remote.wait_until_clean()


def test_a_client_that_vanishes_ends_its_command(remote):
    client, pid = started(remote, *LONG)
    client.kill()
    finished(client)
    until(lambda: not alive(pid), remote.server)
    remote.wait_until_clean()
    step = remote.steps()  # so does one that sends no more than a part of its files
    step("begin", **BEGIN)
    step("send", id=ID, file="request", offset=0, data=b"x")
    assert not remote.is_clean()
    remote.wait_until_clean()
    assert step("run", id=ID, sums={})[0]["code"] == "NOT_FOUND"


def test_a_command_that_is_killed_is_told(remote):
    client, pid = started(remote, *LONG)
    os.kill(pid, signal.SIGKILL)
    assert "the command was killed on the server, signal 9 (SIGKILL)" in error_of(client)


def test_a_server_that_stops_ends_its_commands(own):
    client, pid = started(own, *LONG)
    assert own.server.stop() == 0
    assert not alive(pid)
    assert own.is_clean()
    assert "it was done as a whole or not at all: `shorttail history` shows which" in error_of(client)


def test_a_server_that_is_killed_ends_its_commands_too(own):
    client, pid = started(own, *LONG)
    pids = [own.server.process.pid, *own.server.workers(), *own.server.children("writer")]
    for each in pids:
        os.kill(each, signal.SIGKILL)
    own.server.wait()
    assert "it was done as a whole or not at all" in error_of(client)
    while alive(pid):  # whoever waits for the tests ends a wait for ever
        time.sleep(0.01)
    assert list(own.temporary.glob("shorttail-command-*"))  # nobody was left to remove it
    own.start()
    assert own.is_clean()
    assert own.run("verify").code == 0


def test_a_writer_that_dies_ends_its_commands(own):
    client, pid = started(own, *LONG)
    [writer] = own.server.children("writer")
    os.kill(writer, signal.SIGKILL)
    assert "it was done as a whole or not at all" in error_of(client)
    until(lambda: not alive(pid) and own.is_clean() and own.server.children("writer"), own.server)
    assert own.run("history").code == 0


def test_output_that_nobody_reads_waits_and_goes_on_when_a_worker_dies(project, tmp_path):
    (tmp_path / "home").mkdir()
    own = Remote(project, tmp_path / "home", env=environment_with(tmp_path, command_silence_s=8.0))
    try:
        check_slow_reader(own, tmp_path)
    finally:
        own.kill()


def check_slow_reader(own, tmp_path):
    n = 60_000
    times = pa.array([1_700_000_000_000_000] * n, pa.timestamp("us"))
    rows = {"user_id": list(range(100, 100 + n)), "age": [1.0] * n, "visits": [7] * n, "tier": ["x" * 30] * n}
    pq.write_table(pa.table(rows | {"at": times}), tmp_path / "many.parquet")
    assert own.run("push", "stats", str(tmp_path / "many.parquet")).code == 0
    client = own.popen("views", "scan", "stats", "--format", "csv", "--where", "visits=7", "--columns", "user_id,tier")
    lines = [client.stdout.readline(), client.stdout.readline()]
    time.sleep(10.0)  # as long as a client may not be silent, and more; the pipes are full
    assert own.served()
    hang_up(own.server)  # another worker answers, too
    [worker] = own.server.workers()
    os.kill(worker, signal.SIGKILL)
    replaced(own.server, worker, 1)
    lines += client.stdout.read().splitlines()
    assert finished(client) == (0, "", "")
    assert sorted(int(line.partition(",")[0]) for line in lines[1:]) == rows["user_id"]


def test_an_apply_that_is_killed_has_done_all_or_nothing(own):
    for turn in range(4):
        client, pid = started(own, "apply", "changed.py" if turn % 2 else "definitions.py", "--by", "ci")
        time.sleep(turn * 0.2)  # at other moments
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        finished(client)
        own.wait_until_clean()
        shown = own.run("views", "show", "stats").out
        assert re.search(r"ttl:\s+(2d|9d)\n", shown), shown
        assert own.run("verify").code == 0


def test_only_the_folders_of_killed_servers_are_removed(project, tmp_path):
    """A link, and a folder that a server holds, are left alone."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "tmp").mkdir()
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("x")
    (home / "tmp" / "shorttail-command-link").symlink_to(target)
    (home / "tmp" / "shorttail-command-left").mkdir()
    (home / "tmp" / "shorttail-command-left" / "request").write_text("{}")
    (home / "tmp" / "shorttail-command-held").mkdir()
    held = os.open(home / "tmp" / "shorttail-command-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    remote = Remote(project, home)
    try:
        assert (target / "file").exists()
        names = sorted(path.name.rpartition("-")[2] for path in (home / "tmp").glob("shorttail-command-*"))
        assert names == ["held", "link"]
    finally:
        os.close(held)
        remote.kill()
