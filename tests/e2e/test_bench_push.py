"""`shorttail bench --push` beside a real server: whose rows it writes, and what is left of them."""

import signal
import subprocess
import sys

import commands
import pytest
from serving import ROWS, TIMEOUT_S

import shorttail as st
from shorttail.loadtest import text
from shorttail.loadtest.own_keys import FIRST, N_KEYS, OwnKeys

PUSH = ["--push", "stats", "--rate", "300", "--duration", "500ms", "--warmup", "100ms", "--metrics", "off"]
LOOKED_UP = ["stats:age", "stats:visits", "stats:tier", "stats:taste"]


@pytest.fixture
def client(start):
    with st.Client("{}:{}".format(*start().address), timeout_s=TIMEOUT_S) as client:
        client.push("stats", ROWS)
        yield client


def rows_of(client, keys):
    found = client.get_online_features(LOOKED_UP, {"user_id": keys})
    return found.to_dict(), {name: codes.tolist() for name, codes in found.feature_statuses.items()}


def own_keys(seed):
    return range(FIRST + seed * N_KEYS, FIRST + (seed + 1) * N_KEYS)


def rows_left(client, seed):
    return int((client.get_online_features(["stats:age"], {"user_id": own_keys(seed)}).statuses["stats"] != 2).sum())


@pytest.mark.parametrize("options", [[], ["--keys", "user_id=uniform:1:3"]], ids=["alone", "with keys"])
@pytest.mark.parametrize("request_options", [[], ["--predict", "total", "--keys", "user_id=uniform:1:3"]])
def test_pushes_touch_no_row_and_leave_none(client, options, request_options):
    if options and request_options:
        options = []
    before = rows_of(client, ROWS["user_id"])
    result = commands.run_well("bench", str(client.address), *PUSH, *options, *request_options, "--seed", "5", "--json")
    own = result.json["workload"]["own_keys"]
    assert result.json["steps"][0]["good"] > 50
    assert result.json["steps"][0]["errors"] == {}
    assert 50 < own.pop("removed") <= N_KEYS
    assert own == {"view": "stats", "keys": N_KEYS, "problem": None}
    assert rows_of(client, ROWS["user_id"]) == before
    assert rows_left(client, 5) == 0


def test_the_result_says_what_was_removed(client):
    out = commands.run_well("bench", str(client.address), *PUSH).out
    assert f"pushes to 'stats' had {N_KEYS:,} keys of their own; " in out
    assert "rows removed at the end" in out


def test_rows_are_overwritten_only_when_told(client):
    before = rows_of(client, ROWS["user_id"])
    options = ["--keys", "user_id=uniform:1:3", "--overwrite-live-rows"]
    result = commands.run_well("bench", str(client.address), *PUSH, *options, "--json")
    assert result.json["workload"]["own_keys"] is None
    assert rows_of(client, ROWS["user_id"]) != before


def test_a_run_whose_keys_exist_is_refused(client):
    keys = own_keys(7)
    client.push("stats", {name: values[0] for name, values in ROWS.items()} | {"user_id": keys[-1]})
    assert commands.error_of("bench", str(client.address), *PUSH, "--seed", "7") == (
        "error: --push stats: the view has 1 of the keys that --seed 7 pushes to; take another --seed, "
        "or say --overwrite-live-rows\n"
    )
    assert rows_left(client, 7) == 1


def test_ctrl_c_removes_the_rows(client, start):
    command = [
        sys.executable,
        "-m",
        "shorttail",
        "bench",
        str(client.address),
        *PUSH,
        "--duration",
        "10m",
        "--seed",
        "9",
    ]
    pipe = subprocess.PIPE
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed) as process:
        try:
            while not rows_left(client, 9):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "rows removed at the end" in output
    assert rows_left(client, 9) == 0


def test_rows_that_cannot_be_removed_are_said():
    found = OwnKeys("stats", {"user_id": "Int64"}, "age", 1).remove("127.0.0.1:1")
    assert (found["view"], found["keys"], found["removed"]) == ("stats", N_KEYS, 0)
    assert found["problem"].startswith("no server at 127.0.0.1:1")
    assert text.own_keys_line(found) == (
        f"pushes to 'stats' had {N_KEYS:,} keys of their own; rows may be left: {found['problem']}"
    )
