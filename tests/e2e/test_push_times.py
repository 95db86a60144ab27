"""Event times that a server takes, makes or refuses: through clients, raw messages and the command."""

import time

import msgpack
import numpy as np
import pandas as pd
import pytest
from commands import error_of, run_well
from pushing import PUSHED, Pushing, row, tiers
from serving import environment_after, make_store

import shorttail as st

HOUR_US = 3_600_000_000
# Code for the writer: its clock goes back by an hour at each commit.
BACKWARDS = """
import sys
if "shorttail.server.writer" in sys.orig_argv:
    import time
    from shorttail.define import clock
    from shorttail.store import Store
    commit, back_us = Store.commit, [0]
    def jump(self, edits):
        back_us[0] += 3_600_000_000
        return commit(self, edits)
    Store.commit = jump
    clock.now_us = lambda: time.time_ns() // 1000 - back_us[0]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("timed")
    server = Pushing(make_store(home), log=home / "log")
    server.store = home / "store"
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


def now_us():
    return time.time_ns() // 1000


def stored_us(server, user):
    """Return the event time of a user's row."""
    with st.Engine.open(server.store) as engine:
        rows = {}
        for batch in engine.store.scan("stats"):
            rows |= dict(zip(batch.keys[0].tolist(), batch.event_time_us.tolist(), strict=True))
    return rows.get(user)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (lambda: now_us() // 10**6, " in seconds; give microseconds, or datetimes"),
        (lambda: now_us() // 10**3, " in milliseconds; give microseconds, or datetimes"),
        (lambda: now_us() * 1000, " in nanoseconds; give microseconds, or datetimes"),
        (lambda: now_us() + 2 * HOUR_US, "is it a local time? Event times are UTC"),
        (lambda: -1, "is before 1970"),
        (lambda: msgpack.Timestamp(2**34), "is after 2200"),
        (lambda: "2201-01-01", "is after 2200"),
    ],
)
def test_a_wrong_time_refuses_its_whole_push_and_no_other(server, sent, reason):
    good = row([1000, 1001], event_time=[5, now_us()])
    bad = row([1002, 1003], event_time=[now_us(), sent()])
    with server.connect() as peer:
        with server.held():  # all three are one group
            for msgid, columns in enumerate((good, bad, row(1004))):
                peer.send(msgpack.packb([0, msgid, "push", ["stats", columns]]))
        answers = {msgid: (error, result) for _, msgid, error, result in (peer.reply() for _ in range(3))}
        assert answers[0] == (None, {"rows": 2, "older": 0})
        assert answers[2] == (None, PUSHED)
        error = answers[1][0]
        assert error["code"] == "INVALID_ARGUMENT"
        assert error["message"].startswith("view 'stats': column 'event_time' at row 1: ")
        assert error["message"].endswith(reason)
        assert tiers(peer, 1000, 1001, 1002, 1003, 1004) == ["new", "new", None, None, "new"]
        peer.ask(0, 9, "delete", ["stats", {"user_id": [1000, 1001, 1004]}])


def test_the_writer_follows_a_setting_that_another_process_changes(server):
    with st.Client(server.tcp) as client:
        ahead = row(2000, event_time=now_us() + HOUR_US // 2)
        assert client.push("stats", ahead) == 1
        assert client.get_online_features(["stats:tier"], {"user_id": 2000}).statuses["stats"].tolist() == [0]
        run_well("settings", "set", "max_clock_skew", "1m", "--store", str(server.store))
        with pytest.raises(st.InvalidArgument, match=r"30m ahead of this host's clock .*, and max_clock_skew is 1m"):
            client.push("stats", ahead)
        run_well("settings", "set", "max_clock_skew", "90d", "--store", str(server.store))
        assert client.push("stats", row(2000, tier="far", event_time=now_us() + 720 * HOUR_US)) == 1
        run_well("settings", "set", "max_clock_skew", "1h", "--store", str(server.store))
        count = client.push("stats", row(2000, tier="right", event_time=now_us()))
        assert (count, count.older) == (0, 1)
        assert client.push("stats", row(2000, tier="timeless")) == 1
        assert client.get_online_features(["stats:tier"], {"user_id": 2000})["stats:tier"].tolist() == ["timeless"]


def test_a_datetime_of_january_1970_is_no_number_in_another_unit(server, tmp_path):
    moment = pd.Timestamp("1970-01-21T18:00:00", tz="UTC")
    frame = pd.DataFrame(row([3000], taste=[[1.0, 2.0]], event_time=[moment]))
    with st.Client(server.tcp) as client:
        for times in ([moment], [moment.isoformat()], np.array([moment.to_datetime64()])):
            assert client.push("stats", row([3000], taste=[[1.0, 2.0]], event_time=times)) == 1
            assert stored_us(server, 3000) == moment.value // 1000
            client.delete("stats", {"user_id": 3000})
    for where in (("--server", server.tcp), ("--store", str(server.store))):
        for form in (frame, frame.assign(event_time=[moment.isoformat()])):
            form.to_parquet(tmp_path / "rows.parquet")
            run_well("push", "stats", str(tmp_path / "rows.parquet"), *where)
            assert stored_us(server, 3000) == moment.value // 1000
            run_well("delete", "stats", "user_id=3000", *where)
        frame.assign(event_time=[moment.value // 1000]).to_parquet(tmp_path / "rows.parquet")
        said = error_of("push", "stats", str(tmp_path / "rows.parquet"), *where)
        assert f"{tmp_path}/rows.parquet: column 'event_time' at row 0: 1792800000000 is 1970-01-21T18" in said
        assert " in milliseconds; give" in said
        frame.assign(event_time=[pd.Timestamp.now(tz="UTC") + pd.Timedelta("3h")]).to_parquet(tmp_path / "rows.parquet")
        assert "h ahead of this host's clock" in error_of("push", "stats", str(tmp_path / "rows.parquet"), *where)
        assert stored_us(server, 3000) is None


def test_a_file_without_times_gets_them_from_the_server(server, tmp_path):
    with st.Client(server.tcp) as client:
        ahead_us = now_us() + HOUR_US // 2
        client.push("stats", row(4000, event_time=ahead_us))
        pd.DataFrame(row([4000, 4001], tier="file", taste=[[1.0, 2.0]] * 2)).to_parquet(tmp_path / "rows.parquet")
        before_us = now_us()
        said = run_well("push", "stats", str(tmp_path / "rows.parquet"), "--server", server.tcp, "--json").json
        assert (said["loaded"], said["older"]) == (2, 0)
    assert stored_us(server, 4000) == ahead_us + 1
    assert before_us <= stored_us(server, 4001) <= now_us()


def test_pushes_without_times_follow_each_other_while_the_clock_goes_back(tmp_path):
    server = Pushing(make_store(tmp_path), log=tmp_path / "log", env=environment_after(tmp_path, BACKWARDS))
    try:
        with st.Client(server.tcp) as client:
            for number in range(5):
                count = client.push("stats", row(1, visits=number))
                assert (count, count.older) == (1, 0)
                found = client.get_online_features(["stats:visits"], {"user_id": 1})
                assert found["stats:visits"].tolist() == [number]
        assert server.stop() == 0
        assert (tmp_path / "log").read_text() == ""
    finally:
        server.kill()
