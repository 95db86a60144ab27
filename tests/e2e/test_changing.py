"""Definitions change while a server answers: every answer is of the old state or the new one, and no request fails."""

import itertools
import threading
from dataclasses import dataclass, field

import msgpack
import pytest
from commands import run_well
from serving import DEFINITIONS, PREDICT, PREDICTED, make_store, until, write_sum

import shorttail as st
from shorttail.errors import NotFound, ShorttailError

FEATURES = """    st.Feature("age", st.Float32, default=1.5),
    st.Feature("visits", st.Int64),
    st.Feature("tier", st.String),
    st.Feature("taste", st.Vector(2)),
"""
STATES = [
    FEATURES,
    FEATURES + '    st.Feature("score", st.Float32, default=0.25),\n',
    FEATURES + '    st.Feature("score", st.Float64, default=0.25),\n',
    FEATURES + '    st.Feature("points", st.Float64, default=0.25, renamed_from="score"),\n',
    FEATURES + '    st.Feature("points", st.Float64, default=0.5),\n',
    FEATURES,
]
ASKED = {
    1: "stats:score",
    2: "stats:score",
    3: "stats:points",
    4: "stats:points",
}


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


def client_of(server):
    host, port = server.address
    return st.Client(f"{host}:{port}")


@dataclass
class Asker(threading.Thread):
    """Asks for features and predictions all the time. `allowed`: feature -> the values that it may have for user 1."""

    connect: object
    allowed: dict
    wrong: list = field(default_factory=list)
    asked: int = 0

    def __post_init__(self):
        super().__init__()
        self.ends = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self):
        try:
            with self.connect() as peer:
                for number in itertools.count():
                    if self.ends.is_set():
                        return
                    allowed = dict(self.allowed)
                    peer.send(msgpack.packb([0, 2 * number, *PREDICT[2:]]))
                    asked = [list(allowed), {"user_id": 1}]
                    peer.send(msgpack.packb([0, 2 * number + 1, "get_online_features", asked]))
                    for _ in range(2):
                        self.check(peer.reply(), allowed)
                    self.asked += 1
        except Exception as error:
            self.wrong.append(repr(error))

    def check(self, reply, allowed):
        _, number, error, result = reply
        if error is not None:
            self.wrong.append(error)
        elif number % 2 == 0:
            if result["outputs"]["total"] != PREDICTED[3]["outputs"]["total"]:
                self.wrong.append(result)
        else:
            for name, values in zip(result["feature_names"], result["values"], strict=True):
                if values[0] not in allowed[name]:
                    self.wrong.append((name, values, allowed[name]))


def test_the_first_request_that_finds_a_new_type_is_answered(start, tmp_path):
    """A batch that was read for the old plan is answered with the types of the new one."""
    user = st.Entity("user", keys={"id": st.Int64})
    names = [f"f{i}" for i in range(12)]

    def view(widened):
        types = [st.Int64 if i < widened else st.Int32 for i in range(len(names))]
        return st.FeatureView("v", user, [st.Feature(n, t, default=0) for n, t in zip(names, types, strict=True)])

    with st.Engine.open(tmp_path / "store", create=True) as engine:
        engine.apply([view(0)])
        engine.push("v", {"id": [1], **{name: [i] for i, name in enumerate(names)}})
        server = start("--store", tmp_path / "store")
        host, port = server.address
        seen, failed, stop = set(), [], threading.Event()

        def ask():
            with st.Client(f"{host}:{port}", retries=0) as client:
                while not stop.is_set():
                    try:
                        found = client.get_online_features([f"v:{name}" for name in names], {"id": [1]})
                    except ShorttailError as error:
                        failed.append(error)
                        continue
                    if [values[0] for values in found.to_dict().values()] != list(range(len(names))):
                        failed.append(found.to_dict())
                    seen.add(list(found.feature_types.values()).count("Int64"))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for widened in range(1, len(names) + 1):
                engine.apply([view(widened)])
                until(lambda: widened in seen, server)  # noqa: B023
        finally:
            stop.set()
            asking.join()
        assert not failed
        assert max(seen) == len(names)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_view_changes_while_a_server_answers(start, store, workers):
    server = start("--workers", workers, "--p99-budget-ms", 1e6)  # refuses nothing
    definitions = store.parent / "definitions.py"
    allowed = {"stats:age": {10.0}, "stats:visits": {1}}
    askers = [Asker(server.connect, allowed) for _ in range(3)]
    for asker in askers:
        asker.start()
    pushed = itertools.count(1000)
    try:
        with client_of(server) as client:
            for _ in range(2):
                for state, features in list(enumerate(STATES))[1:]:
                    definitions.write_text(DEFINITIONS.replace(FEATURES, features))
                    key = next(pushed)
                    run_well("apply", str(definitions), "--store", str(store), "--wait")
                    # All workers answer from the new state now, each of their connections.
                    name = ASKED.get(state)
                    for _ in range(2 * workers):
                        with client_of(server) as other:
                            if name is not None:
                                found = other.get_online_features([name], {"user_id": [1]})
                                assert found.to_dict()[name] == [0.5 if state == 4 else 0.25], state
                    rows = {"user_id": [key], "age": [1.0], "visits": [key], "tier": ["x"], "taste": [[0.0, 0.0]]}
                    if name is not None:
                        rows[name.partition(":")[2]] = [float(key)]
                    assert client.push("stats", rows) == 1
                    found = client.get_online_features(["stats:visits"], {"user_id": [key]})
                    assert found.to_dict()["stats:visits"] == [key]
        until(lambda: all(asker.asked > 50 for asker in askers), server)
    finally:
        for asker in askers:
            asker.ends.set()
        for asker in askers:
            asker.join()
    assert [asker.wrong for asker in askers] == [[]] * len(askers)


def test_a_dropped_view_is_not_found_from_then_on(start, store):
    server = start()
    definitions = store.parent / "definitions.py"
    other = 'other = st.FeatureView("other", entity=user, features=[st.Feature("x", st.Int64)])\n'
    definitions.write_text(DEFINITIONS + other)
    run_well("apply", str(definitions), "--store", str(store), "--wait")
    with client_of(server) as client:
        client.push("other", {"user_id": [1], "x": [5]})
        assert client.get_online_features(["other:x"], {"user_id": [1]}).to_dict()["other:x"] == [5]
        definitions.write_text(DEFINITIONS)
        run_well("apply", str(definitions), "--store", str(store), "--prune", "--wait")
        with pytest.raises(NotFound, match="no feature view 'other'"):
            client.get_online_features(["other:x"], {"user_id": [1]})
        with pytest.raises(NotFound, match="no feature view 'other'"):
            client.push("other", {"user_id": [1], "x": [5]})
        assert client.predict("total", {"user_id": 1, "amount": 1.0}).version == 1
        definitions.write_text(DEFINITIONS.partition("total =")[0])
        run_well("apply", str(definitions), "--store", str(store), "--prune", "--wait")
        with pytest.raises(NotFound, match="no model 'total'"):
            client.predict("total", {"user_id": 1, "amount": 1.0})
        assert client.get_online_features(["stats:age"], {"user_id": [1]}).to_dict()["stats:age"] == [10.0]


def test_a_new_version_answers_when_apply_has_waited(start, store):
    server = start("--workers", 2)
    for factor in (2.0, 3.0):
        write_sum(store.parent / "total.onnx", factor)
        run_well("apply", str(store.parent / "definitions.py"), "--store", str(store), "--wait")
        for _ in range(6):
            with client_of(server) as client:
                found = client.predict("total", {"user_id": 1, "amount": 1.0})
                assert found.outputs["total"].tolist() == [12.0 * factor]
