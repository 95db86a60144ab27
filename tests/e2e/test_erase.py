"""delete-entity while `shorttail serve` runs: the row is gone, and a push through the server does not bring it back."""

import pytest
from commands import run_well
from pushing import Pushing, row
from serving import make_store

import shorttail as st


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("erase")
    server = Pushing(make_store(home), "--workers", "2", log=home / "log")
    server.store = str(home / "store")
    yield server
    assert server.stop() == 0
    assert server.log.read_text() == ""


def test_a_push_through_a_server_does_not_bring_an_erased_user_back(server):
    with st.Client(server.tcp) as client:
        assert client.push("stats", row(70_001)) == 1
        receipt = run_well("delete-entity", "user", "user_id=70001", "--store", server.store, "--json").json
        assert receipt["rows"]["stats"] == 1
        late = client.push("stats", row([70_001, 70_002], event_time=receipt["time"]))
        assert (late.given, late.older, int(late)) == (2, 1, 1)
        found = client.get_online_features(["stats:age"], {"user_id": [70_001, 70_002]})
        assert found["stats:age"].tolist()[1] == 1.0
        assert [status.name for status in map(st.Status, found.statuses["stats"])] == ["NOT_FOUND", "PRESENT"]
        assert client.push("stats", row(70_001)) == 1  # its event is of now
