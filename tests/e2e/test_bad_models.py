"""A model that cannot be loaded is unavailable, whatever its file does to the worker; the other models serve."""

import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from bad_models import deadly_to_load, endless, plant, sound, store_of
from serving import SERVE, TIMEOUT_S, environment_after, hang_up, replaced, until

import shorttail as st
from shorttail.store.files import model_path

GOOD = [0, 1, "predict", ["good", {"a": 0.0}]]
ANSWERED = [1, 1, None, {"outputs": {"y": [[0.5]]}, "version": 1}]


def get(server, path):
    """Return (status, body) of a GET request to the HTTP port."""
    port = re.search(r"http on 127\.0\.0\.1:(\d+)", server.line)[1]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def corrupt(path):
    path.write_bytes(b"no model")


def remove(path):
    path.unlink()


def check_that_bad_is_unavailable(server, reason):
    """The model "bad" is unavailable for that reason, and says so everywhere; the model "good" serves."""
    with server.connect() as peer:
        assert peer.ask(*GOOD) == ANSWERED
        _, _, error, _ = peer.ask(0, 2, "predict", ["bad", {"a": 0.0}])
        assert error["code"] == "UNAVAILABLE"
        assert reason in error["message"]
        shown = {model["name"]: model for model in peer.ask(0, 3, "models", [])[3]}
        assert reason in shown["bad"]["problem"]
        assert shown["good"]["problem"] is None
    assert get(server, "/readyz") == (200, "ok\nnot loaded: bad\n")
    assert get(server, "/v2/health/ready")[0] == 200
    assert get(server, "/v2/models/good/ready")[0] == 200
    port = re.search(r"http on 127\.0\.0\.1:(\d+)", server.line)[1]
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v2/repository/index", b"{}", method="POST")
    with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
        states = {model["name"]: (model["state"], model["reason"]) for model in json.load(answer)}
    assert states["good"] == ("READY", "")
    assert states["bad"][0] == "UNAVAILABLE"
    assert reason in states["bad"][1]
    for path in ("/v2/models/bad/ready", "/v2/models/bad/versions/1/ready"):
        status, body = get(server, path)
        assert status == 503
        assert reason in json.loads(body)["error"]


def check(store, *options):
    return subprocess.run(
        [*SERVE, "--store", str(store), "--check", *options], capture_output=True, text=True, timeout=TIMEOUT_S
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(corrupt, "is not the file that was registered: its SHA-256 differs"), (remove, "is gone")],
)
def test_a_file_that_does_not_load_takes_no_other_model_down(tmp_path, start, damage, reason):
    store = store_of(tmp_path, "good", "bad")
    damage(model_path(store, "bad", 1))
    server = start("--http-port", "0", "--workers", "2", of=store)
    assert server.line.endswith(" · models: good v1 · views: none · not loaded: bad\n")
    check_that_bad_is_unavailable(server, reason)
    lines = server.log.read_text().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: model 'bad' version 1: ")
    assert reason in lines[0]
    # A new version is loaded, though the worker was started without the old one.
    with st.Engine.open(store) as engine:
        engine.deploy("bad", other(tmp_path))
    until(lambda: get(server, "/v2/models/bad/ready")[0] == 200, server)
    until(lambda: get(server, "/readyz") == (200, "ok\n"), server)
    assert server.stop() == 0


def other(folder):
    """A sound model of another content."""
    path = folder / "other.onnx"
    sound(path)
    path.write_bytes(path.read_bytes() + b"\x28\x02")  # model_version
    return path


def test_a_worker_that_is_started_again_serves_without_a_file_that_was_damaged(tmp_path, start):
    store = store_of(tmp_path, "good", "bad")
    server = start("--http-port", "0", of=store)
    corrupt(model_path(store, "bad", 1))
    [pid] = server.workers()
    os.kill(pid, signal.SIGKILL)
    replaced(server, pid, 1)
    with server.connect() as peer:
        assert peer.ask(*GOOD) == ANSWERED
    check_that_bad_is_unavailable(server, "its SHA-256 differs")
    lines = server.log.read_text().splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"worker 1 (pid {pid}) died: signal 9 (SIGKILL)")
    assert lines[1].startswith("error: model 'bad' version 1: ")
    assert server.stop() == 0


def test_a_file_that_kills_the_worker_is_not_loaded_again(tmp_path, start):
    store = store_of(tmp_path, "good", "bad", "also_good")
    plant(store, "bad", deadly_to_load)
    server = start("--http-port", "0", of=store)
    check_that_bad_is_unavailable(server, "is not run any more: server processes died in it, or hung")
    log = server.log.read_text()
    assert re.fullmatch(
        r"worker 1 \(pid \d+\) died: signal 8 \(SIGFPE\); starting it again in 0\.1 s\n"
        r"error: model 'bad' version 1 is not run any more: .*; deploy another version, or reload .*\n",
        log,
    ), log
    # A reload tries it again; the new worker that it kills is started again too.
    assert "reloaded: 1 worker replaced\n" in hang_up(server)
    check_that_bad_is_unavailable(server, "is not run any more")
    with st.Engine.open(store) as engine:
        engine.deploy("bad", other(tmp_path))
    until(lambda: get(server, "/v2/models/bad/ready")[0] == 200, server)
    assert server.stop() == 0


def test_files_that_never_load_are_given_up(tmp_path, start):
    """When a server starts, and in a worker that serves. The test waits for both at the same time."""
    starting, serving = (tmp_path / name for name in ("starting", "serving"))
    for folder in (starting, serving):
        folder.mkdir()
        store_of(folder, "good", "bad")
    plant(starting / "store", "bad", endless)
    server = start("--http-port", "0", "--start-timeout", "20s", of=serving / "store")
    plant_second_version(serving / "store", endless)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(start, "--http-port", "0", "--start-timeout", "20s", of=starting / "store")
        check_a_version_that_never_loads(server, serving)
        check_a_start_with_a_file_that_never_loads(started.result())


def check_a_version_that_never_loads(server, folder):
    """The version before goes on, and later versions are loaded."""
    [pid] = server.workers()
    until(lambda: "gives it up" in server.log.read_text(), server)
    with server.connect() as peer:
        assert peer.ask(0, 1, "predict", ["bad", {"a": 0.0}]) == ANSWERED
    with st.Engine.open(folder / "store") as engine:
        assert engine.deploy("bad", other(folder)) == 3
        assert engine.deploy("good", other(folder)) == 2
    for path in ("/v2/models/bad/versions/3/ready", "/v2/models/good/versions/2/ready"):
        until(lambda path=path: get(server, path)[0] == 200, server)
    assert server.workers() == [pid]
    assert server.log.read_text().startswith(f"worker 1 (pid {pid}) did not load a model in 20 s, and gives it up\n")
    server.kill()  # its thread still loads the file


def check_a_start_with_a_file_that_never_loads(server):
    check_that_bad_is_unavailable(server, "is not run any more: server processes died in it, or hung")
    assert re.match(
        r"worker 1 \(pid \d+\) died: it was not ready after 20 s, and was killed; starting it again in 0\.1 s\n",
        server.log.read_text(),
    )
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda store: corrupt(model_path(store, "bad", 1)), r"error: model 'bad' version 1: .* its SHA-256 differs"),
        (lambda store: plant(store, "bad", deadly_to_load), r"error: model 'bad' version 1 is not run any more: .*"),
    ],
)
def test_check_fails_and_says_which_model_is_bad(tmp_path, damage, said):
    store = store_of(tmp_path, "good", "bad")
    assert check(store).returncode == 0
    damage(store)
    done = check(store)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(said, done.stderr.splitlines()[-1])


def test_a_worker_that_hangs_for_another_reason_does_not_start(tmp_path):
    """No model is to blame, so that it would hang again."""
    store = store_of(tmp_path, "good")
    folder = tmp_path / "path"
    folder.mkdir()
    hang = "import sys, time\nif any('server.worker' in part for part in sys.orig_argv): time.sleep(600)\n"
    done = subprocess.run(
        [*SERVE, "--store", str(store), "--port", "0", "--start-timeout", "2"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment_after(folder, hang),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a worker died while it started: it was not ready after 2 s, and was killed\n"


def test_a_start_timeout_is_a_time(store):
    done = check(store, "--start-timeout", "soon")
    assert done.returncode == 2
    assert "'soon' is not a time; write 90s or 10m" in done.stderr


def plant_second_version(store, make):
    """Make a bad file version 2 of the model "bad", as if it had been sound where it was applied."""
    plant(store, "bad", make)
    with st.Engine.open(store) as engine:
        path = model_path(store, "bad", 2)
        path.parent.mkdir()
        path.write_bytes(model_path(store, "bad", 1).read_bytes())
        with engine.store.edit_catalog() as catalog:
            entry = catalog.model("bad")
            catalog.models["bad"] = entry.with_version(2, entry.version(1)).with_current(2)


def test_a_version_that_kills_the_worker_while_it_serves(tmp_path, start):
    """The worker loads it in the background, dies, and comes back without it."""
    store = store_of(tmp_path, "good", "bad")
    server = start("--http-port", "0", of=store)
    [pid] = server.workers()
    plant_second_version(store, deadly_to_load)
    replaced(server, pid, 1)
    with server.connect() as peer:
        assert peer.ask(*GOOD) == ANSWERED
    assert get(server, "/readyz") == (200, "ok\nnot loaded: bad\n")
    assert server.stop() == 0


def test_the_previous_version_serves_where_the_new_one_does_not_load(tmp_path, start):
    store = store_of(tmp_path, "good", "bad")
    server = start("--http-port", "0", of=store)
    with st.Engine.open(store) as engine:
        engine.deploy("bad", other(tmp_path), promote=False)
        corrupt(model_path(store, "bad", 2))
        with engine.store.edit_catalog() as catalog:  # behind the command's back
            catalog.models["bad"] = catalog.model("bad").with_current(2)
    until(lambda: get(server, "/v2/models/bad/versions/2/ready")[0] == 503, server)
    until(lambda: "version 1 serves" in server.log.read_text(), server)
    assert get(server, "/v2/models/bad/versions/2/ready")[0] == 503
    assert get(server, "/v2/models/bad/ready")[0] == 200
    until(lambda: get(server, "/readyz") == (200, "ok\n"), server)
    with server.connect() as peer:
        assert peer.ask(0, 1, "predict", ["bad", {"a": 0.0}]) == ANSWERED
    assert server.stop() == 0
