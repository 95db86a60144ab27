"""The history of a store: each change is in it, with its author, in the commit of the change."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from test_engine import write_model

import shorttail as st
from shorttail.cli import cli
from shorttail.define import clock
from shorttail.registry import versions
from shorttail.store import Store, history
from shorttail.store.history import Event

ENTITY = st.Entity("user", keys={"user_id": st.Int64})
VIEW = st.FeatureView("stats", entity=ENTITY, features=[st.Feature("age", st.Float32)])
ROWS = {"user_id": [1, 2, 3], "age": [10.0, 20.0, 30.0]}


def model(home, factor, **more):
    write_model(home / f"{factor}.onnx", 1, factor)
    return st.Model("total", str(home / f"{factor}.onnx"), ["stats:age"], **more)


@pytest.fixture
def engine(tmp_path):
    with st.Engine.open(tmp_path / "store", create=True, by="alice") as engine:
        engine.apply([VIEW, model(tmp_path, 1.0)])
        yield engine


def told(engine, name=None):
    return [(event.who, event.action, event.subject) for event in engine.history(name)]


def test_each_change_is_an_event(engine, tmp_path):
    engine.load("stats", ROWS)
    write_model(tmp_path / "new.onnx", 1, 3.0)
    assert engine.deploy("total", tmp_path / "new.onnx", run="mlflow:1", promote=False) == 2
    versions.set_canary(engine.store, "total", 10.0)
    versions.set_canary(engine.store, "total", 0)
    versions.set_shadow(engine.store, "total", 2)
    versions.set_shadow(engine.store, "total", None)
    versions.promote(engine.store, "total")
    versions.rollback(engine.store, "total")
    engine.store.set_max_clock_skew(5_000_000)
    assert told(engine) == [
        ("alice", "applied", ""),
        ("alice", "loaded", "view stats"),
        ("alice", "deployed", "model total"),
        ("alice", "set a canary of", "model total"),
        ("alice", "ended the canary of", "model total"),
        ("alice", "set a shadow of", "model total"),
        ("alice", "ended the shadow of", "model total"),
        ("alice", "promoted", "model total"),
        ("alice", "rolled back", "model total"),
        ("alice", "set", "max_clock_skew"),
    ]
    deployed = engine.history("total")[1]
    assert deployed.detail["version"] == 2
    assert deployed.detail["run"] == "mlflow:1"
    assert deployed.detail["file"] == str(tmp_path / "new.onnx")
    assert engine.history("total")[0].action == "applied"
    assert [event.action for event in engine.history("stats")] == ["applied", "loaded"]
    assert engine.history("stats")[1].detail == {"rows": 3, "given": 3, "older": 0, "duplicate": 0}


def test_what_changes_nothing_is_no_event(engine, tmp_path):
    before = engine.history()
    engine.apply([VIEW, model(tmp_path, 1.0)])
    engine.store.set_max_clock_skew(engine.store.catalog.max_clock_skew_us)
    with pytest.raises(st.InvalidArgument):
        engine.load("stats", {"user_id": [1]})
    engine.push("stats", ROWS)
    engine.delete("stats", {"user_id": [1]})
    assert engine.history() == before


def test_a_failed_change_is_no_event(engine):
    before = engine.history()

    class Fails(Exception):
        pass

    def fail():
        with engine.store.edit_catalog("changed") as catalog:
            catalog.max_clock_skew_us = 7
            raise Fails

    with pytest.raises(Fails):
        fail()
    assert engine.history() == before


def test_what_answered_at_a_time(engine, tmp_path, monkeypatch):
    times_us = iter(range(2_000_000_000_000_000, 3_000_000_000_000_000, 1_000_000))
    monkeypatch.setattr(clock, "now_us", lambda: next(times_us))
    engine.load("stats", ROWS)
    first = engine.history()[-1].time_us
    write_model(tmp_path / "new.onnx", 1, 3.0)
    engine.deploy("total", tmp_path / "new.onnx")
    second = engine.history()[-1].time_us

    def at(time_us):
        return engine.history().at(datetime.fromtimestamp(time_us / 1e6, UTC))

    assert at(first)["model total"]["version"] == 1
    assert at(second - 1)["model total"]["version"] == 1
    assert at(second)["model total"]["version"] == 2
    assert at(second)["model total"]["sha256"] == engine.store.catalog.model("total").version(2).sha256
    assert at(first)["view stats"] == {"table": engine.store.catalog.tables["stats"].id}
    assert at(first)["view stats"] != at(engine.history()[0].time_us)["view stats"]
    with pytest.raises(st.InvalidArgument, match=r"does not reach back to .*; the first event is of"):
        at(engine.history()[0].time_us - 1_000_000)


def test_times_never_go_back(engine, monkeypatch):
    last = engine.history()[-1].time_us
    monkeypatch.setattr(clock, "now_us", lambda: last - 3_600_000_000)
    engine.store.set_max_clock_skew(5_000_000)
    assert engine.history()[-1].time_us == last


def test_a_damaged_event_is_found(engine, tmp_path):
    engine.load("stats", ROWS)
    with engine.store.environment.write() as writer:
        value = bytearray(writer.txn.get(history.key_of(1)))
        value[-3] ^= 1
        writer.txn.put(history.key_of(1), bytes(value))
    with pytest.raises(st.ShorttailError, match="event 1 of the history is damaged"):
        engine.history()
    done = CliRunner().invoke(cli, ["verify", "--store", str(tmp_path / "store")])
    assert "event 1 of the history is damaged" in done.output
    engine.store.set_max_clock_skew(5_000_000)  # a change is still possible
    with engine.store.environment.write() as writer:
        writer.txn.delete(history.key_of(2))
    done = CliRunner().invoke(cli, ["verify", "--store", str(tmp_path / "store")])
    assert "the history" in done.output


def test_an_event_survives_its_encoding():
    event = Event("loaded", "view größe", "ci", 5, {"rows": 3, "from": ["a.parquet"]}, {"view größe": None}, 7)
    assert Event.decode(history.key_of(7), event.encode()) == event


def test_the_command(engine, tmp_path):
    store = str(tmp_path / "store")
    (tmp_path / "rows.csv").write_text("user_id,age\n1,2.5\n")
    done = CliRunner().invoke(cli, ["load", "stats", str(tmp_path / "rows.csv"), "--store", store, "--by", "ci"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["history", "--store", store])
    lines = done.output.splitlines()
    assert len(lines) == 2
    assert "  alice  applied: + entity user; + view stats; + model total" in lines[0]
    assert lines[1].endswith(f"  ci  loaded view stats: 1 row, from {tmp_path / 'rows.csv'}")
    done = CliRunner().invoke(cli, ["history", "total", "--store", store, "--json"])
    [only] = json.loads(done.output)
    assert (only["number"], only["who"], only["action"]) == (1, "alice", "applied")
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="minutes")
    done = CliRunner().invoke(cli, ["history", "--at", soon, "--store", store])
    assert "model total  version 1 (sha256 " in done.output
    done = CliRunner().invoke(cli, ["history", "stat", "--store", store])
    assert done.exit_code == 1
    assert "the history has nothing of 'stat'; did you mean 'stats'?" in str(done.exception)
    done = CliRunner().invoke(cli, ["history", "--at", "yesterday", "--store", store])
    assert done.exit_code == 2
    assert "'yesterday' is not a time; write 2026-11-20T10:00" in done.output


def test_an_empty_store_has_no_history(tmp_path):
    with Store.open(tmp_path / "store", create=True) as store:
        assert store.history() == []
