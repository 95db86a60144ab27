"""Canaries and shadows of HTTP requests, which work as with MessagePack-RPC."""

import pytest
from http_asking import ask_json
from pushing import until
from test_swap import Swapping

from shorttail.registry import versions as registry

USERS = [1, 2, 3]
SUMS = {1: 11.5, 2: 22.5, 3: 5.0}


@pytest.fixture
def swapping(tmp_path):
    swapping = Swapping(tmp_path)
    yield swapping
    swapping.close()


def invoke(swapping, users, amount=0.5):
    """Send one request and return (predictions, version)."""
    body = {"instances": [{"user_id": user, "amount": amount} for user in users], "parameters": {"model": "total"}}
    status, answer = ask_json(swapping.server, "POST", "/invocations", body)
    assert status == 200, answer
    return answer["predictions"], answer["version"]


def test_a_shadow_runs_on_http_requests_and_never_answers(swapping):
    number = swapping.deploy(promote=False)
    registry.set_shadow(swapping.engine.store, "total", number)
    until(lambda: swapping.model()["shadow"], "it is loaded")
    for _ in range(10):
        assert invoke(swapping, USERS) == ([SUMS[user] for user in USERS], 1)
    shadow = until(
        lambda: (s := swapping.model()["shadow"])["batches"] + s["skipped"] == 10 and s, "all batches are counted"
    )
    assert shadow["batches"] >= 1
    assert (shadow["errors"], shadow["last_error"]) == (0, "")
    assert shadow["rows"] == shadow["rows_differing"] == 3 * shadow["batches"]
    assert shadow["largest_difference"] == max(SUMS.values())


def test_a_canary_answers_the_same_keys_over_both_protocols(swapping):
    number = swapping.deploy(promote=False)
    registry.set_canary(swapping.engine.store, "total", 40.0)
    until(lambda: swapping.model()["canary"] == {"version": number, "percent": 40.0}, "it is loaded")
    users = range(60)
    over_http = [invoke(swapping, [user])[1] for user in users]
    asked = [swapping.peer.ask(0, user, "predict", ["total", {"user_id": user, "amount": 0.5}]) for user in users]
    assert over_http == [reply[3]["version"] for reply in asked]
    assert set(over_http) == {1, number}
